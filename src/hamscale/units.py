"""Convert physical units. No other file contains a conversion factor.

All factors are those of CODATA 2006, because CP2K uses them to turn the positions it reads in Angstrom into Bohr and to print
energies in eV. With the factors of a later year the same Hamiltonian would differ from CP2K's printed bands by 1e-7 Ha. Source:
P. J. Mohr, B. N. Taylor, D. B. Newell, Rev. Mod. Phys. 80, 633 (2008).
"""

from typing import TypeVar

import numpy as np

Quantity = TypeVar("Quantity", float, np.ndarray)  # a number or an array; the result is of the same kind

BOHR_IN_ANGSTROM = 0.529177208590
HARTREE_IN_EV = 27.2113838565563
BOLTZMANN_IN_HARTREE_PER_KELVIN = 3.1668153e-6


def bohr_to_angstrom(length_bohr: Quantity) -> Quantity:
    return length_bohr * BOHR_IN_ANGSTROM


def angstrom_to_bohr(length_angstrom: Quantity) -> Quantity:
    return length_angstrom / BOHR_IN_ANGSTROM


def hartree_to_ev(energy_hartree: Quantity) -> Quantity:
    return energy_hartree * HARTREE_IN_EV


def ev_to_hartree(energy_ev: Quantity) -> Quantity:
    return energy_ev / HARTREE_IN_EV


def hartree_to_mev(energy_hartree: Quantity) -> Quantity:
    return energy_hartree * (1000 * HARTREE_IN_EV)


def mev_to_hartree(energy_mev: Quantity) -> Quantity:
    return energy_mev / (1000 * HARTREE_IN_EV)
