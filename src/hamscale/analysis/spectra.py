"""Eigenvalues, bands and densities of states of operators, and how those of a prediction compare with DFT's.

The energy of a periodic calculation has no absolute zero: predicted eigenvalues are compared after one shift per structure,
the median difference of the occupied eigenvalues on the k-grid, which makes their mean absolute error least.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from ase.cell import Cell
from ase.dft.kpoints import parse_path_string
from scipy.linalg import LinAlgError, eigh

from ..config import Analysis
from ..operators import Operators
from ..structures import kpoint_counts
from ..units import hartree_to_ev, hartree_to_mev

BROADENING_EV = 0.1


def eigenvalues(operators: Operators, kpoints) -> np.ndarray:
    """Generalised eigenvalues of H(k) c = e S(k) c, ascending, (K, n), Hartree.

    Raises ValueError if S(k) is not positive definite.
    """
    result = []
    for k in np.atleast_2d(kpoints):
        H, S = operators.at_k(k)
        try:
            result.append(eigh(H, S, eigvals_only=True))
        except LinAlgError:
            smallest = np.linalg.eigvalsh(S)[0]
            raise ValueError(
                f"S at k = {k} is not positive definite (smallest eigenvalue {smallest:.1e}). Are pairs missing that overlap? "
                "S must reach as far as the basis does, whatever the cutoff of H."
            ) from None
    return np.array(result)


def k_grid(size, periodic: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Gamma-centred grid, one of each k and -k: points (K, 3) in fractions and weights (K,) that sum to one."""
    if not periodic:
        return np.zeros((1, 3)), np.ones(1)
    size = np.asarray(size)
    index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).reshape(-1, 3)
    key = index @ [size[1] * size[2], size[2], 1]
    opposite = (-index % size) @ [size[1] * size[2], size[2], 1]
    keep = key <= opposite
    weights = np.where(key == opposite, 1, 2)[keep]
    points = index[keep] / size
    return points - np.round(points - 1e-9), weights / weights.sum()


@dataclass
class Comparison:
    """Eigenvalues (K, n) in Hartree of DFT, the prediction and the reference, the latter two shifted."""

    dft: np.ndarray
    predicted: np.ndarray
    baseline: np.ndarray
    weights: np.ndarray
    occupied: int
    shifts: tuple[float, float]

    @property
    def edge(self) -> float:
        """Highest occupied eigenvalue of DFT, Hartree: the zero of tables and pictures."""
        return float(self.dft[:, : self.occupied].max())


def compare_spectra(dft: Operators, predicted: Operators, baseline: Operators, analysis: Analysis) -> Comparison:
    counts = kpoint_counts(dft.atoms, analysis.kgrid, analysis.kgrid_length_angstrom)
    kpoints, weights = k_grid(counts, bool(dft.atoms.pbc.all()))
    occupied = dft.n_electrons // 2
    energies = [eigenvalues(o, kpoints) for o in (dft, predicted, baseline)]
    # a molecule's energies have a zero of their own, and nothing is shifted
    periodic = dft.atoms.pbc.all()
    shifts = [_median((energies[0] - e)[:, :occupied], weights) if periodic else 0.0 for e in energies[1:]]
    return Comparison(energies[0], energies[1] + shifts[0], energies[2] + shifts[1], weights, occupied, tuple(shifts))


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """Of values (K, n), with a weight per row."""
    order, each = np.argsort(values, axis=None), np.repeat(weights, values.shape[1])
    reached = np.cumsum(each[order])
    return float(values.flat[order[np.searchsorted(reached, reached[-1] / 2)]])


def gap(energies: np.ndarray, occupied: int) -> float:
    """Lowest unoccupied less highest occupied eigenvalue over all k; negative where bands overlap."""
    return float(energies[:, occupied].min() - energies[:, occupied - 1].max()) if energies.shape[1] > occupied else np.nan


def spectral_summary(c: Comparison) -> dict[str, float]:
    """Mean absolute errors of occupied eigenvalues (meV) over the whole grid, after the shift, and gaps (eV)."""
    occupied = slice(0, c.occupied)
    error = lambda e: float(hartree_to_mev(c.weights @ np.abs(e - c.dft)[:, occupied].mean(1)))  # noqa: E731
    gaps = [hartree_to_ev(gap(e, c.occupied)) for e in (c.dft, c.predicted, c.baseline)]
    return {
        "eigenvalue_mae_mev_occupied": error(c.predicted),
        "baseline_eigenvalue_mae_mev_occupied": error(c.baseline),
        "gap_dft_ev": gaps[0],
        "gap_predicted_ev": gaps[1],
        "gap_baseline_ev": gaps[2],
        "gap_error_mev": 1000 * (gaps[1] - gaps[0]),
    }


