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

from collections.abc import Iterator
from dataclasses import dataclass, field

import h5py
import numpy as np
from ase import Atoms

from ..files import atomic_folder
from ..structures import write_structure_file
from ..units import hartree_to_ev
from .stream import Rows, Stored, split_by_cell

CHUNK = 1 << 16  # elements of an HDF5 chunk
NAMES = ("hamiltonian", "overlap")


def write(stored: Stored, out, transport: str | None = None, repeat: int = 1, blocks: int | None = None) -> list[str]:
    """Write the folder `out`; returns lines that say what was written and what was dropped.

    Without `transport` the cell as it stands, from which quatrex builds a device itself (construct_from_unit_cell). With it a
    device (`tile`): its orbitals are ordered by block; elements across its ends are the contacts' and are left out.

    Raises ValueError as `tile` does, and where repeat or blocks come without transport.
    """
    if transport is None and (repeat != 1 or blocks is not None):
        raise ValueError("--repeat and --blocks came without --transport, expected an axis with them: a, b or c.")
    device = None if transport is None else tile(stored, transport, repeat, blocks)
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
        lines = _report(stored, device, grid)
        (folder / "device.toml").write_text(_device_toml(stored, device, grid, lines))
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


def tile(stored: Stored, transport: str, repeat: int = 1, blocks: int | None = None) -> Device:
    """A device of `repeat` copies of the structure along an axis, in `blocks` blocks.

    By default the most blocks of which only neighbours couple; of several copies each block then holds whole ones. Where blocks
    are asked for that do not, what lies beyond neighbours is dropped when the device is written.

    Raises ValueError where the axis is no periodic one, where a block would be empty, or where no two blocks are enough.
    """
    if transport not in ("a", "b", "c"):
        raise ValueError(f"--transport is {transport!r}, expected an axis of the cell: a, b or c.")
    if not stored.periodic:
        raise ValueError("--transport needs a structure that is periodic; this one is not. Export it without.")
    if repeat < 1:
        raise ValueError(f"--repeat is {repeat}, expected 1 or more.")
    axis = "abc".index(transport)
    # atoms are in [-1/2, 1/2], so that copy m fills [m, m + 1)
    place = np.arange(repeat)[:, None] + stored.atoms.cell.scaled_positions(stored.atoms.positions)[:, axis] + 0.5
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
        for n in range(most, 1, -1):
            # whole copies in a block make the contacts' blocks equal
            if (repeat == 1 or repeat % n == 0) and np.unique(block_of(n)).size == n and only_neighbours(block_of(n), n):
                blocks = n
                break
        else:
            step, length = max(1, int(np.abs(along).max())), stored.atoms.cell.lengths()[axis]
            raise ValueError(
                f"no tiling along {transport}: the file's blocks reach {reach:.2f} cells of {length:.2f} A, expected a device twice as "
                f"long, found {repeat}. Give --repeat {2 * step} (or another multiple of {step}), or --blocks and lose what is beyond "
                "neighbours."
            )
    block = block_of(blocks) if blocks >= 1 else np.zeros_like(place, dtype=np.int64)
    if not 2 <= blocks <= repeat * len(stored.atoms) or np.unique(block).size != blocks:
        raise ValueError(
            f"--blocks is {blocks}, expected 2 or more, each with an atom in it: the device has {repeat * len(stored.atoms)} atoms "
            f"along {repeat * stored.atoms.cell.lengths()[axis]:.2f} A. Give fewer blocks, or none for the most without a loss."
        )
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
    return "".join(f"# {line}\n" for line in lines) + "[device]\n" + "".join(f"{entry}\n" for entry in entries)
