"""Read out edges: map features in the edge frame to the coupled components of blocks between two elements."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import kernels
from .chunks import Task, Weights
from .layers import Norm
from .rotations import PARITIES, layout

# initial size of the output relative to the scale: training starts near the reference, not as far from it as DFT is
SMALL_READOUT = 0.05

Degrees = dict[int, tuple[int, ...]]  # L -> parity of each slot of degree L: 0 natural, 1 unnatural, -1 always zero
Slots = dict[tuple[int, int], Degrees]  # of blocks between elements s_i and s_j


def of_parity(parities: tuple[int, ...], p: int) -> list[int]:
    """Return the numbers of the slots that have a parity."""
    return [slot for slot, parity in enumerate(parities) if parity == p]


def hermitian_mean(read: Tensor, partner: Tensor, adjoint: Tensor, sign: Tensor) -> Tensor:
    """Compute the mean of blocks and the adjoints of their partners (j, i, -R), all as coupled components (G, n).

    adjoint (n,), sign (n,): the component `adjoint` of a partner, times the sign, is a component of its adjoint.
    """
    return torch.addcmul(read, partner.index_select(1, adjoint), sign).mul_(0.5)


class EdgeReadout(nn.Module):
    """Norm, followed by one matrix per pair of elements, degree L and parity, which gives the coupled components of edges.

    The components (G, n) of all edges of a pair are multiplied with their scale. Components with L above lmax stay zero.
    """

    def __init__(self, lmax: int, channels: int, slots: Slots):
        super().__init__()
        self.lmax, self.channels, self.slots = lmax, channels, slots
        self.slot_count = {
            pair: max(len(of_parity(ps, p)) for ps in degrees.values() for p in PARITIES) for pair, degrees in slots.items()
        }
        self.norm = Norm(lmax, channels)
        self.matrices = nn.ParameterDict(
            {
                f"{s_i}-{s_j}-{L}-{p}": nn.Parameter(SMALL_READOUT * torch.randn(channels, n) / channels**0.5)
                for (s_i, s_j), degrees in slots.items()
                for L, parities in degrees.items()
                for p in PARITIES
                if lmax >= L and (n := len(of_parity(parities, p)))
            }
        )

    def constants(self) -> Weights:
        return self.norm.constants("read.norm")

    def weights(self) -> dict[str, Tensor]:
        """Return one matrix per pair of elements and row of an edge, with the scales of the norm.

        The matrix of a row is that of its group, padded to the width of the widest group.
        """
        w, scales = self.norm.weights("read.norm"), self.norm.scales()
        rows = layout(self.lmax).edge_group.to(scales.device)
        for s_i, s_j in self.slots:
            width, nothing = self.slot_count[s_i, s_j], scales.new_zeros(self.channels, 0)
            names = [f"{s_i}-{s_j}-{L}-{p}" for p in PARITIES for L in range(self.lmax + 1)]
            of_groups = [self.matrices.get(name, nothing) for name in names]
            matrices = [pad(matrix, (0, width - matrix.shape[1])) for matrix in of_groups]
            w[f"read.{s_i}-{s_j}"] = (scales[:, :, None] * torch.stack(matrices))[rows]
        return w

    @cached_property
    def _components(self) -> dict:
        """Return, for each pair of elements, the columns of its coupled components and their positions in the read-out.

        A position is row * slots + slot.
        """
        result = {}
        for pair, degrees in self.slots.items():
            columns: list[int] = []
            where: list[int] = []
            column = 0
            for L, parities in degrees.items():
                for M in range(-L, L + 1):
                    for p in PARITIES if self.lmax >= L else ():
                        own = of_parity(parities, p)
                        first = layout(self.lmax).edge_row[p, L, M] * self.slot_count[pair]
                        columns += [column + slot for slot in own]
                        where += range(first, first + len(own))
                    column += len(parities)
            result[pair] = torch.tensor(columns), torch.tensor(where)
        return result

    def _groups(self, task: Task, outputs: Sequence[Tensor]) -> Iterator[tuple[tuple[int, int], Any, Tensor, slice, Tensor]]:
        """Yield the pairs of elements that occur in a chunk, with the rows of their edges.

        Each item is (pair, its inputs, rows of the chunk's edges, span of its output, output).
        """
        for (pair, p), raw in zip(task.chunk.pairs.items(), outputs):
            span = p.spans[task.number]
            if span.stop > span.start:
                yield pair, p, p.edges[span] - task.chunk.edges.start, span, raw

    def read(self, task: Task, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Read out the features x (R, E, C) of a chunk into its rows of the outputs."""
        w, normed = task.weights, task.buffers.like(x)
        kernels.norm(w, "read.norm", x, normed, task.buffers)
        for (s_i, s_j), p, rows, span, raw in self._groups(task, outputs):
            columns, where = (t.to(raw.device) for t in self._components[s_i, s_j])
            read = torch.bmm(normed.index_select(1, rows), w[f"read.{s_i}-{s_j}"])
            raw[span, columns] = read.transpose(0, 1).flatten(1).index_select(1, where)
            raw[span] *= p.scale[span]

    def read_adjoint(self, task: Task, g: Weights, x: Tensor, d_outputs: Sequence[Tensor], d_x: Tensor) -> None:
        """Add the gradient of x to d_x, and those of the weights to g."""
        w, buffers = task.weights, task.buffers
        normed, order, d_sorted = buffers.like(x), [], []
        saved = kernels.norm(w, "read.norm", x, normed, buffers)
        for (s_i, s_j), p, rows, span, d_raw in self._groups(task, d_outputs):
            columns, where = (t.to(d_raw.device) for t in self._components[s_i, s_j])
            weight = w[f"read.{s_i}-{s_j}"]
            d_read = d_raw.new_zeros(len(rows), len(weight) * weight.shape[2])
            d_read[:, where] = (d_raw[span] * p.scale[span]).index_select(1, columns)
            d_read = d_read.view(len(rows), len(weight), -1).transpose(0, 1)
            g[f"read.{s_i}-{s_j}"].baddbmm_(normed.index_select(1, rows).transpose(1, 2), d_read)
            order.append(rows)
            d_sorted.append(torch.bmm(d_read, weight.transpose(1, 2)))
        d_normed = torch.cat(d_sorted, 1).index_select(1, torch.argsort(torch.cat(order)))
        kernels.norm_adjoint(w, g, "read.norm", x, saved, d_normed, d_x, buffers)
