"""Compute the density of states of a large H and S from the surroundings of some of its atoms, drawn at random.

An atom's share of the states depends little on what is far away (W. Kohn, Phys. Rev. Lett. 76, 3168 (1996)). It is therefore
computed in a cluster cut out around the atom, as in the divide-and-conquer method (W. Yang, Phys. Rev. Lett. 66, 1438 (1991)).
With the eigenvalues e and eigenvectors C of the cluster, H C = S C e,

    g_a(E) = 2 sum_n delta(E - e_n) sum_(mu of a) C_mu,n (S C)_mu,n,    D(E) = sum over elements of N_z <g_a>_z

The mean is over the atoms near the centres of clusters, weighted so that every atom counts equally. Its error, by the jackknife
over clusters, falls as the square root of the number of clusters, whatever the size of the structure. The error that comes from
cutting out clusters falls with their radius, and is seen where all eigenvalues are known. The method needs no product with
S^-1, which takes hundreds of steps where a basis is nearly linearly dependent: 500 for GeSb2Te4 in DZVP, to 1e-6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms
from scipy.linalg import LinAlgError
from scipy.ndimage import gaussian_filter1d

from ..operators import SPINS, Operators, OperatorsFile, open_operators, read_operators
from ..pairs import PairList
from ..structures import charge_of
from ..units import ev_to_hartree, hartree_to_ev
from ..workers import eigh, in_processes
from .false_states import Suspects, energy_zero, long_states
from .levels import Levels
from .spectra import projection

DENSE = 20_000  # largest number of orbitals for which all eigenvalues are computed
BINS = 8  # bins of energy per width of a level
MARGIN = 6  # widths by which the energies reach beyond the outermost level
GAP_WITHIN_EV = 1.0  # a gap is searched for within this distance of the Fermi level, or within three times its error
TAIL = 1e-3  # share of the electrons that lies beyond a band edge
BAND_EV = 5.0  # the density at the Fermi level is compared with the mean density over this range below the band edge
IN_CORE = 0.1  # share of a state in the core of a cluster, from which on it is looked at
METAL = 0.1  # if it is more than this share of that mean density, the structure is a metal


@dataclass
class Structure:
    """H and S of a structure on disk, with the blocks of every atom found in one place."""

    file: OperatorsFile

    def __post_init__(self) -> None:
        self.atoms, self.basis, self.pairs, self.offsets = self.file.atoms, self.file.basis, self.file.pairs, self.file.offsets
        self.order = np.argsort(self.pairs[:, 0], kind="stable")
        self.starts = np.searchsorted(self.pairs[self.order, 0], np.arange(len(self.atoms) + 1))
        self.distances = self.pairs.distances

    def rows(self, i: int) -> np.ndarray:
        """Return the indices of the blocks (i, j, R) of atom i.

        They lie together, in one shard of a file that many ranks wrote.
        """
        return self.order[self.starts[i] : self.starts[i + 1]]

    def cluster(self, centre: int, radius: float) -> tuple[Operators, np.ndarray, np.ndarray]:
        """Return H and S of the atoms within the radius (A) of an atom, as those of a molecule.

        Also returns the index of each of these atoms in the structure, (m,), and its distance from the centre, (m,), in
        Angstrom.
        """
        near = self.rows(centre)
        near = near[self.distances[near] <= radius]
        members = self.pairs[near, 1:]  # (m, 4)  | j, R
        place = {tuple(member): k for k, member in enumerate(members.tolist())}
        pairs = []
        pieces: dict[str, list[np.ndarray]] = {"hamiltonian": [], "overlap": []}
        for k, (j, *R) in enumerate(members.tolist()):
            rows = self.rows(j)
            others = np.array([place.get(tuple(other), -1) for other in (self.pairs[rows, 1:] + [0, *R]).tolist()])
            kept = others >= 0
            pairs.append([(k, other, 0, 0, 0) for other in others[kept]])
            of_kept = np.repeat(kept, self.offsets[rows + 1] - self.offsets[rows])
            for name, parts in pieces.items():
                span = slice(int(self.offsets[rows[0]]), int(self.offsets[rows[-1] + 1]))
                parts.append(self.file.read(name, span)[..., of_kept])
        values = {name: np.concatenate(parts, -1) for name, parts in pieces.items()}
        molecule = Atoms(self.atoms.numbers[members[:, 0]])
        table = PairList(molecule, np.concatenate(pairs))
        operators = Operators(molecule, self.basis, table, values["hamiltonian"], values["overlap"])
        return operators.sorted(), members[:, 0], self.distances[near]


def shares(operators: Operators, overlap_threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the levels (n,) in Hartree, the share of every atom in each of them, (A, n), and v^+ v of their states v, (n,).

    Shares count two spins: a column sums to two, and the row of an atom to twice the number of its orbitals. With a threshold,
    directions in which S is smaller are left out, and n is smaller (`spectra.eigenvalues`). Of a spin-polarised structure the
    levels are those of spin up, then those of spin down, and a column sums to one.
    """
    if operators.spins == 2:
        levels, of_atoms, squares = zip(*(shares(channel, overlap_threshold) for channel in operators.channels))
        return np.concatenate(levels), np.concatenate(of_atoms, 1) / 2, np.concatenate(squares)
    H, S = operators.at_k((0, 0, 0))
    try:
        if overlap_threshold:
            X = projection(S, overlap_threshold)
            levels, C = eigh(X.T @ H @ X, None)
            C = X @ C
        else:
            levels, C = eigh(H, S, overwrite_a=True, driver="gvd")
    except LinAlgError as error:
        raise ValueError(f"S of {len(operators.atoms)} atoms is not positive definite ({error}). Are blocks missing?") from None
    of_atom = np.concatenate([[0], np.cumsum(operators.orbitals)])[:-1]
    return levels, 2 * np.add.reduceat(C * (S @ C), of_atom, axis=0), np.square(C).sum(0)


