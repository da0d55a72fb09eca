"""Read, write and wrap structures, and tell what follows from their cells and the directions in which they are periodic."""

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.neighborlist import neighbor_list
from numpy.typing import ArrayLike

from .files import atomic

GIVEN = "given_positions"  # array of wrapped Atoms, (A, 3) Angstrom: the positions in the user's file
MINIMUM_DISTANCE_ANGSTROM = 0.5
POSITION_DECIMALS = 8  # extxyz holds so many; positions are rounded to them, so that a structure equals its file


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
                "random (docs/howto/disorder.md)."
            )
    return frames
