"""Write and read H and S of a structure: whole, a piece at a time, or as the shards of many ranks.

The layouts are those of docs/files.md. Atoms are wrapped as CP2K wraps them, so that R has the same meaning everywhere.
"""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ..basis import Basis, ElementBasis
from ..container import create_h5, edit_h5, identity, is_protected, open_h5, schema_of
from ..files import flush, locked
from ..layout import Array, Layout
from ..pairs import PairList, block_offsets
from ..structures import GIVEN, charge_of, given_cells
from .blocks import Operators

STRUCTURE = {
    "structure/numbers": Array("i4", ("A",)),
    "structure/positions": Array("f8", ("A", 3)),
    "structure/cell": Array("f8", (3, 3)),
    "structure/pbc": Array("bool", (3,)),
    f"structure/{GIVEN}": Array("f8", ("A", 3), optional=True),
}
BASIS = {"basis/*/l": Array("i4", ("*",))}
_BLOCKS = {
    "pairs": Array("i4", ("E", 5)),
    "offsets": Array("i8", ("E+1",)),
    "hamiltonian": Array("f8", ("n",), leading=(2,)),
    "overlap": Array("f8", ("n",)),
}
OPERATORS = Layout(
    "operators/2",
    STRUCTURE
    | BASIS
    | _BLOCKS
    | {
        "mulliken_charges": Array("f8", ("A",), optional=True),
        "orbital_energies/kpoints": Array("f8", ("K", 3), optional=True),
        "orbital_energies/energies": Array("f8", ("K", "*"), optional=True, leading=(2,)),
    },
    earlier="operators/1",
)
# the rows of a rank, without the transposed blocks that other ranks have
SHARD = Layout("operators-shard/2", STRUCTURE | BASIS | _BLOCKS, {"prediction": str})
# the file that puts shards together
JOINED = Layout("operators-joined/2", STRUCTURE | BASIS | {"shards": Array("u1", ("ranks", 16))}, {"prediction": str})
UNITS = {"hamiltonian": "Hartree", "overlap": "1"}
# attributes NAME_hartree of a file whose band edges are known (analysis/levels.py)
ENERGIES = ("fermi_level", "valence_band_maximum", "conduction_band_minimum", "mid_gap", "fermi_level_standard_error")
LEVELS_UNKNOWN = -1  # the attribute `metal` of a file whose band edges are not known yet
OPEN_SHARDS = 64  # a process may have about a thousand files open
HERMITIAN = 1e-9  # largest deviation of H (Hartree) or S from its adjoint
DIAGONAL = 1e-3  # largest deviation of <mu|mu> from one; CP2K cuts tails of orbitals
DIAGONAL_ELSEWHERE = 0.05  # the same of other codes, whose optimised orbitals have norms of 0.985 to 1.014

# (slice of the values, H in Hartree, S)
Piece: TypeAlias = tuple[slice, np.ndarray, np.ndarray]


def write_operators(path: str | Path, operators: Operators) -> None:
    """Write operators to a file of schema `operators/2`, atomically."""
    o = operators
    whole = [(slice(0, int(o.offsets[-1])), o.hamiltonian, o.overlap)]
    write_pieces(
        path, o.atoms, o.basis, o.pairs, whole, o.attributes, o.orbital_energies, spins=o.spins, charges=o.mulliken_charges
    )


def write_pieces(
    path: str | Path,
    atoms: Atoms,
    basis: Basis,
    pairs: PairList,
    pieces: Iterable[Piece],
    attributes: dict | Callable[[], dict],
    orbital_energies: tuple[np.ndarray, np.ndarray] | None = None,
    layout: Layout = OPERATORS,
    spins: int = 1,
    charges: np.ndarray | None = None,
) -> None:
    """Write `operators/2`, or a shard of it, atomically, with one piece in memory at a time.

    pieces: an iterable of (slice of the values, H in Hartree, S), where H has a leading axis if there are two spins.
    attributes: a dict, or a function that returns it when all pieces are written.
    """
    offsets = block_offsets(pairs, basis.n_orbitals(atoms.numbers))
    with create_h5(path, layout) as file:
        write_structure(file, atoms)
        write_basis(file, basis)
        file["pairs"] = np.asarray(pairs, np.int32)
        file["offsets"] = offsets.astype(np.int64)
        of_spins = (offsets[-1],) if spins == 1 else (spins, offsets[-1])
        for name, shape in (("hamiltonian", of_spins), ("overlap", of_spins[-1:])):
            file.create_dataset(name, shape, float).attrs["unit"] = UNITS[name]
        for span, hamiltonian, overlap in pieces:
            file["hamiltonian"][..., span], file["overlap"][span] = hamiltonian, overlap
        if orbital_energies:
            file["orbital_energies/kpoints"], file["orbital_energies/energies"] = orbital_energies
            file["orbital_energies/energies"].attrs["unit"] = "Hartree"
        if charges is not None:
            file["mulliken_charges"] = charges
            file["mulliken_charges"].attrs["unit"] = "e"
        file.attrs.update(attributes() if callable(attributes) else attributes)


