"""Compute the operations on a chunk of edges, forward and adjoint, in hand-written form.

Automatic differentiation of the same operations takes about twice the time and ten times the memory: it keeps every
intermediate, fills slices with zeros, and each fresh tensor costs page faults. Here the tensors of a chunk are stored in
buffers that are reused (chunks.py), the adjoint recomputes cheap intermediates, and gradients of weights are accumulated in
place. `tests/model/slow_network.py` is the same network in its slow and obvious form, whose outputs and gradients these
functions must reproduce.

Shapes: see model/rotations.py. Edge features of a chunk are row-first, (K, E, C): every run of rows is a stack of matrices
(E, C), so that an operation on each degree is a batched product, and a scaling of each degree is contiguous. Messages are
edge-first, (E, K, C'): all rows of one |m| of an edge are consecutive numbers, which form the row of one product of the
SO(2) convolution.
w: weights by name. g: the gradients of the weights, to which the adjoints add.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from .chunks import Buffers, Chunk, Gradients, Task, Weights
from .layers import NORM_EPS, SCALAR_EPS
from .rotations import Layout


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product a b to target; half-precision factors are multiplied in it and added in the precision of target."""
    if a.dtype == target.dtype:
        target.addmm_(a, b)
    else:
        target += a @ b


# ------------------------------------------------------------------------------------------------------------- radial network


