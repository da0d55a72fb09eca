"""Define the order of edge features, and the Wigner matrices that rotate node features into the frame of an edge.

Features have a degree l, an order m and a parity. Under inversion a feature of natural parity is multiplied by (-1)^l, as
spherical harmonics are, one of unnatural parity by -(-1)^l. A group is one degree of one parity: l for natural, lmax + 1 + l
for unnatural ones. A row is one order of a group.

Shapes: A atoms, E edges, K = (lmax+1)^2 orders of all degrees, R = 2 K rows, G = 2 (lmax+1) groups, C channels per row.
Node features are in the global frame, (A, R, C): the natural rows, l-major, then the unnatural ones.
Edge features are in the frame whose z axis is the edge. A reflection through a plane that holds the edge keeps the components
m >= 0 of a natural tensor and m < 0 of an unnatural one, and changes the sign of all others. For each |m| > 0 the rows that it
keeps come first (natural +m, then unnatural -m, l = |m|..lmax each), then those that it turns (natural -m, then unnatural +m).
A map that commutes with turns about the edge and with the reflection is one and the same matrix for both, but for signs
between the parities: see `layers.SO2Convolution`. For m = 0 the natural rows and the unnatural ones do not mix.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..angular import edge_rotations, generators

NATURAL, UNNATURAL = PARITIES = 0, 1


class Layout:
    """Index tables of features for one lmax.

    products: for every product of an SO(2) convolution its name and the (parity, signed m) whose rows it takes and gives.
    """

    def __init__(self, lmax: int) -> None:
        self.lmax, self.size, self.rows, self.groups = lmax, (lmax + 1) ** 2, 2 * (lmax + 1) ** 2, 2 * (lmax + 1)
        self.products: list[tuple[str, list[tuple[int, int]]]] = [("0n", [(NATURAL, 0)]), ("0u", [(UNNATURAL, 0)])]
        for m in range(1, lmax + 1):
            self.products.append((f"{m}+", [(NATURAL, m), (UNNATURAL, -m)]))
            self.products.append((f"{m}-", [(NATURAL, -m), (UNNATURAL, m)]))
        self.matrices = "0n", "0u", *map(str, range(1, lmax + 1))  # of an SO(2) convolution; both signs of m have one
        edge_rows = [(p, l, m) for _, terms in self.products for p, m in terms for l in range(abs(m), lmax + 1)]
        self.edge_row = {row: k for k, row in enumerate(edge_rows)}  # (parity, l, m) -> row
        self.edge_group = torch.tensor([self.group(p, l) for p, l, _ in edge_rows])  # (R,): group of each row of an edge
        node_groups = [self.group(p, l) for p in PARITIES for l in range(lmax + 1) for _ in range(2 * l + 1)]
        self.node_group = torch.tensor(node_groups)  # (R,): group of each row of a node
        # rotated features of one parity are m-major: for every |m| first +m, then -m, l = |m|..lmax each
        self.rotated_row, order = {0: 0}, [(l, 0) for l in range(lmax + 1)]  # signed m -> its first row
        for m in range(1, lmax + 1):
            for signed in (m, -m):
                self.rotated_row[signed] = len(order)
                order += [(l, signed) for l in range(m, lmax + 1)]
        self.m_major = torch.argsort(torch.tensor([l * l + l + m for l, m in order]))  # (K,): row of each l-major one
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

    def group(self, parity: int, l: int) -> int:
        """Return the group of a degree."""
        return parity * (self.lmax + 1) + l

    def placed_runs(self, axial: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """Yield (parity, signed m, first row, number of rows) of the runs of edge features; of natural m = 0 alone if axial."""
        row = 0
        for _, terms in self.products[: 1 if axial else None]:
            for p, m in terms:
                n = self.lmax + 1 - abs(m)
                yield p, m, row, n
                row += n

    def rotations(self, vectors: np.ndarray, dtype: torch.dtype, chunk: int = 960) -> Tensor:
        """Compute the packed Wigner matrices of edges (E, 3), `angular.edge_rotations`: (E, P + 1), P = sum (2l+1)^2.

        The last column is zero. The result is deterministic: the third Euler angle is zero, and so is the first along +z;
        along -z it is pi.
        chunk: edges at a time, so few that intermediate arrays use memory again that is there, without page faults.
        """
        packed = torch.zeros(len(vectors), self.packed_size + 1, dtype=dtype)
        for first in range(0, len(vectors), chunk):
            rows, column = slice(first, first + chunk), 0
            for D in edge_rotations(vectors[rows], self.lmax):
                n = D.shape[1] ** 2
                packed[rows, column : column + n] = torch.from_numpy(D.reshape(len(D), n))
                column += n
        return packed

    def orders(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield |m| and the rows of that order of edge features (R, ...), as (signs, 2 parities, degrees, ...).

        There is one sign for m = 0 and two for others; the degrees are |m|..lmax.
        """
        row = 0
        for m in range(self.lmax + 1):
            signs, n = min(m, 1) + 1, self.lmax + 1 - m
            yield m, x[row : row + 2 * signs * n].unflatten(0, (signs, 2, n))
            row += 2 * signs * n


@lru_cache
def layout(lmax: int) -> Layout:
    return Layout(lmax)


class DenseRotations(nn.Module):
    """Unpack Wigner matrices (E, P + 1) -> (E, rows, K), the first rows of the dense matrices.

    Rows are m-major in the edge frame, columns l-major in the global frame.
    """

    packed_index: Tensor
    dense_index: Tensor

    def __init__(self, lmax: int, rows: int) -> None:
        super().__init__()
        own = layout(lmax)
        self.shape = rows, own.size
        self.register_buffer("packed_index", own.packed_index[: rows * own.size].clone(), persistent=False)
        self.register_buffer("dense_index", own.dense_index, persistent=False)

    def forward(self, packed: Tensor, out: Tensor) -> Tensor:
        """Write the dense matrices to out and return it."""
        torch.index_select(packed, 1, self.packed_index, out=out.view(len(packed), -1))
        return out

    def add_gradient(self, d_dense: Tensor, d_packed: Tensor) -> None:
        """Add the gradient of the dense matrices to that of the packed ones."""
        whole = d_dense.new_zeros(len(d_dense), self.shape[1], self.shape[1])
        whole[:, : self.shape[0]] = d_dense
        d_packed[:, :-1] += whole.flatten(1).index_select(1, self.dense_index)


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
