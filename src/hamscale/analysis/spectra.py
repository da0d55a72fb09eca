"""Compute eigenvalues, bands and densities of states, and compare those of a prediction with DFT's.

The energy of a periodic calculation has no absolute zero. Predicted eigenvalues are therefore compared after one shift per
structure: the median difference of the occupied eigenvalues on the k-grid, which minimises their mean absolute error.

Eigenvalues of a spin-polarised structure are arrays with a row for every k-point and spin, (2 K, n), first all rows of spin up
(levels.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
from ase import Atoms
from ase.dft.kpoints import parse_path_string
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError

from ..config import Analysis
from ..operators import SPINS, Operators
from ..structures import k_grid, kpoint_counts
from ..units import hartree_to_ev, hartree_to_mev
from ..workers import eigh, in_processes
from .levels import BROADENING_EV, Levels, density_of_states, levels_on_grid, moment, occupations

K_GRID = Analysis(kgrid_length_angstrom=20)  # where no material says another one
SMALL = 150  # with fewer orbitals than this, matrices are not worth a process
BAND_POINTS, BAND_ORBITALS = (60, 240), 30_000  # k-points of bands: so many times the orbitals, within limits


def states(operators: Operators, k: np.ndarray, below: float = np.inf, spin: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Solve H(k) v = e S(k) v with v^+ S v = 1: energies up to `below` in Hartree, ascending, (m,), and vectors (n, m).

    Raises ValueError if S(k) is not positive definite.
    """
    return states_of(*operators.at_k(k, spin), k, below)


