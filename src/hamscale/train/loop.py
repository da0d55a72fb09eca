"""Train a network: Adam on the L1 + L2 loss of blocks, with exact resume.

A step has one or more structures, each on one or more ranks. They come from their files as they are needed
(`structures.py`).
"""

import csv
import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Model, Training
from ..container import DIGEST, fingerprint
from ..graph.graph import GRAPH, GraphFile
from ..graph.reference import REFERENCE, read_reference
from ..inputs.model_folder import first_weights, model_identity, save_model
from ..inputs.ranks import rank_example
from ..inputs.tensors import Example, differences_mev
from ..inputs.union import Union, unions
from ..layout import Layout
from ..model.chunks import Way
from ..model.network import HamiltonianNetwork, edges_that_fit
from ..operators import OPERATORS, read_operators
from ..parallel.env import World
from ..parallel.exchange import connect
from . import checkpoint
from .learner import Learner, dtype_of
from .loss import Errors, eigenvalue_error, l1_l2
from .structures import Structures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Stop of a training by a signal: the checkpoint is written, and a new start of the training continues from it."""


@dataclass(frozen=True)
class TrainingFiles:
    """The files that a training reads.

    reference: `reference/7`.
    train, validation: `graph/3` each.
    operators: those of the DFT calculation of every training structure, in the same order; needed if
    training.eigenvalue_weight is not zero.
    partitions: a file for every training structure, followed by one for every validation structure, or none.

    Structures have numbers: the training structures, then the validation structures.
    """

    reference: Path
    train: Sequence[Path]
    validation: Sequence[Path] = ()
    operators: Sequence[Path] = ()
    partitions: Sequence[Path] = ()

    def validated(self) -> range:
        """Return the numbers of the structures on which errors are measured; without others the training structures."""
        first = len(self.train) if self.validation else 0
        return range(first, first + len(self.validation or self.train))


def train(
    model_config: Model,
    files: TrainingFiles,
    directory: str | Path,
    checkpoint_directory: str | Path,
    network: int = 0,
    world: World = World(),  # noqa: B008
    ranks_per_structure: int | None = None,
    exchange: str = "torch",
    start_from: str | Path | None = None,
) -> None:
    """Train a network and write it to `directory`; resume from `checkpoint_directory` if a checkpoint is there.

    The weights written are those with the lowest validation error. train.csv has a row per validation; errors are means
    over coupled components within the cutoff, those of edges in their frames. The result does not depend on the number of
    ranks, except for rounding.
    network: which of training.networks to train, from 0; its seed is training.seed + network.
    ranks_per_structure: the number of ranks that share a structure, all by default. As many structures of a batch are
    processed at once as there are groups of ranks.
    start_from: folder of a model of the same elements and sizes, with whose weights of the same number training begins; those
    of training.start_from by default, or random ones.
    Raises ValueError if there is no such network or the loss is not finite, and Stopped if any rank received a signal of
    world.stop_on_signals().
    """
    ranks = ranks_per_structure or world.size
    start = start_from or model_config.training.start_from
    _check(model_config.training, files, network, world, ranks)
    trainer = Trainer(model_config, files, directory, checkpoint_directory, network, world, ranks, exchange, start)
    trainer.run()
    trainer.write()


def _check(settings: Training, files: TrainingFiles, network: int, world: World, ranks: int) -> None:
    """Raise ValueError if settings, files and ranks do not fit together."""
    last = settings.networks - 1
    if not 0 <= network <= last:
        raise ValueError(f"network {network}: found training.networks {settings.networks}, expected 0 to {last}.")
    if world.size % ranks:
        raise ValueError(f"{world.size} ranks, {ranks} per structure: expected a divisor of the number of ranks.")
    structures = len(files.train) + len(files.validation)
    if files.partitions and len(files.partitions) != structures:
        raise ValueError(
            f"{len(files.partitions)} partitions for {len(files.train)} training and {len(files.validation)} validation "
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
        start_from: str | Path | None,
    ):
        self.started, self.config, self.settings = time.time(), model_config, model_config.training
        self.files, self.directory, self.checkpoints = files, Path(directory), checkpoint_directory
        self.network, self.world, self.ranks = network, world, ranks
        self.group, self.groups = world.rank // ranks, world.size // ranks
        self.reference, self.exchange = read_reference(files.reference), exchange
        self.learner = Learner(model_config, self.reference, world, self.settings.seed + network)
        self.start = model_identity(start_from) if start_from else None
        if start_from:
            self.learner.begin_with(first_weights(start_from, network, self.learner.model))
        if self.settings.eigenvalue_weight and self.reference.crystal_field.potential:
            raise ValueError(
                f"training.eigenvalue_weight is {self.settings.eigenvalue_weight}, and the reference has charges that are "
                "self-consistent (prediction.self_consistent): expected one of the two."
            )
        if not files.validation:
            self.report("no validation structures: the training structures are used instead")
        if ranks > 1:
            connect(exchange, world)
        self._resume()
        self.bar = tqdm(
            disable=not (world.is_root and sys.stderr.isatty()), initial=self.state["step"], total=self.settings.steps
        )
        self.writer = _tensorboard(directory) if self.settings.tensorboard and world.is_root else None

    def report(self, message: str) -> None:
        """Log a message, on the first rank alone."""
        if self.world.is_root:
            log.info(message)

    def prepare(self, number: int) -> Example:
        """Read this rank's part of a structure."""
        files, settings = self.files, self.settings
        directed = settings.eigenvalue_weight > 0 and number < len(files.train)
        return rank_example(
            GraphFile([*files.train, *files.validation][number]),
            self.reference,
            self.learner.model.lmax,
            dtype_of(settings),
            settings.chunk,
            self.world,
            self.ranks,
            files.partitions[number] if files.partitions else None,
            self.exchange,
            read_operators(files.operators[number]) if directed else None,
            settings.directions,
        )

    def share(self, step: int) -> list[int]:
        """Return the training structures of a step that are this group's."""
        batch = _batch(len(self.files.train), self.settings, self.network, step)
        return shares(batch, self.groups)[self.group]

    def order(self) -> Iterator[int]:
        """Yield the structures that this group needs, in the order of the steps and validations that are left."""
        for step in range(self.state["step"], self.settings.steps):
            yield from self.share(step)
            if self.is_validated(step):
                yield from self.validated

    @property
    def validated(self) -> list[int]:
        """Return the structures whose errors this group measures."""
        return [number for number in self.files.validated() if self.is_mine(number)]

    def is_mine(self, number: int) -> bool:
        """Return whether this group keeps a structure in memory."""
        return number % self.groups == self.group

    def is_validated(self, step: int) -> bool:
        """Return whether errors are measured after a step."""
        return (step + 1) % self.settings.validate_every == 0 or step + 1 == self.settings.steps

    def unions(self, structures: Iterator[Example], count: int) -> Iterator[Union]:
        """Take the next structures, united where they are small."""
        device = self.world.device
        edges = edges_that_fit(device) if Way.of(device) is Way.BATCHED else self.settings.chunk
        return unions(islice(structures, count), edges * self.ranks, edges)

    def _resume(self) -> None:
        """Start at the first step, or resume from the checkpoint if there is one."""
        self.data = _digests(self.files, self.world)
        made_of = [checkpoint.SCHEMA, self.network, self.config.of_weights(), len(self.files.train), self.data]
        hashed = _hash(made_of if self.start is None else [*made_of, self.start])
        self.state: dict[str, Any] = {"step": 0, "best": float("inf"), "rows": [], "seconds": 0.0, "fingerprint": hashed}
        self.recent = Errors()
        found = checkpoint.load_checkpoint(self.checkpoints, self.learner, hashed, self.world.is_root)
        if found:
            self.state = found
            self.recent = Errors(found["recent"]) if self.world.is_root else self.recent
            self.report(f"resumed at step {found['step']}")
        self.world.barrier()  # no rank may write a checkpoint before all have read it
        self.before = self.state["seconds"]

    def run(self) -> None:
        """Make all steps that are left. Raises Stopped if any rank received a signal."""
        with Structures(self.prepare, self.order(), self.is_mine, self.settings.cache_gib * 2**30) as structures:
            for step in range(self.state["step"], self.settings.steps):
                rate = self.learner.set_rate(step)
                stop = self.step(step, structures)
                if self.is_validated(step):
                    self.validate(step, rate, structures)
                self.bar.update()
                if stop and step + 1 < self.settings.steps:
                    self.save(step + 1)
                    raise Stopped(f"stopped by a signal after step {step + 1} of {self.settings.steps}; start again to go on")

    def step(self, step: int, structures: Iterator[Example]) -> float:
        """Make one step of the optimiser, with the next of the structures.

        Returns whether any rank was asked to stop. Raises ValueError if the loss is not finite.
        """
        settings, learner = self.settings, self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        total = sum(map(self.forward_backward, self.unions(structures, len(self.share(step)))))
        total, stop = sum_gradients(learner.model, self.world, total, float(self.world.stop_requested))
        if not np.isfinite(total):
            batch = _batch(len(self.files.train), settings, self.network, step)
            raise ValueError(
                f"step {step}: the loss of {', '.join(str(self.files.train[k]) for k in batch)} is {total}. Lower "
                f"training.learning_rate; the last checkpoint is in {self.checkpoints}."
            )
        learner.step()
        return stop

    def forward_backward(self, union: Union) -> float:
        """Add the gradients of this rank's share of some structures' losses to those of the weights, and return the share."""
        predicted = self.learner.model(union.inputs, union.exchange, self.settings.recompute)
        losses = []
        for structure, of_structure in union.split(predicted):
            differences = differences_mev(of_structure, structure)
            losses.append(_loss(differences, structure, self.settings, self.world if self.ranks > 1 else World()))
            self.recent.add(*(d.detach() for d in differences))
        loss = torch.stack(losses).sum()
        (loss / self.settings.batch).backward()
        return loss.item()

    def validate(self, step: int, rate: float, structures: Iterator[Example]) -> None:
        """Measure the errors of the validation structures, the next ones, add a row to the table, and save a checkpoint.

        The weights are kept as the best ones if their error is the lowest so far.
        """
        learner, world = self.learner, self.world
        found = _evaluate(learner.result, self.unions(structures, len(self.validated)))
        errors, baseline = (of.over_ranks(world).means() for of in found)
        learner.after_validation(errors["mae_mev"])
        row = {"network": self.network, "step": step + 1, "learning_rate": rate}
        row |= {"train_mae_mev": self.recent.over_ranks(world).means()["mae_mev"]}
        row |= {f"validation_{k}": v for k, v in errors.items()} | {f"baseline_{k}": v for k, v in baseline.items()}
        self.state["rows"].append(row | {"seconds": self.before + time.time() - self.started})
        self.recent = Errors()
        if errors["mae_mev"] < self.state["best"]:
            self.state["best"] = errors["mae_mev"]
            learner.best = {k: v.detach().clone() for k, v in learner.result.state_dict().items()}
        self.bar.set_postfix_str(f"validation {errors['mae_mev']:.3f} meV")
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
            record = self.settings.model_dump(exclude={"networks", "cache_gib"}) | {
                "validation_mae_mev": [self.state["best"]],
                "seconds": [round(self.state["seconds"], 1)],
            }
            record |= {"started_from": self.start} if self.start else {}
            sizes = self.config.network.model_dump() | {"lmax": self.learner.model.lmax}
            data, table = _hash(self.data), _table(self.state["rows"])
            save_model(self.directory, [self.learner.best], sizes, self.files.reference, record, data, table)
        self.world.barrier()


