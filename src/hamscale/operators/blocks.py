"""Hold block-sparse H and S of a structure in memory, as scipy CSR, and at a k-point.

A block (i, j, R) is <i, cell 0 | H | j, cell R>. H(k) = sum_R exp(+2 pi i k.R) H(R), k in fractions of the reciprocal
lattice. Atoms are wrapped as CP2K wraps them, so that R has the same meaning everywhere (docs/conventions.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
from ase import Atoms
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from ..basis import Basis
from ..pairs import PairList, block_offsets
from ..structures import charge_of

PIECE = 1 << 17  # number of values that are processed at a time
SPINS = ("up", "down")  # names of the channels of a spin-polarised structure


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


@dataclass
class Operators:
    """H and S of one structure on one set of atom pairs.

    pairs    # (E, 5)  | i, j, Rx, Ry, Rz, sorted: a PairList, or its table
    offsets  # (E+1,)  | block b is values[offsets[b]:offsets[b+1]], row-major, (n_i, n_j)
    hamiltonian  # (n,), or (2, n) of a spin-polarised structure: spin up, then spin down | Hartree
    overlap  # (n,)    | 1
    atoms.info may hold the charge of the structure (structures.charge_of).
    attributes: source ("dft" or "predicted"), fermi_level_hartree, electrons, eps_threshold and other records of the origin.
    orbital_energies: (k-points (K, 3), energies (K, n), or (2, K, n) of two spins, in Hartree) as the DFT code printed them,
    if it did.
    mulliken_charges: (A,), elementary charges, of DFT's states; None if they were not computed.

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
    mulliken_charges: np.ndarray | None = None

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
        """Return the number of valence electrons, less the charge of the structure.

        It is the attribute `electrons`, if there is one, as of data of other codes, whose bases do not say it.
        """
        if (known := int(self.attributes.get("electrons", 0))) > 0:
            return known
        return self.basis.n_electrons(self.atoms.numbers) - charge_of(self.atoms)

    @property
    def counts_electrons(self) -> bool:
        """Tell whether the number of electrons is known."""
        numbers = self.atoms.numbers.tolist()
        return int(self.attributes.get("electrons", 0)) > 0 or all(self.basis[z].valence for z in numbers)

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

    def rows_and_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the orbitals of every value: its row and its column of the dense matrix, (n,) each."""
        start = np.concatenate([[0], np.cumsum(self.orbitals)])
        rows, columns = np.empty(self.offsets[-1], np.int64), np.empty(self.offsets[-1], np.int64)
        for _, zj, blocks, places in self.groups():
            a, b = np.divmod(np.arange(places.size), self.basis[zj].n_orbitals)
            places.put(rows, start[self.pairs[blocks, 0]][:, None] + a)
            places.put(columns, start[self.pairs[blocks, 1]][:, None] + b)
        return rows, columns

    def csr(self, values: np.ndarray) -> dict[tuple[int, int, int], sp.csr_matrix]:
        """Return one sparse matrix (n, n) per cell R."""
        cells, of_pair = np.unique(self.pairs[:, 2:], axis=0, return_inverse=True)
        rows, columns = self.rows_and_columns()
        cell_of_value = np.repeat(of_pair.ravel(), np.diff(self.offsets))
        n = self.n_orbitals
        return {
            (int(cell[0]), int(cell[1]), int(cell[2])): sp.csr_matrix((values[mask], (rows[mask], columns[mask])), shape=(n, n))
            for c, cell in enumerate(cells)
            if (mask := cell_of_value == c).any()
        }

    def with_potential(self, potential: np.ndarray) -> "Operators":
        """Return the operators of electrons that also feel a potential u (A,) at the atoms, in Hartree.

        H_ij(R) <- H_ij(R) + 1/2 (u_i + u_j) S_ij(R), Mulliken's approximation (J. Chem. Phys. 17, 1155 (1949)) of an integral
        of a potential that varies slowly over the orbitals of an atom. It is the same for both spins. Charges and energies of
        the states before are not those of the result, which has none.
        """
        of_blocks = 0.5 * (potential[self.pairs[:, 0]] + potential[self.pairs[:, 1]])
        hamiltonian = self.hamiltonian + np.repeat(of_blocks, np.diff(self.offsets)) * self.overlap
        return replace(self, hamiltonian=hamiltonian, orbital_energies=None, mulliken_charges=None)

    def repeat(self, counts: tuple[int, int, int]) -> "Operators":
        """Return copies of the structure along the cell vectors, in one cell: every block is that of the cell.

        Atoms are in the order of `ase.Atoms.repeat`.
        """
        tables = []
        for copy in np.ndindex(*counts):
            table = self.pairs.table.copy()
            further, other = np.divmod(np.array(copy) + table[:, 2:], counts)
            for column, place in ((0, copy), (1, tuple(other.T))):
                table[:, column] += np.ravel_multi_index(place, counts) * len(self.atoms)
            table[:, 2:] = further
            tables.append(table)
        atoms = self.atoms.repeat(counts)
        hamiltonian, overlap = (np.tile(values, int(np.prod(counts))) for values in (self.hamiltonian, self.overlap))
        pairs = PairList(atoms, np.concatenate(tables))
        charges = None if self.mulliken_charges is None else np.tile(self.mulliken_charges, int(np.prod(counts)))
        copies = replace(
            self,
            atoms=atoms,
            pairs=pairs,
            hamiltonian=hamiltonian,
            overlap=overlap,
            orbital_energies=None,
            mulliken_charges=charges,
        )
        return copies.sorted()

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


def spins_of(hamiltonian: np.ndarray) -> int:
    """Return the number of spins of values of H, (n,) or (2, n)."""
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
