"""Read the CSR files of a CP2K run, one per matrix and periodic image, as the blocks of pairs of atoms.

A file is binary or text, with the same elements; docs/conventions.md has the formats. Both triangles are there, unless
UPPER_TRIANGULAR was set.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TypeAlias

import numpy as np
from scipy.sparse import bsr_array, csr_array

from ..operators import Places
from ..pairs import block_offsets, sort_keys
from ..runs import Snapshot

RECORD = np.dtype([("head", "<i4"), ("row", "<i4"), ("column", "<i4"), ("value", "<f8"), ("tail", "<i4")])
TEXT_LINE = 40  # bytes of a line of a text CSR file: row, column, value
CHUNK = 1 << 16  # records that are processed at a time, so that they stay in the cache

Elements: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]  # row, column (counted from 0) and value of each, (m,)


def image_files(run: Snapshot, images: np.ndarray | None, spins: int = 1) -> dict[str, list[Path]]:
    """Return the CSR files of H ("KS", of spin down "KS_DOWN") and S ("S"), in the order of the image table.

    Raises ValueError if the files there and the table disagree, or if a file does not consist of whole records.
    """
    files = {}
    matrices = [("KS", "KS", 1), ("KS_DOWN", "KS", 2), ("S", "S", 1)]
    for name, matrix, spin in matrices if spins == 2 else matrices[::2]:
        expected = 1 if images is None else len(images)
        found = run.files(matrix, None if images is None else "R", spin)
        missing = sorted(set(range(1, expected + 1)) - found.keys())
        extra = sorted(found.keys() - set(range(1, expected + 1)))
        if missing or extra:
            raise ValueError(
                f"{run}: the image table lists {expected} files of {matrix}_SPIN_{spin}, found {len(found)}"
                f"{f'; missing number {missing[0]}' if missing else ''}"
                f"{f'; number {extra[0]} is not in the table' if extra else ''}."
                " Run CP2K again."
            )
        files[name] = [found[n] for n in range(1, expected + 1)]
        for path in files[name]:
            record = RECORD.itemsize if _is_binary(path) else TEXT_LINE
            if path.stat().st_size % record:
                raise ValueError(
                    f"{path}: {path.stat().st_size} bytes, expected whole records of {record}. The file was cut short: "
                    "run CP2K again."
                )
    return files


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(16)
    return not start or b"\0" in start


def read_csr(path: str | Path) -> Elements:
    """Read row and column (counted from 0) and value of every entry of a CSR file, binary or text.

    Raises ValueError if the file is cut short or holds complex numbers (a matrix at a k-point: REAL_SPACE was not set).
    """
    path = Path(path)
    if not path.stat().st_size:  # an image with nothing above the threshold
        return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0)
    if _is_binary(path):
        n, rest = divmod(path.stat().st_size, RECORD.itemsize)
        if rest:
            raise ValueError(f"{path}: not whole records of {RECORD.itemsize} bytes. The file was cut short.")
        rows, columns, values = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n)
        with open(path, "rb") as file:
            for first in range(0, n, CHUNK):
                part = slice(first, first + CHUNK)
                records = np.fromfile(file, RECORD, CHUNK)
                if not ((records["head"] == 16).all() and (records["tail"] == 16).all()):
                    raise ValueError(
                        f"{path}: record marks are not 16. Expected real binary CSR; a complex matrix needs REAL_SPACE .TRUE."
                    )
                rows[part], columns[part], values[part] = records["row"], records["column"], records["value"]
        rows -= 1
        columns -= 1
        return rows, columns, values
    table = np.loadtxt(path, ndmin=2)
    if table.shape[1] != 3:
        raise ValueError(
            f"{path}: {table.shape[1]} columns, expected row, column, value. A complex matrix needs REAL_SPACE .TRUE."
        )
    return table[:, 0].astype(np.int32) - 1, table[:, 1].astype(np.int32) - 1, table[:, 2]


def read_blocks(
    files: dict[str, list[Path]], cells: np.ndarray, orbitals: np.ndarray, moved: np.ndarray | None = None
) -> tuple[np.ndarray, dict]:
    """Read every block in which a matrix has an element that is not zero, from one file per matrix and cell.

    moved (A, 3): number of cells between every atom and the place from where the images of the files count.
    Returns pairs (i, j, R), sorted, (E, 5), and by matrix the values of all blocks, row-major, one after the other.
    """
    n_atoms, kinds = len(orbitals), np.unique(orbitals)
    matrices = {
        name: [_block_rows(path, elements, orbitals) for path, elements in zip(paths, _elements(paths, cells))]
        for name, paths in files.items()
    }
    keys = {name: [m.indices + n_atoms * _row_of_block(m) for m in of_cell] for name, of_cell in matrices.items()}
    in_cell = [np.unique(np.concatenate([keys[name][c] for name in keys])) for c in range(len(cells))]
    pairs = np.concatenate(
        [np.column_stack(np.divmod(k, n_atoms) + tuple(cell[:, None].repeat(len(k), 1))) for k, cell in zip(in_cell, cells)]
    )
    if moved is not None:
        pairs[:, 2:] += moved[pairs[:, 0]] - moved[pairs[:, 1]]
    order = np.argsort(sort_keys(pairs))
    pairs = pairs[order]
    place = np.empty(len(pairs), np.int64)  # position of each pair, cell by cell, among the sorted ones
    place[order] = np.arange(len(pairs))
    places = np.split(place, np.cumsum([len(k) for k in in_cell])[:-1])
    offsets = block_offsets(pairs, orbitals)
    values = {}
    for name, of_cell in matrices.items():
        result = values[name] = np.zeros(offsets[-1])
        for c, key in enumerate(keys[name]):
            blocks, of_cell[c] = of_cell[c].data, None  # free the memory of a file once it is placed
            first = offsets[places[c][np.searchsorted(in_cell[c], key)]]
            n_i, n_j = orbitals[key // n_atoms], orbitals[key % n_atoms]
            for a, b in product(kinds, kinds):
                of_kind = np.flatnonzero((n_i == a) & (n_j == b))
                for some in np.array_split(of_kind, len(of_kind) * a * b // CHUNK + 1):
                    Places(first[some], a * b).put(result, blocks[some][:, :a, :b])
    return pairs, values


def _elements(paths: list[Path], cells: np.ndarray) -> Iterator[Elements]:
    """Read the files of a matrix, one per cell R, and complete upper triangles (UPPER_TRIANGULAR).

    The lower triangle of H(R) is the transposed upper one of H(-R). A whole H(0) has elements below its diagonal, since an
    atom's own block is full.
    """
    of_cell = dict(zip(map(tuple, cells.tolist()), paths))
    home = of_cell.get((0, 0, 0), paths[0])
    of_home = rows, columns, _ = read_csr(home)
    upper = len(rows) > 0 and rows.max() > 0 and not (rows > columns).any()
    for path, opposite in zip(paths, map(tuple, (-cells).tolist())):
        found = of_home if path == home else read_csr(path)
        if upper and opposite in of_cell:
            rows, columns, values = read_csr(of_cell[opposite])
            below = rows < columns
            found = (
                np.concatenate([found[0], columns[below]]),
                np.concatenate([found[1], rows[below]]),
                np.concatenate([found[2], values[below]]),
            )
        yield found


def _block_rows(path: Path, elements: Elements, orbitals: np.ndarray) -> bsr_array:
    """Arrange the elements of a file as blocks, (A n, A n), where n is the number of orbitals of the largest atom.

    Every atom is filled up to n orbitals with zeros.
    """
    n, n_orbitals = int(orbitals.max()), int(orbitals.sum())
    atom = np.repeat(np.arange(len(orbitals), dtype=np.int32), orbitals)
    place = atom * n + np.arange(n_orbitals, dtype=np.int32) - (np.cumsum(orbitals) - orbitals)[atom].astype(np.int32)
    rows, columns, values = elements
    if not len(values):
        return bsr_array((len(orbitals) * n,) * 2, blocksize=(n, n))
    if min(rows.min(), columns.min()) < 0 or max(rows.max(), columns.max()) >= n_orbitals:
        raise ValueError(
            f"{path}: element ({rows.max() + 1}, {columns.max() + 1}) of a matrix of {n_orbitals} orbitals. "
            "Is this the basis the run was made with?"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: holds NaN or infinity. Run CP2K again.")
    if not values.all():  # an element that is zero does not make a block
        rows, columns, values = (x[values != 0] for x in (rows, columns, values))
    if (rows[1:] < rows[:-1]).any():
        order = np.argsort(rows, kind="stable")
        rows, columns, values = rows[order], columns[order], values[order]
    in_row = np.zeros(len(orbitals) * n, np.int64)
    in_row[place] = np.bincount(rows, minlength=n_orbitals)
    ends = np.concatenate([[0], np.cumsum(in_row)])
    return csr_array((values, place[columns], ends), shape=(len(in_row),) * 2).tobsr((n, n))


def _row_of_block(matrix: bsr_array) -> np.ndarray:
    return np.repeat(np.arange(len(matrix.indptr) - 1), np.diff(matrix.indptr))