def _loss(differences: tuple[Tensor, Tensor], structure: Example, settings: Training, world: World) -> Tensor:
    """Compute this rank's share of the loss of a structure from its differences from the targets.

    The shares of the ranks of `world`, which have the parts of the structure, add up to the loss.
    """
    offsite, onsite = differences
    n_offsite, n_onsite = structure.counts
    loss = l1_l2(offsite, settings.l2_scale_mev, n_offsite)
    loss = loss + settings.onsite_weight * l1_l2(onsite, settings.l2_scale_mev, n_onsite)
    if structure.directions is not None:
        of_offsite, of_onsite = structure.directions
        loss = loss + settings.eigenvalue_weight * eigenvalue_error(of_offsite @ offsite + of_onsite @ onsite, world)
    return loss


@torch.no_grad()
def _evaluate(model: HamiltonianNetwork, structures: Iterator[Union]) -> tuple[Errors, Errors]:
    """Measure the errors of a model over structures, and those of the reference alone."""
    errors, baseline = Errors(), Errors()
    for union in structures:
        for structure, predicted in union.split(model(union.inputs, union.exchange)):
            errors.add(*differences_mev(predicted, structure))
            zero = ({k: torch.zeros_like(v) for k, v in blocks.items()} for blocks in (structure.offsite, structure.onsite))
            baseline.add(*differences_mev((next(zero), next(zero)), structure))
    return errors, baseline


