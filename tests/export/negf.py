"""Green's functions of a device, slow and plain: one dense inverse per energy, surfaces of the leads by decimation."""

import numpy as np


def surface(a, b, c):
    """Green's function of the last cell of a half-infinite lead: a = ES - H of a cell, b = to the one behind it, c = back.

    Lopez Sancho, Lopez Sancho and Rubio, J. Phys. F 15, 851 (1985).
    """
    outer, bulk = a.copy(), a.copy()
    while max(np.abs(b).max(), np.abs(c).max()) > 1e-14:
        g = np.linalg.inv(bulk)
        outer = outer - b @ g @ c
        bulk = bulk - b @ g @ c - c @ g @ b
        b, c = b @ g @ b, c @ g @ c
    return np.linalg.inv(outer)


def self_energy(cell, behind, back):
    return behind @ surface(cell, behind, back) @ back


def transmission(H, S, energies, n, eta=1e-8):
    """T(E) of dense H and S, whose first and last 2 n orbitals are two cells of a lead each."""
    result = []
    for energy in energies:
        A = (energy + 1j * eta) * S - H
        left = self_energy(A[:n, :n], A[n : 2 * n, :n], A[:n, n : 2 * n])  # a cell's coupling outwards is its neighbour's to it
        right = self_energy(A[-n:, -n:], A[-2 * n : -n, -n:], A[-n:, -2 * n : -n])
        inside = A.copy()
        inside[:n, :n] -= left
        inside[-n:, -n:] -= right
        G = np.linalg.inv(inside)[:n, -n:]
        of_left, of_right = (1j * (sigma - sigma.conj().T) for sigma in (left, right))
        result.append(np.trace(of_left @ G @ of_right @ G.conj().T).real)
    return np.array(result)
