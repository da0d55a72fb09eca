"""Define the weights and node-level parts of the network.

The operations on edges are in kernels.py and updates.py. Shapes: see rotations.py.
Tables of constants are buffers of the modules, so that they move to a device with the weights: a table that is moved in a
pass would make the processor wait for the device. They are not part of the files of a model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .rotations import Layout, layout

Key = TypeVar("Key")

# Added to mean squares before their inverse root is taken: those of degrees l > 0, and those of scalars.
NORM_EPS, SCALAR_EPS = 1e-6, 1e-5


def envelope(distances: Tensor, cutoff: float) -> Tensor:
    """Compute 1 - 10 u^3 + 15 u^4 - 6 u^5 with u = d / cutoff, (E,).

    The value is one at u = 0; at the cutoff it is zero, and so are its first two derivatives.
    """
    u = (distances / cutoff).clamp(max=1)
    return 1 + u**3 * (-0.625 - 6 * (u - 1.25).square())


def constant(module: nn.Module, name: str, values: Sequence[int] | Tensor) -> None:
    """Give a module a tensor that moves to a device with its weights and is no part of its files.

    Floating-point constants are integers in value, because a conversion of the module to a shorter type would round others.
    """
    module.register_buffer(name, torch.as_tensor(values), persistent=False)


class RowMatrices(nn.Module, Generic[Key]):
    """Matrices of rows, gathered from those of groups: of each key (rows, a, b), padded with zeros to the largest of its rows.

    shapes: of the matrices by name. rows: the name of the matrix of each row, by key; one that has no shape is zero.
    least: the least size of a padded matrix, by key.
    """

    index: Tensor
    nothing: Tensor

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], rows: Mapping[Key, Sequence[str]], least: Mapping[Key, tuple[int, int]]
    ) -> None:
        super().__init__()
        first, total = {}, 0
        for name, (a, b) in shapes.items():
            first[name], total = total, total + a * b
        parts, self.shapes = [], {}
        for key, names in rows.items():
            sizes = [least[key], *(tuple(shapes[name]) for name in names if name in shapes)]
            index = torch.full((len(names), max(a for a, _ in sizes), max(b for _, b in sizes)), total)
            for row, name in zip(index, names):
                if name in shapes:
                    a, b = shapes[name]
                    row[:a, :b] = torch.arange(first[name], first[name] + a * b).view(a, b)
            parts.append(index.flatten())
            self.shapes[key] = index.shape
        constant(self, "index", torch.cat(parts))
        constant(self, "nothing", torch.zeros(1))

    def forward(self, matrices: Iterable[Tensor], scale: Tensor | None = None) -> dict[Key, Tensor]:
        """Gather the matrices, which come in the order of their shapes; `scale` has a factor for every number gathered."""
        gathered = torch.cat([*(matrix.flatten() for matrix in matrices), self.nothing]).index_select(0, self.index)
        parts = (gathered if scale is None else gathered * scale).split([shape.numel() for shape in self.shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts)}


class RadialNetwork(nn.Module):
    """Three-layer perceptron of Gaussians of the distance, (E, n) -> (E, outputs).

    The two elements of an edge enter as a bias of the first layer.
    """

    def __init__(self, n: int, width: int, species: int, outputs: int):
        super().__init__()
        self.distance = nn.Linear(n, width, bias=False)
        self.pair = nn.Parameter(0.5 * torch.randn(species * species, width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)


class SO2Convolution(nn.Module):
    """Linear map of edge features that commutes with turns about the edge and with reflections through planes that hold it.

    With n the natural and u the unnatural features of one m > 0, of all degrees and channels, and real matrices A to D,

        (n_+m, u_-m) -> (A n_+m + B u_-m, C n_+m + D u_-m),    (n_-m, u_+m) -> (A n_-m - B u_+m, D u_+m - C n_-m).

    For m = 0 natural and unnatural features have a matrix each.
    natural, unnatural: channels of all inputs that have all degrees. invariants: number of further values that enter natural
    m = 0. scalars: number of further values that come out there. axial: if true, there are only natural features and m = 0.
    pseudo: whether any unnatural features of m = 0 come in that are not zero.
    Columns of inputs and outputs: see `columns.joined_columns` and `columns.gate_columns`.
    References: S. Passaro, C. L. Zitnick, "Reducing SO(3) convolutions to SO(2) for efficient equivariant GNNs", ICML 2023,
    without reflections, where A and D are free and B and C pair with the same parity.
    """

    signs: Tensor

    def __init__(
        self,
        lmax: int,
        natural: int,
        unnatural: int,
        invariants: int,
        c_out: int,
        scalars: int = 0,
        axial: bool = False,
        pseudo: bool = True,
    ) -> None:
        super().__init__()
        self.lmax, self.axial, self.c_out, self.c_in = lmax, axial, c_out, (natural, unnatural)
        self.natural = nn.Linear((lmax + 1) * natural + invariants, (lmax + 1) * c_out + scalars)
        self.unnatural = nn.Linear((lmax + 1) * unnatural, (lmax + 1) * c_out, bias=False) if pseudo and not axial else None
        degrees = [] if axial else range(lmax, 0, -1)  # number of degrees that have order m = 1, 2, ...
        self.turning = nn.ParameterList(
            [
                nn.Parameter(torch.randn(n * (natural + unnatural), 2 * n * c_out) / (n * (natural + unnatural)) ** 0.5)
                for n in degrees
            ]
        )
        signs = [torch.ones(2, 0)]
        for n, matrix in zip(degrees, self.turning):  # of both signs of m: A and D are the same, B and C change sign
            of_order = torch.ones(2, *matrix.shape)
            of_order[1, n * natural :] *= -1
            of_order[1, :, n * c_out :] *= -1
            signs.append(of_order.flatten(1))
        constant(self, "signs", torch.cat(signs, 1))

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the matrices of `Layout.matrices`, for m > 0 those of both signs, (2, rows, columns), and the bias."""
        w = {f"{name}.0n": self.natural.weight.T, f"{name}.bias": self.natural.bias}
        if self.unnatural is not None:
            w[f"{name}.0u"] = self.unnatural.weight.T
        elif not self.axial:  # nothing comes in, so zeros come out
            w[f"{name}.0u"] = self.natural.weight.new_zeros((self.lmax + 1) * self.c_in[1], (self.lmax + 1) * self.c_out)
        if len(self.turning):
            both = self.signs * torch.cat([matrix.flatten() for matrix in self.turning])
            parts = both.split([matrix.numel() for matrix in self.turning], 1)
            w |= {f"{name}.{m}": part.view(2, *self.turning[m - 1].shape) for m, part in enumerate(parts, start=1)}
        return w


