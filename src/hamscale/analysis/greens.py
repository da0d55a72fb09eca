"""Compute the transmission of an open device by Green's functions, block by block.

With A(z) = z S - H in blocks of which only neighbours couple, a lead acts on the block at its end by a self-energy S_L or S_R,
found by decimation: every second block of a lead is eliminated, until the couplings that are left are nothing. What lies to the
left of block i + 1 acts on it by

    S_i+1 = A_i+1,i (A_i,i - S_i)^-1 A_i,i+1,    S_0 = S_L,

and with G = (A_N,N - S_N - S_R)^-1 of the last block and broadenings B = i (S - S^+) the transmission of one spin is

    T(E) = Tr B_N G B_R G^+.

Inside the device E is real, so that the current is the same in all blocks; in the leads z = E + i ETA.

References: M. P. Lopez Sancho, J. M. Lopez Sancho, J. Rubio, J. Phys. F 15, 851 (1985); C. Caroli et al., J. Phys. C 4, 916
(1971); Y. Meir, N. S. Wingreen, Phys. Rev. Lett. 68, 2512 (1992).
"""

from functools import partial

import numpy as np
from scipy.linalg import lu_factor, lu_solve

from ..units import ev_to_hartree, hartree_to_ev, hartree_to_mev
from ..workers import in_processes
from .devices import Chain, Source, assemble, cut
from .spectra import eigenvalues_of
from .transmission import Lines, Transmission, axis_of, lines_across, smear, transport_grid, window

ETA_EV = 1e-5  # imaginary part of the energy in the leads
SMALL_COUPLING, ITERATIONS = 1e-12, 60  # Hartree; decimation ends there
POINTS = 200  # energies
LEAD_POINTS = 16  # points along a lead at which its bands are computed


def self_energies(z: complex, lead: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the self-energies on a block of a lead, from all blocks to its left and from all to its right, (n, n) each.

    lead: H and S of a block, and of its coupling with the next one. Raises ValueError if the decimation does not converge.
    """
    H, S, H_next, S_next = lead
    bulk = z * S - H
    left, right = np.zeros_like(bulk), np.zeros_like(bulk)
    forth, back = z * S_next - H_next, z * S_next.conj().T - H_next.conj().T
    for _ in range(ITERATIONS):
        if max(np.abs(forth).max(), np.abs(back).max()) < SMALL_COUPLING:
            return left, right
        inverse = lu_factor(bulk, check_finite=False)
        to_next, to_last = (lu_solve(inverse, coupling, check_finite=False) for coupling in (forth, back))
        by_next, by_last = forth @ to_last, back @ to_next
        left, right, bulk = left + by_last, right + by_next, bulk - by_next - by_last
        forth, back = forth @ to_next, back @ to_last
    raise ValueError(f"the surface function of a lead does not converge at {hartree_to_ev(z.real):.4f} eV.")


def chain_transmission(chain: Chain, eta: float, energy: float) -> float:
    """Compute T of a chain of blocks between its leads at an energy, with an imaginary part eta in the leads (Hartree)."""
    z, last = energy + 1j * eta, len(chain.sizes) - 1
    left, right = chain.lead(0), chain.lead(1)
    of_left, of_right = self_energies(z, left)
    if any(np.abs(a - b).max() > 1e-12 for a, b in zip(left, right)):
        of_right = self_energies(z, right)[1]
    for I in range(last + 1):
        H, S = chain.block(I)
        block = energy * S - H - of_left
        if last > I:
            H, S = chain.block(I, 1)
            coupling = energy * S - H
            of_left = coupling.conj().T @ np.linalg.solve(block, coupling)
    G = np.linalg.inv(block - of_right)
    broadening = [1j * (found - found.conj().T) for found in (of_left, of_right)]
    return float(np.vdot(G @ broadening[1], broadening[0] @ G).real)


def of_device(
    source: Source,
    axis: str,
    leads: tuple[int, int],
    kgrid: tuple[int, int, int] | None = None,
    window_ev: float = 2.0,
    points: int | None = None,
    temperature_kelvin: float = 300.0,
    energies: np.ndarray | None = None,
) -> Transmission:
    """Compute the transmission of a device, whose leads are its first and its last atoms along an axis (`devices.cut`).

    energies (E,) in Hartree: by default POINTS in a `window` about the band edges of the left lead. Energies are shared among
    processes; a process holds the dense blocks of one k. Raises ValueError as `cut` and `assemble` do.
    """
    number = axis_of(source.atoms, axis)
    device = cut(source.atoms, source.pairs, number, leads)
    counts = transport_grid(source.atoms, number, kgrid)
    kpoints, weights = lines_across(counts, number)
    spins = source.spins
    lines = Lines(np.array([[_lead_bands(assemble(source, device, k, s)) for k in kpoints] for s in range(spins)]), weights)
    n_electrons = source.basis.n_electrons(source.atoms.numbers[device.blocks[0]])
    levels = lines.levels(n_electrons, temperature_kelvin, counts)
    energies = window(levels, window_ev, points or POINTS) if energies is None else energies
    sharp, eta = np.zeros((spins, len(energies))), ev_to_hartree(ETA_EV)
    for spin in range(spins):
        for k, weight in zip(kpoints, weights):
            chain = assemble(source, device, k, spin)
            sharp[spin] += weight * np.array(in_processes(partial(chain_transmission, chain, eta), energies))
    median, largest = chain.end_mismatch()
    about = {
        "method": "Green's functions",
        "axis": axis,
        "kgrid": [1 if direction == number else count for direction, count in enumerate(counts)],
        "temperature_kelvin": temperature_kelvin,
        "eta_ev": ETA_EV,
        "leads_atoms": list(leads),
        "blocks_orbitals": chain.sizes.tolist(),
        "leads_couple": "across the end of the cell" if device.across else "as the two blocks at an end",
        "leads_differ_angstrom": round(device.distance_angstrom, 4),
        "leads_differ_mev_median": round(hartree_to_mev(median), 3),
        "leads_differ_mev_largest": round(hartree_to_mev(largest), 3),
        "beyond_neighbours_largest_ev": hartree_to_ev(chain.beyond[0]),
        "beyond_neighbours_share": chain.beyond[1],
    }
    smeared = smear(energies, energies, (sharp[:, 1:] + sharp[:, :-1]) / 2, temperature_kelvin)
    return Transmission(energies, sharp, smeared, levels, about)


def _lead_bands(chain: Chain) -> np.ndarray:
    """Compute the bands of the left lead, (LEAD_POINTS, n) in Hartree."""
    H, S, H_next, S_next = chain.lead(0)

    def at(q: float) -> np.ndarray:
        phase = np.exp(2j * np.pi * q)
        at_q = [block + phase * next_ + (phase * next_).conj().T for block, next_ in ((H, H_next), (S, S_next))]
        return eigenvalues_of(at_q[0], at_q[1], np.array([q]))

    return np.array(in_processes(at, np.arange(LEAD_POINTS) / LEAD_POINTS))