def shard_path(path: str | Path, prediction: str, rank: int) -> Path:
    """Return where a rank writes its rows of the prediction of that name, in a folder beside the file of the whole."""
    path = Path(path)
    return path.with_name(f"{path.name}.shards") / f"{prediction}-{rank}.h5"


def join_shards(path: str | Path, prediction: str, ranks: int, attributes: dict) -> None:
    """Write the file that puts the shards of a prediction together, atomically, without copying them.

    It holds the digest of each. Raises ValueError if a shard is missing or damaged.
    """
    shards = [shard_path(path, prediction, rank) for rank in range(ranks)]
    with open_h5(shards[0], SHARD) as file:
        atoms, basis = read_structure(file), read_basis(file)
    with create_h5(path, JOINED, prediction=prediction) as file:
        write_structure(file, atoms)
        write_basis(file, basis)
        file["shards"] = np.array([list(bytes.fromhex(identity(shard))) for shard in shards], np.uint8)
        file.attrs.update(attributes)


def move_operators(source: str | Path, path: str | Path) -> None:
    """Put a file of operators of the same name, with its shards, in the place of another, whose shards are removed.

    At any time the file that is there has its shards, also if several processes do this at once.
    """
    source, path = Path(source), Path(path)
    new, shards = shard_path(source, "", 0).parent, shard_path(path, "", 0).parent
    if not new.is_dir() and not shards.is_dir():
        source.replace(path)
        flush(path.parent)
        return
    with locked(shards):
        for shard in new.glob("*.h5"):
            shard.replace(shards / shard.name)
        flush(shards)
        source.replace(path)
        flush(path.parent)
        joined = _layout_of(path) is JOINED
        kept = [shard.name for shard in shards.glob(f"{_prediction(path)}-*.h5")] if joined else []
        for other in set(shards.iterdir()) - {shards / name for name in kept}:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
        if not kept:
            shards.rmdir()


def _prediction(path: Path) -> str:
    with open_h5(path, JOINED) as file:
        return str(file.attrs["prediction"])


def store_levels(path: str | Path, levels: dict) -> bool:
    """Store band edges in the places that a predicted file has for them, and return whether this was done.

    It is not done if the file has no such places, or if the band edges of a k-grid are known already.
    levels: `analysis.levels.Levels.attributes`. A copy of the file with the levels takes its place.
    """
    with open_operators(path) as found:
        of = found.attributes
    of_grid = of.get("metal", LEVELS_UNKNOWN) != LEVELS_UNKNOWN and not of.get("levels_clusters", 0)
    if of_grid or not levels.keys() <= of.keys() or not is_protected(path):
        return False
    with edit_h5(path, _layout_of(path)) as file:
        for name, value in levels.items():
            file.attrs.modify(name, value)
    return True


