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
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ..basis import Basis, ElementBasis, shells_only
from ..container import new_h5, open_foreign
from ..files import atomic_folder
from ..operators import Operators, check_finite
from ..pairs import PairList, block_offsets, find_pairs
from ..structures import charge_of, wrap_as_cp2k
from ..units import ev_to_hartree, hartree_to_ev
from .stream import Stored, write_energies

HERMITICITY_TOLERANCE = 1e-4  # Hartree for H, 1 for S: a larger difference does not come from rounding
OPENMX = {0: [0], 1: [1, 2, 0], 2: [2, 4, 0, 3, 1], 3: [6, 4, 2, 0, 1, 3, 5]}  # l -> places of m = -l..l in OpenMX's order


# atoms, l of the shells of each element, Fermi level in eV, (pairs, H in eV, S)
Layout: TypeAlias = tuple[Atoms, dict[str, list[int]], float | None, tuple[np.ndarray, np.ndarray, np.ndarray]]


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


def read(folder: str | Path) -> Operators:
    """Read H and S of one structure of a DeepH data set, of either layout.

    The basis has shells alone (`basis.shells_only`). Atoms are wrapped as CP2K wraps them, and the cells R with them. A
    structure whose blocks all belong to the home cell is taken for a molecule. eV become Hartree by CODATA 2006, as everywhere
    in hamscale.

    Raises ValueError, naming the file, if a file is missing or cut short, if there are two spins, if H and S have different
    pairs, if a block has another shape than its shells say, if a value is not a number, or if a block is not the transpose of
    its reverse.
    """
    folder = Path(folder)
    info = _json(folder / "info.json")
    if info.get("spinful", info.get("isspinful", False)):
        raise ValueError(f"{folder / 'info.json'}: spinful, expected one spin: operators here are spin-restricted.")
    read_layout = _read_dock if (folder / "POSCAR").is_file() else _read_pack
    try:
        atoms, shells, fermi_ev, blocks = read_layout(folder, info)
    except OSError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}. Expected the files of a DeepH data set.") from None
    except KeyError as error:
        raise ValueError(f"{folder}: {error.args[0]}. Expected a data set of DeepH-dock or DeepH-pack.") from None
    basis = Basis(
        ElementBasis(element, "DeepH " + "".join("spdfghi"[l] for l in l_of_shells), shells_only(l_of_shells), "unknown", 0)
        for element, l_of_shells in shells.items()
    )
    pairs, hamiltonian, overlap = blocks
    attributes = {"source": "dft", "code": "DeepH data set", "wall_seconds": 0.0}
    if fermi_ev is not None:
        attributes["fermi_level_hartree"] = ev_to_hartree(fermi_ev)
    try:
        pairs = _wrap(atoms, pairs)
        operators = Operators(atoms, basis, PairList(atoms, pairs), ev_to_hartree(hamiltonian), overlap, attributes).sorted()
        for name in ("hamiltonian", "overlap"):
            check_finite(name, getattr(operators, name))
            difference = operators.make_hermitian(getattr(operators, name))
            if difference > HERMITICITY_TOLERANCE:
                raise ValueError(
                    f"{name} differs from its adjoint by {difference:.1e} (Hartree, 1), expected at most "
                    f"{HERMITICITY_TOLERANCE:.0e}."
                )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return operators


