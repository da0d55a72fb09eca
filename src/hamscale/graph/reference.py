"""Fit and store the energy gauge, the reference and the scales, so that the network need not learn them.

They are fitted to the training structures and then stored as data.

gauge      H and H + mu S are the same physics in a periodic cell. The mu of a structure brings its onsite blocks as near as
           possible to their reference; mu S is subtracted from all blocks.
reference  offsite: the least-squares mean of the M = 0 components in the edge frame, by pair of elements and distance
           (piecewise linear), that is, a Slater-Koster Hamiltonian; onsite: a linear crystal field (crystal_field.py).
scale      root mean square of the remainder, by pair of elements, slot and distance (interpolated in the logarithm).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from ase import Atoms

from ..angular import real_spherical_harmonics
from ..basis import Basis
from ..container import create_h5, open_h5
from ..layout import Array, Layout
from ..operators import Operators, read_basis, write_basis
from ..operators.files import BASIS
from ..pairs import ByElement, ByPair
from ..structures import longest_period
from ..units import hartree_to_ev
from .charges import ChargeKernel
from .coupling import Coupling, PairCoupling, coupled_groups
from .crystal_field import CrystalField, Ions, OnsiteBlocks, PotentialField, less_potential, less_shifts, onsite_blocks
from .crystal_field_fit import SMALLEST_SCALE_HARTREE, fit_crystal_field, fit_kernel, mean_blocks, with_potentials
from .graph import elements_of, structure_graph
from .lifting import find_floor
from .neighbours import edges_within

REFERENCE = Layout(
    "reference/7",
    BASIS
    | {
        "potentials/charges": Array("f8", ("elements", "m")),
        "potentials/coefficients": Array("f8", ("*",)),
        "offsite/*/two_centre": Array("f8", ("knots", "*")),
        "offsite/*/scale": Array("f8", ("knots", "*")),
        "onsite/*/crystal_field/*": Array("f8", ("*", "*")),
    }
    | {f"onsite/*/{name}": Array("f8", ("*",)) for name in ("mean", "scale", "centre", "overlap", "spread")}
    | {
        "self_consistent/coefficients": Array("f8", ("*",), optional=True),
        "self_consistent/table/*": Array("f8", ("*",), optional=True),
        "self_consistent/numbers": Array("f8", ("elements", 5), optional=True),
    },
    {"periodic": bool}
    | {f"{name}_angstrom": float for name in ("cutoff", "reach", "spacing", "near", "longest_cell")}
    | {"outside_fraction": float, "floor_hartree": float},
    earlier="reference/6",
)
OF_POTENTIAL = ("mean", "centre", "spread", "scale")  # numbers of each element that PotentialField has
SPACING_ANGSTROM = 0.25
LARGEST_SPLITTING_EV = 0.3  # moments are opposite if splittings of either sign are larger; those induced at a ligand are not
# nearest neighbours lie within their mean distance times this factor; in rock salt the second shell begins at 2^0.5
FIRST_SHELL = 1.4


@dataclass(frozen=True)
class Reference:
    """Fitted tables, with one row per knot k at distance k * SPACING_ANGSTROM.

    crystal_field: reference of the onsite blocks, relative to which the gauge is measured.
    two_centre[z_i, z_j], scale[z_i, z_j]: (knots, slots), Hartree; onsite_scale[z]: (slots,), Hartree.
    reach_angstrom: the longest distance of a block in the data; beyond it the reference falls to zero within one knot.
    longest_cell_angstrom: the longest periodic cell vector of the training structures; zero for molecules.
    outside_fraction: share of sum |H| of the training structures on pairs beyond the cutoff.
    floor_hartree: lowest energy of the training structures along directions that S nearly misses (graph/lifting.py), in the
    energy zero of predictions; infinity if S misses none.

    reference = fit_reference([read_operators(path) for path in paths], "auto")
    reference.offsite(72, 8, np.array([2.1]))  # coupled blocks of a bond Hf-O in its frame: those of order zero, Hartree
    """

    basis: Basis
    periodic: bool
    cutoff_angstrom: float
    reach_angstrom: float
    longest_cell_angstrom: float
    crystal_field: CrystalField
    two_centre: ByPair
    scale: ByPair
    onsite_scale: ByElement
    outside_fraction: float
    floor_hartree: float = np.inf

    @property
    def coupling(self) -> Coupling:
        """Return the couplings of all pairs of elements."""
        return self.crystal_field.coupling

    @property
    def spins(self) -> int:
        """Return the number of matrices H that are predicted: one for both spins, or two."""
        return self.coupling.spins

    def remainder(self, operators: Operators, of_atoms: OnsiteBlocks) -> tuple[Operators, Coupling, float]:
        """Return the arguments with which `coupled_groups` gives H - mu S less the shifts of bonds by the crystal field."""
        return _remainder(self.crystal_field, self.periodic, operators, of_atoms)

    def offsite(self, z_i: int, z_j: int, distances: np.ndarray) -> np.ndarray:
        """Compute the two-centre reference, the M = 0 components in the edge frame, (G, slots), Hartree."""
        self._known(z_i, z_j)
        return _interpolate(self.two_centre[z_i, z_j], distances)

    def offsite_scale(self, z_i: int, z_j: int, distances: np.ndarray) -> np.ndarray:
        """Compute the root mean square of the remainder by slot, (G, slots), Hartree."""
        self._known(z_i, z_j)
        return np.exp(_interpolate(np.log(self.scale[z_i, z_j]), distances))

    def scale_of_atoms(self, z: int) -> np.ndarray:
        """Return the root mean square of the remainder of atoms of an element by component, (n,) or (n + 1,) with u."""
        scale = self.onsite_scale[z][self.coupling[z, z].slot]
        return np.append(scale, self.crystal_field.potential.scale[z]) if self.crystal_field.potential else scale

    def _known(self, z_i: int, z_j: int) -> None:
        if (z_i, z_j) not in self.two_centre:
            known = ", ".join(f"{self.basis[a].element}-{self.basis[b].element}" for a, b in self.two_centre)
            raise ValueError(f"no training structure held the pair of elements {z_i}, {z_j}; known pairs: {known}.")


def _remainder(
    field: CrystalField, periodic: bool, operators: Operators, of_atoms: OnsiteBlocks
) -> tuple[Operators, Coupling, float]:
    gauge = field.gauge(of_atoms) if periodic else 0.0
    return less_shifts(operators, of_atoms, field), field.coupling, gauge


def _hat(distances: np.ndarray, n_knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the left knot of each distance, and the fraction of the way to the next knot."""
    x = np.minimum(distances / SPACING_ANGSTROM, n_knots - 1.000001)
    left = x.astype(np.int64)
    return left, x - left


