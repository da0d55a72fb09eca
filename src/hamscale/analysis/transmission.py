"""Compute the transmission of a structure that repeats for ever along an axis, from its bands.

Nothing scatters in such a structure, so that every band which rises through E along the axis is a channel that transmits
everything. With k across the axis, and q along it round the closed line of the Brillouin zone,

    T(E, k) = sum_n sum_i [ e_n(k, q_i) < E <= e_n(k, q_i+1) ],

whose mean over a grid of k is T(E). Since e_n(-k, -q) = e_n(k, q), and a closed line rises as often as it falls, one of each k
and -k is enough. T is that of one spin, and the mean of both in a spin-polarised structure: the conductance of both is
2 e^2/h T. At a temperature it is the mean

    T(mu) = integral of T(E) (-df/dE)(E - mu) dE,    f(e) = 1 / (1 + exp(e / k_B T)).

Where bands cross between two points q, less is counted, at energies as near the crossing as their slope times half a step.

References: R. Landauer, IBM J. Res. Dev. 1, 223 (1957); S. Datta, Electronic Transport in Mesoscopic Systems (1995), chapter 2.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp
from ase import Atoms
from scipy.special import expit

from ..operators import SPINS, Operators
from ..structures import k_grid, kpoint_counts, periodicity
from ..units import BOLTZMANN_IN_HARTREE_PER_KELVIN, ev_to_hartree, hartree_to_ev
from ..workers import in_processes
from .false_states import find_suspects, looked_at
from .levels import Levels, levels_on_grid
from .spectra import SMALL, eigenvalues_of

ACROSS_ANGSTROM, ALONG_ANGSTROM = 40.0, 640.0  # points of the grid of k times the length of the cell
FEWEST_ALONG = 16
POINTS = 1000  # energies
LARGEST_DENSE = 2000  # orbitals of a structure whose states are looked at before transport
PIECE = 8  # points along a line that a process computes at a time
BINS, TAIL = 8, 20  # ranges of energy per k_B T in which T is averaged, and how many k_B T the tail of df/dE is followed


@dataclass(frozen=True)
class Lines:
    """Bands on closed lines along an axis: energies (spins, K, N, n) in Hartree, ascending, and weights (K,) of the lines.

    N points q follow one another round the line.
    """

    energies: np.ndarray
    weights: np.ndarray

    def levels(self, n_electrons: int, temperature_kelvin: float, counts: tuple[int, int, int]) -> Levels:
        """Find the band edges or the Fermi level on all points of the lines, which are those of a grid."""
        spins, _, N, n = self.energies.shape
        weights = np.tile(np.repeat(self.weights / N, N) / spins, spins)
        return levels_on_grid(self.energies.reshape(-1, n), weights, n_electrons, temperature_kelvin, counts, spins)

    @cached_property
    def _steps(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the energies at which T changes, ascending, and T above each of them, of each spin."""
        result = []
        for of_spin in self.energies:
            after = np.roll(of_spin, -1, 1)
            rises = after > of_spin
            share = np.broadcast_to(self.weights[:, None, None], rises.shape)[rises]
            at = np.concatenate([of_spin[rises], after[rises]])
            order = np.argsort(at)
            result.append((at[order], np.cumsum(np.concatenate([share, -share])[order])))
        return result

    def transmission(self, energies: np.ndarray) -> np.ndarray:
        """Count the bands that rise through energies (E,) in Hartree: (spins, E)."""
        return np.array([np.append(0.0, above)[np.searchsorted(at, energies)] for at, above in self._steps])

    def smeared(self, energies: np.ndarray, temperature_kelvin: float) -> np.ndarray:
        """Compute the transmission at a temperature, (spins, E), from its exact means over small ranges of energy."""
        width = BOLTZMANN_IN_HARTREE_PER_KELVIN * temperature_kelvin
        edges = np.arange(energies.min() - TAIL * width, energies.max() + (TAIL + 1) * width, width / BINS)
        means = []
        for at, above in self._steps:
            finite = np.isfinite(at)  # directions left out of a projection count as infinite
            at, above = at[finite], above[finite]
            integral = np.concatenate([[0.0], np.cumsum(above[:-1] * np.diff(at))])
            means.append(np.diff(np.interp(edges, at, integral)) / np.diff(edges))
        return smear(energies, edges, np.array(means), temperature_kelvin)


def smear(energies: np.ndarray, edges: np.ndarray, means: np.ndarray, temperature_kelvin: float) -> np.ndarray:
    """Compute the mean of T with the weight -df/dE about each energy (E,), (spins, E).

    means (spins, m): T between successive energies of edges (m + 1,), beyond which it goes on as it is in the outermost range.
    """
    below = expit((energies[:, None] - edges[1:-1]) / (BOLTZMANN_IN_HARTREE_PER_KELVIN * temperature_kelvin))
    ones = np.ones((len(energies), 1))
    return means @ -np.diff(np.concatenate([ones, below, 0 * ones], 1), axis=1).T


