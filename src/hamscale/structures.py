"""Read, write and wrap structures, and tell what follows from their cells and the directions in which they are periodic."""

import io
import logging
import re
from math import ceil, floor
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.data import chemical_symbols
from ase.io.formats import filetype
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree

from .files import atomic

log = logging.getLogger(__name__)

GIVEN = "given_positions"  # array of wrapped Atoms, (A, 3) Angstrom: the positions in the user's file
MINIMUM_DISTANCE_ANGSTROM = 0.5
SAME_ANGSTROM = 1e-3  # two structures of one calculation agree to the decimals of their files
LARGEST_ANGSTROM = 1e6  # of a coordinate or a cell vector; beyond it 8 decimals are no longer exact
LABELS = re.compile(r"^(\s*[A-Z][a-z]?)\d+(?=\s)", re.M)  # Hf1, O2: symbols with a number behind, at the start of lines
PLANE_ANGSTROM = 0.5  # an atom that was drawn so far beyond an end of a device stays there
PLACE_ANGSTROM = 1e-5  # the same where nobody knows where atoms were drawn: a plane at the corner is not torn apart
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


def as_drawn(atoms: Atoms, given: np.ndarray | None, axis: int, origin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return cells (A, 3) that move atoms to where the user's file has them, along the axis within one cell, and their places.

    given (A, 3): cells between each atom and its place in that file, None if that is not known. origin: where the cell begins
    along the axis, in fractions of it; places (A,) are such fractions from there. CP2K wraps atoms to [-1/2, 1/2], which would
    cut a device drawn from 0 to L in its middle. An atom that was drawn up to PLANE_ANGSTROM beyond an end stays at that end,
    with the plane from which it was displaced.
    """
    cells = np.zeros((len(atoms), 3), np.int64) if given is None else given.copy()
    place = atoms.cell.scaled_positions(atoms.positions)[:, axis] + cells[:, axis] - origin
    margin = (PLACE_ANGSTROM if given is None else PLANE_ANGSTROM) / atoms.cell.lengths()[axis]
    outside = (place < -margin) | (place >= 1 + margin)
    cells[outside, axis] -= np.floor(place[outside]).astype(np.int64)
    place[outside] -= np.floor(place[outside])
    return cells, place


def images_between(
    atoms: Atoms, ours: np.ndarray, theirs: np.ndarray, apart: np.ndarray, axis: int
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Find the image of each atom of a block among those of another block of a device.

    ours (N,), theirs (M,): their atoms. apart (N, M, 3): from each atom of ours, moved along the axis to the other block, to
    each of theirs, in fractions of the cell. Returns the place of each image in `theirs` (N,), the cells across the axis that
    lie between (N, 3), and the distance of the worst (Angstrom); None if the blocks have different atoms.
    """
    if sorted(atoms.numbers[ours]) != sorted(atoms.numbers[theirs]):
        return None
    moved = np.round(apart) * (np.arange(3) != axis)
    distances = np.linalg.norm((apart - moved) @ np.asarray(atoms.cell), axis=2)
    distances[atoms.numbers[ours][:, None] != atoms.numbers[theirs]] = np.inf
    image, rows = distances.argmin(1), np.arange(len(ours))
    if len(np.unique(image)) < len(image):
        return None
    return image, moved[rows, image].astype(np.int64), float(distances[rows, image].max())


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
    if not isinstance(found, (int, float, np.integer, np.floating)) or not np.isfinite(found) or found != int(found):
        raise ValueError(f"{name} of the structure is {found}, expected an integer. Correct it in its file.")
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


def check_structure(where: str, atoms: Atoms) -> None:
    """Raise ValueError if there are no atoms, or one of no element, or a coordinate or the cell is not what it can be.

    Coordinates and cell vectors are to be finite, charge and multiplicity integers, and the lattice planes along the vectors at
    least 0.5 A apart, which they are not where vectors lie in a plane.
    """
    if not len(atoms):
        raise ValueError(f"{where}: holds no atoms, expected at least one.")
    wrong = np.flatnonzero((atoms.numbers < 1) | (atoms.numbers >= len(chemical_symbols)))
    if len(wrong):
        raise ValueError(f"{where}: atom {wrong[0]} has the atomic number {atoms.numbers[wrong[0]]}, expected an element.")
    for name, values in (("position of an atom", atoms.positions), ("cell", atoms.cell.array)):
        unfit = ~(np.abs(values) <= LARGEST_ANGSTROM).all(1)  # also of NaN
        if unfit.any():
            row = int(unfit.argmax())
            raise ValueError(
                f"{where}: {name} ({row}) is {values[row].tolist()} A, expected numbers up to {LARGEST_ANGSTROM:g}. Correct it "
                "in the file."
            )
    lengths = atoms.cell.lengths()
    if (missing := atoms.pbc & (lengths == 0)).any():
        axes = ", ".join("abc"[axis] for axis in np.flatnonzero(missing))
        raise ValueError(
            f"{where}: periodic along {axes}, where the cell vector is zero. Give a cell, or no periodicity there."
        )
    given = atoms.cell.array[lengths > 0]
    planes = 1 / np.linalg.norm(np.linalg.pinv(given), axis=0) if np.linalg.matrix_rank(given) == len(given) else np.zeros(1)
    if planes.min(initial=np.inf) < MINIMUM_DISTANCE_ANGSTROM:
        raise ValueError(
            f"{where}: lattice planes of the cell {np.round(atoms.cell.array, 4).tolist()} A are {planes.min():.2g} A apart, "
            f"expected at least {MINIMUM_DISTANCE_ANGSTROM}. Its vectors lie in a plane, or nearly; give the right ones, or "
            "others of the same lattice that are less oblique."
        )
    try:
        charge_of(atoms), multiplicity_of(atoms)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_same_structure(atoms: Atoms, other: Atoms) -> None:
    """Raise ValueError if two structures differ in their atoms, cell or periodicity; atoms may differ by cell vectors."""
    if not np.array_equal(atoms.numbers, other.numbers):
        raise ValueError(
            f"S is of {other.get_chemical_formula()}, the structure is {atoms.get_chemical_formula()}, or their atoms stand in "
            "another order."
        )
    if other.pbc.any() and not atoms.pbc.any():  # a file of a molecule may say that it repeats
        raise ValueError(f"S is periodic along {periodicity(other)}, the structure is not periodic.")
    apart = atoms.positions - other.positions
    if other.pbc.any():
        if (off := np.abs(atoms.cell.array - other.cell.array).max()) > SAME_ANGSTROM:
            raise ValueError(f"S is of another cell than that of the structure: they differ by up to {off:.1e} A.")
        apart -= np.round(other.cell.scaled_positions(apart)) @ other.cell.array
    else:
        apart -= apart.mean(0)
    if (off := np.linalg.norm(apart, axis=1)).max() > SAME_ANGSTROM:
        raise ValueError(f"S is of another structure: atom {off.argmax()} stands {off.max():.1e} A from where it is in S.")


def images(fractions: np.ndarray, periodic: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the atoms and their images within a box, low (3,) to high (3,) in fractions: atoms (N,) and cells (N, 3)."""
    index, shift = np.arange(len(fractions)), np.zeros((len(fractions), 3), np.int64)
    for axis in range(3):
        along, copies = fractions[index, axis], []
        span = (low[axis] - along.max(initial=-np.inf), high[axis] - along.min(initial=np.inf))
        if not len(index) or not np.isfinite(span).all():  # nothing is near, or there is no owned atom
            return index[:0], shift[:0]
        for n in range(ceil(span[0]), floor(span[1]) + 1) if periodic[axis] else (0,):
            inside = (along + n >= low[axis]) & (along + n <= high[axis])
            copies.append((index[inside], shift[inside] + n * (np.arange(3) == axis)))
        index, shift = (np.concatenate(parts) for parts in zip(*copies))
    return index, shift


def check_distances(where: str, atoms: Atoms) -> None:
    """Raise ValueError if two atoms (or an atom and an image of another) are closer than 0.5 A, and as `check_structure`."""
    check_structure(where, atoms)
    cell = atoms.cell.complete()
    fractions = cell.scaled_positions(atoms.positions)
    fractions -= np.where(atoms.pbc, np.floor(fractions), 0)
    margin = MINIMUM_DISTANCE_ANGSTROM / plane_distances(cell)
    # beyond the upper faces the images of the atoms at the lower ones
    index, shift = images(fractions, atoms.pbc, fractions.min(0), np.where(atoms.pbc, 1, fractions.max(0)) + margin)
    points = (fractions[index] + shift) @ cell.array
    at_one, first = np.unique(np.round(points, POSITION_DECIMALS), axis=0, return_index=True)
    if len(at_one) < len(points):  # many atoms at one point, as in a file of zeros, would take the tree for ever
        second = np.setdiff1d(np.arange(len(points)), first)[0]
        first, distance = np.flatnonzero((np.abs(points - points[second]) < 1e-7).all(1))[0], 0.0
    else:
        distances, nearest = cKDTree(points).query(points, 2, distance_upper_bound=MINIMUM_DISTANCE_ANGSTROM)
        first = distances[:, 1].argmin()
        distance, second = distances[first, 1], nearest[first, 1]
    if distance < MINIMUM_DISTANCE_ANGSTROM:
        i, j = sorted((index[first], index[second]))
        raise ValueError(
            f"{where}: atoms {i} and {j} are {distance:.3f} A apart, expected at least {MINIMUM_DISTANCE_ANGSTROM} A. Use a "
            "smaller rattle or mend the structure."
        )


def write_structure_file(path: str | Path, atoms: Atoms) -> None:
    """Write extxyz atomically. It holds 8 decimals of positions, to which `build_structure` rounds."""
    with atomic(path) as temporary:
        ase.io.write(temporary, atoms, format="extxyz", write_results=False)


def read_structure_file(path: str | Path, frame: int | None = None) -> Atoms:
    """Read one structure from any file that ASE reads. frame: index of the structure in a trajectory, from 0.

    Raises ValueError as `read_frames` does, if there are several frames and none was chosen, if there is no such frame, and if
    two atoms are closer than 0.5 A.
    """
    frames = read_frames(path)
    if frame is None and len(frames) > 1:
        raise ValueError(
            f"{path}: holds {len(frames)} structures, expected one. Choose one by --frame 0 to {len(frames) - 1}, or write "
            "each to a file of its own."
        )
    if not 0 <= (frame or 0) < len(frames):
        raise ValueError(f"{path}: no frame {frame}, it holds {len(frames)}. Choose one by --frame 0 to {len(frames) - 1}.")
    atoms = frames[frame or 0]
    check_distances(str(path), atoms)
    return atoms


def read_frames(path: str | Path) -> list[Atoms]:
    """Read all structures of a file that ASE reads.

    Raises ValueError if the file is missing, empty or ASE cannot read it, if a structure is none (`check_structure`), and if a
    site is shared by elements or partly empty: ASE would keep only the element with the largest share.
    """
    frames = _frames(Path(path))
    if not frames:
        raise ValueError(f"{path}: holds no structure, expected at least one.")
    for number, atoms in enumerate(frames):
        where = f"{path}, frame {number}" if len(frames) > 1 else str(path)
        check_structure(where, atoms)
        given = atoms.arrays.get(GIVEN)
        if given is not None and not (given.shape == (len(atoms), 3) and given.dtype == float and np.isfinite(given).all()):
            raise ValueError(f"{where}: {GIVEN} are not three numbers for each atom. Correct the column, or leave it out.")
        # for every kind of site ASE lists the elements that share it, once for each of these elements
        kinds = {tuple(sorted(shares.items())) for shares in _occupancies(where, atoms)}
        shared = [kind for kind in sorted(kinds) if len(kind) > 1 or kind[0][1] < 1]
        if shared:
            told = "; ".join(", ".join(f"{share:g} {symbol}" for symbol, share in kind) for kind in shared)
            raise ValueError(
                f"{path}: sites are shared by elements or partly empty ({told}), expected one atom on every site. Write the "
                "file with one element on such sites, and let `decorate` of a material give them to others and to vacancies at "
                "random (docs/howto/disorder.md)."
            )
    return frames


def _occupancies(where: str, atoms: Atoms) -> list[dict[str, float]]:
    """Return what a file says of the shares of elements in sites. Raises ValueError if it is not that."""
    found = atoms.info.get("occupancy", {})
    sites = list(found.values()) if isinstance(found, dict) else [found]
    for site in sites:
        shares = site.items() if isinstance(site, dict) else [(site, None)]
        if not shares or not all(isinstance(name, str) and isinstance(share, (int, float)) for name, share in shares):
            raise ValueError(f"{where}: occupancy is {site!r:.80}, expected the shares of elements in a site.")
    return sites


def _frames(path: Path) -> list[Atoms]:
    """Read a file through ASE; labels of an xyz file such as Hf1, which ASE does not know, stand for their elements."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a structure that ASE reads: extxyz, CIF, ...")
    try:
        # an absolute path, because ASE takes some names for addresses of data bases; a structure may have @ in its name
        kind = "extxyz" if path.suffix == ".extxyz" else filetype(str(path.absolute()))
        if of_xyz := kind in ("xyz", "extxyz"):
            _check_counts(path)
        try:
            found = ase.io.read(path.absolute(), ":", kind, do_not_split_by_at_sign=True)
        except KeyError:
            text = path.read_text()
            if not (of_xyz and (labels := sorted({label[0].strip() for label in LABELS.finditer(text)}))):
                raise
            found = ase.io.read(io.StringIO(LABELS.sub(r"\1", text)), ":", "extxyz")
            log.warning(f"{path}: atoms are called {', '.join(labels[:5])}, and taken for the elements without the number.")
    except Exception as error:  # ASE's readers raise exceptions of any type
        told = "an atom is called" if isinstance(error, KeyError) else f"{type(error).__name__}:"
        raise ValueError(
            f"{path}: not a structure ASE reads ({told} {' '.join(str(error).split()):.200}). Expected extxyz, CIF, ..."
        ) from None
    assert isinstance(found, list), "ASE reads a list with the index ':'"
    return found


def _check_counts(path: Path) -> None:
    """Raise ValueError if a frame of an xyz file has fewer lines than atoms: ASE would look for all of them, for ever."""
    lines, place = path.read_bytes().splitlines(), 0
    while place < len(lines) and re.fullmatch(rb"[\d_+]{1,4000}", lines[place].strip()):
        count = int(lines[place])
        if count > len(lines) - place - 2:
            raise ValueError(f"line {place + 1} says {count} atoms, {len(lines) - place - 2} lines follow; was it cut short?")
        place += 2 + count
        while place < len(lines) and lines[place].lstrip().startswith(b"VEC"):
            place += 1
