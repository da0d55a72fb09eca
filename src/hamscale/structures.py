"""Make the structures of a material through ASE: build or read, decorate, melt and quench, strain, rattle, tile; by seed."""

import contextlib
import hashlib
import importlib
import sys
from pathlib import Path

import ase.build
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.cell import Cell
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.neighborlist import neighbor_list
from ase.optimize import FIRE
from ase.spacegroup import crystal
from ase.units import fs
from numpy.typing import ArrayLike

from .config import Material, MeltQuench, StructureSet
from .files import atomic

GIVEN = "given_positions"  # array of wrapped Atoms, (A, 3) Angstrom: the positions in the user's file
MINIMUM_DISTANCE_ANGSTROM = 0.5
POSITION_DECIMALS = 8  # extxyz holds so many; positions are rounded to them, so that a structure equals its file


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
    if s.dft:
        raise ValueError(f"structures.{name} are of runs of CP2K: `hamscale structure` takes them from there.")
    if s.tile and identifier in tiles:
        raise ValueError(f"structures.{name}: tile.of {s.tile.of!r} leads back to itself.")
    if s.tile:
        frames = [tile or _build(material, s.tile.of, (*tiles, identifier))]
    else:
        frames = _source(name, s)
    if s.file and len(frames) not in (1, s.count):
        raise ValueError(f"structures.{name}: {s.file.path} has {len(frames)} frames, count is {s.count}. Make them equal.")
    atoms = _in_cell(f"structures.{name}", frames[int(number) % len(frames)], s)
    key = f"{s.seed} {name} {int(number)}".encode()
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(key).digest(), np.uint32))
    atoms = _decorate(name, atoms, s, rng)
    if s.melt_quench:
        if not atoms.pbc.all():
            raise ValueError(f"structures.{name}: melt_quench of atoms periodic along {periodicity(atoms)}, expected XYZ.")
        atoms = melt_quench(f"structures.{name}", atoms, s.melt_quench, rng)
    _distort(atoms, s, rng)
    atoms = wrap_as_cp2k(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
    atoms.positions = np.round(atoms.positions, POSITION_DECIMALS)
    atoms.info |= {name: value for name in ("charge", "multiplicity") if (value := getattr(s, name))}
    _check(f"structures.{name} number {int(number)}", atoms, material)
    return atoms


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


def with_vacuum(atoms: Atoms, vacuum_angstrom: float) -> Atoms:
    """Give a slab or a wire cell vectors along its open directions, and put the atoms into the middle.

    They are perpendicular to the periodic vectors and to each other, and as long as twice the extent of the atoms plus
    `vacuum_angstrom`: CP2K cuts the Coulomb interaction off at half of that, so that no image of the atoms is felt.
    """
    atoms, cell = atoms.copy(), atoms.cell.complete().array
    axes = [*np.flatnonzero(atoms.pbc), *np.flatnonzero(~atoms.pbc)]
    across = np.linalg.qr(cell[axes].T)[0].T  # each row is perpendicular to the vectors of the rows before
    for row, axis in enumerate(axes):
        if atoms.pbc[axis]:
            continue
        normal = across[row] * np.sign(across[row] @ cell[axis])
        heights = atoms.positions @ normal
        cell[axis] = normal * (2 * np.ptp(heights) + vacuum_angstrom)
        atoms.positions += (np.ptp(heights) + vacuum_angstrom / 2 - (heights.max() + heights.min()) / 2) * normal
    atoms.set_cell(cell)
    return atoms


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


def melt_quench(where: str, atoms: Atoms, settings: MeltQuench, rng: np.random.Generator) -> Atoms:
    """Make an amorphous structure of the same atoms and cell (or density): random packing, melt, linear quench, relaxation.

    Langevin dynamics (ASE) at constant volume uses the forces of any ASE calculator. The packing draws positions at random and
    keeps each that is farther than 0.7 of the mean distance from those before. The melt starts from there, so that nothing of
    the crystal is left however short the melt is. Raises ValueError if the calculator cannot be loaded or the atoms fly apart.
    """
    calculator = _calculator(where, settings)
    atoms = Atoms(atoms.numbers, cell=atoms.cell, pbc=True)
    if settings.density_g_cm3:
        density = (
            atoms.get_masses().sum() / atoms.get_volume() * 1.66053906660
        )  # Dalton per cubic Angstrom in g/cm^3 (CODATA 2018)
        atoms.set_cell(atoms.cell * (density / settings.density_g_cm3) ** (1 / 3))
    atoms.positions = _random_packing(atoms, rng)
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


def _calculator(where: str, settings: MeltQuench) -> Calculator:
    module, _, name = settings.calculator.rpartition(".")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return getattr(importlib.import_module(module), name)(**settings.arguments)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where}.melt_quench.calculator: {settings.calculator} cannot be had ({type(error).__name__}: {error}). Expected "
            "the dotted path of an ASE calculator that is installed; CHGNet: pip install hamscale[md]."
        ) from None


