"""Compute the density matrix of the states that hold a structure's electrons.

With H(k) c_n = e_n S(k) c_n, c_n^+ S c_n = 1, and n filled to the share f_n, the density matrix of both spins together, or of
one of two, is

    P_ij(R) = s sum_k w_k sum_n f_n c_in c_jn^* exp(-2 pi i k.R),    s = 2 without spin, 1 with,

so that the electrons are N = sum_R sum_ij P_ij(R) S_ij(R), in the sense of CP2K and of A. Szabo, N. S. Ostlund, Modern Quantum
Chemistry (1989), chapter 3.4.
"""

import numpy as np

from ..operators import Operators
from .levels import levels_on_grid, occupations
from .spectra import states


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
    of_rows = np.tile(weights / spins, spins)
    levels = levels_on_grid(energies, of_rows, operators.n_electrons, temperature_kelvin, spins=spins)
    if levels.metal:
        shares = occupations(energies, levels, temperature_kelvin)
    else:  # by number: the gaps of two spins need not lie at one energy
        shares = np.repeat([np.arange(energies.shape[1]) < n for n in levels.filled], len(kpoints), 0).astype(float)
    rows, columns = operators.rows_and_columns()
    sizes = np.diff(operators.offsets)
    result = np.zeros((spins, len(rows)))
    for number, ((k, spin), (_, c)) in enumerate(zip(operators.points_and_spins(kpoints), found)):
        P = (c * shares[number]) @ c.conj().T
        phases = np.exp(-2j * np.pi * (operators.pairs[:, 2:] @ k)) * (2 / spins * weights[number % len(kpoints)])
        result[spin] += (P[rows, columns] * np.repeat(phases, sizes)).real
    return result
