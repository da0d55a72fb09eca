"""Read the files of a CP2K run as block-sparse H and S: of a run of ours, or of a step of a user's own.

docs/conventions.md has the facts about the formats, the same in all versions of log.KNOWN_VERSIONS. The table that says
which file belongs to which periodic image stands in the log alone; images count from the wrapped atoms; matrices are in
Hartree, and both triangles are written. A spin-polarised run writes H of spin up, H of spin down and one S.
"""

import logging
import re
from itertools import product
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from scipy.linalg import LinAlgError
from scipy.sparse import bsr_array, csr_array

from ..basis import Basis
from ..operators import Operators
from ..pairs import PairList, block_offsets, sort_keys
from ..runs import Snapshot, snapshot
from ..structures import charge_of, periodicity, plane_distances
from ..units import angstrom_to_bohr
from ..workers import eigh
from .geometry import input_file, run_geometry, run_output
from .log import OUTPUT, RunOutput

log = logging.getLogger(__name__)

RECORD = np.dtype([("head", "<i4"), ("row", "<i4"), ("column", "<i4"), ("value", "<f8"), ("tail", "<i4")])
TEXT_LINE = 40  # bytes of a line of a text CSR file: row, column, value
CHUNK = 1 << 16  # records that are processed at a time, so that they stay in the cache
CELL_TOLERANCE_ANGSTROM = 1e-3  # the log prints 3 decimals
POSITION_TOLERANCE_ANGSTROM = 1e-5  # the log prints 6 decimals
EPS_ORBITALS = 1e-5  # CP2K's default of EPS_PGF_ORB, at its default of EPS_DEFAULT
KPOINT_ROUNDING = 6e-6  # the log prints 5 decimals of k-points
HERMITICITY_TOLERANCE = 1e-7  # Hartree for H, 1 for S


def image_files(run: Snapshot, images: np.ndarray | None, spins: int = 1) -> dict[str, list[Path]]:
    """Return the CSR files of H ("KS", of spin down "KS_DOWN") and S ("S"), in the order of the image table.

    Raises ValueError if the files there and the table disagree, or if a file does not consist of whole records.
    """
    files = {}
    matrices = {"KS": ("KS", 1), "KS_DOWN": ("KS", 2), "S": ("S", 1)}
    if spins == 1:
        del matrices["KS_DOWN"]
    for name, (matrix, spin) in matrices.items():
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


def read_run(path: str | Path, atoms: Atoms, basis: Basis, attributes: dict | None = None) -> Operators:
    """Read H and S of a run as block-sparse operators. path: a folder with one structure, or a file of H.

    They have every block in which H or S has an element. Onsite blocks are symmetrised: CP2K's differ from their transpose by
    up to 1e-7 Ha, and CP2K diagonalises one triangle. `atoms` are those of the run, each at its own place or in another cell.

    Raises ValueError, naming the file, for all that makes the matrices doubtful: another basis or structure than given, files
    that do not fit the image table, NaN, an element outside the matrix, a block without its transpose or different from it, or
    a missing diagonal element (a file cut short loses it first, where the transpose cannot tell); and if the images of a
    periodic structure were folded into one matrix and its cell is too small to tell them apart.
    """
    run = snapshot(path)
    log_file, output = run_output(run)
    _check_kinds(log_file, output, atoms, basis)
    moved = _cells_from_run(run, log_file, output, atoms)
    files = image_files(run, output.images, output.spins)
    cells = np.zeros((1, 3), np.int64) if output.images is None else output.images
    pairs, values = read_blocks(files, cells, basis.n_orbitals(atoms.numbers))
    if output.images is None and output.periodicity != "NONE":
        pairs = unfold(str(run), PairList(atoms, pairs), basis, output.eps_orbitals)
    else:
        pairs[:, 2:] += moved[pairs[:, 0]] - moved[pairs[:, 1]]
    printed = output.mo_energies
    operators = Operators(
        atoms,
        basis,
        PairList(atoms, pairs),
        values["KS"] if output.spins == 1 else np.stack([values["KS"], values["KS_DOWN"]]),
        values["S"],
        {
            "source": "dft",
            "code": f"CP2K {output.version}",
            "total_energy_hartree": output.total_energy,
            "scf_steps": output.scf_steps,
            "wall_seconds": output.wall_seconds,
            "orbital_energy_decimals": output.mo_decimals,
        }
        | ({} if output.fermi_level is None else {"cp2k_fermi_level_hartree": output.fermi_level})
        | _threshold(input_file(log_file, output))
        | (attributes or {}),
        None if printed is None else (exact_kpoints(input_file(log_file, output), output, np.asarray(atoms.cell)), printed),
    ).sorted()
    _check_diagonal(run, operators)
    _make_hermitian(run, operators)
    return operators


