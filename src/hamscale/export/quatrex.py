"""Input of the quantum-transport code quatrex: hamiltonian.h5 and overlap.h5 (eV), structure.xyz (Angstrom), device.toml.

Rules, each from quatrex's own readers and manual (github.com/quatrex/quatrex):
docs/user_guide/input_data.md     a term per cell, (N, N), <home cell | H | image cell>, eV and Angstrom
src/qttools/utils/hdf5_utils.py   load_hdf5_dict: a group per cell, its name "[x,y,z]" without blanks, attributes format and
                                  shape, datasets data, row, col; of the formats only "coo" is read by several ranks
src/quatrex/device/inputs.py      load_matrices: the cells are the whole grid -X..X, -Y..Y, -Z..Z; cells along the transport
                                  direction are dropped unless the device is built from the unit cell; phases
                                  exp(+2 pi i k.R); distributed_read_xyz: the second line starts with Lattice="..."
src/quatrex/core/config.py        DeviceConfig: transport_direction a, b, c; block_size; num_orbitals_per_atom by element
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import h5py
import numpy as np
from ase import Atoms

from ..files import atomic_folder
from ..structures import write_structure_file
from ..units import hartree_to_ev, hartree_to_mev
from .stream import Rows, Stored, split_by_cell, write_energies

CHUNK = 1 << 16  # elements of an HDF5 chunk
PLANE_ANGSTROM = 0.5  # how far an atom may be displaced from its plane at an end of the device
INNER = "the block next to it"
END_ANGSTROM = 0.05  # an end repeats if its atoms do to this
END_MEV = 25.0  # and its onsite energies, in the median, to the thermal energy at room temperature
NAMES = ("hamiltonian", "overlap")


def write(
    stored: Stored,
    out,
    transport: str | None = None,
    repeat: int = 1,
    blocks: int | None = None,
    origin: float | None = None,
    allow_mismatch: bool = False,
) -> list[str]:
    """Write the folder `out`; returns lines that say what was written and what was dropped.

    Without `transport` the cell as it stands, from which quatrex builds a device itself (construct_from_unit_cell). With it a
    device (`tile`): its orbitals are ordered by block; elements across its ends are the contacts' and are left out. The device
    begins where the cell of the user's file does, or at `origin`, in fractions of that cell along the axis (`as_drawn`), and its
    ends must repeat (`end_mismatches`) unless allow_mismatch is true. Warns where the cell is tilted.

    Raises ValueError as `tile` does, where an end does not repeat, and where other options come without transport.
    """
    if transport is None and (repeat != 1 or blocks is not None or origin is not None or allow_mismatch):
        raise ValueError(
            "--repeat, --blocks, --origin or --allow-mismatch came without --transport, expected an axis with them: a, b or c."
        )
    device, lines = None, []
    if transport is not None:
        stored = as_drawn(stored, transport, origin)
        device = tile(stored, transport, repeat, blocks, origin or 0.0)
        lines = _check_ends(stored, device, allow_mismatch)
    _warn_of_tilt(stored)
    grid = [R for R in stored.symmetric_grid() if device is None or R[device.axis] == 0]
    with atomic_folder(out) as folder:
        files = {name: h5py.File(folder / f"{name}.h5", "w") for name in NAMES}
        try:
            for file in files.values():
                _create_cells(file, grid, stored, device)
            for rows in stored.rows():
                for cells, row, column, hamiltonian, overlap in _elements(stored, rows, device):
                    for file, values in zip(files.values(), (hartree_to_ev(hamiltonian), overlap)):
                        for R, *element in split_by_cell(
                            cells, row, column, values, device.n_orbitals if device else stored.n_orbitals
                        ):
                            _append(file[_key(R)], *element)
        finally:
            for file in files.values():
                file.close()
        write_structure_file(folder / "structure.xyz", device.atoms if device else stored.atoms)
        lines = _report(stored, device, grid) + lines
        (folder / "device.toml").write_text(_device_toml(stored, device, grid, lines))
        write_energies(folder / "energies.json", stored)
    return lines


def _key(R) -> str:
    return "[{},{},{}]".format(*R)


def _create_cells(file: h5py.File, grid, stored: Stored, device: "Device | None"):
    n = device.n_orbitals if device else stored.n_orbitals
    bounds = dict.fromkeys(grid, 0)  # most elements a cell can have
    cells, of_pair = np.unique(stored.pairs[:, 2:], axis=0, return_inverse=True)
    for R, bound in zip(cells.tolist(), np.bincount(of_pair.ravel(), stored.sizes)):
        if device:
            R[device.axis], bound = 0, bound * device.repeat
        bounds[tuple(R)] += int(bound)
    for R, bound in bounds.items():
        group = file.create_group(_key(R))
        group.attrs["format"], group.attrs["shape"] = "coo", (n, n)
        growing = {"maxshape": (None,), "chunks": (min(bound, CHUNK),)} if bound else {}
        for name, dtype in (("data", float), ("row", np.int32), ("col", np.int32)):
            group.create_dataset(name, (0,), dtype, **growing)


def _append(group: h5py.Group, row, column, value):
    for name, values in (("data", value), ("row", row), ("col", column)):
        dataset = group[name]
        start = dataset.shape[0]
        dataset.resize((start + len(values),))
        dataset[start:] = values


def _elements(stored: Stored, rows: Rows, device: "Device | None") -> Iterator[tuple]:
    """(cells (m, 3), row, column, H, S) of the elements as quatrex is to see them, one copy of the structure at a time."""
    if device is None:
        yield rows.pairs[rows.pair, 2:], rows.row, rows.column, rows.hamiltonian, rows.overlap
    else:
        yield from device.elements(stored, rows)


@dataclass
class Device:
    """`repeat` copies of a structure along an axis, in blocks: slabs of equal length.

    block, first  # (repeat, A) | of every copy of every atom: its block, the first of its orbitals in the device
    atoms: the device, ordered by block, copy and atom. block_sizes (blocks,): orbitals.
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
        """Elements of the device by transverse cell; those beyond neighbouring blocks are counted and left out."""
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
    if not stored.periodic:
        raise ValueError("--transport needs a structure that is periodic; this one is not. Export it without.")
    return "abc".index(transport)


