"""Build the structures of a material through ASE: make or read, decorate, melt and quench, strain, rattle, tile; by seed."""

import contextlib
import hashlib
import importlib
import sys
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

import ase.build
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import FIRE
from ase.spacegroup import crystal
from ase.units import fs

from .config import CALCULATOR_PLUGINS, Material, MeltQuench, StructureSet, Transport
from .structures import POSITION_DECIMALS, as_drawn, check_distances, periodicity, read_frames, with_vacuum, wrap_as_cp2k


def build_structures(material: Material) -> dict[str, Atoms]:
    """Build all structures of a material, by identifier, each as `build_structure` makes it."""
    return {identifier: build_structure(material, identifier) for identifier in material.identifiers()}


def build_structure(material: Material, identifier: str, tile: Atoms | None = None) -> Atoms:
    """Build one structure of a material, SET-NNN, wrapped as CP2K wraps it.

    The numbers are the same whatever else is built, in any order, on any machine: each structure draws from its own generator,
    seeded by its set's seed, its set's name and its number. (The dynamics of a melt amplify differences in the last bit of sums
    between machines; there the structure file is the record.) tile: the structure that this one tiles, if it is available;
    otherwise it is built. Raises ValueError (set, what was found, what was expected).
    """
    return _build(material, identifier, (), tile)


