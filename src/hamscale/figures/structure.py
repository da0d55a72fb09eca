"""Draw the figures of one structure: bands, densities of states, errors, H."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..files import read_table
from .style import BASELINE, COLOURS, COLUMN_INCHES, DFT, PREDICTED, new_figure, save, styled


def bands(table: pd.DataFrame, ax: Axes, legend: bool = True) -> Axes:
    """Draw the bands of DFT (solid) and of the prediction (dashed), in eV above DFT's highest occupied eigenvalue.

    Bands of spin down are drawn in lighter colours.
    """
    table = table.assign(label=table["label"].astype(object).fillna(""))  # a csv without any label reads as a column of NaN
    for name, style, colour, label in (("dft", "-", DFT, "DFT"), ("predicted", "--", PREDICTED, "predicted")):
        for key, segment in table.groupby(["segment", *(["spin"] if "spin" in table else [])]):
            wide = segment.pivot(index="x_per_angstrom", columns="band", values=f"{name}_ev")
            if len(wide) == 1:  # levels of a molecule: short horizontal lines
                wide = pd.concat([wide, wide.set_axis([1.0])])
            lines = ax.plot(wide.index, wide.to_numpy(), style, color=colour, alpha=0.45 if "down" in key else 1, linewidth=0.8)
        lines[0].set_label(label)
    ticks = table[table["label"] != ""].drop_duplicates("x_per_angstrom")
    shown = -np.inf
    names = []
    for x, label in zip(ticks["x_per_angstrom"], ticks["label"]):  # only the first of special points near one another is named
        apart = x - shown > 0.06 * wide.index.max()
        shown = x if apart else shown
        names.append(label.replace("G", "Γ") if apart else "")
    ax.set_xticks(ticks["x_per_angstrom"], names)
    for x in ticks["x_per_angstrom"]:
        ax.axvline(x, color="0.8", linewidth=0.5, zorder=0)
    ax.set(xlabel="wave vector" if len(ticks) else "levels of the molecule", ylabel="energy (eV)", xlim=(0, wide.index.max()))
    ax.set_ylim(max(table["dft_ev"].min() - 0.5, -12), min(table["dft_ev"].max() + 0.5, 8))
    if legend:
        ax.figure.legend(loc="outside upper right", ncols=2)
    return ax


def dos(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the densities of states; of a spin-polarised structure that of spin up, and below the axis that of spin down."""
    curves = {"up_": 1, "down_": -1} if "dft_up_states_per_ev" in table else {"": 1}
    for name, label, colour, style in (
        ("baseline", "reference", BASELINE, "-"),
        ("dft", "DFT", DFT, "-"),
        ("predicted", "predicted", PREDICTED, "--"),
    ):
        for spin, sign in curves.items():
            values = sign * table[f"{name}_{spin}states_per_ev"]
            ax.plot(table["energy_ev"], values, style, color=colour, label=label if sign > 0 else None)
    ax.set(xlabel="energy (eV)", ylabel="density of states (1/eV)", xlim=(None, table["energy_ev"].max()))
    shown = table[table["energy_ev"] > -12]
    ax.set_xlim(left=shown["energy_ev"].min())
    highest = {sign: 1.3 * shown[f"dft_{spin}states_per_ev"].max() for spin, sign in curves.items()}
    ax.set_ylim(-highest.get(-1, 0), highest[1])
    ax.legend()
    return ax


