"""Read mutants of small valid files, each in a child with limits of time and memory, and say what became of them.

A mutant is refused, by ValueError or OSError of one line, or taken, and then has passed the checks of the reader and of this
module. Anything else is a fault: another exception, a message of several lines, a crash, more than SECONDS, or more memory than
8 times the files and 256 MiB.

    python tests/fuzz/readers.py --count 1000 --seed 3 cp2k-log csr     # a line of JSON for each reader: counts and faults
    python tests/fuzz/readers.py --count 1 --seed 3 --first 417 csr     # mutant 417 again
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import ase.io
import h5py
import numpy as np

from fuzz.mutate import mutants
from hamscale.basis import find_data_file, read_element_basis
from hamscale.config import load_material, load_model
from hamscale.dft.csr import read_csr
from hamscale.dft.outputs import check_eigenvalues, read_run
from hamscale.export import cp2k_runs, deeph, export
from hamscale.operators import Operators
from hamscale.structures import check_distances, read_structure_file
from helpers import DZVP, SZV, basis_of, hafnia, model_hamiltonian, unpacked, written

SECONDS = 10
MEMORY = 256 << 20


@dataclass(frozen=True)
class Reader:
    """One reader of files.

    make: writes valid files to a folder. files: a pattern of those that are mutated. read: reads the folder, or raises.
    """

    make: Callable[[Path], None]
    files: str
    read: Callable[[Path], None]


# ---------------------------------------------------------------------------------------------------------------- readers


def _structure(name: str) -> Reader:
    def make(folder: Path) -> None:
        atoms = hafnia()
        atoms.info["charge"] = 0
        ase.io.write(folder / name, atoms)

    def read(folder: Path) -> None:
        atoms = read_structure_file(folder / name)
        check_distances("it", atoms)
        assert len(atoms)
        assert np.isfinite(atoms.positions).all()

    return Reader(make, name, read)


def _entry(file: str, start: str) -> str:
    """One entry of a file of CP2K, and the first line of the next."""
    lines = find_data_file(file).read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.split()[:2] == start.split())
    last = next(n for n in range(first + 1, len(lines)) if lines[n].strip()[:1].isalpha())
    return "\n".join(lines[first : last + 1]) + "\n"


def _make_basis(folder: Path) -> None:
    (folder / "BASIS").write_text(_entry("BASIS_MOLOPT", f"O {DZVP}"))
    (folder / "POTENTIAL").write_text(_entry("GTH_POTENTIALS", "O GTH-PBE-q6"))


def _read_basis(folder: Path) -> None:
    basis = read_element_basis("O", DZVP, "GTH-PBE", str(folder / "BASIS"), str(folder / "POTENTIAL"))
    assert basis.radius_angstrom(1e-5) > 0
    for l, exponents, coefficients in basis.normalised:
        assert l >= 0
        assert (exponents > 0).all()
        assert np.isfinite(coefficients).all()
    assert 0 < basis.valence <= 8


def _make_pack(folder: Path) -> None:
    """Write a DeepH-pack data set of near pairs and shells s alone, whose order is ours."""
    operators = model_hamiltonian(hafnia(), basis_of(Hf=SZV, O=SZV))
    operators = operators.select(operators.pairs.distances < 3.5)
    np.savetxt(folder / "lat.dat", np.asarray(operators.atoms.cell).T)
    np.savetxt(folder / "site_positions.dat", operators.atoms.positions.T)
    np.savetxt(folder / "element.dat", operators.atoms.numbers, fmt="%d")
    (folder / "orbital_types.dat").write_text("0\n" * len(operators.atoms))
    (folder / "info.json").write_text(json.dumps({"isspinful": False, "fermi_level": -1.5}))
    for name, values in (("hamiltonians", operators.hamiltonian), ("overlaps", operators.overlap)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for b, (i, j, *R) in enumerate(operators.pairs.tolist()):
                file[str([*R, i + 1, j + 1])] = operators.block(values, b)[:1, :1]


def _make_dock(folder: Path) -> None:
    operators = model_hamiltonian(hafnia(), basis_of(Hf=SZV, O=SZV))
    path = written(folder, operators)
    export(path, "deeph", folder / "0")
    for file in (folder / "0").iterdir():
        file.rename(folder / file.name)
    path.unlink()
    (folder / "0").rmdir()


def _read_deeph(folder: Path) -> None:
    _check(deeph.read(folder))


def _check(operators: Operators) -> None:
    for values in (operators.hamiltonian, operators.overlap):
        assert np.isfinite(values).all()
    assert max(operators.hermiticity_error().values()) == 0
    assert np.abs(operators.overlap).max() < 1.01
    assert operators.pairs.onsite.sum() == len(operators.atoms)


def _silicon(folder: Path) -> None:
    shutil.copytree(unpacked("si2-2026.2", folder / "unpacked"), folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "unpacked")


def _silicon_text(folder: Path) -> None:
    """Write the same files as text."""
    _silicon(folder)
    for path in folder.glob("*.csr"):
        rows, columns, values = read_csr(path)
        path.write_text("".join(f"{i + 1:8d}{j + 1:8d}{x:23.14E}\n" for i, j, x in zip(rows, columns, values)))


def _run(make: Callable[[Path], None], files: str) -> Reader:
    def read(folder: Path) -> None:
        operators = read_run(folder, cp2k_runs.read_structure(folder), SILICON)
        cp2k_runs.check_images(str(folder), operators, 1e-4)
        check_eigenvalues(str(folder), operators, 5e-7)
        _check(operators)

    return Reader(make, files, read)


def _yaml(kind: str, name: str, load: Callable[[Path], object]) -> Reader:
    def make(folder: Path) -> None:
        shutil.copy(Path(__file__).parents[2] / "config" / kind / name, folder / "it.yaml")

    return Reader(make, "it.yaml", lambda folder: load(folder / "it.yaml") and None)


SILICON = basis_of(Si=SZV)
READERS = {
    "extxyz": _structure("a.extxyz"),
    "xyz": _structure("a.xyz"),
    "cif": _structure("a.cif"),
    "poscar": _structure("POSCAR"),
    "json": _structure("a.json"),
    "traj": _structure("a.traj"),
    "basis": Reader(_make_basis, "*", _read_basis),
    "deeph-dock": Reader(_make_dock, "*", _read_deeph),
    "deeph-pack": Reader(_make_pack, "*", _read_deeph),
    "csr": _run(_silicon, "*.csr"),
    "csr-text": _run(_silicon_text, "*.csr"),
    "cp2k-log": _run(_silicon, "run.[io]*"),
    "material": _yaml("materials", "silicon_device.yaml", load_material),
    "model": _yaml("models", "hfo2.yaml", load_model),
}
IN_A_SECOND = {"deeph-dock": 5, "deeph-pack": 5, "csr": 15, "csr-text": 12, "cp2k-log": 12}  # mutants of the slower ones


# --------------------------------------------------------------------------------------------------------------- children


def _attempts(reader: Reader, seed: int, folder: Path, first: int, count: int) -> Iterator[tuple[Path, bytes]]:
    """Yield the file that is mutated and its mutant, of each file in turn."""
    files = [path for path in sorted(folder.glob(reader.files)) if path.stat().st_size]
    for number in range(first, first + count):
        path = files[number % len(files)]
        yield path, next(mutants(path.read_bytes(), 1, seed, number // len(files)))


def _outcome(reader: Reader, folder: Path) -> str:
    """Read a folder, and return "refused", "taken" or what is wrong."""
    try:
        reader.read(folder)
    except (ValueError, OSError) as error:
        # a file of YAML has a line for each of its mistakes
        several = "\n" in str(error) and not all(str(folder) in line for line in str(error).splitlines())
        return f"several lines: {str(error)[:300]!r}" if isinstance(error, ValueError) and several else "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    return "taken"


def _child(reader: Reader, seed: int, first: int, count: int, valid: Path, report: int) -> None:
    """Read mutants `first` to `first + count`, and write a line for each to a file descriptor."""
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    size = sum(path.stat().st_size for path in valid.iterdir())
    space = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (space + 8 * size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, (path, mutant) in enumerate(_attempts(reader, seed, valid, first, count), first):
        whole = path.read_bytes()
        path.write_bytes(mutant)
        signal.alarm(SECONDS)  # ends the child
        outcome = _outcome(reader, valid)
        signal.alarm(0)
        path.write_bytes(whole)
        os.write(report, json.dumps([number, path.name, outcome]).encode() + b"\n")


def attempt(name: str, count: int, seed: int = 0, first: int = 0, at_once: int = 500) -> tuple[Counter, list[str]]:
    """Read `count` mutants, and return how many were refused, taken and faults, and a line for each fault.

    Children are forked, `at_once` mutants each, since libraries may leave something behind; after one that dies comes another.
    """
    reader, outcomes, faults, last = READERS[name], Counter(), [], first + count
    with tempfile.TemporaryDirectory() as root:
        original = Path(root) / "original"
        original.mkdir()
        reader.make(original)
        reader.read(original)  # without an error; children have what reading needs loaded
        while first < last:
            valid = Path(root) / "valid"
            shutil.rmtree(valid, ignore_errors=True)
            shutil.copytree(original, valid)
            reading, writing = os.pipe()
            if not (child := os.fork()):
                try:
                    _child(reader, seed, first, min(at_once, last - first), valid, writing)
                finally:
                    os._exit(0)
            os.close(writing)
            done = first
            with open(reading, "rb") as lines:
                for line in lines:
                    number, file, outcome = json.loads(line)
                    done = number + 1
                    outcomes[outcome if outcome in ("refused", "taken") else "fault"] += 1
                    if outcome not in ("refused", "taken"):
                        faults.append(f"{name} {seed} {number} {file}: {outcome}")
            _, status = os.waitpid(child, 0)
            if done < min(first + at_once, last):
                end = f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else f"ended, {status}"
                faults.append(f"{name} {seed} {done}: {end}")
                outcomes["fault"] += 1
                done += 1
            first = done
    return outcomes, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"{', '.join(READERS)}; default: all")
    parser.add_argument("--count", type=int, help="mutants of each; default: as many as take a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options, failed = parser.parse_args(), False
    for name in options.readers or READERS:
        count = options.count or IN_A_SECOND.get(name, 50)
        outcomes, faults = attempt(name, count, options.seed, options.first)
        print(json.dumps({"reader": name, "mutants": count, "outcomes": outcomes, "faults": faults}), flush=True)
        failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
