"""Fit the crystal field, together with the energy gauge of every structure.

The coefficients of the far-reaching charges are fitted first, then the tables of near neighbours. All fits are penalised
least squares; every penalty is chosen by cross-validation, as the one that gives the smallest error on structures left out
of the fit.
"""

from dataclasses import replace

import numpy as np
from ase import Atoms
from scipy.linalg import block_diag, eigh
from scipy.optimize import lsq_linear

from ..pairs import ByElement
from .charges import ChargeKernel
from .coupling import Coupling
from .crystal_field import CrystalField, OnsiteBlocks, PotentialField
from .polarization import AtomicCharges, potential_count

SIZE_PENALTY = 1e-3  # penalty on the size of tables, relative to that on their second differences
FIELD_PENALTY = 1e-2  # penalty on the coefficients of fields and their squares, each times its mean square
FOLDS = 5
SMALLEST_SCALE_HARTREE = 1e-7
JOINT_ROUNDS = 3  # rounds of choosing the penalties and solving for gauges and potentials


def fit_crystal_field(
    structures: list[OnsiteBlocks],
    coupling: Coupling,
    periodic: bool,
    near_angstrom: float,
    charges: np.ndarray,
    formal: bool = False,
) -> CrystalField:
    """Fit the crystal field by penalised least squares over all structures, jointly with the gauge of each structure.

    The gauges average to zero; for molecules all of them are zero.
    formal: whether the charges (n, m) are formal ones. If so, the coefficients of their potentials lie between -1 and 0,
    and the coefficients of the potentials of the dipoles that they induce are not positive.
    """
    n, m = charges.shape
    of_fields = {0: m * (m + 1) // 2, 1: m + n * m}
    gauges, coefficients = np.zeros(len(structures)), np.zeros(potential_count(n, m))
    if periodic:
        coefficients = _coefficients(structures, coupling, charges, formal)
        felt = [{z: f.potentials @ coefficients for z, f in s.features.items()} for s in structures]
        near = [{z: f.by_degree[0][:, 0] for z, f in s.features.items()} for s in structures]
        nothing = [{z: f.potentials[:, :0] for z, f in s.features.items()} for s in structures]
        gauges = _joint_fit(structures, coupling, near, of_fields[0], felt, nothing, (-np.inf, np.inf))
    mean: ByElement = {}
    overlap: ByElement = {}
    tables: dict[int, list[np.ndarray]] = {}
    for z in sorted({z for s in structures for z in s.blocks}):
        of = [(mu, s) for mu, s in zip(gauges, structures) if z in s.blocks]
        of_structure = np.repeat(np.arange(len(of)), [len(s.blocks[z]) for _, s in of])
        tables[z], overlap[z], mean[z] = [], of[0][1].overlap[z], np.zeros(coupling[z, z].n_slots)
        potential = [mu + s.features[z].potentials @ coefficients for mu, s in of]
        blocks = np.concatenate([s.blocks[z] - np.outer(v, s.overlap[z]) for v, (_, s) in zip(potential, of)])
        for L, part in coupling[z, z].slices.items():
            fit = _Fit(np.concatenate([s.features[z].by_degree[L] for _, s in of]), L, of_fields.get(L, 0), of_structure)
            Y = blocks[:, part].reshape(len(fit.X), -1)
            # the sum of spins and their difference have a penalty each
            of_spins = np.split(Y - Y.mean(0) if L == 0 else Y, coupling.spins, 1)
            table = np.concatenate([fit.table(part) for part in of_spins], 1)
            if L == 0:
                mean[z][: Y.shape[1]] = Y.mean(0) - fit.mean @ table
            tables[z].append(table)
    return with_spread(
        CrystalField(coupling, near_angstrom, charges, mean, mean, tables, coefficients, overlap, spread={}), structures
    )


def fit_kernel(
    structures: list[OnsiteBlocks], charges: list[np.ndarray], atoms: list[Atoms], coupling: Coupling
) -> ChargeKernel:
    """Fit the kernel K of the potentials of charges, u = K q, jointly with gauges and a table of the nearest neighbours.

    charges: q of the atoms of each structure, (A,), of DFT. The table is that of `_coefficients`, for the same reason.
    """
    elements, felt, tables = sorted(coupling.basis), [], []
    for structure, q, of_structure in zip(structures, charges, atoms):
        V, numbers = AtomicCharges(of_structure)(q), structure.numbers
        columns = np.column_stack([V, *(np.where(numbers == z, q, 0.0) for z in elements)])
        felt.append({z: columns[numbers == z] for z in structure.blocks})
        tables.append(structure.first_shell)
    nothing = [{z: np.zeros(len(v)) for z, v in of.items()} for of in felt]
    a, *hardness = _joint_fit(structures, coupling, tables, 0, nothing, felt, (-np.inf, np.inf)).tolist()
    return ChargeKernel(dict(zip(elements, hardness)), a)


def with_potentials(
    rest: CrystalField,
    whole: CrystalField,
    kernel: ChargeKernel,
    structures: list[OnsiteBlocks],
    potentials: list[np.ndarray],
) -> CrystalField:
    """Return the crystal field of H less the potentials of charges, with that of the potentials.

    rest, whole: fitted to the blocks without and with the potentials. Their difference along S is the reference of u,
    u_i = S (D_whole - D_rest) / |S|^2 of the onsite blocks D, which is linear in the features as they are.
    potentials: u of the atoms of each structure, (A,).
    """
    mean, tables = {}, {}
    for z, S in rest.overlap.items():
        part = rest.coupling[z, z].slices[0]
        along = S[part] / (S[part] @ S[part])
        mean[z] = float((whole.mean[z] - rest.mean[z])[: len(along)] @ along)
        tables[z] = (whole.tables[z][0] - rest.tables[z][0]) @ along
    field = PotentialField(kernel, mean, tables, whole.coefficients - rest.coefficients)
    centre, spread, scale = {}, {}, {}
    for z in mean:
        found = np.concatenate([field.of_atoms(z, s.features[z]) for s in structures if z in s.features])
        given = np.concatenate([u[s.numbers == z] for s, u in zip(structures, potentials)])
        centre[z], spread[z] = float(found.mean()), float(found.std())
        scale[z] = float(np.sqrt(((given - found) ** 2).mean())) + SMALLEST_SCALE_HARTREE
    return replace(rest, potential=replace(field, centre=centre, spread=spread, scale=scale))


def mean_blocks(field: CrystalField, structures: list[OnsiteBlocks]) -> CrystalField:
    """Reduce a crystal field to the mean block of each element, without neighbours and potentials."""
    flat = {z: [np.zeros_like(table) for table in tables] for z, tables in field.tables.items()}
    coefficients = np.zeros_like(field.coefficients)
    return with_spread(replace(field, mean=field.centre, tables=flat, coefficients=coefficients), structures)


def with_spread(field: CrystalField, structures: list[OnsiteBlocks]) -> CrystalField:
    """Return the field with its centre and spread computed over the atoms of structures."""
    centre, spread = {}, {}
    for z in field.tables:
        coupling = field.coupling[z, z]
        found = np.concatenate([field.onsite(z, s.features[z]) for s in structures if z in s.blocks])
        centre[z] = found.mean(0)[coupling.zero_order] * (coupling.slot_degree == 0)
        deviation = found.copy()
        deviation[:, coupling.zero_order] -= centre[z]
        power = np.bincount(coupling.slot, (deviation**2).mean(0), coupling.n_slots)
        spread[z] = np.sqrt(power / (2 * coupling.slot_degree + 1))
    return replace(field, centre=centre, spread=spread)


def _coefficients(structures: list[OnsiteBlocks], coupling: Coupling, charges: np.ndarray, formal: bool) -> np.ndarray:
    """Fit the coefficients of the potentials, (p,), together with a table of the nearest neighbours alone.

    In a small cell every image moves with its atom. A table over farther neighbours would then represent the effect of the
    far charges, and the coefficients of their potentials would be undetermined.
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
    # charges lie between zero and the formal ones; dipoles point along the field
    bounds = (np.r_[np.full(m, -1.0), np.full(n * m, -np.inf)], 0.0) if formal else (-np.inf, np.inf)
    return _joint_fit(structures, coupling, tables, squares, nothing, felt, bounds)


def _joint_fit(
    structures: list[OnsiteBlocks],
    coupling: Coupling,
    tables: list[ByElement],
    of_fields: int,
    known: list[ByElement],
    felt: list[ByElement],
    bounds: tuple[float | np.ndarray, float | np.ndarray],
) -> np.ndarray:
    """Fit the gauges of the structures, Hartree, or, if there are potentials to fit, their coefficients.

    For each structure, z -> values by atom: tables (A_z, features), known (A_z,) in Hartree, felt (A_z, p). With T the
    functions of the tables, which are eliminated, and P = T (T^T T + penalty)^-1 T^T, the joint fit minimises |(1 - P)(Y -
    (known + mu + felt a) S)|^2 over the gauges mu and the coefficients a, within the bounds of a. Only L = 0 takes part,
    because the S block of an isolated atom is spherical.
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
            # the penalty is chosen on the residual of the potentials, less its mean over each structure, which the gauge takes
            left_by_felt = y - SS * (D[:, n:] @ found[n:])[:, None]
            means = D[:, :n].T @ left_by_felt / np.maximum(D[:, :n].sum(0), 1)[:, None]
            penalty = fit.penalty(left_by_felt - D[:, :n] @ means)
            rest = lambda v, fit=fit, penalty=penalty: (v - v.mean(0)) - fit.X @ fit.table(v - v.mean(0), penalty)  # noqa: E731
            normal += SS * D.T @ rest(D)
            right += (D.T @ rest(y))[:, 0]
        # the solutions differ by a common shift of the gauges; this term selects the one whose gauges have mean zero
        normal[:n, :n] += np.trace(normal[:n, :n]) / n**2
        d, U = np.linalg.eigh((normal + normal.T) / 2)
        kept = d > 1e-10 * d[-1]
        root, target = np.sqrt(d[kept])[:, None] * U.T[kept], (U.T[kept] @ right) / np.sqrt(d[kept])
        found = lsq_linear(root, target, (lower, upper), tol=1e-14).x
        if not p:
            break
    return found[n:] if p else found


class _Fit:
    """Penalised least squares of one L: min |Y - X T|^2 + a tr(T^T P T), X centred for L = 0.

    P penalises second differences and size.
    of_atoms (A, 2L+1, features): the last `fields` features are penalised by size alone.
    structures (A,): the structure to which each atom belongs.
    The penalty a is chosen by cross-validation: tables fitted to all structures but one have the least squared error on the
    one left out, summed over all structures. Whole structures are left out because atoms of one structure are not
    independent samples, and the table is meant for structures that were not seen. With N V = P V d and V^T P V = 1, every a
    costs only a few sums.
    """

    def __init__(self, of_atoms: np.ndarray, L: int, fields: int, structures: np.ndarray) -> None:
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
        if len(np.unique(structures)) == 1:  # a single structure is divided: every FOLDS-th atom belongs to one fold
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
                # the mean over a structure belongs to its gauge
                left[k] += ((rest - rest.mean(0) if self.centred else rest) ** 2).sum()
        return float(self.penalties[np.argmin(left)])

    def table(self, Y: np.ndarray, penalty: float | None = None) -> np.ndarray:
        """Return the fitted table, (features, columns of Y)."""
        penalty = self.penalty(Y) if penalty is None else penalty
        return self.V @ ((self.V.T @ (self.X.T @ Y)) / (self.d + penalty)[:, None])