def as_drawn(stored: Stored, transport: str, origin: float | None = None) -> Stored:
    """Put atoms where the user's file has them, and along the transport axis into the cell that begins at origin.

    origin: fraction of the cell along the axis; by default 0, the corner of the user's cell. CP2K wraps atoms to [-1/2, 1/2], which
    would cut a device drawn from 0 to L in its middle. An atom that was drawn up to PLANE_ANGSTROM beyond an end stays at that end,
    with the plane it was displaced from. Raises ValueError where the axis is no periodic one.
    """
    axis = _axis(stored, transport)
    cells = np.zeros((len(stored.atoms), 3), np.int64) if stored.given is None else stored.given.copy()
    place = stored.atoms.cell.scaled_positions(stored.atoms.positions)[:, axis] + cells[:, axis] - (origin or 0.0)
    margin = 0.0 if stored.given is None else PLANE_ANGSTROM / stored.atoms.cell.lengths()[axis]
    outside = (place < -margin) | (place >= 1 + margin)
    cells[outside, axis] -= np.floor(place[outside]).astype(np.int64)
    return stored.moved(cells)


def tile(stored: Stored, transport: str, repeat: int = 1, blocks: int | None = None, origin: float = 0.0) -> Device:
    """A device of `repeat` copies of the structure along an axis, in `blocks` blocks, from `origin` on (fraction of the cell).

    The atoms are to lie in the cell that begins there (`as_drawn`). By default the most blocks of which only neighbours couple; of several copies each block then holds whole ones. Where blocks
    are asked for that do not, what lies beyond neighbours is dropped when the device is written.

    Raises ValueError where the axis is no periodic one, where a block would be empty, or where no two blocks are enough.
    """
    axis = _axis(stored, transport)
    if repeat < 1:
        raise ValueError(f"--repeat is {repeat}, expected 1 or more.")
    # copy m fills [m, m + 1)
    place = np.arange(repeat)[:, None] + stored.atoms.cell.scaled_positions(stored.atoms.positions)[:, axis] - origin
    i, j, along = stored.pairs[:, 0], stored.pairs[:, 1], stored.pairs[:, 2 + axis]

    def block_of(n):
        return np.clip((place * n / repeat).astype(np.int64), 0, n - 1)

    def only_neighbours(block, n):
        # across the ends too, as if the device went on: else a contact would reach past its neighbour
        for copy in range(repeat):
            further, other = np.divmod(copy + along, repeat)
            if (np.abs(block[other, j] + further * n - block[copy, i]) > 1).any():
                return False
        return True

    reach = float(np.abs(place[0, j] + along - place[0, i]).max(initial=0.0))  # in copies
    if blocks is None:
        most = min(int(repeat / max(reach, 1e-9)) + 1, repeat * len(stored.atoms))
        # whole copies in a block make the contacts' blocks equal
        lossless = [
            n
            for n in range(most, 1, -1)
            if (repeat == 1 or repeat % n == 0) and np.unique(block_of(n)).size == n and only_neighbours(block_of(n), n)
        ]
        if not lossless:
            step, length = max(1, int(np.abs(along).max())), stored.atoms.cell.lengths()[axis]
            raise ValueError(
                f"no tiling along {transport}: the file's blocks reach {reach:.2f} cells of {length:.2f} A, expected a device twice as "
                f"long, found {repeat}. Give --repeat {2 * step} (or another multiple of {step}), or --blocks and lose what is beyond "
                "neighbours."
            )
        devices = [_device(stored, axis, repeat, block_of(n)) for n in lossless]
        return min(devices, key=lambda device: _end_distance(stored, device))  # the most blocks of those whose ends repeat
    block = block_of(blocks) if blocks >= 1 else np.zeros_like(place, dtype=np.int64)
    if not 2 <= blocks <= repeat * len(stored.atoms) or np.unique(block).size != blocks:
        raise ValueError(
            f"--blocks is {blocks}, expected 2 or more, each with an atom in it: the device has {repeat * len(stored.atoms)} atoms "
            f"along {repeat * stored.atoms.cell.lengths()[axis]:.2f} A. Give fewer blocks, or none for the most without a loss."
        )
    return _device(stored, axis, repeat, block)