def _random_packing(atoms: Atoms, rng: np.random.Generator) -> np.ndarray:
    """Return positions no two of which are closer than 0.7 (V/N)^(1/3), periodic images included.

    The distance is reduced where an atom does not fit.
    """
    cell, distance = np.asarray(atoms.cell), 0.7 * (atoms.get_volume() / len(atoms)) ** (1 / 3)
    shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3) @ cell
    placed = np.empty((0, 3))
    for _ in range(len(atoms)):
        for attempt in range(3000):
            candidate = rng.random(3) @ cell
            images = (placed[:, None] + shifts - candidate).reshape(-1, 3)
            if not len(images) or (images**2).sum(1).min() > (distance * 0.999**attempt) ** 2:
                break
        placed = np.concatenate([placed, candidate[None]])
    return placed


def _distort(atoms: Atoms, s: StructureSet, rng: np.random.Generator) -> None:
    if s.strain and atoms.pbc.any():
        strain = rng.normal(0, s.strain, (3, 3))
        strain = (strain + strain.T) / 2
        if not atoms.pbc.all():  # a slab is strained in its plane, a wire along its axis
            along = np.linalg.qr(np.asarray(atoms.cell)[atoms.pbc].T)[0]
            strain = along @ along.T @ strain @ along @ along.T
        atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    if s.rattle_angstrom:
        atoms.positions += rng.normal(0, s.rattle_angstrom, (len(atoms), 3))


def wrap_as_cp2k(atoms: Atoms) -> Atoms:
    """Put atoms where CP2K puts them: at fractions f - ANINT(f), in [-1/2, 1/2], along periodic directions.

    CP2K counts the cells of its H(R) from there. An atom at exactly 1/2 may round either way. If an atom lies within 1e-6 of
    1/2, all atoms are therefore first shifted together, by the same small step for the same structure. The positions before the
    first wrapping are kept in the array GIVEN.
    """
    if not atoms.pbc.any():
        return atoms
    atoms = atoms.copy()
    if given_cells(atoms) is None:
        atoms.set_array(GIVEN, atoms.positions.copy(), float, (3,))
    fractions = atoms.cell.scaled_positions(atoms.positions)
    for axis in np.flatnonzero(atoms.pbc):
        f = fractions[:, axis]
        while (np.abs(np.abs(f - np.round(f)) - 0.5) < 1e-6).any():
            f += 1.234e-3
        fractions[:, axis] = f - np.trunc(f + np.copysign(0.5, f))
    atoms.positions = fractions @ np.asarray(atoms.cell)
    return atoms


def given_cells(atoms: Atoms) -> np.ndarray | None:
    """Return the number of cells between each atom and its place in the user's file, (A, 3) integers.

    Returns None if that is not known: the atoms were never wrapped, or were moved, repeated or strained since.
    """
    if GIVEN not in atoms.arrays:
        return None
    moved = atoms.cell.scaled_positions(atoms.arrays[GIVEN] - atoms.positions)
    moved -= moved[:1] - np.round(moved[:1])  # removes the small step by which all atoms were shifted
    cells = np.round(moved)
    # files hold positions to 8 decimals, so the fractions are not exact
    return cells.astype(np.int64) if np.abs(moved - cells).max(initial=0.0) < 1e-6 else None


def charge_of(atoms: Atoms) -> int:
    """Return the charge of a structure in units of the elementary charge: `charge` of atoms.info, zero if it is not there.

    Raises ValueError if it is not an integer.
    """
    return _integer(atoms, "charge", 0)


def multiplicity_of(atoms: Atoms) -> int | None:
    """Return 2S+1 of a structure, `multiplicity` of atoms.info; None if it is not said.

    Raises ValueError if it is not an integer.
    """
    return _integer(atoms, "multiplicity", 0) or None


def _integer(atoms: Atoms, name: str, default: int) -> int:
    found = atoms.info.get(name, default)
    if not isinstance(found, (int, float, np.integer, np.floating)) or found != int(found):
        raise ValueError(f"{name} of the structure is {found!r}, expected an integer. Correct it in its file.")
    return int(found)


def kpoint_counts(atoms: Atoms, counts: tuple[int, int, int], length_angstrom: float | None) -> tuple[int, int, int]:
    """Return the number of grid points along each cell vector: `counts`, or, with a length, round(length / |a|).

    It is one along a direction that is not periodic, and at least one along the others.
    """
    if length_angstrom is not None:
        lengths = np.where(atoms.pbc, atoms.cell.lengths(), np.inf)
        counts = tuple(max(1, round(length_angstrom / length)) for length in lengths)
    a, b, c = (n if periodic else 1 for n, periodic in zip(counts, atoms.pbc))
    return a, b, c