def axis_of(atoms: Atoms, axis: str) -> int:
    """Return the number of an axis a, b or c. Raises ValueError if the structure is not periodic along it."""
    if axis not in ("a", "b", "c"):
        raise ValueError(f"the axis of transport is {axis!r}, expected a, b or c.")
    if not atoms.pbc["abc".index(axis)]:
        raise ValueError(
            f"the axis of transport is {axis}, but the structure is periodic along {periodicity(atoms)}. Choose a "
            "direction in which it is periodic."
        )
    return "abc".index(axis)


def transport_grid(atoms: Atoms, axis: int, kgrid: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return the divisions of the grid of k: `kgrid`, or round(40 A / |a|) across the axis and round(640 A / |a|) along it."""
    if kgrid is None:
        along = kpoint_counts(atoms, (1, 1, 1), ALONG_ANGSTROM)
        counts = list(kpoint_counts(atoms, (1, 1, 1), ACROSS_ANGSTROM))
        counts[axis] = max(FEWEST_ALONG, along[axis])
        kgrid = counts[0], counts[1], counts[2]
    return kpoint_counts(atoms, kgrid, None)


def lines_across(counts: tuple[int, int, int], axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one of each k and -k across the axis, (K, 3) in fractions, and their weights (K,), which sum to one."""
    return k_grid([1 if direction == axis else count for direction, count in enumerate(counts)])


def band_lines(
    operators: Operators,
    axis: int,
    N: int,
    kpoints: np.ndarray,
    weights: np.ndarray,
    overlap_threshold: float = 0.0,
) -> Lines:
    """Compute the bands on closed lines of N points along an axis, through points (K, 3) across it with weights (K,).

    H and S are summed over the cells across the axis once per line, and over those along it at each point.
    overlap_threshold: as of `spectra.eigenvalues`. Raises ValueError if S(k) is not positive definite, or a line has fewer than
    four points, between which bands cannot be followed.
    """
    if N < 4:
        raise ValueError(f"a grid of k with {N} points along the axis of transport, expected 4 or more.")
    sums, n = _Sums(operators, axis), operators.n_orbitals

    def at(item: tuple[int, np.ndarray, np.ndarray]) -> np.ndarray:
        spin, k, numbers = item
        layers = sums.across(k, spin)
        q = numbers / N
        H, S = (np.exp(2j * np.pi * q[:, None] * sums.along) @ matrix for matrix in layers)
        points = k + q[:, None] * np.eye(3)[axis]
        return np.array(
            [eigenvalues_of(h.reshape(n, n), s.reshape(n, n), p, overlap_threshold) for h, s, p in zip(H, S, points)]
        )

    items, places = [], []
    for spin in range(operators.spins):
        for line, k in enumerate(kpoints):
            # where k and -k are the same point, one of each q and -q is enough
            numbers = np.arange(N // 2 + 1 if np.allclose(2 * k, np.round(2 * k)) else N)
            for piece in np.array_split(numbers, -(-len(numbers) // PIECE)):
                items.append((spin, k, piece))
                places.append((spin, line, piece))
    energies = np.empty((operators.spins, len(kpoints), N, n))
    workers = 1 if n < SMALL and len(items) < 4 else None
    for (spin, line, piece), found in zip(places, in_processes(at, items, workers)):
        energies[spin, line, -piece % N] = energies[spin, line, piece] = found
    return Lines(energies, weights)


class _Sums:
    """Sums of H and S over cells across an axis, exp(2 pi i k.R): a matrix for each cell along it.

    along (M,): number of the cell along the axis of each matrix.
    """

    def __init__(self, operators: Operators, axis: int) -> None:
        self.n = operators.n_orbitals
        cells = operators.pairs[:, 2:]
        self.along, layer = np.unique(cells[:, axis], return_inverse=True)
        self.cells, column = np.unique(cells * (np.arange(3) != axis), axis=0, return_inverse=True)
        sizes = np.diff(operators.offsets)
        rows, columns = operators.rows_and_columns()
        place = (np.repeat(layer.ravel(), sizes) * self.n + rows) * self.n + columns
        shape = len(self.along) * self.n**2, len(self.cells)
        self.matrices = [
            sp.csr_array((values, (place, np.repeat(column.ravel(), sizes))), shape)
            for values in (*np.atleast_2d(operators.hamiltonian), operators.overlap)
        ]

    def across(self, k: np.ndarray, spin: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of H and of S at k, (M, n^2) each."""
        phase = np.exp(2j * np.pi * (self.cells @ k))
        H, S = ((matrix @ phase).reshape(len(self.along), -1) for matrix in (self.matrices[spin], self.matrices[-1]))
        return H, S


@dataclass(frozen=True)
class Transmission:
    """T(E) of a structure, of each spin: sharp and smeared (spins, E), at energies (E,) in Hartree.

    levels: band edges or Fermi level, of a device those of its left lead. about: how it was computed.
    """

    energies: np.ndarray
    sharp: np.ndarray
    smeared: np.ndarray
    levels: Levels
    about: dict

    def table(self) -> pd.DataFrame:
        """Return energy_ev, from the middle of the gap or the Fermi level, transmission and transmission_smeared.

        Both are of one spin, the mean of two; a spin-polarised structure also has the columns of either, e.g. transmission_up.
        """
        columns = {"energy_ev": hartree_to_ev(self.energies - self.levels.fermi_level)}
        columns |= {"transmission": self.sharp.mean(0), "transmission_smeared": self.smeared.mean(0)}
        if len(self.sharp) == 2:
            columns |= {f"transmission_{spin}": values for spin, values in zip(SPINS, self.sharp)}
            columns |= {f"transmission_smeared_{spin}": values for spin, values in zip(SPINS, self.smeared)}
        return pd.DataFrame(columns)

    def conductances(self) -> dict[str, float]:
        """Return `conductances` of the mean of both spins."""
        return conductances(self.energies, self.smeared.mean(0), self.levels)


def conductances(energies: np.ndarray, smeared: np.ndarray, levels: Levels) -> dict[str, float]:
    """Return the smeared T, a conductance in 2 e^2/h, at the band edges and in the middle of the gap, or at a Fermi level."""
    if levels.metal:
        places = {"fermi_level": levels.fermi_level}
    else:
        edges = levels.valence_band_maximum, levels.mid_gap, levels.conduction_band_minimum
        places = dict(zip(("valence_edge", "mid_gap", "conduction_edge"), edges))
    return {f"transmission_{name}": float(np.interp(energy, energies, smeared)) for name, energy in places.items()}


def window(levels: Levels, window_ev: float, points: int) -> np.ndarray:
    """Return energies (points,) in Hartree that reach by window_ev beyond the band edges, or either side of a Fermi level."""
    low = high = levels.fermi_level
    if not levels.metal:
        low, high = levels.valence_band_maximum, np.nanmax([levels.valence_band_maximum, levels.conduction_band_minimum])
    return np.linspace(low - ev_to_hartree(window_ev), high + ev_to_hartree(window_ev), points)


def of_bands(
    operators: Operators,
    axis: str = "c",
    kgrid: tuple[int, int, int] | None = None,
    window_ev: float = 2.0,
    points: int | None = None,
    temperature_kelvin: float = 300.0,
) -> Transmission:
    """Compute the transmission of a periodic structure along an axis, at POINTS energies. kgrid: default `transport_grid`."""
    number = axis_of(operators.atoms, axis)
    counts = transport_grid(operators.atoms, number, kgrid)
    lines = band_lines(operators, number, counts[number], *lines_across(counts, number))
    levels = lines.levels(operators.n_electrons, temperature_kelvin, counts)
    energies = window(levels, window_ev, points or POINTS)
    reach = np.repeat(np.abs(operators.pairs[:, 2 + number]), np.diff(operators.offsets))
    size = np.abs(np.atleast_2d(operators.hamiltonian))
    about = {
        "method": "bands",
        "axis": axis,
        "kgrid": list(counts),
        "temperature_kelvin": temperature_kelvin,
        "reach_cells": int(reach.max(initial=0)),
        "beyond_next_cell_share": float(size[:, reach > 1].sum() / size.sum()),
    }
    return Transmission(energies, lines.transmission(energies), lines.smeared(energies, temperature_kelvin), levels, about)


def checks(operators: Operators, levels: Levels) -> dict:
    """Look at what spoils a calculation of transport: S that is nearly singular, and states that are probably false.

    Both at random k-points, as in `false_states`; warns of such states. Of more than LARGEST_DENSE orbitals nobody looks.
    """
    if operators.n_orbitals > LARGEST_DENSE:
        return {}
    smallest = in_processes(lambda k: np.linalg.eigvalsh(operators.at_k(k)[1])[0], looked_at(operators))
    suspects = find_suspects(operators, levels)
    if sentence := suspects.sentence():
        warnings.warn(sentence, stacklevel=2)
    return {"smallest_overlap_eigenvalue": float(min(smallest)), "suspect_states": suspects.states}