def _device(stored: Stored, axis: int, repeat: int, block: np.ndarray) -> Device:
    """The device in which every copy of every atom is in its block, (repeat, A)."""
    copy, atom = np.divmod(np.arange(block.size), len(stored.atoms))
    order = np.lexsort((atom, copy, block.ravel()))
    sizes = stored.orbitals[atom[order]]
    first = np.empty(block.size, np.int64)
    first[order] = np.cumsum(sizes) - sizes
    cell = np.asarray(stored.atoms.cell)
    positions = stored.atoms.positions[atom] + copy[:, None] * cell[axis]
    cell = np.where(np.arange(3)[:, None] == axis, repeat * cell, cell)
    atoms = Atoms(stored.atoms.numbers[atom[order]], positions[order], cell=cell, pbc=True)
    block_sizes = np.bincount(block.ravel(), stored.orbitals[atom]).astype(np.int64)
    return Device(axis, repeat, block, first.reshape(block.shape), atoms, block_sizes)


@dataclass
class EndMismatch:
    """How far the block at an end of a device is from repeating in another one.

    side, other: which blocks, in words. position_angstrom: largest distance of an atom from its image there, infinite where the blocks
    differ in their atoms. onsite_mev: median difference of the diagonal of H, which a few
    atoms beside the scattering region do not decide; largest_mev: largest difference of any
    element; both NaN where the atoms differ.
    """

    side: str
    other: str
    position_angstrom: float
    onsite_mev: float
    largest_mev: float

    @property
    def repeats(self) -> bool:
        return self.position_angstrom <= END_ANGSTROM and self.onsite_mev <= END_MEV

    def __str__(self):
        if np.isinf(self.position_angstrom):
            return f"{self.other}: other atoms"
        return (
            f"{self.other}: positions differ by up to {self.position_angstrom:.3f} A, onsite energies by {self.onsite_mev:.1f} meV in "
            f"the median, elements of H by {self.largest_mev:.0f} at most"
        )


