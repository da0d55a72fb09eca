"""Draw figures: one function per figure or panel takes a table and returns axes.

The functions compute no physics, open no checkpoint and do not change the global state of matplotlib.
"""

from .structure import (
    bands,
    decay,
    dos,
    draw_all,
    draw_transmission,
    error_by_distance,
    error_by_pair,
    heatmap,
    slabs,
    training,
    transmission,
)
from .style import COLOURS, STYLE, new_figure, save

__all__ = [
    "COLOURS", "STYLE", "bands", "decay", "dos", "draw_all", "draw_transmission", "error_by_distance",
    "error_by_pair", "heatmap", "new_figure", "save", "slabs", "training", "transmission",
]  # fmt: skip
