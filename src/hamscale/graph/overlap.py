"""Compute S of any structure without DFT: the overlap is exactly a two-centre quantity.

In the frame of an edge only the M = 0 components of a coupled overlap block are non-zero, and they depend on the distance
alone. These functions are tabulated once per pair of elements, with PySCF's integrals over CP2K's basis, and interpolated
by quintic splines. Every edge then costs a table look-up, a spherical harmonic and the inverse coupling. No array is
quadratic in the number of atoms.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from ase import Atoms
from pyscf import gto
from scipy.interpolate import BSpline, make_interp_spline

from ..angular import real_spherical_harmonics
from ..basis import Basis, ElementBasis
from ..operators import Operators
from ..pairs import PairList
from ..units import angstrom_to_bohr, bohr_to_angstrom
from .coupling import Coupling, PairCoupling
from .neighbours import Neighbourhood

SPACING_BOHR = 0.02  # error of the quintic spline below 1e-10 for exponents up to 12 / Bohr^2
LONGEST_BOHR = 50.0
NEGLIGIBLE = 1e-8


def two_centre_blocks(coupling: PairCoupling, radial: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Build the blocks (G, n_i n_j) of two-centre functions from their M = 0 components in the edge frame.

    radial (G, slots): these components; all others are zero.
    """
    coupled = np.empty((len(radial), coupling.size))
    start = 0
    for L, part in coupling.slices.items():
        n = len(coupling.slots[L])
        harmonics = real_spherical_harmonics(L, vectors)  # D^L(Q)^T e_0 = Y_L(edge)
        coupled[:, part] = (harmonics[:, :, None] * radial[:, None, start : start + n]).reshape(len(radial), -1)
        start += n
    return coupling.blocks(coupled)


def _molecule(element: ElementBasis, heights_bohr: Iterable[float]) -> tuple[gto.Mole, np.ndarray]:
    """Build a PySCF molecule of one element's atoms on the z axis, and the index of CP2K's orbital order.

    The index takes PySCF's orbitals of an atom into CP2K's order.
    """
    basis = [[l, *np.column_stack([e, c]).tolist()] for l, e, c in element.shells]
    molecule = gto.M(atom=[("He", (0.0, 0.0, z)) for z in heights_bohr], basis={"He": basis}, unit="Bohr", spin=None, verbose=0)
    order, starts, start = np.argsort(element.l, kind="stable"), {}, 0  # PySCF sorts an atom's shells by l
    for shell in order:
        starts[shell] = start
        start += 2 * element.l[shell] + 1
    index = []
    for shell, l in enumerate(element.l):
        p_order = [1, 2, 0] if l == 1 else range(2 * l + 1)  # PySCF orders p as x, y, z, every other l as m = -l..l
        index += [starts[shell] + m for m in p_order]
    return molecule, np.array(index)