def _compared(device: Device) -> list[tuple[str, int, int, str]]:
    """Which blocks are compared: side, block at that end, the other block, and how that one is called."""
    n = len(device.block_sizes)
    across = [("first", 0, n - 1, "the last block"), ("last", n - 1, 0, "the first block")]
    return across + ([("first", 0, 1, INNER), ("last", n - 1, n - 2, INNER)] if n > 2 else [])


def end_mismatches(stored: Stored, device: Device) -> list[EndMismatch]:
    """Compare the first and the last block of a device with the blocks in which a lead would go on.

    A transport code repeats the block at an end for ever. It repeats in the device if it equals the block next to it, or the block at
    the other end, which in the periodic structure of the file lies on its other side.
    """
    compared = _compared(device)
    values = _blocks_within(stored, device, {b for _, end, other, _ in compared for b in (end, other)})
    result = []
    for side, end, other, name in compared:
        distance, image = _images(stored, device, end, other)
        mean, largest = _difference(values[end], values[other], image) if image else (np.nan, np.nan)
        result.append(EndMismatch(side, name, distance, mean, largest))
    return result


def _end_distance(stored: Stored, device: Device) -> float:
    """How far the atoms of the worse end are from repeating, Angstrom; zero if both repeat."""
    best = dict.fromkeys(("first", "last"), np.inf)
    for side, end, other, _ in _compared(device):
        best[side] = min(best[side], _images(stored, device, end, other)[0])
    worst = max(best.values())
    return worst if worst > END_ANGSTROM else 0.0


def _blocks_within(stored: Stored, device: Device, chosen: set[int]) -> dict[int, dict]:
    """By block: (copy i, atom i, copy j, atom j, transverse cell) -> elements of H, Hartree."""
    found = {b: {} for b in chosen}
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


def _images(stored: Stored, device: Device, end: int, other: int) -> tuple[float, dict]:
    """Move the atoms of a block onto another one: largest distance to the nearest atom of the element, Angstrom, and which atom that is.

    The images are (copy, atom) -> (copy, atom, transverse cell); where the blocks differ in their atoms the distance is infinite and
    there are none.
    """
    numbers, cell, axis = stored.atoms.numbers, np.asarray(stored.atoms.cell), np.eye(3)[device.axis]
    ours, theirs = np.argwhere(device.block == end), np.argwhere(device.block == other)
    if sorted(numbers[ours[:, 1]]) != sorted(numbers[theirs[:, 1]]):
        return np.inf, {}
    fractions = stored.atoms.cell.scaled_positions(stored.atoms.positions)
    step = (other - end) * device.repeat / len(device.block_sizes)
    there = fractions[theirs[:, 1]] + theirs[:, :1] * axis
    images, largest = {}, 0.0
    for copy, atom in ours.tolist():
        apart = there - (fractions[atom] + (copy + step) * axis)
        cells = np.round(apart) * (1 - axis)
        distances = np.where(numbers[theirs[:, 1]] == numbers[atom], np.linalg.norm((apart - cells) @ cell, axis=1), np.inf)
        k = int(np.argmin(distances))
        largest = max(largest, float(distances[k]))
        images[copy, atom] = (*theirs[k].tolist(), cells[k].astype(np.int64))
    if len({image[:2] for image in images.values()}) < len(images):
        return np.inf, {}
    return largest, images


def _difference(ours: dict, theirs: dict, images: dict) -> tuple[float, float]:
    """(median |difference| of onsite energies, largest of all elements of H) within two blocks, meV; a pair that one lacks is zero there."""
    moved, onsite = {}, set()
    for (copy_i, i, copy_j, j, *R), block in ours.items():
        (*to_i, of_i), (*to_j, of_j) = images[copy_i, i], images[copy_j, j]
        cell = (np.array(R) + of_j - of_i).tolist()
        moved[*to_i, *to_j, *cell] = block
        if to_i == to_j and not any(cell):
            onsite.add((*to_i, *to_j, *cell))
    largest = max(np.abs(moved.get(key, 0.0) - theirs.get(key, 0.0)).max() for key in moved.keys() | theirs.keys())
    # of a square block, row by row, the diagonal is every (n + 1)-th element
    diagonals = [np.abs(moved[key] - theirs[key])[:: round(len(moved[key]) ** 0.5) + 1] for key in onsite]
    return hartree_to_mev(float(np.median(np.concatenate(diagonals)))), hartree_to_mev(float(largest))


