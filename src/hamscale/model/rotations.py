"""Define the order of edge features, and the Wigner matrices that rotate node features into the frame of an edge.

Shapes: E edges, K = (lmax+1)^2 coefficients, C channels, N_m = lmax+1-m degrees that have order m.
Node features are l-major, (A, K, C), in the global frame. Edge features are m-major, in the frame whose z axis is the edge:
first the rows of m = 0 (l = 0..lmax), then for every m > 0 the rows of +m (l = m..lmax) and the rows of -m. Each |m| is one
product of an SO(2) convolution.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..angular import edge_rotations, generators


class Layout:
    """Index tables of features for one lmax."""

    def __init__(self, lmax: int):
        self.lmax, self.size = lmax, (lmax + 1) ** 2
        order = [(l, 0) for l in range(lmax + 1)]
        for m in range(1, lmax + 1):
            order += [(l, m) for l in range(m, lmax + 1)] + [(l, -m) for l in range(m, lmax + 1)]
        # runs of rows with the same signed m: lowest degree and number of rows of each
        self.run_degree = [0] + [m for m in range(1, lmax + 1) for _ in "+-"]
        self.run_rows = [lmax + 1 - m for m in self.run_degree]
        self.degree = torch.tensor([l for l, _ in order])  # (K,): degree of each row
        l_major = torch.tensor([l * l + l + m for l, m in order])
        self.m_major = torch.argsort(l_major)  # (K,): m-major row of each l-major one
        # weights of squares whose sum is sum_l>0 (mean over the 2l+1 orders) / lmax
        self.balance = torch.tensor([1 / (lmax * (2 * l + 1)) if l else 0.0 for l, _ in order], dtype=torch.float64)
        packed = [
            int(self.m_major[l * l + a]) * self.size + l * l + b
            for l in range(lmax + 1)
            for a in range(2 * l + 1)
            for b in range(2 * l + 1)
        ]
        self.packed_size = len(packed)
        self.dense_index = torch.tensor(packed)  # (P,): positions of packed values in the (K, K) matrix
        # the inverse index; entries of the matrix that are not packed refer to the zero at the end of a packed row
        self.packed_index = torch.full((self.size**2,), self.packed_size)
        self.packed_index[self.dense_index] = torch.arange(self.packed_size)

    def rotations(self, vectors: np.ndarray, dtype: torch.dtype, chunk: int = 8192) -> Tensor:
        """Compute the packed Wigner matrices of edges (E, 3), `angular.edge_rotations`: (E, P + 1), P = sum (2l+1)^2.

        The last column is zero. The result is deterministic: the third Euler angle is zero, and so is the first along +z;
        along -z it is pi.
        """
        packed = torch.zeros(len(vectors), self.packed_size + 1, dtype=dtype)
        for first in range(0, len(vectors), chunk):
            rows, column = slice(first, first + chunk), 0
            for D in edge_rotations(vectors[rows], self.lmax):
                n = D.shape[1] ** 2
                packed[rows, column : column + n] = torch.from_numpy(D.reshape(len(D), n))
                column += n
        return packed

    def dense(self, packed: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        """Unpack matrices (E, P + 1) -> (E, rows, K), the first rows of the dense matrices.

        Rows are m-major in the edge frame, columns l-major in the global frame.
        """
        index = self.packed_index[: rows * self.size].to(packed.device)
        flat = torch.index_select(packed, 1, index, out=None if out is None else out.view(len(packed), -1))
        return flat.view(-1, rows, self.size)


@lru_cache
def layout(lmax: int) -> Layout:
    return Layout(lmax)


class EdgeRotations(torch.autograd.Function):
    """Packed Wigner matrices (E, P + 1) of edge vectors (E, 3), with an exact, finite gradient in every direction.

    Moving the end of an edge by dv turns its frame by w = v x dv / v^2: D(v + dv) = D(v) (1 - w . J), with J the generators
    of rotations, up to a turn about the edge itself. No output of the network depends on that turn, so its derivative is
    omitted. The derivatives of the Euler angles, which diverge at the poles, never appear.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, lmax: int) -> Tensor:
        packed = layout(lmax).rotations(vectors.detach().cpu().double().numpy(), vectors.dtype).to(vectors.device)
        ctx.save_for_backward(vectors, packed)
        ctx.lmax = lmax
        return packed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        vectors, packed = ctx.saved_tensors
        torque = torch.zeros_like(vectors)  # dL/dw
        column = 0
        for l in range(ctx.lmax + 1):
            n = 2 * l + 1
            D, g = (t[:, column : column + n * n].view(-1, n, n) for t in (packed, gradient))
            J = torch.from_numpy(generators(l)).to(packed)  # (3, n, n)
            torque -= torch.einsum("eab,eac,kcb->ek", g, D, J)
            column += n * n
        # w = v x dv / v^2, so dL/dv = torque x v / v^2
        return torch.linalg.cross(torque, vectors) / vectors.square().sum(1, keepdim=True), None
