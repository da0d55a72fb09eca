"""Find false states: eigenvalues that an error of H brings down along directions which the overlap nearly misses.

Along a direction u with u^+ u = 1 and u^+ S u = s, an error u^+ dH u is an error of u^+ dH u / s in an eigenvalue: 2 meV are
4 eV where s = 5e-4, as diffuse functions of a DZVP basis have it. States along such directions belong tens of eV above the
Fermi level. One that comes down crosses gaps, and carries current in a calculation of transport, although the error of H is
small.

Such a state can be told without DFT. With v^+ S v = 1, v^+ v is the inverse of the overlap along v. States of DFT up to 8 eV
above the highest occupied one have v^+ v <= 6 in all bases of this project, states along nearly missing directions 20 to 1,000
(docs/results.md, "False states").
"""

from dataclasses import dataclass

import numpy as np

from ..graph.lifting import LOW
from ..operators import Operators
from ..structures import random_kpoints
from ..units import ev_to_hartree, hartree_to_ev, hartree_to_mev
from ..workers import eigh, in_processes
from .levels import Levels
from .spectra import eigenvalues, states

KPOINTS = 60  # random k-points at which false states are looked for, and how many orbitals may take part in all of them
ORBITALS = 12_000
LONG = 1 / LOW  # v^+ v of a state that is suspect
WINDOW_EV = 4.0  # states are looked at up to this much above the highest occupied one, and WITHIN_CONDUCTION_EV above the gap
WITHIN_CONDUCTION_EV = 1.0
FALSE_EV = 0.5  # a state is false if DFT's state of the same number lies higher by more than this
NEXT_BANDS = 6  # bands above the occupied ones whose error is stated


