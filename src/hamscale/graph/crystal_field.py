"""Onsite blocks from the neighbours: the linear reference, and with it the energy gauge of a structure.

The block of an atom alone is spherical. In a crystal, potentials of neighbours superpose; what a sum of spherical potentials adds to
an onsite block is, in coupled form and exactly linear in the neighbours,

    c_{L M, slot}(i) = mean_slot delta_{L 0} + sum_{j, R} F^{z_i z_j}_slot(r) Y_LM(r / |r|),    r = r_j + R - r_i

F are tables over distance (linear elements that fade to zero at the cutoff), fitted by least squares with a penalty on their second
differences. In a periodic structure the charges of ions reach further than any cutoff, and each ion polarizes the others. So for L = 0
and L = 1 the sum is over near neighbours alone, and beside it stands the potential V of polarization.py, which adds V_i S_ii,

    V_i = sum_f a_f phi_f(i),    -1 <= a_f <= 0 with formal charges:

the energy of an electron in it, so the same coefficients a for all atoms and slots, and charges no larger than formal ones. Its fields and
their squares, which are bounded at any wavelength, have a coefficient for every slot as the neighbours have.
What a structure's potential does to an atom it does to its bonds, half from either end (R. S. Mulliken, J. Chem. Phys. 17, 1155 (1949)):

    H_ij <- 1/2 (D_i S_ii^-1 S_ij + S_ij S_jj^-1 D_j),    D_i = onsite block less the mean of its element

What charge transfer and screening do beyond that is left to the network.
Reference: the crystal-field integrals of tight binding, e.g. J. C. Slater, G. F. Koster, Phys. Rev. 94, 1498 (1954), sec. II.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp
from ase import Atoms
from scipy.linalg import block_diag, eigh
from scipy.optimize import lsq_linear

from ..angular import real_spherical_harmonics
from ..operators import Operators, is_onsite, rows_of_elements
from .coupling import Coupling, coupled_groups
from .polarization import neutral_charges, potentials

SPACING_ANGSTROM = 0.25
ATOMS_AT_ONCE = 2000
SIZE_PENALTY = 1e-3  # of tables, beside that of their second differences
FIELD_PENALTY = 1e-2  # of the coefficients of fields and their squares, each times its mean square
FOLDS = 5
JOINT_ROUNDS = 3  # of choosing penalties and solving for gauges and potentials
SMALLEST_SPREAD_HARTREE = 1e-3  # what varies less in the training structures is not magnified


def densities(graph, elements: list[int], lmax: int, atoms: slice = slice(None), reach_angstrom: float = np.inf) -> np.ndarray:
    """sum_j f_k(r_ij) Y_LM(r_ij), element by element, (owned atoms, (lmax+1)^2, elements * knots): what F is linear in.

    graph: a Graph, or what has its atoms, edges, vectors, owned, cutoff_angstrom. atoms: some of its owned atoms. reach_angstrom: a
    cutoff below that of the graph.
    """
    owned, cutoff = graph.owned[atoms], min(graph.cutoff_angstrom, reach_angstrom)
    first, last = np.searchsorted(graph.edges[:, 0], [owned[0], owned[-1] + 1]) if len(owned) else (0, 0)
    edges, vectors = graph.edges[first:last], graph.vectors[first:last]
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
    """What is assumed of the potentials in periodic structures.

    near_angstrom: neighbours further away act by their charges; charges: z -> formal charge, or empty: any charges that make the training
    structures neutral; far: whether charges act at all.
    """

    near_angstrom: float = 4.5
    charges: dict = field(default_factory=dict)
    far: bool = True

    def distributions(self, elements: list[int], structures: list[Atoms]) -> np.ndarray:
        """Charges (n, m) of the elements whose potentials are taken: formal ones, or all that make the structures neutral."""
        if not (self.far and all(atoms.pbc.all() for atoms in structures)):
            return np.empty((len(elements), 0))
        counts = np.array([[(atoms.numbers == z).sum() for z in elements] for atoms in structures])
        if not self.charges:
            return neutral_charges(counts)
        formal = np.array([self.charges[z] for z in elements])
        if (left := np.abs(counts @ formal).max()) > 1e-6:
            raise ValueError(
                f"graph.charges leave a structure of the training set with a charge of {left:g}, expected neutral ones: the potential of a "
                "charged cell has no meaning. Correct them, or leave them out."
            )
        return formal[:, None]


@dataclass
class Features:
    """What the onsite blocks of some atoms are linear in: by degree L, (A, 2L+1, features), and potentials, (A, p), atomic units."""

    by_degree: list[np.ndarray]
    potentials: np.ndarray

    def rows(self, rows) -> "Features":
        return Features([f[rows] for f in self.by_degree], self.potentials[rows])


def features(
    graph, elements: list[int], lmax: int, near_angstrom: float, charges, atoms: slice = slice(None), far=None
) -> Features:
    """Compute the features of owned atoms of a graph.

    charges (n, m): `Ions.distributions`. Of a periodic structure L = 0 and 1 have near neighbours, and squares of fields and fields for
    what is not near. far: `potentials` of all atoms, if they are known already.
    """
    whole = _by_degree(densities(graph, elements, lmax, atoms))
    owned = graph.owned[atoms]
    if not graph.atoms.pbc.all():
        return Features(whole, np.empty((len(owned), 0)))
    felt, squares, fields = potentials(graph.atoms, elements, charges) if far is None else far
    near = _by_degree(densities(graph, elements, min(1, lmax), atoms, near_angstrom))
    near = [np.concatenate([n, f[owned]], 2) for n, f in zip(near, (squares[:, None], fields))]
    return Features(near + whole[2:], felt[owned])


def _by_degree(values: np.ndarray) -> list[np.ndarray]:
    return [values[:, L * L : (L + 1) ** 2] for L in range(round(values.shape[1] ** 0.5))]


@dataclass
class OnsiteBlocks:
    """Onsite blocks of one structure, coupled: blocks z -> (A_z, n) of H, overlap z -> (n,) of S (the same for all atoms of an element),
    features z -> Features, first_shell z -> (A_z, features) of L = 0 with the nearest neighbours alone. Atoms of an element ascend;
    rows (A,): where each atom stands. Hartree."""

    blocks: dict
    overlap: dict
    features: dict
    first_shell: dict
    rows: np.ndarray


def onsite_blocks(
    operators: Operators,
    coupling: Coupling,
    graph,
    near_angstrom: float,
    charges: np.ndarray,
    shell_angstrom: float | None = None,
) -> OnsiteBlocks:
    """Collect what the fit takes of a structure; graph: its edges within the cutoff. shell_angstrom: reach of the nearest neighbours,
    needed where charges have potentials."""
    numbers, elements = operators.atoms.numbers, sorted(coupling.basis)
    of_atoms = features(graph, elements, coupling.lmax, near_angstrom, charges)
    shell = densities(graph, elements, 0, reach_angstrom=shell_angstrom or near_angstrom)[:, 0]
    result = OnsiteBlocks({}, {}, {}, {}, rows_of_elements(numbers))
    for z in np.unique(numbers).tolist():
        atoms = np.flatnonzero(numbers == z)
        result.features[z], result.blocks[z] = of_atoms.rows(atoms), np.zeros((len(atoms), coupling[z, z].size))
        result.first_shell[z] = shell[atoms]
    for z, _, index, onsite, coupled, _ in coupled_groups(operators, coupling):
        if onsite:
            result.blocks[z][result.rows[operators.pairs[index, 0]]] = coupled
    for z, _, _, onsite, coupled, _ in coupled_groups(replace(operators, hamiltonian=operators.overlap), coupling):
        if onsite:
            result.overlap[z] = coupled[0]
    return result


@dataclass
class CrystalField:
    """The fitted reference of onsite blocks.

    near_angstrom, charges (n, m): see `features`. centre, mean: z -> (slots,), zero but for L = 0: the mean block, and what the tables
    start from. tables: z -> by L, (features, slots), Hartree. coefficients (p,): of the potentials, the same for all elements. overlap:
    z -> (n,), coupled onsite block of S. spread: z -> (slots,), root mean square of what is added to the centre, Hartree.
    """

    coupling: Coupling
    near_angstrom: float = Ions.near_angstrom
    charges: np.ndarray | None = None
    centre: dict = field(default_factory=dict)
    mean: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)
    coefficients: np.ndarray | None = None
    overlap: dict = field(default_factory=dict)
    spread: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.charges is None:
            self.charges = np.empty((len(self.coupling.basis), 0))
        if self.coefficients is None:
            self.coefficients = np.zeros(potential_count(*self.charges.shape))

    def onsite(self, z: int, of_z: Features) -> np.ndarray:
        """Coupled onsite blocks of atoms of an element, (A_z, n), Hartree."""
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

    def of_graph(self, graph) -> dict[int, np.ndarray]:
        """z -> (A_z, n): coupled onsite blocks of the owned atoms of each element, in their order, Hartree. Some atoms at a time."""
        numbers, elements = graph.atoms.numbers[graph.owned], sorted(self.coupling.basis)
        far = potentials(graph.atoms, elements, self.charges) if graph.atoms.pbc.all() else None
        parts = {int(z): [] for z in np.unique(numbers)}
        for first in range(0, len(numbers), ATOMS_AT_ONCE):
            some = slice(first, first + ATOMS_AT_ONCE)
            of_atoms = features(graph, elements, self.coupling.lmax, self.near_angstrom, self.charges, some, far)
            for z, part in parts.items():
                part.append(self.onsite(z, of_atoms.rows(numbers[some] == z)))
        return {z: np.concatenate(part) for z, part in parts.items()}

    def known_of(self, graph) -> dict[int, np.ndarray]:
        """What the graph has of it, or else `of_graph`."""
        return graph.crystal_field or self.of_graph(graph)

    def gauge(self, structure: OnsiteBlocks) -> float:
        """mu (Hartree) that minimises |H - mu S - this reference|^2 over the onsite blocks."""
        up = down = 0.0
        for z, blocks in structure.blocks.items():
            up += ((blocks - self.onsite(z, structure.features[z])) @ structure.overlap[z]).sum()
            down += len(blocks) * (structure.overlap[z] ** 2).sum()
        return float(up / down)

    def deviation(self, z: int, onsite: np.ndarray) -> np.ndarray:
        """Coupled onsite blocks less the centre, in units of the spread by slot, (A_z, n): what the network is told."""
        return self._less_centre(z, onsite) / np.maximum(self.spread[z], SMALLEST_SPREAD_HARTREE)[self.coupling[z, z].slot]

    def _less_centre(self, z: int, onsite: np.ndarray) -> np.ndarray:
        result = onsite.copy()
        result[:, self.coupling[z, z].zero_order] -= self.centre[z]
        return result

    def shifts(self, z: int, onsite: np.ndarray) -> np.ndarray:
        """D_i S_ii^-1 of atoms of an element, (A_z, n, n), from their coupled onsite blocks."""
        coupling, n = self.coupling[z, z], self.coupling.basis[z].n_orbitals
        S = coupling.blocks(self.overlap[z][None]).reshape(n, n)
        D = coupling.blocks(self._less_centre(z, onsite)).reshape(-1, n, n)
        return (0.5 * (D + D.transpose(0, 2, 1))) @ np.linalg.inv(S)


def shifted(overlap: np.ndarray, of_i: np.ndarray, of_j: np.ndarray) -> np.ndarray:
    """1/2 (D_i S_ii^-1 S_ij + S_ij S_jj^-1 D_j), (G, n_i * n_j), of blocks S_ij (G, n_i * n_j) and `shifts` of their atoms."""
    S = overlap.reshape(-1, of_i.shape[1], of_j.shape[1])
    return (0.5 * (of_i @ S + S @ of_j.transpose(0, 2, 1))).reshape(overlap.shape)


def less_shifts(operators: Operators, structure: OnsiteBlocks, crystal_field: CrystalField) -> Operators:
    """The same with blocks of bonds less what the crystal field at their two atoms makes of S."""
    hamiltonian, onsite = operators.hamiltonian.copy(), is_onsite(operators.pairs)
    shifts = {z: crystal_field.shifts(z, crystal_field.onsite(z, f)) for z, f in structure.features.items()}
    for z_i, z_j, blocks, index in operators.groups():
        far = ~onsite[blocks]
        i, j = structure.rows[operators.pairs[blocks[far], :2]].T
        hamiltonian[index[far]] -= shifted(operators.overlap[index[far]], shifts[z_i][i], shifts[z_j][j])
    return replace(operators, hamiltonian=hamiltonian)


def fit_crystal_field(
    structures: list[OnsiteBlocks],
    coupling: Coupling,
    periodic: bool,
    near_angstrom: float,
    charges: np.ndarray,
    formal: bool = False,
) -> CrystalField:
    """Fit by penalised least squares over all structures, jointly with the gauge of each; gauges average to zero, of molecules all are.

    formal: whether the charges (n, m) are formal ones; their potentials then have coefficients between -1 and 0, and those of the
    dipoles they induce are not positive.
    """
    result = CrystalField(coupling, near_angstrom, charges)
    n, m = charges.shape
    of_fields = {0: m * (m + 1) // 2, 1: m + n * m}
    gauges = np.zeros(len(structures))
    if periodic:
        result.coefficients = _coefficients(structures, coupling, charges, formal)
        felt = [{z: f.potentials @ result.coefficients for z, f in s.features.items()} for s in structures]
        near = [{z: f.by_degree[0][:, 0] for z, f in s.features.items()} for s in structures]
        nothing = [{z: f.potentials[:, :0] for z, f in s.features.items()} for s in structures]
        gauges = _joint_fit(structures, coupling, near, of_fields[0], felt, nothing, (-np.inf, np.inf))
    for z in sorted({z for s in structures for z in s.blocks}):
        of = [(mu, s) for mu, s in zip(gauges, structures) if z in s.blocks]
        of_structure = np.repeat(np.arange(len(of)), [len(s.blocks[z]) for _, s in of])
        result.tables[z], result.overlap[z] = [], of[0][1].overlap[z]
        potential = [mu + s.features[z].potentials @ result.coefficients for mu, s in of]
        blocks = np.concatenate([s.blocks[z] - np.outer(v, s.overlap[z]) for v, (_, s) in zip(potential, of)])
        centre, mean = np.zeros((2, coupling[z, z].n_slots))
        for L, part in coupling[z, z].slices.items():
            fit = _Fit(np.concatenate([s.features[z].by_degree[L] for _, s in of]), L, of_fields.get(L, 0), of_structure)
            Y = blocks[:, part].reshape(len(fit.X), -1)
            table = fit.table(Y - Y.mean(0) if L == 0 else Y)
            if L == 0:
                mean[: Y.shape[1]] = Y.mean(0) - fit.mean @ table
            result.tables[z].append(table)
        result.centre[z], result.mean[z] = centre, mean
        found = np.concatenate([result.onsite(z, s.features[z]) for _, s in of])
        centre[:] = found.mean(0)[coupling[z, z].zero_order] * (coupling[z, z].slot_degree == 0)
        power = np.bincount(coupling[z, z].slot, (result._less_centre(z, found) ** 2).mean(0), coupling[z, z].n_slots)
        result.spread[z] = np.sqrt(power / (2 * coupling[z, z].slot_degree + 1))
    return result


def potential_count(n: int, m: int) -> int:
    """How many potentials there are of m charge distributions over n elements: theirs, and of the dipoles of each element in each field."""
    return m + n * m


def _coefficients(structures: list[OnsiteBlocks], coupling: Coupling, charges: np.ndarray, formal: bool) -> np.ndarray:
    """Coefficients of the potentials, (p,), fitted beside a table of the nearest neighbours alone.

    In a small cell every image moves with its atom: a table over further neighbours would take the place of far charges there, and
    their coefficients could be anything.
    """
    n, m = charges.shape
    if not m:
        return np.zeros(0)
    squares = m * (m + 1) // 2
    tables = [
        {
            z: np.concatenate([s.first_shell[z], f.by_degree[0][:, 0, f.by_degree[0].shape[2] - squares :]], 1)
            for z, f in s.features.items()
        }
        for s in structures
    ]
    felt = [{z: f.potentials for z, f in s.features.items()} for s in structures]
    nothing = [{z: np.zeros(len(v)) for z, v in of.items()} for of in felt]
    # charges between none and formal ones; dipoles along the field
    bounds = (np.r_[np.full(m, -1.0), np.full(n * m, -np.inf)], 0.0) if formal else (-np.inf, np.inf)
    return _joint_fit(structures, coupling, tables, squares, nothing, felt, bounds)


def _joint_fit(structures, coupling: Coupling, tables, of_fields: int, known, felt, bounds) -> np.ndarray:
    """Gauges of the structures, Hartree, or, where potentials are felt, their coefficients.

    By structure, z -> values by atom: tables (A_z, features), known (A_z,) in Hartree, felt (A_z, p). With the tables' functions T
    eliminated, P = T (T^T T + penalty)^-1 T^T, the joint fit minimises |(1 - P)(Y - (known + mu + felt a) S)|^2 over the gauges mu and the
    coefficients a, within the bounds of a. Only L = 0 takes part: S of an atom alone is spherical.
    """
    n, p = len(structures), next(iter(felt[0].values())).shape[1]
    fits = []
    for z in sorted({z for s in structures for z in s.blocks}):
        of = [k for k, s in enumerate(structures) if z in s.blocks]
        part = coupling[z, z].slices[0]
        S = structures[of[0]].overlap[z][part]
        y = np.concatenate([structures[k].blocks[z][:, part] @ S - (S @ S) * known[k][z] for k in of])[:, None]
        of_structure = np.repeat(of, [len(structures[k].blocks[z]) for k in of])
        D = np.zeros((len(y), n + p))
        D[np.arange(len(y)), of_structure] = 1
        D[:, n:] = np.concatenate([felt[k][z] for k in of])
        fit = _Fit(np.concatenate([tables[k][z] for k in of])[:, None], 0, of_fields, of_structure)
        fits.append((fit, S @ S, y, D))
    lower, upper = np.full(n + p, -np.inf), np.full(n + p, np.inf)
    lower[n:], upper[n:] = bounds
    found = np.zeros(n + p)
    for _ in range(JOINT_ROUNDS):
        normal, right = np.zeros((n + p, n + p)), np.zeros(n + p)
        for fit, SS, y, D in fits:
            # the penalty is chosen on what potentials leave, less what is alike in all atoms of a structure: that is the gauge's
            left_by_felt = y - SS * (D[:, n:] @ found[n:])[:, None]
            means = D[:, :n].T @ left_by_felt / np.maximum(D[:, :n].sum(0), 1)[:, None]
            penalty = fit.penalty(left_by_felt - D[:, :n] @ means)
            rest = lambda v, fit=fit, penalty=penalty: (v - v.mean(0)) - fit.X @ fit.table(v - v.mean(0), penalty)  # noqa: E731
            normal += SS * D.T @ rest(D)
            right += (D.T @ rest(y))[:, 0]
        # of all solutions, which differ by a common shift of the gauges, the one of mean zero
        normal[:n, :n] += np.trace(normal[:n, :n]) / n**2
        d, U = np.linalg.eigh((normal + normal.T) / 2)
        kept = d > 1e-10 * d[-1]
        root, target = np.sqrt(d[kept])[:, None] * U.T[kept], (U.T[kept] @ right) / np.sqrt(d[kept])
        found = lsq_linear(root, target, (lower, upper), tol=1e-14).x
        if not p:
            break
    return found[n:] if p else found


class _Fit:
    """Penalised least squares of one L: min |Y - X T|^2 + a tr(T^T P T), P of second differences and of size, X centred for L = 0.

    of_atoms (A, 2L+1, features), of which the last `fields` are penalised by size alone; structures (A,): which structure each atom is of. a is
    the one whose tables, fitted to all structures but one, leave least on that one, summed over all of them: atoms of one structure
    are no independent samples, and a table is wanted for structures that were not seen. With N V = P V d and V^T P V = 1 every a
    costs a few sums.
    """

    def __init__(self, of_atoms: np.ndarray, L: int, fields: int, structures: np.ndarray):
        n = of_atoms.shape[2]
        X = of_atoms.reshape(-1, n)
        self.mean = X.mean(0) if L == 0 else np.zeros(n)
        self.X, self.centred = X - self.mean, L == 0
        bend = np.diff(np.eye(n - fields), n=2, axis=0)
        size = FIELD_PENALTY * np.maximum((self.X[:, n - fields :] ** 2).mean(0), 1e-12)
        self.P = block_diag(bend.T @ bend + SIZE_PENALTY * np.eye(n - fields), np.diag(size))
        self.d, self.V = self._modes(self.X)
        self.penalties = max(self.d.max(), 1e-12) * np.logspace(-8, 1, 19)
        structures = np.repeat(structures, 2 * L + 1)
        if len(np.unique(structures)) == 1:  # every FOLDS-th atom of it stands for a structure
            structures = np.arange(len(X)) // (2 * L + 1) % FOLDS
        self.held_out = [structures == k for k in np.unique(structures)]

    def _modes(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d, V = eigh(X.T @ X, self.P)
        return np.maximum(d, 0), V

    def penalty(self, Y: np.ndarray) -> float:
        left = np.zeros(len(self.penalties))
        for out in self.held_out:
            d, V = self._modes(self.X[~out])
            c, known = V.T @ (self.X[~out].T @ Y[~out]), self.X[out] @ V
            for k, a in enumerate(self.penalties):
                rest = Y[out] - known @ (c / (d + a)[:, None])
                # what is alike in all atoms of a structure is its gauge's
                left[k] += ((rest - rest.mean(0) if self.centred else rest) ** 2).sum()
        return float(self.penalties[np.argmin(left)])

    def table(self, Y: np.ndarray, penalty: float | None = None) -> np.ndarray:
        """(features, columns of Y)."""
        penalty = self.penalty(Y) if penalty is None else penalty
        return self.V @ ((self.V.T @ (self.X.T @ Y)) / (self.d + penalty)[:, None])