def _layout_of(path: str | Path) -> Layout:
    """Return the layout of a file of operators: a whole one, or one that puts shards together."""
    joined = Path(path).is_file() and is_protected(path) and schema_of(path) == JOINED.schema
    return JOINED if joined else OPERATORS


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Add the path of the file to errors about its content."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}. Expected all of schema {OPERATORS.schema} (docs/files.md).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass
class OperatorsFile:
    """Open file of operators, whose values are read a span at a time.

    pairs (E, 5): as stored; a file of shards has those of rank after rank. offsets (E+1,): block b has the values
    offsets[b]:offsets[b+1]. protected: whether every value is compared with a digest. spins: the number of matrices H.
    """

    path: Path
    atoms: Atoms
    basis: Basis
    pairs: PairList
    attributes: dict
    spins: int
    orbital_energies: tuple[np.ndarray, np.ndarray] | None
    mulliken_charges: np.ndarray | None
    protected: bool
    ends: np.ndarray  # values up to the end of each shard
    shards: "dict[int, h5py.File] | _Shards"
    offsets: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = block_offsets(self.pairs, self.basis.n_orbitals(self.atoms.numbers))

    def read(self, name: str, span: slice = slice(None)) -> np.ndarray:
        """Return the values of "hamiltonian" (Hartree) or "overlap" in a span: (m,), or (2, m) for H of two spins.

        Raises ValueError, with the path, if one is not finite, or not what was written.
        """
        first, last, _ = span.indices(int(self.ends[-1]))
        last = max(first, last)
        leading = (self.spins,) if name == "hamiltonian" and self.spins > 1 else ()
        result = np.empty((*leading, last - first))
        every = (slice(None),) * len(leading)
        for k in range(np.searchsorted(self.ends, first, "right"), np.searchsorted(self.ends, last, "left") + 1):
            begin = int(self.ends[k - 1]) if k else 0
            low, high = max(first, begin), min(last, int(self.ends[k]))
            if low < high:
                source, target = slice(low - begin, high - begin), slice(low - first, high - first)
                self.shards[k][name].read_direct(result, (*every, source), (*every, target))
        check_finite(f"{self.path}: {name}", result)
        return result


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise ValueError if a value of H or S is not finite."""
    # the sum of squares is not finite if a value is not, and takes two thirds of the time of a look at each
    if not np.isfinite(np.vdot(values, values)) and not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity. The run that made it went wrong: make it again.")


class _Shards:
    """Shards of a prediction, of which the last OPEN_SHARDS that were asked for are open."""

    def __init__(self, path: Path, prediction: str, digests: list[str]) -> None:
        self.path, self.prediction, self.digests = path, prediction, digests
        self.open: OrderedDict[int, tuple[ExitStack, h5py.File]] = OrderedDict()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *details: Any) -> None:
        with ExitStack() as every:  # each is told of an error, which may be its own damage
            for stack, _ in self.open.values():
                every.push(stack)
            every.__exit__(*details)

    def __getitem__(self, rank: int) -> h5py.File:
        if rank not in self.open:
            shard = shard_path(self.path, self.prediction, rank)
            if not shard.is_file():
                raise ValueError(f"its shard {shard} is missing. Move the folder of shards with the file, or predict again.")
            if identity(shard) != self.digests[rank]:
                raise ValueError(f"its shard {shard} is of another prediction, or damaged. Predict again.")
            if len(self.open) == OPEN_SHARDS:
                self.open.popitem(last=False)[1][0].close()
            stack = ExitStack()
            self.open[rank] = stack, stack.enter_context(open_h5(shard, SHARD))
        self.open.move_to_end(rank)
        return self.open[rank][1]


@contextmanager
def open_operators(path: str | Path) -> Iterator[OperatorsFile]:
    """Open a file of operators and check everything except the values.

    Raises ValueError, with the path, if the file is missing, cut short, damaged, of another schema, has blocks that do not fit
    the basis, lacks a unit or the transposed block of a pair, or if a shard is missing or of another prediction.
    """
    path, layout = Path(path), _layout_of(path)
    with ExitStack() as stack:
        file = stack.enter_context(open_h5(path, layout))
        with _named(path):
            atoms, basis = read_structure(file), read_basis(file)
            attributes = {name: value for name, value in file.attrs.items() if name != "schema"}
            shards: dict[int, h5py.File] | _Shards = {0: file}
            parts = 1
            if layout is JOINED:
                digests = [bytes(row).hex() for row in file["shards"][:]]
                shards = stack.enter_context(_Shards(path, attributes["prediction"], digests))
                parts = len(digests)
            tables, ends = zip(*(_table(shards[k], basis, atoms) for k in range(parts)))
            pairs = PairList(atoms, np.concatenate(tables))
            _ = pairs.flipped_index  # raises ValueError if the transpose of a block is missing
            if layout is OPERATORS and (np.diff(pairs.keys) <= 0).any():
                raise ValueError("/pairs are not sorted by i, j, R.")
            printed = file.get("orbital_energies")
            energies = (printed["kpoints"][:], printed["energies"][:]) if printed else None
            charges = file["mulliken_charges"][:] if "mulliken_charges" in file else None
            if charges is not None:
                check_finite("mulliken_charges", charges)
            spins = 2 if shards[0]["hamiltonian"].ndim == 2 else 1
        of_file = path, atoms, basis, pairs, attributes, spins, energies, charges, is_protected(path), np.cumsum(ends), shards
        yield OperatorsFile(*of_file)


def _table(file: h5py.File, basis: Basis, atoms: Atoms) -> tuple[np.ndarray, int]:
    """Return the pairs of a file or of a shard, (E, 5), and the number of their values, after a look at both."""
    for name, unit in UNITS.items():
        if (found := file[name].attrs.get("unit")) != unit:
            raise ValueError(f"{name} has unit {found!r}, expected {unit!r}.")
    table = file["pairs"][:]
    if len(table) and not (table[:, :2].min() >= 0 and table[:, :2].max() < len(atoms)):
        raise ValueError(f"/pairs name atoms beyond the {len(atoms)} of the structure.")
    offsets = block_offsets(table, basis.n_orbitals(atoms.numbers))
    if not np.array_equal(file["offsets"], offsets) or len(file["overlap"]) != offsets[-1]:
        raise ValueError("/offsets do not fit the basis. Was the basis of this file changed?")
    return table, int(offsets[-1])


def read_operators(path: str | Path) -> Operators:
    """Read and check operators, in ascending order of their pairs.

    Raises ValueError as `open_operators` and `OperatorsFile.read` do, and of a file that is not protected also as
    `check_meaning` does.
    """
    with open_operators(path) as found:
        values = found.read("hamiltonian"), found.read("overlap")
        printed = found.orbital_energies, found.mulliken_charges
        operators = Operators(found.atoms, found.basis, found.pairs, *values, found.attributes, *printed)
        if not found.protected:
            with _named(path):
                check_meaning(operators)
        return operators.sorted() if isinstance(found.shards, _Shards) else operators


def check_meaning(operators: Operators) -> None:
    """Hold H and S against what every H and S is.

    Raises ValueError if either differs from its adjoint, or the diagonal of S from one.
    """
    for name, error in operators.hermiticity_error().items():
        if not error <= HERMITIAN:
            raise ValueError(f"{name} differs from its adjoint by {error:.3g} {UNITS[name]}, expected {HERMITIAN:g} at most.")
    of_cp2k = all(element.has_functions for element in operators.basis.values())
    if not (error := diagonal_error(operators)) <= (allowed := DIAGONAL if of_cp2k else DIAGONAL_ELSEWHERE):
        raise ValueError(f"the diagonal of S differs from one by {error:.3g}, expected {allowed:g} at most.")


def diagonal_error(operators: Operators) -> float:
    """Return the largest deviation of <mu|mu> from one."""
    worst = 0.0
    for z, _, rows, places in operators.groups():
        blocks = places[operators.pairs.onsite[rows]].take(operators.overlap)
        worst = max(worst, np.abs(blocks[:, :: operators.basis[z].n_orbitals + 1] - 1).max(initial=0.0))
    return worst


def write_structure(file: h5py.File, atoms: Atoms) -> None:
    group = file.create_group("structure")
    group["numbers"] = atoms.numbers.astype(np.int32)
    group["positions"] = atoms.positions
    group["cell"] = np.asarray(atoms.cell, dtype=float)
    group["pbc"] = atoms.pbc
    if charge := charge_of(atoms):
        group.attrs["charge"] = charge
    names = ["positions", "cell"]
    if given_cells(atoms) is not None:
        group[GIVEN] = atoms.arrays[GIVEN]
        names.append(GIVEN)
    for name in names:
        group[name].attrs["unit"] = "Angstrom"


def read_structure(file: h5py.File) -> Atoms:
    group = file["structure"]
    for name in ("positions", "cell"):
        if not np.isfinite(group[name]).all():
            raise ValueError(f"/structure/{name} holds NaN or infinity.")
    if len(numbers := group["numbers"][:]) and not (numbers.min() >= 1 and numbers.max() < len(chemical_symbols)):
        raise ValueError("/structure/numbers are no atomic numbers.")
    atoms = Atoms(numbers, group["positions"][:], cell=group["cell"][:], pbc=group["pbc"][:])
    if GIVEN in group:
        atoms.set_array(GIVEN, group[GIVEN][:], float, (3,))
    if "charge" in group.attrs:
        atoms.info["charge"] = int(group.attrs["charge"])
    return atoms


def write_basis(file: h5py.File, basis: Basis) -> None:
    for element in basis.values():
        group = file.create_group(f"basis/{element.element}")
        group["l"] = np.array(element.l, np.int32)
        for name in ("name", "text", "potential", "valence", "sha256"):
            group.attrs[name] = getattr(element, name)


def read_basis(file: h5py.File) -> Basis:
    elements = []
    for symbol, group in file["basis"].items():
        a = group.attrs
        element = ElementBasis(symbol, a["name"], a["text"], a["potential"], int(a["valence"]))
        if element.sha256 != a["sha256"] or list(group["l"]) != list(element.l):
            raise ValueError(
                f"basis of {symbol}: text, shells and sha256 do not belong together. The file was changed by hand."
            )
        elements.append(element)
    return Basis(elements)
