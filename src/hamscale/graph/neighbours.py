"""Find the edges of a structure; every periodic image is an edge of its own."""

import numpy as np
import vesin
from ase import Atoms

from ..pairs import PairList
from ..structures import check_distances


def edges_within(atoms: Atoms, cutoff_angstrom: float) -> PairList:
    """Find the directed edges (i, j, R) with 0 < |r_j + R - r_i| < cutoff, sorted by i, j, R.

    i is the destination and the row of the H block, j the source and the column. Every (i, j, R) is accompanied by (j, i,
    -R). There are no self edges.
    Raises ValueError if two atoms are closer than 0.5 A.
    """
    # search slightly farther, then select by the distances used everywhere else: the two may differ in the last bit
    neighbours = vesin.NeighborList(cutoff=float(cutoff_angstrom) * (1 + 1e-9), full_list=True, sorted=False)
    i, j, S = neighbours.compute(atoms.positions, np.asarray(atoms.cell), [bool(p) for p in atoms.pbc], "ijS")
    pairs = PairList(atoms, np.column_stack([i.astype(np.int64), j.astype(np.int64), S.astype(np.int64)]))
    if len(pairs) and pairs.distances.min() < 0.5:
        check_distances("structure", atoms)
    return pairs.take(pairs.distances < cutoff_angstrom).sorted()
