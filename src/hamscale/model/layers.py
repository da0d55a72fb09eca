"""Parts of the network: radial basis, norms, gate, feed-forward. Shapes: model/rotations.py."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .so2 import DegreeLinear


class RadialBasis(nn.Module):
    """Gaussians exp(-(d - d_k)^2 / 2 s^2), centres evenly from 0 to the cutoff, s = their spacing: (E,) -> (E, n)."""

    def __init__(self, n: int, cutoff: float):
        super().__init__()
        self.register_buffer("centres", torch.linspace(0, cutoff, n, dtype=torch.float64), persistent=False)
        self.cutoff = cutoff

    def forward(self, distances: Tensor) -> Tensor:
        spacing = self.cutoff / (len(self.centres) - 1)
        return torch.exp(-0.5 * ((distances[:, None] - self.centres.to(distances)) / spacing) ** 2)


def envelope(distances: Tensor, cutoff: float) -> Tensor:
    """1 - 10 u^3 + 15 u^4 - 6 u^5, u = d / cutoff: one at 0, zero with two derivatives at the cutoff, (E,)."""
    u = (distances / cutoff).clamp(max=1)
    return 1 + u**3 * (-10 + u * (15 - 6 * u))


class RadialNetwork(nn.Module):
    """Two-layer perceptron of the distance; the two elements enter as a bias of the first layer. (E, n) -> (E, outputs)."""

    def __init__(self, n: int, width: int, species: int, outputs: int):
        super().__init__()
        self.distance = nn.Linear(n, width, bias=False)
        self.pair = nn.Parameter(0.5 * torch.randn(species * species, width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, radial: Tensor, pair: Tensor) -> Tensor:
        return self.out(silu(self.hidden(silu(self.distance(radial) + self.pair[pair]))))


class Norm(nn.Module):
    """Layer norm of the scalars; degrees l > 0 over their common root mean square (each degree counts the same).

    A learned scale per degree and channel; the scalars also get a bias. Takes (A, K, C) l-major or edge pieces.
    """

    def __init__(self, lmax: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.lmax, self.eps = lmax, eps
        self.scalar = nn.LayerNorm(channels)
        self.weight = nn.Parameter(torch.ones(lmax, channels))
        # mean over degrees of the mean square of a degree
        self.register_buffer("balance", 1 / (lmax * (2 * torch.arange(1, lmax + 1) + 1.0)), persistent=False)

    def forward(self, x):
        if isinstance(x, list):
            scalar, axial = x[0].split([1, self.lmax], 2)
            power = (axial.square().mean(-1) * self.balance.to(axial.dtype)).sum((1, 2))
            for m, p in enumerate(x[1:], start=1):
                power = power + (p.square().mean(-1) * self.balance[m - 1 :].to(p.dtype)).sum((1, 2))
            inverse = torch.rsqrt(power + self.eps)[:, None, None, None]
            rest = [p * self.weight[m - 1 :] * inverse for m, p in enumerate(x[1:], start=1)]
            return [torch.cat([self.scalar(scalar), axial * self.weight * inverse], 2), *rest]
        parts = x.split([2 * l + 1 for l in range(self.lmax + 1)], 1)
        power = sum(p.square().mean((1, 2)) for p in parts[1:]) / self.lmax
        inverse = torch.rsqrt(power + self.eps)[:, None, None]
        return torch.cat([self.scalar(parts[0]), *(p * (w * inverse) for p, w in zip(parts[1:], self.weight))], 1)


def gate(x, gates: Tensor):
    """silu of the scalars; each degree l > 0 times its own gate (sigmoid). gates: (E, lmax * C)."""
    first = x[0] if isinstance(x, list) else x
    channels = first.shape[-1]
    g = torch.sigmoid(gates).unflatten(1, (gates.shape[1] // channels, channels))
    lmax = g.shape[1]
    if isinstance(x, list):
        scalar, axial = x[0].split([1, lmax], 2)
        rest = [p * g[:, None, m - 1 :] for m, p in enumerate(x[1:], start=1)]
        return [torch.cat([silu(scalar), axial * g[:, None]], 2), *rest]
    parts = x.split([2 * l + 1 for l in range(lmax + 1)], 1)
    return torch.cat([silu(parts[0]), *(p * g[:, l : l + 1] for l, p in enumerate(parts[1:]))], 1)


class FeedForward(nn.Module):
    """x + W2 gate(W1 norm(x)), per degree; the gates are a linear function of the normed scalars."""

    def __init__(self, lmax: int, channels: int, width: int):
        super().__init__()
        self.norm = Norm(lmax, channels)
        self.gates = nn.Linear(channels, lmax * width)
        self.up = DegreeLinear(lmax, channels, width)
        self.down = DegreeLinear(lmax, width, channels)

    def forward(self, x):
        y = self.norm(x)
        scalars = y[0][:, 0, 0] if isinstance(y, list) else y[:, 0]
        y = self.down(gate(self.up(y), self.gates(scalars)))
        return [a + b for a, b in zip(x, y)] if isinstance(x, list) else x + y
