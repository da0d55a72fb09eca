"""Compute the errors of predicted against DFT blocks, in meV: by kind, by pair of elements, by distance."""

import numpy as np
import pandas as pd

from ..operators import SPINS, Operators, Places
from ..units import hartree_to_mev

BIN_ANGSTROM = 0.5


def check_same_structure(dft: Operators, predicted: Operators) -> None:
    """Raise ValueError, naming the difference, if the atoms or the bases differ."""
    a, b = dft.atoms, predicted.atoms
    if len(a) != len(b) or (a.numbers != b.numbers).any():
        raise ValueError(
            f"operators of {a.get_chemical_formula(mode='reduce')} and of {b.get_chemical_formula(mode='reduce')}: "
            "expected the same atoms in the same order."
        )
    if (a.pbc != b.pbc).any():
        raise ValueError(f"operators periodic along {a.pbc.tolist()} and along {b.pbc.tolist()}: expected the same structure.")
    for what, difference in (
        ("positions", a.positions - b.positions),
        ("cell vectors", np.asarray(a.cell) - np.asarray(b.cell)),
    ):
        if (largest := np.abs(difference).max()) > 1e-6:
            raise ValueError(f"{what} of the operators differ by {largest:.1e} A (at most 1e-6): expected the same structure.")
    if dft.spins != predicted.spins:
        raise ValueError(f"operators of {dft.spins} spins and of {predicted.spins}: expected the same number in both.")
    if difference := dft.basis.difference(predicted.basis):
        raise ValueError(f"operators in different bases: {difference}.")


def align_gauge(dft: Operators, predicted: Operators) -> float:
    """Return the mu (Hartree) that minimises sum |H_dft - mu S_dft - H_pred|^2 over the blocks of DFT: <S, dH> / <S, S>.

    H and H + mu S describe the same physics in a periodic cell. For a structure that is not periodic mu is zero.
    """
    if not dft.atoms.pbc.any():
        return 0.0
    differences = [a.hamiltonian - values_on(b, b.hamiltonian, a) for a, b in zip(dft.channels, predicted.channels)]
    return float(np.mean([dft.overlap @ of_spin / (dft.overlap @ dft.overlap) for of_spin in differences]))


def values_on(operators: Operators, values: np.ndarray, other: Operators) -> np.ndarray:
    """Return `values` of `operators` laid out as the blocks of `other`.

    A block that `operators` lacks is zero; a block that `other` lacks is left out.
    """
    rows = operators.pairs.find(other.pairs)
    result = np.zeros(other.offsets[-1])
    for _, _, blocks, places in other.groups():
        there = rows[blocks] >= 0
        source = Places(operators.offsets[rows[blocks[there]]], places.size)
        places[there].put(result, source.take(values))
    return result


def block_errors(dft: Operators, predicted: Operators, cutoff_angstrom: float) -> pd.DataFrame:
    """Compute the errors of all blocks within the cutoff, one row per block.

    A block has a row whether DFT, the prediction or both have it; a missing block counts as zero. H of DFT is shifted by
    `align_gauge`. Columns: pair, onsite, distance_angstrom, elements, sum_abs_error_mev, sum_squared_error_mev2,
    max_abs_error_mev, sum_abs_dft_mev. A spin-polarised structure has a row per block and spin, with the column spin, up or
    down.
    """
    check_same_structure(dft, predicted)
    mu = align_gauge(dft, predicted)
    if dft.spins == 1:
        return _block_errors(dft, predicted, cutoff_angstrom, mu)
    of_spins = [_block_errors(a, b, cutoff_angstrom, mu) for a, b in zip(dft.channels, predicted.channels)]
    return pd.concat([table.assign(spin=spin) for spin, table in zip(SPINS, of_spins)], ignore_index=True)


