"""Write a run of the quantum-transport code quatrex: hamiltonian.h5, overlap.h5 (eV), structure.xyz (Angstrom), its settings.

The rules come from quatrex's own readers and manual (github.com/quatrex/quatrex):

docs/user_guide/input_data.md     a term per cell, (N, N), <home cell | H | image cell>, eV and Angstrom
src/qttools/utils/hdf5_utils.py   load_hdf5_dict: an item per cell, its name "[x,y,z]" without blanks, attribute format: "coo"
                                  of a group with the attribute shape and datasets data, row, col; "ndarray" of a dataset
src/quatrex/device/inputs.py      load_matrices: the cells are the whole grid -X..X, -Y..Y, -Z..Z; cells along the transport
                                  direction are dropped unless the device is built from the unit cell, which takes dense
                                  matrices alone; phases exp(+2 pi i k.R); distributed_read_xyz: the second line starts with
                                  Lattice="..."
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Unpack

import h5py
import numpy as np

from ..container import new_h5
from ..files import atomic_folder
from ..structures import write_structure_file
from ..units import hartree_to_ev
from . import quatrex_config
from .device import NAMES, Cutting, Device, cut, dropped_lines, gathered
from .stream import Stored, split_by_cell, write_energies

CHUNK = 1 << 16  # elements per HDF5 chunk
ROWS = 16  # of a chunk of a dense matrix: few, since they come a few atoms at a time


def write(stored: Stored, out: str | Path, transport: str | None = None, **cutting: Unpack[Cutting]) -> list[str]:
    """Write the folder `out`, which quatrex runs as it is, and return lines that say what was written and what was dropped.

    Without `transport` the cell is written as it is, in dense matrices, and quatrex builds a device from it, along its longest
    vector. With `transport` a device is written (`tile`): its orbitals are ordered by block, and elements across its ends are
    left out, because they belong to the contacts. cutting: how it is cut (`device.Cutting`). Warns as `quatrex_config.write`
    does. A molecule has no settings: no device can be made of it.

    Raises ValueError as `device.cut` does.
    """
    device: Device | None = None
    lines: list[str] = []
    if transport is None:
        axis = quatrex_config.unit_axis(stored)
        stored = gathered(stored, np.flatnonzero(stored.atoms.pbc).tolist())
    else:
        stored, device, lines = cut(stored, transport, **cutting)
        axis = device.axis
    grid = [R for R in stored.symmetric_grid() if device is None or R[device.axis] == 0]
    with atomic_folder(out) as folder:
        with ExitStack() as stack:
            files = {name: stack.enter_context(new_h5(folder / f"{name}.h5", Path(out) / f"{name}.h5")) for name in NAMES}
            if device is None:
                _write_dense(files, grid, stored)
            else:
                _write_device(files, grid, stored, device)
        write_structure_file(folder / "structure.xyz", device.atoms if device else stored.atoms)
        lines = _report(stored, device, grid) + lines
        write_energies(folder / "energies.json", stored)
        if axis is None:
            return [*lines, "no settings: the structure does not repeat, so that it has no leads"]
        return lines + quatrex_config.write(folder, stored, device, axis, lines)


def _key(R: tuple[int, int, int]) -> str:
    return "[{},{},{}]".format(*R)


def _write_dense(files: dict[str, h5py.File], grid: list[tuple[int, int, int]], stored: Stored) -> None:
    """Write a dataset (n, n) per cell, whose rows come some atoms at a time; chunks in which all is zero take no room."""
    n = stored.n_orbitals
    for file in files.values():
        for R in grid:
            chunks = (min(n, ROWS), min(n, CHUNK // ROWS))
            dataset = file.create_dataset(
                _key(R), (n, n), float, chunks=chunks, compression="gzip", compression_opts=1, fillvalue=0.0
            )
            dataset.attrs["format"] = "ndarray"
    for rows in stored.rows():
        first, last = rows.orbitals
        for name, values in (("hamiltonian", hartree_to_ev(rows.hamiltonian)), ("overlap", rows.overlap)):
            for R, row, column, value in stored.by_cell(rows, values):
                part = np.zeros((last - first, n))
                part[row - first, column] = value
                files[name][_key(R)][first:last] = part


def _write_device(files: dict[str, h5py.File], grid: list[tuple[int, int, int]], stored: Stored, device: Device) -> None:
    """Write a group per transverse cell with the elements of the device that are not zero, one copy of it at a time."""
    for file in files.values():
        _create_cells(file, grid, stored, device)
    for rows in stored.rows():
        for cells, row, column, hamiltonian, overlap in device.elements(stored, rows):
            for file, values in zip(files.values(), (hartree_to_ev(hamiltonian), overlap)):
                for R, *element in split_by_cell(cells, row, column, values, device.n_orbitals):
                    _append(file[_key(R)], *element)


def _create_cells(file: h5py.File, grid: list[tuple[int, int, int]], stored: Stored, device: Device) -> None:
    n = device.n_orbitals
    bounds = dict.fromkeys(grid, 0)  # largest number of elements that a cell can have
    cells, of_pair = np.unique(stored.pairs[:, 2:], axis=0, return_inverse=True)
    for R, bound in zip(cells.tolist(), np.bincount(of_pair.ravel(), stored.sizes)):
        R[device.axis] = 0
        bounds[tuple(R)] += int(bound) * device.repeat
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


def _report(stored: Stored, device: Device | None, grid: list[tuple[int, int, int]]) -> list[str]:
    if device is not None:
        return dropped_lines(device)
    reach = np.max(grid, axis=0).tolist()
    return [f"unit cell of {stored.n_orbitals} orbitals, dense, neighbour cells to {reach}; nothing is dropped"]