def density_of_states(energies_ev: np.ndarray, weights: np.ndarray, grid_ev: np.ndarray, sigma_ev: float = BROADENING_EV):
    """sum_k w_k sum_n 2 g(E - e_nk), states per eV and cell: Gaussians of standard deviation sigma, two spins per state."""
    x = (grid_ev[:, None] - energies_ev.ravel()) / sigma_ev
    return 2 * np.exp(-0.5 * x**2) @ np.repeat(weights, energies_ev.shape[1]) / (sigma_ev * np.sqrt(2 * np.pi))


def dos_table(c: Comparison) -> pd.DataFrame:
    """Densities of states against energy above DFT's highest occupied eigenvalue, from 1 eV below all to 10 eV above it."""
    energies = [hartree_to_ev(e - c.edge) for e in (c.dft, c.predicted, c.baseline)]
    grid = np.arange(energies[0].min() - 1, min(energies[0].max() + 1, 10), BROADENING_EV / 4)
    names = ("dft", "predicted", "baseline")
    return pd.DataFrame(
        {"energy_ev": grid} | {f"{n}_states_per_ev": density_of_states(e, c.weights, grid) for n, e in zip(names, energies)}
    )


def band_path(cell: Cell, path: str | None, points: int):
    """k-points (K, 3) in fractions, length x (K,) in 1/A, labels (K,) and segments (K,) along a path of special points.

    By default the lattice's own path, from ASE. K is about `points`; every leg has its two ends at least. A path may stop at
    one special point and go on from another: both have one x and one label, e.g. "U|K", and the segment changes.
    Raises ValueError if the lattice lacks a special point.
    """
    # not ASE's get_linear_kpoint_axis: it takes a leg without points between its ends for a jump and gives it no length
    try:
        bandpath = cell.bandpath(path, npoints=0)
        ends = [np.array([bandpath.special_points[name] for name in part]) for part in parse_path_string(bandpath.path)]
    except (KeyError, ValueError) as error:
        lattice = cell.get_bravais_lattice()
        raise ValueError(
            f"analysis.band_path is {path!r}, but the lattice of this cell ({lattice.longname}) has the special points "
            f"{', '.join(lattice.get_special_points())} ({type(error).__name__}: {error}). Strain lowers a lattice's symmetry: "
            "leave band_path out to take each cell's own path."
        ) from None
    lengths = [np.linalg.norm(np.diff(2 * np.pi * part @ cell.reciprocal(), axis=0), axis=1) for part in ends]
    spacing = sum(part.sum() for part in lengths) / points
    kpoints, x, labels, segments, start = [], [], [], [], 0.0
    for segment, (names, part, length) in enumerate(zip(parse_path_string(bandpath.path), ends, lengths)):
        steps = np.maximum(1, np.round(length / spacing)).astype(int)
        corner = np.concatenate([[0], np.cumsum(steps)])  # which k-point of the segment each special point is
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
    """Energies (eV, from DFT's highest occupied eigenvalue) along the band path, a row per k-point and band.

    Columns: x_per_angstrom, label (special points there, or empty), segment (unbroken part of the path), band, dft_ev,
    predicted_ev, baseline_ev. Molecules: levels at x = 0.
    """
    if dft.atoms.pbc.all():
        kpoints, x, names, segments = band_path(dft.atoms.cell, analysis.band_path, analysis.band_points)
    else:
        kpoints, x, names, segments = np.zeros((1, 3)), np.zeros(1), [""], np.zeros(1, int)
    shifts = (0.0, *c.shifts)
    columns = {
        f"{name}_ev": hartree_to_ev(eigenvalues(o, kpoints) + shift - c.edge).ravel()
        for name, o, shift in zip(("dft", "predicted", "baseline"), (dft, predicted, baseline), shifts)
    }
    n = dft.n_orbitals
    return pd.DataFrame(
        {
            "x_per_angstrom": np.repeat(x, n),
            "label": np.repeat(names, n),
            "segment": np.repeat(segments, n),
            "band": np.tile(np.arange(n), len(x)),
        }
        | columns
    )