def transmission(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the smeared T(E) of one spin: DFT, predicted, reference, in eV above DFT's highest occupied eigenvalue.

    The table of `hamscale transmission` has one line, in eV from the middle of the gap or the Fermi level.
    """
    for name, label, colour, style in (
        ("baseline", "reference", BASELINE, "-"),
        ("dft", "DFT", DFT, "-"),
        ("predicted", "predicted", PREDICTED, "--"),
        ("transmission_smeared", "predicted", PREDICTED, "-"),
    ):
        if name in table:
            ax.plot(table["energy_ev"], table[name], style, color=colour, label=label)
    ax.set(xlabel="energy (eV)", ylabel="transmission of one spin", ylim=(0, None))
    ax.set_xlim(table["energy_ev"].min(), table["energy_ev"].max())
    ax.legend()
    return ax


def error_by_pair(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw boxes from the 25th to the 75th percentile of the blocks, whiskers to 2.5 and 97.5, and the reference's mean."""
    names = [f"{p}\n{'onsite' if onsite else 'offsite'}" for p, onsite in zip(table["pair"], table["onsite"])]
    if "spin" in table:
        names = [f"{name}\n{spin}" for name, spin in zip(names, table["spin"])]
    quantiles = zip(*(table[f"block_mae_mev_p{q}"] for q in ("2_5", "25", "50", "75", "97_5")), strict=True)
    stats = [
        {"whislo": a, "q1": b, "med": c, "q3": d, "whishi": e, "fliers": [], "label": n}
        for (a, b, c, d, e), n in zip(quantiles, names)
    ]
    ax.bxp(stats, showfliers=False, medianprops={"color": PREDICTED})
    x = np.arange(1, len(table) + 1)
    ax.plot(x, table["mae_mev"], "o", color=PREDICTED, markersize=4, label="mean")
    ax.plot(x, table["baseline_mae_mev"], "_", color=BASELINE, markersize=14, markeredgewidth=2, label="reference")
    ax.set(yscale="log", ylabel="mean absolute error of a block (meV)")
    ax.legend()
    return ax


def error_by_distance(table: pd.DataFrame, ax: Axes) -> Axes:
    ax.plot(table["distance_angstrom"], table["mean_abs_dft_mev"], color=DFT, label="mean |H| of DFT")
    ax.plot(table["distance_angstrom"], table["baseline_mae_mev"], color=BASELINE, label="reference")
    ax.plot(table["distance_angstrom"], table["mae_mev"], "o-", color=PREDICTED, markersize=3, label="predicted")
    ax.set(yscale="log", xlabel="distance (Å)", ylabel="mean absolute error (meV)")
    ax.legend()
    return ax


def decay(table: pd.DataFrame, ax: Axes, cutoff_angstrom: float | None = None) -> Axes:
    for colour, (pair, part) in zip(COLOURS, table.groupby("pair")):
        part = part[part["max_abs_h_mev"] > 0]
        ax.plot(part["distance_angstrom"], part["max_abs_h_mev"], ".", color=colour, markersize=1, label=pair, rasterized=True)
    if cutoff_angstrom:
        ax.axvline(cutoff_angstrom, color=DFT, linestyle=":", label="cutoff of the network")
    ax.set(yscale="log", xlabel="distance (Å)", ylabel="largest |H| of a block (meV)")
    ax.legend(markerscale=6)
    return ax


def slabs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the mean potential (eV) of the atoms of each slab: DFT, predicted, reference."""
    for name, label, colour, style in (
        ("baseline", "reference", BASELINE, "s-"),
        ("dft", "DFT", DFT, "o-"),
        ("predicted", "predicted", PREDICTED, "D--"),
    ):
        ax.plot(table["distance_angstrom"], table[f"{name}_ev"], style, color=colour, markersize=3, label=label)
    ax.axhline(0, color="0.8", linewidth=0.5, zorder=0)
    ax.set(xlabel="along the longest periodic cell vector (Å)", ylabel="mean potential of a slab (eV)")
    widest = max(0.2, 1.15 * table[["dft_ev", "predicted_ev", "baseline_ev"]].abs().to_numpy().max())
    ax.set_ylim(-widest, widest)
    ax.legend()
    return ax


def heatmap(table: pd.DataFrame, axes: list[Axes]) -> list[Axes]:
    """Draw log10 |H| at the Gamma point: DFT, predicted, and the difference of their magnitudes."""
    n = int(table["row"].max()) + 1
    dft, predicted = (table[f"{name}_mev"].to_numpy().reshape(n, n) for name in ("dft", "predicted"))
    for ax, matrix, title in zip(
        axes, (dft, predicted, np.abs(dft - predicted)), ("DFT", "predicted", "| |DFT| - |predicted| |")
    ):
        image = ax.imshow(np.log10(np.maximum(matrix, 1e-2)), cmap="viridis", vmin=-2, vmax=4.5, interpolation="nearest")
        ax.set(title=title, xlabel="orbital", ylabel="orbital")
    axes[0].figure.colorbar(image, ax=axes, label="log10 |H| (meV)", shrink=0.8)
    return axes


def training(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw errors against steps, with a line for each network."""
    for name, label, colour in (
        ("validation_mae_mev_onsite", "onsite", COLOURS[2]),
        ("validation_mae_mev_offsite", "offsite", COLOURS[0]),
        ("validation_mae_mev", "all", PREDICTED),
        ("train_mae_mev", "all, training", "0.6"),
    ):
        for network, rows in table.groupby("network"):
            ax.plot(rows["step"], rows[name], color=colour, label=None if network else label)
    ax.axhline(table["baseline_mae_mev"].iloc[0], color=BASELINE, linestyle=":", label="reference")
    ax.set(yscale="log", xlabel="optimiser step", ylabel="mean absolute error (meV)")
    ax.legend(ncols=2)
    return ax


def draw_quality(distribution: pd.DataFrame, numbers: pd.DataFrame, stem: str | Path) -> None:
    """Draw radial distributions of all pairs of elements and shares of coordination numbers as STEM.pdf and .png."""
    with styled():
        figure = new_figure(2 * COLUMN_INCHES, 2.4)
        left, right = figure.subplots(1, 2)
        for colour, (pair, part) in zip(COLOURS, distribution.groupby("pair", sort=False)):
            left.plot(part["distance_angstrom"], part["g"], color=colour, label=pair)
        left.axhline(1, color="0.8", linewidth=0.5, zorder=0)
        left.set(xlabel="distance (Å)", ylabel="radial distribution", ylim=(0, None))
        left.legend()
        for colour, ((a, b), part) in zip(COLOURS, numbers.groupby(["centre", "neighbour"], sort=False)):
            mean = (part["number"] * part["share"]).sum()
            right.plot(part["number"], part["share"], "o-", color=colour, markersize=3, label=f"{b} around {a}: {mean:.2f}")
        right.set(xlabel="neighbours in the first shell", ylabel="share of atoms", ylim=(0, None))
        right.xaxis.get_major_locator().set_params(integer=True)
        if len(numbers):
            right.legend()
        save(figure, stem)


def draw_transmission(table_csv: str | Path, stem: str | Path) -> None:
    """Draw the transmission of a structure, from the table of its analysis, as STEM.pdf and .png."""
    with styled():
        figure = new_figure()
        transmission(read_table(table_csv), figure.subplots())
        save(figure, stem)


def draw_all(analysis_directory: str | Path, train_csv: str | Path, out: str | Path) -> None:
    """Draw every figure of one structure, as pdf and png, from its folder of tables and the table of the training."""
    directory, out = Path(analysis_directory), Path(out)
    read = lambda name: pd.read_csv(directory / f"{name}.csv")  # noqa: E731
    cutoff = float(read("summary")["cutoff_angstrom"].iloc[0])
    for name, draw in {
        "bands": lambda ax: bands(read("bands"), ax),
        "dos": lambda ax: dos(read("dos"), ax),
        "error_by_pair": lambda ax: error_by_pair(read("by_pair"), ax),
        "error_by_distance": lambda ax: error_by_distance(read("by_distance"), ax),
        "decay": lambda ax: decay(read("decay"), ax, cutoff),
        "slabs": lambda ax: slabs(read("slabs"), ax),
        "training": lambda ax: training(pd.read_csv(train_csv), ax),
    }.items():
        with styled():
            figure = new_figure()
            draw(figure.subplots())
            save(figure, out / name)
    with styled():
        figure = new_figure(2 * COLUMN_INCHES, 2.4)
        heatmap(read("heatmap"), list(figure.subplots(1, 3)))
        save(figure, out / "heatmap")
