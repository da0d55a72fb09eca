"""Compute the loss and the errors, in meV, of physical blocks rather than scaled ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parallel.env import World


def l1_l2(difference_mev: Tensor, l2_scale_mev: float, count: int | None = None) -> Tensor:
    """Compute sum (|d| + d^2 / l2_scale) / count, meV; zero if there is nothing to compare.

    count: number of components of all ranks, so that the sum of the ranks' losses is the mean over all components; by
    default the number of those given.
    """
    return (difference_mev.abs().sum() + difference_mev.square().sum() / l2_scale_mev) / max(1, count or difference_mev.numel())


def eigenvalue_error(products: Tensor, world: World) -> Tensor:
    """Compute the root mean square error of eigenvalues to first order, meV, (D,) -> ().

    It is the root of the mean square of the products of directions and errors.
    products: those of this rank's components. Each rank returns its share; the shares and their gradients add up over ranks
    to those of the sum.
    """
    total = world.sum(products.detach().clone())
    rms = total.square().mean().sqrt().clamp(min=torch.finfo(total.dtype).tiny)
    return (total * products).mean() / rms


class Errors:
    """Mean absolute error of components, collected over structures: onsite, offsite and all, meV."""

    def __init__(self, sums_and_counts: Sequence[Sequence[float]] = ((0, 0), (0, 0))):
        self.totals = torch.tensor(sums_and_counts, dtype=torch.float64)  # sums and counts of offsite and onsite

    def add(self, offsite_mev: Tensor, onsite_mev: Tensor) -> None:
        for k, d in enumerate((offsite_mev, onsite_mev)):
            self.totals[0, k] += d.abs().sum().item()
            self.totals[1, k] += d.numel()

    def over_ranks(self, world: World) -> "Errors":
        return Errors(world.sum(self.totals.to(world.device)).tolist())

    def means(self) -> dict[str, float]:
        sums, counts = self.totals
        offsite, onsite = (sums / counts.clamp(min=1)).tolist()
        return {"mae_mev": (sums.sum() / counts.sum()).item(), "mae_mev_onsite": onsite, "mae_mev_offsite": offsite}
