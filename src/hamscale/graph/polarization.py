"""Electrostatics of polarizable ions: what atoms far beyond any cutoff do to the potential at an atom.

The atoms carry Gaussians of charge (width WIDTH_ANGSTROM), q_b on an atom of element b. Their field induces dipoles at the atoms, whose
potential and field follow likewise:

    phi_i = sum_k w_k S_k exp(i k r_i),  w_k = 4 pi / (V k^2) exp(-k^2 width^2 / 2),  S_k = sum_j q_j exp(-i k r_j)
    E = -grad phi;    of dipoles E_j at the atoms j of element a:  S^a_k = sum_{j in a} (-i k . E_j) exp(-i k r_j)

Only charges that make the structure neutral are allowed (`neutral_charges`). Those of one element alone, in a neutralising background,
have a potential that grows without bound with the wavelength of a displacement, as 1 / k, and no solid has it: of a crystal of one
element there is no such charge at all. How large the charges are and how much dipoles screen them are coefficients for a fit to find. A
point charge's remainder, erfc(r) / r, is short-ranged and a sum over near neighbours. The sums over k are non-uniform Fourier transforms,
N log N in the atoms.
References: P. P. Ewald, Ann. Phys. 369, 253 (1921); B. G. Dick, A. W. Overhauser, Phys. Rev. 112, 90 (1958) for the ions;
A. H. Barnett, J. F. Magland, L. af Klinteberg, SIAM J. Sci. Comput. 41, C479 (2019) for the transforms (finufft).
"""

from itertools import combinations_with_replacement

import finufft
import numpy as np
from ase import Atoms
from scipy.linalg import null_space

from ..units import angstrom_to_bohr

WIDTH_ANGSTROM = 0.7
REACH = 6.0  # of k, over the width: exp(-18) is left out
ACCURACY = 1e-10
FROM_XYZ = [1, 2, 0]  # the order of L = 1: y, z, x


def neutral_charges(counts: np.ndarray) -> np.ndarray:
    """Find the charges of the elements that make every structure neutral: orthonormal columns q (n, m) with counts q = 0.

    counts (S, n): atoms of each element in each structure. m is 0 where there are none, as in a crystal of one element.
    """
    return null_space(np.unique(counts, axis=0).astype(float))


def potential_count(n: int, m: int) -> int:
    """How many potentials m charge distributions over n elements have: theirs, and those of the dipoles of each element in each field."""
    return m + n * m


def potentials(atoms: Atoms, elements: list[int], charges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute potentials and fields at the atoms of m charge distributions over n elements, charges (n, m), in atomic units.

    Returns the potentials (A, m + n m): phi_f of every distribution, then of the dipoles of each element a in each field E_f; the
    squares E_f . E_g with f <= g (A, m (m+1) / 2); and the fields (A, 3, m + n m), ordered as L = 1, in the order of the potentials.
    An element that the structure lacks counts zero.
    """
    m = charges.shape[1]
    if not m:
        return np.empty((len(atoms), 0)), np.empty((len(atoms), 0)), np.empty((len(atoms), 3, 0))
    waves = _Waves(atoms)
    of = [(atoms.numbers == z).astype(float) for z in elements]
    phi, fields = zip(*(waves.of_charges(sum(q * mask for q, mask in zip(column, of))) for column in charges.T))
    induced = [waves.of_dipoles(mask[:, None] * E) for mask in of for E in fields]
    squares = [(a * b).sum(1) for a, b in combinations_with_replacement(fields, 2)]
    felt = np.stack([*phi, *(p for p, _ in induced)], 1)
    return felt, np.stack(squares, 1), np.stack([*fields, *(E for _, E in induced)], 2)[:, FROM_XYZ]


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
