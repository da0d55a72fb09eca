"""Write and read DeepH data sets: one folder per structure, eV and Angstrom.

The layout of DeepH-dock (github.com/kYangLi/DeepH-dock, docs/key_concepts.md) has these files. POSCAR. info.json:
atoms_quantity, orbits_quantity, orthogonal_basis, spinful, fermi_energy_eV, elements_orbital_map (element -> l of every shell).
overlap.h5 and hamiltonian.h5: atom_pairs (E, 5) R1 R2 R3 i j, chunk_boundaries (E+1,), chunk_shapes (E, 2), and entries, which
are the blocks, row-major; both files have the same pairs. H(k) = sum_R exp(+2 pi i k.R) H(R)
(deepx_dock/compute/eigen/matrix_obj.py, r2k). Orbitals: m = -l..l, real harmonics without the Condon-Shortley sign, p = (y, z,
x), d = (xy, yz, z2, xz, x2-y2) (BASIS_TRANS_OPENMX2WIKI in deepx_dock/convert/deeph/translate_old_dataset_to_new.py), in the
order and with the signs of hamscale.

The layout of DeepH-pack (github.com/mzjb/DeepH-pack, deeph/preprocess/) is read only. lat.dat and site_positions.dat have
vectors in columns; element.dat; orbital_types.dat has a line of l per atom; info.json has isspinful and fermi_level;
hamiltonians.h5 and overlaps.h5 have a dataset "[R1, R2, R3, i, j]" per block, with i and j counted from one and orbitals in the
order of OpenMX: p = (x, y, z), d = (z2, x2-y2, xy, xz, yz), f = (z3, xz2, yz2, zx2-zy2, xyz, x3, y3) (OpenMX 3.9 manual, table
9).
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import ase.io
import h5py
import numpy as np
from ase import Atoms

from ..basis import Basis, ElementBasis, shells_only
from ..container import new_h5
from ..files import atomic_folder
from ..graph.placement import edge_frame_deviations
from ..operators import DIAGONAL_ELSEWHERE, Operators, check_finite, diagonal_error
from ..pairs import PairList, block_offsets, find_pairs
from ..sandbox import probe
from ..structures import MINIMUM_DISTANCE_ANGSTROM, charge_of, check_distances, check_structure, wrap_as_cp2k
from ..units import ev_to_hartree, hartree_to_ev
from .stream import Stored, write_energies

HERMITICITY_TOLERANCE = 1e-4  # Hartree for H, 1 for S: a larger difference does not come from rounding
OVERLAP_TOLERANCE = 1e-3  # of what S has by its nature: other codes integrate it on grids
LARGEST_HARTREE = 1e5  # |H| of the 1s shell of the heaviest element is 5e3
FARTHEST_ANGSTROM = 100.0  # no orbitals reach so far
SHELL_LETTERS = "spdfghi"
OPENMX = {0: [0], 1: [1, 2, 0], 2: [2, 4, 0, 3, 1], 3: [6, 4, 2, 0, 1, 3, 5]}  # l -> places of m = -l..l in OpenMX's order


MATRICES = ("hamiltonian", "overlap")
# atoms, l of the shells of each element, Fermi level in eV, (pairs, matrix -> values, H in eV)
Layout: TypeAlias = tuple[Atoms, dict[str, list[int]], float | None, tuple[np.ndarray, dict[str, np.ndarray]]]


def write(stored: Stored, out: str | Path) -> list[str]:
    """Write the folder `out` in DeepH-dock's layout, and return lines that say what was written.

    Atoms are grouped by element, as in a POSCAR. A molecule gets the cell of its file.
    """
    order = np.argsort(stored.atoms.numbers, kind="stable")
    new = np.empty_like(order)
    new[order] = np.arange(len(order))  # index in POSCAR of every atom of the file
    i, j, R = stored.pairs[:, 0], stored.pairs[:, 1], stored.pairs[:, 2:]
    fermi, valences = stored.energies_ev().get("fermi_level"), [stored.basis[z].valence for z in stored.atoms.numbers.tolist()]
    info = {
        "atoms_quantity": len(stored.atoms),
        "orbits_quantity": stored.n_orbitals,
        "orthogonal_basis": False,
        "spinful": False,
        "fermi_energy_eV": fermi,
        "elements_orbital_map": {e.element: list(e.l) for e in stored.basis.values() if e.number in stored.atoms.numbers},
    }
    if all(valences) and stored.spins == 1:
        info["occupation"] = sum(valences) - charge_of(stored.atoms)
    with atomic_folder(out) as folder:
        ase.io.write(folder / "POSCAR", stored.atoms[order], format="vasp", sort=False)
        (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
        write_energies(folder / "energies.json", stored)
        with ExitStack() as stack:
            names = {name: f"{name}.h5" for name in ("hamiltonian", "overlap")}
            files = {name: stack.enter_context(new_h5(folder / file, Path(out) / file)) for name, file in names.items()}
            for file in files.values():
                file["atom_pairs"] = np.column_stack([R, new[i], new[j]])
                file["chunk_shapes"] = np.column_stack([stored.orbitals[i], stored.orbitals[j]])
                file["chunk_boundaries"] = np.concatenate([[0], np.cumsum(stored.sizes)])
                file.create_dataset("entries", (int(stored.sizes.sum()),), float)
            first = 0
            for rows in stored.rows():
                last = first + len(rows.hamiltonian)
                files["hamiltonian"]["entries"][first:last] = hartree_to_ev(rows.hamiltonian)
                files["overlap"]["entries"][first:last] = rows.overlap
                first = last
    return [f"{len(stored.atoms)} atoms grouped by element, {len(stored.pairs)} blocks, eV"]


# ---------------------------------------------------------------------------------------------------------------- reading


def is_data_set(root: str | Path) -> bool:
    """Tell whether a folder, or one below it, has the info.json of a DeepH data set."""
    return next(Path(root).rglob("info.json"), None) is not None


def data_folders(root: str | Path) -> list[Path]:
    """Return the folders of a data set that hold a structure: `root` itself, or those below it.

    Raises ValueError if there is none.
    """
    root = Path(root)
    folders = [root] if (root / "info.json").is_file() else sorted(path.parent for path in root.glob("**/info.json"))
    if not folders:
        raise ValueError(f"{root}: no info.json in it or below, expected a folder of a DeepH data set.")
    return folders


def hdf5_files(folder: Path) -> list[Path]:
    """Return the HDF5 files of one structure of a data set."""
    return sorted(path for path in folder.glob("*.h5") if path.is_file())


def read(folder: str | Path, probed: bool = False, overlap_alone: bool = False) -> Operators:
    """Read H and S of one structure of a DeepH data set, of either layout.

    overlap_alone: S alone is read, of a folder which may have no H; H is then zero.
    probed: whether another process has read its HDF5 files without harm (`sandbox.probe`); if not, one does so first.

    The basis has shells alone (`basis.shells_only`). Atoms are wrapped as CP2K wraps them, and the cells R with them. A
    structure whose blocks all belong to the home cell is taken for a molecule. eV become Hartree by CODATA 2006, as everywhere
    in hamscale.

    Raises ValueError, naming the file, if a file is missing or cut short, if there are two spins, if H and S have different
    pairs, if a block has another shape than its shells say, if a value is not a number or complex, if a block is not the
    transpose of its reverse, if S is not that of orbitals at the places of the atoms (`_check_values`), or if an HDF5 file has
    links or takes data from elsewhere.
    """
    folder = Path(folder)
    info = _json(folder / "info.json")
    if not probed:
        probe(*hdf5_files(folder))
    if info.get("spinful", info.get("isspinful", False)):
        raise ValueError(f"{folder / 'info.json'}: spinful, expected one spin: operators here are spin-restricted.")
    if info.get("orthogonal_basis", False):
        raise ValueError(f"{folder / 'info.json'}: orthogonal_basis, expected orbitals of atoms, which overlap.")
    read_layout = _read_dock if (folder / "POSCAR").is_file() else _read_pack
    try:
        atoms, shells, fermi_ev, blocks = read_layout(folder, info, ("overlap",) if overlap_alone else MATRICES)
    except OSError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}. Expected the files of a DeepH data set.") from None
    except KeyError as error:
        raise ValueError(f"{folder}: {error.args[0]}. Expected a data set of DeepH-dock or DeepH-pack.") from None
    basis = Basis(
        ElementBasis(element, "DeepH " + "".join(SHELL_LETTERS[l] for l in l_of_shells), shells_only(l_of_shells), "unknown", 0)
        for element, l_of_shells in shells.items()
    )
    pairs, matrices = blocks
    overlap = matrices["overlap"]
    hamiltonian = matrices.get("hamiltonian", np.zeros_like(overlap))
    attributes = {"source": "dft", "code": "DeepH data set", "wall_seconds": 0.0}
    if fermi_ev is not None:
        attributes["fermi_level_hartree"] = ev_to_hartree(_number(folder / "info.json", "the Fermi level", fermi_ev))
    if (electrons := info.get("occupation")) is not None:
        attributes["electrons"] = round(_number(folder / "info.json", "occupation", electrons))
    try:
        _check_pairs(atoms, pairs)
        pairs = _wrap(atoms, pairs)
        check_distances("structure", atoms)
        operators = Operators(atoms, basis, PairList(atoms, pairs), ev_to_hartree(hamiltonian), overlap, attributes).sorted()
        for name in ("hamiltonian", "overlap"):
            check_finite(name, getattr(operators, name))
            difference = operators.make_hermitian(getattr(operators, name))
            if difference > HERMITICITY_TOLERANCE:
                raise ValueError(
                    f"{name} differs from its adjoint by {difference:.1e} (Hartree, 1), expected at most "
                    f"{HERMITICITY_TOLERANCE:.0e}."
                )
        _check_values(operators)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return operators


def _check_pairs(atoms: Atoms, pairs: np.ndarray) -> None:
    """Raise ValueError if a pair is there twice or of atoms that are too far apart, or if an atom has no block of its own."""
    if np.abs(pairs[:, 2:]).max(initial=0) > FARTHEST_ANGSTROM / MINIMUM_DISTANCE_ANGSTROM:
        raise ValueError(
            f"a cell R of a pair is {pairs[np.abs(pairs[:, 2:]).max(1).argmax(), 2:].tolist()}: no orbitals reach it."
        )
    of_pairs = PairList(atoms, pairs)
    if of_pairs.distances.max(initial=0) > FARTHEST_ANGSTROM:
        i, j, *R = pairs[of_pairs.distances.argmax()].tolist()
        raise ValueError(
            f"block ({i}, {j}, {R}) is of atoms {of_pairs.distances.max():.0f} A apart, expected at most {FARTHEST_ANGSTROM:g}."
        )
    if len(np.unique(of_pairs.keys)) < len(pairs):
        raise ValueError("a pair of atoms is there twice, expected one block of each. Write the data set again.")
    if len(lacking := np.setdiff1d(np.arange(len(atoms)), pairs[of_pairs.onsite, 0])):
        raise ValueError(f"atom {lacking[0]} has no block (i, i, 0) of its own. Write the data set again.")


def _check_values(operators: Operators) -> None:
    """Raise ValueError if H or S is what none can be.

    |H| is bounded; S is nearly one on its diagonal and hardly above it anywhere, and it is a two-centre quantity: seen along
    the line between two atoms it couples orbitals of the same m alone. It does not if the order of shells or of m, the
    positions or the cells R are others than those of the matrices.
    """
    if (largest := np.abs(operators.hamiltonian).max(initial=0)) > LARGEST_HARTREE:
        raise ValueError(f"hamiltonian has an element of {largest:.1e} Hartree, expected at most {LARGEST_HARTREE:.0e}.")
    worst = max(float(np.abs(operators.overlap).max(initial=0)), 1 + diagonal_error(operators))
    if worst > 1 + DIAGONAL_ELSEWHERE:
        raise ValueError(
            f"overlap has an element that is {worst - 1:.1e} off, expected one on its diagonal, to {DIAGONAL_ELSEWHERE:g}, and "
            "less elsewhere."
        )
    deviations = edge_frame_deviations(operators)
    if len(deviations) and deviations.max() > OVERLAP_TOLERANCE:
        i, j, *R = operators.pairs[int(deviations.argmax())].tolist()
        raise ValueError(
            f"overlap of atoms {i} and {j}, R = {R}, is not that of orbitals at their places: it couples other m by "
            f"{deviations.max():.1e}, expected at most {OVERLAP_TOLERANCE:.0e}. Do the order of shells (elements_orbital_map), "
            "the positions and atom_pairs belong to these matrices?"
        )


def _json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected the info.json of a DeepH data set.")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, expected an object of keys and values.")
    return content


def _number(path: Path, name: str, found: object) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < 1e9:  # also NaN
        raise ValueError(f"{path}: {name} is {found!r:.80}, expected a number.")
    return float(found)


def _shells(path: Path, element: str, found: object) -> list[int]:
    """Return the l of the shells of an element. Raises ValueError if they are none."""
    if not (isinstance(found, list) and 0 < len(found) <= 100 and all(type(l) is int for l in found)):
        raise ValueError(f"{path}: shells of {element} are {found!r:.80}, expected a list of their l, e.g. [0, 0, 1].")
    if not 0 <= min(found) <= max(found) < len(SHELL_LETTERS):
        raise ValueError(f"{path}: shells of {element} are {found!r:.80}, expected l of 0 to {len(SHELL_LETTERS) - 1}.")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file; what h5py raises while it is read, exceptions of many types, becomes ValueError with its path."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as error:
        told = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise ValueError(told if told.startswith(str(path)) else f"{path}: cannot be read as HDF5: {told:.200}") from None


def _dataset(path: Path, file: h5py.File, name: str, kinds: str, width: int | None = None) -> np.ndarray:
    """Read a dataset of numbers, (n,), or (n, width), or of any two lengths if width is 0.

    kinds: of numpy's dtype, "iu" of integers, "f" of real numbers. Raises ValueError before anything is read if there is no
    such dataset, or if it is of other numbers or shape. That it lies in the file and is no larger, `probe` has seen.
    """
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path}: {name} is missing, or no dataset.")
    if dataset.dtype.kind not in kinds:
        expected = "integers" if "i" in kinds else "real numbers"
        raise ValueError(f"{path}: {name} are {dataset.dtype}, expected {expected}.")
    shape_fits = dataset.ndim == (1 if width is None else 2) and (not width or dataset.shape[1] == width)
    if not shape_fits:
        expected = "(n,)" if width is None else f"(n, {width or 'm'})"
        raise ValueError(f"{path}: {name} has the shape {dataset.shape}, expected {expected}.")
    return dataset[:]


def _read_dock(folder: Path, info: dict, names: tuple[str, ...]) -> Layout:
    try:
        found = ase.io.read(folder / "POSCAR", format="vasp")
    except Exception as error:  # ASE raises exceptions of any type
        told = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ValueError(f"{folder / 'POSCAR'}: not a POSCAR that ASE reads ({told}).") from None
    assert isinstance(found, Atoms), "without an index ASE reads one structure"
    atoms = Atoms(found.numbers, found.positions, cell=found.cell, pbc=True)
    check_structure(str(folder / "POSCAR"), atoms)
    of_elements = info["elements_orbital_map"]
    if not isinstance(of_elements, dict):
        raise ValueError(f"{folder / 'info.json'}: elements_orbital_map is no mapping of elements to the l of their shells.")
    shells = {e: _shells(folder / "info.json", e, of_elements[e]) for e in dict.fromkeys(atoms.get_chemical_symbols())}
    orbitals = _orbitals(atoms, shells)
    for name, count in (("atoms_quantity", len(atoms)), ("orbits_quantity", int(orbitals.sum()))):
        if info.get(name, count) != count:
            raise ValueError(f"{folder / 'info.json'}: {name} is {info[name]!r:.80}, POSCAR and the shells say {count}.")
    values = {}
    for name in names:
        path = folder / f"{name}.h5"
        with _opened(path) as file:
            pairs = _dataset(path, file, "atom_pairs", "iu", 5)
            shapes, bounds = _dataset(path, file, "chunk_shapes", "iu", 2), _dataset(path, file, "chunk_boundaries", "iu")
            entries = _dataset(path, file, "entries", "f")
        if len(shapes) != len(pairs):
            raise ValueError(f"{path}: {len(shapes)} chunk_shapes of {len(pairs)} atom_pairs, expected one of each.")
        pairs = pairs[:, [3, 4, 0, 1, 2]].astype(np.int64)
        _check_blocks(path, pairs, orbitals, shapes)
        if not np.array_equal(bounds, np.concatenate([[0], np.cumsum(np.prod(shapes, axis=1))])) or bounds[-1] != len(entries):
            raise ValueError(f"{path}: chunk_boundaries do not fit chunk_shapes and entries. Was the file cut short?")
        values[name] = pairs, entries.astype(float)
    if not all(np.array_equal(values[name][0], pairs) for name in names):
        raise ValueError(f"{folder}: atom_pairs of hamiltonian.h5 and overlap.h5 differ, expected the same in both.")
    fermi = info.get("fermi_energy_eV")
    return atoms, shells, fermi, (pairs, {name: entries for name, (_, entries) in values.items()})


def _numbers(path: Path) -> np.ndarray:
    """Read a table of numbers. Raises ValueError, naming the file, if it is none."""
    try:
        return np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers: {' '.join(str(error).split())}") from None


def _pack_structure(folder: Path) -> tuple[Atoms, dict[str, list[int]]]:
    """Read the structure of DeepH-pack's layout, and the l of the shells of its elements."""
    numbers, cell, positions = (_numbers(folder / name) for name in ("element.dat", "lat.dat", "site_positions.dat"))
    numbers = numbers.ravel()
    if cell.shape != (3, 3) or positions.shape != (3, len(numbers)) or not (numbers % 1 == 0).all() or abs(numbers).max() > 200:
        raise ValueError(
            f"{folder}: lat.dat is {cell.shape}, site_positions.dat {positions.shape}, and element.dat has {len(numbers)} "
            "numbers, expected (3, 3), (3, atoms) and the atomic number of each atom."
        )
    atoms = Atoms(numbers.astype(int), positions.T, cell=cell.T, pbc=True)
    check_structure(str(folder), atoms)
    path = folder / "orbital_types.dat"
    try:
        lines = [[int(l) for l in line.split()] for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: not lines of l: {error}") from None
    if len(lines) != len(atoms):
        raise ValueError(f"{path}: {len(lines)} lines of shells for {len(atoms)} atoms, expected one each.")
    shells: dict[str, list[int]] = {}
    for symbol, line in zip(atoms.get_chemical_symbols(), lines):
        if shells.setdefault(symbol, _shells(path, symbol, line)) != line:
            raise ValueError(f"{path}: atoms of {symbol} differ in their shells.")
    return atoms, shells


def _read_pack(folder: Path, info: dict, names: tuple[str, ...]) -> Layout:
    atoms, shells = _pack_structure(folder)
    orbitals = _orbitals(atoms, shells)
    order = {e: _from_openmx(l) for e, l in shells.items()}
    found = {}
    for name in names:
        path = folder / f"{name}s.h5"
        with _opened(path) as file:
            keys = [json.loads(key) for key in file]
            if not all(isinstance(k, list) and len(k) == 5 and all(type(n) is int and abs(n) < 2**31 for n in k) for k in keys):
                raise ValueError(f"{path}: a dataset has another name than [R1, R2, R3, i, j].")
            blocks = [_dataset(path, file, key, "f", 0) for key in file]
        numbers = np.array(keys, dtype=np.int64).reshape(-1, 5)
        pairs = np.column_stack([numbers[:, 3:] - 1, numbers[:, :3]])
        _check_blocks(path, pairs, orbitals, np.array([block.shape for block in blocks]).reshape(-1, 2))
        if len(np.unique(pairs, axis=0)) < len(pairs):
            raise ValueError(f"{path}: a pair of atoms is there twice, expected one block of each.")
        symbols = atoms.get_chemical_symbols()
        blocks = [block[np.ix_(order[symbols[i]], order[symbols[j]])] for block, (i, j) in zip(blocks, pairs[:, :2])]
        found[name] = pairs, blocks
    # H may have blocks that S lacks, and the other way round
    pairs = np.unique(np.concatenate([found[name][0] for name in found]), axis=0)
    offsets = block_offsets(pairs, orbitals)
    values = {}
    for name, (of_matrix, blocks) in found.items():
        values[name] = np.zeros(offsets[-1])
        for b, block in zip(find_pairs(of_matrix, pairs), blocks):
            values[name][offsets[b] : offsets[b + 1]] = block.ravel()
    return atoms, shells, info.get("fermi_level"), (pairs, values)


def _orbitals(atoms: Atoms, shells: dict[str, list[int]]) -> np.ndarray:
    return np.array([sum(2 * l + 1 for l in shells[e]) for e in atoms.get_chemical_symbols()])


def _from_openmx(shells: list[int]) -> np.ndarray:
    """Return the index that puts an atom's orbitals from OpenMX's order into m = -l..l."""
    starts = np.cumsum([0, *(2 * l + 1 for l in shells)])
    # above f OpenMX's order is m = 0, 1, -1, 2, -2, ...
    index = [OPENMX.get(l, [*range(2 * l, -1, -2), *range(1, 2 * l, 2)]) for l in shells]
    return np.concatenate([start + np.array(i) for start, i in zip(starts, index)])


def _check_blocks(path: Path, pairs: np.ndarray, orbitals: np.ndarray, shapes: np.ndarray) -> None:
    if len(outside := np.flatnonzero(((pairs[:, :2] < 0) | (pairs[:, :2] >= len(orbitals))).any(1))):
        i, j = pairs[outside[0], :2].tolist()
        raise ValueError(
            f"{path}: a block of atom {j if 0 <= i < len(orbitals) else i}, expected atoms 0 to {len(orbitals) - 1}."
        )
    expected = orbitals[pairs[:, :2]]
    if len(wrong := np.flatnonzero((shapes != expected).any(1))):
        i, j, *R = pairs[wrong[0]].tolist()
        raise ValueError(
            f"{path}: block ({i}, {j}, {R}) is {shapes[wrong[0]].tolist()}, the shells of its atoms say "
            f"{expected[wrong[0]].tolist()}. Do info.json and the matrices belong together?"
        )


def _wrap(atoms: Atoms, pairs: np.ndarray) -> np.ndarray:
    """Wrap the atoms in place, and return the pairs with the cells that belong to the wrapped atoms: R + n_j - n_i."""
    # a sheet in a data set was calculated by a code that repeats its vacuum too, and its energy has the zero of such a cell
    atoms.pbc = bool(pairs[:, 2:].any())
    if not atoms.pbc.any():
        return pairs
    wrapped = wrap_as_cp2k(atoms)
    # wrapping may also shift all atoms together, by less than half a cell, which rounding removes
    moved = np.round(atoms.cell.scaled_positions(atoms.positions - wrapped.positions)).astype(np.int64)
    atoms.positions = wrapped.positions
    return np.column_stack([pairs[:, :2], pairs[:, 2:] + moved[pairs[:, 1]] - moved[pairs[:, 0]]])