def radial(w: Weights, basis: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the radial network W3 silu(W2 silu(W1 basis + b1[pair]) + b2) + b3, (E, n) -> (E, outputs).

    Returns the result and the two arguments of silu.
    """
    first = torch.addmm(w["radial.pair"].index_select(0, pair), basis, w["radial.first"])
    second = torch.addmm(w["radial.hidden.bias"], silu(first), w["radial.hidden"])
    return torch.addmm(w["radial.out.bias"], silu(second), w["radial.out"]), first, second


def radial_adjoint(w: Weights, g: Weights, basis: Tensor, pair: Tensor, first: Tensor, second: Tensor, d_out: Tensor) -> Tensor:
    """Add the gradients of the weights and return the gradient of the first argument of silu.

    The gradient of the basis follows from the returned gradient.
    """
    g["radial.out"].addmm_(silu(second).T, d_out)
    g["radial.out.bias"] += d_out.sum(0)
    d_second = torch.ops.aten.silu_backward(d_out @ w["radial.out"].T, second)
    g["radial.hidden"].addmm_(silu(first).T, d_second)
    g["radial.hidden.bias"] += d_second.sum(0)
    d_first = torch.ops.aten.silu_backward(d_second @ w["radial.hidden"].T, first)
    g["radial.first"].addmm_(basis.T, d_first)
    g["radial.pair"].index_add_(0, pair, d_first)
    return d_first


# ---------------------------------------------------------------------------------------------------------- degree operations


def scale_degrees(layout: Layout, x: Tensor, factors: Tensor, out: Tensor) -> None:
    """Multiply every degree with its factor, out_lm = x_lm f_l: x, out (K, E, C), factors (lmax+1, E, C).

    The operation is in place if out is x.
    """
    for l, a, target in zip(layout.run_degree, x.split(layout.run_rows), out.split(layout.run_rows)):
        torch.mul(a, factors[l:], out=target)


def scale_degrees_adjoint(layout: Layout, x: Tensor, d_out: Tensor, d_factors: Tensor) -> None:
    """Add the gradient of the factors to d_factors; the gradient of x is `scale_degrees` of d_out."""
    for l, a, d in zip(layout.run_degree, x.split(layout.run_rows), d_out.split(layout.run_rows)):
        d_factors[l:].addcmul_(a, d)


# Norms: `layers.Norm` without its scales of l > 0, which are multiplied into the weights of the next layer.


def inverse_norm(w: Weights, name: str, x: Tensor, buffers: Buffers) -> Tensor:
    """Compute, for each edge, the inverse of the common root mean square of the degrees l > 0: x (K, E, C) -> (E,)."""
    K, edges, channels = x.shape
    with buffers:
        square = torch.mul(x, x, out=buffers.like(x))
        power = (w[f"{name}.balance"] @ square.view(K, -1)).view(edges, channels).mean(1)
    return power.add_(NORM_EPS).rsqrt_()


def inverse_norm_adjoint(w: Weights, name: str, x: Tensor, inverse: Tensor, d_inverse: Tensor, d_x: Tensor) -> None:
    along = d_inverse * inverse**3 / -x.shape[2]
    d_x.addcmul_(x, (w[f"{name}.balance"][:, None] * along)[:, :, None])


def scalar_norm(w: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the layer norm of the scalars (E, C); also returns the mean and inverse deviation that the adjoint needs."""
    return torch.native_layer_norm(x, [x.shape[1]], w[f"{name}.scalar.weight"], w[f"{name}.scalar.bias"], SCALAR_EPS)


def scalar_norm_adjoint(w: Weights, g: Weights, name: str, x: Tensor, mean: Tensor, deviation: Tensor, d_out: Tensor) -> Tensor:
    d_x, scale, shift = torch.ops.aten.native_layer_norm_backward(
        d_out, x, [x.shape[1]], mean, deviation, w[f"{name}.scalar.weight"], w[f"{name}.scalar.bias"], [True] * 3
    )
    g[f"{name}.scalar.weight"] += scale
    g[f"{name}.scalar.bias"] += shift
    return d_x


def norm(w: Weights, name: str, x: Tensor, out: Tensor, buffers: Buffers) -> tuple:
    """Write the norm of x (K, E, C) to out; returns the values that the adjoint needs."""
    inverse = inverse_norm(w, name, x, buffers)
    torch.mul(x, inverse[:, None], out=out)
    out[0], mean, deviation = scalar_norm(w, name, x[0])
    return inverse, mean, deviation


def norm_adjoint(
    w: Weights, g: Weights, name: str, x: Tensor, saved: tuple, d_out: Tensor, d_x: Tensor, buffers: Buffers
) -> None:
    """Add the gradient of x to d_x, which must not be the same tensor as d_out."""
    inverse, mean, deviation = saved
    with buffers:
        d_inverse = torch.mul(d_out[1:], x[1:], out=buffers.like(x[1:])).sum((0, 2))
    d_x[0] += scalar_norm_adjoint(w, g, name, x[0], mean, deviation, d_out[0])
    d_x[1:].addcmul_(d_out[1:], inverse[:, None])
    inverse_norm_adjoint(w, name, x, inverse, d_inverse, d_x)


def feed_forward(layout: Layout, w: Weights, x: Tensor, out: Tensor | None, buffers: Buffers, keep: bool = True) -> tuple:
    """Compute out = x + W2 gate(W1 norm(x)) per degree, (K, E, C); out may be x.

    Returns the values that the adjoint needs; they are valid only if `keep` is true.
    """
    K, edges, _ = x.shape
    normed = buffers.like(x)
    saved = norm(w, "ff.norm", x, normed, buffers)
    up = buffers(K, edges, w["ff.up"].shape[2])
    torch.bmm(normed, w["ff.up"], out=up)
    up[0] += w["ff.up.bias"]
    gates = buffers(layout.lmax + 1, *up.shape[1:])
    gates[0] = up[0]  # silu(y) = y sigmoid(y)
    torch.baddbmm(w["ff.gates.bias"][:, None], normed[:1].expand(layout.lmax, -1, -1), w["ff.gates"], out=gates[1:])
    gates.sigmoid_()
    gated = buffers.like(up) if keep else up
    scale_degrees(layout, up, gates, gated)
    if out is not None:
        torch.baddbmm(x, gated, w["ff.down"], out=out)
        out[0] += w["ff.down.bias"]
    return normed, saved, up, gates, gated


def feed_forward_adjoint(
    layout: Layout, w: Weights, g: Weights, x: Tensor, forward: tuple, d_out: Tensor, buffers: Buffers
) -> None:
    """Turn d_out (K, E, C) into the gradient of x, through both the feed-forward layer and its residual connection."""
    normed, saved, up, gates, gated = forward
    g["ff.down"].baddbmm_(gated.transpose(1, 2), d_out)
    g["ff.down.bias"] += d_out[0].sum(0)
    d_gated = torch.bmm(d_out, w["ff.down"].transpose(1, 2), out=gated)  # overwrites gated, which is not needed any more
    with buffers:
        d_gates = buffers.like(gates).zero_()
        scale_degrees_adjoint(layout, up, d_gated, d_gates)
        scale_degrees(layout, d_gated, gates, d_gated)
        d_gates = torch.ops.aten.sigmoid_backward(d_gates, gates)
        d_gated[0] += d_gates[0]
        g["ff.up"].baddbmm_(normed.transpose(1, 2), d_gated)
        g["ff.up.bias"] += d_gated[0].sum(0)
        g["ff.gates"].baddbmm_(normed[:1].expand(layout.lmax, -1, -1).transpose(1, 2), d_gates[1:])
        g["ff.gates.bias"] += d_gates[1:].sum(1)
        d_normed = torch.bmm(d_gated, w["ff.up"].transpose(1, 2), out=buffers.like(x))
        d_normed[0] += torch.bmm(d_gates[1:], w["ff.gates"].transpose(1, 2)).sum(0)
        norm_adjoint(w, g, "ff.norm", x, saved, d_normed, d_out, buffers)


# ---------------------------------------------------------------------------------------------------------- SO(2) convolutions


def _products(w: Weights, name: str, x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (m, weight, columns of x, columns of y) for each |m|; the columns of successive |m| follow one another."""
    m, row, column = 0, 0, 0
    while (weight := w.get(f"{name}.{m}")) is not None:
        rows, columns = weight.shape
        yield m, weight, x[:, row : row + rows], y[:, column : column + columns]
        m, row, column = m + 1, row + rows, column + columns


def so2(w: Weights, name: str, x: Tensor, out: Tensor) -> None:
    """Compute one product per |m|: x (E, columns) -> out (E, columns); the columns of successive |m| follow one another."""
    for m, weight, a, target in _products(w, name, x, out):
        if m == 0:
            torch.addmm(w[f"{name}.bias"], a, weight, out=target)
        else:
            torch.mm(a, weight, out=target)


def so2_transposed(w: Weights, name: str, d_out: Tensor, d_x: Tensor) -> None:
    """Compute the gradient of the input of `so2`."""
    for _, weight, target, d in _products(w, name, d_x, d_out):
        torch.mm(d, weight.T, out=target)


def so2_gradient(g: Weights, name: str, x: Tensor, d_out: Tensor) -> None:
    """Add the gradient of the weights of `so2`."""
    for m, gradient, a, d in _products(g, name, x, d_out):
        add_product(gradient, a.T, d)
        if m == 0:
            g[f"{name}.bias"] += d.sum(0)


class Columns:
    """Positions of the values of each degree in edge-first rows (E, columns), run by run.

    runs: (first factor, columns here, columns there). Factors per degree and channel, (E, (lmax+1) C), are applied from the
    column `first factor` on. "Here" are the rows of one input, m-major; "there" are the same values in a row that also holds
    other values.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, slice, slice]] = []

    def scale(self, here: Tensor, factors: Tensor, there: Tensor) -> None:
        """Set there = here, times the factor of each degree."""
        for first, own, other in self.runs:
            torch.mul(here[:, own], factors[:, first : first + own.stop - own.start], out=there[:, other])

    def scale_back(self, there: Tensor, factors: Tensor, here: Tensor) -> None:
        for first, own, other in self.runs:
            torch.mul(there[:, other], factors[:, first : first + own.stop - own.start], out=here[:, own])

    def scale_adjoint(self, here: Tensor, d_there: Tensor, d_factors: Tensor) -> None:
        """Add the gradient of the factors to d_factors; the gradient of here is `scale_back` of d_there."""
        for first, own, other in self.runs:
            d_factors[:, first : first + own.stop - own.start].addcmul_(here[:, own], d_there[:, other])


