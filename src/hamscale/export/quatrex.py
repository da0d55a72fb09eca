"""Write input of the quantum-transport code quatrex: hamiltonian.h5, overlap.h5 (eV), structure.xyz (Angstrom), device.toml.

The rules come from quatrex's own readers and manual (github.com/quatrex/quatrex):

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
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np

from ..container import new_h5
from ..files import atomic_folder
from ..structures import write_structure_file
from ..units import hartree_to_ev
from .device import NAMES, Device, as_drawn, check_ends, tile
from .stream import Rows, Stored, split_by_cell, write_energies

CHUNK = 1 << 16  # elements per HDF5 chunk


def write(
    stored: Stored,
    out: str | Path,
    transport: str | None = None,
    repeat: int = 1,
    blocks: int | None = None,
    origin: float | None = None,
    allow_mismatch: bool = False,
) -> list[str]:
    """Write the folder `out`, and return lines that say what was written and what was dropped.

    Without `transport` the cell is written as it is, and quatrex builds a device from it (construct_from_unit_cell). With
    `transport` a device is written (`tile`): its orbitals are ordered by block, and elements across its ends are left out,
    because they belong to the contacts. The device begins where the cell of the user's file does, or at `origin`, in fractions
    of that cell along the axis (`as_drawn`), and its ends must repeat (`end_mismatches`) unless allow_mismatch is true. Warns
    if the cell is tilted.

    Raises ValueError as `tile` does, if an end does not repeat, and if other options come without transport.
    """
    if transport is None and (repeat != 1 or blocks is not None or origin is not None or allow_mismatch):
        raise ValueError(
            "--repeat, --blocks, --origin or --allow-mismatch came without --transport, expected an axis with them: a, b or c."
        )
    device, lines = None, []
    if transport is not None:
        stored = as_drawn(stored, transport, origin)
        device = tile(stored, transport, repeat, blocks, origin or 0.0)
        lines = check_ends(stored, device, allow_mismatch)
    _warn_of_tilt(stored)
    grid = [R for R in stored.symmetric_grid() if device is None or R[device.axis] == 0]
    with atomic_folder(out) as folder:
        with ExitStack() as stack:
            files = {name: stack.enter_context(new_h5(folder / f"{name}.h5", Path(out) / f"{name}.h5")) for name in NAMES}
            for file in files.values():
                _create_cells(file, grid, stored, device)
            for rows in stored.rows():
                for cells, row, column, hamiltonian, overlap in _elements(stored, rows, device):
                    for file, values in zip(files.values(), (hartree_to_ev(hamiltonian), overlap)):
                        for R, *element in split_by_cell(
                            cells, row, column, values, device.n_orbitals if device else stored.n_orbitals
                        ):
                            _append(file[_key(R)], *element)
        write_structure_file(folder / "structure.xyz", device.atoms if device else stored.atoms)
        lines = _report(stored, device, grid) + lines
        (folder / "device.toml").write_text(_device_toml(stored, device, grid, lines))
        write_energies(folder / "energies.json", stored)
    return lines


def _key(R: tuple[int, int, int]) -> str:
    return "[{},{},{}]".format(*R)


def _create_cells(file: h5py.File, grid: list[tuple[int, int, int]], stored: Stored, device: Device | None) -> None:
    n = device.n_orbitals if device else stored.n_orbitals
    bounds = dict.fromkeys(grid, 0)  # largest number of elements that a cell can have
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


def _append(group: h5py.Group, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
    for name, values in (("data", value), ("row", row), ("col", column)):
        dataset = group[name]
        start = dataset.shape[0]
        dataset.resize((start + len(values),))
        dataset[start:] = values


def _elements(stored: Stored, rows: Rows, device: Device | None) -> Iterator[tuple]:
    """Yield (cells (m, 3), row, column, H, S) of the elements that quatrex gets, one copy of the structure at a time."""
    if device is None:
        yield rows.pairs[rows.pair, 2:], rows.row, rows.column, rows.hamiltonian, rows.overlap
    else:
        yield from device.elements(stored, rows)


def _warn_of_tilt(stored: Stored) -> None:
    cell = np.asarray(stored.atoms.cell)
    off = np.abs(cell - np.diag(np.diag(cell))).max()
    if stored.periodic and off > 1e-3:
        warnings.warn(
            f"the cell is tilted: its vectors leave the axes x, y, z by up to {off:.2f} A. quatrex finds the atoms of a "
            "contact by products that hold for upright cells alone (device/contact.py, _reorder_atoms): give it contacts by "
            "hand, or take an upright cell.",
            stacklevel=3,
        )


def _report(stored: Stored, device: Device | None, grid: list[tuple[int, int, int]]) -> list[str]:
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


def _device_toml(stored: Stored, device: Device | None, grid: list[tuple[int, int, int]], lines: list[str]) -> str:
    """Return what [device] of quatrex_config.toml must say about these files.

    Geometry, contacts and k-points are left to the user.
    """
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
