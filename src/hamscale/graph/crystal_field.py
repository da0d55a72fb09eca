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

from ..angular import real_spherical_harmonics
from ..operators import Operators
from .coupling import Coupling, coupled_groups

SPACING_ANGSTROM = 0.25
ATOMS_AT_ONCE = 2000
BEND_PENALTY, SIZE_PENALTY = 1e-2, 1e-4  # relative to the mean square of a feature


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
    densities z -> (A_z, (lmax+1)^2, features). Hartree."""

    blocks: dict
    overlap: dict
    densities: dict


def onsite_blocks(operators: Operators, coupling: Coupling, graph) -> OnsiteBlocks:
    """What the fit takes of a structure; graph: its edges within the cutoff."""
    blocks, overlap, features = {}, {}, {}
    all_densities = densities(graph, sorted(coupling.basis), coupling.lmax)
    for values, store in ((operators.hamiltonian, blocks), (operators.overlap, overlap)):
        for z, _, index, onsite, coupled, _ in coupled_groups(replace(operators, hamiltonian=values), coupling):
            if onsite:
                store[z] = coupled
                features[z] = all_densities[operators.pairs[index, 0]]
    return OnsiteBlocks(blocks, {z: s[0] for z, s in overlap.items()}, features)


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
            X, X0, solve = _least_squares(features, L)
            Y = blocks[:, part].reshape(len(X), -1)
            table = solve(X.T @ Y)
            if L == 0:
                mean[: Y.shape[1]] = Y.mean(0) - X0 @ table
            tables.append(table)
        result.mean[z], result.tables[z] = mean, np.concatenate(tables, 1)
    return result


def _gauges(structures: list[OnsiteBlocks], coupling: Coupling) -> np.ndarray:
    """Gauges of the joint fit, Hartree, (structures,): with the tables eliminated, min over mu of |(1 - P)(Y - mu S)|^2.

    Only L = 0 takes part: S of an atom alone is spherical.
    """
    n = len(structures)
    normal, right = np.zeros((n, n)), np.zeros(n)
    for z in {z for s in structures for z in s.blocks}:
        of = [k for k, s in enumerate(structures) if z in s.blocks]
        features = np.concatenate([structures[k].densities[z] for k in of])
        part = coupling[z, z].slices[0]
        Y = np.concatenate([structures[k].blocks[z][:, part] for k in of])
        S = structures[of[0]].overlap[z][part]
        of_structure = np.zeros((len(Y), n))
        of_structure[np.arange(len(Y)), np.repeat(of, [len(structures[k].blocks[z]) for k in of])] = 1
        X, _, solve = _least_squares(features, 0)
        rest = lambda y, X=X, solve=solve: (y - y.mean(0)) - X @ solve(X.T @ y)  # noqa: E731
        normal += (S @ S) * of_structure.T @ rest(of_structure)
        right += of_structure.T @ rest(Y @ S)
    return np.linalg.lstsq(normal, right, rcond=1e-10)[
        0
    ]  # of all solutions, which differ by a common shift, the one of mean zero


def _least_squares(features: np.ndarray, L: int):
    """Centred design matrix (rows, features) of one L, what was taken from it, and what solves its penalised normal equations."""
    n = features.shape[2]
    X = features[:, L * L : (L + 1) ** 2].reshape(-1, n)
    X0 = X.mean(0) if L == 0 else np.zeros(n)
    X = X - X0
    bend = np.diff(np.eye(n), n=2, axis=0)
    N = X.T @ X
    power = np.trace(N) / n or 1.0  # an atom without neighbours
    inverse = np.linalg.inv(N + power * (BEND_PENALTY * bend.T @ bend + SIZE_PENALTY * np.eye(n)))
    return X, X0, lambda right: inverse @ right
