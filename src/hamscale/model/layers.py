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
    """Linear map y_+m + i y_-m = (W_r + i W_i)(x_+m + i x_-m) that commutes with rotations about the edge.

    It mixes all degrees and channels of one |m|.
    full: channels of each input that has all degrees.
    invariants: number of values of each input that enters m = 0 only.
    Input columns, one |m| after the other: those of each input, +m then -m.
    Output columns: for m = 0 the l = 0 channels, then `scalars` further invariants, then the channels of l > 0; for each m
    > 0, c_out columns of each row.
    axial: if true, there is only m = 0.
    Reference: S. Passaro, C. L. Zitnick, "Reducing SO(3) convolutions to SO(2) for efficient equivariant GNNs", ICML 2023.
    """

    def __init__(
        self,
        lmax: int,
        full: dict[str, int],
        invariants: dict[str, int],
        c_out: int,
        scalars: int = 0,
        axial: bool = False,
    ):
        super().__init__()
        self.lmax, self.full, self.invariants = lmax, full, invariants
        c_in = sum(full.values())
        self.zero = nn.Linear((lmax + 1) * c_in + sum(invariants.values()), (lmax + 1) * c_out + scalars)
        self.real, self.imaginary = nn.ParameterList(), nn.ParameterList()
        for m in range(1, 1 if axial else lmax + 1):
            n = lmax + 1 - m
            for weights in (self.real, self.imaginary):
                # each output is a sum of two products, hence the factor 2
                weights.append(nn.Parameter(torch.randn(n * c_in, n * c_out) / (2 * n * c_in) ** 0.5))

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights: one real matrix `name.m` per |m|, and the bias."""
        w = {f"{name}.0": self.zero.weight.T, f"{name}.bias": self.zero.bias}
        for m, (real, imaginary) in enumerate(zip(self.real, self.imaginary), start=1):
            widths, blocks = [(self.lmax + 1 - m) * c for c in self.full.values()], []
            for r, i in zip(real.split(widths), imaginary.split(widths)):
                blocks += [torch.cat([r, i], 1), torch.cat([-i, r], 1)]
            w[f"{name}.{m}"] = torch.cat(blocks)
        return w


class DegreeLinear(nn.Module):
    """Linear layer with one matrix per degree l, shared by all its orders, and a bias for l = 0.

    (A, K, C_in) l-major -> (A, K, C_out).
    """

    def __init__(self, lmax: int, c_in: int, c_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(lmax + 1, c_in, c_out) / c_in**0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.lmax = lmax

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([2 * l + 1 for l in range(self.lmax + 1)], 1)
        result = [p @ w for p, w in zip(parts, self.weight)]
        result[0] = result[0] + self.bias
        return torch.cat(result, 1)


class Norm(nn.Module):
    """Layer norm of the scalars, and division of degrees l > 0 by their common root mean square.

    Each degree l > 0 has the same weight in the root mean square. There is a learned scale per degree and channel; the
    scalars also have a bias. (A, K, C) l-major.
    """

    def __init__(self, lmax: int, channels: int):
        super().__init__()
        self.lmax = lmax
        self.scalar = nn.LayerNorm(channels, SCALAR_EPS)
        self.weight = nn.Parameter(torch.ones(lmax, channels))

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights of the scalars; `scales` are multiplied into the weights of the next layer instead."""
        return {f"{name}.scalar.weight": self.scalar.weight, f"{name}.scalar.bias": self.scalar.bias}

    def scales(self) -> Tensor:
        """Return the scales of all degrees, (lmax+1, C); those of l = 0 are one."""
        return torch.cat([torch.ones_like(self.weight[:1]), self.weight])

    def constants(self, name: str) -> dict[str, Tensor]:
        """Return the weights of squares in the common mean square of the degrees l > 0, (K,)."""
        return {f"{name}.balance": layout(self.lmax).balance.to(self.weight)}

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([2 * l + 1 for l in range(self.lmax + 1)], 1)
        power = sum((p.square().mean((1, 2)) for p in parts[1:]), x.new_zeros(len(x))) / self.lmax
        inverse = torch.rsqrt(power + NORM_EPS)[:, None, None]
        return torch.cat([self.scalar(parts[0]), *(p * (w * inverse) for p, w in zip(parts[1:], self.weight))], 1)


def node_gate(x: Tensor, gates: Tensor) -> Tensor:
    """Apply silu to the scalars, and multiply each degree l > 0 with the sigmoid of its own gate.

    x (A, K, C), gates (A, lmax C).
    """
    channels = x.shape[-1]
    g = torch.sigmoid(gates).unflatten(1, (gates.shape[1] // channels, channels))
    parts = x.split([2 * l + 1 for l in range(g.shape[1] + 1)], 1)
    return torch.cat([silu(parts[0]), *(p * g[:, l : l + 1] for l, p in enumerate(parts[1:]))], 1)


class FeedForward(nn.Module):
    """Residual layer x + W2 gate(W1 norm(x)), per degree; the gates are a linear function of the normed scalars."""

    def __init__(self, lmax: int, channels: int, width: int):
        super().__init__()
        self.norm = Norm(lmax, channels)
        self.gates = nn.Linear(channels, lmax * width)
        self.up = DegreeLinear(lmax, channels, width)
        self.down = DegreeLinear(lmax, width, channels)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights by name; those of degrees are repeated for every row, m-major."""
        lmax, channels, width = self.up.lmax, *self.up.weight.shape[1:]
        rows = layout(lmax).degree.to(self.up.weight.device)
        return self.norm.weights(f"{name}.norm") | {
            f"{name}.up": (self.norm.scales()[:, :, None] * self.up.weight)[rows],
            f"{name}.up.bias": self.up.bias,
            f"{name}.down": self.down.weight[rows],
            f"{name}.down.bias": self.down.bias,
            f"{name}.gates": self.gates.weight.view(lmax, width, channels).transpose(1, 2),
            f"{name}.gates.bias": self.gates.bias.view(lmax, width),
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(node_gate(self.up(y), self.gates(y[:, 0])))