def _interpolate(table: np.ndarray, distances: np.ndarray) -> np.ndarray:
    left, fraction = _hat(distances, len(table))
    return table[left] * (1 - fraction)[:, None] + table[left + 1] * fraction[:, None]


def fit_reference(
    structures: Iterable[Operators],
    cutoff_angstrom: float | Literal["auto"],
    auto_threshold_hartree: float = 1e-4,
    ions: Ions = Ions(),  # noqa: B008
    crystal_field: bool = True,
    two_centre: bool = True,
    self_consistent: bool = False,
) -> Reference:
    """Fit the gauge, the reference and the scales to the training structures.

    structures: iterated over several times, with one in memory at a time.
    cutoff_angstrom: a number, or "auto": the longest distance of a block with an element of H above the threshold.
    crystal_field: if false, the reference of an onsite block is the mean block of its element.
    two_centre: if false, the offsite reference is Mulliken's approximation alone, or zero if crystal_field is false as
    well.
    self_consistent: the potentials of the charges of DFT's atoms are fitted first, and all else to what H is without them.
    Raises ValueError if the bases differ, if the cutoff is larger than the reach of H in the data, or if atoms of one element
    have moments of both directions; with self_consistent also of structures without charges or without periodic directions.
    """
    survey = _survey(structures, cutoff_angstrom, auto_threshold_hartree)
    coupling, periodic = Coupling(survey.basis, survey.spins), survey.periodic
    charges = ions.distributions(sorted(survey.basis), survey.atoms)
    of_structures = []
    for operators in structures:
        graph = structure_graph(operators.atoms, survey.basis, survey.cutoff_angstrom)
        of_structures.append(
            onsite_blocks(operators, coupling, graph, ions.near_angstrom, charges, survey.first_shell_angstrom)
        )
    _check_moments(of_structures, coupling)
    fit = lambda of: fit_crystal_field(of, coupling, periodic, ions.near_angstrom, charges, bool(ions.charges))  # noqa: E731
    field = fit(of_structures)
    whole = structures
    if self_consistent:
        of_dft = [charges_of(o, periodic) for o in structures]
        kernel = fit_kernel(of_structures, of_dft, survey.atoms, coupling)
        potentials = [kernel.of(atoms)(q) for atoms, q in zip(survey.atoms, of_dft)]
        structures = _Without(structures, potentials)
        of_structures = [less_potential(s, u) for s, u in zip(of_structures, potentials)]
        field = with_potentials(fit(of_structures), field, kernel, of_structures, potentials)
    if not crystal_field:
        field = mean_blocks(field, of_structures)
    _check_reach(survey, structures)
    n_knots = int(survey.reach_angstrom / SPACING_ANGSTROM) + 2
    tables = _fit_two_centre(field, periodic, n_knots, structures, of_structures)
    if not two_centre:
        tables = {key: np.zeros_like(table) for key, table in tables.items()}
    scale, onsite_scale = _fit_scale(field, periodic, tables, n_knots, structures, of_structures)
    sums = np.sum([outside_sums(operators, survey.cutoff_angstrom) for operators in whole], axis=0)
    return Reference(
        survey.basis, periodic, survey.cutoff_angstrom, survey.reach_angstrom, survey.longest_cell_angstrom,
        field, tables, scale, onsite_scale, float(sums[0] / sums[1]),
        min(find_floor(o, field.gauge(a) if periodic else 0.0) for o, a in zip(whole, of_structures)),
    )  # fmt: skip