def joined_columns(layout: Layout, inputs: dict[str, bool], channels: int) -> dict[str, Columns]:
    """Place several inputs side by side, one |m| after the other: the factor of one product per |m|.

    inputs: for each input, true if it has all degrees, false if it has scalars only.
    """
    columns, there = {name: Columns() for name in inputs}, 0
    here = dict.fromkeys(inputs, 0)
    for m in range(layout.lmax + 1):
        for name, full in inputs.items():
            if not full and m:
                continue
            rows = layout.lmax + 1 - m if full else 1
            for _ in range(1 if m == 0 else 2):
                own = slice(here[name], here[name] + rows * channels)
                columns[name].runs.append((m * channels, own, slice(there, there + rows * channels)))
                here[name], there = own.stop, there + rows * channels
    return columns


def gate_columns(layout: Layout, channels: int, scalars: int, axial: bool) -> Columns:
    """Build the columns of a gate, between its output ("here") and its input ("there").

    The output has the rows, m-major. If `axial` is true, only the m = 0 components are kept. The input has the l = 0
    channels, then `scalars` other values, then the rows of l > 0.
    """
    columns = Columns()
    columns.runs.append((0, slice(0, channels), slice(0, channels)))
    here = channels
    for k, (l, rows) in enumerate(zip(layout.run_degree, layout.run_rows)):
        if not (axial and k):
            l, rows = (1, rows - 1) if k == 0 else (l, rows)
            own = slice(here, here + rows * channels)
            columns.runs.append((l * channels, own, slice(own.start + scalars, own.stop + scalars)))
            here = own.stop
    return columns


