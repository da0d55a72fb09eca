"""Define the updates of the network: modules that hold weights, with a forward and an adjoint for one chunk of edges.

`chunks.apply` runs an update over a graph. Unless it is recomputed, the output of the large SO(2) convolution of every edge
is kept for the adjoint; keeping any other intermediate would not be worth its memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, leaky_relu

from ..config import Network
from . import kernels
from .chunks import Buffers, Chunk, ChunkedGraph, Gradients, Task, Weights
from .kernels import aggregate, aggregate_adjoint, so2, so2_gradient, so2_transposed
from .layers import DegreeLinear, FeedForward, Norm, RadialNetwork, SO2Convolution, envelope
from .readout import EdgeReadout, Slots
from .rotations import layout


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

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, outputs: int):
        super().__init__()
        self.lmax, self.cutoff, self.layout = lmax, cutoff, layout(lmax)
        self.radial = RadialNetwork(c.gaussians, c.radial, species, outputs)

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
        n = self.radial.distance.weight.shape[1]
        basis = buffers(len(chunk), n)
        torch.sub(chunk.distances[:, None] * ((n - 1) / self.cutoff), torch.arange(n).to(basis), out=basis)
        # exp(-80) is practically zero, and denormal results would take ten times as long
        return basis.square_().mul_(-0.5).clamp_(min=-80).exp_()

    def radial_adjoint(self, task: Task, g: Gradients, basis: Tensor, first: Tensor, second: Tensor, d_out: Tensor) -> None:
        """Add the gradients of the weights of the radial network, and of the distances, to g.

        basis, first, second: input of the radial network, and the arguments of its silu; d_out: gradient of its output.
        """
        chunk, w = task.chunk, task.weights
        d_first = kernels.radial_adjoint(w, g.weights, basis, chunk.pair, first, second, d_out)
        if g.distances is not None:
            n = basis.shape[1]
            inverse = (n - 1) / self.cutoff
            offset = chunk.distances[:, None] * inverse - torch.arange(n).to(basis)
            g.distances[chunk.edges] -= (d_first @ w["radial.first"].T * basis * offset).sum(1) * inverse


class EdgeEmbedding(_EdgeModule):
    """The first edge features: scalars that depend on the distance and the two elements alone. By chunk (E, C)."""

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network):
        super().__init__(lmax, species, cutoff, c, c.channels)
        self.channels = c.channels

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

    Each of these inputs is scaled per degree and channel by the radial network.
    full: those of j, i, e that have all degrees; invariants: those that are scalars.
    """

    def __init__(
        self, lmax: int, species: int, cutoff: float, c: Network, full: tuple, invariants: tuple, scalars: int, axial: bool
    ):
        C = c.channels
        widths = {name: (lmax + 1) * C for name in full} | {name: C for name in invariants}
        super().__init__(lmax, species, cutoff, c, sum(widths.values()))
        self.widths, self.channels, self.hidden, self.scalars = widths, C, c.hidden, scalars
        self.rows = lmax + 1 if axial else (lmax + 1) ** 2
        self.convolution = SO2Convolution(
            lmax, dict.fromkeys(full, C), dict.fromkeys(invariants, C), self.hidden, scalars, axial
        )
        self.dtype: torch.dtype | None = None  # type of messages, if it differs from that of x
        self.columns = kernels.joined_columns(self.layout, {name: name in full for name in widths}, C)
        self.gate_columns = kernels.gate_columns(self.layout, self.hidden, scalars, axial)
        self.edge_norm = Norm(lmax, C) if "e" in full else None

    def constants(self) -> Weights:
        return self.edge_norm.constants("edge_norm") if self.edge_norm else {}

    def weights(self) -> Weights:
        w = super().weights() | self.convolution.weights("convolution")
        if self.edge_norm is None:
            return w
        scales = self.edge_norm.scales()
        for m in range(self.lmax + 1):
            # scales of the rows of one sign of m: x_j and x_i include their scales already
            own = scales[m:].flatten()
            rows = [s for name in self.widths for s in [own if name == "e" else torch.ones_like(own)] * (1 if m == 0 else 2)]
            w[f"convolution.{m}"] = torch.cat(rows)[:, None] * w[f"convolution.{m}"]
        return w | self.edge_norm.weights("edge_norm")

    def y(self, chunk: Chunk, x: Tensor, keep: bool, buffers: Buffers) -> Tensor:
        """Allocate the output of the SO(2) convolution."""
        shape = len(chunk), self.scalars + self.rows * self.hidden
        return x.new_empty(shape) if keep else buffers(*shape, dtype=x.dtype)

    def rotations(self, chunk: Chunk, dtype: torch.dtype, buffers: Buffers) -> Tensor:
        """Compute the dense rotations of a chunk, (E, rows, K)."""
        out = buffers(len(chunk), self.rows, self.layout.size, dtype=dtype)
        return self.layout.dense(chunk.rotations.to(dtype), self.rows, out)

    def short(self, w: Weights, x: Tensor) -> tuple[Weights, Tensor]:
        """Convert the weights of convolutions and the node features to the type of messages."""
        if self.dtype is None:
            return w, x
        return {n: v.to(self.dtype) if n.startswith(("convolution", "values")) else v for n, v in w.items()}, x.to(self.dtype)

    def convolve(self, task: Task, D: Tensor) -> Convolved:
        """Compute all steps up to the SO(2) convolution, which is `so2` of the message."""
        w, e, buffers = task.weights, task.e, task.buffers
        f, first, second = kernels.radial(w, basis := self.basis(task.chunk, buffers), task.chunk.pair)
        factors, norm, scalars = self.by_input(f), None, None
        if self.edge_norm:
            C, inverse = self.channels, kernels.inverse_norm(w, "edge_norm", e, buffers)
            scalars, mean, deviation = kernels.scalar_norm(w, "edge_norm", e[0])
            norm = inverse, mean, deviation, factors["e"][:, C:].clone()
            factors["e"][:, C:] *= inverse[:, None]
        return Convolved(basis, first, second, norm, kernels.scale_inputs(self.columns, task, D, scalars, factors))

    def convolve_again(self, task: Task, y: Tensor | None) -> tuple[Tensor, Convolved, Tensor]:
        """Recompute the rotations, the input of the convolution and, if it was not kept, its output y."""
        D = self.rotations(task.chunk, task.x.dtype, task.buffers)
        c = self.convolve(task, D)
        if y is None:
            so2(task.weights, "convolution", c.message.scaled, y := self.y(task.chunk, task.x, False, task.buffers))
        return D, c, y

    def by_input(self, f: Tensor) -> dict[str, Tensor]:
        """Split the output of the radial network into the factors of each input."""
        return dict(zip(self.widths, f.split(list(self.widths.values()), 1)))

    def convolve_adjoint(self, task: Task, c: Convolved, d_y: Tensor, d_e: Tensor | None, g: Gradients) -> Tensor:
        """Return the gradient of e, including the gradient d_e that reaches it on other paths."""
        w, e, buffers = task.weights, task.e, task.buffers
        d_scaled = buffers.like(c.message.scaled)
        so2_gradient(g.weights, "convolution", c.message.scaled, d_y)
        so2_transposed(w, "convolution", d_y, d_scaled)
        d_f = task.chunk.distances.new_zeros(len(task.chunk), sum(self.widths.values()))
        d_factors = self.by_input(d_f)
        own = kernels.scale_inputs_adjoint(self.layout, self.columns, task, c.message, d_scaled, d_factors, g)
        if c.norm is None:
            d_e = own if d_e is None else own + d_e
        else:
            inverse, mean, deviation, f = c.norm
            d_f_e = d_factors["e"][:, self.channels :]
            own[0] = kernels.scalar_norm_adjoint(w, g.weights, "edge_norm", e[0], mean, deviation, own[0])
            d_e = own.clone() if d_e is None else own + d_e
            kernels.inverse_norm_adjoint(w, "edge_norm", e, inverse, (d_f_e * f).sum(1), d_e)
            d_f_e *= inverse[:, None]
        self.radial_adjoint(task, g, c.basis, c.first, c.second, d_f)
        return d_e


