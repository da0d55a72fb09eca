"""Structures of a material: built or read through ASE, strained, rattled, tiled; deterministic by seed."""

import hashlib

import ase.build
import ase.io
import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal

from .config import Material, StructureSet
from .files import atomic

MINIMUM_DISTANCE_ANGSTROM = 0.5
POSITION_DECIMALS = 8  # what extxyz holds: rounded here, so that a structure and its file are the same


def build_structures(material: Material) -> dict[str, Atoms]:
    """All structures of a material by identifier, each as `build_structure` makes it."""
    return {identifier: build_structure(material, identifier) for identifier in material.identifiers()}


def build_structure(material: Material, identifier: str) -> Atoms:
    """One structure of a material, SET-NNN, wrapped as CP2K wraps it.

    The same numbers whatever else is built, in any order, on any machine: each structure draws from its own generator, seeded by
    its set's seed, its set's name and its number. Raises ValueError (set, what was found, what was expected).
    """
    return _build(material, identifier, ())


def _build(material: Material, identifier: str, tiles: tuple[str, ...]) -> Atoms:
    if identifier not in material.identifiers():
        raise ValueError(f"no structure {identifier!r}. Structures: {', '.join(material.identifiers())}.")
    name, number = identifier.rsplit("-", 1)
    s = material.structures[name]
    if identifier in tiles:
        raise ValueError(f"structures.{name}: tile.of {s.tile.of!r} leads back to itself.")
    if s.tile:
        frames = [_build(material, s.tile.of, (*tiles, identifier))]
    else:
        frames = _source(name, s)
    if s.file and len(frames) not in (1, s.count):
        raise ValueError(f"structures.{name}: {s.file.path} has {len(frames)} frames, count is {s.count}. Make them equal.")
    atoms = frames[int(number) % len(frames)].repeat(s.repeat)
    if s.box_angstrom:
        atoms.set_cell(np.eye(3) * s.box_angstrom)
        atoms.center()
        atoms.pbc = False
    elif atoms.cell.rank < 3:
        raise ValueError(
            f"structures.{name}: the cell has rank {atoms.cell.rank}, expected 3. Give box_angstrom for a molecule."
        )
    key = f"{s.seed} {name} {int(number)}".encode()
    _distort(atoms, s, np.random.default_rng(np.frombuffer(hashlib.sha256(key).digest(), np.uint32)))
    atoms = wrap_as_cp2k(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
    atoms.positions = np.round(atoms.positions, POSITION_DECIMALS)
    _check(f"structures.{name} number {int(number)}", atoms, material)
    return atoms


def _source(name: str, s: StructureSet) -> list[Atoms]:
    try:
        if s.file:
            return ase.io.read(s.file.path, index=":")
        if s.builder:
            return [getattr(ase.build, s.builder.name)(**s.builder.arguments)]
        symbols, *coordinates = zip(*s.spacegroup.basis)
        return [crystal(symbols, list(zip(*coordinates)), spacegroup=s.spacegroup.spacegroup, cellpar=s.spacegroup.cellpar)]
    except ValueError:
        raise
    except Exception as error:  # ASE raises whatever its readers and builders meet
        raise ValueError(f"structures.{name}: ASE could not make it: {type(error).__name__}: {error}") from None


def _distort(atoms: Atoms, s: StructureSet, rng: np.random.Generator):
    if s.strain and atoms.pbc.any():
        strain = rng.normal(0, s.strain, (3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    if s.rattle_angstrom:
        atoms.positions += rng.normal(0, s.rattle_angstrom, (len(atoms), 3))


def wrap_as_cp2k(atoms: Atoms) -> Atoms:
    """Put atoms where CP2K puts them: fractions f - ANINT(f), in [-1/2, 1/2], along periodic directions.

    CP2K counts the cells of its H(R) from there. An atom at exactly 1/2 may round either way, so where one lies within 1e-6 of
    it all atoms are first shifted together, by the same small step for the same structure.
    """
    if not atoms.pbc.any():
        return atoms
    atoms = atoms.copy()
    fractions = atoms.cell.scaled_positions(atoms.positions)
    for axis in np.flatnonzero(atoms.pbc):
        f = fractions[:, axis]
        while (np.abs(np.abs(f - np.round(f)) - 0.5) < 1e-6).any():
            f += 1.234e-3
        fractions[:, axis] = f - np.trunc(f + np.copysign(0.5, f))
    atoms.positions = fractions @ np.asarray(atoms.cell)
    return atoms


def _check(where: str, atoms: Atoms, material: Material):
    unknown = sorted(set(atoms.get_chemical_symbols()) - set(material.species))
    if unknown:
        raise ValueError(
            f"{where}: holds {', '.join(unknown)}, but species are {', '.join(material.species)}. Add them to species."
        )
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{where}: a position is not a number.")
    if atoms.pbc.any() and not atoms.pbc.all():
        raise ValueError(
            f"{where}: periodic along {atoms.pbc.tolist()}. DFT here is periodic in all directions or none: "
            "give a slab a cell with vacuum and pbc along all three."
        )
    check_distances(where, atoms)


def check_distances(where: str, atoms: Atoms):
    """Raise ValueError if two atoms (or an atom and its image) are closer than 0.5 A."""
    i, j, d = neighbor_list("ijd", atoms, MINIMUM_DISTANCE_ANGSTROM)
    if len(d):
        raise ValueError(
            f"{where}: atoms {i[0]} and {j[0]} are {d[0]:.3f} A apart, expected at least {MINIMUM_DISTANCE_ANGSTROM} A. "
            "Use a smaller rattle or mend the structure."
        )


def write_structure_file(path, atoms: Atoms):
    """extxyz, atomically. It holds 8 decimals of positions, to which `build_structure` rounds."""
    with atomic(path) as temporary:
        ase.io.write(temporary, atoms, format="extxyz", write_results=False)


def read_structure_file(path) -> Atoms:
    """Raises ValueError if the file is missing or is no extxyz."""
    try:
        return ase.io.read(path, format="extxyz")
    except Exception as error:
        raise ValueError(f"{path}: not a structure ASE reads ({type(error).__name__}: {error}). Expected extxyz.") from None
