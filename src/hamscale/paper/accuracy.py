"""Draw the cost of accuracy and of size, from the tables of benchmarks/ablation.py and benchmarks/size.py."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.style import COLOURS, DFT, PAGE_INCHES, PREDICTED, measured, new_figure, panel
from ..files import facts, read_table

ERRORS = {
    "mae_mev": ("all", "o"),
    "mae_mev_onsite": ("onsite", "s"),
    "eigenvalue_mae_mev_occupied": ("occupied eigenvalues", "^"),
}
MATERIALS = {"hfo2": "HfO$_2$", "gst124": "GeSb$_2$Te$_4$"}
DOS_EV = 8
BY_STRUCTURES = ("a quarter of the structures", "a third of the structures", "half of the structures", "default")
BY_STEPS = ("half of the steps", "default", "twice the steps", "four times the steps")


def learning_curve(table: pd.DataFrame, ax: Axes, variants: Sequence[str], column: str, label: str) -> Axes:
    """Draw the errors of one test set against the number of structures or of steps, on logarithmic axes."""
    rows = table[table["variant"].isin(variants)].sort_values(column)
    for colour, (error, (name, marker)) in zip(COLOURS, ERRORS.items()):
        ax.plot(rows[column], rows[error], "-", marker=marker, color=colour, label=name, markersize=4)
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel="error (meV)")
    ax.set_xticks(rows[column], [f"{x:,}" for x in rows[column]])
    least, most = rows[list(ERRORS)].min().min(), rows[list(ERRORS)].max().max()
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if 0.5 * least < t < 2 * most]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(0.8 * least, 1.6 * most)  # room above for the word "measured"
    return ax


def ablations(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the errors of one test set, those of each variant divided by the default's: below one is better."""
    default = table[table["variant"] == "default"].iloc[0]
    rows = table[~table["variant"].isin({*BY_STRUCTURES, *BY_STEPS})].iloc[::-1]
    for colour, (error, (name, marker)) in zip(COLOURS, ERRORS.items()):
        ax.plot(rows[error] / default[error], np.arange(len(rows)), marker, color=colour, label=name, markersize=3.5)
    ax.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xscale="log", xlabel="error over that of the default", ylim=(-0.7, len(rows) - 0.3))
    ax.set_yticks(np.arange(len(rows)), rows["variant"])
    least, most = ax.get_xlim()
    ticks = [t for t in ((0.7, 1, 1.5, 2, 3, 5) if most < 10 else (1, 3, 10, 30, 100)) if least < t < most]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    return ax


def figure_learning(raw: Path) -> Figure:
    """Draw a row of panels for every material that has a table."""
    paths = {name: raw / f"ablation_{name}.csv" for name in MATERIALS}
    tables = {name: read_table(path) for name, path in paths.items() if path.is_file()}
    figure = new_figure(PAGE_INCHES, 4.4 * len(tables))
    parts = figure.subfigures(len(tables), 1, squeeze=False).ravel()
    for letters, part, (name, table) in zip(("abc", "def"), parts, tables.items()):
        table = table[table["set"] == table["set"].iloc[0]]
        axes = part.subplot_mosaic([["structures", "variants"], ["steps", "variants"]], width_ratios=(1, 1.3))
        learning_curve(table, measured(axes["structures"]), BY_STRUCTURES, "structures", "training structures")
        learning_curve(table, measured(axes["steps"]), BY_STEPS, "steps", "steps")
        ablations(table, axes["variants"])
        axes["variants"].legend(loc="lower right")
        for letter, of, title in zip(letters, axes.values(), (MATERIALS[name], "one change at a time", "")):
            panel(of, letter, title)
    return figure


def clusters_dos(table: pd.DataFrame, about: dict, ax: Axes) -> Axes:
    """Draw the density of states per orbital with two standard errors on either side.

    The density of states from all eigenvalues is added where the table has it.
    """
    near = table[table["energy_ev"].abs() < DOS_EV]
    energies, orbitals = near["energy_ev"], about["orbitals"]
    density, error = near["states_per_ev"] / orbitals, 2 * near["standard_error_states_per_ev"] / orbitals
    ax.fill_between(
        energies, density - error, density + error, color=PREDICTED, alpha=0.4, linewidth=0, label="two standard errors"
    )
    ax.plot(energies, density, color=PREDICTED, label=f"{about['clusters']} clusters")
    if "exact_states_per_ev" in near:
        ax.plot(energies, near["exact_states_per_ev"] / orbitals, "--", color=DFT, linewidth=0.8, label="all eigenvalues")
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="energy from the Fermi level (eV)", ylabel="states per eV and orbital", xlim=(-DOS_EV, DOS_EV))
    ax.set_ylim(0, 1.35 * density.max())
    ax.legend(loc="upper left")
    return ax


def figure_size(raw: Path) -> Figure:
    """Draw time and memory against edges, with lines proportional to edges, and the density of states of large structures."""
    table = read_table(raw / "size.csv")
    figure = new_figure(PAGE_INCHES, 5.4)
    kinds = {
        ("hfo2", False): "HfO$_2$, prediction",
        ("gst", False): "GeSb$_2$Te$_4$, prediction",
        ("hfo2", True): "HfO$_2$, training step",
    }
    above, below = figure.subplots(2, 2)
    for ax, column, label in zip(above, ("cpu_s", "peak_gib"), ("CPU time (s)", "peak resident memory (GiB)")):
        for colour, marker, ((material, step), name) in zip(COLOURS, "os^", kinds.items()):
            rows = table[(table["material"] == material) & (table["training_step"] == step)].sort_values("edges")
            ax.plot(rows["edges"], rows[column], "-", marker=marker, color=colour, markersize=4, label=name)
        largest = table[~table["training_step"]].nlargest(1, "edges").iloc[0]
        x = np.array([table["edges"].min(), table["edges"].max()])
        ax.plot(x, largest[column] * x / largest["edges"], ":", color="0.5", label="proportional to edges", zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="edges", ylabel=label)
    above[0].set_ylim(top=5 * table["cpu_s"].max())  # room for the word "measured"
    above[1].set_ylim(bottom=table["peak_gib"].min() / 2)
    above[0].legend(loc="lower right")
    for ax in above:
        measured(ax)
    names = ("GeSb$_2$Te$_4$, 1,008 atoms", "8,064 atoms")
    for letter, ax in zip("ab", above):
        panel(ax, letter)
    for letter, ax, id, name in zip("cd", below, ("cell_1008-000", "tiled-000"), names):
        path = raw / f"dos_{id}.csv"
        clusters_dos(read_table(path), facts(path), ax)
        panel(ax, letter, f"{name}, predicted")
    return figure
