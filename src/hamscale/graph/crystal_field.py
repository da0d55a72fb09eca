"""Compute onsite blocks from neighbours: the linear reference, and from it the energy gauge of a structure.

The block of an isolated atom is spherical. In a crystal the potentials of the neighbours superpose. The contribution of a
sum of spherical potentials to an onsite block is, in coupled form and exactly linear in the neighbours,

    c_{L M, slot}(i) = mean_slot delta_{L 0} + sum_{j, R} F^{z_i z_j}_slot(r) Y_LM(r / |r|),    r = r_j + R - r_i

F are tables over distance (piecewise linear functions that fade to zero at the cutoff), fitted by least squares with a
penalty on their second differences. In a periodic structure the charges of ions act beyond any cutoff, and each ion
polarizes the others. Therefore, for L = 0 and L = 1, the sum includes only near neighbours, and the potential V of
polarization.py adds the term V_i S_ii,

    V_i = sum_f a_f phi_f(i),    -1 <= a_f <= 0 with formal charges.

V_i is the energy of an electron in that potential. Hence all atoms and slots share the same coefficients a, and the charges
are no larger than formal ones. The fields of these potentials, and the squares of the fields, are bounded at any
wavelength; they have a coefficient for every slot, as the neighbours have.
A shift of an atom's potential also shifts its bond blocks; each end contributes half (R. S. Mulliken, J. Chem. Phys. 17,
1155 (1949)):

    H_ij <- 1/2 (D_i S_ii^-1 S_ij + S_ij S_jj^-1 D_j),    D_i = onsite block less the mean of its element

Further effects of charge transfer and screening are left to the network.
Reference: the crystal-field integrals of tight binding, e.g. J. C. Slater, G. F. Koster, Phys. Rev. 94, 1498 (1954), sec.
II.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp
from ase import Atoms

from ..angular import real_spherical_harmonics
from ..operators import Operators
from ..pairs import ByElement, place_in_element
from .charges import ChargeKernel
from .coupling import Coupling, coupled_groups
from .graph import Graph
from .polarization import neutral_charges, potentials

SPACING_ANGSTROM = 0.25
ATOMS_AT_ONCE = 2000
SMALLEST_SPREAD_HARTREE = 1e-3  # quantities that vary less in the training structures are not magnified


def densities(
    graph: Graph, elements: list[int], lmax: int, atoms: slice = slice(None), reach_angstrom: float = np.inf
) -> np.ndarray:
    """Compute the sums over neighbours sum_j f_k(r_ij) Y_LM(r_ij), in which the tables F are linear.

    Returns (owned atoms, (lmax+1)^2, elements * knots), with the sums of one element after another.
    atoms: selects some of the owned atoms of the graph.
    reach_angstrom: a cutoff below that of the graph.
    """
    owned, cutoff = graph.owned[atoms], min(graph.cutoff_angstrom, reach_angstrom)
    first, last = np.searchsorted(graph.edges[:, 0], [owned[0], owned[-1] + 1]) if len(owned) else (0, 0)
    some = graph.edges.take(slice(first, last))
    edges, vectors = some.table, some.vectors
    if reach_angstrom < graph.cutoff_angstrom:
        near = np.linalg.norm(vectors, axis=1) < reach_angstrom
        edges, vectors = edges[near], vectors[near]
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


@dataclass(frozen=True)
class Ions:
    """Assumptions on the potentials in periodic structures.

    near_angstrom: neighbours farther away act through their charges alone.
    charges: z -> formal charge; if empty, any charges that make the training structures neutral are allowed.
    far: whether charges act at all.
    """

    near_angstrom: float = 4.5
    charges: dict[int, float] = field(default_factory=dict)
    far: bool = True

    def distributions(self, elements: list[int], structures: list[Atoms]) -> np.ndarray:
        """Return the charge distributions (n, m) over the elements whose potentials are used.

        The columns are the formal charges, or all distributions that make the structures neutral; m = 0 if charges do not
        act or a structure is not periodic. Raises ValueError if formal charges leave a structure charged.
        """
        if not (self.far and all(atoms.pbc.any() for atoms in structures)):
            return np.empty((len(elements), 0))
        counts = np.array([[(atoms.numbers == z).sum() for z in elements] for atoms in structures])
        if not self.charges:
            return neutral_charges(counts)
        formal = np.array([self.charges[z] for z in elements])
        if (left := np.abs(counts @ formal).max()) > 1e-6:
            raise ValueError(
                f"graph.charges leave a structure of the training set with a charge of {left:g}, expected neutral ones: "
                "the potential of a charged cell has no meaning. Correct them, or leave them out."
            )
        return formal[:, None]


@dataclass
class Features:
    """Quantities in which the onsite blocks of some atoms are linear, in atomic units.

    by_degree: for each degree L, (A, 2L+1, features).
    potentials: (A, p).
    """

    by_degree: list[np.ndarray]
    potentials: np.ndarray

    def rows(self, rows: np.ndarray) -> "Features":
        return Features([f[rows] for f in self.by_degree], self.potentials[rows])


def features(
    graph: Graph,
    elements: list[int],
    lmax: int,
    near_angstrom: float,
    charges: np.ndarray,
    atoms: slice = slice(None),
    far: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Features:
    """Compute the features of owned atoms of a graph.

    charges (n, m): as from `Ions.distributions`.
    In a periodic structure the features of L = 0 and 1 are sums over near neighbours, together with the squares of fields
    (L = 0) and the fields (L = 1) that represent all other atoms.
    far: the result of `potentials` for all owned atoms, if it has been computed already.
    """
    whole = _by_degree(densities(graph, elements, lmax, atoms))
    owned = graph.owned[atoms]
    if not graph.atoms.pbc.any():
        return Features(whole, np.empty((len(owned), 0)))
    felt, squares, fields = potentials(graph.atoms, elements, charges, graph.owned) if far is None else far
    near = _by_degree(densities(graph, elements, min(1, lmax), atoms, near_angstrom))
    near = [np.concatenate([n, f[atoms]], 2) for n, f in zip(near, (squares[:, None], fields))]
    return Features(near + whole[2:], felt[atoms])


def _by_degree(values: np.ndarray) -> list[np.ndarray]:
    return [values[:, L * L : (L + 1) ** 2] for L in range(round(values.shape[1] ** 0.5))]


@dataclass
class OnsiteBlocks:
    """Onsite blocks of one structure in coupled form, Hartree.

    blocks: z -> (A_z, n) of H.
    overlap: z -> (n,) of S, which is the same for all atoms of an element.
    features: z -> Features.
    first_shell: z -> (A_z, features) of L = 0 that include the nearest neighbours only.
    rows (A,): row of each atom among the atoms of its element, which are in ascending order.
    numbers (A,): atomic numbers.
    """

    blocks: ByElement
    overlap: ByElement
    features: dict[int, Features]
    first_shell: ByElement
    rows: np.ndarray
    numbers: np.ndarray


def onsite_blocks(
    operators: Operators,
    coupling: Coupling,
    graph: Graph,
    near_angstrom: float,
    charges: np.ndarray,
    shell_angstrom: float | None = None,
) -> OnsiteBlocks:
    """Collect the onsite data of a structure that the fit needs.

    graph: the graph of the structure, with its edges within the cutoff.
    shell_angstrom: reach of the nearest neighbours; it is needed if charges have potentials.
    """
    numbers, elements = operators.atoms.numbers, sorted(coupling.basis)
    of_atoms = features(graph, elements, coupling.lmax, near_angstrom, charges)
    shell = densities(graph, elements, 0, reach_angstrom=shell_angstrom or near_angstrom)[:, 0]
    result = OnsiteBlocks({}, {}, {}, {}, place_in_element(numbers), numbers)
    for z in np.unique(numbers).tolist():
        atoms = np.flatnonzero(numbers == z)
        result.features[z], result.blocks[z] = of_atoms.rows(atoms), np.zeros((len(atoms), coupling[z, z].size))
        result.first_shell[z] = shell[atoms]
    own = operators.select(operators.pairs.onsite)
    for z, _, index, _, coupled, _ in coupled_groups(own, coupling):
        result.blocks[z][result.rows[own.pairs[index, 0]]] = coupled
    overlap = np.broadcast_to(own.overlap, own.hamiltonian.shape)  # the same for both spins
    for z, _, _, _, coupled, _ in coupled_groups(replace(own, hamiltonian=overlap), coupling):
        result.overlap[z] = coupled[0]
    return result


def less_potential(structure: OnsiteBlocks, potential: np.ndarray) -> OnsiteBlocks:
    """Return the onsite data of a structure whose electrons do not feel a potential u (A,), Hartree: D_i - u_i S_ii."""
    blocks = {
        z: of_z - np.outer(potential[structure.numbers == z], structure.overlap[z]) for z, of_z in structure.blocks.items()
    }
    return replace(structure, blocks=blocks)


@dataclass(frozen=True)
class PotentialField:
    """The fitted reference of the potentials u of self-consistent charges (charges.py), which are linear in the features too.

    kernel: u = K q. mean, centre, spread, scale: z -> Hartree: that to which the tables are added, the mean and the standard
    deviation of the reference, and the root mean square of what it leaves. tables: z -> (features of L = 0,).
    coefficients (p,): of the potentials.
    """

    kernel: ChargeKernel
    mean: dict[int, float]
    tables: ByElement
    coefficients: np.ndarray
    centre: dict[int, float] = field(default_factory=dict)
    spread: dict[int, float] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)

    def of_atoms(self, z: int, of_z: Features) -> np.ndarray:
        """Compute the reference of u of atoms of an element, (A_z,), Hartree."""
        return self.mean[z] + of_z.by_degree[0][:, 0] @ self.tables[z] + of_z.potentials @ self.coefficients


@dataclass(frozen=True)
class CrystalField:
    """The fitted reference of onsite blocks.

    near_angstrom, charges (n, m): see `features`.
    centre, mean: z -> (slots,), zero except for L = 0: the mean block, and the block to which the tables are added.
    tables: z -> by L, (features, slots), Hartree.
    coefficients (p,): of the potentials, the same for all elements.
    overlap: z -> (n,), coupled onsite block of S.
    spread: z -> (slots,), root mean square deviation from the centre, Hartree.
    potential: the reference of the potentials of self-consistent charges, if the model has them. All of the above then is of H
    less 1/2 (u_i + u_j) S_ij, and vectors of atoms have one component more than their blocks, u, the last.
    """

    coupling: Coupling
    near_angstrom: float
    charges: np.ndarray
    centre: ByElement
    mean: ByElement
    tables: dict[int, list[np.ndarray]]
    coefficients: np.ndarray
    overlap: ByElement
    spread: ByElement
    potential: PotentialField | None = None

    def of_atoms(self, z: int, of_z: Features) -> np.ndarray:
        """Compute what the graph holds of atoms of an element: `onsite`, followed by u if there is one, (A_z, n or n + 1)."""
        onsite = self.onsite(z, of_z)
        return onsite if self.potential is None else np.column_stack([onsite, self.potential.of_atoms(z, of_z)])

    def apart(self, z: int, of_atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coupled onsite blocks (A_z, n) and the potentials u (A_z,), zero if there are none, of such vectors."""
        n = self.coupling[z, z].size
        return of_atoms[:, :n], of_atoms[:, n] if self.potential else np.zeros(len(of_atoms))

    def together(self, z: int, of_atoms: np.ndarray) -> np.ndarray:
        """Return the coupled onsite blocks of H, (A_z, n): with u S_ii if u is apart in such vectors."""
        if self.potential is None:
            return of_atoms
        blocks, u = self.apart(z, of_atoms)
        return blocks + np.outer(u, self.overlap[z])

    def onsite(self, z: int, of_z: Features) -> np.ndarray:
        """Compute the coupled onsite blocks of atoms of an element, (A_z, n), Hartree."""
        coupling = self.coupling[z, z]
        result = np.empty((len(of_z.potentials), coupling.size))
        for L, part in coupling.slices.items():
            values = of_z.by_degree[L] @ self.tables[z][L]
            if L == 0:
                values = values + self.mean[z][: values.shape[2]]
            result[:, part] = values.reshape(len(result), part.stop - part.start)
        if of_z.potentials.shape[1]:
            result += np.outer(of_z.potentials @ self.coefficients, self.overlap[z])
        return result

    def of_graph(self, graph: Graph, gather: Callable[[np.ndarray], np.ndarray] | None = None) -> ByElement:
        """Compute z -> (A_z, n), `of_atoms` of the owned atoms of each element in their order, Hartree.

        Only some atoms are processed at a time, to bound the memory.
        gather: see `polarization.potentials`.
        """
        numbers, elements = graph.atoms.numbers[graph.owned], sorted(self.coupling.basis)
        far = potentials(graph.atoms, elements, self.charges, graph.owned, gather) if graph.atoms.pbc.any() else None
        parts: dict[int, list[np.ndarray]] = {int(z): [] for z in np.unique(numbers)}
        for first in range(0, len(numbers), ATOMS_AT_ONCE):
            some = slice(first, first + ATOMS_AT_ONCE)
            of_atoms = features(graph, elements, self.coupling.lmax, self.near_angstrom, self.charges, some, far)
            for z, part in parts.items():
                part.append(self.of_atoms(z, of_atoms.rows(numbers[some] == z)))
        return {z: np.concatenate(part) for z, part in parts.items()}

    def known_of(self, graph: Graph) -> ByElement:
        """Return the crystal field that the graph holds, or compute it if the graph holds none."""
        return self.of_graph(graph) if graph.crystal_field is None else graph.crystal_field

    def gauge(self, structure: OnsiteBlocks) -> float:
        """Compute the mu (Hartree) that minimises |H - mu S - this reference|^2 over the onsite blocks."""
        up = down = 0.0
        for z, blocks in structure.blocks.items():
            up += ((blocks - self.onsite(z, structure.features[z])) @ structure.overlap[z]).sum()
            down += len(blocks) * (structure.overlap[z] ** 2).sum()
        return float(up / down)

    def deviation(self, z: int, of_atoms: np.ndarray) -> np.ndarray:
        """Return `of_atoms` less the centre, in units of the spread by slot, (A_z, n): an input of the network."""
        onsite, u = self.apart(z, of_atoms)
        units = np.maximum(self.spread[z], SMALLEST_SPREAD_HARTREE)[self.coupling[z, z].slot]
        result = self._less_centre(z, onsite) / units
        if self.potential is None:
            return result
        deviation = (u - self.potential.centre[z]) / max(self.potential.spread[z], SMALLEST_SPREAD_HARTREE)
        return np.column_stack([result, deviation])

    def _less_centre(self, z: int, onsite: np.ndarray) -> np.ndarray:
        result = onsite.copy()
        result[:, self.coupling[z, z].zero_order] -= self.centre[z]
        return result

    def shifts(self, z: int, onsite: np.ndarray) -> np.ndarray:
        """Compute D_i S_ii^-1 of atoms of an element, (A_z, n, n) or (A_z, 2, n, n), from their coupled onsite blocks."""
        coupling, n = self.coupling[z, z], self.coupling.basis[z].n_orbitals
        S = coupling.blocks(self.overlap[z][None]).reshape(-1, n, n)[0]
        shape = (-1, n, n) if coupling.spins == 1 else (-1, coupling.spins, n, n)
        D = coupling.blocks(self._less_centre(z, onsite)).reshape(shape)
        return (0.5 * (D + D.swapaxes(-1, -2))) @ np.linalg.inv(S)


