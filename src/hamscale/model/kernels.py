"""Compute the operations on a chunk of edges, forward and adjoint, in hand-written form.

Automatic differentiation of the same operations takes about twice the time and ten times the memory: it keeps every
intermediate, fills slices with zeros, and each fresh tensor costs page faults. Here the tensors of a chunk are stored in
buffers that are reused (chunks.py), the adjoint recomputes cheap intermediates, and gradients of weights are accumulated in
place. `tests/model/slow_network.py` is the same network in its slow and obvious form, whose outputs and gradients these
functions must reproduce.

Shapes: see model/rotations.py. Edge features of a chunk are row-first, (R, E, C): every run of rows is a stack of matrices
(E, C), so that an operation on each group is a batched product, and a scaling of each group is contiguous. Messages are
edge-first, (E, R, C'): all rows of one product of an SO(2) convolution are consecutive numbers of an edge.
w: weights by name. g: the gradients of the weights, to which the adjoints add.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from .chunks import Buffers, Chunk, Gradients, Task, Weights
from .layers import NORM_EPS, SCALAR_EPS
from .rotations import PARITIES, Layout


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


# ----------------------------------------------------------------------------------------------------------- group operations


def scale_groups(layout: Layout, x: Tensor, factors: Tensor, out: Tensor) -> None:
    """Multiply every group with its factor: x, out (R, E, C), factors (G, E, C).

    The operation is in place if out is x.
    """
    row = 0
    for group, rows in layout.runs:
        torch.mul(x[row : row + rows], factors[group : group + rows], out=out[row : row + rows])
        row += rows


def scale_groups_adjoint(layout: Layout, x: Tensor, d_out: Tensor, d_factors: Tensor) -> None:
    """Add the gradient of the factors to d_factors; the gradient of x is `scale_groups` of d_out."""
    row = 0
    for group, rows in layout.runs:
        d_factors[group : group + rows].addcmul_(x[row : row + rows], d_out[row : row + rows])
        row += rows


# Norms: `layers.Norm` without its scales, which are multiplied into the weights of the next layer.


def inverse_norm(w: Weights, name: str, x: Tensor, buffers: Buffers) -> Tensor:
    """Compute, for each edge, the inverse of the common root mean square of all groups but the scalars: x (R, E, C) -> (E,)."""
    rows, edges, channels = x.shape
    with buffers:
        square = torch.mul(x, x, out=buffers.like(x))
        power = (w[f"{name}.balance"] @ square.view(rows, -1)).view(edges, channels).mean(1)
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
    """Write the norm of x (R, E, C) to out; returns the values that the adjoint needs."""
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
    """Compute out = x + W2 gate(W1 norm(x)) per group, (R, E, C); out may be x.

    Returns the values that the adjoint needs; they are valid only if `keep` is true.
    """
    rows, edges, _ = x.shape
    normed = buffers.like(x)
    saved = norm(w, "ff.norm", x, normed, buffers)
    up = buffers(rows, edges, w["ff.up"].shape[2])
    torch.bmm(normed, w["ff.up"], out=up)
    up[0] += w["ff.up.bias"]
    gates = buffers(layout.groups, *up.shape[1:])
    gates[0] = up[0]  # silu(y) = y sigmoid(y)
    torch.baddbmm(w["ff.gates.bias"][:, None], normed[:1].expand(layout.groups - 1, -1, -1), w["ff.gates"], out=gates[1:])
    gates.sigmoid_()
    gated = buffers.like(up) if keep else up
    scale_groups(layout, up, gates, gated)
    if out is not None:
        torch.baddbmm(x, gated, w["ff.down"], out=out)
        out[0] += w["ff.down.bias"]
    return normed, saved, up, gates, gated


def feed_forward_adjoint(
    layout: Layout, w: Weights, g: Weights, x: Tensor, forward: tuple, d_out: Tensor, buffers: Buffers
) -> None:
    """Turn d_out (R, E, C) into the gradient of x, through both the feed-forward layer and its residual connection."""
    normed, saved, up, gates, gated = forward
    g["ff.down"].baddbmm_(gated.transpose(1, 2), d_out)
    g["ff.down.bias"] += d_out[0].sum(0)
    d_gated = torch.bmm(d_out, w["ff.down"].transpose(1, 2), out=gated)  # overwrites gated, which is not needed any more
    with buffers:
        d_gates = buffers.like(gates).zero_()
        scale_groups_adjoint(layout, up, d_gated, d_gates)
        scale_groups(layout, d_gated, gates, d_gated)
        d_gates = torch.ops.aten.sigmoid_backward(d_gates, gates)
        d_gated[0] += d_gates[0]
        g["ff.up"].baddbmm_(normed.transpose(1, 2), d_gated)
        g["ff.up.bias"] += d_gated[0].sum(0)
        g["ff.gates"].baddbmm_(normed[:1].expand(layout.groups - 1, -1, -1).transpose(1, 2), d_gates[1:])
        g["ff.gates.bias"] += d_gates[1:].sum(1)
        d_normed = torch.bmm(d_gated, w["ff.up"].transpose(1, 2), out=buffers.like(x))
        d_normed[0] += torch.bmm(d_gates[1:], w["ff.gates"].transpose(1, 2)).sum(0)
        norm_adjoint(w, g, "ff.norm", x, saved, d_normed, d_out, buffers)


# ---------------------------------------------------------------------------------------------------------- SO(2) convolutions


def _products(layout: Layout, w: Weights, name: str, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (product, weight, columns of x, columns of y); the columns of successive products follow one another."""
    row, column = 0, 0
    for product, _ in layout.products:
        if (weight := w.get(f"{name}.{product}")) is not None:
            rows, columns = weight.shape
            yield product, weight, x[:, row : row + rows], y[:, column : column + columns]
            row, column = row + rows, column + columns


