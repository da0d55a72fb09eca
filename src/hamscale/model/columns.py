"""Place the values of groups among the columns of edge-first rows (E, columns), and scale them on their way there and back.

Shapes and the order of rows: see model/rotations.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import cast

import torch
from torch import Tensor, nn

from .chunks import Buffers, Way
from .layers import constant
from .rotations import Layout

Runs = list[tuple[int, slice, slice]]


class Columns(nn.Module):
    """Positions of the values of each group in edge-first rows (E, columns).

    runs: (first factor, columns here, columns there). Factors per group and channel are applied from the column `first
    factor` on. "Here" are the rows of one input; "there" are the same values in a row that also holds other values.
    The cached way works run by run, the batched way on all of them by index tables.
    """

    there: Tensor
    factor: Tensor
    sums: Tensor

    def __init__(self, runs: Runs) -> None:
        super().__init__()
        self.runs = runs
        self.unit = gcd(*(n for first, own, _ in runs for n in (first, own.start, own.stop)))
        in_order = sorted(runs, key=lambda run: run[1].start)
        constant(self, "there", [column for _, _, other in in_order for column in range(other.start, other.stop)])
        constant(self, "factor", [first + k for first, own, _ in in_order for k in range(own.stop - own.start)])
        units = self.factor[:: self.unit] // self.unit  # the factor of each run of `unit` columns here
        constant(self, "sums", nn.functional.one_hot(units).T.float())

    def scale(self, way: Way, here: Tensor, factors: Tensor, there: Tensor) -> None:
        """Set there = here, times the factor of each degree."""
        if way is Way.BATCHED:
            product = torch.mul(here, factors.index_select(1, self.factor), out=there.new_empty(here.shape))
            there.index_copy_(1, self.there, product)
            return
        for first, own, other in self.runs:
            torch.mul(here[:, own], factors[:, first : first + own.stop - own.start], out=there[:, other])

    def scale_back(self, way: Way, there: Tensor, factors: Tensor, here: Tensor) -> None:
        if way is Way.BATCHED:
            torch.mul(there.index_select(1, self.there), factors.index_select(1, self.factor), out=here)
            return
        for first, own, other in self.runs:
            torch.mul(there[:, other], factors[:, first : first + own.stop - own.start], out=here[:, own])

    def scale_adjoint(self, way: Way, here: Tensor, d_there: Tensor, factors: Tensor) -> Tensor:
        """Return the gradient of the factors; the gradient of here is `scale_back` of d_there."""
        if way is Way.BATCHED:
            products = (d_there.index_select(1, self.there) * here).to(factors.dtype).unflatten(1, (-1, self.unit))
            # a matrix of ones and zeros adds in a fixed order, which `index_add_` on a GPU does not
            return torch.bmm(self.sums.to(factors.dtype).expand(len(here), -1, -1), products).flatten(1)
        d_factors = torch.zeros_like(factors)
        self.add_adjoint(here, d_there, d_factors)
        return d_factors

    def add_adjoint(self, here: Tensor, d_there: Tensor, d_factors: Tensor) -> None:
        """Add the gradient of the factors to d_factors, run by run."""
        for first, own, other in self.runs:
            d_factors[:, first : first + own.stop - own.start].addcmul_(here[:, own], d_there[:, other])


class JoinedColumns(nn.Module):
    """Columns of several inputs that stand side by side in one row "there".

    columns: of each input. widths: of each input. factors: the first factor of each input among those of all.
    In the batched way the inputs are parts of one tensor, so that they are scaled together.
    """

    def __init__(self, columns: Mapping[str, Columns], widths: Mapping[str, int], factors: Mapping[str, int]) -> None:
        super().__init__()
        self.widths, self.factors = dict(widths), dict(factors)
        self.columns, runs, start = nn.ModuleDict(columns), Runs(), 0
        for name, width in widths.items():
            for first, own, other in columns[name].runs:
                runs.append((first + factors[name], slice(own.start + start, own.stop + start), other))
            start += width
        self.together = Columns(runs)

    def inputs(self, way: Way, edges: int, buffers: Buffers, dtype: torch.dtype) -> "Joined":
        """Allocate the inputs, (E, width) each."""
        if way is Way.BATCHED:
            whole = buffers(edges, sum(self.widths.values()), dtype=dtype)
            return Joined(dict(zip(self.widths, whole.split(list(self.widths.values()), 1))), whole)
        return Joined({name: buffers(edges, width, dtype=dtype) for name, width in self.widths.items()})

    def scale(self, way: Way, here: "Joined", factors: Tensor, there: Tensor) -> None:
        """Set there = here, times the factor of each degree."""
        if here.whole is not None:
            self.together.scale(way, here.whole, factors, there)
            return
        for name, columns in self._each():
            columns.scale(way, here.parts[name], factors[:, self.factors[name] :], there)

    def scale_back(self, way: Way, there: Tensor, factors: Tensor, here: "Joined") -> None:
        if here.whole is not None:
            self.together.scale_back(way, there, factors, here.whole)
            return
        for name, columns in self._each():
            columns.scale_back(way, there, factors[:, self.factors[name] :], here.parts[name])

    def scale_adjoint(self, way: Way, here: "Joined", d_there: Tensor, factors: Tensor) -> Tensor:
        """Return the gradient of the factors; the gradient of here is `scale_back` of d_there."""
        if here.whole is not None:
            return self.together.scale_adjoint(way, here.whole, d_there, factors)
        d_factors = torch.zeros_like(factors)
        for name, columns in self._each():
            columns.add_adjoint(here.parts[name], d_there, d_factors[:, self.factors[name] :])
        return d_factors

    def _each(self) -> Iterator[tuple[str, Columns]]:
        for name in self.widths:
            yield name, cast(Columns, self.columns[name])


@dataclass
class Joined:
    """The inputs of `JoinedColumns` by name, (E, width) each, and the tensor of which they are parts, if they are."""

    parts: dict[str, Tensor]
    whole: Tensor | None = None


def joined_columns(layout: Layout, channels: int, ends: str, edge: bool) -> JoinedColumns:
    """Place the inputs of a message side by side, one product of the SO(2) convolution after the other.

    ends: of "n" and "u", the natural and the unnatural features of both ends of an edge, 2 C channels each, those that there
    are; if there are none, the input "ends" are their scalars. edge: whether the input "e" has all groups or is scalars.
    """
    c, L = channels, layout.lmax
    runs: dict[str, Runs] = {name: [] for name in (*(ends or ("ends",)), "e")}
    there, row = 0, 0

    def place(name: str, factor: int, here: int, size: int) -> None:
        nonlocal there
        runs[name].append((factor, slice(here, here + size), slice(there, there + size)))
        there += size

    for product, terms in layout.products:
        for p, m in terms:
            n = L + 1 - abs(m)
            if "nu"[p] in ends:
                place("nu"[p], abs(m) * 2 * c, layout.rotated_row[m] * 2 * c, n * 2 * c)
            elif not ends and product == "0n":
                place("ends", 0, 0, 2 * c)
            if edge:
                place("e", layout.group(p, abs(m)) * c, row * c, n * c)
            elif product == "0n":
                place("e", 0, 0, c)
            row += n
    first, factors = 0, {}
    for name, of_input in runs.items():
        factors[name] = first
        first = max(first + factor + here.stop - here.start for factor, here, _ in of_input)
    widths = {name: sum(here.stop - here.start for _, here, _ in of_input) for name, of_input in runs.items()}
    return JoinedColumns({name: Columns(of_input) for name, of_input in runs.items()}, widths, factors)


def gate_columns(layout: Layout, channels: int, scalars: int, axial: bool) -> Columns:
    """Build the columns of a gate, between its output ("here") and its input ("there").

    The output has the rows of an edge; if `axial` is true, only natural ones of m = 0. The input has the natural scalars,
    then `scalars` other values, then all other rows.
    """
    runs: Runs = [(0, slice(0, channels), slice(0, channels))]
    for p, m, row, n in layout.placed_runs(axial):
        skipped = 1 if row == 0 else 0  # the natural scalars have their place already
        own = slice((row + skipped) * channels, (row + n) * channels)
        factor = (layout.group(p, abs(m)) + skipped) * channels
        runs.append((factor, own, slice(own.start + scalars, own.stop + scalars)))
    return Columns(runs)


def rotated_columns(layout: Layout, channels: int, axial: bool) -> JoinedColumns:
    """Build, for each parity, the columns between rows in the order of rotations ("here") and in that of edges ("there").

    If `axial` is true there are only natural rows of m = 0. All parities have the same factors, per degree and channel.
    """
    runs: dict[str, Runs] = {name: [] for name in ("n" if axial else "nu")}
    for p, m, row, n in layout.placed_runs(axial):
        here, there = layout.rotated_row[m] * channels, row * channels
        runs["nu"[p]].append((abs(m) * channels, slice(here, here + n * channels), slice(there, there + n * channels)))
    width = (layout.lmax + 1 if axial else layout.size) * channels
    columns = {name: Columns(of_parity) for name, of_parity in runs.items()}
    return JoinedColumns(columns, dict.fromkeys(runs, width), dict.fromkeys(runs, 0))
