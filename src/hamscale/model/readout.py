"""Read out edges: map features in the edge frame to the coupled components of blocks between two elements."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic

import torch
from torch import Tensor, nn

from . import kernels
from .chunks import Task, Weights
from .layers import Key, Norm, RowMatrices, constant
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


class Components(nn.Module, Generic[Key]):
    """Matrices that read out features, one for each row, and the places of coupled components among their outputs.

    rows: (parity, L, M) of each row. slots: of the blocks of each key. matrices: (channels, slots of a parity) by name, with
    `name` of a key, degree and parity. Components without a matrix are read from a column of zeros.
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, int, int]],
        slots: Mapping[Key, Degrees],
        matrices: nn.ParameterDict,
        channels: int,
        name: Callable[[Key, int, int], str],
    ) -> None:
        super().__init__()
        shapes = {of: tuple(matrix.shape) for of, matrix in matrices.items()}
        row_of, least = {row: k for k, row in enumerate(rows)}, {}
        self.number = {key: k for k, key in enumerate(slots)}
        for key, degrees in slots.items():
            known = {(L, p): shapes[of][1] for p, L, _ in rows if (of := name(key, L, p)) in shapes}
            complete = all((L, p) in known for L, parities in degrees.items() for p in parities)
            width = max(known.values(), default=0) + (not complete)
            places = []
            for L, parities in degrees.items():
                for M in range(-L, L + 1):
                    for slot, p in enumerate(parities):
                        column = of_parity(parities, p).index(slot)
                        places.append(row_of[p, L, M] * width + column if (L, p) in known else width - 1)
            constant(self, f"places_{self.number[key]}", places)
            least[key] = channels, width
        self.gather = RowMatrices(shapes, {key: [name(key, L, p) for p, L, _ in rows] for key in slots}, least)

    def places(self, key: Key) -> Tensor:
        """Return the places of the components of a key among the outputs of all rows, (n,)."""
        return self.get_buffer(f"places_{self.number[key]}")


class EdgeReadout(nn.Module):
    """Norm, followed by one matrix per pair of elements, degree L and parity, which gives the coupled components of edges.

    The components (G, n) of all edges of a pair are multiplied with their scale. Components with L above lmax stay zero.
    """

    channel: Tensor

    def __init__(self, lmax: int, channels: int, slots: Slots):
        super().__init__()
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
        own = layout(lmax)
        name = lambda pair, L, p: f"{pair[0]}-{pair[1]}-{L}-{p}"  # noqa: E731
        self.components = Components(list(own.edge_row), slots, self.matrices, channels, name)
        channel = own.edge_group[:, None] * channels + torch.arange(channels)
        of_numbers = [channel[:, :, None].expand(shape) for shape in self.components.gather.shapes.values()]
        constant(self, "channel", torch.cat([c.flatten() for c in of_numbers]))  # group and channel of every number gathered

    def constants(self) -> Weights:
        return self.norm.constants("read.norm")

    def weights(self) -> dict[str, Tensor]:
        """Return one matrix per pair of elements and row of an edge, with the scales of the norm."""
        scales = self.norm.scales().flatten().index_select(0, self.channel)
        matrices = self.components.gather(self.matrices.values(), scales)
        return self.norm.weights("read.norm") | {f"read.{s_i}-{s_j}": of_rows for (s_i, s_j), of_rows in matrices.items()}

    def _groups(self, task: Task, outputs: Sequence[Tensor]) -> Iterator[tuple[tuple[int, int], Any, Tensor, slice, Tensor]]:
        """Yield the pairs of elements that occur in a chunk, with the rows of their edges.

        Each item is (pair, its inputs, rows of the chunk's edges, span of its output, output).
        """
        for (pair, p), raw in zip(task.chunk.pairs.items(), outputs):
            span = p.spans[task.number]
            if span.stop > span.start:
                first = task.chunk.edges.start
                yield pair, p, p.edges[span] - first if first else p.edges[span], span, raw

    def read(self, task: Task, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Read out the features x (R, E, C) of a chunk into its rows of the outputs."""
        w, normed = task.weights, task.buffers.like(x)
        kernels.norm(w, "read.norm", x, normed, task.buffers)
        for (s_i, s_j), p, rows, span, raw in self._groups(task, outputs):
            weight = w[f"read.{s_i}-{s_j}"]
            read = task.buffers(len(rows), len(weight), weight.shape[2])
            torch.bmm(normed.index_select(1, rows), weight, out=read.transpose(0, 1))
            components = read.flatten(1).index_select(1, self.components.places((s_i, s_j)))
            torch.mul(components, p.scale[span], out=raw[span])

    def read_adjoint(self, task: Task, g: Weights, x: Tensor, d_outputs: Sequence[Tensor], d_x: Tensor) -> None:
        """Add the gradient of x to d_x, and those of the weights to g."""
        w, buffers = task.weights, task.buffers
        normed, order, d_sorted = buffers.like(x), [], []
        saved = kernels.norm(w, "read.norm", x, normed, buffers)
        for (s_i, s_j), p, rows, span, d_raw in self._groups(task, d_outputs):
            weight = w[f"read.{s_i}-{s_j}"]
            d_read = d_raw.new_zeros(len(rows), len(weight) * weight.shape[2])
            # of components that share the column of zeros any one arrives there, and goes no further
            d_read.index_copy_(1, self.components.places((s_i, s_j)), d_raw[span] * p.scale[span])
            d_read = d_read.view(len(rows), len(weight), -1).transpose(0, 1)
            g[f"read.{s_i}-{s_j}"].baddbmm_(normed.index_select(1, rows).transpose(1, 2), d_read)
            order.append(rows)
            d_sorted.append(torch.bmm(d_read, weight.transpose(1, 2)))
        d_normed = torch.cat(d_sorted, 1).index_select(1, torch.argsort(torch.cat(order)))
        kernels.norm_adjoint(w, g, "read.norm", x, saved, d_normed, d_x, buffers)
