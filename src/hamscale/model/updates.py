"""Define the updates of the network: modules that hold weights, with a forward and an adjoint for one chunk of edges.

`chunks.apply` runs an update over a graph. Unless it is recomputed, the output of the large SO(2) convolution of every edge
is kept for the adjoint; keeping any other intermediate would not be worth its memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from ..config import Network
from . import kernels
from .chunks import Buffers, Chunk, ChunkedGraph, Gradients, Task, Weights
from .columns import Joined, gate_columns, joined_columns, rotated_columns
from .kernels import aggregate, aggregate_adjoint, segment_sum, so2, so2_gradient, so2_transposed
from .layers import DegreeLinear, FeedForward, Norm, RadialNetwork, SO2Convolution, constant, envelope
from .readout import EdgeReadout, Slots
from .rotations import PARITIES, DenseRotations, layout


@dataclass
class Convolved:
    """Store the forward results of one message convolution that its adjoint reuses."""

    basis: Tensor
    first: Tensor
    second: Tensor
    norm: tuple | None
    message: kernels.ScaledInputs


class _EdgeModule(nn.Module):
    """Base class of the updates, with a radial network of the distance and the two elements."""

    centres: Tensor

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, outputs: int):
        super().__init__()
        self.lmax, self.cutoff, self.layout = lmax, cutoff, layout(lmax)
        self.radial = RadialNetwork(c.gaussians, c.radial, species, outputs)
        constant(self, "centres", torch.arange(float(c.gaussians)))

    def weights(self) -> Weights:
        r = self.radial
        return {
            "radial.first": r.distance.weight.T,
            "radial.pair": r.pair,
            "radial.hidden": r.hidden.weight.T,
            "radial.hidden.bias": r.hidden.bias,
            "radial.out": r.out.weight.T,
            "radial.out.bias": r.out.bias,
        }

    def constants(self) -> Weights:
        """Return the values that the chunks need and that receive no gradient."""
        return {}

    def short(self, w: Weights, x: Tensor) -> tuple[Weights, Tensor]:
        """Return both as they are."""
        return w, x

    def basis(self, chunk: Chunk, buffers: Buffers) -> Tensor:
        """Compute the Gaussians exp(-(d - d_k)^2 / 2 s^2) of the distance, (E, n).

        The centres d_k are evenly spaced from 0 to the cutoff, and s is their spacing.
        """
        inverse = (len(self.centres) - 1) / self.cutoff  # of the spacing
        offset = torch.sub(
            chunk.distances[:, None], self.centres, alpha=1 / inverse, out=buffers(len(chunk), len(self.centres))
        )
        basis = torch.addcmul(self.centres[:1], offset, offset, value=-0.5 * inverse**2, out=offset)  # the first centre is zero
        # exp(-80) is practically zero, and denormal results would take ten times as long
        return basis.clamp_(min=-80).exp_()

    def radial_adjoint(self, task: Task, g: Gradients, basis: Tensor, first: Tensor, second: Tensor, d_out: Tensor) -> None:
        """Add the gradients of the weights of the radial network, and of the distances, to g.

        basis, first, second: input of the radial network, and the arguments of its silu; d_out: gradient of its output.
        """
        chunk, w = task.chunk, task.weights
        d_first = kernels.radial_adjoint(w, g.weights, basis, chunk.pair, first, second, d_out)
        if g.distances is not None:
            inverse = (len(self.centres) - 1) / self.cutoff
            offset = chunk.distances[:, None] * inverse - self.centres
            g.distances[chunk.edges] -= (d_first @ w["radial.first"].T * basis * offset).sum(1) * inverse


class EdgeEmbedding(_EdgeModule):
    """The first edge features: scalars that depend on the distance and the two elements alone. By chunk (E, C)."""

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network):
        super().__init__(lmax, species, cutoff, c, c.channels // 2)
        self.channels = c.channels // 2

    def outputs(self, graph: ChunkedGraph, x: Tensor) -> list[Tensor]:
        return [x.new_empty(0, self.channels)] * len(graph.spans)

    def forward_chunk(self, task: Task, outputs: list[Tensor], keep: bool) -> None:
        outputs[task.number], _, _ = kernels.radial(task.weights, self.basis(task.chunk, task.buffers), task.chunk.pair)

    def adjoint_chunk(self, task: Task, kept: Tensor | None, d_outputs: Sequence[Tensor], g: Gradients) -> None:
        basis = self.basis(task.chunk, task.buffers)
        _, first, second = kernels.radial(task.weights, basis, task.chunk.pair)
        self.radial_adjoint(task, g, basis, first, second, d_outputs[task.number])


class _MessageModule(_EdgeModule):
    """Base class of the updates by messages: an SO(2) convolution of [D x_j, D x_i, e].

    Each of these inputs is scaled per group and channel by the radial network.
    ends: features of the nodes, of "n" and "u" those that there are, natural and unnatural ones; without either, scalars.
    edge: whether the features of the edge have all groups; otherwise they are scalars.
    """

    no_scales: Tensor

    def __init__(
        self, lmax: int, species: int, cutoff: float, c: Network, ends: str, edge: bool, scalars: int, axial: bool
    ) -> None:
        C, H, own = c.channels // 2, c.hidden // 2, layout(lmax)
        widths = dict.fromkeys(ends, (lmax + 1) * 2 * C) if ends else {"ends": 2 * C}
        widths |= {"e": (own.groups if edge else 1) * C}
        super().__init__(lmax, species, cutoff, c, sum(widths.values()))
        self.widths, self.channels, self.hidden, self.scalars, self.ends = widths, C, H, scalars, ends
        self.rows = lmax + 1 if axial else own.rows  # of the output
        self.gates = (lmax if axial else own.groups - 1) * H
        invariants = (0 if ends else 2 * C) + (0 if edge else C)
        natural, unnatural = (2 * C * (name in ends) + C * edge for name in "nu")
        # unnatural features of m = 0 come of those of nodes alone
        pseudo = "u" in ends
        self.convolution = SO2Convolution(lmax, natural, unnatural, invariants, H, self.gates + scalars, axial, pseudo)
        self.dtype: torch.dtype | None = None  # type of messages, if it differs from that of x
        self.columns = joined_columns(own, C, ends, edge)
        self.dense = DenseRotations(lmax, min(self.rows, own.size))
        self.gate_columns = gate_columns(own, H, self.gates + scalars, axial)
        self.edge_norm = Norm(lmax, C) if edge else None
        constant(self, "no_scales", torch.ones(sum(widths.values()) - widths["e"]))

    def constants(self) -> Weights:
        return self.edge_norm.constants("edge_norm") if self.edge_norm else {}

    def weights(self) -> Weights:
        w = super().weights() | self.convolution.weights("convolution")
        if self.edge_norm is None:
            return w
        # the scales of e become part of its factors: those of x are part of x already
        scales = torch.cat([self.no_scales, self.edge_norm.scales().flatten()])
        for name in ("radial.out", "radial.out.bias"):
            w[name] = w[name] * scales
        return w | self.edge_norm.weights("edge_norm")

    def y(self, chunk: Chunk, x: Tensor, keep: bool, buffers: Buffers) -> Tensor:
        """Allocate the output of the SO(2) convolution."""
        shape = len(chunk), self.gates + self.scalars + self.rows * self.hidden
        return x.new_empty(shape) if keep else buffers(*shape, dtype=x.dtype)

    def rotations(self, chunk: Chunk, dtype: torch.dtype, buffers: Buffers) -> Tensor:
        """Compute the dense rotations of a chunk, (E, K, K), or the rows of m = 0 of those, (E, lmax + 1, K)."""
        return self.dense(chunk.rotations.to(dtype), buffers(len(chunk), *self.dense.shape, dtype=dtype))

    def short(self, w: Weights, x: Tensor) -> tuple[Weights, Tensor]:
        """Convert the weights of convolutions and the node features to the type of messages."""
        if self.dtype is None:
            return w, x
        return {n: v.to(self.dtype) if n.startswith(("convolution", "values")) else v for n, v in w.items()}, x.to(self.dtype)

    def convolve(self, task: Task, D: Tensor) -> Convolved:
        """Compute all steps up to the SO(2) convolution, which is `so2` of the message."""
        w, e, buffers = task.weights, task.e, task.buffers
        f, first, second = kernels.radial(w, basis := self.basis(task.chunk, buffers), task.chunk.pair)
        norm, scalars = None, None
        if self.edge_norm:
            inverse = kernels.inverse_norm(w, "edge_norm", e, buffers)
            scalars, mean, deviation = kernels.scalar_norm(w, "edge_norm", e[0])
            norm = inverse, mean, deviation, self.scaled_by_norm(f).clone()
            self.scaled_by_norm(f).mul_(inverse[:, None])
        return Convolved(basis, first, second, norm, kernels.scale_inputs(self.columns, task, D, scalars, f))

    def convolve_again(self, task: Task, y: Tensor | None) -> tuple[Tensor, Convolved, Tensor]:
        """Recompute the rotations, the input of the convolution and, if it was not kept, its output y."""
        D = self.rotations(task.chunk, task.x.dtype, task.buffers)
        c = self.convolve(task, D)
        if y is None:
            y = self.y(task.chunk, task.x, False, task.buffers)
            so2(self.layout, task.chunk.way, task.weights, "convolution", c.message.scaled, y)
        return D, c, y

    def scaled_by_norm(self, f: Tensor) -> Tensor:
        """Return the factors of all groups of e but the scalars."""
        return f[:, len(self.no_scales) + self.channels :]

    def convolve_adjoint(self, task: Task, c: Convolved, d_y: Tensor, d_e: Tensor | None, g: Gradients) -> Tensor:
        """Return the gradient of e, including the gradient d_e that reaches it on other paths."""
        w, e, buffers, way = task.weights, task.e, task.buffers, task.chunk.way
        d_scaled = buffers.like(c.message.scaled)
        so2_gradient(self.layout, way, g.weights, "convolution", c.message.scaled, d_y)
        so2_transposed(self.layout, way, w, "convolution", d_y, d_scaled)
        own, d_f = kernels.scale_inputs_adjoint(self.dense, self.columns, task, c.message, d_scaled, g)
        if c.norm is None:
            d_e = own if d_e is None else own + d_e
        else:
            inverse, mean, deviation, f = c.norm
            d_f_e = self.scaled_by_norm(d_f)
            own[0] = kernels.scalar_norm_adjoint(w, g.weights, "edge_norm", e[0], mean, deviation, own[0])
            d_e = own.clone() if d_e is None else own + d_e
            kernels.inverse_norm_adjoint(w, "edge_norm", e, inverse, (d_f_e * f).sum(1), d_e)
            d_f_e *= inverse[:, None]
        self.radial_adjoint(task, g, c.basis, c.first, c.second, d_f)
        return d_e


LEAK = 0.2  # slope of leaky_relu below zero


@dataclass
class Attention:
    """The attention of every edge, and what its adjoint needs.

    s, normed, kept (E, heads, alpha): its scalars, after the layer norm, and after leaky_relu. softmax (E, heads).
    envelope (E, 1): of the distance.
    top, total (atoms, heads): the largest logit m of the edges into an atom, and the sum of exp(l - m) over their logits l.
    """

    s: Tensor
    normed: Tensor
    mean: Tensor
    deviation: Tensor
    kept: Tensor
    softmax: Tensor
    envelope: Tensor
    top: Tensor
    total: Tensor

    @property
    def alpha(self) -> Tensor:
        """Return the weight of every message and head, (E, heads)."""
        return self.softmax * self.envelope


class MessageSum(_MessageModule):
    """Sums of messages into atoms, (A, 2, K, heads V), in the global frame, natural and unnatural.

    If a graph has not all edges into its atoms, the softmax is over those that it has, and the logarithms of the sums of
    exp(logit) over them, (A, heads), are a second output, with which `network.merged` puts the sums together.

    A message is an SO(2) convolution of [D x_j, D x_i, e], gated, convolved once more, weighted for each head with the
    attention over the edges into i, and rotated back. The features of the first layer are scalars: only natural m = 0
    occurs, and there are no weights for the rest; its unnatural sums are zero.
    """

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, layer: int) -> None:
        heads, V, alpha, first = c.heads, c.values // 2, c.attention, layer == 0
        # messages of scalars are natural: nodes have unnatural features from the second update on
        ends = ("", "n", "nu")[min(layer, 2)]
        super().__init__(lmax, species, cutoff, c, ends, not first, heads * alpha, axial=first)
        self.heads, self.value_channels, self.first = heads, V, first
        self.values = SO2Convolution(
            lmax, self.hidden, 0 if first else self.hidden, 0, heads * V, axial=first, pseudo=layer > 1
        )
        self.rotated_columns = rotated_columns(self.layout, heads * V, axial=first)
        self.attention_norm = nn.LayerNorm(alpha)
        self.attention = nn.Parameter(torch.randn(heads, alpha) / alpha**0.5)

    def weights(self) -> Weights:
        return (
            super().weights()
            | self.values.weights("values")
            | {
                "attention": self.attention,
                "attention.norm.weight": self.attention_norm.weight,
                "attention.norm.bias": self.attention_norm.bias,
            }
        )

    def attend(self, chunk: Chunk, w: Weights, y: Tensor) -> Attention:
        """Compute softmax over the edges into each atom of a . leaky_relu(norm(s)), times the envelope of the distance.

        y: output of the convolution, which has s.
        """
        heads, alpha = w["attention"].shape
        s = y[:, self.attended].to(chunk.distances.dtype).unflatten(1, (heads, alpha))
        normed, mean, deviation = torch.native_layer_norm(
            s, [alpha], w["attention.norm.weight"], w["attention.norm.bias"], self.attention_norm.eps
        )
        kept = leaky_relu(normed, LEAK)
        logits = (kept * w["attention"]).sum(-1)
        top = torch.segment_reduce(logits, "max", offsets=chunk.offsets, axis=0, unsafe=True)
        weights = logits.sub_(top.index_select(0, chunk.target)).exp_()
        total = segment_sum(chunk, weights)
        softmax = weights.div_(total.index_select(0, chunk.target))
        return Attention(s, normed, mean, deviation, kept, softmax, envelope(chunk.distances, self.cutoff)[:, None], top, total)

    def attend_adjoint(self, task: Task, forward: Attention, d_alpha: Tensor, d_log: Tensor | None, g: Gradients) -> Tensor:
        """Return the gradient of s, (E, heads alpha), and add those of the weights and the distances to g.

        d_log (atoms, heads): gradient of log(sum of exp(logit)), if that is an output.
        """
        chunk, w, softmax = task.chunk, task.weights, forward.softmax
        if g.distances is not None:
            with torch.enable_grad():
                distances = chunk.distances.detach().requires_grad_()
                value = envelope(distances, self.cutoff)
            g.distances[chunk.edges] += torch.autograd.grad(value, distances, (d_alpha * softmax).sum(1))[0]
        products = d_alpha * forward.envelope * softmax
        sums = segment_sum(chunk, products) if d_log is None else segment_sum(chunk, products) - d_log
        d_logits = products.addcmul_(softmax, sums.index_select(0, chunk.target), value=-1)[:, :, None]
        g.weights["attention"] += (forward.kept * d_logits).sum(0)
        d_normed = torch.ops.aten.leaky_relu_backward(d_logits * w["attention"], forward.normed, LEAK, False)
        names = "attention.norm.weight", "attention.norm.bias"
        d_s, *d_weights = torch.ops.aten.native_layer_norm_backward(
            d_normed, forward.s, [d_normed.shape[2]], forward.mean, forward.deviation, *(w[n] for n in names), [True] * 3
        )
        for name, d in zip(names, d_weights):
            g.weights[name] += d
        return d_s.flatten(1)

    def outputs(self, graph: ChunkedGraph, x: Tensor) -> list[Tensor]:
        sums = x.new_zeros(graph.atoms, len(PARITIES), self.layout.size, self.heads * self.value_channels)
        return [sums] if graph.whole else [sums, x.new_full((graph.atoms, self.heads), float("-inf"))]

    @property
    def attended(self) -> slice:
        """Return the columns of the scalars in the output of the convolution that make the attention."""
        return slice(self.hidden + self.gates, self.hidden + self.gates + self.scalars)

    def of_degrees(self, alpha: Tensor) -> Tensor:
        """Repeat the attention (E, heads) for every degree and channel of the values."""
        return alpha[:, None, :, None].expand(-1, self.lmax + 1, -1, self.value_channels).flatten(1)

    def forward_chunk(self, task: Task, outputs: list[Tensor], keep: bool) -> Tensor | None:
        chunk, w, x, buffers = task.chunk, task.weights, task.x, task.buffers
        D, y = self.rotations(chunk, x.dtype, buffers), self.y(chunk, x, keep, buffers)
        with buffers:
            so2(self.layout, chunk.way, w, "convolution", self.convolve(task, D).message.scaled, y)
        z = buffers(len(chunk), self.rows * self.hidden, dtype=x.dtype)
        kernels.edge_gate(chunk.way, self.gate_columns, y, self.hidden + self.gates, z)
        attention = self.attend(chunk, w, y)
        alpha = attention.alpha
        for logarithms in outputs[1:]:
            logarithms[chunk.atoms] = attention.top + attention.total.log()
        if self.dtype is not None:  # sums are computed in full precision
            D = self.rotations(chunk, buffers.dtype, buffers)
        values = buffers(len(chunk), self.rows * self.heads * self.value_channels, dtype=x.dtype)
        so2(self.layout, chunk.way, w, "values", z, values)
        v = self.rotated_columns.inputs(chunk.way, len(chunk), buffers, buffers.dtype)
        self.rotated_columns.scale_back(chunk.way, values, self.of_degrees(alpha), v)
        aggregate(task, D, self.of_parities(v), outputs[0][chunk.atoms])
        return y if keep else None

    def of_parities(self, v: Joined) -> list[Tensor]:
        """Return the values of each parity in the order of rotations, (E, rows, heads V)."""
        return [part.unflatten(1, (-1, self.heads * self.value_channels)) for part in v.parts.values()]

    def adjoint_chunk(self, task: Task, kept: Tensor | None, d_outputs: Sequence[Tensor], g: Gradients) -> Tensor:
        D, c, y = self.convolve_again(task, kept)
        d_y = task.buffers.like(y)
        with task.buffers:
            if self.dtype is not None:
                D = self.rotations(task.chunk, task.buffers.dtype, task.buffers)
            self._attend_adjoint(task, y, D, [d[task.chunk.atoms] for d in d_outputs], d_y, g)
        return self.convolve_adjoint(task, c, d_y, None, g)

    def _attend_adjoint(self, task: Task, y: Tensor, D: Tensor, d_outputs: list[Tensor], d_y: Tensor, g: Gradients) -> None:
        """Compute the gradient of y from those of the outputs for the atoms of the chunk."""
        chunk, w, buffers, way = task.chunk, task.weights, task.buffers, task.chunk.way
        d_sums, d_log = d_outputs[0], d_outputs[1] if len(d_outputs) > 1 else None
        z = buffers(len(chunk), self.rows * self.hidden, dtype=y.dtype)
        gates = kernels.edge_gate(way, self.gate_columns, y, self.hidden + self.gates, z)
        attention = self.attend(chunk, w, y)
        factors = self.of_degrees(attention.alpha)
        values = buffers(len(chunk), self.rows * self.heads * self.value_channels, dtype=y.dtype)
        so2(self.layout, way, w, "values", z, values)
        d_values = buffers.like(values)
        d_v = self.rotated_columns.inputs(way, len(chunk), buffers, buffers.dtype)
        if g.rotations is not None:
            self.rotated_columns.scale_back(way, values, factors, d_v)  # the values themselves, overwritten below
            for p, v in enumerate(self.of_parities(d_v)):
                self.dense.add_gradient(torch.bmm(v, d_sums[:, p].index_select(0, chunk.target).mT), g.rotations[chunk.edges])
        aggregate_adjoint(task, D, d_sums, self.of_parities(d_v))
        d_factors = self.rotated_columns.scale_adjoint(way, d_v, values, factors)
        self.rotated_columns.scale(way, d_v, factors, d_values)
        d_alpha = d_factors.view(len(chunk), self.lmax + 1, self.heads, self.value_channels).sum((1, 3))
        so2_gradient(self.layout, way, g.weights, "values", z, d_values)
        so2_transposed(self.layout, way, w, "values", d_values, d_z := buffers.like(z))
        kernels.edge_gate_adjoint(way, self.gate_columns, y, gates, d_z, d_y)
        d_y[:, self.attended] = self.attend_adjoint(task, attention, d_alpha, d_log, g)


class EdgeUpdate(_MessageModule):
    """Update of edge features: e + linear(gate(SO(2) convolution of [D x_j, D x_i, e])), then a feed-forward layer.

    All operations are in the edge frame, by chunk (R, E, C).
    In the first update the edge features are scalars, (E, C), directly from their embedding. The last update reads out its
    edges as soon as they are finished and returns, instead of them, the coupled components (G, n) of the edges between any
    two elements.
    """

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, first: bool, slots: Slots | None = None):
        # the first messages are scalars: before the first edge update nodes have natural features alone
        super().__init__(lmax, species, cutoff, c, "n" if first else "nu", not first, 0, axial=False)
        C = self.channels
        self.first = first
        self.out = DegreeLinear(lmax, self.hidden, C)
        self.feed_forward = FeedForward(lmax, C, c.feed_forward // 2)
        self.readout = None if slots is None else EdgeReadout(lmax, C, slots)

    def constants(self) -> Weights:
        c = super().constants() | self.feed_forward.norm.constants("ff.norm")
        return c | self.readout.constants() if self.readout else c

    def weights(self) -> Weights:
        w = super().weights() | {"out": self.out.of_edges(), "out.bias": self.out.bias} | self.feed_forward.weights("ff")
        return w | self.readout.weights() if self.readout else w

    def outputs(self, graph: ChunkedGraph, x: Tensor) -> list[Tensor]:
        if self.readout is None:
            return [x.new_empty(self.rows, 0, self.channels)] * len(graph.spans)  # replaced chunk by chunk
        return [x.new_zeros(p.scale.shape) for p in graph.pairs.values()]

    def _gated(self, task: Task, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute u = e + linear(gate(y)).

        Returns the gated y (R, E, H), the factors, and the edge-first output of the gate, which serves as a buffer.
        """
        w, edges, buffers = task.weights, len(y), task.buffers
        z, gated = buffers(self.rows, edges, self.hidden), buffers(edges, self.rows, self.hidden, dtype=y.dtype)
        flat = gated.view(edges, -1)
        factors = kernels.edge_gate(task.chunk.way, self.gate_columns, y, self.hidden + self.gates, flat)
        z.copy_(gated.transpose(0, 1))
        if self.first:
            u[0], u[1:] = task.e, 0
        else:
            u.copy_(task.e)
        u.baddbmm_(z, w["out"])
        u[0].add_(w["out.bias"])
        return z, factors, gated

    def forward_chunk(self, task: Task, outputs: list[Tensor], keep: bool) -> Tensor | None:
        chunk, w, x, buffers = task.chunk, task.weights, task.x, task.buffers
        y = self.y(chunk, x, keep, buffers)
        with buffers:
            D = self.rotations(chunk, x.dtype, buffers)
            so2(self.layout, chunk.way, w, "convolution", self.convolve(task, D).message.scaled, y)
        shape = (self.rows, len(chunk), self.channels)
        if self.readout is None:
            outputs[task.number] = u = chunk.distances.new_empty(shape)  # memory released by an earlier chunk of e is reused
        else:
            u = buffers(*shape)
        with buffers:
            self._gated(task, y, u)
        with buffers:
            kernels.feed_forward(self.layout, w, u, u, buffers, keep=False)
        if self.readout is not None:
            self.readout.read(task, u, outputs)
        return y if keep else None

    def adjoint_chunk(self, task: Task, kept: Tensor | None, d_outputs: Sequence[Tensor], g: Gradients) -> Tensor:
        buffers = task.buffers
        _, c, y = self.convolve_again(task, kept)
        d_y, d_u = buffers.like(y), buffers(self.rows, len(task.chunk), self.channels)
        with buffers:
            self._gate_adjoint(task, y, d_outputs, d_u, d_y, g.weights)
        return self.convolve_adjoint(task, c, d_y, d_u[0] if self.first else d_u, g)

    def _gate_adjoint(self, task: Task, y: Tensor, d_outputs: Sequence[Tensor], d_u: Tensor, d_y: Tensor, g: Weights) -> None:
        """Compute the gradients of u and y from the gradient of the output.

        That of u includes both the feed-forward layer and its residual connection.
        """
        w, buffers = task.weights, task.buffers
        u = buffers.like(d_u)
        z, factors, d_gated = self._gated(task, y, u)
        with buffers:
            if self.readout is None:
                forward = kernels.feed_forward(self.layout, w, u, None, buffers)
                d_u.copy_(d_outputs[task.number])
            else:
                forward = kernels.feed_forward(self.layout, w, u, out := buffers.like(u), buffers)
                with buffers:
                    self.readout.read_adjoint(task, g, out, d_outputs, d_u.zero_())
            kernels.feed_forward_adjoint(self.layout, w, g, u, forward, d_u, buffers)
        g["out"].baddbmm_(z.transpose(1, 2), d_u)
        g["out.bias"] += d_u[0].sum(0)
        d_z = torch.bmm(d_u, w["out"].transpose(1, 2), out=buffers.like(z))
        d_gated.copy_(d_z.transpose(0, 1))
        kernels.edge_gate_adjoint(task.chunk.way, self.gate_columns, y, factors, d_gated.view(len(task.chunk), -1), d_y)