def states_of(H: np.ndarray, S: np.ndarray, k: np.ndarray, below: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Solve H v = e S v of matrices at a k-point, as `states` does."""
    with _definite(S, k):
        return eigh(H, S, subset_by_value=(-np.inf, below)) if np.isfinite(below) else eigh(H, S)


def eigenvalues(operators: Operators, kpoints: ArrayLike, overlap_threshold: float = 0.0) -> np.ndarray:
    """Compute the generalised eigenvalues of H(k) c = e S(k) c: ascending, (spins * K, n), in Hartree.

    With a threshold t, directions in which S is smaller are left out: with S = U s U^+ and X = U_{s > t} s^{-1/2} these are the
    eigenvalues of X^+ H X, followed by one infinity for every direction that is left out.
    Raises ValueError if S(k) is not positive definite.
    """

    def at(point: tuple[np.ndarray, int]) -> np.ndarray:
        k, spin = point
        return eigenvalues_of(*operators.at_k(k, spin), k, overlap_threshold)

    # small matrices are solved in less time than a process takes to start
    workers = 1 if operators.n_orbitals < SMALL else None
    return np.array(in_processes(at, operators.points_and_spins(np.atleast_2d(kpoints)), workers))


def eigenvalues_of(H: np.ndarray, S: np.ndarray, k: np.ndarray, overlap_threshold: float = 0.0) -> np.ndarray:
    """Compute the eigenvalues of matrices at a k-point, (n,) in Hartree, as `eigenvalues` does."""
    if overlap_threshold:
        return _projected(H, S, overlap_threshold)
    with _definite(S, k):
        return eigh(H, S, eigvals_only=True)


@contextmanager
def _definite(S: np.ndarray, k: np.ndarray) -> Iterator[None]:
    """Say what is wrong if S(k) turns out not to be positive definite."""
    try:
        yield
    except LinAlgError:
        smallest = np.linalg.eigvalsh(S)[0]
        raise ValueError(
            f"S at k = {k} is not positive definite (smallest eigenvalue {smallest:.1e}). Are pairs missing that overlap? "
            "S must reach as far as the basis does, whatever the cutoff of H."
        ) from None


def projection(S: np.ndarray, threshold: float) -> np.ndarray:
    """Compute X = U_{s > t} s^{-1/2} of S = U s U^+, (n, kept): an orthonormal basis of what S sees by more than t."""
    s, U = eigh(S, None)
    kept = s > threshold
    return U[:, kept] / np.sqrt(s[kept])


def _projected(H: np.ndarray, S: np.ndarray, threshold: float) -> np.ndarray:
    """Compute the eigenvalues of H in the directions in which S exceeds the threshold, and infinity for the others, (n,)."""
    X = projection(S, threshold)
    found = eigh(X.conj().T @ H @ X, None, eigvals_only=True)
    return np.concatenate([found, np.full(len(H) - len(found), np.inf)])


@dataclass
class Comparison:
    """Eigenvalues (K, n), or (2 K, n) of two spins, in Hartree of DFT, the prediction and the reference, with their levels.

    The eigenvalues of the prediction and the reference are shifted by `shifts` (Hartree). weights (K,): weights of the rows.
    occupations (K, n): filled share of DFT's states. moments: of DFT and of the prediction, Bohr magnetons; None if both
    spins have one H.
    """

    dft: np.ndarray
    predicted: np.ndarray
    baseline: np.ndarray
    weights: np.ndarray
    occupations: np.ndarray
    levels: tuple[Levels, Levels, Levels]
    shifts: tuple[float, float]
    moments: tuple[float, float] | None = None

    @property
    def edge(self) -> float:
        """Return the energy zero of tables and figures in Hartree.

        It is DFT's highest occupied eigenvalue, or the Fermi level of a metal.
        """
        return self.levels[0].fermi_level if self.levels[0].metal else self.levels[0].valence_band_maximum


def analysis_grid(operators: Operators, analysis: Analysis) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Return the k-points (K, 3) of an analysis, and the divisions of the grid, which are 0 for a molecule.

    Between them come the weights of the rows of eigenvalues, (spins * K,), which sum to one.
    """
    counts = kpoint_counts(operators.atoms, analysis.kgrid, analysis.kgrid_length_angstrom)
    kpoints, weights = k_grid(counts)
    return kpoints, np.tile(weights / operators.spins, operators.spins), counts if operators.atoms.pbc.any() else (0, 0, 0)


def find_levels(operators: Operators, analysis: Analysis) -> Levels:
    """Find the band edges and the Fermi level of operators on the k-grid of an analysis."""
    kpoints, weights, counts = analysis_grid(operators, analysis)
    energies = eigenvalues(operators, kpoints)
    return levels_on_grid(energies, weights, operators.n_electrons, analysis.temperature_kelvin, counts, operators.spins)


def compare_spectra(dft: Operators, predicted: Operators, baseline: Operators, analysis: Analysis) -> Comparison:
    """Compare the eigenvalues of a prediction and of the reference with DFT's, on the k-grid of an analysis.

    With analysis.overlap_threshold, those of the prediction and the reference are projected (`eigenvalues`); DFT's never are.
    """
    kpoints, weights, counts = analysis_grid(dft, analysis)
    temperature = analysis.temperature_kelvin
    threshold = analysis.overlap_threshold
    energies = [eigenvalues(dft, kpoints), *(eigenvalues(o, kpoints, threshold) for o in (predicted, baseline))]
    levels = lambda e: levels_on_grid(e, weights, dft.n_electrons, temperature, counts, dft.spins)  # noqa: E731
    of_dft = levels(energies[0])
    share = occupations(energies[0], of_dft, temperature)
    # the energies of a molecule have an absolute zero, so nothing is shifted
    periodic = dft.atoms.pbc.any()
    of_states = weights[:, None] * share
    shifts = [_median(energies[0] - e, of_states) if periodic else 0.0 for e in energies[1:]]
    energies = [energies[0], energies[1] + shifts[0], energies[2] + shifts[1]]
    of_predicted, of_baseline = levels(energies[1]), levels(energies[2])
    moments = None
    if dft.spins == 2:
        moments = moment(weights, share), moment(weights, occupations(energies[1], of_predicted, temperature))
    return Comparison(
        energies[0],
        energies[1],
        energies[2],
        weights,
        share,
        (of_dft, of_predicted, of_baseline),
        (shifts[0], shifts[1]),
        moments,
    )


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the weighted median; values and weights have the shape (K, n)."""
    there = weights.ravel() > 1e-12
    values, weights = values.ravel()[there], weights.ravel()[there]
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(reached, reached[-1] / 2)]])


def spectral_summary(c: Comparison) -> dict[str, float]:
    """Return mean absolute errors of occupied eigenvalues (meV) over the whole grid, after the shift, and gaps (eV).

    States are weighted by their occupation. The gap of a metal is zero, and its Fermi level (eV, from `Comparison.edge`) and
    the density of states there stand in columns of their own, which are empty for an insulator. A spin-polarised structure also
    has its moments (Bohr magnetons per cell).
    """
    of_states = c.weights[:, None] * c.occupations
    filled = of_states > 0
    error = lambda e: float(  # noqa: E731
        hartree_to_mev((of_states * np.abs(e - c.dft))[filled].sum() / of_states.sum())
    )
    gaps = [hartree_to_ev(levels.gap) for levels in c.levels]
    result = {
        "eigenvalue_mae_mev_occupied": error(c.predicted),
        "baseline_eigenvalue_mae_mev_occupied": error(c.baseline),
        "gap_dft_ev": gaps[0],
        "gap_predicted_ev": gaps[1],
        "gap_baseline_ev": gaps[2],
        "gap_error_mev": 1000 * (gaps[1] - gaps[0]),
    }
    for name, levels in zip(("dft", "predicted"), c.levels):
        result[f"metal_{name}"] = levels.metal
        result[f"fermi_level_{name}_ev"] = hartree_to_ev(levels.fermi_level - c.edge) if levels.metal else np.nan
        result[f"states_at_fermi_level_{name}_per_ev"] = levels.states_at_fermi_level_per_ev if levels.metal else np.nan
    if c.moments:
        result |= {f"moment_{name}": value for name, value in zip(("dft", "predicted"), c.moments)}
    return result


def dos_table(c: Comparison) -> pd.DataFrame:
    """Return the densities of states against energy from `Comparison.edge`.

    This zero is DFT's highest occupied eigenvalue, or the Fermi level of a metal. The energies reach from 1 eV below all
    eigenvalues of DFT to 1 eV above them, and to 10 eV at most. A spin-polarised structure also has the densities of either
    spin, e.g. dft_up_states_per_ev, which add up to the one of both.
    """
    energies = [hartree_to_ev(e - c.edge) for e in (c.dft, c.predicted, c.baseline)]
    grid = np.arange(energies[0].min() - 1, min(energies[0].max() + 1, 10), BROADENING_EV / 4)
    names = ("dft", "predicted", "baseline")
    columns = {f"{n}_states_per_ev": density_of_states(e, c.weights, grid) for n, e in zip(names, energies)}
    if c.moments:
        half = len(c.weights) // 2
        for spin, rows in zip(SPINS, (slice(half), slice(half, None))):
            of_spin = {n: density_of_states(e[rows], c.weights[rows], grid) for n, e in zip(names, energies)}
            columns |= {f"{n}_{spin}_states_per_ev": density for n, density in of_spin.items()}
    return pd.DataFrame({"energy_ev": grid} | columns)


def band_path(atoms: Atoms, path: str | None, points: int) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Return k-points along a path of special points, with their lengths, labels and segments.

    Returns k-points (K, 3) in fractions, the length x (K,) along the path in 1/A, labels (K,) and segments (K,). By default the
    path is the lattice's own, from ASE; that of a slab lies in its plane, that of a wire on its axis. K is about `points`;
    every leg has at least its two ends. A path may stop at one special point and go on from another: both then have one x and
    one label, e.g. "U|K", and the segment changes. Raises ValueError if the lattice lacks a special point.
    """
    # ASE's get_linear_kpoint_axis takes a leg without points between its ends for a jump and gives it no length
    cell = atoms.cell
    try:
        bandpath = cell.bandpath(path, npoints=0, pbc=atoms.pbc)
        ends = [np.array([bandpath.special_points[name] for name in part]) for part in parse_path_string(bandpath.path)]
    except (KeyError, ValueError) as error:
        lattice = cell.get_bravais_lattice(pbc=atoms.pbc)
        raise ValueError(
            f"analysis.band_path is {path!r}, but the lattice of this cell ({lattice.longname}) has the special points "
            f"{', '.join(lattice.get_special_points())} ({type(error).__name__}: {error}). Strain lowers a lattice's symmetry: "
            "leave band_path out to take each cell's own path."
        ) from None
    lengths = [np.linalg.norm(np.diff(2 * np.pi * part @ cell.reciprocal(), axis=0), axis=1) for part in ends]
    spacing = sum(part.sum() for part in lengths) / points
    kpoints, x, segments, start = [], [], [], 0.0
    labels: list[list[str]] = []
    for segment, (names, part, length) in enumerate(zip(parse_path_string(bandpath.path), ends, lengths)):
        steps = np.maximum(1, np.round(length / spacing)).astype(int)
        corner = np.concatenate([[0], np.cumsum(steps)])  # index of each special point within the segment
        at = np.arange(corner[-1] + 1)
        kpoints.append(np.stack([np.interp(at, corner, component) for component in part.T], 1))
        x.append(start + np.interp(at, corner, np.concatenate([[0], np.cumsum(length)])))
        marks = [""] * len(at)
        for c, name in zip(corner, names):
            marks[c] = name
        if labels:
            marks[0] = labels[-1][-1] = f"{labels[-1][-1]}|{marks[0]}"
        labels.append(marks)
        segments.append(np.full(len(at), segment))
        start = x[-1][-1]
    return np.concatenate(kpoints), np.concatenate(x), sum(labels, []), np.concatenate(segments)


def bands_table(dft: Operators, predicted: Operators, baseline: Operators, c: Comparison, analysis: Analysis) -> pd.DataFrame:
    """Return the energies (eV, from `Comparison.edge`) along the band path, one row per k-point, band and spin.

    Columns: x_per_angstrom, label (of a special point, else empty), segment (unbroken part of the path), band, dft_ev,
    predicted_ev, baseline_ev. `Comparison.edge` is DFT's highest occupied eigenvalue, or the Fermi level of a metal. The levels
    of a molecule are at x = 0. A spin-polarised structure also has the column spin, up or down.
    """
    if dft.atoms.pbc.any():
        points = analysis.band_points or int(np.clip(BAND_ORBITALS // dft.n_orbitals, *BAND_POINTS))
        kpoints, x, names, segments = band_path(dft.atoms, analysis.band_path, points)
    else:
        kpoints, x, names, segments = np.zeros((1, 3)), np.zeros(1), [""], np.zeros(1, int)
    shifts = (0.0, *c.shifts)
    columns = {}
    for name, o, shift in zip(("dft", "predicted", "baseline"), (dft, predicted, baseline), shifts):
        energies = eigenvalues(o, kpoints, 0.0 if o is dft else analysis.overlap_threshold)
        columns[f"{name}_ev"] = hartree_to_ev(np.where(np.isinf(energies), np.nan, energies) + shift - c.edge).ravel()
    n, spins = dft.n_orbitals, dft.spins
    of_rows = {
        name: np.tile(np.repeat(values, n), spins)
        for name, values in (("x_per_angstrom", x), ("label", names), ("segment", segments))
    }
    of_rows["band"] = np.tile(np.arange(n), len(x) * spins)
    if spins == 2:
        of_rows["spin"] = np.repeat(SPINS, n * len(x))
    return pd.DataFrame(of_rows | columns)
