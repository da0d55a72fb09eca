"""Transform blocks of H between the product basis l_a x l_b and coupled angular momenta |L, M>.

c^{ab}_{LM} = sum_{m m'} C^{l_a l_b L}[m, m', M] h^{ab}_{m m'}. The coefficients are orthonormal, so h = C c exactly (method
paper, eq. 1). All blocks of a pair of elements are transformed at once.
A coupled vector of a pair of elements holds, for L = 0, 1, ..., the components (M, slot), with the slots varying fastest. A
slot of degree L is a pair of shells (a, b) that couples to L. The network, the reference and the scales all use this one
layout.
Of a spin-polarised structure a block is that of spin up followed by that of spin down, and each L has its slots twice: those of
the sum (h_up + h_down) / sqrt 2, then those of the difference (h_up - h_down) / sqrt 2, which is small, has no gauge, and
vanishes if the spins do not differ. The transform is still orthogonal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TypeAlias

import numpy as np

from ..angular import clebsch_gordan, flip, row_product
from ..basis import Basis, ElementBasis
from ..operators import Operators, values_by_pair

# weights of spin up and down in the sum and in the difference of their blocks, by number of spins
SPIN_COMPONENTS = {1: np.ones((1, 1)), 2: np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)}

# (z_i, z_j, block indices (G,), onsite, coupled (G, n), vectors (G, 3)) of some blocks of two elements
CoupledGroup: TypeAlias = tuple[int, int, np.ndarray, bool, np.ndarray, np.ndarray]


@dataclass
class PairCoupling:
    """Layout and transform of blocks between two elements, of one or two spins.

    slots: L -> shell pairs (a, b). parities: L -> parity of each slot, 0 if l_a + l_b + L is even: under inversion the
    component is multiplied by (-1)^(l_a+l_b), so these are natural tensors of degree L, the others are not.
    degree, order, slot: L, M and running slot number of each component, (n,).
    transform: (n, n) orthogonal, n = spins * n_i * n_j; coupled = block.reshape(-1) @ transform.
    adjoint: index and sign, (n,) each, that turn the coupled vector of a block (j, i) into that of its transpose, a block
    (i, j): c^{ab}_{LM}[h^T] = (-1)^(l_a+l_b+L) c^{ba}_{LM}[h], computed as `vector_ji[:, index] * sign`.
    """

    z_i: int
    z_j: int
    slots: dict[int, list[tuple[int, int]]]
    parities: dict[int, tuple[int, ...]]
    transform: np.ndarray
    degree: np.ndarray
    order: np.ndarray
    slot: np.ndarray
    adjoint: tuple[np.ndarray, np.ndarray]
    spins: int = 1

    @property
    def size(self) -> int:
        return len(self.degree)

    @cached_property
    def onsite_parities(self) -> dict[int, tuple[int, ...]]:
        """Return `parities` for blocks of one atom, with -1 for components that vanish because such a block is symmetric."""
        return {
            L: tuple(-1 if a == b and L % 2 else p for (a, b), p in zip(self.slots[L], parities))
            for L, parities in self.parities.items()
        }

    @cached_property
    def n_slots(self) -> int:
        return sum(len(s) for s in self.slots.values())

    @cached_property
    def slot_degree(self) -> np.ndarray:
        """Return the degree L of each running slot, (n_slots,)."""
        return np.concatenate([np.full(len(s), L) for L, s in self.slots.items()])

    @cached_property
    def zero_order(self) -> np.ndarray:
        """Return the indices of the M = 0 components, by running slot, (n_slots,)."""
        return np.flatnonzero(self.order == 0)

    @cached_property
    def slices(self) -> dict[int, slice]:
        """Return the slice of a coupled vector that holds the (2L+1, slots) components of each L."""
        ends = np.cumsum([(2 * L + 1) * len(s) for L, s in self.slots.items()])
        return {L: slice(int(e) - (2 * L + 1) * len(s), int(e)) for (L, s), e in zip(self.slots.items(), ends)}

    @cached_property
    def edge_adjoint(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the index and sign of `adjoint` for vectors that are given in edge frames.

        The sign includes the turn by pi about x that relates the frame of the reversed edge to that of the edge.
        """
        index, sign = self.adjoint
        turn = np.concatenate([np.repeat(flip(L), len(s)) for L, s in self.slots.items()])
        return index, sign * turn

    def blocks(self, coupled: np.ndarray) -> np.ndarray:
        """Compute the blocks (G, spins * n_i * n_j) of coupled vectors (G, n).

        Each block is the same to the last bit, whichever other vectors are transformed together with it.
        """
        return row_product(coupled, self.transform.T)

    def rotate(self, coupled: np.ndarray, rotations: list[np.ndarray], inverse: bool = False) -> np.ndarray:
        """Apply D^L to every L of coupled vectors (G, n); rotations[L] has shape (G, 2L+1, 2L+1)."""
        result = np.empty_like(coupled)
        for L, part in self.slices.items():
            D = rotations[L].transpose(0, 2, 1) if inverse else rotations[L]
            # the number of slots is written out, since -1 is ambiguous where there are no vectors
            shape = len(coupled), 2 * L + 1, (part.stop - part.start) // (2 * L + 1)
            result[:, part] = (D @ coupled[:, part].reshape(shape)).reshape(len(coupled), part.stop - part.start)
        return result