def _build(material: Material, identifier: str, tiles: tuple[str, ...], tile: Atoms | None = None) -> Atoms:
    if identifier not in material.identifiers():
        raise ValueError(f"no structure {identifier!r}. Structures: {', '.join(material.identifiers())}.")
    name, number = identifier.rsplit("-", 1)
    s = material.structures[name]
    if not s.built:
        raise ValueError(f"structures.{name} are of H and S that are there: `hamscale structure` takes them from these.")
    if s.tile and identifier in tiles:
        raise ValueError(f"structures.{name}: tile.of {s.tile.of!r} leads back to itself.")
    if s.tile:
        frames = [tile or _build(material, s.tile.of, (*tiles, identifier))]
    else:
        frames = _source(name, s)
    if s.file and len(frames) > 1:
        _check_trajectory(name, len(frames), material)
    atoms = _in_cell(f"structures.{name}", frames[int(number) % len(frames)], s)
    key = f"{s.seed} {name} {int(number)}".encode()
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(key).digest(), np.uint32))
    atoms = _decorate(name, atoms, s, rng)
    ends = NO_ENDS
    if s.transport and (s.rattle_angstrom or s.melt_quench):
        atoms, ends = _with_ends(f"structures.{name}", atoms, s.transport)
    if s.melt_quench:
        if not atoms.pbc.all():
            raise ValueError(f"structures.{name}: melt_quench of atoms periodic along {periodicity(atoms)}, expected XYZ.")
        atoms = melt_quench(f"structures.{name}", atoms, s.melt_quench, rng, ends)
    _distort(atoms, s, rng, ends)
    atoms = wrap_as_cp2k(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
    atoms.positions = np.round(atoms.positions, POSITION_DECIMALS)
    atoms.info |= {name: value for name in ("charge", "multiplicity") if (value := getattr(s, name))}
    _check(f"structures.{name} number {int(number)}", atoms, material)
    return atoms


def _check_trajectory(name: str, frames: int, material: Material) -> None:
    """Raise ValueError if a trajectory has not a frame for each structure of a set, or if it feeds several splits."""
    s = material.structures[name]
    assert s.file is not None, "only a file has several frames"
    if frames != s.count:
        raise ValueError(f"structures.{name}: {s.file.path} has {frames} frames, count is {s.count}. Make them equal.")
    splits = {other.split for other in material.structures.values() if other.file == s.file}
    if len(splits) > 1:
        raise ValueError(
            f"structures.{name}: {s.file.path} has {frames} frames and feeds the splits {', '.join(sorted(splits))}: frames of "
            "one trajectory are nearly the same structure and must stay in one split. Give each split a file of its own."
        )


def _source(name: str, s: StructureSet) -> list[Atoms]:
    try:
        if s.file:
            return read_frames(s.file.path)
        if s.builder:
            return [getattr(ase.build, s.builder.name)(**s.builder.arguments)]
        assert s.spacegroup is not None, "a set has exactly one source"
        symbols, *coordinates = zip(*s.spacegroup.basis)
        return [crystal(symbols, list(zip(*coordinates)), spacegroup=s.spacegroup.spacegroup, cellpar=s.spacegroup.cellpar)]
    except ValueError as error:
        raise ValueError(f"structures.{name}: {error}") from None
    except Exception as error:  # ASE's builders raise exceptions of any type
        raise ValueError(f"structures.{name}: ASE could not make it: {type(error).__name__}: {error}") from None


def _in_cell(where: str, source: Atoms, s: StructureSet) -> Atoms:
    """Repeat a source, leave the directions open that the set says, and give these a cell vector."""
    across = [axis for axis, n, periodic in zip("abc", s.repeat, source.pbc) if n > 1 and not periodic]
    if across and source.pbc.any():
        raise ValueError(
            f"{where}: repeat is {list(s.repeat)}, but the source is periodic along {periodicity(source)} alone and cannot be "
            f"tiled across. Give 1 along {', '.join(across)}."
        )
    atoms = source.repeat(s.repeat)
    if s.box_angstrom:
        atoms.set_cell(np.eye(3) * s.box_angstrom)
        atoms.center()
        atoms.pbc = False
        return atoms
    atoms.pbc = atoms.pbc & [axis not in s.open for axis in "abc"]
    if (atoms.pbc & ~atoms.cell.any(1)).any() or (atoms.cell.rank < 3 and not atoms.pbc.any()):
        raise ValueError(f"{where}: the cell has rank {atoms.cell.rank}, expected 3. Give box_angstrom for a molecule.")
    return with_vacuum(atoms, s.vacuum_angstrom) if atoms.pbc.any() else atoms


def _decorate(name: str, atoms: Atoms, s: StructureSet, rng: np.random.Generator) -> Atoms:
    """Replace the atoms on sites of one symbol by others at random, in exact shares; a vacancy removes the atom."""
    symbols = np.array(atoms.get_chemical_symbols(), dtype=object)
    for symbol, shares in s.decorate.items():
        sites, total = np.flatnonzero(np.array(atoms.get_chemical_symbols()) == symbol), sum(shares.values())
        if not len(sites) or len(sites) % total:
            raise ValueError(
                f"structures.{name}.decorate: {len(sites)} sites of {symbol} cannot be shared as {shares}: expected a multiple "
                f"of {total}. Repeat the cell."
            )
        taken = np.repeat(list(shares), np.array(list(shares.values())) * (len(sites) // total))
        symbols[sites] = rng.permutation(taken)
    gone = symbols == "vacancy"
    return Atoms(list(symbols[~gone]), atoms.positions[~gone], cell=atoms.cell, pbc=atoms.pbc)


@dataclass(frozen=True)
class Ends:
    """The atoms at the ends of a device, along an axis of the cell, that stay where the source has them.

    begin, end: where the part between them begins and ends, in fractions of the cell, by the share of the atoms' mass.
    """

    axis: int
    left: np.ndarray
    right: np.ndarray
    begin: float = 0.0
    end: float = 1.0

    @property
    def atoms(self) -> np.ndarray:
        return np.concatenate([self.left, self.right])


NO_ENDS = Ends(2, np.empty(0, np.int64), np.empty(0, np.int64))


def _with_ends(where: str, atoms: Atoms, transport: Transport) -> tuple[Atoms, Ends]:
    """Return the atoms, all of them within the cell along the axis, and those at its ends that are not to be moved."""
    axis = "abc".index(transport.axis)
    left, right = transport.undisturbed or (2 * n for n in transport.leads)
    if left + right >= len(atoms):
        raise ValueError(
            f"{where}.transport: {left} and {right} of {len(atoms)} atoms are to stay undisturbed, expected others between "
            "them. Repeat the cell, or set transport.undisturbed."
        )
    cells, place = as_drawn(atoms, np.zeros((len(atoms), 3), np.int64), axis)
    order = np.argsort(place, kind="stable")
    shares = np.cumsum(atoms.get_masses()[order]) / atoms.get_masses().sum()
    drawn = Atoms(atoms.numbers, atoms.positions + cells @ np.asarray(atoms.cell), cell=atoms.cell, pbc=atoms.pbc)
    return drawn, Ends(axis, order[:left], order[-right:], float(shares[left - 1]), float(shares[-right - 1]))


def melt_quench(where: str, atoms: Atoms, settings: MeltQuench, rng: np.random.Generator, ends: Ends = NO_ENDS) -> Atoms:
    """Make an amorphous structure of the same atoms and cell (or density): random packing, melt, linear quench, relaxation.

    Langevin dynamics (ASE) at constant volume uses the forces of any ASE calculator. The packing draws positions at random and
    keeps each that is farther than 0.7 of the mean distance from those before. The melt starts from there, so that nothing of
    the crystal is left however short the melt is. ends: atoms that stay; only the part between them gets the density, by its
    length. Raises ValueError if the calculator cannot be loaded or the atoms fly apart.
    """
    calculator = _calculator(where, settings)
    atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    if settings.density_g_cm3:
        density = (
            atoms.get_masses().sum() / atoms.get_volume() * 1.66053906660
        )  # Dalton per cubic Angstrom in g/cm^3 (CODATA 2018)
        ends = _enlarge(atoms, density / settings.density_g_cm3, ends)
    atoms.positions = _random_packing(atoms, rng, ends)
    atoms.set_constraint(FixAtoms(ends.atoms))
    atoms.calc = calculator
    # the closest contacts of the packing are relaxed first, because dynamics would throw these atoms out
    FIRE(atoms, logfile=None).run(fmax=5.0, steps=50)
    thermalize_momenta(atoms, settings.melt_kelvin, rng=rng)
    dynamics = Langevin(
        atoms,
        settings.timestep_fs * fs,
        temperature_K=settings.melt_kelvin,
        friction=settings.friction_per_fs / fs,
        fixcm=False,
        rng=rng,
    )
    dynamics.run(settings.melt_steps)
    for step in range(settings.quench_steps):
        left = 1 - (step + 1) / settings.quench_steps
        dynamics.set_temperature(temperature_K=settings.quench_kelvin + left * (settings.melt_kelvin - settings.quench_kelvin))
        dynamics.run(1)
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=settings.relax_steps)
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{where}: the melt flew apart. Shorten melt_quench.timestep_fs or lower melt_kelvin.")
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


def _enlarge(atoms: Atoms, factor: float, ends: Ends) -> Ends:
    """Make the cell `factor` times as large, or, if there are ends, so much longer the part between them.

    Returns the ends with the place of that part.
    """
    if not len(ends.atoms):
        atoms.set_cell(atoms.cell * factor ** (1 / 3))
        return ends
    cell = atoms.cell.array.copy()
    longer = (ends.end - ends.begin) * (factor - 1)
    atoms.positions[ends.right] += longer * cell[ends.axis]
    cell[ends.axis] *= 1 + longer
    atoms.set_cell(cell)
    return replace(ends, begin=ends.begin / (1 + longer), end=(ends.end + longer) / (1 + longer))


def _calculator(where: str, settings: MeltQuench) -> Calculator:
    plugins = entry_points(group=CALCULATOR_PLUGINS)
    module, _, name = settings.calculator.rpartition(".")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if settings.calculator in plugins.names:
                calculator = plugins[settings.calculator].load()
            else:
                calculator = getattr(importlib.import_module(module), name)
            return calculator(**settings.arguments)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where}.melt_quench.calculator: {settings.calculator} cannot be had ({type(error).__name__}: {error}). Expected "
            "a calculator that is installed, and its arguments; CHGNet: pip install hamscale[md]."
        ) from None


