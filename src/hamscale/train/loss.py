"""Loss and errors, in meV: of physical blocks, not of scaled ones."""

import torch
from torch import Tensor


def l1_l2(difference_mev: Tensor, l2_scale_mev: float) -> Tensor:
    """mean |d| + mean d^2 / l2_scale, meV; zero where there is nothing to compare."""
    if not difference_mev.numel():
        return difference_mev.sum()
    return difference_mev.abs().mean() + difference_mev.square().mean() / l2_scale_mev


class Errors:
    """Mean absolute error of components, collected over structures: onsite, offsite and all, meV."""

    def __init__(self):
        self.sums, self.counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def add(self, offsite_mev: Tensor, onsite_mev: Tensor):
        for k, d in enumerate((offsite_mev, onsite_mev)):
            self.sums[k] += d.abs().sum().item()
            self.counts[k] += d.numel()

    def means(self) -> dict[str, float]:
        offsite, onsite = (self.sums / self.counts.clamp(min=1)).tolist()
        return {"mae_mev": (self.sums.sum() / self.counts.sum()).item(), "mae_mev_onsite": onsite, "mae_mev_offsite": offsite}