def exact_kpoints(path: Path, output: RunOutput, cell: np.ndarray) -> np.ndarray:
    """Return the k-points of a run without the log's rounding to five decimals, (K, 3), in fractions of the reciprocal lattice.

    path: the input of the run.
    A grid of n divisions has k = (2 r - n - 1) / (2 n) + shift along each vector, r = 1..n (H. J. Monkhorst, J. D. Pack, Phys.
    Rev. B 13, 5188 (1976); with a shift A. H. MacDonald, Phys. Rev. B 18, 5897 (1978)): n stands in the log, the shift in the
    run's input. A list of k-points is that of the input, in its units. cell (3, 3): rows are cell vectors in Angstrom. Without
    an input the k-points of a shifted grid or of a list are those of the log. Raises ValueError if the exact k-points are not
    those of the log.
    """
    text = path.read_text(errors="replace") if path.is_file() else ""
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


def _threshold(path: Path) -> dict[str, float]:
    """Return eps_threshold, the |element| below which CP2K wrote none, as the run's own input says; empty without an input."""
    found = re.findall(r"^ *THRESHOLD +(\S+)", path.read_text(errors="replace"), re.M) if path.is_file() else []
    return {"eps_threshold": max(map(float, found))} if found else {}


def _cells_from_run(run: Snapshot, log: Path, output: RunOutput, atoms: Atoms) -> np.ndarray:
    """Return the number of cells between every atom and the place from where CP2K counts the images of the run, (A, 3).

    CP2K counts from fractions f - ANINT(f). All atoms may be shifted together. Raises ValueError if the atoms are others.
    """
    positions, cell = run_geometry(run, log, output)
    same = output.elements == atoms.get_chemical_symbols()
    # the cell of a molecule is a box that does not affect its matrices
    if same and output.periodicity != "NONE" and np.abs(cell - np.asarray(atoms.cell)).max() > CELL_TOLERANCE_ANGSTROM:
        raise ValueError(
            f"{log}: the cell of the run is {np.round(cell, 6).tolist()} A, that of the structure "
            f"{np.round(np.asarray(atoms.cell), 6).tolist()} A. Was the structure changed after the run? Run it again."
        )
    if same and output.periodicity != periodicity(atoms):
        raise ValueError(
            f"{log}: the run is periodic along {output.periodicity}, the structure along {periodicity(atoms)}. Run it again, "
            "or set pbc of the structure to what was run."
        )
    moved = np.zeros((len(atoms), 3), np.int64)
    apart = positions - atoms.positions if same else np.full((1, 3), np.inf)
    if same and output.periodicity != "NONE":
        fractions = atoms.cell.scaled_positions(positions)
        fractions -= np.where(atoms.pbc, np.trunc(fractions + np.copysign(0.5, fractions)), 0.0)
        difference = atoms.cell.scaled_positions(atoms.positions) - fractions
        together = difference[0] - np.round(difference[0])
        moved = np.where(atoms.pbc, np.round(difference - together), 0).astype(np.int64)
        apart = (difference - together - moved) @ np.asarray(atoms.cell)
        if np.abs(together @ np.asarray(atoms.cell)).max() < POSITION_TOLERANCE_ANGSTROM:
            apart += together @ np.asarray(atoms.cell)
    if np.abs(apart).max() > POSITION_TOLERANCE_ANGSTROM:
        raise ValueError(
            f"{log}: atoms of the run ({len(output.elements)}) are not those of the structure ({len(atoms)} "
            "atoms). Was the structure changed after the run? Run it again."
        )
    return moved


def _check_kinds(log: Path, output: RunOutput, atoms: Atoms, basis: Basis) -> None:
    """Raise ValueError if basis sets, pseudopotentials, electrons or charge of the run are others than expected."""
    if output.charge != charge_of(atoms):
        raise ValueError(
            f"{log}: the run has charge {output.charge}, the structure {charge_of(atoms)}. Was the charge changed after the "
            "run? Run it again."
        )
    if unread := sorted(set(output.elements) - {kind.element for kind in output.kinds.values()}):
        raise ValueError(
            f"{log}: the basis set of {', '.join(unread)} is missing. Expected it under 'Atomic kind' in the log of a run at "
            "PRINT_LEVEL MEDIUM: use `hamscale input`."
        )
    for kind in output.kinds.values():
        expected = next((e for e in basis.values() if e.element == kind.element), None)
        if expected is None or (kind.basis, kind.n_orbitals) != (expected.name, expected.n_orbitals):
            wanted = f"{expected.name} with {expected.n_orbitals}" if expected else "none"
            raise ValueError(
                f"{log}: {kind.element} was run with basis {kind.basis} of {kind.n_orbitals} orbitals, the configuration says "
                f"{wanted}. Run it again, or set species back to what was run."
            )
        if kind.potential and _name(kind.potential) != _name(expected.potential):
            raise ValueError(
                f"{log}: {kind.element} was run with potential {kind.potential}, the configuration says {expected.potential}. "
                "Run it again, or set species to what was run."
            )
    expected_electrons = basis.n_electrons(output_numbers(output)) - output.charge
    if output.n_electrons != expected_electrons:
        raise ValueError(
            f"{log}: {output.n_electrons} electrons, the pseudopotentials of the configuration leave {expected_electrons} at "
            f"the charge {output.charge}. Expected a run of these potentials."
        )