def pair_coupling(basis: Basis, z_i: int, z_j: int, spins: int = 1) -> PairCoupling:
    """Build the layout and transform of blocks between elements z_i (rows) and z_j (columns)."""
    first, second = basis[z_i], basis[z_j]
    slots = _slots(first, second)
    n_j = second.n_orbitals
    columns, degree, order, slot = [], [], [], []
    running = 0
    for L, shell_pairs in slots.items():
        for M in range(-L, L + 1):
            for s, (of_spins, (a, b)) in enumerate(product(SPIN_COMPONENTS[spins], shell_pairs)):
                column = np.zeros((first.n_orbitals, n_j))
                column[first.shell_slices[a], second.shell_slices[b]] = clebsch_gordan(first.l[a], second.l[b], L)[:, :, L + M]
                columns.append(np.outer(of_spins, column).reshape(-1))
                degree.append(L)
                order.append(M)
                slot.append(running + s)
        running += spins * len(shell_pairs)
    reversed_slots = _slots(second, first)
    index, sign, start = [], [], 0
    for L, shell_pairs in slots.items():
        n = len(shell_pairs)
        for row in range((2 * L + 1) * spins):  # of M and, of each M, the sum and the difference of spins
            for a, b in shell_pairs:
                index.append(start + row * n + reversed_slots[L].index((b, a)))
                sign.append((-1.0) ** (first.l[a] + second.l[b] + L))
        start += (2 * L + 1) * spins * n
    slots = {L: shell_pairs * spins for L, shell_pairs in slots.items()}
    transform, adjoint = np.array(columns).T, (np.array(index), np.array(sign))
    parities = {L: tuple((first.l[a] + second.l[b] + L) % 2 for a, b in shell_pairs) for L, shell_pairs in slots.items()}
    of_components = np.array(degree), np.array(order), np.array(slot)
    return PairCoupling(z_i, z_j, slots, parities, transform, *of_components, adjoint, spins)


def _slots(first: ElementBasis, second: ElementBasis) -> dict[int, list[tuple[int, int]]]:
    slots: dict[int, list[tuple[int, int]]] = {}
    for L in range(max(first.l) + max(second.l) + 1):
        pairs = [(a, b) for a, la in enumerate(first.l) for b, lb in enumerate(second.l) if abs(la - lb) <= L <= la + lb]
        if pairs:
            slots[L] = pairs
    return slots


class Coupling(dict[tuple[int, int], PairCoupling]):
    """Mapping (z_i, z_j) -> PairCoupling for a basis and a number of spins; each entry is made when it is first requested."""

    def __init__(self, basis: Basis, spins: int = 1) -> None:
        self.basis, self.spins = basis, spins

    def __missing__(self, key: tuple[int, int]) -> PairCoupling:
        self[key] = pair_coupling(self.basis, *key, self.spins)
        return self[key]

    @property
    def lmax(self) -> int:
        """Return the highest L to which blocks of this basis couple."""
        return 2 * self.basis.lmax


def coupled_groups(operators: Operators, coupling: Coupling, gauge: float = 0.0) -> Iterator[CoupledGroup]:
    """Yield the coupled blocks of H - gauge S by pair of elements, a portion at a time.

    Each item is (z_i, z_j, block indices, onsite, coupled (G, n), vectors).
    """
    vectors, onsite = operators.pairs.vectors, operators.pairs.onsite
    for z_i, z_j, blocks, places in operators.groups():
        for kind in (False, True):
            keep = onsite[blocks] == kind
            if keep.any():
                part, some = blocks[keep], places[keep]
                values = values_by_pair(operators.hamiltonian, some)
                if gauge:
                    overlap = gauge * some.take(operators.overlap)
                    values -= overlap if operators.spins == 1 else np.tile(overlap, operators.spins)
                yield z_i, z_j, part, kind, values @ coupling[z_i, z_j].transform, vectors[part]