class DegreeLinear(nn.Module):
    """Linear layer with one matrix per group, shared by all its orders, and a bias for the scalars.

    (A, R, C_in), rows as of nodes -> (A, R, C_out).
    """

    edge_group: Tensor
    node_group: Tensor

    def __init__(self, lmax: int, c_in: int, c_out: int) -> None:
        super().__init__()
        own = layout(lmax)
        self.lmax = lmax
        self.weight = nn.Parameter(torch.randn(own.groups, c_in, c_out) / c_in**0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))
        constant(self, "edge_group", own.edge_group)
        constant(self, "node_group", own.node_group)

    def of_edges(self, scales: Tensor | None = None) -> Tensor:
        """Return the matrix of every row of an edge, (R, C_in, C_out), whose inputs are multiplied by scales (G, C_in)."""
        weight = self.weight if scales is None else scales[:, :, None] * self.weight
        return weight.index_select(0, self.edge_group)

    def forward(self, x: Tensor) -> Tensor:
        result = torch.bmm(x.transpose(0, 1), self.weight.index_select(0, self.node_group))
        result[0].add_(self.bias)
        return result.transpose(0, 1)


class Norm(nn.Module):
    """Layer norm of the scalars, and division of all other groups by their common root mean square.

    Each of these groups has the same weight in the root mean square. There is a learned scale per group and channel; the
    scalars also have a bias. (A, R, C), rows as of nodes.

    Weights of squares whose sum is sum_groups (mean over orders and channels) / number of groups, scalars left out: 1 / parts.
    """

    node_scale: Tensor
    edge_parts: Tensor
    node_parts: Tensor
    one: Tensor

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        own = layout(lmax)
        self.lmax = lmax
        self.scalar = nn.LayerNorm(channels, SCALAR_EPS)
        self.weight = nn.Parameter(torch.ones(own.groups - 1, channels))
        constant(self, "node_scale", (own.node_group - 1).clamp(min=0))  # row of the weight; that of the scalars is not used
        constant(self, "edge_parts", _parts(own, own.edge_group))
        constant(self, "node_parts", (_parts(own, own.node_group) * channels).repeat_interleave(channels))
        constant(self, "one", torch.ones(1, channels))
        self._weigh()

    def _weigh(self) -> None:
        self.edge_balance, self.node_balance = self.edge_parts.reciprocal(), self.node_parts.reciprocal()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Norm":
        """Move or convert the layer; reciprocals are computed anew, because those of a shorter type are not exact."""
        super()._apply(fn, recurse)
        self._weigh()
        return self

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights of the scalars; `scales` are multiplied into the weights of the next layer instead."""
        return {f"{name}.scalar.weight": self.scalar.weight, f"{name}.scalar.bias": self.scalar.bias}

    def scales(self) -> Tensor:
        """Return the scales of all groups, (G, C); those of the scalars are one."""
        return torch.cat([self.one, self.weight])

    def constants(self, name: str) -> dict[str, Tensor]:
        """Return the weights of squares in the common mean square of the groups, (R,)."""
        return {f"{name}.balance": self.edge_balance, f"{name}.one": self.one[0, :1]}

    def forward(self, x: Tensor) -> Tensor:
        scales = self.weight.index_select(0, self.node_scale)
        return _NodeNorm.apply(x.contiguous(), scales, self.scalar.weight, self.scalar.bias, self.node_balance, self.one[0, :1])


class _NodeNorm(torch.autograd.Function):
    """`Norm` of nodes, with an adjoint by hand: automatic differentiation takes four times the number of operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, one: Tensor) -> Tensor:
        inverse = torch.addmv(one.expand(len(x)), x.square().flatten(1), balance, beta=NORM_EPS).rsqrt_()
        factors = inverse[:, None, None] * scales
        result = x * factors
        scalars, mean, deviation = torch.native_layer_norm(x[:, 0], [x.shape[2]], weight, bias, SCALAR_EPS)
        result[:, 0].copy_(scalars)
        ctx.save_for_backward(x, scales, weight, bias, balance, inverse, factors, mean, deviation)
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, weight, bias, balance, inverse, factors, mean, deviation = ctx.saved_tensors
        d_scalars, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_result[:, 0], x[:, 0], [x.shape[2]], mean, deviation, weight, bias, [True] * 3
        )
        products = (d_result * x).flatten(1)
        products[:, : x.shape[2]].zero_()
        d_scales = torch.mv(products.T, inverse).view_as(scales)
        d_power = torch.mv(products, scales.flatten()).mul_(inverse**3)  # times -2
        d_x = d_result * factors
        d_x[:, 0].copy_(d_scalars)
        d_x.addcmul_(x, torch.outer(d_power, balance).view_as(x), value=-1)
        return d_x, d_scales, d_weight, d_bias, None, None


