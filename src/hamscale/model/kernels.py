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

from .chunks import Buffers, Chunk, Gradients, Task, Way, Weights
from .columns import Columns, Joined, JoinedColumns
from .layers import NORM_EPS, SCALAR_EPS
from .rotations import PARITIES, DenseRotations, Layout


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product a b to target; half-precision factors are multiplied in it and added in the precision of target."""
    if a.dtype != target.dtype:
        target += a @ b
    elif a.dim() == 3:
        target.baddbmm_(a, b)
    else:
        target.addmm_(a, b)


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
    of_degrees = factors.unflatten(0, (len(PARITIES), -1))
    for (m, rows), (_, result) in zip(layout.orders(x), layout.orders(out)):
        torch.mul(rows, of_degrees[:, m:], out=result)


def scale_groups_adjoint(layout: Layout, x: Tensor, d_out: Tensor, d_factors: Tensor) -> None:
    """Write the gradient of the factors to d_factors; the gradient of x is `scale_groups` of d_out."""
    of_degrees = d_factors.unflatten(0, (len(PARITIES), -1))
    for (m, rows), (_, d_rows) in zip(layout.orders(x), layout.orders(d_out)):
        for of_sign, d_of_sign in zip(rows, d_rows):
            if m == 0:  # has all degrees
                torch.mul(of_sign, d_of_sign, out=of_degrees)
            else:
                of_degrees[:, m:].addcmul_(of_sign, d_of_sign)


# Norms: `layers.Norm` without its scales, which are multiplied into the weights of the next layer.


def inverse_norm(w: Weights, name: str, x: Tensor, buffers: Buffers) -> Tensor:
    """Compute, for each edge, the inverse of the common root mean square of all groups but the scalars: x (R, E, C) -> (E,)."""
    rows, edges, channels = x.shape
    with buffers:
        square = torch.mul(x, x, out=buffers.like(x))
        power = torch.addmv(w[f"{name}.one"], square.view(rows, -1).T, w[f"{name}.balance"], beta=NORM_EPS)
        return power.view(edges, channels).mean(1).rsqrt_()


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
    d_x[0].add_(scalar_norm_adjoint(w, g, name, x[0], mean, deviation, d_out[0]))
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
    up[0].add_(w["ff.up.bias"])
    gates = buffers(layout.groups, *up.shape[1:])
    gates[0] = up[0]  # silu(y) = y sigmoid(y)
    torch.baddbmm(w["ff.gates.bias"][:, None], normed[:1].expand(layout.groups - 1, -1, -1), w["ff.gates"], out=gates[1:])
    gates.sigmoid_()
    gated = buffers.like(up) if keep else up
    scale_groups(layout, up, gates, gated)
    if out is not None:
        torch.baddbmm(x, gated, w["ff.down"], out=out)
        out[0].add_(w["ff.down.bias"])
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
        d_gates = buffers.like(gates)
        scale_groups_adjoint(layout, up, d_gated, d_gates)
        scale_groups(layout, d_gated, gates, d_gated)
        d_gates = torch.ops.aten.sigmoid_backward(d_gates, gates)
        d_gated[0].add_(d_gates[0])
        g["ff.up"].baddbmm_(normed.transpose(1, 2), d_gated)
        g["ff.up.bias"] += d_gated[0].sum(0)
        g["ff.gates"].baddbmm_(normed[:1].expand(layout.groups - 1, -1, -1).transpose(1, 2), d_gates[1:])
        g["ff.gates.bias"] += d_gates[1:].sum(1)
        d_normed = torch.bmm(d_gated, w["ff.up"].transpose(1, 2), out=buffers.like(x))
        d_normed[0].add_(torch.bmm(d_gates[1:], w["ff.gates"].transpose(1, 2)).sum(0))
        norm_adjoint(w, g, "ff.norm", x, saved, d_normed, d_out, buffers)


# ---------------------------------------------------------------------------------------------------------- SO(2) convolutions


def _products(
    layout: Layout, way: Way, w: Weights, name: str, x: Tensor, y: Tensor
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (matrix, weight, columns of x, columns of y); the columns of successive products follow one another.

    The two signs of m > 0 come one after the other, or, in the batched way, together: (2, rows, columns), (2, E, columns).
    """
    row, column = 0, 0
    for matrix in layout.matrices:
        if (weight := w.get(f"{name}.{matrix}")) is None:
            continue
        rows, columns = weight.shape[-2:]
        signs = len(weight) if weight.dim() == 3 else 1
        a, b = x[:, row : row + signs * rows], y[:, column : column + signs * columns]
        row, column = row + signs * rows, column + signs * columns
        if signs == 1:
            yield matrix, weight, a, b
        elif way is Way.BATCHED:
            yield matrix, weight, *(t.unflatten(1, (signs, -1)).transpose(0, 1) for t in (a, b))
        else:
            for s, of_sign in enumerate(weight):
                yield matrix, of_sign, a[:, s * rows : (s + 1) * rows], b[:, s * columns : (s + 1) * columns]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dim() == 3:
        torch.bmm(a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def so2(layout: Layout, way: Way, w: Weights, name: str, x: Tensor, out: Tensor) -> None:
    """Compute all products of an SO(2) convolution: x (E, columns) -> out (E, columns)."""
    for matrix, weight, a, target in _products(layout, way, w, name, x, out):
        if matrix == "0n":
            torch.addmm(w[f"{name}.bias"], a, weight, out=target)
        else:
            _multiply(a, weight, target)


def so2_transposed(layout: Layout, way: Way, w: Weights, name: str, d_out: Tensor, d_x: Tensor) -> None:
    """Compute the gradient of the input of `so2`."""
    for _, weight, target, d in _products(layout, way, w, name, d_x, d_out):
        _multiply(d, weight.mT, target)


def so2_gradient(layout: Layout, way: Way, g: Weights, name: str, x: Tensor, d_out: Tensor) -> None:
    """Add the gradient of the weights of `so2`."""
    for matrix, gradient, a, d in _products(layout, way, g, name, x, d_out):
        add_product(gradient, a.mT, d)
        if matrix == "0n":
            g[f"{name}.bias"] += d.sum(0)


def edge_gate(way: Way, columns: Columns, y: Tensor, n_factors: int, out: Tensor) -> Tensor:
    """Apply silu to l = 0, and sigmoid(gate_l) y_l to the other degrees: y (E, columns there) -> out (E, columns here).

    The gates follow the l = 0 channels in y. Returns the factors, which are the sigmoids (E, n_factors) of both.
    """
    factors = torch.sigmoid(y[:, :n_factors])
    columns.scale_back(way, y, factors, out)
    return factors


def edge_gate_adjoint(way: Way, columns: Columns, y: Tensor, factors: Tensor, d_out: Tensor, d_y: Tensor) -> None:
    """Write the gradient of y to d_y, in all columns except those of scalars that are not gates."""
    d_factors, channels = columns.scale_adjoint(way, d_out, y, factors), columns.runs[0][1].stop
    columns.scale(way, d_out, factors, d_y)
    d_factors = torch.ops.aten.sigmoid_backward(d_factors, factors)
    d_y[:, :channels].add_(d_factors[:, :channels])
    d_y[:, channels : factors.shape[1]] = d_factors[:, channels:]


# ------------------------------------------------------------------------------------------------------------------- messages


@dataclass
class ScaledInputs:
    """Inputs of a message convolution and their scaled form.

    inputs: n and u, D x of both ends, natural and unnatural, edge-first (E, K 2C), n alone, or ends, their scalars (E, 2C);
    e, the features of the edge, edge-first (E, R C), or its scalars (E, C).
    gathered: features of both ends before they are rotated, of each parity (E, 2C, K); empty for scalars.
    factors: of all inputs, the factor of each degree, or group, and channel.
    scaled: the inputs times their factors, side by side.
    """

    D: Tensor
    inputs: Joined
    gathered: list[Tensor]
    factors: Tensor
    scaled: Tensor


def gather_ends(task: Task, x: Tensor, width: int) -> Tensor:
    """Copy the features x (A, width) of both ends of every edge: the source's, then the target's, (E, 2 width)."""
    out = task.buffers(2 * len(task.chunk), width, dtype=x.dtype)
    return torch.index_select(x, 0, task.chunk.ends, out=out).view(-1, 2 * width)


def scatter_ends(task: Task, d_ends: Tensor, d_x: Tensor) -> None:
    """Add the gradient of `gather_ends` to d_x (A, width)."""
    d_x.index_add_(0, task.chunk.ends, d_ends.reshape(2 * len(task.chunk), -1).to(d_x.dtype))


def scale_inputs(columns: JoinedColumns, task: Task, D: Tensor, scalars: Tensor | None, factors: Tensor) -> ScaledInputs:
    """Build the inputs of the messages of a chunk from the features of sources, targets and edges.

    task.x: (2, A, C, K), natural and unnatural, normed, or natural alone (1, A, C, K), or scalars (A, C). task.e: (R, E, C), or
    scalars (E, C).
    D and x have the type of messages, which may be shorter than that of e and the factors.
    scalars: the normed values that replace the scalars of e; None if e are scalars.
    """
    x, e, buffers, edges, gathered = task.x, task.e, task.buffers, len(task.chunk), []
    inputs = columns.inputs(task.chunk.way, edges, buffers, x.dtype)
    if x.dim() == 2:
        inputs.parts["ends"].copy_(gather_ends(task, x, x.shape[1]))
    else:
        C, K = x.shape[2:]
        for name, of_parity in zip("nu", x):
            gathered.append(gather_ends(task, of_parity.view(-1, C * K), C * K).view(edges, 2 * C, K))
            torch.bmm(D, gathered[-1].transpose(1, 2), out=inputs.parts[name].unflatten(1, (K, 2 * C)))
    if scalars is None:
        inputs.parts["e"].copy_(e)
    else:
        inputs.parts["e"].unflatten(1, e.shape[::2]).copy_(e.transpose(0, 1))
        inputs.parts["e"][:, : e.shape[2]] = scalars
    scaled = buffers(edges, sum(columns.widths.values()), dtype=x.dtype)
    columns.scale(task.chunk.way, inputs, factors, scaled)
    return ScaledInputs(D, inputs, gathered, factors, scaled)


def scale_inputs_adjoint(
    dense: DenseRotations,
    columns: JoinedColumns,
    task: Task,
    forward: ScaledInputs,
    d_scaled: Tensor,
    g: Gradients,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of e and of the factors; those of x and the packed rotations are added to g."""
    chunk, x, buffers = task.chunk, task.x, task.buffers
    edges, d = len(chunk), columns.inputs(chunk.way, len(chunk), buffers, x.dtype)
    d_factors = columns.scale_adjoint(chunk.way, forward.inputs, d_scaled, forward.factors)
    columns.scale_back(chunk.way, d_scaled, forward.factors, d)
    if x.dim() == 2:
        scatter_ends(task, d.parts["ends"], g.x)
    else:
        C, K = x.shape[2:]
        for name, d_x, gathered in zip("nu", g.x, forward.gathered):
            d_rotated = d.parts[name].unflatten(1, (K, 2 * C))
            if g.rotations is not None:
                dense.add_gradient(d_rotated @ gathered, g.rotations[chunk.edges])
            d_gathered = torch.bmm(d_rotated.transpose(1, 2), forward.D, out=buffers(edges, 2 * C, K, dtype=x.dtype))
            scatter_ends(task, d_gathered, d_x.view(-1, C * K))
    if task.e.dim() == 2:
        return d.parts["e"].clone(), d_factors
    rows, _, C = task.e.shape
    return buffers(rows, edges, C).copy_(d.parts["e"].unflatten(1, (rows, C)).transpose(0, 1)), d_factors


def segment_sum(chunk: Chunk, values: Tensor) -> Tensor:
    """Sum values (E, ...) over the edges into each atom, (atoms, ...)."""
    # `unsafe` leaves out a check of the offsets, which would wait for the device
    return torch.segment_reduce(values, "sum", offsets=chunk.offsets, axis=0, unsafe=True)


def aggregate(task: Task, D: Tensor, values: list[Tensor], out: Tensor) -> None:
    """Rotate back and sum over the edges into each atom: D (E, rows, K), values of each parity (E, rows, V).

    out: (atoms, 2, K, V), whose unnatural part stays as it is if there are natural values alone.
    """
    chunk, (_, rows, K), V = task.chunk, D.shape, values[0].shape[2]
    if chunk.way is Way.BATCHED:
        turned = task.buffers(len(chunk), len(values), K, V)
        for p, v in enumerate(values):
            torch.bmm(D.mT, v, out=turned[:, p])
        out[:, : len(values)] = segment_sum(chunk, turned)
        return
    of_atoms = [degree * rows for degree in chunk.degrees]  # one product (K, degree rows) (degree rows, V) per atom
    for p, v in enumerate(values):
        for d, own, target in zip(D.view(-1, K).split(of_atoms), v.view(-1, V).split(of_atoms), out[:, p]):
            torch.mm(d.T, own, out=target)


def aggregate_adjoint(task: Task, D: Tensor, d_out: Tensor, d_values: list[Tensor]) -> None:
    """Write the gradients of the values of each parity (E, rows, V) from d_out (atoms, 2, K, V)."""
    chunk, (_, rows, K), V = task.chunk, D.shape, d_values[0].shape[2]
    if chunk.way is Way.BATCHED:
        for p, d_v in enumerate(d_values):
            torch.bmm(D, d_out[:, p].index_select(0, chunk.target), out=d_v)
        return
    of_atoms = [degree * rows for degree in chunk.degrees]
    for p, d_v in enumerate(d_values):
        for d, own, d_target in zip(D.view(-1, K).split(of_atoms), d_v.view(-1, V).split(of_atoms), d_out[:, p]):
            torch.mm(d, d_target, out=own)
