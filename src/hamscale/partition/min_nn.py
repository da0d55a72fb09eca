"""Partition by Min-NN, which chooses, of all nested cuts along lattice planes, those of least exchange and imbalance cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import TypeAlias

import numpy as np

from .low_nn import low_nn
from .space import Space, even, split


@dataclass(frozen=True)
class Cost:
    """Time per layer, in seconds, of an exchange and of the waiting of ranks for each other.

    latency_s: per neighbour. bandwidth_bytes_s: out of a rank. embedding_bytes: size of one embedding. seconds_per_edge: of
    the work of a layer.
    Defaults: the 20.4 GB/s of Slingshot that the paper of Low-NN reached, 25 x 16 float32 (lmax 4, 16 channels), and 50 ns
    per edge on a GPU.
    """

    latency_s: float = 5e-6
    bandwidth_bytes_s: float = 20.4e9
    embedding_bytes: int = 1600
    seconds_per_edge: float = 5e-8

    def of(self, neighbours: float, embeddings: float, edges_mean: float, edges_max: float) -> float:
        exchange = self.latency_s * neighbours + embeddings * self.embedding_bytes / self.bandwidth_bytes_s
        return exchange + self.seconds_per_edge * (edges_max - edges_mean)


Candidate: TypeAlias = tuple[tuple[int, ...], int, int]  # order of the directions, p, q: see `min_nn`

SHORTLIST = 12  # number of candidates that are cut and measured
MEASURED = 64  # number of parts that are measured for each of them


def min_nn(
    space: Space,
    degrees: np.ndarray,
    cutoff_angstrom: float,
    parts: int,
    cost: Cost = Cost(),  # noqa: B008
) -> np.ndarray:
    """Assign an owner to every atom, (A,), by the candidate of least cost; the parts of Low-NN are one of the candidates.

    A candidate is an order of the directions and two numbers p and q: p slabs along the first direction, each cut into q
    columns (or as many as it has parts) along the second, and the rest along the third. Every cut is balanced by degrees.
    All candidates are ranked by the volume within the cutoff of their mean box; the best ones are cut, and their boxes are
    measured against the atoms.
    """
    weights = degrees if degrees.any() else np.ones(len(degrees))
    if parts == 1 or len(degrees) < 2:
        return np.zeros(len(degrees), np.int64)
    ranked = sorted(_candidates(space, parts), key=lambda c: _estimate(space, c, len(degrees), cutoff_angstrom, parts, cost))
    owners = [_cut(space, weights, parts, *c) for c in ranked[:SHORTLIST]]
    owners.append(low_nn(space, degrees, cutoff_angstrom, parts))
    costs = [_measure(space, owner, degrees, cutoff_angstrom, parts, cost) for owner in owners]
    return owners[int(np.argmin(costs))]


def _candidates(space: Space, parts: int) -> Iterator[Candidate]:
    """Yield (order of directions, p, q), one for each distinct set of cuts."""
    seen = set()
    for order in permutations(range(3)):
        for p in range(1, parts + 1):
            for q in range(1, parts // p + 1):
                r = -(-parts // (p * q))
                cuts = tuple((d, n) for d, n in zip(order, (p, q, r)) if n > 1)
                if cuts not in seen:
                    seen.add(cuts)
                    yield order, p, q


def _estimate(space: Space, candidate: Candidate, n_atoms: int, cutoff: float, parts: int, cost: Cost) -> float:
    """Estimate the cost from the volume within the cutoff of the mean box.

    The volume is that of Steiner's formula, limited to the periodic cell.
    """
    order, p, q = candidate
    cuts = np.empty(3)
    cuts[list(order)] = p, q, parts / (p * q)
    lengths = np.maximum(space.lengths, 1e-9)
    box = lengths / cuts
    # along an open direction, or a ring that the box and its surroundings fill, the volume ends at the whole length
    reach = np.minimum(cutoff, (lengths - box) / 2)
    faces = box.prod() * (2 * reach / box).sum()
    rims = sum(np.pi * reach[a] * reach[b] * box[3 - a - b] for a, b in ((0, 1), (0, 2), (1, 2)))
    volume = faces + rims + 4 / 3 * np.pi * reach.prod()
    neighbours = np.prod(np.minimum(2 * np.ceil(cutoff / box * 0.999) + 1, np.ceil(cuts))) - 1
    return cost.of(neighbours, volume / lengths.prod() * n_atoms, 0, 0)


def _cut(space: Space, weights: np.ndarray, parts: int, order: tuple[int, ...], p: int, q: int) -> np.ndarray:
    owner, first = np.empty(len(weights), np.int64), 0
    shares = even(parts, p)
    for slab, n in zip(split(space, weights, np.arange(len(weights)), order[0], shares), shares):
        columns = even(n, min(q, n))
        for column, m in zip(split(space, weights, slab, order[1], columns), columns):
            for atoms in split(space, weights, column, order[2], [1] * m):
                owner[atoms] = first
                first += 1
    return owner


def _measure(space: Space, owner: np.ndarray, degrees: np.ndarray, cutoff: float, parts: int, cost: Cost) -> float:
    """Compute the cost from the boxes of the parts.

    An atom within the cutoff of another part's box is a ghost of that part.
    """
    filled, index = np.unique(owner, return_inverse=True)
    by_part = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[by_part], np.arange(len(filled)))
    heights = space.heights[by_part]
    low, high = np.minimum.reduceat(heights, starts), np.maximum.reduceat(heights, starts)
    measured = np.unique(np.linspace(0, len(filled) - 1, MEASURED).astype(int))
    ghosts = neighbours = 0
    for k in measured:
        near = np.arange(len(owner))
        squares = np.zeros(len(owner))
        boxes = np.zeros(len(filled))
        for d in range(3):
            ring = space.lengths[d] if space.periodic[d] else None
            distance = _gap(low[k, d], high[k, d], space.heights[near, d], space.heights[near, d], ring)
            squares = squares[: len(near)] + distance**2
            inside = squares < cutoff**2
            near, squares = near[inside], squares[inside]
            boxes += _gap(low[k, d], high[k, d], low[:, d], high[:, d], ring) ** 2
        ghosts += len(near) - (owner[near] == filled[k]).sum()
        neighbours += (boxes < cutoff**2).sum() - 1
    edges = np.bincount(owner, degrees, minlength=parts)
    return cost.of(neighbours / len(measured), ghosts / len(measured), edges.mean(), edges.max())


def _gap(
    low: float | np.ndarray, high: float | np.ndarray, other_low: np.ndarray, other_high: np.ndarray, ring: float | None
) -> np.ndarray:
    """Compute the distance between intervals, on a ring or on a line."""
    ahead, behind = other_low - high, low - other_high
    apart = np.maximum(ahead, behind)
    if ring is not None:
        apart = np.minimum(apart, np.minimum(ahead, behind) + ring)
    return np.maximum(0, apart)