def _parts(own: Layout, groups: Tensor) -> Tensor:
    """Return the number of groups but the scalars, times the number of rows of the group of each row, (R,); inf for scalars."""
    parts = ((own.groups - 1) * torch.bincount(groups)[groups]).float()
    parts[groups == 0] = torch.inf
    return parts


class FeedForward(nn.Module):
    """Residual layer x + W2 gate(W1 norm(x)), per group; the gates are a linear function of the normed scalars."""

    def __init__(self, lmax: int, channels: int, width: int) -> None:
        super().__init__()
        self.norm = Norm(lmax, channels)
        self.gates = nn.Linear(channels, (layout(lmax).groups - 1) * width)
        self.up = DegreeLinear(lmax, channels, width)
        self.down = DegreeLinear(lmax, width, channels)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights by name; those of groups are repeated for every row of an edge."""
        groups, channels, width = self.up.weight.shape
        return self.norm.weights(f"{name}.norm") | {
            f"{name}.up": self.up.of_edges(self.norm.scales()),
            f"{name}.up.bias": self.up.bias,
            f"{name}.down": self.down.of_edges(),
            f"{name}.down.bias": self.down.bias,
            f"{name}.gates": self.gates.weight.view(groups - 1, width, channels).transpose(1, 2),
            f"{name}.gates.bias": self.gates.bias.view(groups - 1, width),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self._gate(self.up(y), self.gates(y[:, 0])))

    def _gate(self, x: Tensor, gates: Tensor) -> Tensor:
        """Apply silu to the scalars, and multiply each other group with the sigmoid of its own gates, (A, (G-1) C)."""
        of_groups = torch.cat([x[:, 0], gates], 1).sigmoid().unflatten(1, (-1, x.shape[2]))  # silu(y) = y sigmoid(y)
        return x * of_groups.index_select(1, self.up.node_group)
