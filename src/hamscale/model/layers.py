"""Define the weights and node-level parts of the network.

The operations on edges are in kernels.py and updates.py. Shapes: see rotations.py.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .rotations import layout

# Added to mean squares before their inverse root is taken: those of degrees l > 0, and those of scalars.
NORM_EPS, SCALAR_EPS = 1e-6, 1e-5


def envelope(distances: Tensor, cutoff: float) -> Tensor:
    """Compute 1 - 10 u^3 + 15 u^4 - 6 u^5 with u = d / cutoff, (E,).

    The value is one at u = 0; at the cutoff it is zero, and so are its first two derivatives.
    """
    u = (distances / cutoff).clamp(max=1)
    return 1 + u**3 * (-10 + u * (15 - 6 * u))


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
    Columns of inputs and outputs: see `kernels.joined_columns` and `kernels.gate_columns`.
    References: S. Passaro, C. L. Zitnick, "Reducing SO(3) convolutions to SO(2) for efficient equivariant GNNs", ICML 2023,
    without reflections, where A and D are free and B and C pair with the same parity.
    """

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

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the matrix of every product of `Layout.products`, and the bias of natural m = 0."""
        w = {f"{name}.0n": self.natural.weight.T, f"{name}.bias": self.natural.bias}
        if self.unnatural is not None:
            w[f"{name}.0u"] = self.unnatural.weight.T
        elif not self.axial:  # nothing comes in, so zeros come out
            w[f"{name}.0u"] = self.natural.weight.new_zeros((self.lmax + 1) * self.c_in[1], (self.lmax + 1) * self.c_out)
        for m, matrix in enumerate(self.turning, start=1):
            n = self.lmax + 1 - m
            rows, columns = (torch.ones(size, dtype=matrix.dtype, device=matrix.device) for size in matrix.shape)
            rows[n * self.c_in[0] :], columns[n * self.c_out :] = -1, -1
            w[f"{name}.{m}+"], w[f"{name}.{m}-"] = matrix, rows[:, None] * matrix * columns
        return w


class DegreeLinear(nn.Module):
    """Linear layer with one matrix per group, shared by all its orders, and a bias for the scalars.

    (A, R, C_in), rows as of nodes -> (A, R, C_out).
    """

    def __init__(self, lmax: int, c_in: int, c_out: int) -> None:
        super().__init__()
        self.lmax, self.sizes = lmax, layout(lmax).group_sizes
        self.weight = nn.Parameter(torch.randn(len(self.sizes), c_in, c_out) / c_in**0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        result = [p @ w for p, w in zip(x.split(self.sizes, 1), self.weight)]
        result[0] = result[0] + self.bias
        return torch.cat(result, 1)


class Norm(nn.Module):
    """Layer norm of the scalars, and division of all other groups by their common root mean square.

    Each of these groups has the same weight in the root mean square. There is a learned scale per group and channel; the
    scalars also have a bias. (A, R, C), rows as of nodes.
    """

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.lmax, self.sizes = lmax, layout(lmax).group_sizes
        self.scalar = nn.LayerNorm(channels, SCALAR_EPS)
        self.weight = nn.Parameter(torch.ones(len(self.sizes) - 1, channels))

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights of the scalars; `scales` are multiplied into the weights of the next layer instead."""
        return {f"{name}.scalar.weight": self.scalar.weight, f"{name}.scalar.bias": self.scalar.bias}

    def scales(self) -> Tensor:
        """Return the scales of all groups, (G, C); those of the scalars are one."""
        return torch.cat([torch.ones_like(self.weight[:1]), self.weight])

    def constants(self, name: str) -> dict[str, Tensor]:
        """Return the weights of squares in the common mean square of the groups, (R,)."""
        return {f"{name}.balance": layout(self.lmax).balance.to(self.weight)}

    def forward(self, x: Tensor) -> Tensor:
        scalars, *parts = x.split(self.sizes, 1)
        power = sum((p.square().mean((1, 2)) for p in parts), x.new_zeros(len(x))) / len(parts)
        inverse = torch.rsqrt(power + NORM_EPS)[:, None, None]
        return torch.cat([self.scalar(scalars), *(p * (w * inverse) for p, w in zip(parts, self.weight))], 1)


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
        rows = layout(self.up.lmax).edge_group.to(self.up.weight.device)
        return self.norm.weights(f"{name}.norm") | {
            f"{name}.up": (self.norm.scales()[:, :, None] * self.up.weight)[rows],
            f"{name}.up.bias": self.up.bias,
            f"{name}.down": self.down.weight[rows],
            f"{name}.down.bias": self.down.bias,
            f"{name}.gates": self.gates.weight.view(groups - 1, width, channels).transpose(1, 2),
            f"{name}.gates.bias": self.gates.bias.view(groups - 1, width),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self._gate(self.up(y), self.gates(y[:, 0])))

    def _gate(self, x: Tensor, gates: Tensor) -> Tensor:
        """Apply silu to the scalars, and multiply each other group with the sigmoid of its own gates, (A, (G-1) C)."""
        scalars, *parts = x.split(self.up.sizes, 1)
        factors = torch.sigmoid(gates).unflatten(1, (len(parts), x.shape[-1])).unbind(1)
        return torch.cat([silu(scalars), *(p * f[:, None] for p, f in zip(parts, factors))], 1)
