"""Write the CSR files that CP2K itself writes with KS_CSR_WRITE and S_CSR_WRITE: Hartree, one file per image, both triangles.

Formats: docs/conventions.md, `dft/csr.py`. A periodic structure's files are NAME-KS_SPIN_1_R_n-1_0.csr, and NAME-images.out
has the table that says which n is which R, as CP2K puts it into its log. A molecule has NAME-KS_SPIN_1-1_0.csr alone. H of spin
down is KS_SPIN_2; there is one S.
"""

from pathlib import Path

import numpy as np

from ..dft.csr import RECORD, TEXT_LINE
from ..files import atomic_folder
from ..structures import write_structure_file
from .stream import Stored, write_energies

LABELS = {"hamiltonian": "KS", "overlap": "S"}


def write(stored: Stored, out: str | Path, binary: bool = True) -> list[str]:
    """Write the folder `out`, and return lines that say what was written.

    Elements that are zero are left out, as in CP2K's own files.
    """
    out = Path(out)
    cells = sorted(stored.cells, key=lambda R: (np.dot(R, R), R))  # image 1 is the home cell, as in CP2K
    image = {R: f"_R_{n}" if stored.periodic else "" for n, R in enumerate(cells, start=1)}
    append = _append_binary if binary else _append_text
    with atomic_folder(out) as folder:
        files = {
            (name, spin): {R: folder / f"{out.name}-{label}_SPIN_{spin + 1}{image[R]}-1_0.csr" for R in cells}
            for spin in range(stored.spins)
            for name, label in LABELS.items()
            if name == "hamiltonian" or spin == 0
        }
        for of_cell in files.values():
            for path in of_cell.values():
                path.touch()  # an image without an element has a file too
        for channel in stored.channels:
            for rows in channel.rows():
                for name, spin in files:
                    if spin == channel.spin:
                        for R, *elements in stored.by_cell(rows, getattr(rows, name)):
                            append(files[name, spin][R], *elements)
        if stored.periodic:
            (folder / f"{out.name}-images.out").write_text(_image_table(cells))
        write_structure_file(folder / "structure.extxyz", stored.atoms)
        write_energies(folder / "energies.json", stored)
    return [f"{len(cells)} images, {'binary' if binary else 'text'}, Hartree"]


def _append_binary(path: Path, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
    records = np.empty(len(row), RECORD)
    records["head"] = records["tail"] = 16
    records["row"], records["column"], records["value"] = row + 1, column + 1, value
    with open(path, "ab") as file:
        file.write(records.tobytes())  # numpy's tofile says nothing of a full disk


def _append_text(path: Path, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
    # columns of CP2K's lines, with two digits more than it writes
    lines = [f"{i:8d}{j:8d}{x:23.15E}\n" for i, j, x in zip((row + 1).tolist(), (column + 1).tolist(), value.tolist())]
    assert all(len(line) == TEXT_LINE for line in lines), "an index or a value does not fit a line of CP2K's text format"
    with open(path, "a") as file:
        file.writelines(lines)


def _image_table(cells: list[tuple[int, int, int]]) -> str:
    """Return the table of images as it stands in CP2K's log, once for H and once for S."""
    table = "".join(f"{n:10d}{x:7d}{y:7d}{z:7d}\n" for n, (x, y, z) in enumerate(cells, start=1))
    return "\n".join(
        f"{label + ' CSR write|':>14} {len(cells)} periodic images\n      Number      X      Y      Z\n{table}"
        for label in LABELS.values()
    )
