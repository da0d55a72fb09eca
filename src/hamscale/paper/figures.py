"""Draw figures 3 and 5 to 7 of the method from the tables of resources/raw (docs/files.md); figure 8 is in figure_8.py.

Measured and modelled numbers never share a panel. Panels with modelled numbers have a grey background, hatched boxes, dashed
lines and open markers.
"""

from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.spatial import cKDTree

from ..figures.style import (
    COLOURS,
    COLUMN_INCHES,
    ELEMENTS,
    METHODS,
    PAGE_INCHES,
    measured,
    modelled,
    new_figure,
    panel,
    save,
    styled,
)
from ..files import facts, read_table
from .accuracy import figure_learning, figure_size
from .figure_8 import atoms_3d, figure_8
from .roofline import figure_roofline

PARTS_OF_EXCHANGE = {"pack": COLOURS[4], "exchange": COLOURS[5], "unpack": COLOURS[3]}
PUBLISHED_WEAK_EFFICIENCY = (512, 0.87)  # number of GPUs and efficiency in figure 7 of the paper


# ---------------------------------------------------------------------------------------------------------------- panels


def throughput(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw messages per second against messages: a line per number of channels and device, a ring where a line saturates."""
    markers = dict(zip(table["device"].unique(), "os^D"))
    for colour, (channels, of_channels) in zip(COLOURS, table.groupby("channels")):
        for device, line in of_channels.groupby("device", sort=False):
            ax.plot(
                line["messages"], line["messages_per_second"], "-", marker=markers[device], markersize=3, color=colour,
                label=f"E = {channels}",
            )  # fmt: skip
            first = line[line["saturated"]].iloc[0]
            ax.plot(first["messages"], first["messages_per_second"], "o", mfc="none", mec="black", markersize=8)
    ax.set(xscale="log", yscale="log", xlabel="number of messages", ylabel="messages per second")
    handles, labels = ax.get_legend_handles_labels()
    ring = Line2D([], [], marker="o", mfc="none", mec="black", markersize=7, linestyle="none")
    ax.legend([*handles, ring], [*labels, "within 10 % of the highest rate"], ncols=2, loc="lower right")
    ax.set_ylim(bottom=table["messages_per_second"].min() / 6)
    return ax


def domain_colours(table: pd.DataFrame, owner: str) -> list[str]:
    """Return a colour per atom, such that domains that touch at the surface have different colours."""
    tree = cKDTree(table[["x_angstrom", "y_angstrom", "z_angstrom"]])
    owners = table[owner].to_numpy()
    touching = nx.Graph()
    touching.add_nodes_from(np.unique(owners).tolist())
    touching.add_edges_from((a, b) for a, b in owners[tree.query_pairs(4.0, output_type="ndarray")].tolist() if a != b)
    number = nx.greedy_color(touching, "DSATUR")
    palette = (*COLOURS, "#F0E442", "0.6")
    return [palette[number[o] % len(palette)] for o in owners.tolist()]


def partition_quality(table: pd.DataFrame, ax: Axes, column: str, label: str, most: str | None = None) -> Axes:
    """Draw a column against the number of parts: solid lines for 12 A, dashed ones for 14 A.

    If `most` is given, a bar reaches from the mean to the maximum over ranks.
    """
    for (method, cutoff), line in table.groupby(["method", "cutoff_angstrom"]):
        far = cutoff > 12
        colour = METHODS[method][1]
        x = np.log2(line["parts"]) + {"metis": -0.07, "low-nn": 0, "min-nn": 0.07}[method]
        ax.plot(
            x, line[column], color=colour, linestyle="--" if far else "-", marker="s" if far else "o",
            mfc="white" if far else colour, markersize=3.5,
        )  # fmt: skip
        if most:
            ax.vlines(x, line[column], line[most], color=colour, linewidth=0.8)
    parts = sorted(table["parts"].unique())
    ax.set_xticks(np.log2(parts), parts)
    ax.set(xlabel="parts", ylabel=label)
    return ax


def boxes(table: pd.DataFrame, ax: Axes, hatched: bool) -> Axes:
    """Draw boxes of the seconds of a node update with its exchange, by ranks and method.

    The boxes are over ranks, and over repeats if there are any.
    """
    table = table.assign(seconds=table[["compute_s", "pack_s", "exchange_s", "unpack_s"]].sum(axis=1))
    numbers = sorted(table["ranks"].unique())
    for k, ranks in enumerate(numbers):
        groups = [(m, g["seconds"]) for m, g in table[table["ranks"] == ranks].groupby("method")]
        for n, (method, values) in enumerate(
            sorted(groups, key=lambda g: list(METHODS).index(g[0]) if g[0] in METHODS else -1)
        ):
            colour = METHODS[method][1] if method in METHODS else "0.6"
            position = k + 0.25 * (n - (len(groups) - 1) / 2)
            ax.boxplot(
                values, positions=[position], widths=0.18, patch_artist=True, whis=(0, 100), manage_ticks=False,
                boxprops={
                    "facecolor": "white" if hatched else colour, "edgecolor": colour, "hatch": "/////" if hatched else "",
                },
                medianprops={"color": "black"}, whiskerprops={"color": colour}, capprops={"color": colour},
            )  # fmt: skip
    ax.set_xticks(range(len(numbers)), numbers)
    ax.set(xlabel="ranks", ylabel="node update (s)", xlim=(-0.5, len(numbers) - 0.5))
    return ax


def split(table: pd.DataFrame, ax: Axes, hatched: bool) -> Axes:
    """Draw the milliseconds of packing, exchange and unpacking, mean over ranks, as stacked bars by ranks and method."""
    means = table.groupby(["ranks", "method"])[[f"{part}_s" for part in PARTS_OF_EXCHANGE]].mean() * 1e3
    ticks, names = [], []
    for k, ranks in enumerate(sorted(table["ranks"].unique())):
        methods = [m for m in METHODS if (ranks, m) in means.index]
        for n, method in enumerate(methods):
            position, bottom = k + 0.27 * (n - (len(methods) - 1) / 2), 0.0
            for part, colour in PARTS_OF_EXCHANGE.items():
                height = means.loc[(ranks, method), f"{part}_s"]
                ax.bar(
                    position, height, 0.22, bottom, color=colour, edgecolor="black", linewidth=0.4,
                    hatch="/////" if hatched else "",
                )  # fmt: skip
                bottom += height
            ticks.append(position)
            names.append(METHODS[method][0].removesuffix(" (ours)"))
        ax.text(k, 1.0, f"{ranks}", transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)
    groups = table["ranks"].nunique()
    ax.set_xlim(-0.75 if groups == 1 else -0.5, groups - (0.25 if groups == 1 else 0.5))
    ax.set_xticks(ticks, names, rotation=90)
    ax.set(ylabel="per exchange (ms)")
    ax.set_ylim(top=1.25 * means.sum(axis=1).max())
    return ax


def weak_efficiency(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the modelled time of eight ranks on one cell over the time of each number of ranks.

    The caller adds the one number that the paper publishes as a star.
    """
    for method, line in table.groupby("method"):
        line = line.sort_values("ranks")
        name, colour = METHODS[method]
        first = line["seconds"].iloc[0]
        ax.plot(line["ranks"], first / line["seconds"], "--o", mfc="white", color=colour, markersize=4, label=name)
    ax.set(xscale="log", xlabel="ranks", ylabel="weak efficiency", ylim=(0.8, 1.06))
    ax.set_xscale("log", base=2)
    ticks = [n for n in sorted(table["ranks"].unique()) if np.log2(n) % 2 == 1]
    ax.set_xticks(ticks, ticks)
    return ax


def topology(table: pd.DataFrame, ax: Axes, colour: str) -> Axes:
    """Draw ranks and their exchanges by networkx's spring layout; wider lines stand for more embeddings."""
    graph = nx.Graph()
    graph.add_weighted_edges_from(table[["rank_a", "rank_b", "embeddings"]].itertuples(index=False))
    places = nx.spring_layout(graph, seed=1, iterations=200)
    weights = np.array([w for *_, w in graph.edges(data="weight")])
    nx.draw_networkx_edges(graph, places, ax=ax, width=0.15 + 0.7 * weights / weights.max(), edge_color="0.55")
    nx.draw_networkx_nodes(graph, places, ax=ax, node_size=9, node_color=colour, linewidths=0)
    ax.set_axis_off()
    return ax


# --------------------------------------------------------------------------------------------------------------- figures


def figure_3(raw: Path) -> Figure:
    table = read_table(raw / "fig3.csv")
    figure = new_figure(COLUMN_INCHES, 2.7)
    ax = throughput(table, figure.subplots())
    ax.set_title(", ".join(table["device"].unique()), fontsize=7)
    return figure


def figure_5(raw: Path) -> Figure:
    domains, quality = read_table(raw / "fig5_domains.csv"), pd.read_csv(raw / "partition.csv")
    cell = facts(raw / "fig5_domains.csv")["cell_angstrom"]
    quality = quality[quality["shape"] == "paper"]
    figure = new_figure(PAGE_INCHES, 4.0)
    rows = figure.subfigures(2, 1, squeeze=False, height_ratios=(0.8, 1)).ravel()
    solid = {"projection": "3d"}
    pictures, curves = rows[0].subplots(1, 4, subplot_kw=solid), rows[1].subplots(1, 4)
    atoms_3d(domains, pictures[0], [ELEMENTS[e] for e in domains["element"]], cell, size=6, zoom=0.95)
    panel(pictures[0], "a", "24,000 atoms")
    for letter, method, ax in zip("bcd", METHODS, pictures[1:]):
        atoms_3d(domains, ax, domain_colours(domains, f"owner_{method.replace('-', '_')}"), cell, size=6, zoom=0.95)
        panel(ax, letter, METHODS[method][0])
    for letter, ax, (column, label, most) in zip(
        "efgh",
        curves,
        (
            ("neighbours_mean", "neighbours", "neighbours_max"),
            ("sent_mean", "embeddings sent", "sent_max"),
            ("node_imbalance", "node imbalance", None),
            ("edge_imbalance", "edge imbalance", None),
        ),
    ):
        partition_quality(quality, ax, column, label, most)
        panel(ax, letter)
    handles = [Line2D([], [], color=colour, marker="o", markersize=4, label=name) for name, colour in METHODS.values()]
    handles += [
        Line2D([], [], color="0.4", marker="o", markersize=4, label="12 Å"),
        Line2D([], [], color="0.4", marker="s", mfc="white", linestyle="--", markersize=4, label="14 Å"),
    ]
    rows[1].legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _split_legend(figure: Figure) -> None:
    handles = [Patch(facecolor=colour, edgecolor=colour, label=name) for name, colour in METHODS.values()]
    handles += [Patch(facecolor=colour, edgecolor="black", label=part) for part, colour in PARTS_OF_EXCHANGE.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6)


def figure_6(raw: Path) -> Figure:
    runs, model = pd.read_csv(raw / "scaling_measured.csv"), read_table(raw / "scaling_node_update.csv")
    runs = runs[runs["what"] == "node update"]
    links = read_table(raw / "topology.csv")
    figure = new_figure(PAGE_INCHES, 6.2)
    times, exchange, graphs = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1.25, 0.9)).ravel()
    top, middle, bottom = (part.subplots(1, 3) for part in (times, exchange, graphs))
    panel(
        boxes(runs, measured(top[0]), hatched=False),
        "a",
        f"{runs['atoms'].iloc[0]:,} atoms, {runs['cutoff_angstrom'].iloc[0]:g} Å",
    )
    panel(split(runs[runs["ranks"] > 1], measured(middle[0]), hatched=False), "d")
    for k, (cutoff, of_cutoff) in enumerate(model.groupby("cutoff_angstrom"), start=1):
        panel(boxes(of_cutoff, modelled(top[k]), hatched=True), "abc"[k], f"24,000 atoms, {cutoff:g} Å")
        panel(split(of_cutoff, modelled(middle[k]), hatched=True), "def"[k])
    for ax in (*top, *middle):
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    links = links[(links["ranks"] == 32) & (links["tiling"] == "3-D")]
    for letter, method, ax in zip("ghi", METHODS, bottom):
        topology(links[links["method"] == method], ax, METHODS[method][1])
        panel(ax, letter, f"{METHODS[method][0]}, 32 ranks")
    _split_legend(figure)
    return figure


