"""Time and memory of parsing binary CSR files: python benchmarks/parse.py --entries 10000000

Writes files as CP2K does (one record per element, row-major, of every image of a silicon-like crystal), parses them in this
process, and prints one JSON line: seconds, peak growth of memory over the size of the files.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from hamscale.dft.outputs import RECORD, _block_pattern, _scatter
from hamscale.files import provenance


def write_files(folder: Path, entries: int, images: int = 27, orbitals_per_atom: int = 13):
    """H and S of `images` cells; a tenth of the atom pairs has a block."""
    blocks = entries // (2 * images * orbitals_per_atom**2)
    n_atoms = int(np.sqrt(10 * blocks))
    rng = np.random.default_rng(0)
    files = {}
    for name in ("KS", "S"):
        files[name] = []
        for image in range(images):
            i, j = np.divmod(np.sort(rng.choice(n_atoms**2, blocks, replace=False)), n_atoms)
            a, b = np.divmod(np.arange(orbitals_per_atom**2), orbitals_per_atom)
            records = np.empty(blocks * orbitals_per_atom**2, RECORD)
            records["head"] = records["tail"] = 16
            records["row"] = (i[:, None] * orbitals_per_atom + a + 1).ravel()
            records["column"] = (j[:, None] * orbitals_per_atom + b + 1).ravel()
            records["value"] = rng.normal(size=len(records))
            records = records[np.lexsort((records["column"], records["row"]))]
            path = folder / f"{name}_{image}.csr"
            records.tofile(path)
            files[name].append(path)
    return files, n_atoms


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--entries", type=int, default=10_000_000)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as folder:
        # written by another process, whose memory is not counted
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            files, n_atoms = pool.apply(write_files, (Path(folder), entries))
        size = sum(path.stat().st_size for paths in files.values() for path in paths)
        orbitals = np.full(n_atoms, 13)
        cells = np.array([(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)])
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
        pairs = _block_pattern(files, cells, orbitals)
        offsets = np.concatenate([[0], np.cumsum(orbitals[pairs[:, 0]] * orbitals[pairs[:, 1]])])
        for paths in files.values():
            _scatter(paths, cells, orbitals, pairs, offsets)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    result = {"entries": size // RECORD.itemsize, "seconds": round(seconds, 2), "memory_over_file_size": round(peak / size, 2)}
    print(json.dumps(result | provenance()))


if __name__ == "__main__":
    main()