def k_grid(size: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return a Gamma-centred grid with one of each k and -k: points (K, 3) in fractions and weights (K,) that sum to one."""
    size = np.asarray(size)
    index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).reshape(-1, 3)
    key = index @ [size[1] * size[2], size[2], 1]
    opposite = (-index % size) @ [size[1] * size[2], size[2], 1]
    keep = key <= opposite
    weights = np.where(key == opposite, 1, 2)[keep]
    points = index[keep] / size
    return points - np.round(points - 1e-9), weights / weights.sum()


def random_kpoints(atoms: Atoms, count: int) -> np.ndarray:
    """Return random k-points, the same at every call, (count, 3) in fractions; the Gamma point of a molecule.

    They are zero along directions that are not periodic.
    """
    return np.random.default_rng(0).random((count, 3)) * atoms.pbc if atoms.pbc.any() else np.zeros((1, 3))


def periodicity(atoms: Atoms) -> str:
    """Return the directions in which atoms are periodic as CP2K calls them: XYZ, XY, X, ..., or NONE."""
    return "".join(axis for axis, periodic in zip("XYZ", atoms.pbc) if periodic) or "NONE"


def longest_period(atoms: Atoms) -> float:
    """Return the length of the longest periodic cell vector in Angstrom, zero for a molecule."""
    return float((atoms.cell.lengths() * atoms.pbc).max())


def plane_distances(cell: Cell) -> np.ndarray:
    """Return the distances of the lattice planes along each cell vector, (3,), in Angstrom."""
    return 1 / np.linalg.norm(cell.reciprocal(), axis=1)


def _check(where: str, atoms: Atoms, material: Material) -> None:
    unknown = sorted(set(atoms.get_chemical_symbols()) - set(material.species))
    if unknown:
        raise ValueError(
            f"{where}: holds {', '.join(unknown)}, but species are {', '.join(material.species)}. Add them to species."
        )
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{where}: a position is not a number.")
    check_distances(where, atoms)


def check_distances(where: str, atoms: Atoms) -> None:
    """Raise ValueError if two atoms (or an atom and its image) are closer than 0.5 A."""
    i, j, d = neighbor_list("ijd", atoms, MINIMUM_DISTANCE_ANGSTROM)
    if len(d):
        raise ValueError(
            f"{where}: atoms {i[0]} and {j[0]} are {d[0]:.3f} A apart, expected at least {MINIMUM_DISTANCE_ANGSTROM} A. "
            "Use a smaller rattle or mend the structure."
        )


def write_structure_file(path: str | Path, atoms: Atoms) -> None:
    """Write extxyz atomically. It holds 8 decimals of positions, to which `build_structure` rounds."""
    with atomic(path) as temporary:
        ase.io.write(temporary, atoms, format="extxyz", write_results=False)


def read_structure_file(path: str | Path, frame: int | None = None) -> Atoms:
    """Read one structure from any file that ASE reads. frame: index of the structure in a trajectory, from 0.

    Raises ValueError as `read_frames` does, if there are several frames and none was chosen, and if there is no such frame.
    """
    frames = read_frames(path)
    if frame is None and len(frames) > 1:
        raise ValueError(
            f"{path}: holds {len(frames)} structures, expected one. Choose one by --frame 0 to {len(frames) - 1}, or write "
            "each to a file of its own."
        )
    if not 0 <= (frame or 0) < len(frames):
        raise ValueError(f"{path}: no frame {frame}, it holds {len(frames)}. Choose one by --frame 0 to {len(frames) - 1}.")
    return frames[frame or 0]


def read_frames(path: str | Path) -> list[Atoms]:
    """Read all structures of a file that ASE reads.

    Raises ValueError if the file is missing or ASE cannot read it, and if a site is shared by elements or partly empty: ASE
    would keep only the element with the largest share.
    """
    try:
        frames = ase.io.read(path, index=":", format="extxyz" if str(path).endswith(".extxyz") else None)
    except Exception as error:  # ASE's readers raise exceptions of any type
        raise ValueError(
            f"{path}: not a structure ASE reads ({type(error).__name__}: {error}). Expected extxyz, CIF, ..."
        ) from None
    assert isinstance(frames, list), "ASE reads a list with the index ':'"
    for atoms in frames:
        # for every kind of site ASE lists the elements that share it, once for each of these elements
        kinds = {tuple(sorted(shares.items())) for shares in atoms.info.get("occupancy", {}).values()}
        shared = [kind for kind in sorted(kinds) if len(kind) > 1 or kind[0][1] < 1]
        if shared:
            told = "; ".join(", ".join(f"{share:g} {symbol}" for symbol, share in kind) for kind in shared)
            raise ValueError(
                f"{path}: sites are shared by elements or partly empty ({told}), expected one atom on every site. Write the "
                "file with one element on such sites, and let `decorate` of a material give them to others and to vacancies at "
                "random (docs/new_material.md)."
            )
    return frames
