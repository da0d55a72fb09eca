"""Compare S of a user's run with two-centre integrals, which tells whether its positions, cell and images are understood.

CP2K counts periodic images from fractions f - ANINT(f). For an atom at a fraction of one half, as ideal crystals have them, the
last bit decides between -1/2 and 1/2, and the log does not show it. The overlap does: a wrong image has another distance.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import scipy.sparse as sp

from ..angular import edge_rotations
from ..operators import Operators
from ..pairs import PairList
from .coupling import Coupling
from .overlap import OverlapTable, overlap_table

EXCHANGED = 1.3
MISPLACED = 1e-3  # deviation of S that no rounding of positions makes


def overlap_deviations(operators: Operators) -> np.ndarray:
    """Compute max |S - S of two-centre integrals| of every pair, (E,)."""
    result, table, vectors = np.zeros(len(operators.pairs)), overlap_table(operators.basis), operators.pairs.vectors
    for z_i, z_j, rows, places in operators.groups():
        result[rows] = np.abs(table.blocks(z_i, z_j, vectors[rows]) - places.take(operators.overlap)).max(1)
    return result


def edge_frame_deviations(operators: Operators) -> np.ndarray:
    """Compute the largest component of S of every pair that a two-centre quantity lacks, (E,), without a table of S.

    In the frame of an edge the coupled components of S with M other than 0 vanish; those of an atom's own block, which is a
    scalar, vanish for L above 0. This holds for any orbitals that are real spherical harmonics times functions of the distance.
    """
    result, coupling = np.zeros(len(operators.pairs)), Coupling(operators.basis)
    vectors, onsite = operators.pairs.vectors, operators.pairs.onsite
    for z_i, z_j, rows, places in operators.groups():
        pair = coupling[z_i, z_j]
        along = np.where(onsite[rows, None], [0.0, 0.0, 1.0], vectors[rows])
        coupled = pair.rotate(places.take(operators.overlap) @ pair.transform, edge_rotations(along, max(pair.slots)))
        lacking = np.where(onsite[rows, None], pair.degree > 0, pair.order != 0)
        result[rows] = np.abs(np.where(lacking, coupled, 0.0)).max(1)
    return result


def exchanged_images(operators: Operators) -> list[tuple[list[int], list[int]]]:
    """Find the cells R whose H is that of another cell R', as where CP2K's files of H were exchanged, [(R, R'), ...].

    Between two atoms H is roughly k S (M. Wolfsberg, L. Helmholz, J. Chem. Phys. 20, 837 (1952)), with one number k for two
    shells of two elements, which a least-squares fit over all blocks gives. Of a cell whose H is not small, |H(R) - k S(R)|^2
    and |H(R)|^2 are then both larger than EXCHANGED |H(R) - k S(R')|^2. (In runs of seven materials, among them diffuse
    functions of Ga and Mo, the ratio is at most 1.05.) S is taken to be where it belongs, which `overlap_deviations` tells.
    """
    found = []
    for channel in operators.channels:
        offsite = np.repeat(~channel.pairs.onsite, np.diff(channel.offsets))
        of_h, of_s = (channel.csr(np.where(offsite, v, 0.0)) for v in (channel.hamiltonian, _scaled_overlap(channel)))
        size = {cell: float(np.sqrt((matrix.data**2).sum())) for cell, matrix in of_h.items()}
        cells, large = list(size), [n for n, norm in enumerate(size.values()) if norm > 1e-2 * max(size.values())]
        if not large:
            continue
        H = sp.vstack([of_h[cells[n]].reshape(1, -1) for n in large]).tocsr()
        S = sp.vstack([of_s[cell].reshape(1, -1) for cell in cells]).tocsr()
        of_rows, of_columns = (np.asarray(X.multiply(X).sum(1)).ravel() for X in (H, S))
        apart = of_rows[:, None] - 2 * (H @ S.T).toarray() + of_columns
        here = np.minimum(apart[np.arange(len(large)), large], of_rows)
        best = apart.argmin(1)
        wrong = here > EXCHANGED * apart.min(1)
        found += [(list(cells[large[n]]), list(cells[best[n]])) for n in np.flatnonzero(wrong)]
    return found


def _scaled_overlap(operators: Operators) -> np.ndarray:
    """Return k S, (n,), with one k for two shells of two elements that fits H best between atoms."""
    result = np.zeros_like(operators.overlap)
    onsite, basis = operators.pairs.onsite, operators.basis
    sums: dict[tuple[int, int], np.ndarray] = {}
    for z_i, z_j, rows, places in operators.groups():
        far = places[~onsite[rows]]
        starts = [[part.start for part in basis[z].shell_slices] for z in (z_i, z_j)]
        shape = len(far.first), basis[z_i].n_orbitals, basis[z_j].n_orbitals
        H, S = (far.take(values).reshape(shape) for values in (operators.hamiltonian, operators.overlap))
        of_shells = [np.add.reduceat(np.add.reduceat((X * S).sum(0), starts[0], 0), starts[1], 1) for X in (H, S)]
        sums[z_i, z_j] = sums.get((z_i, z_j), 0.0) + np.array(of_shells)
    for z_i, z_j, _, places in operators.groups():
        (up, down), sizes = sums[z_i, z_j], [[2 * l + 1 for l in basis[z].l] for z in (z_i, z_j)]
        k = np.repeat(np.repeat(up / np.maximum(down, 1e-12), sizes[0], 0), sizes[1], 1)
        places.put(result, places.take(operators.overlap) * k.ravel())
    return result


def placed_by_overlap(operators: Operators) -> Operators:
    """Return operators whose cells R fit the positions, if they do so but for whole cells of some atoms.

    Where S deviates by more than MISPLACED, atoms are placed one after the other: each goes to the cell, its own or one of the
    26 around it, in which its overlap with the atoms placed before deviates least.
    """
    wrong = overlap_deviations(operators) > MISPLACED
    if not wrong.any() or not operators.atoms.pbc.any():
        return operators
    pairs, table = operators.pairs, overlap_table(operators.basis)
    moves = np.array(sorted(product((-1, 0, 1), repeat=3), key=lambda m: sum(map(abs, m))))
    moved, placed = np.zeros((len(operators.atoms), 3), np.int64), np.zeros(len(operators.atoms), bool)
    # atoms with the fewest wrong pairs first: those on no border agree with each other
    for atom in np.argsort(np.bincount(pairs[wrong, 0], minlength=len(placed)), kind="stable"):
        rows = np.flatnonzero(placed[pairs[:, 0]] & (pairs[:, 1] == atom))
        if len(rows):
            shifted = pairs[rows]
            shifted[:, 2:] -= moved[shifted[:, 0]]
            moved[atom] = moves[np.argmin([_deviation(operators, table, rows, shifted, move) for move in moves])]
        placed[atom] = True
    table_of_pairs = np.array(pairs)
    table_of_pairs[:, 2:] += moved[pairs[:, 1]] - moved[pairs[:, 0]]
    return replace(operators, pairs=PairList(operators.atoms, table_of_pairs)).sorted()


def _deviation(operators: Operators, table: OverlapTable, rows: np.ndarray, shifted: np.ndarray, move: np.ndarray) -> float:
    """Return the sum of |S - S of two-centre integrals| of pairs whose last atom is moved by whole cells."""
    total, numbers = 0.0, operators.atoms.numbers
    vectors = PairList(operators.atoms, shifted + [0, 0, *move]).vectors
    for z_i, z_j in np.unique(numbers[shifted[:, :2]], axis=0).tolist():
        some = np.flatnonzero((numbers[shifted[:, 0]] == z_i) & (numbers[shifted[:, 1]] == z_j))
        blocks = np.array([operators.block(operators.overlap, row).ravel() for row in rows[some]])
        total += float(np.abs(table.blocks(z_i, z_j, vectors[some]) - blocks).sum())
    return total
