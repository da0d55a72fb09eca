"""Model the rate of a forward pass on GPUs from the bytes and FLOP of its operations, and draw it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.style import COLOURS, PAGE_INCHES, modelled, new_figure, panel
from ..files import read_table

Counted = tuple[int, pd.DataFrame]  # number of edges; a row (kind, bytes, flop, short) for each operation of a pass
KINDS = ("product", "gather", "segment sum", "elementwise")
LAUNCH_SECONDS = 5e-6  # assumed: what a launch from PyTorch takes on the host, and so the least time of an operation
MESSAGES = np.logspace(2, 6, 33)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: bytes per second, and dense FLOP per second of products in TF32 and in bfloat16."""

    name: str
    bandwidth: float
    tf32: float
    bf16: float


# NVIDIA's data sheets of H100 SXM, GH200 with 96 GB of HBM3, and H200 SXM; rates are without sparsity
GPUS = (
    Gpu("H100", 3.35e12, 494.7e12, 989.4e12),
    Gpu("GH200", 4.0e12, 494.7e12, 989.4e12),
    Gpu("H200", 4.8e12, 494.7e12, 989.4e12),
)


def _per_edge(small: Counted, large: Counted) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return, for each operation, what grows with edges, per edge, and what does not, from passes of two sizes."""
    (few, a), (many, b) = small, large
    if list(a["kind"]) != list(b["kind"]):
        raise ValueError("passes of two sizes have other operations: expected the same ones in the same order.")
    numbers = ["bytes", "flop"]
    slope = (b[numbers] - a[numbers]) / (many - few)
    return slope, (b[numbers] - slope * many).clip(lower=0)


def by_kind(small: Counted, large: Counted) -> pd.DataFrame:
    """Sum operations, and bytes and FLOP per edge, by kind of operation."""
    slope, _ = _per_edge(small, large)
    table = slope.assign(kind=large[1]["kind"], operations=1)
    return table.groupby("kind", as_index=False)[["operations", "bytes", "flop"]].sum().rename(
        columns={"bytes": "bytes_per_edge", "flop": "flop_per_edge"}
    )  # fmt: skip


def rates(small: Counted, large: Counted, gpu: Gpu) -> pd.DataFrame:
    """Model messages per second against messages.

    An operation takes the time of its bytes or of its FLOP, whichever is longer, and not less than a launch; in the column
    `without_launches` it may be shorter, as where the launches of a fixed structure are recorded once.
    """
    slope, constant = _per_edge(small, large)
    rate = np.where(large[1]["short"], gpu.bf16, gpu.tf32)
    rows = []
    for messages in MESSAGES:
        bytes_, flop = ((slope[name] * messages + constant[name]).to_numpy() for name in ("bytes", "flop"))
        seconds = np.maximum(bytes_ / gpu.bandwidth, flop / rate)
        rows.append((gpu.name, messages, messages / np.maximum(seconds, LAUNCH_SECONDS).sum(), messages / seconds.sum()))
    return pd.DataFrame(rows, columns=["gpu", "messages", "messages_per_second", "without_launches"])


def bytes_by_kind(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the kilobytes of an edge, stacked by kind of operation: float32, then bfloat16 messages, by channels."""
    numbers = sorted(table["channels"].unique())
    for k, channels in enumerate(numbers):
        for shift, precision in ((-0.2, "float32"), (0.2, "mixed")):
            rows = table[(table["channels"] == channels) & (table["precision"] == precision)].set_index("kind")
            bottom = 0.0
            for colour, kind in zip(COLOURS, KINDS):
                height = rows.loc[kind, "bytes_per_edge"] / 1e3
                label = kind if (k, shift) == (0, -0.2) else None
                ax.bar(
                    k + shift, height, 0.36, bottom, color=colour, edgecolor="black", linewidth=0.4, hatch="/////", label=label
                )
                bottom += height
    ax.set_xticks(range(len(numbers)), numbers)
    ax.set(xlabel="channels; left float32, right bfloat16 messages", ylabel="kB read and written per edge")
    ax.set_ylim(top=1.15 * ax.get_ylim()[1])  # room for the word "modelled"
    ax.legend(loc="upper left")
    return ax


def rate_curves(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw messages per second against messages, and dotted what they would be without the time of launches."""
    for colour, (channels, line) in zip(COLOURS, table.groupby("channels")):
        line = line.sort_values("messages")
        ax.plot(
            line["messages"], line["messages_per_second"], "--o", mfc="white", markevery=4, markersize=3.5, color=colour,
            label=f"E = {channels}",
        )  # fmt: skip
        ax.plot(line["messages"], line["without_launches"], ":", color=colour)
    ax.set(xscale="log", yscale="log", xlabel="number of messages", ylabel="messages per second")
    ax.set_ylim(top=2 * ax.get_ylim()[1])
    ax.legend(loc="lower right")
    return ax


def figure_roofline(raw: Path) -> Figure:
    """Draw the bytes of a forward pass and the rate that they allow, for float32 on a GH200."""
    kinds, curves = read_table(raw / "roofline.csv"), read_table(raw / "roofline_rates.csv")
    figure = new_figure(PAGE_INCHES, 2.9)
    left, right = figure.subplots(1, 2)
    panel(bytes_by_kind(kinds, modelled(left)), "a", "forward pass, two layers")
    chosen = curves[(curves["gpu"] == "GH200") & (curves["precision"] == "float32")]
    panel(rate_curves(chosen, modelled(right)), "b", "GH200, float32")
    return figure