class MessageSum(_MessageModule):
    """Sums of messages into atoms, (A, K, heads V), in the global frame.

    A message is an SO(2) convolution of [D x_j, D x_i, e], gated, convolved once more per head, weighted with the attention
    over the edges into i, and rotated back. The features of the first layer are scalars: only m = 0 occurs, and there are
    no weights for other m.
    """

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, first: bool):
        H, heads, V, alpha = c.hidden, c.heads, c.values, c.attention
        full, invariants = ((), ("j", "i", "e")) if first else (("j", "i", "e"), ())
        super().__init__(lmax, species, cutoff, c, full, invariants, lmax * H + heads * alpha, axial=first)
        self.heads, self.value_channels, self.first = heads, V, first
        self.values = nn.ModuleList(SO2Convolution(lmax, {"z": H}, {}, V, axial=first) for _ in range(heads))
        self.attention_norm = nn.LayerNorm(alpha)
        self.attention = nn.Parameter(torch.randn(heads, alpha) / alpha**0.5)

    def weights(self) -> Weights:
        w = super().weights()
        for h, values in enumerate(cast(Iterable[SO2Convolution], self.values)):
            w |= values.weights(f"values{h}")
        return w | {
            "attention": self.attention,
            "attention.norm.weight": self.attention_norm.weight,
            "attention.norm.bias": self.attention_norm.bias,
        }

    def attend(self, chunk: Chunk, w: Weights, scalars: Tensor, distances: Tensor) -> Tensor:
        """Compute softmax over the edges into each atom of a . leaky_relu(norm(s)), times the envelope of the distance.

        Returns (E, heads).
        """
        heads, alpha = w["attention"].shape
        s = scalars.to(distances.dtype).unflatten(1, (heads, alpha))
        s = layer_norm(s, [alpha], w["attention.norm.weight"], w["attention.norm.bias"], self.attention_norm.eps)
        logits = (leaky_relu(s, 0.2) * w["attention"]).sum(-1)
        lengths = torch.tensor(chunk.degrees, device=s.device)
        top = torch.segment_reduce(logits.detach(), "max", lengths=lengths, axis=0)
        weights = (logits - top[chunk.target]).exp()
        total = torch.segment_reduce(weights, "sum", lengths=lengths, axis=0)
        return weights / total[chunk.target] * envelope(distances, self.cutoff)[:, None]

    def outputs(self, graph: ChunkedGraph, x: Tensor) -> list[Tensor]:
        return [x.new_zeros(graph.atoms, (self.lmax + 1) ** 2, self.heads * self.value_channels)]

    def forward_chunk(self, task: Task, outputs: list[Tensor], keep: bool) -> Tensor | None:
        chunk, w, x, buffers = task.chunk, task.weights, task.x, task.buffers
        H, V = self.hidden, self.value_channels
        D, y = self.rotations(chunk, x.dtype, buffers), self.y(chunk, x, keep, buffers)
        with buffers:
            so2(w, "convolution", self.convolve(task, D).message.scaled, y)
        z = buffers(len(chunk), self.rows * H, dtype=x.dtype)
        kernels.edge_gate(self.gate_columns, y, (self.lmax + 1) * H, z)
        alpha = self.attend(chunk, w, y[:, (self.lmax + 1) * H : H + self.scalars], chunk.distances)
        v = short_v = buffers(len(chunk), self.rows, V, dtype=x.dtype)
        if self.dtype is not None:  # sums are computed in full precision
            D, v = self.rotations(chunk, buffers.dtype, buffers), buffers(*v.shape)
        for h in range(self.heads):
            so2(w, f"values{h}", z, short_v.flatten(1))
            torch.mul(short_v, alpha[:, h, None, None], out=v)
            aggregate(D, chunk, v, outputs[0][chunk.atoms, :, h * V : (h + 1) * V])
        return y if keep else None

    def adjoint_chunk(self, task: Task, kept: Tensor | None, d_outputs: Sequence[Tensor], g: Gradients) -> Tensor:
        D, c, y = self.convolve_again(task, kept)
        d_y = task.buffers.like(y)
        with task.buffers:
            if self.dtype is not None:
                D = self.rotations(task.chunk, task.buffers.dtype, task.buffers)
            self._attend_adjoint(task, y, D, d_outputs[0][task.chunk.atoms], d_y, g)
        return self.convolve_adjoint(task, c, d_y, None, g)

    def _attend_adjoint(self, task: Task, y: Tensor, D: Tensor, d_sums: Tensor, d_y: Tensor, g: Gradients) -> None:
        """Compute the gradient of y from the gradient of the sums (atoms, K, heads V)."""
        chunk, w, buffers = task.chunk, task.weights, task.buffers
        H, V = self.hidden, self.value_channels
        z = buffers(len(chunk), self.rows * H, dtype=y.dtype)
        factors = kernels.edge_gate(self.gate_columns, y, (self.lmax + 1) * H, z)
        own = slice((self.lmax + 1) * H, H + self.scalars)
        names = ("attention", "attention.norm.weight", "attention.norm.bias")
        with torch.enable_grad():  # there are few values here, so automatic differentiation is fast enough
            leaves = {name: w[name].detach().requires_grad_() for name in names}
            scalars, distances = (
                y[:, own].to(buffers.dtype, copy=True).requires_grad_(),
                chunk.distances.detach().requires_grad_(),
            )
            alpha = self.attend(chunk, leaves, scalars, distances)
        d_v, d_alpha = buffers(len(chunk), self.rows, V), torch.empty_like(alpha)
        short_d_v = buffers(*d_v.shape, dtype=y.dtype) if self.dtype is not None else d_v
        d_z, d_z_h = buffers.like(z).zero_(), buffers.like(z)
        for h in range(self.heads):
            name, d_sum, a = f"values{h}", d_sums[..., h * V : (h + 1) * V], alpha[:, h, None].detach()
            if g.rotations is not None:
                so2(w, name, z, short_d_v.flatten(1))
                d_D = torch.bmm(short_d_v * a[:, None], d_sum[chunk.target].transpose(1, 2))
                kernels.add_rotation_gradient(self.layout, chunk, d_D, g.rotations)
            aggregate_adjoint(D, chunk, d_sum, d_v)
            # the gradient of z without the factor alpha; its product with z, plus that of the bias, is the gradient of alpha
            so2_transposed(w, name, short_d_v.copy_(d_v).flatten(1), d_z_h)
            d_alpha[:, h] = torch.linalg.vecdot(d_z_h, z) + d_v[:, : self.lmax + 1].flatten(1) @ w[f"{name}.bias"].to(d_v.dtype)
            d_z.addcmul_(d_z_h, a)
            so2_gradient(g.weights, name, z, torch.mul(d_v, a[:, None], out=short_d_v).flatten(1))
        kernels.edge_gate_adjoint(self.gate_columns, y, factors, d_z, d_y)
        d_y[:, own], d_distance, *d_leaves = torch.autograd.grad(alpha, [scalars, distances, *leaves.values()], d_alpha)
        for name, d in zip(names, d_leaves):
            g.weights[name] += d
        if g.distances is not None:
            g.distances[chunk.edges] += d_distance