def charges_of(operators: Operators, periodic: bool = True) -> np.ndarray:
    """Return DFT's charges of the atoms, (A,). Raises ValueError if there are none, or no periodic directions."""
    if not periodic:
        raise ValueError(
            "prediction.self_consistent, and structures without periodic directions: expected periodic ones, since the "
            "potentials of charges are summed over their images. Leave it out."
        )
    if operators.mulliken_charges is None:
        raise ValueError(
            f"operators of {operators.atoms.get_chemical_formula()} hold no charges of its atoms, which "
            "prediction.self_consistent needs. Make them again with `hamscale operators`."
        )
    return operators.mulliken_charges


@dataclass(frozen=True)
class _Without:
    """Operators without the potentials u (A,) of each structure, one in memory at a time."""

    structures: Iterable[Operators]
    potentials: list[np.ndarray]

    def __iter__(self) -> Iterator[Operators]:
        return (operators.with_potential(-u) for operators, u in zip(self.structures, self.potentials))


@dataclass(frozen=True)
class _Survey:
    """Properties of the training structures that the fit needs at its beginning.

    first_shell_angstrom: the reach of the nearest neighbours.
    """

    basis: Basis
    periodic: bool
    cutoff_angstrom: float
    reach_angstrom: float
    longest_cell_angstrom: float
    first_shell_angstrom: float
    atoms: list[Atoms]
    spins: int


def _survey(structures: Iterable[Operators], cutoff: float | Literal["auto"], threshold: float) -> _Survey:
    basis: Basis | None = None
    reach, above, atoms, nearest, spins = 0.0, 0.0, [], [], set()
    for operators in structures:
        if basis and (difference := basis.difference(operators.basis)):
            raise ValueError(f"training structures were calculated in different bases: {difference}. Run them again with one.")
        basis = Basis((dict(basis or {}) | dict(operators.basis)).values())
        distances = operators.pairs.distances
        reach = max(reach, distances.max())
        if cutoff == "auto":
            above = max(above, distances[_block_maximum(operators) > threshold].max(initial=0.0) + 1e-6)
        atoms.append(operators.atoms)
        spins.add(operators.spins)
        of_atom = np.full(len(operators.atoms), np.inf)
        np.minimum.at(of_atom, operators.pairs[:, 0], np.where(operators.pairs.onsite, np.inf, distances))
        nearest.append(of_atom[np.isfinite(of_atom)])
    if basis is None:
        raise ValueError("no training structure was given; expected at least one file of schema operators/2.")
    periodic = [bool(a.pbc.any()) for a in atoms]
    if len(set(periodic)) > 1:
        raise ValueError(
            "training structures are periodic and not periodic; expected one kind: their energies have different zeros."
        )
    if len(spins) > 1:
        raise ValueError("training structures have one H and two, of either spin; expected the same dft.spin for all.")
    longest = max(map(longest_period, atoms))
    first_shell = FIRST_SHELL * float(np.concatenate(nearest).mean())
    chosen = float(above if cutoff == "auto" else cutoff)
    return _Survey(basis, periodic[0], chosen, float(reach), float(longest), first_shell, atoms, spins.pop())


