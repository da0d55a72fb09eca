"""Order of edge features and packed Wigner matrices.

Shapes: E edges, K = (lmax+1)^2 coefficients, C channels, N_m = lmax+1-m degrees that have order m.
Node features are l-major, (A, K, C), in the global frame. Edge features are m-major, in the frame where the edge is +z: a list
of pieces, one per m = 0..lmax: (E, 1, N_0, C) for m = 0, (E, 2, N_m, C) for m > 0, the two being +m and -m.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Layout:
    """Index tables for one lmax."""

    def __init__(self, lmax: int):
        self.lmax, self.size = lmax, (lmax + 1) ** 2
        self.degrees = [lmax + 1 - m for m in range(lmax + 1)]  # N_m
        self.rows = [(1 if m == 0 else 2) * n for m, n in enumerate(self.degrees)]
        order = [(l, 0) for l in range(lmax + 1)]
        for m in range(1, lmax + 1):
            order += [(l, m) for l in range(m, lmax + 1)] + [(l, -m) for l in range(m, lmax + 1)]
        self.m_major = torch.argsort(torch.tensor([l * l + l + m for l, m in order]))  # (K,): m-major row of each l-major one
        packed = [
            int(self.m_major[l * l + a]) * self.size + l * l + b
            for l in range(lmax + 1)
            for a in range(2 * l + 1)
            for b in range(2 * l + 1)
        ]
        self.dense_index = torch.tensor(packed)  # (P,): where packed numbers stand in the (K, K) matrix
        self.axial_source = torch.nonzero(self.dense_index < (lmax + 1) * self.size).flatten()  # those in rows m = 0
        self.axial_index = self.dense_index[self.axial_source]

    def pack(self, rotations: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        """Wigner matrices D^l of each edge (`angular.edge_rotations`) as (E, P), P = sum (2l+1)^2 (165 for lmax 4)."""
        flat = [D.reshape(len(D), D.shape[1] ** 2) for D in rotations[: self.lmax + 1]]
        return torch.from_numpy(np.concatenate(flat, 1)).to(dtype)

    def dense(self, packed: Tensor, axial: bool = False) -> Tensor:
        """(E, P) -> (E, K, K): rows m-major in the edge frame, columns l-major in the global one; axial: the rows m = 0 alone."""
        rows = self.lmax + 1 if axial else self.size
        matrix = packed.new_zeros(len(packed), rows * self.size)
        if axial:
            matrix[:, self.axial_index] = packed[:, self.axial_source]
        else:
            matrix[:, self.dense_index] = packed
        return matrix.view(-1, rows, self.size)

    def pieces(self, x: Tensor) -> list[Tensor]:
        """(E, K, C) m-major -> views (E, 1 or 2, N_m, C)."""
        return [p.unflatten(1, (r // n, n)) for p, r, n in zip(x.split(self.rows, 1), self.rows, self.degrees)]


@lru_cache
def layout(lmax: int) -> Layout:
    return Layout(lmax)
