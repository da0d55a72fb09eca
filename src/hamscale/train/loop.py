"""Train a network: Adam on the L1 + L2 loss of blocks, with exact resume.

A step has one or more structures, each on one or more ranks.
"""

import csv
import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Model, Training
from ..files import write_text
from ..graph.graph import GraphFile
from ..graph.reference import Reference, read_reference
from ..inputs.model_folder import save_model
from ..inputs.ranks import rank_example
from ..inputs.tensors import Example, differences_mev
from ..model.network import HamiltonianNetwork
from ..operators import read_operators
from ..parallel.env import World
from . import checkpoint
from .learner import Learner, dtype_of
from .loss import Errors, eigenvalue_error, l1_l2

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Stop of a training by a signal: the checkpoint is written, and a new start of the training continues from it."""


@dataclass(frozen=True)
class TrainingFiles:
    """The files that a training reads.

    reference: `reference/6`.
    train, validation: `graph/2` each.
    operators: those of the DFT calculation of every training structure, in the same order; needed if
    training.eigenvalue_weight is not zero.
    partitions: a file for every training structure, followed by one for every validation structure, or none.
    """

    reference: Path
    train: Sequence[Path]
    validation: Sequence[Path] = ()
    operators: Sequence[Path] = ()
    partitions: Sequence[Path] = ()

    def validated(self) -> Sequence[Path]:
        """Return the graphs on which errors are measured; without validation structures these are the training structures."""
        return self.validation or self.train


def train(
    model_config: Model,
    files: TrainingFiles,
    directory: str | Path,
    checkpoint_directory: str | Path,
    network: int = 0,
    world: World = World(),  # noqa: B008
    ranks_per_structure: int | None = None,
    exchange: str = "torch",
) -> None:
    """Train a network and write it to `directory`; resume from `checkpoint_directory` if a checkpoint is there.

    The weights written are those with the lowest validation error. train.csv has a row per validation; errors are means
    over coupled components within the cutoff, those of edges in their frames. The result does not depend on the number of
    ranks, except for rounding.
    network: which of training.networks to train, from 0; its seed is training.seed + network.
    ranks_per_structure: the number of ranks that share a structure, all by default. As many structures of a batch are
    processed at once as there are groups of ranks.
    Raises ValueError if there is no such network or the loss is not finite, and Stopped if any rank received a signal of
    world.stop_on_signals().
    """
    ranks = ranks_per_structure or world.size
    _check(model_config.training, files, network, world, ranks)
    trainer = Trainer(model_config, files, directory, checkpoint_directory, network, world, ranks, exchange)
    trainer.run()
    trainer.write()


def _check(settings: Training, files: TrainingFiles, network: int, world: World, ranks: int) -> None:
    """Raise ValueError if settings, files and ranks do not fit together."""
    last = settings.networks - 1
    if not 0 <= network <= last:
        raise ValueError(f"network {network}: found training.networks {settings.networks}, expected 0 to {last}.")
    if world.size % ranks:
        raise ValueError(f"{world.size} ranks, {ranks} per structure: expected a divisor of the number of ranks.")
    structures = len(files.train) + len(files.validated())
    if files.partitions and len(files.partitions) != structures:
        raise ValueError(
            f"{len(files.partitions)} partitions for {len(files.train)} training and {len(files.validated())} validation "
            "structures. Give one for each, in that order, or none."
        )
    weighted = settings.eigenvalue_weight > 0
    if weighted and len(files.operators) != len(files.train):
        raise ValueError(
            f"training.eigenvalue_weight is {settings.eigenvalue_weight}, which needs the operators of every training "
            f"structure: found {len(files.operators)}, expected {len(files.train)}. Give them in the order of the graphs."
        )
    if weighted and 1 < ranks < world.size:
        raise ValueError(
            f"training.eigenvalue_weight with {ranks} of {world.size} ranks per structure: expected 1 or {world.size}. "
            "Choose one of them."
        )


class Trainer:
    """Training of one network on one rank: its state, and the steps that change it."""

    def __init__(
        self,
        model_config: Model,
        files: TrainingFiles,
        directory: str | Path,
        checkpoint_directory: str | Path,
        network: int,
        world: World,
        ranks: int,
        exchange: str,
    ):
        self.started, self.config, self.settings = time.time(), model_config, model_config.training
        self.files, self.directory, self.checkpoints = files, Path(directory), checkpoint_directory
        self.network, self.world, self.ranks = network, world, ranks
        self.group, self.groups = world.rank // ranks, world.size // ranks
        reference = read_reference(files.reference)
        self.learner = Learner(model_config, reference, world, self.settings.seed + network)
        if not files.validation:
            self.report("no validation structures: the training structures are used instead")
        self.training, validation = self._examples(reference, exchange)
        self.validation = validation[self.group :: self.groups]
        self.baseline = _evaluate(None, self.validation, world)
        self._resume()
        self.bar = tqdm(
            disable=not (world.is_root and sys.stderr.isatty()), initial=self.state["step"], total=self.settings.steps
        )
        self.writer = _tensorboard(directory) if self.settings.tensorboard and world.is_root else None

    def report(self, message: str) -> None:
        """Log a message, on the first rank alone."""
        if self.world.is_root:
            log.info(message)

    def _examples(self, reference: Reference, exchange: str) -> tuple[list[Example], list[Example]]:
        """Read this rank's parts of the training and of the validation structures."""
        files, settings = self.files, self.settings
        paths = [*files.train, *files.validated()]
        partitions: Sequence[Path | None] = files.partitions or [None] * len(paths)
        weighted = settings.eigenvalue_weight > 0
        operators = [*(files.operators if weighted else []), *[None] * len(paths)]
        parts = [
            rank_example(
                GraphFile(path), reference, self.learner.model.lmax, dtype_of(settings), settings.chunk, self.world,
                self.ranks, partition, exchange, read_operators(dft) if dft else None, settings.directions,
            )
            for path, partition, dft in zip(paths, partitions, operators)
        ]  # fmt: skip
        return parts[: len(files.train)], parts[len(files.train) :]

    def _resume(self) -> None:
        """Start at the first step, or resume from the checkpoint if there is one."""
        fingerprint = _fingerprint(self.config, self.network, self.files)
        self.state: dict[str, Any] = {"step": 0, "best": float("inf"), "rows": [], "seconds": 0.0, "fingerprint": fingerprint}
        self.recent = Errors()
        found = checkpoint.load_checkpoint(self.checkpoints, self.learner, fingerprint, self.world.is_root)
        if found:
            self.state = found
            self.recent = Errors(found["recent"]) if self.world.is_root else self.recent
            self.report(f"resumed at step {found['step']}")
        self.world.barrier()  # no rank may write a checkpoint before all have read it
        self.before = self.state["seconds"]

    def run(self) -> None:
        """Make all steps that are left. Raises Stopped if any rank received a signal."""
        for step in range(self.state["step"], self.settings.steps):
            rate = self.learner.set_rate(step)
            stop = self.step(step)
            last = step + 1 == self.settings.steps
            if (step + 1) % self.settings.validate_every == 0 or last:
                self.validate(step, rate)
            self.bar.update()
            if stop and not last:
                self.save(step + 1)
                raise Stopped(f"stopped by a signal after step {step + 1} of {self.settings.steps}; start again to go on")

    def step(self, step: int) -> float:
        """Make one step of the optimiser.

        Returns whether any rank was asked to stop. Raises ValueError if the loss is not finite.
        """
        settings, learner = self.settings, self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        batch = _batch(len(self.training), settings, self.network, step)
        total = sum(self.forward_backward(self.training[k]) for k in batch[self.group :: self.groups])
        total, stop = sum_gradients(learner.model, self.world, total, float(self.world.stop_requested))
        if not np.isfinite(total):
            raise ValueError(
                f"step {step}: the loss of {', '.join(str(self.files.train[k]) for k in batch)} is {total}. Lower "
                f"training.learning_rate; the last checkpoint is in {self.checkpoints}."
            )
        learner.step()
        return stop

    def forward_backward(self, structure: Example) -> float:
        """Add the gradients of this rank's share of a structure's loss to those of the weights, and return the share."""
        loss, differences = _loss(self.learner.model, structure, self.settings, self.world if self.ranks > 1 else World())
        (loss / self.settings.batch).backward()
        self.recent.add(*differences)
        return loss.item()

    def validate(self, step: int, rate: float) -> None:
        """Measure the errors of the validation structures, add a row to the table, and save a checkpoint.

        The weights are kept as the best ones if their error is the lowest so far.
        """
        learner, baseline, world = self.learner, self.baseline, self.world
        errors = _evaluate(learner.result, self.validation, world)
        learner.after_validation(errors["mae_mev"])
        row = {"network": self.network, "step": step + 1, "learning_rate": rate}
        row |= {"train_mae_mev": self.recent.over_ranks(world).means()["mae_mev"]}
        row |= {f"validation_{k}": v for k, v in errors.items()} | {f"baseline_{k}": v for k, v in baseline.items()}
        self.state["rows"].append(row | {"seconds": self.before + time.time() - self.started})
        self.recent = Errors()
        if errors["mae_mev"] < self.state["best"]:
            self.state["best"] = errors["mae_mev"]
            learner.best = {k: v.detach().clone() for k, v in learner.result.state_dict().items()}
        self.save(step + 1)
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, step + 1)
        self.report(
            f"step {step + 1} of {self.settings.steps}: training {row['train_mae_mev']:.3f}, "
            f"validation {errors['mae_mev']:.3f} meV "
            f"(onsite {errors['mae_mev_onsite']:.2f}, offsite {errors['mae_mev_offsite']:.3f}; "
            f"reference {baseline['mae_mev']:.3f})"
        )

    def save(self, step: int) -> None:
        """Write a checkpoint from which the next step continues exactly."""
        self.state["recent"] = self.recent.over_ranks(self.world).totals.tolist()
        seconds = self.before + time.time() - self.started
        self.state.update(step=step, plateau=self.learner.plateau.state_dict(), seconds=seconds)
        if self.world.is_root:
            checkpoint.save_checkpoint(self.checkpoints, self.learner, self.state)

    def write(self) -> None:
        """Write the model with the lowest validation error, and train.csv.

        Raises ValueError if no validation error was a number.
        """
        if not self.learner.best:
            raise ValueError("no validation error was a number. Lower training.learning_rate.")
        if self.world.is_root:
            write_text(self.directory / "train.csv", _table(self.state["rows"]))
            record = self.settings.model_dump(exclude={"networks"}) | {
                "validation_mae_mev": [self.state["best"]],
                "seconds": [round(self.state["seconds"], 1)],
            }
            sizes = self.config.network.model_dump() | {"lmax": self.learner.model.lmax}
            save_model(self.directory, [self.learner.best], sizes, self.files.reference, record)
        self.world.barrier()


