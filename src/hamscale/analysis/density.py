"""Compute the density matrix of the states that hold a structure's electrons, and the charges of its atoms.

With H(k) c_n = e_n S(k) c_n, c_n^+ S c_n = 1, and n filled to the share f_n, the density matrix of both spins together, or of
one of two, is

    P_ij(R) = s sum_k w_k sum_n f_n c_in c_jn^* exp(-2 pi i k.R),    s = 2 without spin, 1 with,

so that the electrons are N = sum_R sum_ij P_ij(R) S_ij(R), in the sense of CP2K and of A. Szabo, N. S. Ostlund, Modern Quantum
Chemistry (1989), chapter 3.4. The terms of an atom's own rows i are the electrons that R. S. Mulliken, J. Chem. Phys. 23, 1833
(1955), counts as its own; each overlap population is shared equally.
"""

from dataclasses import replace

import numpy as np

from ..operators import Operators
from ..workers import in_processes
from .levels import levels_on_grid, occupations
from .spectra import K_GRID, SMALL, analysis_grid, states, states_of


def density_matrix(
    operators: Operators, kpoints: np.ndarray, weights: np.ndarray, temperature_kelvin: float = 300.0
) -> np.ndarray:
    """Compute P of each spin for the pairs of the operators, (spins, m), laid out as their overlap is.

    kpoints (K, 3) in fractions with weights (K,) that sum to one; of k and -k one is enough. In an insulator the states below
    the gap are filled, in a metal by the Fermi function. Raises ValueError if S(k) is not positive definite.
    """
    spins = operators.spins
    found = [states(operators, k, spin=spin) for k, spin in operators.points_and_spins(kpoints)]
    energies = np.array([e for e, _ in found])
    shares = _shares(operators, energies, weights, temperature_kelvin)
    rows, columns = operators.rows_and_columns()
    sizes = np.diff(operators.offsets)
    result = np.zeros((spins, len(rows)))
    for number, ((k, spin), (_, c)) in enumerate(zip(operators.points_and_spins(kpoints), found)):
        P = (c * shares[number]) @ c.conj().T
        phases = np.exp(-2j * np.pi * (operators.pairs[:, 2:] @ k)) * (2 / spins * weights[number % len(kpoints)])
        result[spin] += (P[rows, columns] * np.repeat(phases, sizes)).real
    return result


def _shares(operators: Operators, energies: np.ndarray, weights: np.ndarray, temperature_kelvin: float) -> np.ndarray:
    """Return the share f_n to which each of the states on a k-grid is filled, (spins * K, n)."""
    spins = operators.spins
    of_rows = np.tile(weights / spins, spins)
    levels = levels_on_grid(energies, of_rows, operators.n_electrons, temperature_kelvin, spins=spins)
    if levels.metal:
        return occupations(energies, levels, temperature_kelvin)
    # by number: the gaps of two spins need not lie at one energy
    return np.repeat([np.arange(energies.shape[1]) < n for n in levels.filled], len(weights), 0).astype(float)


def mulliken_populations(
    operators: Operators, kpoints: np.ndarray, weights: np.ndarray, temperature_kelvin: float = 300.0
) -> np.ndarray:
    """Compute the electrons of each spin on each atom, N_i = sum of P_ab(R) S_ab(R) over the rows a of the atom, (spins, A).

    They are summed state by state, s sum_k w_k sum_n f_n Re c_an^* (S c_n)_a, so that P is not needed. Arguments and errors are
    those of `density_matrix`. One row is of both spins together.
    """
    spins, points = operators.spins, operators.points_and_spins(kpoints)
    first = np.cumsum(operators.orbitals) - operators.orbitals

    def at(point: tuple[np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
        k, spin = point
        H, S = operators.at_k(k, spin)
        energies, c = states_of(H, S, k)
        return energies, np.add.reduceat((c.conj() * (S @ c)).real, first, axis=0)

    found = in_processes(at, points, 1 if operators.n_orbitals < SMALL else None)
    shares = _shares(operators, np.array([energies for energies, _ in found]), weights, temperature_kelvin)
    result = np.zeros((spins, len(operators.atoms)))
    for number, ((_, spin), (_, of_atoms)) in enumerate(zip(points, found)):
        result[spin] += 2 / spins * weights[number % len(kpoints)] * (of_atoms @ shares[number])
    return result


def mulliken_charges(
    operators: Operators, kpoints: np.ndarray, weights: np.ndarray, temperature_kelvin: float = 300.0
) -> np.ndarray:
    """Compute the Mulliken charges of the atoms, Z_i - N_i with the charge Z_i of the core, (A,), in elementary charges.

    Their sum is the charge of the structure. Raises ValueError as `density_matrix` does, and if the valence electrons of an
    element are not known, as in data of other codes.
    """
    valence = _valence(operators)
    if (valence == 0).any():
        symbol = operators.atoms[int(np.flatnonzero(valence == 0)[0])].symbol
        raise ValueError(f"the basis does not say how many valence electrons {symbol} has: no charges follow from H and S.")
    return valence - mulliken_populations(operators, kpoints, weights, temperature_kelvin).sum(0)


def with_charges(operators: Operators) -> Operators:
    """Return operators that hold the Mulliken charges of their atoms, if they can be known: those they have, or computed ones.

    They are computed on the grid round(20 A / |a|).
    """
    if operators.mulliken_charges is not None or not _valence(operators).all():
        return operators
    kpoints, weights, _ = analysis_grid(operators, K_GRID)
    return replace(operators, mulliken_charges=mulliken_charges(operators, kpoints, weights, K_GRID.temperature_kelvin))


def _valence(operators: Operators) -> np.ndarray:
    """Return the valence electrons of the neutral atoms, (A,), zero where they are not known."""
    return np.array([operators.basis[z].valence for z in operators.atoms.numbers.tolist()])
