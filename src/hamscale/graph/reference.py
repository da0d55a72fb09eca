"""What the network need not learn: energy gauge, reference, scales. Fitted to training structures, then data.

gauge      H and H + mu S are the same physics in a periodic cell. mu of a structure brings its onsite blocks as near as can be
           to their reference; mu S is taken from all blocks.
reference  offsite: the least-squares mean of the M = 0 components in the edge frame by pair of elements and distance
           (linear elements) - a Slater-Koster Hamiltonian; onsite: a linear crystal field (crystal_field.py).
scale      root mean square of what is left, by pair of elements, slot and distance (interpolated in the logarithm).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from ase import Atoms

from ..angular import real_spherical_harmonics
from ..basis import Basis
from ..files import create_h5, open_h5
from ..operators import Operators, read_basis, write_basis
from .coupling import Coupling, coupled_groups
from .crystal_field import CrystalField, Ions, OnsiteBlocks, less_shifts, onsite_blocks
from .crystal_field_fit import fit_crystal_field
from .graph import structure_graph
from .neighbours import edges_within

SCHEMA = "reference/5"
SPACING_ANGSTROM = 0.25
SMALLEST_SCALE_HARTREE = 1e-7
FIRST_SHELL = 1.4  # nearest neighbours are within this times their mean distance: in rock salt the second shell begins at 2^0.5


@dataclass
class Reference:
    """Fitted tables, one row per knot k at k * SPACING_ANGSTROM.

    two_centre[z_i, z_j], scale[z_i, z_j]: (knots, slots), Hartree; onsite_scale[z]: (slots,), Hartree. crystal_field: reference of
    the onsite blocks, and what the gauge is measured against.
    reach_angstrom: the longest distance of a block in the data; from there the reference falls to zero within one knot.
    longest_cell_angstrom: the longest cell vector of the training structures; zero for molecules.
    """

    basis: Basis
    periodic: bool
    cutoff_angstrom: float
    reach_angstrom: float
    longest_cell_angstrom: float = 0.0
    two_centre: dict = field(default_factory=dict)
    scale: dict = field(default_factory=dict)
    onsite_scale: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.coupling = Coupling(self.basis)
        self.crystal_field = CrystalField(self.coupling)

    def onsite_blocks(self, operators: Operators, shell_angstrom: float | None = None) -> OnsiteBlocks:
        """Onsite blocks of a structure, with what the crystal field is a function of."""
        field, graph = self.crystal_field, structure_graph(operators.atoms, self.basis, self.cutoff_angstrom)
        return onsite_blocks(operators, self.coupling, graph, field.near_angstrom, field.charges, shell_angstrom)

    def gauge(self, operators: Operators) -> float:
        """mu (Hartree) of a structure, zero where the structure is not periodic: there energies have a zero of their own."""
        if not self.periodic:
            return 0.0
        return self.crystal_field.gauge(self.onsite_blocks(operators))

    def remainder(self, operators: Operators, of_atoms: OnsiteBlocks) -> tuple[Operators, Coupling, float]:
        """What `coupled_groups` takes to give H - mu S less what the crystal field does to bonds."""
        gauge = self.crystal_field.gauge(of_atoms) if self.periodic else 0.0
        return less_shifts(operators, of_atoms, self.crystal_field), self.coupling, gauge

    def offsite(self, z_i: int, z_j: int, distances: np.ndarray) -> np.ndarray:
        """Two-centre reference, M = 0 components in the edge frame, (G, slots), Hartree."""
        self._known(z_i, z_j)
        return _interpolate(self.two_centre[z_i, z_j], distances)

    def offsite_scale(self, z_i: int, z_j: int, distances: np.ndarray) -> np.ndarray:
        """Root mean square of the remainder by slot, (G, slots), Hartree."""
        self._known(z_i, z_j)
        return np.exp(_interpolate(np.log(self.scale[z_i, z_j]), distances))

    def _known(self, z_i, z_j):
        if (z_i, z_j) not in self.two_centre:
            known = ", ".join(f"{self.basis[a].element}-{self.basis[b].element}" for a, b in self.two_centre)
            raise ValueError(f"no training structure held the pair of elements {z_i}, {z_j}; known pairs: {known}.")


def _hat(distances: np.ndarray, n_knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Left knot and fraction towards the next one."""
    x = np.minimum(distances / SPACING_ANGSTROM, n_knots - 1.000001)
    left = x.astype(np.int64)
    return left, x - left


