"""Write quatrex_config.toml: what quatrex needs, beside the matrices, to compute a transmission without an edit.

quatrex (github.com/quatrex/quatrex, src/quatrex/core/config.py) changed the names of its settings with 0.1.0, and refuses those
of the other generation, so that each has a file of its own (`FILES`):

               0.1.0 and later                             before (0.0.1, commit 7bb10b8)
  device       transport_direction a, b, c                 transport_direction x, y, z
  contact      transport_direction                         direction
               of a unit cell: the names left and right    of a unit cell: origin and lattice_vectors, as of a device
               fermi_level and mid_gap_energy              one of the two

The wave-function formalism ("wf") is chosen, whose result is T(E), transmission_lr.npy; block_size is there for the other
("negf"). quatrex takes for a contact the atoms in the parallelepiped of its lattice_vectors at its origin (device/contact.py),
and for its next cell those one vector further, so that planes of atoms must not lie on its faces (`contact_origins`).
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .device import STEP_EV, Device, energies, k_points
from .stream import Stored

FILES = {"quatrex_config.toml": "0.1.0", "quatrex_config_0.0.1.toml": "0.0.1"}
UNIT_CELLS = 3  # transport cells of a device that quatrex builds from a unit cell; T(E) of a crystal is that of any number
LARGEST_SKEW_ANGSTROM = 0.1  # quatrex looks for the image of an atom within 0.3 A
# all modes of the leads by a dense solver, which has no contour to choose; the rest makes T(E) that of Green's functions to
# 1e-5 (docs/howto/transport.md)
OBC = {"algorithm": "spectral", "nevp_solver": "full", "num_ref_iterations": 10, "min_decay": 1e-8, "max_decay": 15.0}


@dataclass
class Contact:
    """A contact: its name, the corner (3,) and the vectors (3, 3) of its first cell, in Angstrom, those into the device."""

    name: str
    origin: np.ndarray
    vectors: np.ndarray


def unit_axis(stored: Stored) -> int | None:
    """Return the axis along which a unit cell is made a device: the longest along which cells couple; None if none do."""
    reach = np.abs(stored.pairs[:, 2:]).max(0)
    lengths = np.where(stored.atoms.pbc & (reach > 0), stored.atoms.cell.lengths(), 0.0)
    longest = np.flatnonzero(lengths > lengths.max(initial=0.0) * (1 - 1e-9))
    return int(longest[-1]) if lengths.any() else None


def contacts(stored: Stored, device: Device | None, axis: int) -> list[Contact]:
    """Return the contacts of a device, a block each, or of the device that quatrex builds from a unit cell, a cell each.

    Warns if no cell at an end has all atoms of the first block and none of the others, and if the cell is tilted so that
    quatrex does not find the images of a contact's atoms.
    """
    atoms = device.atoms if device else stored.atoms
    place = atoms.cell.scaled_positions(atoms.positions)
    if device:
        along = place[:, axis] * (step := len(device.block_sizes))
        block, count = np.sort(device.block.ravel()), step
    else:
        # the first and the last cells of the device to be
        count = UNIT_CELLS * int(np.abs(stored.pairs[:, 2 + axis]).max())
        along = (place[:, axis] + np.arange(count)[:, None]).ravel()
        block, step = np.repeat(np.arange(count), len(place)), 1
    starts = _origin(along, block, count), -_origin(-along, count - 1 - block, count)
    vectors, corner = np.array(atoms.cell), np.zeros(3)
    for other in (i for i in range(3) if i != axis):
        span = np.ptp(place[:, other])
        long = 1.0 if atoms.pbc[other] else max(1.0, span + 0.1)  # a structure may be wider than a cell that does not repeat
        corner[other] = place[:, other].min() - (long - span) / 2
        vectors[other] *= long
    result = []
    for name, start, sign in (("left", starts[0], 1), ("right", starts[1], -1)):
        corner[axis] = start / step
        of_contact = vectors.copy()
        of_contact[axis] *= sign / step
        result.append(Contact(name, corner @ np.asarray(atoms.cell), of_contact))
    _warn_of_tilt(result[0], axis, "quatrex before 0.1.0" if device is None else "quatrex")
    return result


def _origin(along: np.ndarray, block: np.ndarray, count: int) -> float:
    """Return where the first of three successive cells of length one begins whose atoms are those of blocks 0, 1 and 2.

    along, block  # (A,) | of each atom its place, in units of the length of a block, and its block
    """
    low, high = -np.inf, np.inf
    for b in range(min(3, count)):
        high = min(high, along[block == b].min() - b)
        if b < 2:
            low = max(low, along[block == b].max() - b - 1)
    if low >= high:
        warnings.warn(
            f"atoms of a block at an end of the device stand {low - high:.1e} of its length beyond it: quatrex will not find "
            "its contact. Draw the leads undisturbed, or choose --blocks and --origin so that planes of atoms are within.",
            stacklevel=4,
        )
    return float((low + high) / 2)


def _warn_of_tilt(contact: Contact, axis: int, who: str) -> None:
    skew = np.abs(contact.vectors[axis] - contact.vectors[:, axis]).max()  # the row is what the column is taken for
    if skew > LARGEST_SKEW_ANGSTROM:
        warnings.warn(
            f"the cell is tilted: the contact's vector along {'abc'[axis]} differs by up to {skew:.2f} A from the column of "
            f"its cell that is taken for it (device/contact.py, _reorder_atoms), so that {who} finds no contact. Take a cell "
            f"whose vector {'abc'[axis]} lies along {'xyz'[axis]}, with the others across.",
            stacklevel=4,
        )


def write(folder: Path, stored: Stored, device: Device | None, axis: int, notes: list[str]) -> list[str]:
    """Write `FILES` into the folder, and return lines that say what was chosen.

    notes: lines of comment at the head of each. Without band edges in the file of H the energies are left out, which quatrex
    asks for by their names; a warning says so.
    """
    kgrid, (window, levels) = k_points(stored, axis), energies(stored)
    ends = contacts(stored, device, axis)
    for name, version in FILES.items():
        content = _content(version, stored, device, axis, kgrid, window, levels, ends)
        head = [f"for quatrex {version} and {'later' if version == '0.1.0' else 'others before 0.1.0'}", *notes]
        (folder / name).write_text("".join(f"# {line}\n" for line in head) + _toml(content))
    new, old = FILES
    told = f"energies {window[0]:g} to {window[1]:g} eV" if window else "without energies"
    return [f"{new} (quatrex 0.1.0 and later), {old} (before): along {'abc'[axis]}, k-points {kgrid}, {told}"]


def _content(
    version: str,
    stored: Stored,
    device: Device | None,
    axis: int,
    kgrid: list[int],
    window: list[float],
    levels: dict[str, float],
    ends: list[Contact],
) -> dict:
    """Return the settings of one generation of quatrex (table above)."""
    old = version == "0.0.1"
    orbitals = {e.element: e.n_orbitals for e in stored.basis.values() if e.number in stored.atoms.numbers}
    of_device: dict = {"transport_direction": ("xyz" if old else "abc")[axis], "construct_from_unit_cell": device is None}
    if device is None:
        of_device["neighbor_cell_cutoff"] = np.abs(stored.pairs[:, 2:]).max(0).tolist()
        of_device["num_transport_cells"] = UNIT_CELLS
    else:
        of_device["block_size"] = device.block_sizes.tolist()
    of_device |= {"num_orbitals_per_atom": orbitals, "kpoint_grid": kgrid}
    of_device["contacts"] = []
    for end in ends:
        contact: dict = {"name": end.name}
        if old or device is not None:
            contact["direction" if old else "transport_direction"] = "abc"[axis]
            contact |= {"origin": _rounded(end.origin), "lattice_vectors": _rounded(end.vectors)}
        if levels:
            contact["fermi_level"] = levels["fermi_level"]
            if not old:
                contact["mid_gap_energy"] = levels["mid_gap"]
        of_device["contacts"].append(contact)
    electron: dict = {}
    if window:
        electron["energy_window_min"], electron["energy_window_max"] = window
        electron["energy_window_num"] = round((window[1] - window[0]) / STEP_EV) + 1
    electron["obc"] = OBC
    return {"simulation_dir": ".", "input_dir": ".", "formalism": "wf", "device": of_device, "electron": electron}


def _rounded(values: np.ndarray) -> list:
    return (np.round(values, 8) + 0.0).tolist()  # no -0.0


def _toml(table: dict, name: str = "") -> str:
    """Return TOML of nested settings; values are what TOML and JSON write alike, but for tables of numbers."""
    plain, tables = [], []
    for key, value in table.items():
        full = f"{name}.{key}" if name else key
        if isinstance(value, dict) and all(isinstance(number, int) for number in value.values()):
            plain.append(f"{key} = {{ {', '.join(f'{k} = {v}' for k, v in value.items())} }}\n")
        elif isinstance(value, dict):
            tables.append(f"\n[{full}]\n{_toml(value, full)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables += [f"\n[[{full}]]\n{_toml(item, full)}" for item in value]
        else:
            plain.append(f"{key} = {json.dumps(value)}\n")
    return "".join(plain + tables)