def _check_ends(stored: Stored, device: Device, allow_mismatch: bool) -> list[str]:
    """Lines that say how the ends repeat. Raises ValueError where one does not and that is not allowed."""
    mismatches, lines = end_mismatches(stored, device), []
    for side in ("first", "last"):
        of_side = [m for m in mismatches if m.side == side]
        best = min(of_side, key=lambda m: (not m.repeats, m.position_angstrom, m.onsite_mev))
        if not (best.repeats or allow_mismatch):
            raise ValueError(
                f"the {side} of {len(device.block_sizes)} blocks does not repeat, as the contact of a device must ({'; '.join(map(str, of_side))}; "
                f"expected {END_ANGSTROM:g} A and {END_MEV:g} meV in the median at most). Draw the structure with its leads at the ends, "
                "cut it elsewhere with --origin, choose --blocks of whole cells of the lead, or say --allow-mismatch."
            )
        lines.append(f"the {side} block {'repeats' if best.repeats else 'DOES NOT REPEAT'} in {best}")
        inner = next((m for m in of_side if m.other == INNER), best)
        if best.repeats and not inner.repeats:
            lines.append(
                f"the {side} block does not repeat in {inner}: a code that takes the coupling of these two for the lead's needs longer leads"
            )
    return lines


def _warn_of_tilt(stored: Stored):
    cell = np.asarray(stored.atoms.cell)
    off = np.abs(cell - np.diag(np.diag(cell))).max()
    if stored.periodic and off > 1e-3:
        warnings.warn(
            f"the cell is tilted: its vectors leave the axes x, y, z by up to {off:.2f} A. quatrex finds the atoms of a contact by products "
            "that hold for upright cells alone (device/contact.py, _reorder_atoms): give it contacts by hand, or take an upright cell.",
            stacklevel=3,
        )


def _report(stored: Stored, device: Device | None, grid) -> list[str]:
    if device is None:
        reach = np.max(grid, axis=0)
        return [f"unit cell of {stored.n_orbitals} orbitals, neighbour cells to {reach.tolist()}; nothing is dropped"]
    lines = [
        f"device of {device.n_orbitals} orbitals in {len(device.block_sizes)} blocks of {device.block_sizes.min()} to "
        f"{device.block_sizes.max()} along {'abc'[device.axis]}; elements across its ends are left to the contacts"
    ]
    for name, (count, largest, total, everything) in device.dropped.items():
        if count:
            scale = hartree_to_ev(1.0) if name == "hamiltonian" else 1.0
            unit = " eV" if name == "hamiltonian" else ""
            lines.append(
                f"dropped beyond neighbouring blocks: {count} elements of the {name}, the largest {largest * scale:.2e}{unit}, "
                f"{total / everything:.2e} of their sum"
            )
        else:
            lines.append(f"beyond neighbouring blocks the {name} is zero")
    return lines


def _device_toml(stored: Stored, device: Device | None, grid, lines: list[str]) -> str:
    """What [device] of quatrex_config.toml has to say of these files; geometry, contacts and k-points are the user's."""
    orbitals = ", ".join(f"{e.element} = {e.n_orbitals}" for e in stored.basis.values() if e.number in stored.atoms.numbers)
    entries = [f"num_orbitals_per_atom = {{ {orbitals} }}"]
    if device is None:
        entries += ["construct_from_unit_cell = true", f"neighbor_cell_cutoff = {np.max(grid, axis=0).tolist()}"]
    else:
        entries += [
            "construct_from_unit_cell = false",
            f'transport_direction = "{"abc"[device.axis]}"',
            f"block_size = {device.block_sizes.tolist()}",
        ]
    if energies := stored.energies_ev():
        told = ", ".join(f"{name} {energy:.4f}" for name, energy in energies.items())
        lines = [*lines, f"energies of the file, eV: {told}; a contact takes mid_gap as mid_gap_energy, of a metal fermi_level"]
    return "".join(f"# {line}\n" for line in lines) + "[device]\n" + "".join(f"{entry}\n" for entry in entries)
