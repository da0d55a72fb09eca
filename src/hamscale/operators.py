"""Hold block-sparse H and S of a structure: in memory, in HDF5 (schema `operators/1`), as scipy CSR, and at a k-point.

A block (i, j, R) is <i, cell 0 | H | j, cell R>. H(k) = sum_R exp(+2 pi i k.R) H(R), k in fractions of the reciprocal
lattice. Atoms are wrapped as CP2K wraps them, so that R has the same meaning everywhere (docs/conventions.md).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
import scipy.sparse as sp
from ase import Atoms
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from .basis import Basis, ElementBasis
from .files import create_h5, open_h5, read_h5
from .pairs import PairList, block_offsets
from .structures import GIVEN, charge_of, given_cells

SCHEMA = "operators/1"
SHARD = "operators-shard/1"  # the same datasets, without the transposed blocks that other ranks have
PIECE = 1 << 17  # number of values that are processed at a time
# attributes NAME_hartree of a file whose band edges are known (analysis/levels.py)
ENERGIES = ("fermi_level", "valence_band_maximum", "conduction_band_minimum", "mid_gap", "fermi_level_standard_error")
SPINS = ("up", "down")  # names of the channels of a spin-polarised structure
LEVELS_UNKNOWN = -1  # the attribute `metal` of a file whose band edges are not known yet


@dataclass(frozen=True)
class Places:
    """Where G blocks of equal size lie among the values of all blocks: first (G,), their first values, and their size.

    Blocks are taken and put as rows, which copies them whole: an index of every value would be as large as the values.
    """

    first: np.ndarray
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.first), self.size

    def __getitem__(self, some: np.ndarray) -> "Places":
        """Return the places of some of the blocks, by mask or index."""
        return Places(self.first[some], self.size)

    def take(self, values: np.ndarray) -> np.ndarray:
        """Return a copy of the blocks of values (n,), (G, size)."""
        return sliding_window_view(values, self.size)[self.first] if len(self.first) else np.empty(self.shape, values.dtype)

    def put(self, values: np.ndarray, blocks: np.ndarray) -> None:
        """Replace the blocks of values (n,) by others, (G, size) or of as many values each."""
        if len(self.first):
            sliding_window_view(values, self.size, writeable=True)[self.first] = blocks.reshape(self.shape)


# (z_i, z_j, pair indices (G,), places of their values) of some pairs of two elements
SpeciesGroup: TypeAlias = tuple[int, int, np.ndarray, Places]
# (slice of the values, H in Hartree, S)
Piece: TypeAlias = tuple[slice, np.ndarray, np.ndarray]


@dataclass
class Operators:
    """H and S of one structure on one set of atom pairs.

    pairs    # (E, 5)  | i, j, Rx, Ry, Rz, sorted: a PairList, or its table
    offsets  # (E+1,)  | block b is values[offsets[b]:offsets[b+1]], row-major, (n_i, n_j)
    hamiltonian  # (n,), or (2, n) of a spin-polarised structure: spin up, then spin down | Hartree
    overlap  # (n,)    | 1
    atoms.info may hold the charge of the structure (structures.charge_of).
    attributes: source ("dft" or "predicted"), fermi_level_hartree, eps_threshold and any other records of the origin.
    orbital_energies: (k-points (K, 3), energies (K, n), or (2, K, n) of two spins, in Hartree) as the DFT code printed them,
    if it did.

    operators = read_operators("train-000.h5")
    H, S = operators.at_k([0.5, 0, 0])  # dense, (n, n), of spin up if there are two spins
    """

    atoms: Atoms
    basis: Basis
    pairs: PairList
    hamiltonian: np.ndarray
    overlap: np.ndarray
    attributes: dict = field(default_factory=dict)
    orbital_energies: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if getattr(self.pairs, "atoms", None) is not self.atoms:
            self.pairs = PairList(self.atoms, self.pairs)
        self.orbitals = self.basis.n_orbitals(self.atoms.numbers)  # (A,)
        self.offsets = block_offsets(self.pairs, self.orbitals)
        for name in ("hamiltonian", "overlap"):
            if (found := getattr(self, name).shape[-1]) != self.offsets[-1]:
                raise ValueError(
                    f"{name} has {found} values, the blocks of {len(self.pairs)} pairs in this basis have "
                    f"{self.offsets[-1]}. Does the basis belong to this matrix?"
                )

    @property
    def n_orbitals(self) -> int:
        return int(self.orbitals.sum())

    @property
    def n_electrons(self) -> int:
        """Return the number of valence electrons, less the charge of the structure."""
        return self.basis.n_electrons(self.atoms.numbers) - charge_of(self.atoms)

    @property
    def spins(self) -> int:
        """Return the number of matrices H: one for both spins, or two, of spin up and of spin down."""
        return spins_of(self.hamiltonian)

    def points_and_spins(self, kpoints: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Return (k-point, spin) of every pair of matrices H(k), S(k), first all of spin up."""
        return [(k, spin) for spin in range(self.spins) for k in kpoints]

    @property
    def channels(self) -> list["Operators"]:
        """Return the operators of each spin, with one H each."""
        return [self] if self.spins == 1 else [replace(self, hamiltonian=H, orbital_energies=None) for H in self.hamiltonian]

    def block(self, values: np.ndarray, b: int) -> np.ndarray:
        i, j = self.pairs[b, :2]
        shape = *values.shape[:-1], self.orbitals[i], self.orbitals[j]
        return values[..., self.offsets[b] : self.offsets[b + 1]].reshape(shape)

    def groups(self) -> Iterator[SpeciesGroup]:
        """Yield the values of blocks by pair of elements, a portion at a time, as `group_by_species` does.

        Each item is (z_i, z_j, block indices (G,), places of their values).
        """
        yield from group_by_species(self.atoms.numbers, self.orbitals, self.pairs, self.offsets)

    def transposed(self, values: np.ndarray) -> np.ndarray:
        """Return the values of the adjoint matrix on the same pairs: block (i,j,R) holds block(j,i,-R)^T."""
        if values.ndim == 2:
            return np.array([self.transposed(of_spin) for of_spin in values])
        flipped, result = self.pairs.flipped_index, np.empty_like(values)
        for zi, zj, blocks, places in self.groups():
            shape = (-1, self.basis[zj].n_orbitals, self.basis[zi].n_orbitals)
            adjoint = Places(self.offsets[flipped[blocks]], places.size).take(values)
            places.put(result, adjoint.reshape(shape).transpose(0, 2, 1))
        return result

    def make_hermitian(self, values: np.ndarray) -> float:
        """Replace X by (X + X^+) / 2 on the same pairs, in place, and return the max |X - X^+| found before.

        Raises ValueError if a block lacks its transpose.
        """
        if values.ndim == 2:
            return max(self.make_hermitian(of_spin) for of_spin in values)
        flipped, error = self.pairs.flipped_index, 0.0
        for zi, zj, blocks, places in self.groups():
            upper = blocks <= flipped[blocks]  # process each pair of blocks once
            shape = (-1, self.basis[zi].n_orbitals, self.basis[zj].n_orbitals)
            here, there = places[upper], Places(self.offsets[flipped[blocks[upper]]], places.size)
            block, adjoint = here.take(values).reshape(shape), there.take(values).reshape(-1, *shape[:0:-1]).transpose(0, 2, 1)
            error = max(error, float(np.abs(block - adjoint).max(initial=0.0)))
            mean = (block + adjoint) / 2
            here.put(values, mean)
            there.put(values, mean.transpose(0, 2, 1))
        return error

    def hermiticity_error(self) -> dict[str, float]:
        """Compute max |X - X^+| of H (Hartree) and S."""
        return {
            name: float(np.abs(values - self.transposed(values)).max(initial=0.0))
            for name, values in (("hamiltonian", self.hamiltonian), ("overlap", self.overlap))
        }

    def at_k(self, k: ArrayLike, spin: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Compute dense H(k) in Hartree and S(k), (n, n), which are real at the Gamma point.

        k: in fractions of the reciprocal lattice. spin: 0 (up) or 1 (down) of a spin-polarised structure.
        """
        hamiltonian = self.hamiltonian if self.spins == 1 else self.hamiltonian[spin]
        phase = np.exp(2j * np.pi * (self.pairs[:, 2:] @ np.asarray(k, dtype=float)))
        if np.allclose(k, 0):
            phase = phase.real
        start = np.concatenate([[0], np.cumsum(self.orbitals)])
        n = self.n_orbitals
        H, S = np.zeros(n * n, phase.dtype), np.zeros(n * n, phase.dtype)
        for _, _, blocks, places in self.groups():
            i, j = self.pairs[blocks[0], :2]
            row = start[self.pairs[blocks, 0]][:, None, None] + np.arange(self.orbitals[i])[:, None]
            position = (row * n + start[self.pairs[blocks, 1]][:, None, None] + np.arange(self.orbitals[j])).reshape(
                places.shape
            )
            for matrix, values in ((H, hamiltonian), (S, self.overlap)):
                # several images of a pair contribute to one block of H(k), so values are added, not assigned
                np.add.at(matrix, position, places.take(values) * phase[blocks][:, None])
        return H.reshape(n, n), S.reshape(n, n)

    def csr(self, values: np.ndarray) -> dict[tuple[int, int, int], sp.csr_matrix]:
        """Return one sparse matrix (n, n) per cell R."""
        start = np.concatenate([[0], np.cumsum(self.orbitals)])
        cells, of_pair = np.unique(self.pairs[:, 2:], axis=0, return_inverse=True)
        rows, columns = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
        for _, zj, blocks, places in self.groups():
            a, b = np.divmod(np.arange(places.size), self.basis[zj].n_orbitals)
            places.put(rows, start[self.pairs[blocks, 0]][:, None] + a)
            places.put(columns, start[self.pairs[blocks, 1]][:, None] + b)
        cell_of_value = np.repeat(of_pair.ravel(), np.diff(self.offsets))
        n = self.n_orbitals
        return {
            (int(cell[0]), int(cell[1]), int(cell[2])): sp.csr_matrix((values[mask], (rows[mask], columns[mask])), shape=(n, n))
            for c, cell in enumerate(cells)
            if (mask := cell_of_value == c).any()
        }

    def sorted(self) -> "Operators":
        """Return the same operators with their pairs in ascending order."""
        return self.take(np.argsort(self.pairs.keys))

    def select(self, keep: np.ndarray) -> "Operators":
        """Return the same operators on some of the pairs; keep is a mask (E,)."""
        return self.take(np.flatnonzero(keep))

    def take(self, rows: np.ndarray) -> "Operators":
        """Return the same operators on the pairs of these rows, in their order."""
        pairs = self.pairs.take(rows)
        offsets = block_offsets(pairs, self.orbitals)
        matrices = [*np.atleast_2d(self.hamiltonian), self.overlap]
        results = [np.empty(offsets[-1], values.dtype) for values in matrices]
        for _, _, blocks, places in group_by_species(self.atoms.numbers, self.orbitals, pairs, offsets):
            source = Places(self.offsets[rows[blocks]], places.size)
            for values, result in zip(matrices, results):
                places.put(result, source.take(values))
        hamiltonian = results[0] if self.hamiltonian.ndim == 1 else np.array(results[:-1])
        return replace(self, pairs=pairs, hamiltonian=hamiltonian, overlap=results[-1])


def spins_of(hamiltonian: np.ndarray | h5py.Dataset) -> int:
    """Return the number of spins of values of H, (n,) or (2, n), in memory or in a file."""
    return 1 if hamiltonian.ndim == 1 else hamiltonian.shape[0]


def values_by_pair(values: np.ndarray, places: Places) -> np.ndarray:
    """Collect the values of blocks, (G, m), or (G, 2 m) of two spins: the block of spin up, then that of spin down.

    values: (n,) or (2, n).
    """
    return places.take(values) if values.ndim == 1 else np.concatenate([places.take(of_spin) for of_spin in values], 1)


def group_by_species(
    numbers: np.ndarray, orbitals: np.ndarray, pairs: PairList | np.ndarray, offsets: np.ndarray
) -> Iterator[SpeciesGroup]:
    """Yield pairs by species pair, in ascending order, a portion at a time.

    Each item is (z_i, z_j, pair indices (G,), places of their values), with at most PIECE values or one block. A
    species pair comes in as many items as it needs. Temporary arrays thus stay small, and most of them stay in the cache.
    """
    key = numbers[pairs[:, 0]].astype(np.int64) * 1000 + numbers[pairs[:, 1]]
    for z in np.unique(key):
        of_pair = np.flatnonzero(key == z)
        i, j = pairs[of_pair[0], :2]
        size = int(orbitals[i] * orbitals[j])
        step = max(1, PIECE // size)
        for first in range(0, len(of_pair), step):
            blocks = of_pair[first : first + step]
            yield int(z // 1000), int(z % 1000), blocks, Places(offsets[blocks], size)


def write_operators(path: str | Path, operators: Operators) -> None:
    """Write operators to a file of schema `operators/1`, atomically."""
    o = operators
    whole = [(slice(0, int(o.offsets[-1])), o.hamiltonian, o.overlap)]
    write_pieces(path, o.atoms, o.basis, o.pairs, whole, o.attributes, o.orbital_energies, spins=o.spins)


def write_pieces(
    path: str | Path,
    atoms: Atoms,
    basis: Basis,
    pairs: PairList,
    pieces: Iterable[Piece],
    attributes: dict | Callable[[], dict],
    orbital_energies: tuple[np.ndarray, np.ndarray] | None = None,
    schema: str = SCHEMA,
    spins: int = 1,
) -> None:
    """Write `operators/1`, or a shard of it, atomically, with one piece in memory at a time.

    pieces: an iterable of (slice of the values, H in Hartree, S), where H has a leading axis if there are two spins.
    attributes: a dict, or a function that returns it when all pieces are written.
    """
    offsets = block_offsets(pairs, basis.n_orbitals(atoms.numbers))
    with create_h5(path, schema) as file:
        write_structure(file, atoms)
        write_basis(file, basis)
        file["pairs"] = np.asarray(pairs, np.int32)
        file["offsets"] = offsets.astype(np.int64)
        of_spins = (offsets[-1],) if spins == 1 else (spins, offsets[-1])
        for name, shape, unit in (("hamiltonian", of_spins, "Hartree"), ("overlap", of_spins[-1:], "1")):
            file.create_dataset(name, shape, float).attrs["unit"] = unit
        for span, hamiltonian, overlap in pieces:
            file["hamiltonian"][..., span], file["overlap"][span] = hamiltonian, overlap
        if orbital_energies:
            file["orbital_energies/kpoints"], file["orbital_energies/energies"] = orbital_energies
            file["orbital_energies/energies"].attrs["unit"] = "Hartree"
        file.attrs.update(attributes() if callable(attributes) else attributes)


def join_shards(path: str | Path, shards: list[Path], attributes: dict) -> None:
    """Write `operators/1` over shards in a folder beside it, as virtual datasets, without copying.

    The pairs come shard by shard. The file is written atomically; the shards must be complete.
    """
    path, lengths, sizes = Path(path), [], []
    structure: tuple[Atoms, Basis] | None = None
    for shard in shards:
        with open_h5(shard, SHARD) as file:
            sizes.append(np.diff(file["offsets"][:]))
            lengths.append({"pairs": len(file["pairs"])} | dict.fromkeys(("hamiltonian", "overlap"), len(file["overlap"])))
            of_spins = file["hamiltonian"].shape[:-1]
            structure = structure or (read_structure(file), read_basis(file))
    assert structure is not None, "a file has at least one shard"
    atoms, basis = structure
    with create_h5(path, SCHEMA) as file:
        write_structure(file, atoms)
        write_basis(file, basis)
        file["offsets"] = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        for name, dtype, leading, width in (
            ("pairs", np.int32, (), (5,)),
            ("hamiltonian", float, of_spins, ()),
            ("overlap", float, (), ()),
        ):
            layout, first = h5py.VirtualLayout((*leading, sum(n[name] for n in lengths), *width), dtype), 0
            every = (slice(None),) * len(leading)
            for shard, n in zip(shards, lengths):
                if n[name]:
                    # the path is relative to this file, so that both can be moved together
                    shape = (*leading, n[name], *width)
                    source = h5py.VirtualSource(str(shard.relative_to(path.parent)), name, shape, dtype)
                    layout[(*every, slice(first, first + n[name]))] = source
                first += n[name]
            file.create_virtual_dataset(name, layout, fillvalue=-1 if name == "pairs" else np.nan)
        for name, unit in (("hamiltonian", "Hartree"), ("overlap", "1")):
            file[name].attrs["unit"] = unit
        file.attrs.update(attributes)


def store_levels(path: str | Path, levels: dict) -> bool:
    """Store band edges in the places that a predicted file has for them, and return whether this was done.

    It is not done if the file has no such places, or if the band edges of a k-grid are known already.
    levels: `analysis.levels.Levels.attributes`. They are written in place and keep their size, so that nothing else in a
    file of gigabytes is touched.
    """
    with read_h5(path) as file:
        of_grid = file.attrs.get("metal", LEVELS_UNKNOWN) != LEVELS_UNKNOWN and not file.attrs.get("levels_clusters", 0)
        if of_grid or not levels.keys() <= file.attrs.keys():
            return False
    with h5py.File(path, "r+", locking=False) as file:
        for name, value in levels.items():
            file.attrs.modify(name, value)
    return True


def _check_shards(file: h5py.File) -> None:
    """Raise ValueError if a shard is missing, because its values would otherwise be read as fill values."""
    for source in file["hamiltonian"].virtual_sources() if file["hamiltonian"].is_virtual else ():
        if not (shard := Path(file.filename).parent / source.file_name).is_file():
            raise ValueError(f"its shard {shard} is missing. Move the folder of shards with the file, or predict again.")


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Add the path of the file to errors about its content."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}. Expected all of schema {SCHEMA} (docs/files.md).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def open_operators(path: str | Path) -> Iterator[tuple[h5py.File, Atoms, Basis, PairList]]:
    """Open `operators/1` and check everything except the values: yields (file, atoms, basis, PairList as stored).

    Raises ValueError, with the path, if the file is missing, cut short, of another schema, has blocks that do not fit the
    basis, lacks a unit, or lacks the transposed block of a pair.
    """
    with open_h5(path, SCHEMA) as file:
        with _named(path):
            _check_shards(file)
            for name, unit in (("hamiltonian", "Hartree"), ("overlap", "1")):
                if (found := file[name].attrs.get("unit")) != unit:
                    raise ValueError(f"{name} has unit {found!r}, expected {unit!r}.")
            atoms, basis = read_structure(file), read_basis(file)
            pairs = PairList(atoms, file["pairs"][:])
            if not np.array_equal(file["offsets"], block_offsets(pairs, basis.n_orbitals(atoms.numbers))):
                raise ValueError("/offsets do not fit the basis. Was the basis of this file changed?")
            _ = pairs.flipped_index  # raises ValueError if the transpose of a block is missing
            if not file["pairs"].is_virtual and (np.diff(pairs.keys) <= 0).any():
                raise ValueError("/pairs are not sorted by i, j, R.")
        yield file, atoms, basis, pairs


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise ValueError if a value of H or S is not finite."""
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity. The run that made it went wrong: make it again.")


def read_operators(path: str | Path) -> Operators:
    """Read and check `operators/1`.

    Raises ValueError as `open_operators` does, and if a value is not finite.
    """
    with open_operators(path) as (file, atoms, basis, pairs), _named(path):
        hamiltonian, overlap = (np.asarray(file[name][:], float) for name in ("hamiltonian", "overlap"))
        check_finite("hamiltonian", hamiltonian)
        check_finite("overlap", overlap)
        attributes = {k: v for k, v in file.attrs.items() if k != "schema"}
        printed = file.get("orbital_energies")
        energies = (printed["kpoints"][:], printed["energies"][:]) if printed else None
        operators = Operators(atoms, basis, pairs, hamiltonian, overlap, attributes, energies)
        return operators.sorted() if file["pairs"].is_virtual else operators


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
    atoms = Atoms(group["numbers"][:], group["positions"][:], cell=group["cell"][:], pbc=group["pbc"][:])
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
