"""Hold a network in training: its optimiser, learning rate, moving average and best weights so far."""

from typing import cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import Model, Training
from ..graph.reference import Reference
from ..inputs.tensors import build_network
from ..model.network import HamiltonianNetwork
from ..parallel.env import World


class Learner:
    """A network in training, with its optimiser, its learning rate and its best weights so far."""

    def __init__(self, model_config: Model, reference: Reference, world: World, seed: int):
        self.settings = settings = model_config.training
        torch.manual_seed(seed)
        self.model = build_network(model_config.network, reference).to(world.device, dtype_of(settings))
        if settings.precision == "mixed":
            self.model.messages_in(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=settings.factor, patience=settings.patience
        )
        decay = settings.average
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.best: dict[str, torch.Tensor] = {}

    def begin_with(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the first weights, which are random."""
        self.model.load_state_dict(weights)
        if self.average:
            self.average.module.load_state_dict(weights)

    @property
    def result(self) -> HamiltonianNetwork:
        """Return the network to validate and write: the moving average of the weights if there is one."""
        return cast(HamiltonianNetwork, self.average.module) if self.average else self.model

    def step(self) -> None:
        """Clip the gradients and update the weights."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)

    def set_rate(self, step: int) -> float:
        """Set and return the learning rate of a step: linear warm-up, then cosine to zero, plateau or constant."""
        settings = self.settings
        rate = min(1.0, (step + 1) / max(1, settings.warmup))
        if settings.schedule == "cosine":
            rate *= settings.learning_rate * 0.5 * (1 + np.cos(np.pi * step / settings.steps))
        elif settings.schedule == "plateau":
            rate *= float(self.plateau.get_last_lr()[0])
        else:
            rate *= settings.learning_rate
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        return rate

    def after_validation(self, error: float) -> None:
        """Pass the error to the `plateau` schedule, and set the learning rate that results."""
        if self.settings.schedule == "plateau":
            for parameters in self.optimizer.param_groups:
                # the scheduler reads this rate and lowers it, so the factor of the warm-up must not be part of it
                parameters["lr"] = self.plateau.get_last_lr()[0]
            self.plateau.step(error)


def dtype_of(settings: Training) -> torch.dtype:
    """Return the type of weights, features and sums."""
    return torch.float64 if settings.precision == "float64" else torch.float32
