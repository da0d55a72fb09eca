"""Lift states along directions that the overlap nearly misses to where they are in DFT.

Along a direction u (u^+ u = 1) with u^+ S u = s << 1, an error u^+ dH u of a prediction is an error of u^+ dH u / s in an
eigenvalue, and a state that belongs tens of eV high comes down into the gap. DFT shows where such states belong: with the
eigenvectors U of S(k) whose eigenvalues s are below LOW, the lowest eigenvalue of

    U^+ H U c = e diag(s) c

is the same within some tenths of an eV in all structures of a material, learnt or not (docs/results.md, "False states"). The
lowest one of the training structures is the floor. In a predicted H every e_n below it is lifted to it,

    H(k) <- H(k) + sum_n (floor - e_n) S w_n w_n^+ S,    w_n = U c_n,

which leaves all directions alone that S sees. H of DFT is hardly changed, since there nothing lies below the floor. In real
space the correction reaches as far as S does; it is written to the blocks of H that there are.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..operators import Operators
from ..structures import k_grid, plane_distances, random_kpoints
from ..units import hartree_to_ev, hartree_to_mev
from ..workers import eigh, in_processes

LOW = 0.1  # directions whose overlap is smaller than this are looked at
FLOOR_KPOINTS = 4  # random k-points of every training structure at which the floor is sought
GRID_ANGSTROM = 24.0  # the k-grid has as many points along a cell vector as planes of this distance hold, an odd number
PASSES = 2  # the second one lifts what the first leaves between the points of the grid and beyond the reach of S


def low_states(H: np.ndarray, S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the states of H within the directions in which S is below LOW: energies (m,) in Hartree and vectors (n, m).

    The vectors w have w^+ S w = 1. m is zero where S misses nothing.
    """
    s, U = eigh(S, None, subset_by_value=(-np.inf, LOW))
    if not len(s):
        return s, U
    energies, c = eigh(U.conj().T @ H @ U, np.diag(s))
    return energies, U @ c


def find_floor(operators: Operators, gauge: float = 0.0) -> float:
    """Find the lowest energy of `low_states` of H - gauge S at random k-points, Hartree; infinity where there are none."""

    def at(point: tuple[np.ndarray, int]) -> float:
        k, spin = point
        H, S = operators.at_k(k, spin)
        return float(low_states(H - gauge * S, S)[0].min(initial=np.inf))

    kpoints = random_kpoints(operators.atoms, FLOOR_KPOINTS)
    return min(in_processes(at, operators.points_and_spins(kpoints)))


@dataclass(frozen=True)
class Lifted:
    """What `lift` has done: the mean number of states per k-point that were lifted, by how much at most, and mean |dH|.

    States of two spins are counted together.
    """

    states: float = 0.0
    largest_ev: float = 0.0
    mean_change_mev: float = 0.0

    def attributes(self) -> dict:
        """Return the attributes that a file stores (docs/files.md)."""
        return {f"lifted_{name}": value for name, value in vars(self).items()}


def lift(operators: Operators, floor_hartree: float) -> tuple[Operators, Lifted]:
    """Lift the states of `low_states` below the floor, and return the operators and what was done in the first pass."""
    if operators.spins == 2:
        lifted, done = zip(*(lift(channel, floor_hartree) for channel in operators.channels))
        whole = replace(operators, hamiltonian=np.stack([channel.hamiltonian for channel in lifted]))
        largest = max(of_spin.largest_ev for of_spin in done)
        change = sum(of_spin.mean_change_mev for of_spin in done) / len(done)
        return whole, Lifted(sum(of_spin.states for of_spin in done), largest, change)
    result, lifts, mean = _lift(operators, floor_hartree)
    if not len(lifts):
        return operators, Lifted()
    for _ in range(PASSES - 1):
        result, *_ = _lift(result, floor_hartree)
    change = hartree_to_mev(float(np.abs(result.hamiltonian - operators.hamiltonian).mean()))
    return result, Lifted(mean, hartree_to_ev(float(lifts.max())), change)


def _lift(operators: Operators, floor_hartree: float) -> tuple[Operators, np.ndarray, float]:
    """Lift states once, on a k-grid; return the operators, all lifts (m,) and their mean number per k-point.

    A block (i, j, R) receives the correction of its own image alone: of images that the grid cannot tell apart, the nearest.
    """
    atoms = operators.atoms
    planes = np.where(atoms.pbc, plane_distances(atoms.cell.complete()), np.inf)
    counts = 2 * (np.ceil(GRID_ANGSTROM / planes).astype(int) // 2) + 1
    kpoints, weights = k_grid(counts)

    def at(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        H, S = operators.at_k(k)
        energies, w = low_states(H, S)
        below = energies < floor_hartree
        lifts = floor_hartree - energies[below]
        return lifts, (S @ w[:, below]) * np.sqrt(lifts)

    found = in_processes(at, kpoints)
    lifts = np.concatenate([lifts for lifts, _ in found])
    if not len(lifts):
        return operators, lifts, 0.0
    table = np.asarray(operators.pairs)
    share, image = _shares(operators, counts)
    F = np.concatenate([factor for _, factor in found], 1)  # (n, all lifted states of all k)
    of_state = np.repeat(np.arange(len(kpoints)), [len(lifts) for lifts, _ in found])
    starts, H = np.cumsum(operators.orbitals) - operators.orbitals, operators.hamiltonian.copy()
    images, which = np.unique(image, axis=0, return_inverse=True)
    for number, R in enumerate(images):
        phases = weights * np.exp(-2j * np.pi * kpoints @ R)
        correction = ((F * phases[of_state]) @ F.conj().T).real
        for b in np.flatnonzero((which == number) & (share > 0)):
            i, j = table[b, :2]
            block = correction[starts[i] : starts[i] + operators.orbitals[i], starts[j] : starts[j] + operators.orbitals[j]]
            H[operators.offsets[b] : operators.offsets[b + 1]] += share[b] * block.ravel()
    return replace(operators, hamiltonian=H), lifts, float(weights @ [len(of_k) for of_k, _ in found])


def _shares(operators: Operators, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of every pair in the correction of its class, (E,), and its lattice vector on the grid, (E, 3).

    A class has the pairs of two atoms whose R differ by multiples of the grid; the nearest have it, in equal shares.
    """
    table, distances = np.asarray(operators.pairs), operators.pairs.distances
    image = table[:, 2:] % counts
    _, of_class = np.unique(np.column_stack([table[:, :2], image]), axis=0, return_inverse=True)
    nearest = np.full(of_class.max() + 1, np.inf)
    np.minimum.at(nearest, of_class, distances)
    near = distances <= nearest[of_class] + 1e-6
    return near / np.bincount(of_class, weights=near)[of_class], image