def _loss(
    model: HamiltonianNetwork, structure: Example, settings: Training, world: World
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute this rank's share of the loss of a structure, with its differences from the targets.

    The shares of the ranks of `world`, which have the parts of the structure, add up to the loss.
    """
    predicted = model(structure.inputs, structure.exchange, settings.recompute)
    offsite, onsite = differences_mev(predicted, structure)
    n_offsite, n_onsite = structure.counts
    loss = l1_l2(offsite, settings.l2_scale_mev, n_offsite)
    loss = loss + settings.onsite_weight * l1_l2(onsite, settings.l2_scale_mev, n_onsite)
    if structure.directions is not None:
        of_offsite, of_onsite = structure.directions
        loss = loss + settings.eigenvalue_weight * eigenvalue_error(of_offsite @ offsite + of_onsite @ onsite, world)
    return loss, (offsite.detach(), onsite.detach())


@torch.no_grad()
def _evaluate(model: HamiltonianNetwork | None, structures: list[Example], world: World) -> dict[str, float]:
    """Measure the errors over the structures of all ranks; those of the reference alone if model is None."""
    errors = Errors()
    for structure in structures:
        if model is None:
            zero = lambda blocks: {k: torch.zeros_like(v) for k, v in blocks.items()}  # noqa: E731
            predicted = zero(structure.offsite), zero(structure.onsite)
        else:
            predicted = model(structure.inputs, structure.exchange)
        errors.add(*differences_mev(predicted, structure))
    return errors.over_ranks(world).means()


def _batch(n: int, settings: Training, network: int, step: int) -> list[int]:
    """Choose the structures of a step; each epoch is a new permutation.

    The choice is a function of seeds and step alone, so that a resumed run repeats it.
    """
    positions = range(step * settings.batch, (step + 1) * settings.batch)
    return [int(np.random.default_rng([settings.seed + network, p // n]).permutation(n)[p % n]) for p in positions]


def _fingerprint(model_config: Model, network: int, files: TrainingFiles) -> str:
    """Compute a hash of the data and the settings on which the weights of a network depend."""
    content = model_config.model_dump(mode="json", exclude={"description": True, "training": {"networks"}})
    digest = hashlib.sha256(json.dumps([checkpoint.SCHEMA, network, content], sort_keys=True).encode())
    for path in (files.reference, *files.train, *files.validated(), *files.operators):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _table(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _tensorboard(directory: str | Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # imported here because it takes seconds and is rarely needed

    return SummaryWriter(Path(directory) / "tensorboard")


def sum_gradients(model: torch.nn.Module, world: World, *more: float) -> list[float]:
    """Sum the gradients of all weights over ranks, in place, and return the sums of further numbers.

    All of them travel in one message.
    """
    if world.size == 1:
        return list(more)
    weights = list(model.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    extra = torch.tensor(more, dtype=grads[0].dtype, device=grads[0].device)
    flat = world.sum(torch.cat([*(g.flatten() for g in grads), extra]))
    for p, g in zip(weights, flat.split([p.numel() for p in weights] + [len(more)])):
        p.grad = g.view_as(p)
    return flat[len(flat) - len(more) :].tolist()