def _json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected the info.json of a DeepH data set.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def _read_dock(folder: Path, info: dict) -> Layout:
    try:
        found = ase.io.read(folder / "POSCAR", format="vasp")
    except Exception as error:  # ASE raises exceptions of any type
        raise ValueError(f"{folder / 'POSCAR'}: not a POSCAR that ASE reads ({type(error).__name__}: {error}).") from None
    assert isinstance(found, Atoms), "without an index ASE reads one structure"
    atoms = Atoms(found.numbers, found.positions, cell=found.cell)
    shells = {e: [int(l) for l in info["elements_orbital_map"][e]] for e in dict.fromkeys(atoms.get_chemical_symbols())}
    orbitals = _orbitals(atoms, shells)
    values = {}
    for name in ("hamiltonian", "overlap"):
        path = folder / f"{name}.h5"
        with open_foreign(path) as file:
            pairs, bounds, entries = file["atom_pairs"][:], file["chunk_boundaries"][:], file["entries"][:]
            shapes = file["chunk_shapes"][:]
        pairs = pairs[:, [3, 4, 0, 1, 2]].astype(np.int64)
        _check_blocks(path, pairs, orbitals, shapes)
        if not np.array_equal(bounds, np.concatenate([[0], np.cumsum(np.prod(shapes, axis=1))])) or bounds[-1] != len(entries):
            raise ValueError(f"{path}: chunk_boundaries do not fit chunk_shapes and entries. Was the file cut short?")
        values[name] = pairs, entries.astype(float)
    if not np.array_equal(values["hamiltonian"][0], values["overlap"][0]):
        raise ValueError(f"{folder}: atom_pairs of hamiltonian.h5 and overlap.h5 differ, expected the same in both.")
    fermi = info.get("fermi_energy_eV")
    return atoms, shells, fermi, (pairs, values["hamiltonian"][1], values["overlap"][1])


def _read_pack(folder: Path, info: dict) -> Layout:
    numbers = np.loadtxt(folder / "element.dat", dtype=int, ndmin=1)
    cell, positions = np.loadtxt(folder / "lat.dat").T, np.loadtxt(folder / "site_positions.dat", ndmin=2).T
    atoms = Atoms(numbers, positions, cell=cell)
    lines = [[int(l) for l in line.split()] for line in (folder / "orbital_types.dat").read_text().splitlines() if line.strip()]
    shells: dict[str, list[int]] = {}
    for number, line in zip(numbers.tolist(), lines, strict=True):
        if shells.setdefault(chemical_symbols[number], line) != line:
            raise ValueError(f"{folder / 'orbital_types.dat'}: atoms of {chemical_symbols[number]} differ in their shells.")
    orbitals = _orbitals(atoms, shells)
    order = {e: _from_openmx(l) for e, l in shells.items()}
    found = {}
    for name in ("hamiltonian", "overlap"):
        path = folder / f"{name}s.h5"
        with open_foreign(path) as file:
            keys = np.array([json.loads(key) for key in file], dtype=np.int64).reshape(-1, 5)
            blocks = [file[key][:] for key in file]
        pairs = np.column_stack([keys[:, 3:] - 1, keys[:, :3]])
        _check_blocks(path, pairs, orbitals, np.array([block.shape for block in blocks]).reshape(-1, 2))
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
    return atoms, shells, info.get("fermi_level"), (pairs, values["hamiltonian"], values["overlap"])


def _orbitals(atoms: Atoms, shells: dict[str, list[int]]) -> np.ndarray:
    return np.array([sum(2 * l + 1 for l in shells[e]) for e in atoms.get_chemical_symbols()])


def _from_openmx(shells: list[int]) -> np.ndarray:
    """Return the index that puts an atom's orbitals from OpenMX's order into m = -l..l."""
    starts = np.cumsum([0, *(2 * l + 1 for l in shells)])
    # above f OpenMX's order is m = 0, 1, -1, 2, -2, ...
    index = [OPENMX.get(l, [*range(2 * l, -1, -2), *range(1, 2 * l, 2)]) for l in shells]
    return np.concatenate([start + np.array(i) for start, i in zip(starts, index)])


def _check_blocks(path: Path, pairs: np.ndarray, orbitals: np.ndarray, shapes: np.ndarray) -> None:
    if len(pairs) and not (pairs[:, :2].min() >= 0 and pairs[:, :2].max() < len(orbitals)):
        raise ValueError(f"{path}: a block of atom {pairs[:, :2].max()}, expected atoms 0 to {len(orbitals) - 1}.")
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
