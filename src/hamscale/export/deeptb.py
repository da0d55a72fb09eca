"""Write the data of DeePTB as dftio writes them: a folder per structure, eV and Angstrom.

dftio (github.com/deepmodeling/dftio, dftio/io/parse.py, write_dat) has these files, of numbers as text: positions.dat,
cell.dat, atomic_numbers.dat, pbc.dat; basis.dat, a Python dict of element and shells, as {'Si': '2s2p1d'}; hamiltonians.h5 and
overlaps.h5: a group per frame, "0", of datasets "i_j_Rx_Ry_Rz", the block <i in the home cell | H | j in cell R>.
DeePTB (github.com/deepmodeling/DeePTB, dptb/data/build.py and dataset/_default_dataset.py) reads them from folders PREFIX.*,
with info.json: nframes, natoms, pos_type, pbc. Orbitals: shells by l, then in their order; m = -l..l, real harmonics without
the Condon-Shortley sign (dptb/utils/constants.py, DeePTB_orbital_number_m and OPENMX2DeePTB), p = (y, z, x), as in hamscale.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..basis import ElementBasis
from ..container import new_h5
from ..files import atomic_folder
from ..units import hartree_to_ev
from .stream import Rows, Stored, write_energies

LETTERS = "spdfgh"
MOST_SHELLS = 9  # of one l: DeePTB reads one digit


def write(stored: Stored, out: str | Path) -> list[str]:
    """Write the folder `out`, of one frame, and return lines that say what was written. A molecule gets the cell of its file.

    Raises ValueError if an element has more shells of one l than DeePTB can count, or an l that it does not know.
    """
    numbers = np.unique(stored.atoms.numbers).tolist()
    shells = {stored.basis[z].element: _shells(stored.basis[z]) for z in numbers}
    orders = {z: _order(stored.basis[z].l) for z in numbers}
    info = {"nframes": 1, "natoms": len(stored.atoms), "pos_type": "cart", "pbc": stored.atoms.pbc.tolist()}
    with atomic_folder(out) as folder:
        np.savetxt(folder / "positions.dat", stored.atoms.positions)
        np.savetxt(folder / "cell.dat", np.asarray(stored.atoms.cell))
        np.savetxt(folder / "atomic_numbers.dat", stored.atoms.numbers, fmt="%d")
        np.savetxt(folder / "pbc.dat", stored.atoms.pbc)
        (folder / "basis.dat").write_text(str(shells))
        (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
        write_energies(folder / "energies.json", stored)
        with ExitStack() as stack:
            files = [
                stack.enter_context(new_h5(folder / name, Path(out) / name)) for name in ("hamiltonians.h5", "overlaps.h5")
            ]
            frames = [file.create_group("0") for file in files]
            for rows in stored.rows():
                for key, *blocks in _blocks(stored, rows, orders):
                    for frame, block in zip(frames, blocks):
                        frame[key] = block
    return [f"{len(stored.atoms)} atoms, {len(stored.pairs)} blocks, eV; basis {shells}"]


def _shells(element: ElementBasis) -> str:
    """Return the shells of an element in DeePTB's words, as 2s2p1d."""
    counts = [element.l.count(l) for l in range(max(element.l) + 1)]
    if len(counts) > len(LETTERS) or max(counts) > MOST_SHELLS:
        raise ValueError(
            f"{element.element} has shells of l {list(element.l)}, expected l up to {len(LETTERS) - 1} and at most "
            f"{MOST_SHELLS} of each: DeePTB has no name for others."
        )
    return "".join(f"{count}{letter}" for count, letter in zip(counts, LETTERS) if count)


def _order(shells: tuple[int, ...]) -> np.ndarray:
    """Return the index that puts an element's orbitals from the order of its shells into that of DeePTB, by l."""
    starts = np.cumsum([0, *(2 * l + 1 for l in shells)])
    by_l = sorted(range(len(shells)), key=lambda shell: shells[shell])
    return np.concatenate([np.arange(starts[shell], starts[shell + 1]) for shell in by_l])


def _blocks(stored: Stored, rows: Rows, orders: dict[int, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (key, block of H in eV, block of S) of some atoms' pairs."""
    numbers, sizes = stored.atoms.numbers, stored.orbitals
    bounds = np.concatenate([[0], np.cumsum(sizes[rows.pairs[:, 0]] * sizes[rows.pairs[:, 1]])])
    H = hartree_to_ev(rows.hamiltonian)
    for (i, j, *R), start, end in zip(rows.pairs.tolist(), bounds, bounds[1:]):
        index = np.ix_(orders[int(numbers[i])], orders[int(numbers[j])])
        of_h, of_s = (values[start:end].reshape(sizes[i], sizes[j])[index] for values in (H, rows.overlap))
        yield "_".join(map(str, (i, j, *R))), of_h, of_s
