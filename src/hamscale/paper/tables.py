"""Collect the tables of the figures that show materials."""

from pathlib import Path

import pandas as pd

from ..files import read_table

BAND_WINDOW_EV = (-8.0, 8.0)


def figure_8_tables(analyses: dict[str, Path], view: Path) -> dict[str, pd.DataFrame]:
    """Collect the tables of figure 8: those of `analyse` for some structures, by label, and the view of another structure.

    Tables: summary, decay, blocks, bands, dos (with a column `structure_label`), atoms, image. Bands and densities of states
    are limited to 8 eV on either side of the highest occupied eigenvalue.
    """
    result = {}
    for name in ("summary", "decay", "blocks", "bands", "dos"):
        parts = [pd.read_csv(folder / f"{name}.csv").assign(structure_label=label) for label, folder in analyses.items()]
        result[name] = pd.concat(parts, ignore_index=True)
    inside = result["bands"].groupby(["structure_label", "band"])["dft_ev"].transform
    low, high = inside("max") > BAND_WINDOW_EV[0], inside("min") < BAND_WINDOW_EV[1]
    result["bands"] = result["bands"][low & high].drop(columns="baseline_ev")
    result["dos"] = result["dos"][result["dos"]["energy_ev"].between(*BAND_WINDOW_EV)]
    most = 400  # points of a pair of elements: more cannot be told apart in print
    thin = [p.iloc[:: -(-len(p) // most)] for _, p in result["decay"].groupby(["structure_label", "pair"], sort=False)]
    result["decay"] = pd.concat(thin)
    return result | {name: read_table(view / f"{name}.csv") for name in ("atoms", "image")}
