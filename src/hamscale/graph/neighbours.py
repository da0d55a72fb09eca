"""Find the edges into atoms of a structure; every periodic image is an edge of its own.

Only the atoms and images that can reach the chosen atoms are searched, and some of the chosen atoms are worked on at a time.
Memory is therefore that of the edges found and of a few numbers per atom of the structure, whatever its number of edges.
"""

from collections.abc import Iterator

import numpy as np
from ase import Atoms
from scipy.spatial import cKDTree

from ..pairs import PairList
from ..structures import MINIMUM_DISTANCE_ANGSTROM, check_distances, images, plane_distances

ATOMS_AT_ONCE = 512


class Neighbourhood:
    """Atoms of a structure, and the atoms and periodic images within a cutoff of them.

    owned  # (O,) | atoms whose edges are sought, ascending; all atoms by default

    neighbourhood = Neighbourhood(atoms, 12.0, owned)
    neighbourhood.degrees()     # (O,) number of edges into each of them
    for table in neighbourhood.tables(): ...  # their edges, some atoms at a time
    """

    # vesin, which searches all atoms against all, would also find the pairs of neighbours: seven times the edges of a part of
    # 375 atoms at 12 A. A k-d tree is asked for the neighbours of these atoms alone.

    def __init__(self, atoms: Atoms, cutoff_angstrom: float, owned: np.ndarray | None = None) -> None:
        self.atoms, self.cutoff = atoms, float(cutoff_angstrom)
        self.owned = np.arange(len(atoms)) if owned is None else np.asarray(owned)
        # search slightly farther, then select by the distances used everywhere else: the two may differ in the last bit
        self.reach = self.cutoff * (1 + 1e-9)
        cell = atoms.cell.complete()
        fractions = atoms.positions @ np.linalg.inv(cell.array)
        self.cells = _gathered(fractions[self.owned], atoms.pbc)  # the owned atoms are taken from these cells
        own = fractions[self.owned] + self.cells
        margin = self.reach / plane_distances(cell)
        low, high = own.min(0, initial=np.inf) - margin, own.max(0, initial=-np.inf) + margin
        self.index, self.shift = images(fractions, atoms.pbc, low, high)
        self.points = atoms.positions[self.owned] + self.cells @ cell.array
        self.tree = cKDTree(atoms.positions[self.index] + self.shift @ cell.array)

    def degrees(self) -> np.ndarray:
        """Count the edges into each owned atom, (O,), without listing them.

        An edge whose length equals the cutoff to the last bit may be counted or not.
        """
        if not len(self.owned):
            return np.empty(0, np.int64)
        within = np.nextafter(self.cutoff, 0)
        return self.tree.query_ball_point(self.points, within, return_length=True).astype(np.int64) - 1

    def tables(self, onsite: bool = False) -> Iterator[PairList]:
        """Yield the edges into some owned atoms at a time, in the order of the atoms, sorted by i, j, R.

        onsite: whether the pairs (i, i, 0) are among them.
        Raises ValueError if two atoms are closer than 0.5 A.
        """
        for first in range(0, len(self.owned), ATOMS_AT_ONCE):
            some = slice(first, first + ATOMS_AT_ONCE)
            found = cKDTree(self.points[some]).sparse_distance_matrix(self.tree, self.reach, output_type="ndarray")
            row, image = found["i"] + first, found["j"]
            table = np.column_stack([self.owned[row], self.index[image], self.shift[image] - self.cells[row]])
            pairs = PairList(self.atoms, table)
            near, own = pairs.distances < self.cutoff, pairs.onsite
            if pairs.distances[~own].min(initial=np.inf) < MINIMUM_DISTANCE_ANGSTROM:
                check_distances("structure", self.atoms)
            yield pairs.take(near if onsite else near & ~own).sorted()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield destinations i and sources j of the edges into some atoms at a time, as `partition` takes them."""
        for pairs in self.tables():
            yield pairs[:, 0], pairs[:, 1]


def edges_within(atoms: Atoms, cutoff_angstrom: float, owned: np.ndarray | None = None) -> PairList:
    """Find the directed edges (i, j, R) with 0 < |r_j + R - r_i| < cutoff, sorted by i, j, R.

    i is the destination and the row of the H block, j the source and the column. Every (i, j, R) is accompanied by (j, i,
    -R). There are no self edges.
    owned: atoms, ascending, into which edges are sought; into all atoms by default.
    Raises ValueError if two atoms are closer than 0.5 A.
    """
    # int32 until all edges are there, so that the parts and the whole take little more than the whole
    parts = [pairs.table.astype(np.int32) for pairs in Neighbourhood(atoms, cutoff_angstrom, owned).tables()]
    return PairList(atoms, np.concatenate([np.empty((0, 5), np.int32), *parts]))


def _gathered(fractions: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """Return the cell from which each atom is taken so that the atoms lie together, (O, 3) integers.

    Along each periodic direction the atoms lie on a ring, which is cut in the middle of its widest gap. Atoms on both sides of
    a face of the cell thus do not span the whole of it.
    """
    cells = np.zeros(fractions.shape, np.int64)
    for axis in np.flatnonzero(periodic) if len(fractions) else ():
        ring = np.sort(fractions[:, axis] % 1.0)
        gaps = np.diff(ring, append=ring[0] + 1.0)
        widest = int(gaps.argmax())
        cells[:, axis] = -np.floor(fractions[:, axis] - (ring[widest] + gaps[widest] / 2)).astype(np.int64)
    return cells