def _batch(n: int, settings: Training, network: int, step: int) -> list[int]:
    """Choose the structures of a step; each epoch is a new permutation.

    The choice is a function of seeds and step alone, so that a resumed run repeats it.
    """
    positions = range(step * settings.batch, (step + 1) * settings.batch)
    return [int(_epoch(n, settings.seed + network, p // n)[p % n]) for p in positions]


@lru_cache(2)
def _epoch(n: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(n)


def shares(batch: list[int], groups: int) -> list[list[int]]:
    """Divide the structures of a batch among groups of ranks as evenly as can be.

    Structure k goes to group k % groups while that has room, so that a group meets its own again and again.
    """
    most = -(-len(batch) // groups)
    result: list[list[int]] = [[] for _ in range(groups)]
    left: list[int] = []
    for k in batch:
        own = result[k % groups]
        (own if len(own) < most else left).append(k)
    for k in left:
        min(result, key=len).append(k)
    return result


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(files: TrainingFiles, world: World) -> list[list[int]]:
    """Compute hashes of the data on which the weights of a network depend; ranks share the files."""
    hashed: list[tuple[Path, Layout]] = [(files.reference, REFERENCE)]
    hashed += [(path, GRAPH) for path in (*files.train, *files.validation)]
    hashed += [(path, OPERATORS) for path in files.operators]
    digests = torch.zeros(len(hashed), DIGEST, dtype=torch.int32, device=world.device)
    for k in range(world.rank, len(hashed), world.size):
        digests[k] = torch.tensor(list(bytes.fromhex(fingerprint(*hashed[k]))))
    return world.sum(digests).tolist()


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