def _interpolate(table: np.ndarray, distances: np.ndarray) -> np.ndarray:
    left, fraction = _hat(distances, len(table))
    return table[left] * (1 - fraction)[:, None] + table[left + 1] * fraction[:, None]


def fit_reference(
    structures: Iterable[Operators],
    cutoff_angstrom,
    auto_threshold_hartree: float = 1e-4,
    ions: Ions = Ions(),  # noqa: B008
) -> Reference:
    """Fit gauge, reference and scales to the training structures (iterated over several times, one in memory at a time).

    cutoff_angstrom: a number, or "auto": the longest distance of a block with an element of H above the threshold.
    Raises ValueError if bases differ or the cutoff is larger than H reaches in the data.
    """
    reference, atoms, shell = _survey(structures, cutoff_angstrom, auto_threshold_hartree)
    field = reference.crystal_field
    field.near_angstrom, field.charges = ions.near_angstrom, ions.distributions(sorted(reference.basis), atoms)
    of_structures = [reference.onsite_blocks(operators, shell) for operators in structures]
    reference.crystal_field = fit_crystal_field(
        of_structures, reference.coupling, reference.periodic, field.near_angstrom, field.charges, bool(ions.charges)
    )
    _fit_two_centre(reference, structures, of_structures)
    _fit_scale(reference, structures, of_structures)
    return reference


def _survey(structures, cutoff, threshold) -> tuple[Reference, list[Atoms], float]:
    """Basis, reach, cutoff and longest cell of the training structures; their atoms; the reach of nearest neighbours, Angstrom."""
    basis, reach, above, atoms, nearest = None, 0.0, 0.0, [], []
    for operators in structures:
        if basis and (difference := basis.difference(operators.basis)):
            raise ValueError(f"training structures were calculated in different bases: {difference}. Run them again with one.")
        basis = Basis((dict(basis or {}) | dict(operators.basis)).values())
        distances = operators.pairs.distances
        reach = max(reach, distances.max())
        if cutoff == "auto":
            above = max(above, distances[_block_maximum(operators) > threshold].max(initial=0.0) + 1e-6)
        atoms.append(operators.atoms)
        of_atom = np.full(len(operators.atoms), np.inf)
        np.minimum.at(of_atom, operators.pairs[:, 0], np.where(operators.pairs.onsite, np.inf, distances))
        nearest.append(of_atom[np.isfinite(of_atom)])
    if basis is None:
        raise ValueError("no training structure was given; expected at least one file of schema operators/1.")
    periodic = [bool(a.pbc.all()) for a in atoms]
    if len(set(periodic)) > 1:
        raise ValueError(
            "training structures are periodic and not periodic; expected one kind: their energies have different zeros."
        )
    longest = max(a.cell.lengths().max() for a in atoms) if periodic[0] else 0.0
    reference = Reference(basis, periodic[0], float(above if cutoff == "auto" else cutoff), float(reach), float(longest))
    return reference, atoms, FIRST_SHELL * float(np.concatenate(nearest).mean())


def outside_sums(operators: Operators, cutoff_angstrom: float) -> tuple[float, float]:
    """Sum of |H| over all elements of the pairs beyond the cutoff, and over all, Hartree."""
    sums = np.add.reduceat(np.abs(operators.hamiltonian), operators.offsets[:-1])
    far = operators.pairs.distances >= cutoff_angstrom
    return float(sums[far].sum()), float(sums.sum())


def _block_maximum(operators: Operators) -> np.ndarray:
    return np.maximum.reduceat(np.abs(operators.hamiltonian), operators.offsets[:-1])