def dos_table(
    path: str | Path,
    clusters: int,
    radius: float,
    core: float,
    width_ev: float,
    window_ev: float,
    exact: bool = False,
    overlap_threshold: float = 0.0,
) -> tuple[pd.DataFrame, dict, Levels, Suspects]:
    """Compute the density of states against energy from the Fermi level, which the number of electrons fixes.

    Returns (table, facts, levels, suspects), the last of them states that are probably false. clusters: number of clusters,
    around atoms drawn without replacement; around all atoms if there are no more. radius, core: radius (A) of a cluster, and of
    the part around its centre whose atoms count. width_ev: standard deviation of the Gaussian that a level becomes. window_ev:
    range of the table on either side of the Fermi level. overlap_threshold: as of `spectra.eigenvalues`.

    Columns: energy_ev, states_per_ev, standard_error_states_per_ev, and of a spin-polarised structure states_up_per_ev and
    states_down_per_ev. `exact` adds the column exact_states_per_ev, from all
    eigenvalues at the Gamma point, and to the facts exact_fermi_level_ev, rms_deviation_states_per_ev and
    rms_standard_error_states_per_ev.

    Raises ValueError for fewer than two clusters, for a radius beyond the blocks of the file or below core, and for `exact`
    with more than DENSE orbitals.
    """
    sampled = _sample(path, clusters, radius, core, DENSE if exact else None, overlap_threshold)
    density = _Density.of(sampled, ev_to_hartree(width_ev))
    levels, fermi, fermi_error = _levels(density, len(sampled.clusters))
    per_ev = hartree_to_ev(1.0)
    columns = {
        "energy_ev": hartree_to_ev(density.energies - fermi),
        "states_per_ev": density.whole / per_ev,
        "standard_error_states_per_ev": _jackknife(density.whole, density.without) / per_ev,
    }
    if sampled.spins == 2:
        columns |= {f"states_{name}_per_ev": density.of_spin(sampled, spin) / per_ev for spin, name in enumerate(SPINS)}
    if exact:
        operators = read_operators(path)
        spins = operators.spins
        solve = lambda H, S: eigh(H, S, eigvals_only=True, overwrite_a=True, overwrite_b=True)  # noqa: E731
        every = np.concatenate([solve(*operators.at_k((0, 0, 0), spin)) for spin in range(spins)])
        exact_density = density.smooth(2.0 / spins * np.histogram(every, density.edges)[0])
        columns["exact_states_per_ev"] = exact_density / per_ev
    table = pd.DataFrame(columns)
    table = table[table["energy_ev"].abs() <= window_ev].reset_index(drop=True)
    facts = {
        "orbitals": sampled.n_orbitals,
        "clusters": len(sampled.clusters),
        "cluster_atoms": round(float(np.mean([cluster.atoms for cluster in sampled.clusters])), 1),
        "radius_angstrom": radius,
        "core_angstrom": core,
        "width_ev": width_ev,
        "fermi_level_ev": round(hartree_to_ev(fermi), 4),
        "fermi_level_standard_error_ev": round(hartree_to_ev(fermi_error), 4),
        "states": round(float(density.whole.sum() * density.step), 2),
        "metal": levels.metal,
    }
    suspects = _suspects(sampled.clusters, levels)
    facts["suspect_states"] = suspects.states
    if suspects.states:
        facts |= {f"suspect_{name}": round(getattr(suspects, name), 4) for name in ("lowest_ev", "highest_ev")}
    if overlap_threshold:
        facts |= {"overlap_threshold": overlap_threshold, "directions_left_out": round(sampled.left_out, 2)}
    if not levels.metal:
        for name in ("valence_band_maximum", "conduction_band_minimum", "mid_gap"):
            facts[f"{name}_ev"] = round(hartree_to_ev(getattr(levels, name)), 4)
        facts["mid_gap_standard_error_ev"] = round(hartree_to_ev(levels.fermi_level_standard_error), 4)
    if exact:
        rms = lambda values: round(float(np.sqrt(np.mean(np.square(values)))), 4)  # noqa: E731
        facts["rms_deviation_states_per_ev"] = rms(table["states_per_ev"] - table["exact_states_per_ev"])
        facts["rms_standard_error_states_per_ev"] = rms(table["standard_error_states_per_ev"])
        facts["exact_fermi_level_ev"] = round(hartree_to_ev(density.fermi_level(exact_density)), 4)
        facts["mean_states_per_ev"] = round(float(table["exact_states_per_ev"].mean()), 4)
    return table, facts, levels, suspects