def _block_errors(dft: Operators, predicted: Operators, cutoff_angstrom: float, mu: float) -> pd.DataFrame:
    """Compute `block_errors` of operators with one H, after a shift of DFT's by mu (Hartree)."""
    missing = dft.pairs.find(predicted.pairs) < 0
    frames = []
    # first the blocks that DFT has, then those that only the prediction has
    for operators, difference, reference in (
        (
            dft,
            values_on(predicted, predicted.hamiltonian, dft) - (dft.hamiltonian - mu * dft.overlap),
            dft.hamiltonian - mu * dft.overlap,
        ),
        (extra := predicted.select(missing), extra.hamiltonian, np.zeros_like(extra.hamiltonian)),
    ):
        distances, onsite = operators.pairs.distances, operators.pairs.onsite
        for z_i, z_j, blocks, places in operators.groups():
            near = distances[blocks] < cutoff_angstrom
            d, r = (hartree_to_mev(places[near].take(values)) for values in (difference, reference))
            pair = "-".join(sorted((operators.basis[z_i].element, operators.basis[z_j].element)))
            frames.append(
                pd.DataFrame(
                    {
                        "pair": pair,
                        "onsite": onsite[blocks[near]],
                        "distance_angstrom": distances[blocks[near]],
                        "elements": places.size,
                        "sum_abs_error_mev": np.abs(d).sum(1),
                        "sum_squared_error_mev2": (d**2).sum(1),
                        "max_abs_error_mev": np.abs(d).max(1, initial=0),
                        "sum_abs_dft_mev": np.abs(r).sum(1),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def _reduce(blocks: pd.DataFrame) -> dict:
    n = blocks["elements"].sum()
    return {
        "mae_mev": blocks["sum_abs_error_mev"].sum() / n if n else np.nan,
        "rmse_mev": np.sqrt(blocks["sum_squared_error_mev2"].sum() / n) if n else np.nan,
        "max_abs_error_mev": blocks["max_abs_error_mev"].max(),
        "mean_abs_dft_mev": blocks["sum_abs_dft_mev"].sum() / n if n else np.nan,
        "elements": int(n),
        "blocks": len(blocks),
    }


def error_summary(blocks: pd.DataFrame) -> dict[str, float]:
    """Summarise the errors of all blocks of a structure.

    Keys: mae_mev (of all elements), mae_mev_onsite, mae_mev_offsite, rmse_mev, max_abs_error_mev, elements, elements_onsite; of
    a spin-polarised structure, whose elements are those of both spins, also mae_mev_up and mae_mev_down.
    """
    everything = _reduce(blocks)
    return {
        "mae_mev": everything["mae_mev"],
        "mae_mev_onsite": _reduce(blocks[blocks["onsite"]])["mae_mev"],
        "mae_mev_offsite": _reduce(blocks[~blocks["onsite"]])["mae_mev"],
        "rmse_mev": everything["rmse_mev"],
        "max_abs_error_mev": everything["max_abs_error_mev"],
        "elements": everything["elements"],
        "elements_onsite": int(blocks.loc[blocks["onsite"], "elements"].sum()),
    } | {f"mae_mev_{spin}": _reduce(blocks[blocks["spin"] == spin])["mae_mev"] for spin in SPINS if "spin" in blocks}


def error_by_pair(blocks: pd.DataFrame) -> pd.DataFrame:
    """Compute the errors by pair of elements, separately for onsite and offsite blocks.

    The table also has percentiles of the mean absolute error of a block. A spin-polarised structure has rows of either spin.
    """
    rows, keys = [], ["pair", "onsite", *(["spin"] if "spin" in blocks else [])]
    for key, part in blocks.groupby(keys):
        per_block = part["sum_abs_error_mev"] / part["elements"]
        quantiles = {f"block_mae_mev_p{q:g}".replace(".", "_"): np.percentile(per_block, q) for q in (2.5, 25, 50, 75, 97.5)}
        rows.append(dict(zip(keys, key)) | _reduce(part) | quantiles)
    return pd.DataFrame(rows)


def error_by_distance(blocks: pd.DataFrame) -> pd.DataFrame:
    """Compute the errors of offsite blocks in bins of 0.5 A; distance_angstrom is the centre of a bin."""
    offsite = blocks[~blocks["onsite"]]
    bins = (offsite["distance_angstrom"] // BIN_ANGSTROM).astype(int)
    return pd.DataFrame([{"distance_angstrom": (b + 0.5) * BIN_ANGSTROM} | _reduce(part) for b, part in offsite.groupby(bins)])


def hamiltonian_decay(operators: Operators, most: int = 5000) -> pd.DataFrame:
    """Return the largest and the mean |H| of offsite blocks against distance, by pair of elements.

    The table has at most `most` blocks of a pair.
    """
    values, start = np.abs(hartree_to_mev(np.atleast_2d(operators.hamiltonian))), operators.offsets[:-1]
    z_i, z_j = operators.atoms.numbers[operators.pairs[:, :2]].T
    elements = {z: operators.basis[int(z)].element for z in np.unique(operators.atoms.numbers)}
    table = pd.DataFrame(
        {
            "pair": ["-".join(sorted((elements[a], elements[b]))) for a, b in zip(z_i, z_j)],
            "distance_angstrom": operators.pairs.distances,
            "max_abs_h_mev": np.maximum.reduceat(values, start, axis=1).max(0),
            "mean_abs_h_mev": np.add.reduceat(values, start, axis=1).mean(0) / np.diff(operators.offsets),
        }
    )[(z_i <= z_j) & ~operators.pairs.onsite]  # without the transposed blocks of (z_j, z_i)
    parts = [
        part.iloc[:: -(-len(part) // most)] for _, part in table.groupby("pair", sort=False)
    ]  # the step is rounded up, so that at most `most` blocks remain
    return pd.concat(parts, ignore_index=True)


def block_sample(blocks: pd.DataFrame, most: int = 1500) -> pd.DataFrame:
    """Sample the mean absolute errors of onsite and of offsite blocks between their 2.5 and 97.5 percentiles.

    The sample is evenly spaced in rank and has at most `most` blocks of each kind.
    """
    parts = []
    for onsite, part in blocks.groupby("onsite"):
        errors = np.sort(part["sum_abs_error_mev"] / part["elements"])
        low, high = np.percentile(errors, (2.5, 97.5))
        errors = errors[(errors >= low) & (errors <= high)]
        chosen = np.unique(np.linspace(0, len(errors) - 1, min(len(errors), most)).round().astype(int))
        parts.append(pd.DataFrame({"onsite": onsite, "block_mae_mev": errors[chosen]}))
    return pd.concat(parts, ignore_index=True)
