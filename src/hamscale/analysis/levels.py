"""Find the band edges, the Fermi level and the occupations of the states that hold a structure's electrons.

An insulator has a gap between the N/2 lowest bands, which hold its N electrons, and the next ones. A structure whose bands
overlap there, or whose N is odd, is a metal: its states are filled by the Fermi function, with the Fermi level mu that gives N
electrons,

    N = 2 sum_k w_k sum_n f(e_n(k)),    f(e) = 1 / (1 + exp((e - mu) / k_B T)).

In a spin-polarised structure both spins share one Fermi level, as in an open device, and the N electrons fill the lowest bands
of both; their moment follows. Arrays of eigenvalues then have a row for every k-point and spin, first all of spin up, each with
half the weight of its k-point, so that the sums above hold as they are.

Reference: N. W. Ashcroft, N. D. Mermin, Solid State Physics (1976), chapter 2.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from ..operators import ENERGIES, LEVELS_UNKNOWN
from ..units import BOLTZMANN_IN_HARTREE_PER_KELVIN, hartree_to_ev

BROADENING_EV = 0.1  # standard deviation of the Gaussian that a level becomes


@dataclass(frozen=True)
class Levels:
    """Band edges and Fermi level of a structure (Hartree, relative to the energy zero of the file they belong to).

    metal: whether bands overlap. fermi_level: the Fermi level of a metal, the middle of the gap of an insulator.
    valence_band_maximum, conduction_band_minimum, mid_gap: NaN for a metal. fermi_level_standard_error: zero on a k-grid,
    otherwise the standard error that comes from drawing clusters at random. states_at_fermi_level_per_ev: density of states at
    the Fermi level, of both spins, per cell; zero in a gap. filled: filled bands of each spin, or of both if they are the same;
    in a metal those that the Fermi function fills, rounded. kgrid: divisions of the Gamma-centred grid, zeros for a molecule or
    for clusters. clusters: number of clusters, zero on a k-grid.
    """

    metal: bool
    fermi_level: float
    valence_band_maximum: float
    conduction_band_minimum: float
    fermi_level_standard_error: float = 0.0
    states_at_fermi_level_per_ev: float = 0.0
    filled: tuple[int, ...] = ()
    kgrid: tuple[int, int, int] = (0, 0, 0)
    clusters: int = 0

    @property
    def mid_gap(self) -> float:
        return (self.valence_band_maximum + self.conduction_band_minimum) / 2

    @property
    def gap(self) -> float:
        """Return the width of the gap in Hartree; zero for a metal."""
        return 0.0 if self.metal else self.conduction_band_minimum - self.valence_band_maximum

    def attributes(self) -> dict:
        """Return the attributes that a file stores (docs/files.md)."""
        return {f"{name}_hartree": float(getattr(self, name)) for name in ENERGIES} | {
            "metal": int(self.metal),
            "states_at_fermi_level_per_ev": float(self.states_at_fermi_level_per_ev),
            "levels_kgrid": np.array(self.kgrid, np.int64),
            "levels_clusters": int(self.clusters),
        }


# placeholders for the levels of a structure that is too large for a k-grid, until `hamscale dos` computes them
UNKNOWN = Levels(False, np.nan, np.nan, np.nan, np.nan, np.nan).attributes() | {"metal": LEVELS_UNKNOWN}


def levels_on_grid(
    energies: np.ndarray,
    weights: np.ndarray,
    n_electrons: int,
    temperature_kelvin: float,
    kgrid: tuple[int, int, int] = (0, 0, 0),
    spins: int = 1,
) -> Levels:
    """Find the Levels of eigenvalues (spins * K, n) in Hartree at k-points and spins with weights that sum to one.

    If no state lies above the occupied ones, the conduction band minimum is NaN.
    """
    kgrid = int(kgrid[0]), int(kgrid[1]), int(kgrid[2])
    filled = _filled_bands(energies.reshape(spins, -1, energies.shape[1]), n_electrons)
    if filled is not None:
        top, above = _edges(energies.reshape(spins, -1, energies.shape[1]), filled)
        middle = top if np.isnan(above) else (top + above) / 2
        return Levels(False, float(middle), float(top), float(above), filled=filled, kgrid=kgrid)
    fermi = fermi_level(energies, weights, n_electrons, temperature_kelvin)
    density = density_of_states(hartree_to_ev(energies), weights, np.array([hartree_to_ev(fermi)]))
    levels = Levels(True, fermi, np.nan, np.nan, states_at_fermi_level_per_ev=float(density[0]), kgrid=kgrid)
    if spins == 1:
        return replace(levels, filled=(n_electrons // 2,))
    up = round((n_electrons + moment(weights, occupations(energies, levels, temperature_kelvin))) / 2)
    return replace(levels, filled=(up, n_electrons - up))


def _filled_bands(energies: np.ndarray, n_electrons: int) -> tuple[int, ...] | None:
    """Return the number of filled bands of each spin of an insulator, None for a metal; energies (spins, K, n)."""
    spins, _, n = energies.shape
    choices: list[tuple[int, ...]]
    if spins == 1:
        choices = [] if n_electrons % 2 else [(n_electrons // 2,)]
    else:
        choices = [(up, n_electrons - up) for up in range(max(0, n_electrons - n), min(n, n_electrons) + 1)]
    gaps = [(np.nan_to_num(above - top, nan=np.inf), filled) for filled in choices for top, above in [_edges(energies, filled)]]
    gap, best = max(gaps, default=(0.0, None))
    return best if gap > 0 else None


def _edges(energies: np.ndarray, filled: tuple[int, ...]) -> tuple[float, float]:
    """Return the highest energy of the filled bands and the lowest of the others, NaN if there are none."""
    below = [of_spin[:, count - 1].max() for of_spin, count in zip(energies, filled) if count]
    above = [of_spin[:, count].min() for of_spin, count in zip(energies, filled) if count < energies.shape[2]]
    return max(below, default=np.nan), min(above, default=np.nan)


def moment(weights: np.ndarray, shares: np.ndarray) -> float:
    """Compute the electrons of spin up less those of spin down, in Bohr magnetons per cell.

    weights (2 K,); shares (2 K, n): `occupations`.
    """
    of_rows = 2 * weights * shares.sum(1)
    return float(of_rows[: len(of_rows) // 2].sum() - of_rows[len(of_rows) // 2 :].sum())


def fermi_level(energies: np.ndarray, weights: np.ndarray, n_electrons: int, temperature_kelvin: float) -> float:
    """Find the energy (Hartree) at which the Fermi function gives the number of electrons.

    energies (K, n): eigenvalues in Hartree. weights (K,): weights of the k-points.
    """
    width = BOLTZMANN_IN_HARTREE_PER_KELVIN * temperature_kelvin
    excess = lambda mu: 2 * weights @ expit((mu - energies) / width).sum(1) - n_electrons  # noqa: E731
    margin = 50 * width
    highest = energies[np.isfinite(energies)].max()  # directions left out of a projection count as infinite
    return float(brentq(excess, energies.min() - margin, highest + margin, xtol=1e-12))


def occupations(energies: np.ndarray, levels: Levels, temperature_kelvin: float) -> np.ndarray:
    """Return the filled share of each state, (K, n), from 0 to 1; energies are those in which the levels were found.

    In an insulator the states below the gap are filled; in a metal the Fermi function gives the shares.
    """
    if levels.metal:
        return expit((levels.fermi_level - energies) / (BOLTZMANN_IN_HARTREE_PER_KELVIN * temperature_kelvin))
    return (energies <= levels.fermi_level).astype(float)


def density_of_states(
    energies_ev: np.ndarray, weights: np.ndarray, grid_ev: np.ndarray, sigma_ev: float = BROADENING_EV
) -> np.ndarray:
    """Compute sum_k w_k sum_n 2 g(E - e_nk), in states per eV and cell.

    g is a Gaussian of standard deviation sigma, and each state counts for two spins.
    """
    x = (grid_ev[:, None] - energies_ev.ravel()) / sigma_ev
    return 2 * np.exp(-0.5 * x**2) @ np.repeat(weights, energies_ev.shape[1]) / (sigma_ev * np.sqrt(2 * np.pi))