def _check_moments(of_structures: list[OnsiteBlocks], coupling: Coupling) -> None:
    """Raise ValueError if atoms of one element have exchange splittings of opposite signs, in one structure or in several.

    The splitting of an atom is the component of the difference of its onsite blocks along S, as in `slabs.atom_potentials`.
    """
    for z in sorted({z for s in of_structures for z in s.blocks}) if coupling.spins == 2 else ():
        part = coupling[z, z].slices[0]
        blocks = np.concatenate([s.blocks[z][:, part] for s in of_structures if z in s.blocks])
        S, _ = np.split(next(s.overlap[z][part] for s in of_structures if z in s.blocks), 2)
        _, differences = np.split(blocks, 2, 1)
        splittings = 2 * hartree_to_ev(differences @ S / (S @ S))
        if splittings.min() < -LARGEST_SPLITTING_EV and splittings.max() > LARGEST_SPLITTING_EV:
            raise ValueError(
                f"atoms of {coupling.basis[z].element} have exchange splittings from {splittings.min():.2f} to "
                f"{splittings.max():.2f} eV: their moments point both ways, and nothing tells a model which atom is which. "
                "Expected one direction for each element: start all runs with dft.spin.magnetization; an antiferromagnet "
                "cannot be learnt."
            )


def outside_sums(operators: Operators, cutoff_angstrom: float) -> tuple[float, float]:
    """Sum |H| over all elements of the pairs beyond the cutoff, and over all pairs, Hartree."""
    sums = np.add.reduceat(np.abs(np.atleast_2d(operators.hamiltonian)), operators.offsets[:-1], axis=1).sum(0)
    far = operators.pairs.distances >= cutoff_angstrom
    return float(sums[far].sum()), float(sums.sum())


def _block_maximum(operators: Operators) -> np.ndarray:
    return np.maximum.reduceat(np.abs(np.atleast_2d(operators.hamiltonian)), operators.offsets[:-1], axis=1).max(0)


def _fit_two_centre(
    field: CrystalField, periodic: bool, n_knots: int, structures: Iterable[Operators], of_structures: list[OnsiteBlocks]
) -> ByPair:
    """Fit the tables of the M = 0 components by pair of elements, (knots, slots), Hartree."""
    normal: ByPair = {}
    right: ByPair = {}
    for operators, of_atoms in zip(structures, of_structures):
        for z_i, z_j, _, onsite, coupled, vectors in coupled_groups(*_remainder(field, periodic, operators, of_atoms)):
            coupling = field.coupling[z_i, z_j]
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
    # a weak penalty on kinks interpolates the table over distances that do not occur in the training structures
    bend, tables = np.diff(np.eye(n_knots), n=2, axis=0), {}
    for key, N in normal.items():
        table = np.linalg.solve(N + 1e-3 * bend.T @ bend + 1e-6 * np.eye(n_knots), right[key])
        # zero at the first knot beyond the data: at a step there, the last bit of a distance would change the result
        table[-1] = 0
        tables[key] = table
    return tables