def output_numbers(output: RunOutput) -> np.ndarray:
    """Return the atomic numbers of a run, (A,)."""
    return np.array([atomic_numbers[element] for element in output.elements])


def _name(potential: str) -> str:
    """Return the name of a pseudopotential without its number of electrons: runs may name it either way."""
    return re.sub(r"-q\d+$", "", potential)


def read_blocks(files: dict[str, list[Path]], cells: np.ndarray, orbitals: np.ndarray) -> tuple[np.ndarray, dict]:
    """Read every block in which a matrix has an element that is not zero, from one file per matrix and cell.

    Returns pairs (i, j, R), sorted, (E, 5), and by matrix the values of all blocks, row-major, one after the other.
    """
    n_atoms, kinds = len(orbitals), np.unique(orbitals)
    matrices = {
        name: [_block_rows(path, other, orbitals) for path, other in zip(paths, _opposite(paths, cells))]
        for name, paths in files.items()
    }
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


def _opposite(paths: list[Path], cells: np.ndarray) -> list[Path | None]:
    """Return the file of -R for every file of R if the files hold upper triangles alone (UPPER_TRIANGULAR), else None each.

    A whole H(0) has elements below its diagonal, since an atom's own block is full.
    """
    place = {tuple(cell): path for cell, path in zip(cells.tolist(), paths)}
    rows, columns, _ = read_csr(place.get((0, 0, 0), paths[0]))
    if not len(rows) or rows.max() == 0 or (rows > columns).any():
        return [None] * len(paths)
    return [place.get(tuple(cell)) for cell in (-cells).tolist()]