class OverlapTable:
    """Overlap S_ij(R) of any structure in a basis, with an interpolation error below 1e-10."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self.coupling = Coupling(basis)
        self._splines: dict[tuple[int, int], BSpline] = {}

    def spline(self, z_i: int, z_j: int) -> BSpline:
        """Return the spline from distance (A) to the M = 0 components (slots,) of the coupled overlap block."""
        if (z_i, z_j) not in self._splines:
            self._splines[z_i, z_j] = self._tabulate(z_i, z_j)
        return self._splines[z_i, z_j]

    def _tabulate(self, z_i: int, z_j: int) -> BSpline:
        coupling = self.coupling[z_i, z_j]
        heights = np.arange(0, angstrom_to_bohr(self.reach(z_i, z_j, 1e-13)) + 8 * SPACING_BOHR, SPACING_BOHR)
        one, index_i = _molecule(self.basis[z_i], [0.0])
        coupled = []
        for chunk in np.array_split(heights, max(1, len(heights) // 250)):
            many, index_j = _molecule(self.basis[z_j], chunk)
            S = gto.intor_cross("int1e_ovlp_sph", one, many).reshape(len(index_i), len(chunk), len(index_j))
            S = S[index_i][:, :, index_j].transpose(1, 0, 2).reshape(len(chunk), -1)
            coupled.append((S @ coupling.transform)[:, coupling.zero_order])
        return make_interp_spline(bohr_to_angstrom(heights), np.concatenate(coupled), k=5)

    def reach(self, z_i: int, z_j: int, negligible: float = NEGLIGIBLE) -> float:
        """Compute the distance (A) beyond which no element of the overlap block exceeds `negligible`.

        The bound comes from pairs of primitives, each of which decays as exp(-mu d^2) times polynomials. It is evaluated on
        a grid of distances and rounded up generously.
        """
        d = np.arange(0, LONGEST_BOHR, 0.1)
        bound = np.zeros_like(d)
        for l_a, e_a, c_a in self.basis[z_i].shells:
            for l_b, e_b, c_b in self.basis[z_j].shells:
                mu = np.multiply.outer(e_a, e_b) / np.add.outer(e_a, e_b)
                weight = np.abs(np.multiply.outer(c_a, c_b))
                terms = weight[..., None] * np.exp(-mu[..., None] * d**2) * (1 + mu[..., None] * d**2) ** ((l_a + l_b) / 2)
                bound = np.maximum(bound, terms.sum((0, 1)))
        return float(bohr_to_angstrom(d[np.flatnonzero(bound > negligible)[-1]] + 0.1))

    def pairs(self, atoms: Atoms, at_least_angstrom: float = 0.0, owned: np.ndarray | None = None) -> PairList:
        """Find all pairs (i, j, R) that overlap by more than 1e-8 or lie within a distance, sorted.

        Onsite pairs are included.
        owned: atoms i whose pairs are sought, ascending; all atoms by default.
        """
        numbers = np.unique(atoms.numbers)
        reach = {(a, b): max(at_least_angstrom, self.reach(a, b)) for a in numbers for b in numbers}
        limit = np.zeros((numbers.max() + 1,) * 2)
        for key, value in reach.items():
            limit[key] = value
        parts = [np.empty((0, 5), np.int32)]
        for some in Neighbourhood(atoms, max(reach.values()), owned).tables(onsite=True):
            near = some.distances < limit[atoms.numbers[some[:, 0]], atoms.numbers[some[:, 1]]]
            parts.append(some[near].astype(np.int32))
        return PairList(atoms, np.concatenate(parts))

    def blocks(self, z_i: int, z_j: int, vectors: np.ndarray) -> np.ndarray:
        """Compute the overlap blocks (G, n_i n_j) of edges between two elements.

        vectors (G, 3): in Angstrom, zero for onsite blocks.
        """
        spline = self.spline(z_i, z_j)
        distances = np.linalg.norm(vectors, axis=1)
        radial = np.where((distances < spline.t[-1])[:, None], spline(np.minimum(distances, spline.t[-1])), 0.0)
        # an onsite block is a scalar (L = 0 only), so any direction will do
        return two_centre_blocks(self.coupling[z_i, z_j], radial, np.where(distances[:, None] > 0, vectors, [0.0, 0.0, 1.0]))

    def of_pairs(self, z_i: int, z_j: int, pairs: PairList) -> np.ndarray:
        """Compute the overlap blocks (G, n_i n_j) of pairs between two elements."""
        return self.blocks(z_i, z_j, pairs.vectors)


class StoredOverlap:
    """S of one structure as operators of it have it, where its basis has no radial functions to compute S from."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators

    @property
    def atoms(self) -> Atoms:
        return self.operators.atoms

    def pairs(self, atoms: Atoms, at_least_angstrom: float = 0.0, owned: np.ndarray | None = None) -> PairList:
        """Find all pairs (i, j, R) that have a block of S or lie within a distance, sorted, as `OverlapTable.pairs` does."""
        near = Neighbourhood(atoms, at_least_angstrom, owned).tables(onsite=True)
        table = self.operators.pairs.table
        if owned is not None:
            table = table[np.isin(table[:, 0], owned)]
        return PairList(atoms, np.unique(np.concatenate([table, *(some[:] for some in near)]), axis=0)).sorted()

    def of_pairs(self, z_i: int, z_j: int, pairs: PairList) -> np.ndarray:
        """Return the overlap blocks (G, n_i n_j) of pairs between two elements; those that are not there are zero."""
        basis, operators, rows = self.operators.basis, self.operators, self.operators.pairs.find(pairs)
        result = np.zeros((len(pairs), basis[z_i].n_orbitals * basis[z_j].n_orbitals))
        there = rows >= 0
        result[there] = operators.overlap[operators.offsets[rows[there], None] + np.arange(result.shape[1])]
        return result


@lru_cache(maxsize=4)
def _table(key: tuple) -> OverlapTable:
    return OverlapTable(Basis(key))


def overlap_table(basis: Basis) -> OverlapTable:
    """Return the overlap table of a basis, which is made once per process."""
    return _table(tuple(basis.values()))
