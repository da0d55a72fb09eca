"""Time and memory of parsing binary CSR files: python benchmarks/parse.py --entries 10000000

Another process writes files as CP2K does: one record per element, row-major, H and S of 27 cells, each block with its transpose
in the opposite cell. This one does all that `read_run` does after the log is read, and prints one JSON line: seconds, and the
growth of its peak resident memory over the size of the files.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from ase import Atoms

from hamscale.basis import Basis, read_element_basis
from hamscale.dft import csr, outputs
from hamscale.files import provenance
from hamscale.operators import Operators

CELLS = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)  # the opposite of cell n is 26 - n
N = 13  # orbitals of an atom


def write_files(folder: Path, entries: int) -> tuple[dict[str, list[Path]], int]:
    """A tenth of the atom pairs has a block. Returns files by matrix and cell, and the number of atoms."""
    blocks = entries // (2 * len(CELLS) * N**2)
    n_atoms = int(np.sqrt(10 * blocks))
    rng, files = np.random.default_rng(0), {}
    for name in ("KS", "S"):
        files[name] = [folder / f"{name}_{image}.csr" for image in range(len(CELLS))]
        for image in range(14):
            i, j = np.divmod(rng.choice(n_atoms**2, blocks, replace=False), n_atoms)
            values = rng.normal(size=(blocks, N, N))
            if image == 13:  # R = 0: every atom's own block, symmetric
                i = j = np.arange(n_atoms)
                values = values[:n_atoms] + values[:n_atoms].transpose(0, 2, 1)
            _write(files[name][image], i, j, values)
            _write(files[name][26 - image], j, i, values.transpose(0, 2, 1))
    return files, n_atoms


def _write(path: Path, i, j, values):
    a, b = np.divmod(np.arange(N**2), N)
    records = np.empty(values.size, csr.RECORD)
    records["head"] = records["tail"] = 16
    records["row"], records["column"] = (i[:, None] * N + a + 1).ravel(), (j[:, None] * N + b + 1).ravel()
    records["value"] = values.ravel()
    records[np.lexsort((records["column"], records["row"]))].tofile(path)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--entries", type=int, default=10_000_000)
    entries = parser.parse_args().entries
    basis = Basis([read_element_basis("Si", "DZVP-MOLOPT-SR-GTH", "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            files, n_atoms = pool.apply(write_files, (folder, entries))
        size = sum(path.stat().st_size for paths in files.values() for path in paths)
        atoms = Atoms(f"Si{n_atoms}", np.zeros((n_atoms, 3)), cell=np.eye(3), pbc=True)
        before, start = peak_bytes(), time.perf_counter()
        orbitals = basis.n_orbitals(atoms.numbers)
        pairs, values = csr.read_blocks(files, CELLS, orbitals)
        operators = Operators(atoms, basis, pairs, values["KS"], values["S"])
        outputs._check_diagonal(folder, operators)
        outputs._make_hermitian(folder, operators)
        seconds = time.perf_counter() - start
        peak = peak_bytes() - before
    result = {
        "entries": size // csr.RECORD.itemsize,
        "seconds": round(seconds, 2),
        "memory_over_file_size": round(peak / size, 2),
    }
    print(json.dumps(result | provenance()))


if __name__ == "__main__":
    main()
