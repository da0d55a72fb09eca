"""Density of states of large H and S at the Gamma point by the kernel polynomial method: products of sparse matrices alone.

With x = (E - centre) / half, T_n Chebyshev's polynomials and g_n Jackson's kernel, the density of one state per level and of two spins is

    D(E) = 2 / (pi half sqrt(1 - x^2)) (g_0 mu_0 + 2 sum_n g_n mu_n T_n(x)),    mu_n = Tr T_n(x(S^-1 H)) = <z^T T_n z>

over vectors z of random signs; their spread gives the error. S^-1 is applied by conjugate gradients. A level becomes nearly a Gaussian of
standard deviation pi half / moments in the middle of the spectrum.
Reference: A. Weisse, G. Wellein, A. Alvermann, H. Fehske, Rev. Mod. Phys. 78, 275 (2006).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, cg, eigsh

from ..operators import Operators
from ..units import hartree_to_ev

ATOMS_AT_ONCE = 500
TOLERANCE = 1e-6  # of S^-1, relative
MARGIN = 0.02  # of the spectrum's width, kept free at either end: T_n grows beyond it


def gamma_matrices(operators: Operators) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Sparse H (Hartree) and S at the Gamma point, (n, n): sums over cells R. Some atoms at a time."""
    starts, parts = np.concatenate([[0], np.cumsum(operators.orbitals)]), ([], [])
    for first in range(0, len(operators.atoms), ATOMS_AT_ONCE):
        last = min(first + ATOMS_AT_ONCE, len(operators.atoms))
        some = operators.select((operators.pairs[:, 0] >= first) & (operators.pairs[:, 0] < last))
        for part, values in zip(parts, (some.hamiltonian, some.overlap)):
            part.append(sum(some.csr(values).values())[starts[first] : starts[last]])
    return tuple(sp.vstack(part, format="csr") for part in parts)


@dataclass
class Moments:
    """mu (vectors, moments): one random vector's estimate each; energies of the spectrum are centre + half x, Hartree."""

    mu: np.ndarray
    centre: float
    half: float

    def density_of_states(self, energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States per Hartree and cell, two spins per level, and the standard error over the vectors; energies in Hartree."""
        x, n = (energies - self.centre) / self.half, np.arange(self.mu.shape[1])
        N = len(n) + 1
        jackson = ((N - n) * np.cos(np.pi * n / N) + np.sin(np.pi * n / N) / np.tan(np.pi / N)) / N
        inside = np.abs(x) < 1
        angle = np.arccos(np.where(inside, x, 0))
        waves = jackson * np.where(n == 0, 1, 2) * np.cos(np.multiply.outer(angle, n))
        waves *= (inside * 2 / (np.pi * self.half * np.sin(angle)))[:, None]
        each = self.mu @ waves.T
        error = each.std(0, ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.full(len(x), np.nan)
        return each.mean(0), error


def moments(H: sp.csr_matrix, S: sp.csr_matrix, count: int, vectors: int = 8, seed: int = 0) -> Moments:
    """Chebyshev moments of S^-1 H. Raises ValueError if S is not positive definite."""
    smallest = eigsh(S, 1, which="SA", tol=1e-3, return_eigenvectors=False)[0]
    if smallest <= 0:
        raise ValueError(
            f"S at the Gamma point is not positive definite (smallest eigenvalue {smallest:.1e}). Are pairs missing that overlap?"
        )
    scale = 1 / S.diagonal()
    preconditioner = LinearOperator(S.shape, lambda v: scale * v.ravel(), dtype=float)

    def solve(v):
        x, failed = cg(S, v, rtol=TOLERANCE, maxiter=1000, M=preconditioner)
        if failed:
            raise ValueError(
                f"S^-1 does not converge in 1000 steps: S is nearly singular (smallest eigenvalue {smallest:.1e})."
            )
        return x

    inverse = LinearOperator(S.shape, solve, dtype=float)
    low, high = (eigsh(H, 1, S, Minv=inverse, which=w, tol=1e-3, return_eigenvectors=False)[0] for w in ("SA", "LA"))
    centre, half = (low + high) / 2, (high - low) / 2 * (1 + 2 * MARGIN)
    step = lambda v: (solve(H @ v) - centre * v) / half  # noqa: E731
    mu = np.empty((vectors, count))
    for k in range(vectors):
        z = np.random.default_rng([seed, k]).choice([-1.0, 1.0], len(scale))
        before, now = z, step(z)
        for n in range(count):
            mu[k, n] = z @ before
            before, now = now, 2 * step(now) - before
    return Moments(mu, centre, half)


def dos_table(operators: Operators, count: int, vectors: int) -> tuple[pd.DataFrame, dict]:
    """Density of states against energy from the Fermi level, which the number of electrons fixes, and facts about it.

    Columns energy_ev, states_per_ev, standard_error_states_per_ev. Raises ValueError for fewer than two vectors or moments.
    """
    if min(count, vectors) < 2:
        raise ValueError(f"{count} moments, {vectors} vectors: expected two of each at least; one vector has no error.")
    found = moments(*gamma_matrices(operators), count, vectors)
    energies = found.centre + found.half * np.linspace(-0.9999, 0.9999, 4 * count)
    density, error = found.density_of_states(energies)
    filled = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(energies))])
    fermi = float(np.interp(operators.n_electrons, filled, energies))
    table = pd.DataFrame(
        {
            "energy_ev": hartree_to_ev(energies - fermi),
            "states_per_ev": density / hartree_to_ev(1.0),
            "standard_error_states_per_ev": error / hartree_to_ev(1.0),
        }
    )
    facts = {
        "orbitals": operators.n_orbitals,
        "moments": count,
        "vectors": vectors,
        "width_ev": round(hartree_to_ev(np.pi * found.half / count), 4),
        "fermi_level_ev": round(hartree_to_ev(fermi), 4),
        "states": round(float(filled[-1]), 2),
    }
    return table, facts
