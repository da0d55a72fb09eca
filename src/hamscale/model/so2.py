"""Linear maps that commute with rotations about the edge: SO(2) convolution, one real GEMM per |m|.

Reference: S. Passaro, C. L. Zitnick, "Reducing SO(3) convolutions to SO(2) for efficient equivariant GNNs", ICML 2023.
"""

import torch
from torch import Tensor, nn


class SO2Convolution(nn.Module):
    """y_+m + i y_-m = (W_r + i W_i)(x_+m + i x_-m), mixing all degrees and channels of one |m|.

    Pieces in: (E, 1 or 2, N_m, C_in), for m = 0 also flat (E, zero_in). Pieces out: (E, 1 or 2, N_m, C_out), and `scalars` further
    invariants (E, scalars), made of m = 0. axial: the input has m = 0 alone, so has the output, and no other weights exist.
    """

    def __init__(self, lmax: int, c_in: int, c_out: int, scalars: int = 0, axial: bool = False, zero_in: int | None = None):
        super().__init__()
        self.lmax, self.c_out, self.scalars = lmax, c_out, scalars
        self.zero = nn.Linear(zero_in or (lmax + 1) * c_in, (lmax + 1) * c_out + scalars)
        self.real, self.imaginary = nn.ParameterList(), nn.ParameterList()
        for m in range(1, 1 if axial else lmax + 1):
            n = lmax + 1 - m
            for weights in (self.real, self.imaginary):
                # two products are added for each output, hence the 2
                weights.append(nn.Parameter(torch.randn(n * c_in, n * c_out) / (2 * n * c_in) ** 0.5))

    def forward(self, pieces: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        y, scalars = self.zero(pieces[0].flatten(1)).split([(self.lmax + 1) * self.c_out, self.scalars], 1)
        result = [y.view(len(y), 1, self.lmax + 1, self.c_out)]
        for m, (r, i) in enumerate(zip(self.real, self.imaginary), start=1):
            weight = torch.cat([torch.cat([r, i], 1), torch.cat([-i, r], 1)])
            result.append((pieces[m].flatten(1) @ weight).view(len(y), 2, self.lmax + 1 - m, self.c_out))
        return result, scalars


class DegreeLinear(nn.Module):
    """One matrix per degree l, for every order of it; a bias for l = 0.

    Takes node features (A, K, C_in) or edge pieces (E, 1 or 2, N_m, C_in); both commute with all rotations.
    """

    def __init__(self, lmax: int, c_in: int, c_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(lmax + 1, c_in, c_out) / c_in**0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.lmax = lmax

    def forward(self, x):
        if isinstance(x, list):
            # pieces of m hold the degrees m..lmax
            result = [torch.einsum("ernc,ncd->ernd", p, self.weight[m:]) for m, p in enumerate(x)]
            scalar, rest = result[0].split([1, self.lmax], 2)
            return [torch.cat([scalar + self.bias, rest], 2), *result[1:]]
        parts = x.split([2 * l + 1 for l in range(self.lmax + 1)], 1)
        result = [p @ w for p, w in zip(parts, self.weight)]
        result[0] = result[0] + self.bias
        return torch.cat(result, 1)
