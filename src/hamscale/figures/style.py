"""Define how figures look: colours, sizes, and the marks of measured and modelled numbers."""

from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import atomic

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# colours of Okabe and Ito, which colour-blind people can tell apart: jfly.uni-koeln.de/color
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DFT, PREDICTED, BASELINE = "#000000", "#D55E00", "#56B4E9"
ELEMENTS = {"O": "#D55E00", "Hf": "#56B4E9", "Ge": "#009E73", "Sb": "#CC79A7", "Te": "#E69F00", "Si": "#E69F00", "H": "#999999"}
METHODS = {"metis": ("METIS", "#D55E00"), "low-nn": ("Low-NN", "#0072B2"), "min-nn": ("Min-NN (ours)", "#009E73")}
STYLE: "dict[RcKeyType, object]" = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.0,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
COLUMN_INCHES, PAGE_INCHES = 3.4, 7.0


def new_figure(width: float = COLUMN_INCHES, height: float = 2.6) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, stem: str | Path) -> None:
    """Save STEM.pdf and STEM.png, each completely or not at all."""
    for form in ("pdf", "png"):
        # drawn in memory: where the disk is full, Matplotlib's writer of pdf hides that behind an error of its own
        content = BytesIO()
        # without a date the same table gives the same file
        figure.savefig(content, format=form, metadata={"CreationDate": None} if form == "pdf" else None)
        with atomic(f"{stem}.{form}") as temporary:
            temporary.write_bytes(content.getbuffer())


def styled() -> AbstractContextManager[None]:
    return matplotlib.rc_context(STYLE)


def panel(ax: Axes, letter: str, title: str = "") -> None:
    ax.set_title(f"({letter})  {title}" if title else f"({letter})", loc="left", fontsize=8)


def measured(ax: Axes) -> Axes:
    """Mark axes as measured, by the word on a white background; nothing on such axes is hatched."""
    ax.text(0.97, 0.96, "measured", transform=ax.transAxes, ha="right", va="top", fontsize=7, weight="bold", zorder=5)
    return ax


def modelled(ax: Axes) -> Axes:
    """Mark axes as modelled, by a grey background and the word.

    Boxes and bars on such axes are hatched, and lines are dashed with open markers.
    """
    ax.set_facecolor("0.9")
    ax.text(
        0.97,
        0.96,
        "modelled",
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=7,
        weight="bold",
        style="italic",
        zorder=5,
    )
    return ax


def is_modelled(ax: Axes) -> bool:
    return any(text.get_text() == "modelled" for text in ax.texts)
