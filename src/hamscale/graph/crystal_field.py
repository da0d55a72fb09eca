"""Onsite blocks from the neighbours: the linear reference, and with it the energy gauge of a structure.

The block of an atom alone is spherical. In a crystal, potentials of neighbours superpose; what a sum of spherical potentials adds to
an onsite block is, in coupled form and exactly linear in the neighbours,

    c_{L M, slot}(i) = mean_slot delta_{L 0} + sum_{j, R} F^{z_i z_j}_slot(r) Y_LM(r / |r|),    r = r_j + R - r_i

F are tables over distance (linear elements that fade to zero at the cutoff), fitted by least squares with a penalty on their second
differences. What charge transfer and screening do beyond that is left to the network.
Reference: the crystal-field integrals of tight binding, e.g. J. C. Slater, G. F. Koster, Phys. Rev. 94, 1498 (1954), sec. II.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh

from ..angular import real_spherical_harmonics
from ..operators import Operators
from .coupling import Coupling, coupled_groups

SPACING_ANGSTROM = 0.25
ATOMS_AT_ONCE = 2000
SIZE_PENALTY = 1e-3  # of tables, beside that of their second differences
INFLATION = 2.0


def densities(graph, elements: list[int], lmax: int, atoms: slice = slice(None)) -> np.ndarray:
    """sum_j f_k(r_ij) Y_LM(r_ij), element by element, (owned atoms, (lmax+1)^2, elements * knots): what F is linear in.

    graph: a Graph, or what has its atoms, edges, vectors, owned, cutoff_angstrom. atoms: some of its owned atoms.
    """
    owned, cutoff = graph.owned[atoms], graph.cutoff_angstrom
    first, last = np.searchsorted(graph.edges[:, 0], [owned[0], owned[-1] + 1]) if len(owned) else (0, 0)
    edges, vectors = graph.edges[first:last], graph.vectors[first:last]
    n_knots = max(1, round(cutoff / SPACING_ANGSTROM))
    u = np.linalg.norm(vectors, axis=1) / cutoff
    left = np.minimum((u * n_knots).astype(np.int64), n_knots - 1)
    fraction, fade = u * n_knots - left, 1 + u**3 * (-10 + u * (15 - 6 * u))
    kind = np.searchsorted(elements, graph.atoms.numbers[edges[:, 1]])
    row = (np.searchsorted(owned, edges[:, 0]) * len(elements) + kind) * n_knots + left
    edge = np.arange(len(edges))
    inner = left + 1 < n_knots  # the last knot, at the cutoff, is zero
    hats = sp.csr_matrix(
        (
            np.concatenate([(1 - fraction) * fade, (fraction * fade)[inner]]),
            (np.concatenate([row, row[inner] + 1]), np.concatenate([edge, edge[inner]])),
        ),
        shape=(len(owned) * len(elements) * n_knots, len(edges)),
    )
    harmonics = np.concatenate([real_spherical_harmonics(L, vectors) for L in range(lmax + 1)], 1)
    return (hats @ harmonics).reshape(len(owned), len(elements) * n_knots, -1).transpose(0, 2, 1)


@dataclass
class OnsiteBlocks:
    """Onsite blocks of one structure, coupled: blocks z -> (A_z, n) of H, overlap z -> (n,) of S (the same for all atoms of an element),
    densities z -> (A_z, (lmax+1)^2, features). Atoms of an element ascend; rows (A,): where each atom stands. Hartree."""

    blocks: dict
    overlap: dict
    densities: dict
    rows: np.ndarray


def onsite_blocks(operators: Operators, coupling: Coupling, graph) -> OnsiteBlocks:
    """What the fit takes of a structure; graph: its edges within the cutoff."""
    numbers = operators.atoms.numbers
    features = densities(graph, sorted(coupling.basis), coupling.lmax)
    result = OnsiteBlocks({}, {}, {}, np.empty(len(numbers), np.int64))
    for z in np.unique(numbers).tolist():
        atoms = np.flatnonzero(numbers == z)
        result.rows[atoms] = np.arange(len(atoms))
        result.densities[z], result.blocks[z] = features[atoms], np.zeros((len(atoms), coupling[z, z].size))
    for z, _, index, onsite, coupled, _ in coupled_groups(operators, coupling):
        if onsite:
            result.blocks[z][result.rows[operators.pairs[index, 0]]] = coupled
    for z, _, _, onsite, coupled, _ in coupled_groups(replace(operators, hamiltonian=operators.overlap), coupling):
        if onsite:
            result.overlap[z] = coupled[0]
    return result


@dataclass
class CrystalField:
    """mean: z -> (slots,), zero but for L = 0; tables: z -> (features, slots), Hartree; features as `densities` orders them."""

    coupling: Coupling
    mean: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)

    def onsite(self, z: int, densities_of_z: np.ndarray) -> np.ndarray:
        """Coupled onsite blocks of atoms of an element, (A_z, n), Hartree."""
        coupling, start = self.coupling[z, z], 0
        result = np.empty((len(densities_of_z), coupling.size))
        for L, part in coupling.slices.items():
            n = len(coupling.slots[L])
            values = densities_of_z[:, L * L : (L + 1) ** 2] @ self.tables[z][:, start : start + n]
            if L == 0:
                values = values + self.mean[z][:n]
            result[:, part] = values.reshape(len(result), -1)
            start += n
        return result

    def of_graph(self, graph) -> dict[int, np.ndarray]:
        """z -> (A_z, n): coupled onsite blocks of the owned atoms of each element, in their order, Hartree. Some atoms at a time."""
        numbers = graph.atoms.numbers[graph.owned]
        parts = {int(z): [] for z in np.unique(numbers)}
        for first in range(0, len(numbers), ATOMS_AT_ONCE):
            some = slice(first, first + ATOMS_AT_ONCE)
            features = densities(graph, sorted(self.coupling.basis), self.coupling.lmax, some)
            for z, part in parts.items():
                part.append(self.onsite(z, features[numbers[some] == z]))
        return {z: np.concatenate(part) for z, part in parts.items()}

    def gauge(self, structure: OnsiteBlocks) -> float:
        """mu (Hartree) that minimises |H - mu S - this reference|^2 over the onsite blocks."""
        up = down = 0.0
        for z, blocks in structure.blocks.items():
            up += ((blocks - self.onsite(z, structure.densities[z])) @ structure.overlap[z]).sum()
            down += len(blocks) * (structure.overlap[z] ** 2).sum()
        return float(up / down)


def fit_crystal_field(structures: list[OnsiteBlocks], coupling: Coupling, periodic: bool) -> CrystalField:
    """Penalised least squares over all structures, jointly with the gauge of each; gauges average to zero. Molecules have none."""
    result, gauges = CrystalField(coupling), _gauges(structures, coupling) if periodic else np.zeros(len(structures))
    for z in sorted({z for s in structures for z in s.blocks}):
        of = [(mu, s) for mu, s in zip(gauges, structures) if z in s.blocks]
        blocks = np.concatenate([s.blocks[z] - mu * s.overlap[z] for mu, s in of])
        features = np.concatenate([s.densities[z] for _, s in of])
        tables, mean = [], np.zeros(coupling[z, z].n_slots)
        for L, part in coupling[z, z].slices.items():
            fit = _Fit(features, L)
            Y = blocks[:, part].reshape(len(fit.X), -1)
            table = fit.table(Y - Y.mean(0) if L == 0 else Y)
            if L == 0:
                mean[: Y.shape[1]] = Y.mean(0) - fit.mean @ table
            tables.append(table)
        result.mean[z], result.tables[z] = mean, np.concatenate(tables, 1)
    return result


def _gauges(structures: list[OnsiteBlocks], coupling: Coupling) -> np.ndarray:
    """Gauges of the joint fit, Hartree, (structures,): with the tables eliminated, min over mu of |(1 - P)(Y - mu S)|^2.

    Only L = 0 takes part: S of an atom alone is spherical.
    """
    n = len(structures)
    normal, right = np.zeros((n, n)), np.zeros(n)
    for z in sorted({z for s in structures for z in s.blocks}):
        of = [k for k, s in enumerate(structures) if z in s.blocks]
        fit, part = _Fit(np.concatenate([structures[k].densities[z] for k in of]), 0), coupling[z, z].slices[0]
        S = structures[of[0]].overlap[z][part]
        y = np.concatenate([structures[k].blocks[z][:, part] for k in of]) @ S[:, None]
        of_structure = np.zeros((len(y), n))
        of_structure[np.arange(len(y)), np.repeat(of, [len(structures[k].blocks[z]) for k in of])] = 1
        # what is alike in all atoms of a structure is the gauge's, so the penalty is chosen on what is not
        mean = of_structure.T @ y / np.maximum(of_structure.sum(0), 1)[:, None]
        penalty = fit.penalty(y - of_structure @ mean)
        rest = lambda v, fit=fit, penalty=penalty: (v - v.mean(0)) - fit.X @ fit.table(v - v.mean(0), penalty)  # noqa: E731
        normal += (S @ S) * of_structure.T @ rest(of_structure)
        right += (of_structure.T @ rest(y))[:, 0]
    return np.linalg.lstsq(normal, right, rcond=1e-10)[
        0
    ]  # of all solutions, which differ by a common shift, the one of mean zero


class _Fit:
    """Penalised least squares of one L: min |Y - X T|^2 + a tr(T^T P T), P of second differences and of size, X centred for L = 0.

    a minimises |Y - X T|^2 / (rows - INFLATION * effective parameters)^2, generalised cross-validation (G. H. Golub, M. Heath,
    G. Wahba, Technometrics 21, 215 (1979)), inflated because atoms of one structure are no independent samples. With
    N V = P V d and V^T P V = 1 every a costs a few sums.
    """

    def __init__(self, features: np.ndarray, L: int):
        n = features.shape[2]
        X = features[:, L * L : (L + 1) ** 2].reshape(-1, n)
        self.mean = X.mean(0) if L == 0 else np.zeros(n)
        self.X = X - self.mean
        bend = np.diff(np.eye(n), n=2, axis=0)
        self.d, self.V = eigh(self.X.T @ self.X, bend.T @ bend + SIZE_PENALTY * np.eye(n))
        self.d = np.maximum(self.d, 0)

    def penalty(self, Y: np.ndarray) -> float:
        c, total = self.V.T @ (self.X.T @ Y), (Y**2).sum()
        penalties = max(self.d.max(), 1e-12) * np.logspace(-8, 1, 19)
        scores = []
        for a in penalties:
            rest = total - (c**2 * ((self.d + 2 * a) / (self.d + a) ** 2)[:, None]).sum()
            free = len(Y) - INFLATION * (self.d / (self.d + a)).sum()
            scores.append(max(rest, 0) / free**2 if free > 0 else np.inf)
        return float(penalties[np.argmin(scores)])

    def table(self, Y: np.ndarray, penalty: float | None = None) -> np.ndarray:
        """(features, columns of Y)."""
        penalty = self.penalty(Y) if penalty is None else penalty
        return self.V @ ((self.V.T @ (self.X.T @ Y)) / (self.d + penalty)[:, None])
