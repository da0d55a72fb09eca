"""Read the files of a CP2K run as block-sparse H and S.

docs/conventions.md has the facts about the formats, the same in all versions of log.KNOWN_VERSIONS. The table that says
which file belongs to which periodic image stands in the log alone; images count from the wrapped atoms; matrices are in
Hartree, and both triangles are written.
"""

import re
from itertools import product
from pathlib import Path

import numpy as np
from ase import Atoms
from scipy.linalg import LinAlgError
from scipy.sparse import bsr_array, csr_array

from ..basis import Basis
from ..operators import Operators
from ..pairs import PairList, block_offsets, sort_keys
from ..units import angstrom_to_bohr
from ..workers import eigh
from .inputs import PROJECT
from .log import OUTPUT, RunOutput, parse_output

RECORD = np.dtype([("head", "<i4"), ("row", "<i4"), ("column", "<i4"), ("value", "<f8"), ("tail", "<i4")])
TEXT_LINE = 40  # bytes of a line of a text CSR file: row, column, value
CHUNK = 1 << 16  # records that are processed at a time, so that they stay in the cache
CELL_TOLERANCE_ANGSTROM = 1e-3  # the log prints 3 decimals
KPOINT_ROUNDING = 6e-6  # the log prints 5 decimals of k-points
HERMITICITY_TOLERANCE = 1e-7  # Hartree for H, 1 for S


