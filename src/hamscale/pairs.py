"""Store pairs of atoms (i, j, R) of a structure, and compute the quantities that follow from them and the positions.

i is an atom of the cell 0 and the row of a block, j an atom of the cell R and its column. The flipped pair of (i, j, R) is
(j, i, -R): the two name the same two atoms, and their blocks are each other's transpose.
"""

from functools import cached_property
from typing import TypeAlias

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, DTypeLike

Index: TypeAlias = int | np.integer | slice | np.ndarray | list[int]
ByElement: TypeAlias = dict[int, np.ndarray]  # z -> an array for the atoms of that element
ByPair: TypeAlias = dict[tuple[int, int], np.ndarray]  # (z_i, z_j) -> an array for the pairs of atoms of these elements


class PairList:
    """Pairs of atoms of one structure, with the indexing of their table of shape (E, 5).

    table  # (E, 5) | i, j, Rx, Ry, Rz

    `pairs[rows]`, `pairs[:, 0]` and `len(pairs)` refer to the table.
    Quantities that follow from the table are computed at first use and kept: neither the table nor the positions may change
    afterwards.

        pairs = PairList(atoms, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
        pairs.distances       # (2,), Angstrom
        pairs.flipped_index   # [1, 0]
    """

    def __init__(self, atoms: Atoms, table: ArrayLike) -> None:
        self.atoms = atoms
        self.table = np.asarray(table, np.int64).reshape(-1, 5)
        self._between: ByPair = {}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: Index | tuple[Index, ...]) -> np.ndarray:
        return self.table[rows]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.table, dtype, copy=copy)

    def tolist(self) -> list[list[int]]:
        """Return the table as lists of five integers."""
        return self.table.tolist()

    def take(self, rows: Index) -> "PairList":
        """Select some pairs by index, slice or mask (E,)."""
        return PairList(self.atoms, self.table[rows])

    def sorted(self) -> "PairList":
        """Return the pairs sorted by i, j, R."""
        return self.take(np.argsort(self.keys))

    @cached_property
    def keys(self) -> np.ndarray:
        """Return one integer per pair, (E,), in the order of the pairs, as from `sort_keys`."""
        return sort_keys(self.table)

    @cached_property
    def vectors(self) -> np.ndarray:
        """Return the vectors from atom i to atom j in the cell R, Angstrom, (E, 3).

        A vector is exactly minus that of the flipped pair, and zero for (i, i, 0). It must be exact because the frame of a
        nearly polar edge depends on the last bit, and has to be the frame of the flipped edge turned by pi.
        """
        i, j, R = self.table[:, 0], self.table[:, 1], self.table[:, 2:]
        positions, shift = self.atoms.positions, R @ np.asarray(self.atoms.cell)
        # the two orders of summation change places, with opposite sign, under flipping, so their mean is odd to the last bit
        return ((positions[j] + shift - positions[i]) - (positions[i] - shift - positions[j])) / 2

    @cached_property
    def distances(self) -> np.ndarray:
        """Return the lengths of the vectors, Angstrom, (E,)."""
        return np.linalg.norm(self.vectors, axis=1)

    @cached_property
    def onsite(self) -> np.ndarray:
        """Return the mask of the pairs (i, i, 0), (E,)."""
        return (self.table[:, 0] == self.table[:, 1]) & ~self.table[:, 2:].any(1)

    @cached_property
    def flipped_index(self) -> np.ndarray:
        """Return the row of the flipped pair (j, i, -R) of every pair, (E,).

        Raises ValueError naming a pair whose flipped pair is missing.
        """
        table, flipped = self.table, flip(self.table)
        order, flipped_order = np.lexsort(table.T[::-1]), np.lexsort(flipped.T[::-1])
        wrong = np.flatnonzero((table[order] != flipped[flipped_order]).any(1))
        if len(wrong):
            i, j, *R = table[order[wrong[0]]].tolist()
            raise ValueError(
                f"block ({i}, {j}, {R}) or the one next to it has no transposed block (j, i, -R). Is the file complete?"
            )
        index = np.empty(len(table), np.int64)
        index[flipped_order] = order
        return index

    @cached_property
    def elements(self) -> list[tuple[int, int]]:
        """Return the pairs of elements (z_i, z_j) that occur, ascending."""
        numbers = self.atoms.numbers
        counts = np.bincount(numbers[self.table[:, 0]] * 1000 + numbers[self.table[:, 1]])
        return [(z_i, z_j) for z_i, z_j in (divmod(key, 1000) for key in np.flatnonzero(counts).tolist())]

    def between(self, z_i: int, z_j: int) -> np.ndarray:
        """Return the rows of the pairs of two elements, ascending."""
        if (z_i, z_j) not in self._between:
            numbers = self.atoms.numbers
            of_both = (numbers[self.table[:, 0]] == z_i) & (numbers[self.table[:, 1]] == z_j)
            self._between[z_i, z_j] = np.flatnonzero(of_both)
        return self._between[z_i, z_j]

    @cached_property
    def place_in_elements(self) -> np.ndarray:
        """Return the place of every pair among those of its two elements, in the order of `between`, (E,)."""
        place = np.empty(len(self), np.int64)
        for elements in self.elements:
            rows = self.between(*elements)
            place[rows] = np.arange(len(rows))
        return place

    def find(self, wanted: ArrayLike) -> np.ndarray:
        """Find the row of each wanted pair (M, 5) in this list, which must be sorted; -1 if it is missing, (M,)."""
        return find_pairs(np.asarray(wanted), self.table)

    def find_in_elements(self, wanted: ArrayLike) -> np.ndarray:
        """Find the place of each wanted pair (M, 5) among those of its two elements in this sorted list.

        The place is -1 if the pair is missing, (M,).
        """
        return np.append(self.place_in_elements, -1)[self.find(wanted)]

    def canonical(self) -> tuple["PairList", np.ndarray]:
        """Return the lesser of each pair and its flipped pair, and the mask of the pairs that were flipped for it, (E,)."""
        flipped = flip(self.table)
        column, row = (self.table != flipped).argmax(1), np.arange(len(self))
        turned = flipped[row, column] < self.table[row, column]
        return PairList(self.atoms, np.where(turned[:, None], flipped, self.table)), turned


