"""Read H and S of a file of operators, the rows of some atoms at a time.

In this way files larger than memory are exported, and no matrix is dense.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase import Atoms

from ..basis import Basis
from ..files import write_text
from ..operators import ENERGIES, OperatorsFile, open_operators
from ..pairs import PairList, sort_keys
from ..structures import GIVEN, given_cells
from ..units import hartree_to_ev

BOX_ANGSTROM = 10.0  # vacuum around a molecule that has no cell
PIECE = 1 << 20  # values of H and of S in memory at a time, unless one atom has more


@dataclass
class Rows:
    """All blocks of some successive atoms i, and their elements one by one.

    orbitals: the first orbital of these atoms, and the first one behind theirs
    pairs  # (P, 5) | i, j, R, sorted
    pair, row, column  # (m,) | of each element: its row of pairs, its orbitals of the whole structure
    hamiltonian, overlap  # (m,) | Hartree, 1; H is that of one spin
    """

    orbitals: tuple[int, int]
    pairs: np.ndarray
    pair: np.ndarray
    row: np.ndarray
    column: np.ndarray
    hamiltonian: np.ndarray
    overlap: np.ndarray


@dataclass
class Stored:
    """An open file of operators.

    pairs are sorted; offsets[b] is where the values of pair b start in the file. given (A, 3): how many cells lie between each
    atom and its place in the user's file, None if that is not known. spin: which H of a spin-polarised structure is read.
    """

    file: OperatorsFile
    atoms: Atoms
    basis: Basis
    pairs: PairList
    offsets: np.ndarray
    given: np.ndarray | None = None
    spin: int = 0

    def __post_init__(self) -> None:
        self.orbitals = self.basis.n_orbitals(self.atoms.numbers)  # (A,)
        self.start = np.concatenate([[0], np.cumsum(self.orbitals)])  # (A+1,) first orbital of every atom
        self.sizes = self.orbitals[self.pairs[:, 0]] * self.orbitals[self.pairs[:, 1]]
        self.cells = [tuple(R) for R in np.unique(self.pairs[:, 2:], axis=0).tolist()]

    @property
    def n_orbitals(self) -> int:
        return int(self.start[-1])

    @property
    def periodic(self) -> bool:
        return bool(self.atoms.pbc.any())

    @property
    def spins(self) -> int:
        return self.file.spins

    @property
    def channels(self) -> list["Stored"]:
        """Return the matrices of each spin."""
        return [replace(self, spin=spin) for spin in range(self.spins)]

    def energies_ev(self) -> dict[str, float]:
        """Return the Fermi level and the band edges of the file, in eV and in its own zero; empty if they are not known."""
        found = {name: hartree_to_ev(float(self.file.attributes.get(f"{name}_hartree", np.nan))) for name in ENERGIES}
        return {name: energy for name, energy in found.items() if np.isfinite(energy)}

    def moved(self, cells: np.ndarray) -> "Stored":
        """Return the same matrices with every atom moved by whole cells (A, 3).

        The cells R of the pairs change accordingly.
        """
        atoms, table = self.atoms.copy(), self.pairs.table.copy()
        atoms.positions += cells @ np.asarray(atoms.cell)
        table[:, 2:] += cells[table[:, 0]] - cells[table[:, 1]]
        order = np.argsort(sort_keys(table), kind="stable")
        given = None if self.given is None else self.given - cells
        return Stored(self.file, atoms, self.basis, PairList(atoms, table[order]), self.offsets[order], given, self.spin)

    def rows(self) -> Iterator[Rows]:
        """Yield all blocks in the order of their pairs, at most PIECE elements or one atom's at a time.

        Raises ValueError, with the path, if a value is not a number.
        """
        of_atom = np.searchsorted(self.pairs[:, 0], np.arange(len(self.atoms) + 1))  # first pair of every atom
        before = np.concatenate([[0], np.cumsum(self.sizes)])[of_atom]  # elements before every atom
        first = 0
        while first < len(self.atoms):
            last = max(first + 1, int(np.searchsorted(before, before[first] + PIECE, "right")) - 1)
            span = slice(int(of_atom[first]), int(of_atom[last]))
            yield self._read(span, (int(self.start[first]), int(self.start[last])))
            first = last

    def _read(self, span: slice, orbitals: tuple[int, int]) -> Rows:
        pairs, sizes, offsets = self.pairs[span], self.sizes[span], self.offsets[span]
        pair = np.repeat(np.arange(len(pairs)), sizes)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        a, b = np.divmod(within, self.orbitals[pairs[:, 1]][pair])
        # blocks that follow one another in the file are read in one piece
        breaks = np.flatnonzero(np.diff(offsets) != sizes[:-1]) + 1
        firsts = offsets[np.concatenate([[0], breaks])] if len(pairs) else np.empty(0, np.int64)
        lengths = np.add.reduceat(sizes, np.concatenate([[0], breaks])) if len(pairs) else np.empty(0, np.int64)
        values = {}
        for name in ("hamiltonian", "overlap"):
            parts = [self.file.read(name, slice(start, start + n)) for start, n in zip(firsts, lengths)]
            parts = [part[self.spin] if part.ndim == 2 else part for part in parts]
            values[name] = np.concatenate(parts) if parts else np.empty(0)
        row, column = self.start[pairs[:, 0]][pair] + a, self.start[pairs[:, 1]][pair] + b
        return Rows(orbitals, pairs, pair, row, column, **values)

    def by_cell(self, rows: Rows, values: np.ndarray) -> Iterator[tuple]:
        """Yield (R, row, column, value) of the elements that are not zero, cell by cell, sorted by row and column."""
        yield from split_by_cell(rows.pairs[rows.pair, 2:], rows.row, rows.column, values, self.n_orbitals)

    def symmetric_grid(self) -> list[tuple[int, int, int]]:
        """Return all cells R with |R| up to that of the farthest block along each axis, in ascending order."""
        reach = np.abs(self.pairs[:, 2:]).max(0)
        grid = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), -1)
        return [tuple(R) for R in grid.reshape(-1, 3).tolist()]


def split_by_cell(cells: np.ndarray, row: np.ndarray, column: np.ndarray, value: np.ndarray, n: int) -> Iterator[tuple]:
    """Yield (R, row, column, value) cell by cell, sorted by row and column, from elements with their cells (m, 3).

    Elements that are zero are left out.
    """
    keep = np.flatnonzero(value)
    if not len(keep):
        return
    cells, row, column, value = cells[keep], row[keep], column[keep], value[keep]
    cell = sort_keys(cells)
    order = np.argsort((cell * n + row) * n + column)
    breaks = np.flatnonzero(np.diff(cell[order])) + 1
    for index in np.split(order, breaks):
        yield tuple(cells[index[0]].tolist()), row[index], column[index], value[index]


@contextmanager
def stored(path: str | Path) -> Iterator[Stored]:
    """Open an file of operators for export. Raises ValueError, with the path, as `operators.open_operators` does."""
    with open_operators(path) as file:
        atoms, pairs = file.atoms, file.pairs
        if atoms.cell.rank < 3:  # the formats need a cell
            atoms.center(vacuum=BOX_ANGSTROM)
        order = np.argsort(pairs.keys, kind="stable")  # the file holds the shards of several ranks one after another
        given = given_cells(atoms)
        atoms.arrays.pop(GIVEN, None)
        yield Stored(file, atoms, file.basis, pairs.take(order), file.offsets[:-1][order], given)


def write_energies(path: Path, stored: Stored) -> None:
    """Write the Fermi level and the band edges, in eV, as JSON; write no file if they are not known."""
    if energies := stored.energies_ev():
        rounded = {f"{name}_ev": round(energy, 6) for name, energy in energies.items()}
        write_text(path, json.dumps(rounded, indent=2) + "\n")