def _suspects(clusters: list["_Cluster"], levels: Levels) -> Suspects:
    """Find the levels of clusters that are probably false."""
    zero, found = energy_zero(levels), []
    for cluster in clusters:
        found.append(hartree_to_ev(cluster.levels[long_states(cluster.levels, cluster.squares, levels)] - zero))
    return Suspects.among(found)


@dataclass(frozen=True)
class _Cluster:
    """States of one cluster, those of spin down behind those of spin up if their H differ.

    levels (n,), Hartree. shares (elements, n): shares of the atoms of its core in the levels. squares (n,): v^+ v of their
    states v, zero for those of which less than IN_CORE lies in the core. counted (elements,): the weighted numbers of the atoms
    of the core. atoms: number of atoms of the cluster. left_out: number of directions left out.
    """

    levels: np.ndarray
    shares: np.ndarray
    squares: np.ndarray
    counted: np.ndarray
    atoms: int
    left_out: int


@dataclass(frozen=True)
class _Sampled:
    """Clusters of a structure, and of the whole structure the atoms by element, the electrons and the orbitals."""

    clusters: list[_Cluster]
    total: np.ndarray
    n_electrons: int
    n_orbitals: int
    spins: int

    @property
    def left_out(self) -> float:
        """Return the mean number of directions left out of a cluster."""
        return float(np.mean([cluster.left_out for cluster in self.clusters]))