class EdgeUpdate(_MessageModule):
    """Update of edge features: e + linear(gate(SO(2) convolution of [D x_j, D x_i, e])), then a feed-forward layer.

    All operations are in the edge frame, by chunk (K, E, C).
    In the first update the edge features are scalars, (E, C), directly from their embedding. The last update reads out its
    edges as soon as they are finished and returns, instead of them, the coupled components (G, n) of the edges between any
    two elements.
    """

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, first: bool, slots: Slots | None = None):
        C, H = c.channels, c.hidden
        full, invariants = (("j", "i"), ("e",)) if first else (("j", "i", "e"), ())
        super().__init__(lmax, species, cutoff, c, full, invariants, lmax * H, axial=False)
        self.first = first
        self.out = DegreeLinear(lmax, H, C)
        self.feed_forward = FeedForward(lmax, C, c.feed_forward)
        self.readout = None if slots is None else EdgeReadout(lmax, C, slots)

    def constants(self) -> Weights:
        c = super().constants() | self.feed_forward.norm.constants("ff.norm")
        return c | self.readout.constants() if self.readout else c

    def weights(self) -> Weights:
        rows = self.layout.degree.to(self.out.weight.device)
        w = super().weights() | {"out": self.out.weight[rows], "out.bias": self.out.bias} | self.feed_forward.weights("ff")
        return w | self.readout.weights() if self.readout else w

    def outputs(self, graph: ChunkedGraph, x: Tensor) -> list[Tensor]:
        if self.readout is None:
            return [x.new_empty(self.rows, 0, self.channels)] * len(graph.spans)  # replaced chunk by chunk
        return [x.new_zeros(p.scale.shape) for p in graph.pairs.values()]

    def _gated(self, task: Task, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute u = e + linear(gate(y)).

        Returns the gated y (K, E, H), the factors, and the edge-first output of the gate, which serves as a buffer.
        """
        w, edges, buffers = task.weights, len(y), task.buffers
        z, gated = buffers(self.rows, edges, self.hidden), buffers(edges, self.rows, self.hidden, dtype=y.dtype)
        factors = kernels.edge_gate(self.gate_columns, y, (self.lmax + 1) * self.hidden, gated.view(edges, -1))
        z.copy_(gated.transpose(0, 1))
        if self.first:
            u[0], u[1:] = task.e, 0
        else:
            u.copy_(task.e)
        u.baddbmm_(z, w["out"])
        u[0] += w["out.bias"]
        return z, factors, gated

    def forward_chunk(self, task: Task, outputs: list[Tensor], keep: bool) -> Tensor | None:
        chunk, w, x, buffers = task.chunk, task.weights, task.x, task.buffers
        y = self.y(chunk, x, keep, buffers)
        with buffers:
            D = self.rotations(chunk, x.dtype, buffers)
            so2(w, "convolution", self.convolve(task, D).message.scaled, y)
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
        kernels.edge_gate_adjoint(self.gate_columns, y, factors, d_gated.view(len(task.chunk), -1), d_y)