def flip(table: np.ndarray) -> np.ndarray:
    """Return the flipped pair (j, i, -R) of every pair (i, j, R), (E, 5)."""
    return np.column_stack([table[:, 1], table[:, 0], -table[:, 2:]])


def sort_keys(table: np.ndarray) -> np.ndarray:
    """Return one integer per row that orders as the row's integers do, (E,).

    A single array is then sorted or searched instead of five.
    """
    if not len(table):
        return np.zeros(0, np.int64)
    low = table.min(0)
    return _keys(table, low, table.max(0) - low + 1)


def _keys(table: np.ndarray, low: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Return one integer per row, (E,), for columns of at least `low` and less than `low + span`."""
    key = np.zeros(len(table), np.int64)
    for column in range(table.shape[1]):
        key *= span[column]
        key += table[:, column] - low[column]
    return key


def block_offsets(pairs: "PairList | np.ndarray", orbitals: np.ndarray) -> np.ndarray:
    """Return the position of the first value of every block among the values of all blocks, and their number, (E + 1,).

    pairs: a PairList or its table. orbitals (A,): number of orbitals of every atom; block (i, j, R) has
    orbitals[i] * orbitals[j] values.
    """
    return np.concatenate([[0], np.cumsum(orbitals[pairs[:, 0]] * orbitals[pairs[:, 1]])])


def find_pairs(wanted: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Find the row of each wanted pair (i, j, R) in a sorted table; -1 if it is missing, (M,)."""
    if not len(table) or not len(wanted):
        return np.full(len(wanted), -1)
    low = np.minimum(table.min(0), wanted.min(0))
    span = np.maximum(table.max(0), wanted.max(0)) - low + 1
    key, key_wanted = _keys(table, low, span), _keys(wanted, low, span)
    rows = np.minimum(np.searchsorted(key, key_wanted), len(table) - 1)
    return np.where(key[rows] == key_wanted, rows, -1)


def place_in_element(numbers: np.ndarray) -> np.ndarray:
    """Return the place of each atom among the atoms of its element, in their order, (A,)."""
    place = np.empty(len(numbers), np.int64)
    for z in np.unique(numbers):
        place[numbers == z] = np.arange((numbers == z).sum())
    return place
