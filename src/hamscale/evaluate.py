"""Compute the errors of a trained network over all structures of a split; the README quotes them."""

from pathlib import Path

import numpy as np
import pandas as pd

from .analysis import errors, spectra
from .analysis.slabs import slab_table
from .analysis.tables import summary_row
from .analysis.transmission_tables import transmission_table
from .config import Material
from .operators import read_operators
from .predict import predict


def evaluate(
    model_directory: str | Path, material: Material, operators_paths: list[Path], one_pass: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare a model with DFT's operators: one row per structure, and one row per slab of all structures.

    Where the basis of a structure has no radial functions, S is that of its own operators. Where the number of its electrons is
    not known either, as of some data of other codes, the columns of spectra are left out.
    one_pass: charges are not made self-consistent, whatever the model was trained for; nor are those of devices, whose ends are
    not those of the periodic cell that has them.

    The rows of structures have identifier, set, and the columns of `summary_row`; those of slabs have identifier, set, and the
    columns of `slab_table`.
    """
    rows, slabs, threshold = [], [], material.analysis.overlap_threshold
    for path in operators_paths:
        dft = read_operators(path)
        self_consistent = False if one_pass or material.transport(path.stem) else None
        predicted, baseline = (
            predict(
                model_directory,
                dft.atoms,
                reference_only=only,
                overlap=dft,
                self_consistent=self_consistent,
                analysis=material.analysis,
            ).operators()
            for only in (False, True)
        )
        cutoff = float(predicted.attributes["cutoff_angstrom"])
        blocks, blocks_baseline = (errors.block_errors(dft, o, cutoff) for o in (predicted, baseline))
        comparison = spectra.compare_spectra(dft, predicted, baseline, material.analysis) if dft.counts_electrons else None
        of_slabs = slab_table(dft, predicted, baseline, material.analysis.slab_angstrom)
        triple = dft, predicted, baseline
        transmission = transmission_table(triple, comparison, material.analysis, material.transport(path.stem))
        name = {"structure": path.stem, "set": path.stem.rsplit("-", 1)[0]}
        row = summary_row(dft, predicted, blocks, blocks_baseline, comparison, of_slabs, transmission, threshold)
        rows.append(name | row)
        slabs.append(of_slabs.assign(**name)[[*name, *of_slabs]])
    return pd.DataFrame(rows), pd.concat(slabs, ignore_index=True)


def summarise(rows: pd.DataFrame) -> dict:
    """Summarise structures: errors of H are means over all their elements, those of spectra means over structures.

    Spectra are left out if no structure has them.
    """
    elements = rows["elements"].to_numpy()
    onsite = rows["elements_onsite"].to_numpy()
    mean = lambda name, weights: float(np.average(rows[name], weights=weights))  # noqa: E731
    of_spectra = {}
    if "gap_error_mev" in rows:
        of_spectra = {
            "eigenvalue_mae_mev_occupied": float(rows["eigenvalue_mae_mev_occupied"].mean()),
            "eigenvalue_mae_mev_next": float(rows["eigenvalue_mae_mev_next"].mean()),
            "gap_error_mev": float(rows["gap_error_mev"].abs().mean()),
            "false_states": int(rows["false_states"].sum()),
            "suspect_states": int(rows["suspect_states"].sum()),
            "random_kpoints": int(rows["random_kpoints"].sum()),
        }
    return {
        "mae_mev": mean("mae_mev", elements),
        "mae_mev_onsite": mean("mae_mev_onsite", onsite),
        "mae_mev_offsite": mean("mae_mev_offsite", elements - onsite),
        "baseline_mae_mev": mean("baseline_mae_mev", elements),
        **of_spectra,
        "structures": len(rows),
        "atoms": int(rows["atoms"].sum()),
        "elements": int(elements.sum()),
    } | ({"transmission_error": float(rows["transmission_error"].mean())} if "transmission_error" in rows else {})
