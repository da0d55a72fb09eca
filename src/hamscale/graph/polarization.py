"""Electrostatics of polarizable ions: what atoms far beyond any cutoff do to the potential at an atom.

Every atom carries a Gaussian of unit charge (width WIDTH_ANGSTROM), each element a sublattice of its own in a neutralising
background. Its field induces dipoles at the atoms, whose potential and field follow likewise:

    phi^b_i = sum_k w_k S^b_k exp(i k r_i),  w_k = 4 pi / (V k^2) exp(-k^2 width^2 / 2),  S^b_k = sum_{j in b} exp(-i k r_j)
    E^b = -grad phi^b;    of dipoles E^b_j at the atoms j of element a:  S^ab_k = sum_{j in a} (-i k . E^b_j) exp(-i k r_j)

Charges, polarizabilities and screening are linear coefficients of these, for a fit to find; with formal charges q_b the dipoles follow one
field, sum_b q_b E^b, and fewer coefficients. A point charge's remainder, erfc(r) / r, is short-ranged and a sum over near neighbours. The sums over k are non-uniform Fourier transforms, N log N in the atoms.
References: P. P. Ewald, Ann. Phys. 369, 253 (1921); B. G. Dick, A. W. Overhauser, Phys. Rev. 112, 90 (1958) for the ions;
A. H. Barnett, J. F. Magland, L. af Klinteberg, SIAM J. Sci. Comput. 41, C479 (2019) for the transforms (finufft).
"""

from itertools import combinations_with_replacement

import finufft
import numpy as np
from ase import Atoms

from ..units import angstrom_to_bohr

WIDTH_ANGSTROM = 0.7
REACH = 6.0  # of k, over the width: exp(-18) is left out
ACCURACY = 1e-10
FROM_XYZ = [1, 2, 0]  # the order of L = 1: y, z, x


def potentials(atoms: Atoms, elements: list[int], charges: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Scalars (A, n + n m + m (m+1) / 2): phi^b; that of the dipoles of elements a in fields f; E^f . E^g with f <= g. Vectors (A, 3,
    n + n m), ordered as L = 1: E^b; that of the dipoles. n elements; m = n fields, of each element, or with charges m = 1, that of
    all. Atomic units; zero for an element that the structure lacks."""
    waves = _Waves(atoms)
    of = [(atoms.numbers == z).astype(float) for z in elements]
    phi, field = zip(*(waves.of_charges(charge) for charge in of))
    fields = [sum(charges[z] * E for z, E in zip(elements, field))] if charges else field
    induced = [waves.of_dipoles(charge[:, None] * E) for charge in of for E in fields]
    squares = [(a * b).sum(1) for a, b in combinations_with_replacement(fields, 2)]
    scalars = np.stack([*phi, *(p for p, _ in induced), *squares], 1)
    return scalars, np.stack([*field, *(E for _, E in induced)], 2)[:, FROM_XYZ]


def columns(elements: int, L: int, charges: bool) -> int:
    """How many of `potentials` there are for L."""
    fields = 1 if charges else elements
    return {0: elements + elements * fields + fields * (fields + 1) // 2, 1: elements + elements * fields}.get(L, 0)


class _Waves:
    """Plane waves of a cell up to the Gaussians' reach, and sums over them."""

    def __init__(self, atoms: Atoms):
        cell = angstrom_to_bohr(np.asarray(atoms.cell))
        width = angstrom_to_bohr(WIDTH_ANGSTROM)
        reach = REACH / width
        self.points = [np.ascontiguousarray(2 * np.pi * x) for x in (atoms.get_scaled_positions() - 0.5).T]
        highest = np.ceil(reach * np.linalg.norm(cell, axis=1) / (2 * np.pi)).astype(int)
        self.shape = tuple(int(m) for m in 2 * highest + 1)
        reciprocal = 2 * np.pi * np.linalg.inv(cell).T
        orders = np.meshgrid(*(np.arange(-m, m + 1) for m in highest), indexing="ij", sparse=True)
        self.k = [sum(m * b for m, b in zip(orders, column)) for column in reciprocal.T]
        square = sum(k**2 for k in self.k)
        inner = (square > 0) & (square < reach**2)
        # the points stand half a cell off, on both ways: it cancels
        self.weight = np.zeros(self.shape)
        self.weight[inner] = 4 * np.pi / abs(np.linalg.det(cell)) * np.exp(-square[inner] * width**2 / 2) / square[inner]

    def of_charges(self, charges: np.ndarray):
        return self._felt(self._structure_factor(charges))

    def of_dipoles(self, dipoles: np.ndarray):
        return self._felt(sum(-1j * k * self._structure_factor(p) for k, p in zip(self.k, dipoles.T)))

    def _structure_factor(self, strengths: np.ndarray) -> np.ndarray:
        # one thread: with more the order of a sum, and its last bits, would be chance
        c = strengths.astype(complex)
        return finufft.nufft3d1(*self.points, c, self.shape, eps=ACCURACY, isign=-1, nthreads=1)

    def _felt(self, factor: np.ndarray):
        """Potential (A,) and field (A, 3) at the atoms."""
        waves = self.weight * factor
        there = lambda f: finufft.nufft3d2(*self.points, f, eps=ACCURACY, isign=1, nthreads=1).real  # noqa: E731
        return there(waves), np.stack([there(-1j * k * waves) for k in self.k], 1)
