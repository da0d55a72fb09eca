"""Locate the atoms along the three directions that can be cut."""

from dataclasses import dataclass

import numpy as np
from ase import Atoms

from ..structures import plane_distances


@dataclass
class Space:
    """Positions of atoms, given as their distances from lattice planes.

    heights (A, 3): distance in Angstrom above the plane that the two other lattice vectors span, from 0 to lengths (3,).
    Atoms whose heights along one direction differ by h are at least h apart, whatever the angles of the cell.
    periodic (3,): whether the direction is a ring.
    order (A, 3): rank of every atom along each direction. Atoms of one lattice plane are ordered by their other heights, so
    that a cut through a plane of a crystal is a line in it and is not scattered by rounding.
    """

    heights: np.ndarray
    lengths: np.ndarray
    periodic: np.ndarray

    PLANE = 0.02  # Angstrom: atoms whose heights differ by less belong to one lattice plane

    def __post_init__(self) -> None:
        planes = np.round(self.heights / self.PLANE)
        self.order = np.empty(self.heights.shape, np.int64)
        for d in range(3):
            keys = planes[:, (d + 2) % 3], planes[:, (d + 1) % 3], planes[:, d]
            self.order[np.lexsort(keys), d] = np.arange(len(self.heights))


def space(atoms: Atoms, cutoff_angstrom: float) -> Space:
    """Build the space of a structure.

    A direction is open if it is not periodic, or if it has an empty gap wider than the cutoff.
    """
    cell = atoms.cell.complete()
    height = plane_distances(cell)
    fractions = atoms.positions @ np.linalg.inv(cell.array)
    heights, lengths, periodic = np.empty_like(fractions), height.copy(), atoms.pbc.copy()
    for d in range(3):
        if periodic[d] and len(atoms):
            heights[:, d] = fractions[:, d] % 1.0 % 1.0 * height[d]  # taken twice, because -1e-20 % 1.0 is 1.0
            ring = np.sort(heights[:, d])
            gaps = np.diff(ring, append=ring[0] + height[d])
            widest = int(gaps.argmax())
            if gaps[widest] <= cutoff_angstrom:
                continue
            periodic[d] = False
            heights[:, d] = (heights[:, d] - ring[(widest + 1) % len(ring)]) % height[d]
        else:
            heights[:, d] = fractions[:, d] * height[d]
        heights[:, d] -= heights[:, d].min(initial=np.inf) if len(atoms) else 0.0
        lengths[d] = heights[:, d].max(initial=0.0)
    return Space(heights, lengths, periodic)


def split(space: Space, weights: np.ndarray, atoms: np.ndarray, d: int, shares: list[int]) -> list[np.ndarray]:
    """Cut atoms along direction d into runs whose weights are in proportion to `shares`, as nearly as whole atoms allow."""
    atoms = atoms[np.argsort(space.order[atoms, d])]
    below = np.concatenate([[0.0], np.cumsum(weights[atoms])])
    wanted = np.cumsum(shares)[:-1] / sum(shares) * below[-1]
    right = np.searchsorted(below, wanted).clip(1, max(len(atoms), 1)) if len(atoms) else np.zeros(len(wanted), np.int64)
    cut = np.where(len(atoms) and wanted - below[right - 1] < below[right.clip(max=len(atoms))] - wanted, right - 1, right)
    return np.split(atoms, cut)


def even(parts: int, pieces: int) -> list[int]:
    """Divide `parts` into `pieces` whole numbers that differ by at most one, with the larger ones spread evenly."""
    return np.diff(np.arange(pieces + 1) * parts // pieces).tolist()