def _fit_two_centre(reference: Reference, structures, of_structures):
    n_knots = int(reference.reach_angstrom / SPACING_ANGSTROM) + 2
    normal, right = {}, {}
    outside = total = 0.0
    for operators, of_atoms in zip(structures, of_structures):
        _check_reach(reference, operators)
        far, everything = outside_sums(operators, reference.cutoff_angstrom)
        outside, total = outside + far, total + everything
        for z_i, z_j, _, onsite, coupled, vectors in coupled_groups(*reference.remainder(operators, of_atoms)):
            coupling = reference.coupling[z_i, z_j]
            key = (z_i, z_j)
            if onsite:
                continue
            axial = axial_components(coupling, coupled, vectors)
            left, f = _hat(np.linalg.norm(vectors, axis=1), n_knots)
            N = normal.setdefault(key, np.zeros((n_knots, n_knots)))
            b = right.setdefault(key, np.zeros((n_knots, coupling.n_slots)))
            for r, c, w in ((0, 0, (1 - f) ** 2), (0, 1, f * (1 - f)), (1, 0, f * (1 - f)), (1, 1, f**2)):
                np.add.at(N, (left + r, left + c), w)
            np.add.at(b, left, (1 - f)[:, None] * axial)
            np.add.at(b, left + 1, f[:, None] * axial)
    # a weak penalty on kinks carries the table over distances no training edge has
    bend = np.diff(np.eye(n_knots), n=2, axis=0)
    for key, N in normal.items():
        table = np.linalg.solve(N + 1e-3 * bend.T @ bend + 1e-6 * np.eye(n_knots), right[key])
        table[-1] = 0  # the first knot beyond the data: no step there, on which the last bit of a distance would decide
        reference.two_centre[key] = table
    reference.attributes["outside_fraction"] = float(outside / total)