def edge_gate(columns: Columns, y: Tensor, n_factors: int, out: Tensor) -> Tensor:
    """Apply silu to l = 0, and sigmoid(gate_l) y_l to the other degrees: y (E, columns there) -> out (E, columns here).

    The gates follow the l = 0 channels in y. Returns the factors, which are the sigmoids (E, n_factors) of both.
    """
    factors = torch.sigmoid(y[:, :n_factors])
    columns.scale_back(y, factors, out)
    return factors


def edge_gate_adjoint(columns: Columns, y: Tensor, factors: Tensor, d_out: Tensor, d_y: Tensor) -> None:
    """Write the gradient of y to d_y, in all columns except those of scalars that are not gates."""
    d_factors, channels = torch.zeros_like(factors), columns.runs[0][1].stop
    columns.scale_adjoint(d_out, y, d_factors)
    columns.scale(d_out, factors, d_y)
    d_factors = torch.ops.aten.sigmoid_backward(d_factors, factors)
    d_y[:, :channels] += d_factors[:, :channels]
    d_y[:, channels : factors.shape[1]] = d_factors[:, channels:]


# ------------------------------------------------------------------------------------------------------------------- messages


@dataclass
class ScaledInputs:
    """Inputs of a message convolution and their scaled form.

    inputs: j is D x_j, i is D x_i, e the features of the edge, edge-first (E, K C), or (E, C) if there are only scalars.
    factors: for each input the factor of each degree and channel, (E, (lmax+1) C) or (E, C).
    scaled: the inputs times their factors, side by side.
    """

    D: Tensor
    inputs: dict[str, Tensor]
    factors: dict[str, Tensor]
    scaled: Tensor


def scale_inputs(
    columns: dict[str, Columns], task: Task, D: Tensor, scalars: Tensor | None, factors: dict[str, Tensor]
) -> ScaledInputs:
    """Build the inputs of the messages of a chunk from the features of sources, targets and edges.

    task.x (A, K, C): l-major, normed. task.e (K, E, C). Either may be scalars, (A, C) and (E, C).
    D and x have the type of messages, which may be shorter than that of e and the factors.
    scalars: the normed values that replace the scalars of e; None if e are scalars.
    """
    chunk, x, e, buffers = task.chunk, task.x, task.e, task.buffers
    edges, C = len(chunk), x.shape[-1]
    if x.dim() == 2:
        inputs = {"j": x[chunk.source], "i": x[chunk.atoms][chunk.target]}
    else:
        K = x.shape[1]
        inputs = {"j": buffers(edges, K * C, dtype=x.dtype), "i": buffers(edges, K * C, dtype=x.dtype)}
        with buffers:
            x_j = torch.index_select(x, 0, chunk.source, out=buffers(edges, K, C, dtype=x.dtype))
            torch.bmm(D, x_j, out=inputs["j"].view(edges, K, C))
        # all edges of an atom rotate the same x_i: one product (degree K, K) (K, C)
        rows = [degree * K for degree in chunk.degrees]
        for d, r, x_i in zip(D.view(-1, K).split(rows), inputs["i"].view(-1, C).split(rows), x[chunk.atoms]):
            torch.mm(d, x_i, out=r)
    if scalars is None:
        inputs["e"] = e
    else:
        inputs["e"] = buffers(edges, len(e), C, dtype=x.dtype).copy_(e.transpose(0, 1)).view(edges, -1)
        inputs["e"][:, :C] = scalars
    scaled = buffers(edges, sum(value.shape[1] for value in inputs.values()), dtype=x.dtype)
    for name, value in inputs.items():
        columns[name].scale(value, factors[name], scaled)
    return ScaledInputs(D, inputs, factors, scaled)