def _sample(
    path: str | Path, clusters: int, radius: float, core: float, most_orbitals: int | None, overlap_threshold: float
) -> _Sampled:
    """Cut clusters around atoms drawn at random, and diagonalise them. Raises ValueError as `dos_table` does."""
    with open_operators(path) as found:
        structure = Structure(found)
        atoms, basis = structure.atoms, structure.basis
        n_orbitals = int(basis.n_orbitals(atoms.numbers).sum())
        clusters = min(clusters, len(atoms))
        if clusters < 2:
            raise ValueError(f"{clusters} clusters: expected two at least; one has no error.")
        reach = structure.distances.max() if atoms.pbc.any() else np.inf
        if not 0 <= core <= radius <= reach:
            raise ValueError(
                f"core {core:g} A, radius {radius:g} A: expected 0 <= core <= radius <= {reach:.2f} A, as far as blocks go."
            )
        if most_orbitals is not None and n_orbitals > most_orbitals:
            raise ValueError(
                f"all eigenvalues of {n_orbitals} orbitals: expected at most {most_orbitals}. Take a smaller structure."
            )
        # an atom that has many neighbours lies in many cores
        met = np.bincount(structure.pairs[structure.distances <= core, 0], minlength=len(atoms))
        elements = np.unique(atoms.numbers)

        def sample(centre: int) -> _Cluster:
            operators, which, distances = structure.cluster(int(centre), radius)
            levels, share, squares = shares(operators, overlap_threshold)
            weight = (distances <= core) / met[which]
            of_element = operators.atoms.numbers == elements[:, None]
            squares *= share[distances <= core].sum(0) > 2 / operators.spins * IN_CORE
            counted, left_out = (of_element * weight).sum(1), operators.n_orbitals - len(levels) // operators.spins
            return _Cluster(levels, (of_element * weight) @ share, squares, counted, len(which), left_out)

        sampled = in_processes(sample, np.random.default_rng(0).permutation(len(atoms))[:clusters])
        total = np.array([(atoms.numbers == z).sum() for z in elements])
        n_electrons, spins = basis.n_electrons(atoms.numbers) - charge_of(atoms), found.spins
        return _Sampled(sampled, total, n_electrons, n_orbitals, spins)


