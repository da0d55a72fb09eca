"""Cut an open device out of a periodic structure: choose its ends and its blocks, and check that its ends repeat.

For the settings of transport codes, choose the k-points across it and the energies of a transmission, too.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from ase import Atoms

from .. import structures
from ..analysis.devices import END_ANGSTROM, END_MEV
from ..units import hartree_to_ev, hartree_to_mev
from .stream import Rows, Stored

FACE_ANGSTROM = 1e-3  # least room between the outermost atoms of a cell and their images
INNER = "the block next to it"
NAMES = ("hamiltonian", "overlap")
GRID_LENGTH_ANGSTROM = 20.0  # k-points across a device: this over |a|, as where band edges are found
BEYOND_EV = 2.0  # the window of energies reaches so far beyond the band edges, in a metal beyond the Fermi level
STEP_EV = 0.01


@dataclass
class Device:
    """Copies of a structure along an axis, `repeat` of them, cut into blocks, which are slabs of equal length.

    block, first  # (repeat, A) | of every copy of every atom: its block, the first of its orbitals in the device
    atoms: the atoms of the device, ordered by block, copy and atom. block_sizes (blocks,): numbers of orbitals.
    dropped: name -> [elements, largest, sum, sum over all of the device] of |H| (Hartree) and |S| beyond neighbouring blocks.
    """

    axis: int
    repeat: int
    block: np.ndarray
    first: np.ndarray
    atoms: Atoms
    block_sizes: np.ndarray
    dropped: dict = field(default_factory=lambda: {name: [0, 0.0, 0.0, 0.0] for name in NAMES})

    @property
    def n_orbitals(self) -> int:
        return int(self.block_sizes.sum())

    def elements(self, stored: Stored, rows: Rows) -> Iterator[tuple]:
        """Yield the elements of the device by transverse cell; those beyond neighbouring blocks are counted and left out."""
        i, j, along = rows.pairs[:, 0], rows.pairs[:, 1], rows.pairs[:, 2 + self.axis]
        transverse = rows.pairs[:, 2:].copy()
        transverse[:, self.axis] = 0
        for copy in range(self.repeat):
            other = copy + along  # the copy that atom j is in
            inside = (other >= 0) & (other < self.repeat)
            other = np.where(inside, other, 0)
            near = inside & (np.abs(self.block[copy, i] - self.block[other, j]) <= 1)
            far = (inside & ~near)[rows.pair]
            keep = near[rows.pair]
            for name in NAMES:
                values, dropped = np.abs(getattr(rows, name)), self.dropped[name]
                dropped[0] += int(np.count_nonzero(values[far]))
                dropped[1] = max(dropped[1], float(values[far].max(initial=0.0)))
                dropped[2] += float(values[far].sum())
                dropped[3] += float(values[far].sum() + values[keep].sum())
            row = rows.row + (self.first[copy, i] - stored.start[i])[rows.pair]
            column = rows.column + (self.first[other, j] - stored.start[j])[rows.pair]
            yield transverse[rows.pair[keep]], row[keep], column[keep], rows.hamiltonian[keep], rows.overlap[keep]


def _axis(stored: Stored, transport: str) -> int:
    if transport not in ("a", "b", "c"):
        raise ValueError(f"--transport is {transport!r}, expected an axis of the cell: a, b or c.")
    axis = "abc".index(transport)
    if not stored.atoms.pbc[axis]:
        raise ValueError(
            f"--transport is {transport}, but the structure is periodic along {structures.periodicity(stored.atoms)}. Choose a "
            "direction in which it is periodic, or export it without --transport."
        )
    return axis


def as_drawn(stored: Stored, transport: str, origin: float | None = None) -> Stored:
    """Put atoms where the user's file has them, and along the transport axis into the cell that begins at origin.

    origin: fraction of the cell along the axis; by default 0, the corner of the user's cell (`structures.as_drawn`).
    Raises ValueError if the axis is not a periodic one.
    """
    cells, _ = structures.as_drawn(stored.atoms, stored.given, _axis(stored, transport), origin or 0.0)
    return stored.moved(cells)


class Cutting(TypedDict, total=False):
    """How a device is cut, if not as usual.

    repeat: copies of the structure along the axis. blocks: their number; default: the most without a loss. origin: where the
    device begins, in fractions of the user's cell along the axis; default 0, its corner (`as_drawn`). allow_mismatch: whether
    ends may fail to repeat (`end_mismatches`).
    """

    repeat: int
    blocks: int | None
    origin: float | None
    allow_mismatch: bool


def cut(
    stored: Stored,
    transport: str,
    repeat: int = 1,
    blocks: int | None = None,
    origin: float | None = None,
    allow_mismatch: bool = False,
) -> tuple[Stored, Device, list[str]]:
    """Return a structure as its device is drawn, the device, and lines that say how its ends repeat; options as `Cutting`.

    Raises ValueError as `tile` and `check_ends` do.
    """
    stored = as_drawn(stored, transport, origin)
    axis = "abc".index(transport)
    stored = gathered(stored, [other for other in np.flatnonzero(stored.atoms.pbc).tolist() if other != axis])
    device = tile(stored, transport, repeat, blocks, origin or 0.0)
    return stored, device, check_ends(stored, device, allow_mismatch)


def k_points(stored: Stored, axis: int) -> list[int]:
    """Return the divisions of a grid of k-points across an axis: GRID_LENGTH_ANGSTROM over |a| where cells couple, else one."""
    counts, reach = structures.kpoint_counts(stored.atoms, (1, 1, 1), GRID_LENGTH_ANGSTROM), np.abs(stored.pairs[:, 2:]).max(0)
    return [n if other != axis and reach[other] > 0 else 1 for other, n in enumerate(counts)]


def energies(stored: Stored) -> tuple[list[float], dict[str, float]]:
    """Return the window of energies of a transmission and the levels of the contacts, fermi_level and mid_gap, in eV.

    Both are empty, with a warning, if the file does not know its band edges.
    """
    found = stored.energies_ev()
    middle = found.get("mid_gap", found.get("fermi_level"))
    if middle is None:
        warnings.warn(
            "the file has no band edges, so that energies are missing from the settings. Run `hamscale dos FILE --out "
            "dos.csv`, which stores them, and export again.",
            stacklevel=4,
        )
        return [], {}
    edges = [found.get(name, middle) for name in ("valence_band_maximum", "conduction_band_minimum")]
    window = [float(np.floor(min(edges)) - BEYOND_EV), float(np.ceil(max(edges)) + BEYOND_EV)]
    return window, {"fermi_level": round(found.get("fermi_level", middle), 6), "mid_gap": round(middle, 6)}


def dropped_lines(device: Device) -> list[str]:
    """Say what the blocks of a device are and what was dropped beyond neighbours, line by line, once it is written."""
    lines = [
        f"device of {device.n_orbitals} orbitals in {len(device.block_sizes)} blocks of {device.block_sizes.min()} to "
        f"{device.block_sizes.max()} along {'abc'[device.axis]}; elements across its ends are left to the contacts"
    ]
    for name, (count, largest, total, everything) in device.dropped.items():
        if count:
            scale, unit = (hartree_to_ev(1.0), " eV") if name == "hamiltonian" else (1.0, "")
            lines.append(
                f"dropped beyond neighbouring blocks: {count} elements of the {name}, the largest {largest * scale:.2e}{unit}, "
                f"{total / everything:.2e} of their sum"
            )
        else:
            lines.append(f"beyond neighbouring blocks the {name} is zero")
    return lines


def gathered(stored: Stored, axes: list[int]) -> Stored:
    """Move atoms by whole cells so that along each of these axes they lie within one cell, away from its faces.

    Where they are drawn so, they stay; otherwise the cell is cut in its widest gap between planes of atoms.
    """
    place = stored.atoms.cell.scaled_positions(stored.atoms.positions)
    cells = np.zeros((len(stored.atoms), 3), np.int64)
    for axis in axes:
        margin = FACE_ANGSTROM / stored.atoms.cell.lengths()[axis]
        if np.ptp(place[:, axis]) <= 1 - margin:
            continue
        inside = np.sort(place[:, axis] % 1)
        gaps = np.diff(inside, append=inside[0] + 1)
        cut = inside[gaps.argmax()] + gaps.max() / 2
        cells[:, axis] = -np.floor(place[:, axis] - cut).astype(np.int64)
    return stored.moved(cells) if cells.any() else stored


def tile(stored: Stored, transport: str, repeat: int = 1, blocks: int | None = None, origin: float = 0.0) -> Device:
    """Make a device of `repeat` copies of the structure along an axis, in `blocks` blocks.

    The device begins at `origin`, a fraction of the cell; the atoms must lie in the cell that begins there (`as_drawn`). By
    default it has the most blocks of which only neighbours couple, and if there are several copies each block then holds whole
    ones. If a number of blocks is asked for whose couplings reach further, the elements beyond neighbouring blocks are dropped
    when the device is written.

    Raises ValueError if the axis is not a periodic one, if a block would be empty, or if not even two blocks are possible
    without a loss.
    """
    axis = _axis(stored, transport)
    if repeat < 1:
        raise ValueError(f"--repeat is {repeat}, expected 1 or more.")
    # copy m fills [m, m + 1)
    place = np.arange(repeat)[:, None] + stored.atoms.cell.scaled_positions(stored.atoms.positions)[:, axis] - origin
    i, j, along = stored.pairs[:, 0], stored.pairs[:, 1], stored.pairs[:, 2 + axis]

    def block_of(n: int) -> np.ndarray:
        return np.clip((place * n / repeat).astype(np.int64), 0, n - 1)

    def only_neighbours(block: np.ndarray, n: int) -> bool:
        # across the ends too, as if the device continued: otherwise a contact would couple to more than its neighbour
        for copy in range(repeat):
            further, other = np.divmod(copy + along, repeat)
            if (np.abs(block[other, j] + further * n - block[copy, i]) > 1).any():
                return False
        return True

    reach = float(np.abs(place[0, j] + along - place[0, i]).max(initial=0.0))  # in units of the length of a copy
    if blocks is None:
        most = min(int(repeat / max(reach, 1e-9)) + 1, repeat * len(stored.atoms))
        # blocks of whole copies make the blocks of the contacts equal
        lossless = [
            n
            for n in range(most, 1, -1)
            if (repeat == 1 or repeat % n == 0) and np.unique(block_of(n)).size == n and only_neighbours(block_of(n), n)
        ]
        if not lossless:
            step, length = max(1, int(np.abs(along).max())), stored.atoms.cell.lengths()[axis]
            raise ValueError(
                f"no tiling along {transport}: the file's blocks reach {reach:.2f} cells of {length:.2f} A, expected a device "
                f"twice as long, found {repeat}. Give --repeat {2 * step} (or another multiple of {step}), or --blocks and "
                "lose what is beyond neighbours."
            )
        devices = [_device(stored, axis, repeat, block_of(n)) for n in lossless]
        # devices are in descending order of blocks, so this takes the most blocks of those whose ends repeat
        return min(devices, key=lambda device: _end_distance(stored, device))
    block = block_of(blocks) if blocks >= 1 else np.zeros_like(place, dtype=np.int64)
    if not 2 <= blocks <= repeat * len(stored.atoms) or np.unique(block).size != blocks:
        raise ValueError(
            f"--blocks is {blocks}, expected 2 or more, each with an atom in it: the device has {repeat * len(stored.atoms)} "
            f"atoms along {repeat * stored.atoms.cell.lengths()[axis]:.2f} A. Give fewer blocks, or none for the most without "
            "a loss."
        )
    return _device(stored, axis, repeat, block)


def _device(stored: Stored, axis: int, repeat: int, block: np.ndarray) -> Device:
    """Return the device in which every copy of every atom is in its block, (repeat, A)."""
    copy, atom = np.divmod(np.arange(block.size), len(stored.atoms))
    order = np.lexsort((atom, copy, block.ravel()))
    sizes = stored.orbitals[atom[order]]
    first = np.empty(block.size, np.int64)
    first[order] = np.cumsum(sizes) - sizes
    cell = np.asarray(stored.atoms.cell)
    positions = stored.atoms.positions[atom] + copy[:, None] * cell[axis]
    cell = np.where(np.arange(3)[:, None] == axis, repeat * cell, cell)
    atoms = Atoms(stored.atoms.numbers[atom[order]], positions[order], cell=cell, pbc=stored.atoms.pbc)
    block_sizes = np.bincount(block.ravel(), stored.orbitals[atom]).astype(np.int64)
    return Device(axis, repeat, block, first.reshape(block.shape), atoms, block_sizes)


@dataclass
class EndMismatch:
    """Deviations of the block at an end of a device from another block in which it should repeat.

    side, other: the two blocks, in words. position_angstrom: largest distance of an atom from its image in the other block,
    infinite if the blocks have different atoms. onsite_mev: median difference of the diagonals of H, which a few atoms beside
    the scattering region do not decide. largest_mev: largest difference of any element of H. Both differences are NaN if the
    atoms differ.
    """

    side: str
    other: str
    position_angstrom: float
    onsite_mev: float
    largest_mev: float

    @property
    def repeats(self) -> bool:
        return self.position_angstrom <= END_ANGSTROM and self.onsite_mev <= END_MEV

    def __str__(self) -> str:
        if np.isinf(self.position_angstrom):
            return f"{self.other}: other atoms"
        return (
            f"{self.other}: positions differ by up to {self.position_angstrom:.3f} A, onsite energies by {self.onsite_mev:.1f} "
            f"meV in the median, elements of H by {self.largest_mev:.0f} at most"
        )


def _compared(device: Device) -> list[tuple[str, int, int, str]]:
    """Return which blocks are compared: the side, the block at that end, the other block, and the name of the other block."""
    n = len(device.block_sizes)
    across = [("first", 0, n - 1, "the last block"), ("last", n - 1, 0, "the first block")]
    return across + ([("first", 0, 1, INNER), ("last", n - 1, n - 2, INNER)] if n > 2 else [])


def end_mismatches(stored: Stored, device: Device) -> list[EndMismatch]:
    """Compare the first and the last block of a device with the blocks in which a lead would continue.

    A transport code repeats the block at an end for ever. The block repeats in the device if it equals the block next to it, or
    the block at the other end, which lies on its other side in the periodic structure of the file.
    """
    compared = _compared(device)
    values = _blocks_within(stored, device, {b for _, end, other, _ in compared for b in (end, other)})
    result = []
    for side, end, other, name in compared:
        distance, image = images_of(stored, device, end, other)
        mean, largest = _difference(values[end], values[other], image) if image else (np.nan, np.nan)
        result.append(EndMismatch(side, name, distance, mean, largest))
    return result


def _end_distance(stored: Stored, device: Device) -> tuple[float, float]:
    """Return by how much (Angstrom) atoms of the worse end fail to repeat in the block next to it, and at best anywhere.

    Zero stands for an end that repeats. Devices whose ends repeat next to them come first: transport codes take the coupling
    of these two blocks for that of the lead.
    """
    inner, best = dict.fromkeys(("first", "last"), np.inf), dict.fromkeys(("first", "last"), np.inf)
    neighbours = len(device.block_sizes) == 2  # the blocks at the ends are next to one another
    for side, end, other, name in _compared(device):
        distance = images_of(stored, device, end, other)[0]
        best[side] = min(best[side], distance)
        if neighbours or name == INNER:
            inner[side] = distance
    beside, anywhere = max(inner.values()), max(best.values())
    return beside if beside > END_ANGSTROM else 0.0, anywhere if anywhere > END_ANGSTROM else 0.0


def _blocks_within(stored: Stored, device: Device, chosen: set[int]) -> dict[int, dict]:
    """Return by block: (copy i, atom i, copy j, atom j, transverse cell) -> elements of H in Hartree."""
    found: dict[int, dict] = {b: {} for b in chosen}
    mask = np.isin(device.block, list(chosen))
    for rows in stored.rows():
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows.pair, minlength=len(rows.pairs)))])
        i, j, along = rows.pairs[:, 0], rows.pairs[:, 1], rows.pairs[:, 2 + device.axis]
        transverse = rows.pairs[:, 2:].copy()
        transverse[:, device.axis] = 0
        for copy in range(device.repeat):
            other = copy + along
            inside = (other >= 0) & (other < device.repeat)
            other = np.where(inside, other, 0)
            block = device.block[copy, i]
            for p in np.flatnonzero(inside & mask[copy, i] & (device.block[other, j] == block)):
                key = (copy, int(i[p]), int(other[p]), int(j[p]), *transverse[p].tolist())
                found[int(block[p])][key] = rows.hamiltonian[starts[p] : starts[p + 1]]
    return found


def images_of(stored: Stored, device: Device, end: int, other: int) -> tuple[float, dict]:
    """Move the atoms of a block onto another one and find the image of each.

    Returns the largest distance (Angstrom) to the nearest atom of the same element, and the images, (copy, atom) -> (copy,
    atom, transverse cell). If the blocks have different atoms, the distance is infinite and there are no images.
    """
    ours, theirs = np.argwhere(device.block == end), np.argwhere(device.block == other)
    fractions, along = stored.atoms.cell.scaled_positions(stored.atoms.positions), np.eye(3)[device.axis]
    here, there = (fractions[some[:, 1]] + some[:, :1] * along for some in (ours, theirs))
    apart = there - here[:, None] - (other - end) * device.repeat / len(device.block_sizes) * along
    found = structures.images_between(stored.atoms, ours[:, 1], theirs[:, 1], apart, device.axis)
    if found is None:
        return np.inf, {}
    image, cells, largest = found
    return largest, {tuple(mine): (*theirs[k].tolist(), R) for mine, k, R in zip(ours.tolist(), image, cells)}


def _difference(ours: dict, theirs: dict, images: dict) -> tuple[float, float]:
    """Return the median |difference| of onsite energies and the largest one of all elements of H within two blocks, in meV.

    A pair that one of the blocks lacks is zero there.
    """
    moved, onsite = {}, set()
    for (copy_i, i, copy_j, j, *R), block in ours.items():
        (*to_i, of_i), (*to_j, of_j) = images[copy_i, i], images[copy_j, j]
        cell = (np.array(R) + of_j - of_i).tolist()
        moved[*to_i, *to_j, *cell] = block
        if to_i == to_j and not any(cell):
            onsite.add((*to_i, *to_j, *cell))
    largest = max(np.abs(moved.get(key, 0.0) - theirs.get(key, 0.0)).max() for key in moved.keys() | theirs.keys())
    # in a square block of n x n elements, stored row by row, every (n + 1)-th one is on the diagonal
    diagonals = [np.abs(moved[key] - theirs[key])[:: round(len(moved[key]) ** 0.5) + 1] for key in onsite]
    return hartree_to_mev(float(np.median(np.concatenate(diagonals)))), hartree_to_mev(float(largest))


def check_ends(stored: Stored, device: Device, allow_mismatch: bool) -> list[str]:
    """Say how the ends of a device repeat, line by line.

    Raises ValueError if an end does not repeat and that is not allowed.
    """
    mismatches, lines = end_mismatches(stored, device), []
    for side in ("first", "last"):
        of_side = [m for m in mismatches if m.side == side]
        best = min(of_side, key=lambda m: (not m.repeats, m.position_angstrom, m.onsite_mev))
        if not (best.repeats or allow_mismatch):
            raise ValueError(
                f"the {side} of {len(device.block_sizes)} blocks does not repeat, as the contact of a device must "
                f"({'; '.join(map(str, of_side))}; expected {END_ANGSTROM:g} A and {END_MEV:g} meV in the median at most). "
                "Draw the structure with its leads at the ends, cut it elsewhere with --origin, choose --blocks of whole cells "
                "of the lead, or say --allow-mismatch."
            )
        lines.append(f"the {side} block {'repeats' if best.repeats else 'DOES NOT REPEAT'} in {best}")
        inner = next((m for m in of_side if m.other == INNER), best)
        if best.repeats and not inner.repeats:
            lines.append(
                f"the {side} block does not repeat in {inner}: quatrex and TBtrans, which take the coupling of these two for "
                "the lead's, need longer leads"
            )
    return lines