def axial_components(coupling, coupled: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """M = 0 components in the edge frame, sum_M Y_LM(edge) c_LM, by slot, (G, slots): no Wigner matrix needed."""
    parts = []
    for L, part in coupling.slices.items():
        harmonics = real_spherical_harmonics(L, vectors)
        parts.append(np.einsum("gm,gms->gs", harmonics, coupled[:, part].reshape(len(coupled), 2 * L + 1, -1)))
    return np.concatenate(parts, 1)


def _check_reach(reference: Reference, operators: Operators):
    if reference.cutoff_angstrom > reference.reach_angstrom:
        distances = edges_within(operators.atoms, reference.cutoff_angstrom).distances
        if (distances > reference.reach_angstrom + 1e-6).any():
            raise ValueError(
                f"graph.cutoff_angstrom is {reference.cutoff_angstrom} A, but H of the training data reaches only "
                f"{reference.reach_angstrom:.2f} A. Lower the cutoff, or dft.eps_default so that H reaches further."
            )


def _fit_scale(reference: Reference, structures, of_structures):
    n_knots = int(reference.reach_angstrom / SPACING_ANGSTROM) + 2
    power, count, onsite_power, onsite_count = {}, {}, {}, {}
    for operators, of_atoms in zip(structures, of_structures):
        for z_i, z_j, blocks, onsite, coupled, vectors in coupled_groups(*reference.remainder(operators, of_atoms)):
            coupling = reference.coupling[z_i, z_j]
            components = 2 * coupling.slot_degree + 1
            if onsite:
                rows = of_atoms.rows[operators.pairs[blocks, 0]]
                rest = coupled - reference.crystal_field.onsite(z_i, of_atoms.features[z_i].rows(rows))
                onsite_power[z_i] = onsite_power.get(z_i, 0) + _slot_power(coupling, rest).sum(0) / components
                onsite_count[z_i] = onsite_count.get(z_i, 0) + len(coupled)
                continue
            distances = np.linalg.norm(vectors, axis=1)
            axial = axial_components(coupling, coupled, vectors)
            f_ref = reference.offsite(z_i, z_j, distances)
            # a rotation keeps |c|^2, so only the axial component needs the edge frame
            rest = np.maximum(_slot_power(coupling, coupled) - axial**2 + (axial - f_ref) ** 2, 0) / components
            left, f = _hat(distances, n_knots)
            p = power.setdefault((z_i, z_j), np.zeros((n_knots, coupling.n_slots)))
            n = count.setdefault((z_i, z_j), np.zeros(n_knots))
            for shift, w in ((0, 1 - f), (1, f)):
                np.add.at(p, left + shift, w[:, None] * rest)
                np.add.at(n, left + shift, w)
    knots = np.arange(n_knots)
    for key, p in power.items():
        known = np.flatnonzero(count[key] > 1e-3)
        logs = np.log(np.sqrt(p[known] / count[key][known, None]) + SMALLEST_SCALE_HARTREE)
        table = np.stack([np.interp(knots, known, column) for column in logs.T], 1)
        reference.scale[key] = np.exp(table)
    for z, p in onsite_power.items():
        reference.onsite_scale[z] = np.sqrt(p / onsite_count[z]) + SMALLEST_SCALE_HARTREE


def _slot_power(coupling, coupled: np.ndarray) -> np.ndarray:
    """Sum of squares over M, by slot, (G, slots)."""
    parts = [(coupled[:, p].reshape(len(coupled), 2 * L + 1, -1) ** 2).sum(1) for L, p in coupling.slices.items()]
    return np.concatenate(parts, 1)


def write_reference(path, reference: Reference):
    with create_h5(
        path, SCHEMA, periodic=reference.periodic, cutoff_angstrom=reference.cutoff_angstrom,
        reach_angstrom=reference.reach_angstrom, spacing_angstrom=SPACING_ANGSTROM,
        near_angstrom=reference.crystal_field.near_angstrom, longest_cell_angstrom=reference.longest_cell_angstrom,
        **reference.attributes,
    ) as file:  # fmt: skip
        write_basis(file, reference.basis)
        file["potentials/charges"] = reference.crystal_field.charges
        file["potentials/coefficients"] = reference.crystal_field.coefficients
        for (z_i, z_j), table in reference.two_centre.items():
            group = file.create_group(f"offsite/{z_i}-{z_j}")
            group["two_centre"], group["scale"] = table, reference.scale[z_i, z_j]
        for z, mean in reference.crystal_field.mean.items():
            group = file.create_group(f"onsite/{z}")
            group["mean"], group["scale"] = mean, reference.onsite_scale[z]
            group["centre"], group["overlap"] = reference.crystal_field.centre[z], reference.crystal_field.overlap[z]
            group["spread"] = reference.crystal_field.spread[z]
            for L, table in enumerate(reference.crystal_field.tables[z]):
                group[f"crystal_field/{L}"] = table


def read_reference(path) -> Reference:
    """Raises ValueError (path, found, expected) if the file is missing, cut short or of another schema."""
    with open_h5(path, SCHEMA) as file:
        a = file.attrs
        lengths = (float(a[f"{name}_angstrom"]) for name in ("cutoff", "reach", "longest_cell"))
        reference = Reference(read_basis(file), bool(a["periodic"]), *lengths)
        reference.attributes = {"outside_fraction": float(a["outside_fraction"])}
        for name, group in file["offsite"].items():
            key = tuple(int(z) for z in name.split("-"))
            reference.two_centre[key], reference.scale[key] = group["two_centre"][:], group["scale"][:]
        field = reference.crystal_field
        field.near_angstrom = float(a["near_angstrom"])
        field.charges, field.coefficients = (file[f"potentials/{name}"][:] for name in ("charges", "coefficients"))
        for name, group in file["onsite"].items():
            z = int(name)
            field.mean[z], reference.onsite_scale[z] = group["mean"][:], group["scale"][:]
            field.centre[z], field.overlap[z], field.spread[z] = (group[name][:] for name in ("centre", "overlap", "spread"))
            field.tables[z] = [group[f"crystal_field/{L}"][:] for L in range(len(group["crystal_field"]))]
    return reference