def scale_inputs_adjoint(
    layout: Layout,
    columns: dict[str, Columns],
    task: Task,
    forward: ScaledInputs,
    d_scaled: Tensor,
    d_factors: dict[str, Tensor],
    g: Gradients,
) -> Tensor:
    """Return the gradient of e; the gradients of the factors, x and the packed rotations are added to d_factors and g."""
    chunk, x, buffers = task.chunk, task.x, task.buffers
    edges, C = len(chunk), x.shape[-1]
    d: dict[str, Tensor] = {}
    for name, value in forward.inputs.items():
        d[name] = buffers.like(value)
        columns[name].scale_adjoint(value, d_scaled, d_factors[name])
        columns[name].scale_back(d_scaled, forward.factors[name], d[name])
    if x.dim() == 2:
        g.x.index_add_(0, chunk.source, d["j"].to(g.x.dtype))
        g.x[chunk.atoms].index_add_(0, chunk.target, d["i"].to(g.x.dtype))
    else:
        K = x.shape[1]
        if g.rotations is not None:
            d_D = d["j"].view(edges, K, C) @ x[chunk.source].transpose(1, 2)
            d_D = d_D + d["i"].view(edges, K, C) @ x[chunk.atoms][chunk.target].transpose(1, 2)
            add_rotation_gradient(layout, chunk, d_D, g.rotations)
        with buffers:
            d_x_j = torch.bmm(forward.D.transpose(1, 2), d["j"].view(edges, K, C), out=buffers(edges, K, C, dtype=x.dtype))
            g.x.index_add_(0, chunk.source, d_x_j.to(g.x.dtype))
        rows = [degree * K for degree in chunk.degrees]
        for D, r, target in zip(forward.D.view(-1, K).split(rows), d["i"].view(-1, C).split(rows), g.x[chunk.atoms]):
            add_product(target, D.T, r)
    if d["e"].shape[1] == C:
        return d["e"].clone()
    return buffers(d["e"].shape[1] // C, edges, C).copy_(d["e"].view(edges, -1, C).transpose(0, 1))


def add_rotation_gradient(layout: Layout, chunk: Chunk, d_D: Tensor, d_rotations: Tensor) -> None:
    """Add the gradient d_D (E, rows, K) of the dense matrices to that of the packed ones."""
    dense = d_D.new_zeros(len(d_D), layout.size, layout.size)
    dense[:, : d_D.shape[1]] = d_D
    d_rotations[chunk.edges, :-1] += dense.flatten(1)[:, layout.dense_index.to(dense.device)]


def aggregate(D: Tensor, chunk: Chunk, values: Tensor, out: Tensor) -> None:
    """Rotate back and sum over the edges into each atom: D (E, rows, K), values (E, rows, V) -> out (atoms, K, V)."""
    K, V = D.shape[2], values.shape[2]
    # one product (K, degree rows) (degree rows, V) per atom
    rows = [degree * D.shape[1] for degree in chunk.degrees]
    for d, v, target in zip(D.view(-1, K).split(rows), values.view(-1, V).split(rows), out):
        torch.mm(d.T, v, out=target)


def aggregate_adjoint(D: Tensor, chunk: Chunk, d_out: Tensor, d_values: Tensor) -> None:
    K, V = D.shape[2], d_values.shape[2]
    rows = [degree * D.shape[1] for degree in chunk.degrees]
    for d, v, d_target in zip(D.view(-1, K).split(rows), d_values.view(-1, V).split(rows), d_out):
        torch.mm(d, d_target, out=v)
