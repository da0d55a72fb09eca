"""Make the figures of the paper, and their tables: nothing else in the package uses this part."""

from .figures import PAPER, draw_paper
from .tables import figure_8_tables

__all__ = ["PAPER", "draw_paper", "figure_8_tables"]