def shifted(overlap: np.ndarray, of_i: np.ndarray, of_j: np.ndarray) -> np.ndarray:
    """Compute 1/2 (D_i S_ii^-1 S_ij + S_ij S_jj^-1 D_j), (G, spins * n_i * n_j).

    overlap: blocks S_ij (G, n_i * n_j).
    of_i, of_j: `CrystalField.shifts` of the atoms i and j of each block.
    """
    spins = of_i.shape[1:-2]  # empty if both spins have one H
    S = overlap.reshape(len(overlap), *(1 for _ in spins), of_i.shape[-1], of_j.shape[-1])
    return (0.5 * (of_i @ S + S @ of_j.swapaxes(-1, -2))).reshape(len(overlap), overlap.shape[1] * math.prod(spins))


def less_shifts(operators: Operators, structure: OnsiteBlocks, crystal_field: CrystalField) -> Operators:
    """Return the operators with the shifts due to the crystal field at both ends subtracted from the blocks of bonds."""
    hamiltonian, onsite = operators.hamiltonian.copy(), operators.pairs.onsite
    shifts = {z: crystal_field.shifts(z, crystal_field.onsite(z, f)) for z, f in structure.features.items()}
    for z_i, z_j, blocks, places in operators.groups():
        far = ~onsite[blocks]
        i, j = structure.rows[operators.pairs[blocks[far], :2]].T
        bonds = places[far]
        of_spins = shifted(bonds.take(operators.overlap), shifts[z_i][i], shifts[z_j][j])
        for values, shift in zip(np.atleast_2d(hamiltonian), np.split(of_spins, operators.spins, 1)):
            bonds.put(values, bonds.take(values) - shift)
    return replace(operators, hamiltonian=hamiltonian)
