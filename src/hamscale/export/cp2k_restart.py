"""Write the density matrix as the file from which CP2K begins a run with k-points: SCF_GUESS RESTART, NAME-RESTART.kp.

The file consists of unformatted Fortran records (4 bytes of length before and after each), from CP2K's own reader and writer
(src/kpoint_io.F, and cp_fm_write_unformatted of src/fm/cp_fm_types.F; the same in 2023.1 to 2026.2):

    version 1
    atoms, orbitals, most sets of an atom, most shells of a set
    sets of each atom; shells of each set; 2 l + 1 of each shell
    of each spin: its number from 1, spins, images
        of each image: its number from 1, its cell R
            of each column of the matrix: its rows, 8 bytes each

CP2K keeps of a pair of atoms i <= j the block in row i and column j, and finds each pair in one direction alone: from i to j if
i + j is even, else from j to i, so that the block stands in the image of -R. It compares the numbers of atoms and orbitals, and
skips the rest of the head.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from ase.dft.kpoints import monkhorst_pack

from ..analysis.density import density_matrix
from ..files import atomic
from ..operators import Operators, read_operators
from ..structures import kpoint_counts
from .stream import Stored

VERSION = 1


def write(stored: Stored, out: str | Path, kgrid: tuple[int, int, int] | None = None) -> list[str]:
    """Write the file `out` of the states on CP2K's Monkhorst-Pack grid, and return lines that say how CP2K reads it.

    kgrid: divisions of the grid, as the run has them. All eigenvectors are computed, and kept for all k-points. Raises
    ValueError for a molecule, which CP2K begins from orbitals, and without kgrid.
    """
    if not stored.periodic:
        raise ValueError(
            "a structure without periodic directions, expected one with k-points: CP2K begins others from orbitals."
        )
    if kgrid is None:
        raise ValueError("--to cp2k-restart came without --kgrid, expected that of the run (&KPOINTS SCHEME), e.g. 2 2 2.")
    operators = read_operators(stored.file.path)
    kpoints = monkhorst_pack(kpoint_counts(operators.atoms, (kgrid[0], kgrid[1], kgrid[2]), None))
    first = [next((x for x in k if abs(x) > 1e-9), 0.0) for k in kpoints]
    kept, weights = kpoints[np.array(first) >= 0], np.array([2.0 if x else 1.0 for x in first if x >= 0])
    density = density_matrix(operators, kept, weights / weights.sum())
    with atomic(out) as path, open(path, "wb") as file:
        _write_head(file, operators)
        for spin, values in enumerate(density):
            _write_images(file, operators, values, (spin + 1, len(density)))
    return [
        f"density matrix on the grid {'x'.join(map(str, kgrid))}",
        f"in the input of CP2K: &SCF SCF_GUESS RESTART, &DFT WFN_RESTART_FILE_NAME {out} (or hamscale input --restart {out})",
    ]


def _record(file: BinaryIO, content: bytes) -> None:
    length = struct.pack("<i", len(content))
    file.write(length + content + length)


def _integers(file: BinaryIO, *numbers: int) -> None:
    _record(file, struct.pack(f"<{len(numbers)}i", *numbers))


def _write_head(file: BinaryIO, operators: Operators) -> None:
    """Write what describes the basis, the shells of each atom as one set."""
    shells = [operators.basis[z].l for z in operators.atoms.numbers.tolist()]
    most = max(map(len, shells))
    _integers(file, VERSION)
    _integers(file, len(shells), operators.n_orbitals, 1, most)
    _integers(file, *[1] * len(shells))
    _integers(file, *map(len, shells))
    _integers(file, *[width for l in shells for width in [*(2 * x + 1 for x in l), *[0] * (most - len(l))]])


def _write_images(file: BinaryIO, operators: Operators, values: np.ndarray, spin: tuple[int, int]) -> None:
    """Write the matrices of one spin, (number from 1, spins); values (m,) as those of the pairs."""
    i, j = operators.pairs[:, 0], operators.pairs[:, 1]
    images = operators.pairs[:, 2:] * np.where((i + j) % 2 == 0, 1, -1)[:, None]
    stored_here = i <= j
    cells, number = np.unique(images[stored_here], axis=0, return_inverse=True)
    of_value = np.full(len(i), -1)
    of_value[stored_here] = number.ravel()
    of_value = np.repeat(of_value, np.diff(operators.offsets))
    order = np.argsort(of_value, kind="stable")
    begin = np.searchsorted(of_value[order], np.arange(len(cells) + 1))
    rows, columns = operators.rows_and_columns()
    n = operators.n_orbitals
    _integers(file, *spin, len(cells))
    for image, cell in enumerate(cells.tolist()):
        some = order[begin[image] : begin[image + 1]]
        matrix = np.zeros((n, n))  # transposed: a column of CP2K's is a row here
        matrix[columns[some], rows[some]] = values[some]
        _integers(file, image + 1, *cell)
        for column in matrix:
            _record(file, column.tobytes())