@dataclass(frozen=True)
class _Density:
    """Density of states on a grid of energies, Hartree: from all clusters, and from all clusters but one.

    edges (m + 1,): of the bins; counts (m,), counts_without: states by bin; whole (m,), without: the same, smoothed by
    Gaussians of a width, per Hartree.
    """

    edges: np.ndarray
    width: float
    n_electrons: int
    counts: np.ndarray
    counts_without: list[np.ndarray]

    @classmethod
    def of(cls, sampled: _Sampled, width: float) -> "_Density":
        """Count the states of clusters, with the share of the whole structure that their cores stand for."""
        low = min(cluster.levels.min() for cluster in sampled.clusters) - MARGIN * width
        high = max(cluster.levels.max() for cluster in sampled.clusters) + MARGIN * width
        edges = np.linspace(low, high, int(np.ceil((high - low) / width * BINS)) + 1)
        states = np.array([[np.histogram(c.levels, edges, weights=w)[0] for w in c.shares] for c in sampled.clusters])
        counted = np.array([cluster.counted for cluster in sampled.clusters])
        counts = _over_elements(sampled.total, states.sum(0), counted.sum(0))
        without = [_over_elements(sampled.total, states.sum(0) - s, counted.sum(0) - c) for s, c in zip(states, counted)]
        return cls(edges, width, sampled.n_electrons, counts, without)

    @property
    def energies(self) -> np.ndarray:
        """Middles of the bins, (m,)."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def step(self) -> float:
        """Width of a bin."""
        return self.edges[1] - self.edges[0]

    def smooth(self, histogram: np.ndarray) -> np.ndarray:
        """Turn states by bin into a density per Hartree."""
        return gaussian_filter1d(histogram, self.width / self.step, mode="constant") / self.step

    def of_spin(self, sampled: _Sampled, spin: int) -> np.ndarray:
        """Density of the states of one spin of a spin-polarised structure, (m,)."""
        counts = np.zeros((len(sampled.total), len(self.edges) - 1))
        for cluster in sampled.clusters:
            levels, of_elements = np.split(cluster.levels, 2)[spin], np.split(cluster.shares, 2, 1)[spin]
            counts += [np.histogram(levels, self.edges, weights=of_element)[0] for of_element in of_elements]
        counted = np.sum([cluster.counted for cluster in sampled.clusters], axis=0)
        return self.smooth(_over_elements(sampled.total, counts, counted))

    @cached_property
    def whole(self) -> np.ndarray:
        """Density of all clusters, (m,)."""
        return self.smooth(self.counts)

    @cached_property
    def without(self) -> list[np.ndarray]:
        """Densities of all clusters but one."""
        return [self.smooth(counts) for counts in self.counts_without]

    def fermi_level(self, density: np.ndarray) -> float:
        """Return the energy up to which a density holds all electrons."""
        return float(np.interp(self.n_electrons, np.cumsum(density) * self.step, self.edges[1:]))


def _levels(density: _Density, clusters: int) -> tuple[Levels, float, float]:
    """Find band edges with their error; the Fermi level of the number of electrons and its error come with them."""
    fermi = density.fermi_level(density.whole)
    fermi_error = float(_jackknife(fermi, [density.fermi_level(one) for one in density.without]))
    near = max(3 * fermi_error, ev_to_hartree(GAP_WITHIN_EV))
    edges = lambda counts, of: _band_edges(density.energies, counts, of, fermi, near)  # noqa: E731
    bottom, top, metal = edges(density.counts, density.whole)
    middles = [sum(edges(c, d)[:2]) / 2 for c, d in zip(density.counts_without, density.without)]
    levels = Levels(
        metal,
        fermi if metal else (bottom + top) / 2,
        np.nan if metal else bottom,
        np.nan if metal else top,
        fermi_error if metal else float(_jackknife((bottom + top) / 2, middles)),
        float(np.interp(fermi, density.energies, density.whole)) / hartree_to_ev(1.0) if metal else 0.0,
        clusters=clusters,
    )
    return levels, fermi, fermi_error


def _band_edges(
    energies: np.ndarray, counts: np.ndarray, density: np.ndarray, fermi: float, near: float
) -> tuple[float, float, bool]:
    """Return the band edges on both sides of the least density near the Fermi level, and whether the structure is a metal.

    Clusters drawn at random give the number of electrons with an error, so the Fermi level that it fixes may lie in a band; the
    gap is where states are fewest near there. The share TAIL of the electrons lies beyond an edge, so that single states in the
    tails do not decide. counts: states of two spins by bin of energy. density: the same, smoothed, per Hartree.
    """
    inside = np.flatnonzero(np.abs(energies - fermi) <= near)
    middle = inside[np.argmin(density[inside])]
    total = np.cumsum(counts)
    tail = TAIL * total[middle]
    bottom = energies[np.searchsorted(total, total[middle] - tail)]
    top = energies[np.searchsorted(total, total[middle] + tail)]
    bands = density[(energies <= bottom) & (energies >= bottom - ev_to_hartree(BAND_EV))]
    return float(bottom), float(top), bool(density[middle] > METAL * bands.mean())


def _over_elements(total: np.ndarray, states: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return sum_z N_z <g_a>_z; an element that occurs in no cluster contributes zero."""
    return np.divide(total, counted, out=np.zeros(len(total)), where=counted > 0) @ states


def _jackknife(whole: float | np.ndarray, without: Sequence[float] | Sequence[np.ndarray]) -> np.ndarray:
    """Return the standard error of the estimate from all samples, given the estimates that leave out one sample each."""
    n = len(without)
    return (np.square(np.array(without) - whole).sum(0) * (n - 1) / n) ** 0.5
