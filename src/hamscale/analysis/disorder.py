"""Compute density, radial distribution and coordination numbers, by which a disordered structure is judged."""

from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from ase import Atoms, units
from ase.data import chemical_symbols

from ..graph.neighbours import edges_within

REACH_ANGSTROM = 7.0
SPACING_ANGSTROM = 0.02
WIDTH_ANGSTROM = 0.08
SHORTEST_ANGSTROM = 4.5  # a first shell of neighbours lies below this distance, or there is none


def density_g_cm3(atoms: Atoms) -> float:
    """Return the mass over the volume, in g/cm^3."""
    grams, cubic_centimetres = atoms.get_masses().sum() * 1e3 / units.kg, atoms.get_volume() * 1e-24
    return float(grams / cubic_centimetres)


def radial_distribution(structures: list[Atoms]) -> pd.DataFrame:
    """Compute the radial distribution function g_ab(r) of every pair of elements.

    g_ab(r) = <number of atoms b in a shell around an atom a> / (4 pi r^2 dr n_b), where n_b is the number of atoms b per
    volume; g is one where there is no order. The mean is over all atoms a of all structures, and each distance becomes a
    Gaussian of WIDTH_ANGSTROM. Columns: distance_angstrom, pair, g.
    """
    r = np.arange(SPACING_ANGSTROM, REACH_ANGSTROM, SPACING_ANGSTROM)
    found = _distances(structures)
    frames = []
    for a, b in combinations_with_replacement(sorted(found), 2):
        at = np.concatenate(found[a][b]) if found[a][b] else np.empty(0)
        counts, _ = np.histogram(at, np.append(r - SPACING_ANGSTROM / 2, r[-1] + SPACING_ANGSTROM / 2))
        smooth = np.exp(-0.5 * ((r[:, None] - r) / WIDTH_ANGSTROM) ** 2)
        smooth /= smooth.sum(0)  # a distance near an end of the range keeps its full weight
        expected = sum((s.numbers == a).sum() * (s.numbers == b).sum() / s.get_volume() for s in structures)
        g = smooth @ counts / (4 * np.pi * r**2 * SPACING_ANGSTROM * max(expected, 1e-300))
        pair = f"{chemical_symbols[a]}-{chemical_symbols[b]}"
        frames.append(pd.DataFrame({"distance_angstrom": r.round(3), "pair": pair, "g": g}))
    return pd.concat(frames, ignore_index=True)


def coordination(structures: list[Atoms], distribution: pd.DataFrame) -> pd.DataFrame:
    """Count the neighbours of each element within its first shells.

    A shell ends at the first minimum of g_ab behind its highest peak below SHORTEST_ANGSTROM. A pair of elements without a peak
    there (g > 1) has no first shell and no rows. Columns: centre, neighbour, cutoff_angstrom, number, share; share is the
    fraction of the centres that have this number of neighbours.
    """
    found, rows = _distances(structures), []
    for pair, g in distribution.groupby("pair", sort=False):
        r, g = g["distance_angstrom"].to_numpy(), g["g"].to_numpy()
        peak = int(np.argmax(np.where(r < SHORTEST_ANGSTROM, g, 0)))
        if g[peak] <= 1:
            continue
        rising = np.flatnonzero(np.diff(g[peak:]) > 0)
        falls = np.flatnonzero(g[peak:] < 1e-3)
        ends = [x[0] for x in (rising, falls) if len(x)]
        cutoff = r[peak + min(ends)] if ends else r[-1]
        for a, b in dict.fromkeys((tuple(pair.split("-")), tuple(pair.split("-")[::-1]))):
            z = chemical_symbols.index(a), chemical_symbols.index(b)
            numbers = np.array([(d < cutoff).sum() for d in found[z[0]][z[1]]])
            for n, count in zip(*np.unique(numbers, return_counts=True)):
                rows.append((a, b, cutoff, int(n), count / len(numbers)))
    return pd.DataFrame(rows, columns=["centre", "neighbour", "cutoff_angstrom", "number", "share"])


def _distances(structures: list[Atoms]) -> dict[int, dict[int, list[np.ndarray]]]:
    """Return found[a][b]: for each atom of element a, the distances (A) to the atoms of element b within REACH_ANGSTROM."""
    elements = sorted({int(z) for s in structures for z in s.numbers})
    found: dict[int, dict[int, list[np.ndarray]]] = {a: {b: [] for b in elements} for a in elements}
    for s in structures:
        edges = edges_within(s, REACH_ANGSTROM)
        d, ends = edges.distances, np.searchsorted(edges[:, 0], np.arange(len(s) + 1))
        for i in range(len(s)):
            of = slice(ends[i], ends[i + 1])
            for b in elements:
                found[int(s.numbers[i])][b].append(d[of][s.numbers[edges[of, 1]] == b])
    return found
