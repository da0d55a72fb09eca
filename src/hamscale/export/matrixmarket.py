"""Write MatrixMarket files: a coordinate file per cell and matrix, in Hartree, which `scipy.io.mmread` reads.

Format: R. F. Boisvert, R. Pozo, K. A. Remington, The Matrix Market Exchange Formats, NISTIR 5935 (1996).
"""

from collections import Counter
from pathlib import Path

import numpy as np

from ..files import atomic_folder
from ..structures import write_structure_file
from .stream import Stored, write_energies

UNITS = {"hamiltonian": "Hartree", "overlap": "1"}


def write(stored: Stored, out: str | Path) -> list[str]:
    """Write the folder `out`, and return lines that say what was written.

    The folder has NAME_X_Y_Z.mtx for each cell R = (X, Y, Z), orbitals.csv, structure.extxyz and energies.json.
    """
    with atomic_folder(out) as folder:
        counts: Counter[tuple[str, tuple[int, int, int]]] = Counter()

        def path(name: str, R: tuple[int, int, int]) -> Path:
            return folder / f"{name}_{'_'.join(map(str, R))}.mtx"

        def header(name: str, R: tuple[int, int, int]) -> bytes:
            # the count is known only at the end, so it has a fixed width and is overwritten then
            return (
                "%%MatrixMarket matrix coordinate real general\n"
                f"% <i, home cell | {name} | j, cell {list(R)}>, {UNITS[name]}; orbitals as in orbitals.csv\n"
                f"{stored.n_orbitals} {stored.n_orbitals} {counts[name, R]:<20d}\n"
            ).encode()

        for name in UNITS:
            for R in stored.cells:
                path(name, R).write_bytes(header(name, R))
        for rows in stored.rows():
            for name in UNITS:
                for R, row, column, value in stored.by_cell(rows, getattr(rows, name)):
                    counts[name, R] += len(value)
                    with open(path(name, R), "a") as file:
                        file.writelines(
                            f"{i} {j} {x!r}\n" for i, j, x in zip((row + 1).tolist(), (column + 1).tolist(), value.tolist())
                        )
        for name in UNITS:
            for R in stored.cells:
                with open(path(name, R), "r+b") as whole:
                    whole.write(header(name, R))
        (folder / "orbitals.csv").write_text(_orbitals(stored))
        write_structure_file(folder / "structure.extxyz", stored.atoms)
        write_energies(folder / "energies.json", stored)
    return [f"{len(stored.cells)} cells, Hartree"]


def _orbitals(stored: Stored) -> str:
    """Return orbitals.csv: atom, element, shell, l, m of every row and column, counted from zero."""
    lines = {
        z: [f"{shell},{l},{m}" for shell, l in enumerate(e.l) for m in np.arange(-l, l + 1)] for z, e in stored.basis.items()
    }
    return "atom,element,shell,l,m\n" + "".join(
        f"{atom},{stored.basis[z].element},{line}\n"
        for atom, z in enumerate(stored.atoms.numbers.tolist())
        for line in lines[z]
    )
