"""Make all tables of one structure, from which figures are drawn and summaries are made."""

import numpy as np
import pandas as pd

from ..config import Analysis, Transport
from ..operators import Operators
from ..units import hartree_to_mev
from . import errors, spectra
from .false_states import false_state_summary
from .slabs import slab_errors, slab_table
from .transmission_tables import transmission_summary, transmission_table

LARGEST_HEATMAP = 200


def analysis_tables(
    dft: Operators,
    predicted: Operators,
    baseline: Operators,
    analysis: Analysis,
    name: dict[str, str],
    transport: Transport | None = None,
) -> dict[str, pd.DataFrame]:
    """Return the tables summary, by_pair, by_distance, blocks, decay, bands, dos, heatmap and slabs, and of some transmission.

    Errors are over the blocks within the network's cutoff. T(E) is computed if the analysis asks for it, or of a device.
    """
    cutoff = float(predicted.attributes["cutoff_angstrom"])
    blocks, blocks_baseline = (errors.block_errors(dft, o, cutoff) for o in (predicted, baseline))
    comparison = spectra.compare_spectra(dft, predicted, baseline, analysis)
    slabs = slab_table(dft, predicted, baseline, analysis.slab_angstrom)
    transmission = transmission_table((dft, predicted, baseline), comparison, analysis, transport)
    summary = name | summary_row(
        dft, predicted, blocks, blocks_baseline, comparison, slabs, transmission, analysis.overlap_threshold
    )
    by_distance = _beside(errors.error_by_distance(blocks), errors.error_by_distance(blocks_baseline), ["distance_angstrom"])
    kinds = ["pair", "onsite", *(["spin"] if "spin" in blocks else [])]
    by_pair = _beside(errors.error_by_pair(blocks), errors.error_by_pair(blocks_baseline), kinds)
    return {
        "summary": pd.DataFrame([summary]),
        "by_pair": by_pair,
        "by_distance": by_distance,
        "blocks": errors.block_sample(blocks),
        "decay": errors.hamiltonian_decay(dft),
        "bands": spectra.bands_table(dft, predicted, baseline, comparison, analysis),
        "dos": spectra.dos_table(comparison),
        "heatmap": heatmap_table(dft, predicted),
        "slabs": slabs,
    } | ({} if transmission is None else {"transmission": transmission})


def summary_row(
    dft: Operators,
    predicted: Operators,
    blocks: pd.DataFrame,
    blocks_baseline: pd.DataFrame,
    comparison: spectra.Comparison | None,
    slabs: pd.DataFrame,
    transmission: pd.DataFrame | None = None,
    overlap_threshold: float = 0.0,
) -> dict:
    """Return the errors of a structure in one row.

    The row has the errors of H, with those of the reference alone beside them, of the spectrum, with false states, unless there
    is no comparison, of the slabs, and of T(E) if there is a table of it.
    """
    of_spectrum = {}
    if comparison is not None:
        of_spectrum = spectra.spectral_summary(comparison) | false_state_summary(
            dft, predicted, comparison.levels[0], comparison.shifts[0], overlap_threshold
        )
    return (
        {"atoms": len(dft.atoms), "orbitals": dft.n_orbitals, "cutoff_angstrom": float(predicted.attributes["cutoff_angstrom"])}
        | errors.error_summary(blocks)
        | {f"baseline_{k}": v for k, v in errors.error_summary(blocks_baseline).items() if k.startswith("mae")}
        | {key: predicted.attributes[key] for key in ("onsite_spread_mev",) if key in predicted.attributes}
        | of_spectrum
        | slab_errors(slabs)
        | ({} if transmission is None or comparison is None else transmission_summary(transmission, comparison))
        | {
            "dft_code": dft.attributes.get("code", ""),
            "dft_seconds": dft.attributes["wall_seconds"],
            "prediction_seconds": predicted.attributes["wall_seconds"],
        }
    )


def heatmap_table(dft: Operators, predicted: Operators) -> pd.DataFrame:
    """Return |H(k = 0)| of DFT, with its gauge aligned, and of the prediction, in meV, one row per element.

    A cell with more than LARGEST_HEATMAP orbitals is represented by its first ones, a spin-polarised structure by spin up.
    """
    mu = errors.align_gauge(dft, predicted)
    H, S = dft.at_k((0, 0, 0))
    n = min(len(H), LARGEST_HEATMAP)
    row, column = np.divmod(np.arange(n * n), n)
    flat = lambda M: hartree_to_mev(np.abs(M[:n, :n]).ravel())  # noqa: E731
    return pd.DataFrame(
        {"row": row, "column": column, "dft_mev": flat(H - mu * S), "predicted_mev": flat(predicted.at_k((0, 0, 0))[0])}
    )


def _beside(table: pd.DataFrame, baseline: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the table with the mean absolute error of the baseline in an additional column."""
    return table.merge(baseline[[*keys, "mae_mev"]].rename(columns={"mae_mev": "baseline_mae_mev"}), on=keys, how="left")