def so2(layout: Layout, w: Weights, name: str, x: Tensor, out: Tensor) -> None:
    """Compute all products of an SO(2) convolution: x (E, columns) -> out (E, columns)."""
    for product, weight, a, target in _products(layout, w, name, x, out):
        if product == "0n":
            torch.addmm(w[f"{name}.bias"], a, weight, out=target)
        else:
            torch.mm(a, weight, out=target)


def so2_transposed(layout: Layout, w: Weights, name: str, d_out: Tensor, d_x: Tensor) -> None:
    """Compute the gradient of the input of `so2`."""
    for _, weight, target, d in _products(layout, w, name, d_x, d_out):
        torch.mm(d, weight.T, out=target)


def so2_gradient(layout: Layout, g: Weights, name: str, x: Tensor, d_out: Tensor) -> None:
    """Add the gradient of the weights of `so2`."""
    for product, gradient, a, d in _products(layout, g, name, x, d_out):
        add_product(gradient, a.T, d)
        if product == "0n":
            g[f"{name}.bias"] += d.sum(0)


class Columns:
    """Positions of the values of each group in edge-first rows (E, columns), run by run.

    runs: (first factor, columns here, columns there). Factors per group and channel are applied from the column `first
    factor` on. "Here" are the rows of one input; "there" are the same values in a row that also holds other values.
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


def joined_columns(layout: Layout, channels: int, ends: str, edge: bool) -> dict[str, Columns]:
    """Place the inputs of a message side by side, one product of the SO(2) convolution after the other.

    ends: of "n" and "u", the natural and the unnatural features of both ends of an edge, 2 C channels each, those that there
    are; if there are none, the input "ends" are their scalars. edge: whether the input "e" has all groups or is scalars.
    """
    c, L = channels, layout.lmax
    columns = {name: Columns() for name in ends or ("ends",)} | {"e": Columns()}
    there, row = 0, 0

    def place(name: str, factor: int, here: int, size: int) -> None:
        nonlocal there
        columns[name].runs.append((factor, slice(here, here + size), slice(there, there + size)))
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
    return columns


def gate_columns(layout: Layout, channels: int, scalars: int, axial: bool) -> Columns:
    """Build the columns of a gate, between its output ("here") and its input ("there").

    The output has the rows of an edge; if `axial` is true, only natural ones of m = 0. The input has the natural scalars,
    then `scalars` other values, then all other rows.
    """
    columns = Columns()
    columns.runs.append((0, slice(0, channels), slice(0, channels)))
    for p, m, row, n in layout.placed_runs(axial):
        skipped = 1 if row == 0 else 0  # the natural scalars have their place already
        own = slice((row + skipped) * channels, (row + n) * channels)
        factor = (layout.group(p, abs(m)) + skipped) * channels
        columns.runs.append((factor, own, slice(own.start + scalars, own.stop + scalars)))
    return columns


def rotated_columns(layout: Layout, channels: int, axial: bool) -> list[Columns]:
    """Build, for each parity, the columns between rows in the order of rotations ("here") and in that of edges ("there").

    If `axial` is true there are only natural rows of m = 0.
    """
    columns = [Columns() for _ in PARITIES[: 1 if axial else None]]
    for p, m, row, n in layout.placed_runs(axial):
        here, there = layout.rotated_row[m] * channels, row * channels
        columns[p].runs.append((abs(m) * channels, slice(here, here + n * channels), slice(there, there + n * channels)))
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

    inputs: n and u, D x of both ends, natural and unnatural, edge-first (E, K 2C), n alone, or ends, their scalars (E, 2C);
    e, the features of the edge, edge-first (E, R C), or its scalars (E, C).
    gathered: features of both ends before they are rotated, of each parity (E, 2C, K); empty for scalars.
    factors: for each input the factor of each degree, or group, and channel.
    scaled: the inputs times their factors, side by side.
    """

    D: Tensor
    inputs: dict[str, Tensor]
    gathered: list[Tensor]
    factors: dict[str, Tensor]
    scaled: Tensor