def _elements(path: Path, opposite: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a CSR file, and complete upper triangles: the lower one of H(R) is the transposed upper one of H(-R)."""
    rows, columns, values = read_csr(path)
    if opposite is None:
        return rows, columns, values
    other_rows, other_columns, other_values = read_csr(opposite)
    below = other_rows < other_columns
    return (
        np.concatenate([rows, other_columns[below]]),
        np.concatenate([columns, other_rows[below]]),
        np.concatenate([values, other_values[below]]),
    )


def _block_rows(path: Path, opposite: Path | None, orbitals: np.ndarray) -> bsr_array:
    """Read a CSR file as blocks, (A n, A n), where n is the number of orbitals of the largest atom.

    Every atom is filled up to n orbitals with zeros. opposite: the file of -R if the files hold upper triangles.
    """
    n, n_orbitals = int(orbitals.max()), int(orbitals.sum())
    atom = np.repeat(np.arange(len(orbitals), dtype=np.int32), orbitals)
    place = atom * n + np.arange(n_orbitals, dtype=np.int32) - (np.cumsum(orbitals) - orbitals)[atom].astype(np.int32)
    rows, columns, values = _elements(path, opposite)
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


def _check_diagonal(run: Snapshot, operators: Operators) -> None:
    """Check that every diagonal element of H(R=0) and S(R=0) is there.

    A file that was cut by whole records loses the last one first.
    """
    # pairs are sorted, so the blocks are in the order of atoms
    blocks, orbitals = np.flatnonzero(operators.pairs.onsite), operators.orbitals
    if len(blocks) < len(orbitals):
        bare = int(np.setdiff1d(np.arange(len(orbitals)), operators.pairs[blocks, 0])[0])
        raise ValueError(f"{run}: atom {bare} has no onsite block in H and S. Was a CSR file cut short? Run CP2K again.")
    atom = np.repeat(np.arange(len(orbitals)), orbitals)
    within = np.arange(len(atom)) - (np.cumsum(orbitals) - orbitals)[atom]
    diagonal = operators.offsets[blocks][atom] + within * (orbitals[atom] + 1)
    for name in ("hamiltonian", "overlap"):
        missing = np.flatnonzero((getattr(operators, name)[..., diagonal] == 0).reshape(-1, len(diagonal)).any(0))
        if len(missing):
            raise ValueError(
                f"{run}: {name} lacks {len(missing)} of {len(atom)} diagonal elements, the first of orbital "
                f"{missing[0] + 1}, expected all. Was a CSR file cut short, or dft.csr_threshold large? Run CP2K again."
            )


def _make_hermitian(run: Snapshot, operators: Operators) -> None:
    """Check H = H^+ and S = S^+ block by block, then make both exact; it is the onsite blocks that need it."""
    for name in ("hamiltonian", "overlap"):
        try:
            error = operators.make_hermitian(getattr(operators, name))
        except ValueError as message:
            raise ValueError(f"{run}: {message} Was a CSR file cut short? Run CP2K again.") from None
        if error > HERMITICITY_TOLERANCE:
            raise ValueError(
                f"{run}: {name} differs from its adjoint by {error:.1e}, expected at most {HERMITICITY_TOLERANCE:.0e}. "
                "Was a CSR file cut short? Run CP2K again."
            )


def unfold(where: str, pairs: PairList, basis: Basis, eps_orbitals: float | None) -> np.ndarray:
    """Return the pairs (i, j, R) of a matrix whose periodic images were folded into one, (E, 5), R the nearest image.

    CP2K has a block of H and S where two orbitals reach each other, r_i + r_j, with r the radius beyond which every primitive
    is below EPS_PGF_ORB. If no second image of a pair is within that reach, the folded block is that of the nearest image.

    Raises ValueError with the smallest cell that would do if there is a second image within reach.
    """
    atoms, eps = pairs.atoms, eps_orbitals or EPS_ORBITALS
    radius = np.zeros(max(basis) + 1)
    for z, element in basis.items():
        radius[z] = element.radius_angstrom(eps)
    reach = radius[atoms.numbers[pairs[:, 0]]] + radius[atoms.numbers[pairs[:, 1]]]
    around = np.array(list(product(*(range(-2, 3) if periodic else (0,) for periodic in atoms.pbc))))
    unfolded, nearest, second = np.array(pairs), np.empty(len(pairs)), np.empty(len(pairs))
    wrapped = atoms.cell.scaled_positions(atoms.positions)
    for rows in np.array_split(np.arange(len(pairs)), len(pairs) // 4096 + 1):
        difference = wrapped[pairs[rows, 1]] - wrapped[pairs[rows, 0]]
        home = np.where(atoms.pbc, -np.round(difference), 0).astype(np.int64)
        distances = np.linalg.norm(
            (difference + home)[:, None] @ np.asarray(atoms.cell) + around @ np.asarray(atoms.cell), axis=2
        )
        order = np.argsort(distances, axis=1)[:, :2]
        unfolded[rows, 2:] = home + around[order[:, 0]]
        nearest[rows], second[rows] = np.take_along_axis(distances, order, 1).T
    if (second <= reach).any() or (nearest > reach).any():
        planes, needed = plane_distances(atoms.cell).min(), 2 * reach.max()
        raise ValueError(
            f"{where}: the run is periodic and has no k-points, so CP2K folded the matrices of all periodic images into one, "
            f"and two images of a pair are within the reach of H, {reach.max():.1f} A: H(R) cannot be had back. Expected a "
            f"cell whose planes are more than {needed:.1f} A apart, found {planes:.1f} A. Or add &KPOINTS with SCHEME "
            "MONKHORST-PACK 1 1 1 (the Gamma point alone) and REAL_SPACE .TRUE. in &KS_CSR_WRITE and &S_CSR_WRITE; a "
            "molecule needs PERIODIC NONE in &CELL and &POISSON."
        )
    log.warning(
        f"{where}: the run is periodic and has no k-points: every pair is taken at its nearest image, since H reaches "
        f"{reach.max():.1f} A and no second image is so near. Its density is that of the Gamma point alone."
    )
    return unfolded


def eigenvalue_check(operators: Operators) -> float:
    """Return max |eigenvalues of H(k), S(k) - those CP2K printed|, in Hartree, over all k-points, orbitals and spins.

    Raises ValueError if it printed none, or if S(k) is not positive definite.
    """
    if operators.orbital_energies is None:
        raise ValueError("no orbital energies were printed, expected those of &PRINT &MO ON, as `hamscale input` writes it.")
    kpoints, energies = operators.orbital_energies
    points = [(k, spin) for spin in range(operators.spins) for k in kpoints]
    deviations = []
    for (k, spin), printed in zip(points, energies.reshape(len(points), -1), strict=True):
        try:
            found = eigh(*operators.at_k(k, spin), eigvals_only=True)
        except LinAlgError as error:
            raise ValueError(
                f"k-point {k.tolist()}: H(k), S(k) have no eigenvalues ({error}). Expected S(k) positive definite: was a CSR "
                "file cut short, or dft.csr_threshold large?"
            ) from None
        deviations.append(np.abs(found[: len(printed)] - printed).max())
    return float(np.max(deviations))