def axial_components(coupling: PairCoupling, coupled: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Compute the M = 0 components in the edge frame, sum_M Y_LM(edge) c_LM, by slot, (G, slots).

    This needs no Wigner matrix.
    """
    parts = []
    for L, part in coupling.slices.items():
        harmonics = real_spherical_harmonics(L, vectors)
        parts.append(np.einsum("gm,gms->gs", harmonics, coupled[:, part].reshape(len(coupled), 2 * L + 1, -1)))
    return np.concatenate(parts, 1)


def _check_reach(survey: _Survey, structures: Iterable[Operators]) -> None:
    if survey.cutoff_angstrom > survey.reach_angstrom:
        for operators in structures:
            if (edges_within(operators.atoms, survey.cutoff_angstrom).distances > survey.reach_angstrom + 1e-6).any():
                raise ValueError(
                    f"graph.cutoff_angstrom is {survey.cutoff_angstrom} A, but H of the training data reaches only "
                    f"{survey.reach_angstrom:.2f} A. Lower the cutoff, or dft.eps_default so that H reaches further."
                )


def _fit_scale(
    field: CrystalField,
    periodic: bool,
    tables: ByPair,
    n_knots: int,
    structures: Iterable[Operators],
    of_structures: list[OnsiteBlocks],
) -> tuple[ByPair, ByElement]:
    """Compute the root mean squares of the remainder beyond the reference, Hartree.

    Returns them by pair of elements, (knots, slots), and for onsite blocks by element, (slots,).
    """
    power: ByPair = {}
    count: ByPair = {}
    onsite_power: ByElement = {}
    onsite_count: dict[int, int] = {}
    for operators, of_atoms in zip(structures, of_structures):
        for z_i, z_j, blocks, onsite, coupled, vectors in coupled_groups(*_remainder(field, periodic, operators, of_atoms)):
            coupling = field.coupling[z_i, z_j]
            components = 2 * coupling.slot_degree + 1
            if onsite:
                rows = of_atoms.rows[operators.pairs[blocks, 0]]
                rest = coupled - field.onsite(z_i, of_atoms.features[z_i].rows(rows))
                onsite_power[z_i] = onsite_power.get(z_i, 0) + _slot_power(coupling, rest).sum(0) / components
                onsite_count[z_i] = onsite_count.get(z_i, 0) + len(coupled)
                continue
            distances = np.linalg.norm(vectors, axis=1)
            axial = axial_components(coupling, coupled, vectors)
            f_ref = _interpolate(tables[z_i, z_j], distances)
            # a rotation preserves |c|^2, so only the axial component needs the edge frame
            rest = np.maximum(_slot_power(coupling, coupled) - axial**2 + (axial - f_ref) ** 2, 0) / components
            left, f = _hat(distances, n_knots)
            p = power.setdefault((z_i, z_j), np.zeros((n_knots, coupling.n_slots)))
            n = count.setdefault((z_i, z_j), np.zeros(n_knots))
            for shift, w in ((0, 1 - f), (1, f)):
                np.add.at(p, left + shift, w[:, None] * rest)
                np.add.at(n, left + shift, w)
    knots, scale = np.arange(n_knots), {}
    for key, p in power.items():
        known = np.flatnonzero(count[key] > 1e-3)
        logs = np.log(np.sqrt(p[known] / count[key][known, None]) + SMALLEST_SCALE_HARTREE)
        scale[key] = np.exp(np.stack([np.interp(knots, known, column) for column in logs.T], 1))
    return scale, {z: np.sqrt(p / onsite_count[z]) + SMALLEST_SCALE_HARTREE for z, p in onsite_power.items()}


def _slot_power(coupling: PairCoupling, coupled: np.ndarray) -> np.ndarray:
    """Sum the squares over M, by slot, (G, slots)."""
    parts = [(coupled[:, p].reshape(len(coupled), 2 * L + 1, -1) ** 2).sum(1) for L, p in coupling.slices.items()]
    return np.concatenate(parts, 1)


def write_reference(path: str | Path, reference: Reference, made_of: dict[str, list[str]] | None = None) -> None:
    """Write a reference to a file of schema `reference/7`, atomically.

    made_of: identities of the operators that it was fitted to (container.identity).
    """
    with create_h5(
        path, REFERENCE, made_of, periodic=reference.periodic, cutoff_angstrom=reference.cutoff_angstrom,
        reach_angstrom=reference.reach_angstrom, spacing_angstrom=SPACING_ANGSTROM,
        near_angstrom=reference.crystal_field.near_angstrom, longest_cell_angstrom=reference.longest_cell_angstrom,
        outside_fraction=reference.outside_fraction, floor_hartree=reference.floor_hartree,
        **({"spins": reference.spins} if reference.spins > 1 else {}),
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
        if potential := reference.crystal_field.potential:
            file["self_consistent/coefficients"] = np.r_[potential.kernel.coefficient, potential.coefficients]
            file["self_consistent/numbers"] = [
                [of[z] for of in (potential.kernel.hardness, *(getattr(potential, name) for name in OF_POTENTIAL))]
                for z in sorted(potential.mean)
            ]
            for z, table in potential.tables.items():
                file[f"self_consistent/table/{z}"] = table


def read_reference(path: str | Path) -> Reference:
    """Read a reference from a file of schema `reference/7`.

    Raises ValueError (path, found, expected) if the file is missing, cut short, damaged or of another schema, or if a table
    does not belong to the basis, is not finite, or holds a scale that is not above zero.
    """
    with open_h5(path, REFERENCE) as file:
        try:
            return _check(_reference(file))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {error.args[0]}. Make it again with `hamscale reference`.") from None


def _reference(file: h5py.File) -> Reference:
    a, basis = file.attrs, read_basis(file)
    of_pairs = {elements_of(name): group for name, group in file["offsite"].items()}
    of_elements = {int(name): group for name, group in file["onsite"].items()}
    of = lambda name: {z: group[name][:] for z, group in of_elements.items()}  # noqa: E731
    field = CrystalField(
        Coupling(basis, int(a.get("spins", 1))),
        float(a["near_angstrom"]),
        file["potentials/charges"][:],
        of("centre"),
        of("mean"),
        {z: [g[f"crystal_field/{L}"][:] for L in range(len(g["crystal_field"]))] for z, g in of_elements.items()},
        file["potentials/coefficients"][:],
        of("overlap"),
        of("spread"),
        _potential(file["self_consistent"]) if "self_consistent" in file else None,
    )
    return Reference(
        basis,
        bool(a["periodic"]),
        float(a["cutoff_angstrom"]),
        float(a["reach_angstrom"]),
        float(a["longest_cell_angstrom"]),
        field,
        {key: group["two_centre"][:] for key, group in of_pairs.items()},
        {key: group["scale"][:] for key, group in of_pairs.items()},
        of("scale"),
        float(a["outside_fraction"]),
        float(a["floor_hartree"]),
    )


def _potential(group: h5py.Group) -> PotentialField:
    coefficient, *coefficients = group["coefficients"][:].tolist()
    tables = {int(z): table[:] for z, table in group["table"].items()}
    of = dict(zip(sorted(tables), group["numbers"][:].tolist()))
    hardness, mean, *more = ({z: numbers[k] for z, numbers in of.items()} for k in range(len(OF_POTENTIAL) + 1))
    return PotentialField(ChargeKernel(hardness, coefficient), mean, tables, np.array(coefficients), *more)


def _check(reference: Reference) -> Reference:
    """Return a reference whose tables belong to its basis. Raises ValueError if they do not, or are no numbers."""
    field, coupling, known = reference.crystal_field, reference.coupling, set(reference.basis)
    for what, found in (("onsite", set(reference.onsite_scale)), ("offsite", {z for key in reference.scale for z in key})):
        if not found <= known:
            raise ValueError(f"/{what} holds elements that the basis lacks")
    tables = [
        (f"offsite/{a}-{b}", coupling[a, b].n_slots, [reference.two_centre[a, b], reference.scale[a, b]])
        for a, b in reference.scale
    ]
    for z, scale in reference.onsite_scale.items():
        of_atom = [scale, field.mean[z], field.centre[z], field.spread[z]]
        tables.append((f"onsite/{z}", coupling[z, z].n_slots, of_atom))
        tables.append((f"onsite/{z}/overlap", coupling[z, z].size, [field.overlap[z]]))
        counts = [len(coupling[z, z].slots.get(L, ())) for L in range(len(field.tables[z]))]
        tables += [(f"onsite/{z}/crystal_field/{L}", n, [field.tables[z][L]]) for L, n in enumerate(counts)]
    for name, n, values in tables:
        for table in values:
            if table.shape[-1] != n:
                raise ValueError(f"/{name} has tables of {table.shape[-1]} numbers, expected the {n} of the basis")
            if not np.isfinite(table).all():
                raise ValueError(f"/{name} holds NaN or infinity")
    if not (np.isfinite(field.charges).all() and np.isfinite(field.coefficients).all()):
        raise ValueError("/potentials hold NaN or infinity")
    if potential := field.potential:
        numbers = np.concatenate([potential.coefficients, *potential.tables.values(), [potential.kernel.coefficient]])
        of_elements = (potential.kernel.hardness, *(getattr(potential, name) for name in OF_POTENTIAL))
        if not np.isfinite(numbers).all() or not all(np.isfinite(list(of.values())).all() for of in of_elements):
            raise ValueError("/self_consistent holds NaN or infinity")
        if any(set(of) != set(field.mean) for of in of_elements) or not all(
            len(potential.tables[z]) == len(field.tables[z][0]) for z in field.mean
        ):
            raise ValueError("/self_consistent does not belong to the elements of the reference")
        if len(potential.coefficients) != len(field.coefficients) or min(potential.scale.values()) <= 0:
            raise ValueError("/self_consistent has a scale that is not above zero, or other coefficients than /potentials")
    if not all((table > 0).all() for table in (*reference.scale.values(), *reference.onsite_scale.values())):
        raise ValueError("a scale is not above zero")
    lengths = reference.cutoff_angstrom, reference.reach_angstrom, field.near_angstrom
    if not (np.isfinite(lengths).all() and min(lengths) > 0 and reference.longest_cell_angstrom >= 0):
        raise ValueError(f"cutoff, reach and near region are {lengths} A, expected positive numbers")
    return reference