def _random_packing(atoms: Atoms, rng: np.random.Generator, ends: Ends) -> np.ndarray:
    """Return positions no two of which are closer than 0.7 (V/N)^(1/3), periodic images included; ends stay.

    The others lie between them. The distance is reduced where an atom does not fit.
    """
    cell, distance = np.asarray(atoms.cell), 0.7 * (atoms.get_volume() / len(atoms)) ** (1 / 3)
    shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3) @ cell
    low, high = np.zeros(3), np.ones(3)
    low[ends.axis], high[ends.axis] = ends.begin, ends.end
    positions, placed = atoms.positions.copy(), atoms.positions[ends.atoms]
    for atom in np.setdiff1d(np.arange(len(atoms)), ends.atoms):
        for attempt in range(3000):
            candidate = (low + rng.random(3) * (high - low)) @ cell
            images = (placed[:, None] + shifts - candidate).reshape(-1, 3)
            if not len(images) or (images**2).sum(1).min() > (distance * 0.999**attempt) ** 2:
                break
        placed = np.concatenate([placed, candidate[None]])
        positions[atom] = candidate
    return positions


def _distort(atoms: Atoms, s: StructureSet, rng: np.random.Generator, ends: Ends) -> None:
    if s.strain and atoms.pbc.any():
        strain = rng.normal(0, s.strain, (3, 3))
        strain = (strain + strain.T) / 2
        if not atoms.pbc.all():  # a slab is strained in its plane, a wire along its axis
            along = np.linalg.qr(np.asarray(atoms.cell)[atoms.pbc].T)[0]
            strain = along @ along.T @ strain @ along @ along.T
        atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    if s.rattle_angstrom:
        displacements = rng.normal(0, s.rattle_angstrom, (len(atoms), 3))
        displacements[ends.atoms] = 0
        atoms.positions += displacements


def _check(where: str, atoms: Atoms, material: Material) -> None:
    unknown = sorted(set(atoms.get_chemical_symbols()) - set(material.species))
    if unknown:
        raise ValueError(
            f"{where}: holds {', '.join(unknown)}, but species are {', '.join(material.species)}. Add them to species."
        )
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{where}: a position is not a number.")
    check_distances(where, atoms)