def image_files(directory: str | Path, output: RunOutput) -> dict[str, list[Path]]:
    """Return the CSR files of H ("KS") and S ("S"), in the order of the image table.

    Raises ValueError if the files there and the table disagree, or if a file does not consist of whole records.
    """
    directory, files = Path(directory), {}
    for name in ("KS", "S"):
        if output.images is None:
            pattern, expected = rf".*-{name}_SPIN_1-1_0\.csr", 1
        else:
            pattern, expected = rf".*-{name}_SPIN_1_R_(\d+)-1_0\.csr", len(output.images)
        found = {}
        for path in directory.glob("*.csr"):
            if match := re.fullmatch(pattern, path.name):
                found[int(match[1]) if output.images is not None else 1] = path
        missing = sorted(set(range(1, expected + 1)) - found.keys())
        extra = sorted(found.keys() - set(range(1, expected + 1)))
        if missing or extra:
            raise ValueError(
                f"{directory}: the image table lists {expected} files of {name}, found {len(found)}"
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


def read_csr(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def read_run(directory: str | Path, atoms: Atoms, basis: Basis, attributes: dict | None = None) -> Operators:
    """Read H and S of an accepted run as block-sparse operators.

    They have every block in which H or S has an element. Onsite blocks are symmetrised: CP2K's differ from their transpose by
    up to 1e-7 Ha, and CP2K diagonalises one triangle.

    Raises ValueError, naming the file, for all that makes the matrices doubtful: another basis or structure than given, files
    that do not fit the image table, NaN, an element outside the matrix, a block without its transpose or different from it, or
    a missing diagonal element (a file cut short loses it first, where the transpose cannot tell).
    """
    directory = Path(directory)
    output = parse_output(directory / OUTPUT)
    _check_structure(directory, output, atoms, basis)
    files = image_files(directory, output)
    cells = np.zeros((1, 3), np.int64) if output.images is None else output.images
    orbitals = basis.n_orbitals(atoms.numbers)
    pairs, values = read_blocks(files, cells, orbitals)
    operators = Operators(
        atoms,
        basis,
        PairList(atoms, pairs),
        values["KS"],
        values["S"],
        {
            "source": "dft",
            "code": f"CP2K {output.version}",
            "cp2k_fermi_level_hartree": output.fermi_level,
            "total_energy_hartree": output.total_energy,
            "scf_steps": output.scf_steps,
            "wall_seconds": output.wall_seconds,
        }
        | _threshold(directory)
        | (attributes or {}),
        (exact_kpoints(directory, output, np.asarray(atoms.cell)), output.mo_energies),
    )
    _check_diagonal(directory, operators)
    _make_hermitian(directory, operators)
    return operators


def exact_kpoints(directory: str | Path, output: RunOutput, cell: np.ndarray) -> np.ndarray:
    """Return the k-points of a run without the log's rounding to five decimals, (K, 3), in fractions of the reciprocal lattice.

    A grid of n divisions has k = (2 r - n - 1) / (2 n) + shift along each vector, r = 1..n (H. J. Monkhorst, J. D. Pack, Phys.
    Rev. B 13, 5188 (1976); with a shift A. H. MacDonald, Phys. Rev. B 18, 5897 (1978)): n stands in the log, the shift in the
    run's input. A list of k-points is that of the input, in its units. cell (3, 3): rows are cell vectors in Angstrom. Without
    an input the k-points of a shifted grid or of a list are those of the log. Raises ValueError if the exact k-points are not
    those of the log.
    """
    path = Path(directory) / f"{PROJECT}.inp"
    text = path.read_text() if path.is_file() else ""
    shifted = re.search(r"^ *SCHEME +MACDONALD +\S+ +\S+ +\S+ +(\S+) +(\S+) +(\S+) *$", text, re.M | re.I)
    listed = re.findall(r"^ *KPOINT +(\S+) +(\S+) +(\S+)", text, re.M | re.I)
    if output.kpoint_grid and (shifted or output.scheme == "Monkhorst-Pack"):
        shift = np.array(shifted.groups(), dtype=float) if shifted else np.zeros(3)
        twice = 2 * np.array(output.kpoint_grid)
        exact = np.round((output.kpoints - shift) * twice) / twice + shift
    elif output.scheme == "General" and len(listed) == len(output.kpoints):
        units = re.search(r"^ *UNITS +(\S+)", text, re.M | re.I)
        per_length = {"B_VECTOR": None, "CART_ANGSTROM": cell, "CART_BOHR": angstrom_to_bohr(cell)}
        vectors = per_length.get(units[1].upper() if units else "B_VECTOR")
        exact = np.array(listed, dtype=float)
        if vectors is not None:
            exact = exact @ vectors.T / (2 * np.pi)
    else:
        return output.kpoints
    if (difference := np.abs(exact - output.kpoints).max()) > KPOINT_ROUNDING:
        raise ValueError(
            f"{path}: its k-points differ from those of {OUTPUT} by {difference:.1e}, expected at most the rounding of the "
            f"log, {KPOINT_ROUNDING:.0e}. Was the input changed after the run? Run it again."
        )
    return exact


def _threshold(directory: Path) -> dict[str, float]:
    """Return eps_threshold, the |element| below which CP2K wrote none, as the run's own input says; empty without an input."""
    path = directory / f"{PROJECT}.inp"
    found = re.findall(r"^ *THRESHOLD +(\S+)", path.read_text(), re.M) if path.is_file() else []
    return {"eps_threshold": max(map(float, found))} if found else {}


def _check_structure(directory: Path, output: RunOutput, atoms: Atoms, basis: Basis) -> None:
    if output.elements != atoms.get_chemical_symbols() or np.abs(output.positions - atoms.positions).max() > 1e-5:
        raise ValueError(
            f"{directory / OUTPUT}: atoms of the run ({len(output.elements)}) are not those of the structure ({len(atoms)} "
            "atoms). Was the structure changed after the run? Run it again."
        )
    # the cell of a molecule is a box that does not affect its matrices
    if output.images is not None and np.abs(output.cell - np.asarray(atoms.cell)).max() > CELL_TOLERANCE_ANGSTROM:
        raise ValueError(
            f"{directory / OUTPUT}: the cell of the run is {output.cell.tolist()} A, that of the structure "
            f"{np.round(np.asarray(atoms.cell), 3).tolist()} A. Was the structure changed after the run? Run it again."
        )
    if unread := sorted(set(output.elements) - output.basis_sets.keys()):
        raise ValueError(
            f"{directory / OUTPUT}: the basis set of {', '.join(unread)} is missing. Expected it under 'Atomic kind' in the "
            "log of a run at print level MEDIUM: use `hamscale input`."
        )
    for element, (name, n) in output.basis_sets.items():
        expected = next((e for e in basis.values() if e.element == element), None)
        if expected is None or (name, n) != (expected.name, expected.n_orbitals):
            wanted = f"{expected.name} with {expected.n_orbitals}" if expected else "none"
            raise ValueError(
                f"{directory / OUTPUT}: {element} was run with basis {name} of {n} orbitals, the configuration says {wanted}. "
                "Run it again, or set species back to what was run."
            )


def read_blocks(files: dict[str, list[Path]], cells: np.ndarray, orbitals: np.ndarray) -> tuple[np.ndarray, dict]:
    """Read every block in which a matrix has an element that is not zero, from one file per matrix and cell.

    Returns pairs (i, j, R), sorted, (E, 5), and by matrix the values of all blocks, row-major, one after the other.
    """
    n_atoms, kinds = len(orbitals), np.unique(orbitals)
    matrices = {name: [_block_rows(path, orbitals) for path in paths] for name, paths in files.items()}
    keys = {name: [m.indices + n_atoms * _row_of_block(m) for m in of_cell] for name, of_cell in matrices.items()}
    in_cell = [np.unique(np.concatenate([keys[name][c] for name in keys])) for c in range(len(cells))]
    pairs = np.concatenate(
        [np.column_stack(np.divmod(k, n_atoms) + tuple(cell[:, None].repeat(len(k), 1))) for k, cell in zip(in_cell, cells)]
    )
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
                    result[first[some, None] + np.arange(a * b)] = blocks[some][:, :a, :b].reshape(len(some), a * b)
    return pairs, values


def _block_rows(path: Path, orbitals: np.ndarray) -> bsr_array:
    """Read a CSR file as blocks, (A n, A n), where n is the number of orbitals of the largest atom.

    Every atom is filled up to n orbitals with zeros.
    """
    n, n_orbitals = int(orbitals.max()), int(orbitals.sum())
    atom = np.repeat(np.arange(len(orbitals), dtype=np.int32), orbitals)
    place = atom * n + np.arange(n_orbitals, dtype=np.int32) - (np.cumsum(orbitals) - orbitals)[atom].astype(np.int32)
    rows, columns, values = read_csr(path)
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


def _check_diagonal(directory: Path, operators: Operators) -> None:
    """Check that every diagonal element of H(R=0) and S(R=0) is there.

    A file that was cut by whole records loses the last one first.
    """
    # pairs are sorted, so the blocks are in the order of atoms
    blocks, orbitals = np.flatnonzero(operators.pairs.onsite), operators.orbitals
    if len(blocks) < len(orbitals):
        bare = int(np.setdiff1d(np.arange(len(orbitals)), operators.pairs[blocks, 0])[0])
        raise ValueError(f"{directory}: atom {bare} has no onsite block in H and S. Was a CSR file cut short? Run CP2K again.")
    atom = np.repeat(np.arange(len(orbitals)), orbitals)
    within = np.arange(len(atom)) - (np.cumsum(orbitals) - orbitals)[atom]
    diagonal = operators.offsets[blocks][atom] + within * (orbitals[atom] + 1)
    for name in ("hamiltonian", "overlap"):
        missing = np.flatnonzero(getattr(operators, name)[diagonal] == 0)
        if len(missing):
            raise ValueError(
                f"{directory}: {name} lacks {len(missing)} of {len(atom)} diagonal elements, the first of orbital "
                f"{missing[0] + 1}, expected all. Was a CSR file cut short, or dft.csr_threshold large? Run CP2K again."
            )


def _make_hermitian(directory: Path, operators: Operators) -> None:
    """Check H = H^+ and S = S^+ block by block, then make both exact; it is the onsite blocks that need it."""
    for name in ("hamiltonian", "overlap"):
        try:
            error = operators.make_hermitian(getattr(operators, name))
        except ValueError as message:
            raise ValueError(f"{directory}: {message} Was a CSR file cut short? Run CP2K again.") from None
        if error > HERMITICITY_TOLERANCE:
            raise ValueError(
                f"{directory}: {name} differs from its adjoint by {error:.1e}, expected at most {HERMITICITY_TOLERANCE:.0e}. "
                "Was a CSR file cut short, or UPPER_TRIANGULAR set? Run CP2K again."
            )


def eigenvalue_check(operators: Operators) -> float:
    """Return max |eigenvalues of H(k), S(k) - those CP2K printed|, in Hartree, over all k-points and orbitals of the run."""
    assert operators.orbital_energies is not None, "operators of a CP2K run hold its orbital energies"
    kpoints, energies = operators.orbital_energies
    deviations = []
    for k, printed in zip(kpoints, energies, strict=True):
        try:
            found = eigh(*operators.at_k(k), eigvals_only=True)
        except LinAlgError as error:
            raise ValueError(
                f"k-point {k.tolist()}: H(k), S(k) have no eigenvalues ({error}). Expected S(k) positive definite: was a CSR "
                "file cut short, or dft.csr_threshold large?"
            ) from None
        deviations.append(np.abs(found[: len(printed)] - printed).max())
    return float(np.max(deviations))
