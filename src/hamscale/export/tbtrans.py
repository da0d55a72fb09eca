"""Write a run of TBtrans, Siesta's transport code: DEVICE.nc, ELEC_LEFT.nc, ELEC_RIGHT.nc (through sisl) and RUN.fdf.

An electrode is the block at an end of the device, repeated for ever: its H and S within a cell are those of that block, and
between neighbouring cells those between that block and the one next to it, which must be its repetition. TBtrans (Siesta's
manual, section TBtrans) finds the electrode's atoms in the device by their place in its list, from the first one on or up to
the last, and couples a cell of an electrode to its next ones alone: both hold for blocks (`device`). It puts the zero of
energy at the Fermi level of DEVICE.nc.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
from ase import Atoms

from ..files import atomic_folder
from . import siesta
from .device import STEP_EV, Cutting, Device, cut, dropped_lines, energies, images_of, k_points
from .stream import Stored, write_energies

DEVICE, RUN = "DEVICE.nc", "RUN.fdf"
ETA_EV = "1.e-5"  # of the electrodes; TBtrans's own, 1e-4, moves T(E) near steps by 1e-4
ELECTRODES = {"Left": "ELEC_LEFT.nc", "Right": "ELEC_RIGHT.nc"}


def write(stored: Stored, out: str | Path, transport: str | None = None, **cutting: Unpack[Cutting]) -> list[str]:
    """Write the folder `out`, which TBtrans runs as it is, or without `transport` the netCDF file `out` of the whole structure.

    The device is that of `quatrex.write`. Returns lines that say what was written and dropped.

    Raises ValueError as `quatrex.write` and `siesta.write` do, if there are fewer than three blocks, and if the block next to
    an end is not its repetition atom by atom.
    """
    if transport is None:
        return siesta.write(stored, out, suffix=".nc")
    sisl = siesta.load_sisl()
    stored, device, lines = cut(stored, transport, **cutting)
    if (n := len(device.block_sizes)) < 3:
        raise ValueError(
            f"the device has {n} blocks, expected at least three: TBtrans takes those at the ends for the electrodes, and "
            "nothing would be left between them. Draw a longer structure, or say --repeat "
            f"{-(-3 * device.repeat // n)} or more."
        )
    ends = {name: _images(stored, device, name) for name in ELECTRODES}
    nsc = 2 * np.abs(stored.pairs[:, 2:]).max(0) + 1
    nsc[device.axis] = 1
    with atomic_folder(out) as folder:
        H = siesta.assembled(stored, device.atoms, nsc.tolist(), partial(_of_device, device=device))
        siesta.write_matrix(sisl, H, folder / DEVICE, stored)
        lines = dropped_lines(device) + lines
        nsc[device.axis] = 3
        for name, file in ELECTRODES.items():
            atoms = _end(device, name)
            of_end = partial(_of_electrode, device=device, name=name, images=ends[name])
            H = siesta.assembled(stored, atoms, nsc.tolist(), of_end)
            siesta.write_matrix(sisl, H, folder / file, stored)
        (folder / RUN).write_text(_run(stored, device))
        write_energies(folder / "energies.json", stored)
    told = f"{RUN}: along {transport}, k-points {k_points(stored, device.axis)}"
    return [*lines, f"{DEVICE}, {', '.join(ELECTRODES.values())}, {told}"]


def _blocks(device: Device, name: str) -> tuple[int, int, int]:
    """Return the block of an electrode, the one next to it, and the step along the axis from the former to the latter."""
    last = len(device.block_sizes) - 1
    return (0, 1, 1) if name == "Left" else (last, last - 1, -1)


def _end(device: Device, name: str) -> Atoms:
    """Return the atoms of an electrode, whose cell is that of a block."""
    end, _, _ = _blocks(device, name)
    atoms = device.atoms[np.sort(device.block.ravel()) == end]
    cell = np.array(device.atoms.cell)
    cell[device.axis] /= len(device.block_sizes)
    return Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=device.atoms.pbc)


def _images(stored: Stored, device: Device, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return of every orbital of the device, if its block is next to an end, the orbital of that end of which it is the image.

    image, cells  # (n,), (n, 3) | number of the orbital within the electrode, -1 elsewhere; transverse cells between the two
    """
    end, other, _ = _blocks(device, name)
    distance, found = images_of(stored, device, end, other)
    if not found:
        raise ValueError(
            f"the {'first' if end == 0 else 'last'} block has other atoms than the one next to it, which TBtrans takes for its "
            "repetition. Draw longer leads, or choose --blocks of whole cells of the lead."
        )
    image, cells = np.full(device.n_orbitals, -1), np.zeros((device.n_orbitals, 3), np.int64)
    start = int(device.block_sizes[:end].sum())
    for ours, (copy, atom, shift) in found.items():
        orbitals = np.arange(stored.orbitals[atom])
        image[device.first[copy, atom] + orbitals] = device.first[ours] - start + orbitals
        cells[device.first[copy, atom] + orbitals] = shift
    return image, cells


def _of_device(stored: Stored, device: Device) -> Iterator[siesta.Elements]:
    for rows in stored.rows():
        yield from device.elements(stored, rows)


def _of_electrode(
    stored: Stored, device: Device, name: str, images: tuple[np.ndarray, np.ndarray]
) -> Iterator[siesta.Elements]:
    """Yield the elements within the block of an electrode, and those with the block next to it as its own next cell's."""
    (end, other, step), (image, shift) = _blocks(device, name), images
    block = np.repeat(np.arange(len(device.block_sizes)), device.block_sizes)
    start = int(device.block_sizes[:end].sum())
    along = step * np.eye(3, dtype=np.int64)[device.axis]
    for cells, row, column, H, S in _of_device(stored, device):
        of_row, of_column = block[row], block[column]
        within = (of_row == end) & (of_column == end)
        yield cells[within], row[within] - start, column[within] - start, H[within], S[within]
        out = (of_row == end) & (of_column == other)
        i, j = row[out] - start, image[column[out]]
        yield cells[out] + shift[column[out]] + along, i, j, H[out], S[out]
        back = (of_row == other) & (of_column == end)
        i, j = image[row[back]], column[back] - start
        yield cells[back] - shift[row[back]] - along, i, j, H[back], S[back]


def _run(stored: Stored, device: Device) -> str:
    """Return RUN.fdf. Energies are relative to the Fermi level, TBtrans's zero."""
    axis = f"a{device.axis + 1}"
    window, levels = energies(stored)
    lines = ["SystemLabel hamscale", f"TBT.HS {DEVICE}", f"TBT.k [{' '.join(map(str, k_points(stored, device.axis)))}]"]
    lines += [f"TBT.Elecs.Eta {ETA_EV} eV", ""]
    for name, sign, place in (("Left", "-", "1"), ("Right", "+", "end -1")):
        lines += [
            f"%block TBT.Elec.{name}",
            f"  HS {ELECTRODES[name]}",
            f"  semi-inf-direction {sign}{axis}",
            f"  electrode-position {place}",
            f"%endblock TBT.Elec.{name}",
            "",
        ]
    if window:
        low, high = (edge - levels["fermi_level"] for edge in window)
        lines += [
            "%block TBT.Contour.line",
            "  part line",
            f"   from {low:.4f} eV to {high:.4f} eV",
            f"    delta {STEP_EV} eV",
            "     method mid-rule",
            "%endblock TBT.Contour.line",
            "",
        ]
    return "\n".join(lines)
