"""Assign atoms to ranks with `low-nn`, `metis` or `min-nn`, and list the messages between them.

A rank owns atoms and all edges into them. From other ranks it needs the features of the sources that it does not own, its
ghosts.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from ase import Atoms

from ..config import PARTITIONERS
from .halo import Partition, group_nodes, halo_lists
from .low_nn import low_nn
from .metis import metis
from .min_nn import Cost, min_nn
from .space import space

METHODS = PARTITIONERS


def assign(
    atoms: Atoms,
    degrees: np.ndarray,
    cutoff_angstrom: float,
    parts: int,
    method: str = "min-nn",
    cost: Cost = Cost(),  # noqa: B008
    sources: Callable[[], np.ndarray] | None = None,
) -> np.ndarray:
    """Assign an owner to every atom, (A,), without knowing the edges: the number of edges into each atom is enough.

    degrees (A,): these numbers.
    sources: function that returns the source of every edge, sorted by destination. metis alone calls it, and needs all edges
    in memory.
    Raises ValueError for a method that is not known or fewer than one part.
    """
    if method not in METHODS:
        raise ValueError(f"partitioner {method!r} is not known, expected one of {', '.join(METHODS)}.")
    if parts < 1:
        raise ValueError(f"{parts} parts: expected at least one.")
    if method == "metis":
        assert sources is not None, "metis needs the edges"
        return metis(degrees, sources(), parts)
    if method == "low-nn":
        return low_nn(space(atoms, cutoff_angstrom), degrees, cutoff_angstrom, parts)
    return min_nn(space(atoms, cutoff_angstrom), degrees, cutoff_angstrom, parts, cost)


def partition(
    atoms: Atoms,
    edges: Iterable[tuple[np.ndarray, np.ndarray]],
    cutoff_angstrom: float,
    parts: int,
    method: str = "min-nn",
    cost: Cost = Cost(),  # noqa: B008
    ranks_per_node: int = 1,
) -> Partition:
    """Divide a structure into parts, and list the data that travel between them.

    edges: destinations i and sources j, sorted by i, in one piece or several; iterated over more than once. With the edges
    of graph.neighbours.Neighbourhood or TiledEdges they are never in memory together, except for metis.
    parts: any number; parts beyond the number of atoms stay empty.
    ranks_per_node: parts that exchange much become ranks of one node, which has the ranks n k to n k + n - 1.
    attributes["seconds"] of the result is the time of the partitioner alone, without degrees and lists.
    Raises ValueError as `assign` does.
    """
    degrees = sum((np.bincount(i, minlength=len(atoms)) for i, _ in edges), np.zeros(len(atoms), np.int64))
    started = time.perf_counter()
    sources = lambda: np.concatenate([np.empty(0, np.int64), *(j for _, j in edges)])  # noqa: E731
    owner = assign(atoms, degrees, cutoff_angstrom, parts, method, cost, sources)
    seconds = time.perf_counter() - started
    result = halo_lists(owner, parts, edges, degrees)
    if ranks_per_node > 1:
        result = group_nodes(result, ranks_per_node)
    result.attributes |= {"method": method, "cutoff_angstrom": float(cutoff_angstrom), "seconds": seconds}
    return result


class TiledEdges:
    """Edges of a structure repeated along its lattice vectors, generated tile by tile.

    Memory does not grow with the number of tiles.
    edges (E, 5): i, j, R of the unit cell, sorted. Atoms are ordered as by ase.Atoms.repeat: tile by tile, the last
    direction fastest.
    """

    def __init__(self, edges: np.ndarray, n_atoms: int, repeat: tuple[int, int, int]) -> None:
        self.edges, self.n_atoms, self.repeat = edges, n_atoms, np.array(repeat)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        i, j, R = self.edges[:, 0], self.edges[:, 1], self.edges[:, 2:]
        for tile, cell in enumerate(np.ndindex(*self.repeat)):
            source = np.ravel_multi_index(tuple(((R + cell) % self.repeat).T), self.repeat)
            yield i + tile * self.n_atoms, j + source * self.n_atoms
