"""Partition by Low-NN, a recursive bisection that cuts where few neighbours arise.

Reference: "Distributed Equivariant Graph Neural Networks for Large-Scale Electronic Structure Prediction", ETH Zurich,
Appendix A. In addition this implementation supports numbers of parts that are not a power of two, directions that are not
periodic, and triclinic cells (extents are distances of lattice planes).
"""

import numpy as np

from .space import Space, split


def low_nn(space: Space, degrees: np.ndarray, cutoff_angstrom: float, parts: int) -> np.ndarray:
    """Assign an owner to every atom by recursive bisection, (A,).

    A domain is cut along the direction d with the fewest estimated neighbours, and the last such direction on a tie. The
    estimate is 1 while d is periodic and not yet cut, else ceil(2 cutoff / L_d) with L_d the extent of the domain. The
    cutting plane halves the sum of degrees. A number of parts n that is not a power of two is divided into n // 2 and n - n
    // 2, and the sum of degrees in the same proportion.
    """
    owner = np.empty(len(degrees), np.int64)
    # in a structure without edges the number of atoms is balanced instead
    weights = degrees if degrees.any() else np.ones(len(degrees))

    def cut(atoms: np.ndarray, first: int, n: int, low: np.ndarray, high: np.ndarray, ring: np.ndarray) -> None:
        if n == 1:
            owner[atoms] = first
            return
        extents = np.maximum(high - low, 1e-9)
        neighbours = np.where(ring, 1, np.ceil(2 * cutoff_angstrom / extents))
        d = 2 - int(neighbours[::-1].argmin())
        half = n // 2
        below, above = split(space, weights, atoms, d, [half, n - half])
        ends = [side[index] for side, index in ((below, -1), (above, 0)) if len(side)]
        plane = space.heights[ends, d].mean() if ends else low[d]
        opened = ring & (np.arange(3) != d)
        cut(below, first, half, low, np.where(np.arange(3) == d, plane, high), opened)
        cut(above, first + half, n - half, np.where(np.arange(3) == d, plane, low), high, opened)

    cut(np.arange(len(degrees)), 0, parts, np.zeros(3), space.lengths, space.periodic)
    return owner
