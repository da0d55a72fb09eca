"""Compute the density matrix of the states that hold a structure's electrons, and the charges of its atoms.

With H(k) c_n = e_n S(k) c_n, c_n^+ S c_n = 1, and n filled to the share f_n, the density matrix of both spins together, or of
one of two, is

    P_ij(R) = s sum_k w_k sum_n f_n c_in c_jn^* exp(-2 pi i k.R),    s = 2 without spin, 1 with,

so that the electrons are N = sum_R sum_ij P_ij(R) S_ij(R), in the sense of CP2K and of A. Szabo, N. S. Ostlund, Modern Quantum
Chemistry (1989), chapter 3.4. The terms of an atom's own rows i are the electrons that R. S. Mulliken, J. Chem. Phys. 23, 1833
(1955), counts as its own; each overlap population is shared equally.
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


def mulliken_populations(
    operators: Operators, kpoints: np.ndarray, weights: np.ndarray, temperature_kelvin: float = 300.0
) -> np.ndarray:
    """Compute the electrons of each spin on each atom, N_i = sum of P_ab(R) S_ab(R) over the rows a of the atom, (spins, A).

    Arguments and errors are those of `density_matrix`. One row is of both spins together.
    """
    density = density_matrix(operators, kpoints, weights, temperature_kelvin)
    of_pairs = np.add.reduceat(density * operators.overlap, operators.offsets[:-1], axis=1)
    n = len(operators.atoms)
    return np.array([np.bincount(operators.pairs[:, 0], of_spin, n) for of_spin in of_pairs])


def mulliken_charges(
    operators: Operators, kpoints: np.ndarray, weights: np.ndarray, temperature_kelvin: float = 300.0
) -> np.ndarray:
    """Compute the Mulliken charges of the atoms, Z_i - N_i with the charge Z_i of the core, (A,), in elementary charges.

    Their sum is the charge of the structure. Raises ValueError as `density_matrix` does, and if the valence electrons of an
    element are not known, as in data of other codes.
    """
    numbers = operators.atoms.numbers
    valence = np.array([operators.basis[z].valence for z in numbers.tolist()])
    if (valence == 0).any():
        symbol = operators.atoms[int(np.flatnonzero(valence == 0)[0])].symbol
        raise ValueError(f"the basis does not say how many valence electrons {symbol} has: no charges follow from H and S.")
    return valence - mulliken_populations(operators, kpoints, weights, temperature_kelvin).sum(0)