def looked_at(operators: Operators) -> np.ndarray:
    """Return the random k-points at which false states are looked for, (K, 3) in fractions.

    There are KPOINTS, or fewer where these times the number of orbitals were more than ORBITALS, but four at least: the zone of
    a large cell is small, and its matrices are dear. A grid of high symmetry would meet false states less often than they are.
    """
    return random_kpoints(operators.atoms, int(np.clip(ORBITALS // operators.n_orbitals, 4, KPOINTS)))


def highest_energy(levels: Levels) -> float:
    """Return the energy (Hartree) up to which states are looked at: WINDOW_EV above the highest occupied one, or more.

    In an insulator it reaches WITHIN_CONDUCTION_EV into the conduction band at least.
    """
    if levels.metal:
        return levels.fermi_level + ev_to_hartree(WINDOW_EV)
    above = levels.valence_band_maximum + ev_to_hartree(WINDOW_EV)
    return float(np.nanmax([above, levels.conduction_band_minimum + ev_to_hartree(WITHIN_CONDUCTION_EV)]))


def energy_zero(levels: Levels) -> float:
    """Return the highest occupied eigenvalue (Hartree), or the Fermi level of a metal: the zero of energies of states."""
    return levels.fermi_level if levels.metal else levels.valence_band_maximum


@dataclass(frozen=True)
class Suspects:
    """States that are probably false, found without DFT.

    states: their number, over all k-points, or clusters, looked at; -1 if nobody has looked.
    places, of: number of k-points, or clusters, with one, and looked at.
    lowest_ev, highest_ev: their energies above the highest occupied eigenvalue, or the Fermi level of a metal; NaN if there
    are none.
    """

    states: int = -1
    places: int = 0
    of: int = 0
    lowest_ev: float = np.nan
    highest_ev: float = np.nan

    @classmethod
    def among(cls, energies_ev: list[np.ndarray]) -> "Suspects":
        """Summarise the energies of suspect states, of each k-point or cluster."""
        every = np.concatenate([*energies_ev, np.empty(0)])
        lowest, highest = (float(every.min()), float(every.max())) if len(every) else (np.nan, np.nan)
        return cls(len(every), sum(len(e) > 0 for e in energies_ev), len(energies_ev), lowest, highest)

    def attributes(self) -> dict:
        """Return the attributes that a file stores (docs/files.md)."""
        return {
            "suspect_states": self.states,
            "suspect_places": self.places,
            "suspect_places_of": self.of,
            "suspect_lowest_ev": self.lowest_ev,
            "suspect_highest_ev": self.highest_ev,
        }

    def sentence(self, places: str = "random k-points") -> str:
        """Say how many states are suspect, at which energies, and what to do; empty if there are none."""
        if self.states <= 0:
            return ""
        return (
            f"{self.states} states at {self.places} of {self.of} {places} are probably false: {self.lowest_ev:.2f} to "
            f"{self.highest_ev:.2f} eV from the highest occupied level, along directions that the overlap nearly misses "
            f"(v^+ v > {LONG:g}). Train longer or on more structures, or leave such directions out of the analysis "
            "(analysis.overlap_threshold, --overlap-threshold; docs/howto/choosing.md)."
        )


def long_states(energies: np.ndarray, squares: np.ndarray, levels: Levels) -> np.ndarray:
    """Select the suspect ones among states with energies in Hartree and v^+ v, arrays of one shape: a mask of that shape."""
    return (squares > LONG) & (energies <= highest_energy(levels))


def find_suspects(operators: Operators, levels: Levels) -> Suspects:
    """Find suspect states at random k-points. Raises ValueError if S is not positive definite at one of them."""
    below, zero = highest_energy(levels), energy_zero(levels)

    def at(point: tuple[np.ndarray, int]) -> np.ndarray:
        k, spin = point
        energies, v = states(operators, k, below, spin)
        return energies[long_states(energies, np.square(np.abs(v)).sum(0), levels)]

    found = in_processes(at, operators.points_and_spins(looked_at(operators)))
    return Suspects.among([hartree_to_ev(energies - zero) for energies in found])


def false_states(dft: np.ndarray, predicted: np.ndarray, levels: Levels) -> np.ndarray:
    """Find predicted states that DFT does not have: a mask (K, n).

    dft, predicted: ascending eigenvalues (K, n) in Hartree on one energy zero. levels: those of DFT. A state is false if it
    lies below `highest_energy`, and DFT's state of the same number more than FALSE_EV above it.
    """
    return (predicted <= highest_energy(levels)) & (dft - predicted > ev_to_hartree(FALSE_EV))


def false_state_summary(
    dft: Operators, predicted: Operators, levels: Levels, shift: float, overlap_threshold: float = 0.0
) -> dict[str, float]:
    """Compare a prediction with DFT at random k-points: false states, suspect ones, and the bands above the occupied ones.

    levels: those of DFT. shift (Hartree): added to the eigenvalues of the prediction. Counts are of k-points; of a spin-
    polarised structure, of k-points and spins.
    With a threshold, eigenvalues of the prediction are those without directions of a smaller overlap (`spectra.eigenvalues`);
    how many directions that leaves out, on average, and what it does to DFT's own eigenvalues, stands beside them.
    """
    kpoints = looked_at(dft)

    (own, _), (every, squares) = (_energies_and_squares(operators, kpoints) for operators in (dft, predicted))
    every = every + shift
    smallest = in_processes(lambda k: eigh(predicted.at_k(k)[1], None, subset_by_index=(0, 0), eigvals_only=True)[0], kpoints)
    energies = eigenvalues(predicted, kpoints, overlap_threshold) + shift if overlap_threshold else every
    bands = {
        "occupied": [slice(0, filled) for filled in levels.filled],
        "next": [slice(filled, filled + NEXT_BANDS) for filled in levels.filled],
    }

    def error(e: np.ndarray, name: str) -> float:
        of_spins = [found[:, part] for found, part in zip(np.split(np.abs(e - own), dft.spins), bands[name])]
        if not (total := sum(found.size for found in of_spins)):
            return np.nan  # no bands lie above the occupied ones
        return float(hartree_to_mev(sum(found.mean() * (found.size / total) for found in of_spins if found.size)))

    result = {
        "random_kpoints": len(own),
        "false_states": int(false_states(own, energies, levels).any(1).sum()),
        "suspect_states": int(long_states(every, squares, levels).any(1).sum()),
        "eigenvalue_mae_mev_next": error(energies, "next"),
        "smallest_overlap_eigenvalue": float(min(smallest)),
    }
    if overlap_threshold:
        projected = eigenvalues(dft, kpoints, overlap_threshold)
        result |= {
            "overlap_threshold": overlap_threshold,
            "directions_left_out": float(np.isinf(energies).sum(1).mean()),
            "projection_cost_mev_occupied": error(projected, "occupied"),
            "projection_cost_mev_next": error(projected, "next"),
        }
    return result


def _energies_and_squares(operators: Operators, kpoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the energies in Hartree and v^+ v of all states, (spins * K, n) each."""

    def at(point: tuple[np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
        k, spin = point
        energies, v = states(operators, k, spin=spin)
        return energies, np.square(np.abs(v)).sum(0)

    energies, squares = zip(*in_processes(at, operators.points_and_spins(kpoints)))
    return np.array(energies), np.array(squares)