def gather_ends(task: Task, x: Tensor, width: int) -> Tensor:
    """Copy the features x (A, width) of both ends of every edge: the source's, then the target's, (E, 2 width)."""
    chunk = task.chunk
    ends = torch.stack([chunk.source, chunk.target + chunk.atoms.start], 1).flatten()
    out = task.buffers(2 * len(chunk), width, dtype=x.dtype)
    return torch.index_select(x, 0, ends, out=out).view(len(chunk), 2 * width)


def scatter_ends(task: Task, d_ends: Tensor, d_x: Tensor) -> None:
    """Add the gradient of `gather_ends` to d_x (A, width)."""
    chunk = task.chunk
    ends = torch.stack([chunk.source, chunk.target + chunk.atoms.start], 1).flatten()
    d_x.index_add_(0, ends, d_ends.view(len(ends), -1).to(d_x.dtype))


def scale_inputs(
    columns: dict[str, Columns], task: Task, D: Tensor, scalars: Tensor | None, factors: dict[str, Tensor]
) -> ScaledInputs:
    """Build the inputs of the messages of a chunk from the features of sources, targets and edges.

    task.x: (2, A, C, K), natural and unnatural, normed, or natural alone (1, A, C, K), or scalars (A, C). task.e: (R, E, C), or
    scalars (E, C).
    D and x have the type of messages, which may be shorter than that of e and the factors.
    scalars: the normed values that replace the scalars of e; None if e are scalars.
    """
    chunk, x, e, buffers = task.chunk, task.x, task.e, task.buffers
    edges, gathered = len(chunk), []
    if x.dim() == 2:
        inputs = {"ends": gather_ends(task, x, x.shape[1])}
    else:
        C, K = x.shape[2:]
        inputs = {}
        for name, of_parity in zip("nu", x):
            gathered.append(gather_ends(task, of_parity.view(-1, C * K), C * K).view(edges, 2 * C, K))
            rotated = buffers(edges, K, 2 * C, dtype=x.dtype)
            inputs[name] = torch.bmm(D, gathered[-1].transpose(1, 2), out=rotated).view(edges, -1)
    if scalars is None:
        inputs["e"] = e
    else:
        inputs["e"] = buffers(edges, *e.shape[::2], dtype=x.dtype).copy_(e.transpose(0, 1)).view(edges, -1)
        inputs["e"][:, : e.shape[2]] = scalars
    scaled = buffers(edges, sum(value.shape[1] for value in inputs.values()), dtype=x.dtype)
    for name, value in inputs.items():
        columns[name].scale(value, factors[name], scaled)
    return ScaledInputs(D, inputs, gathered, factors, scaled)


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
    edges = len(chunk)
    d: dict[str, Tensor] = {}
    for name, value in forward.inputs.items():
        d[name] = buffers.like(value)
        columns[name].scale_adjoint(value, d_scaled, d_factors[name])
        columns[name].scale_back(d_scaled, forward.factors[name], d[name])
    if x.dim() == 2:
        scatter_ends(task, d["ends"], g.x)
    else:
        C, K = x.shape[2:]
        for name, d_x, gathered in zip("nu", g.x, forward.gathered):
            d_rotated = d[name].view(edges, K, 2 * C)
            if g.rotations is not None:
                add_rotation_gradient(layout, chunk, d_rotated @ gathered, g.rotations)
            d_gathered = torch.bmm(d_rotated.transpose(1, 2), forward.D, out=buffers(edges, 2 * C, K, dtype=x.dtype))
            scatter_ends(task, d_gathered, d_x.view(-1, C * K))
    if task.e.dim() == 2:
        return d["e"].clone()
    rows, _, C = task.e.shape
    return buffers(rows, edges, C).copy_(d["e"].view(edges, rows, C).transpose(0, 1))


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