def figure_7(raw: Path) -> Figure:
    runs, model = pd.read_csv(raw / "scaling_measured.csv"), pd.read_csv(raw / "scaling_modelled.csv")
    runs, links = runs[runs["mode"] == "weak"], read_table(raw / "topology.csv")
    per_rank = (runs["atoms"] / runs["ranks"]).iloc[0]
    figure = new_figure(PAGE_INCHES, 6.2)
    times, exchange, graphs = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1.25, 0.8)).ravel()
    top, middle, bottom = times.subplots(1, 3), exchange.subplots(1, 3), graphs.subplots(1, 6)
    boxes(runs, measured(top[0]), hatched=False).set_ylabel("forward pass (s)")
    top[0].set_ylim(0, 1.3 * top[0].get_ylim()[1])
    panel(top[0], "a", f"{per_rank:g} atoms per rank, {runs['cutoff_angstrom'].iloc[0]:g} Å")
    panel(split(runs[runs["ranks"] > 1], measured(middle[0]), hatched=False), "d")
    middle[0].set_ylabel("per forward pass (ms)")
    for k, tiling in enumerate(("3-D", "1-D"), start=1):
        part = model[model["tiling"] == tiling]
        panel(weak_efficiency(part, modelled(top[k])), "abc"[k], f"{tiling} tiling, 12 Å")
        panel(split(part[part["ranks"].isin((64, 512))], modelled(middle[k]), hatched=True), "def"[k], "")
        middle[k].set_ylabel("per forward pass (ms)")
    ranks, efficiency = PUBLISHED_WEAK_EFFICIENCY
    top[1].plot(ranks, efficiency, "*", color="black", markersize=9)
    top[1].annotate("published, GPUs", (ranks, efficiency), xytext=(-6, -2), ha="right", textcoords="offset points", fontsize=7)
    cases = [(tiling, method) for tiling in ("3-D", "1-D") for method in METHODS]
    for letter, (tiling, method), ax in zip("ghijkl", cases, bottom):
        chosen = (links["tiling"] == tiling) & (links["method"] == method) & (links["ranks"] == 64)
        topology(links[chosen], ax, METHODS[method][1])
        panel(ax, letter, f"{tiling}, {METHODS[method][0].removesuffix(' (ours)')}")
    _split_legend(figure)
    return figure


# name: (function that draws the figure, tables that it reads)
PAPER = {
    "fig3": (figure_3, ("fig3.csv",)),
    "fig5": (figure_5, ("fig5_domains.csv", "partition.csv")),
    "fig6": (figure_6, ("scaling_measured.csv", "scaling_node_update.csv", "topology.csv")),
    "fig7": (figure_7, ("scaling_measured.csv", "scaling_modelled.csv", "topology.csv")),
    "fig8": (figure_8, tuple(f"fig8_{name}.csv" for name in ("summary", "decay", "blocks", "bands", "dos", "atoms", "image"))),
    "learning": (figure_learning, ("ablation_hfo2.csv", "ablation_gst124.csv")),
    "roofline": (figure_roofline, ("roofline.csv", "roofline_rates.csv")),
    "size": (figure_size, ("size.csv", "dos_cell_1008-000.csv", "dos_tiled-000.csv")),
}


def draw_paper(name: str, raw: str | Path, out: str | Path) -> None:
    """Draw OUT/NAME.pdf and .png from the tables of a folder."""
    with styled():
        save(PAPER[name][0](Path(raw)), Path(out) / name)
