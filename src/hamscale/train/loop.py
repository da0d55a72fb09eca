"""Training: Adam on L1 + L2 of the blocks, one or more structures per step, each on one or more ranks, exact resume."""

import csv
import hashlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..config import Model, Training
from ..files import write_text
from ..graph.graph import read_graph
from ..graph.reference import Reference, read_reference
from ..inputs.model_folder import save_model
from ..inputs.ranks import rank_example
from ..inputs.tensors import Example, build_network, differences_mev
from ..model.network import HamiltonianNetwork
from ..operators import read_operators
from ..parallel.env import World
from . import checkpoint
from .loss import Errors, eigenvalue_error, l1_l2


class Stopped(Exception):
    """A signal asked for a stop: the checkpoint is written, and training goes on from it when started again."""


def train(
    model_config: Model,
    reference_path,
    train_paths,
    validation_paths,
    directory,
    checkpoint_directory,
    progress=print,
    world: World = World(),  # noqa: B008
    ranks_per_structure: int | None = None,
    partitions=(),
    exchange: str = "torch",
    operators_paths=(),
    network: int = 0,
):
    """Train a network and write it to `directory`; resumes from `checkpoint_directory` if a checkpoint is there.

    What is written has the lowest validation error seen. train.csv has a row per validation; errors are means over coupled
    components within the cutoff, those of edges in their frame. Any number of ranks gives what one rank gives, but
    for rounding. network: which of training.members, 0 and up; its seed is training.seed + network. ranks_per_structure: how many
    share one; default all; so many structures of a batch are in work at once as there are groups of ranks. partitions: a file for
    every training, then for every validation structure, or none. operators_paths: DFT's of every training structure, where
    training.eigenvalue_weight is not zero.
    Raises ValueError if there is no such network or the loss is not finite, Stopped where a signal of world.stop_on_signals() came to
    any rank.
    """
    settings, started = model_config.training, time.time()
    if not 0 <= network < settings.members:
        raise ValueError(f"network {network}: found training.members {settings.members}, expected 0 to {settings.members - 1}.")
    progress = progress if world.is_root else lambda message: None
    ranks = ranks_per_structure or world.size
    if world.size % ranks:
        raise ValueError(f"{world.size} ranks, {ranks} per structure: expected a divisor of the number of ranks.")
    reference = read_reference(reference_path)
    learner = Learner(model_config, reference, world, settings.seed + network)
    # a validation structure may be missing in a small set: then the training structures stand in, and the log says so
    if not validation_paths:
        progress("no validation structures: the training structures are used instead")
    validation_paths = validation_paths or train_paths
    partitions = list(partitions) or [None] * (len(train_paths) + len(validation_paths))
    if len(partitions) != len(train_paths) + len(validation_paths):
        raise ValueError(
            f"{len(partitions)} partitions for {len(train_paths)} training and {len(validation_paths)} validation structures. "
            "Give one for each, in that order, or none."
        )
    weighted = settings.eigenvalue_weight > 0
    if weighted and len(operators_paths) != len(train_paths):
        raise ValueError(
            f"training.eigenvalue_weight is {settings.eigenvalue_weight}, which needs the operators of every training structure: found "
            f"{len(operators_paths)}, expected {len(train_paths)}. Give them in the order of the graphs."
        )
    if weighted and 1 < ranks < world.size:
        raise ValueError(
            f"training.eigenvalue_weight with {ranks} of {world.size} ranks per structure: expected 1 or {world.size}. Choose one of them."
        )
    operators = [*operators_paths] if weighted else [None] * len(train_paths)
    lmax, dtype = learner.model.lmax, _dtype(settings)
    parts = [
        rank_example(
            read_graph(path), reference, lmax, dtype, settings.chunk, world, ranks, file, exchange,
            of and read_operators(of), settings.directions,
        )
        for path, file, of in zip([*train_paths, *validation_paths], partitions, operators + [None] * len(validation_paths))
    ]  # fmt: skip
    training, validation = parts[: len(train_paths)], parts[len(train_paths) :]
    group, groups = world.rank // ranks, world.size // ranks
    validation = validation[group::groups]
    baseline = _evaluate(None, validation, world)
    fingerprint = _fingerprint(model_config, network, reference_path, train_paths, validation_paths, operators_paths)
    state = {"step": 0, "best": float("inf"), "rows": [], "seconds": 0.0, "fingerprint": fingerprint}
    recent = Errors()
    if found := checkpoint.load_checkpoint(checkpoint_directory, learner, fingerprint, progress, world.is_root):
        state = found
        recent = Errors(state["recent"]) if world.is_root else recent
        progress(f"resumed at step {state['step']}")
    world.barrier()  # none writes a checkpoint before all have read it
    before = state["seconds"]
    bar = tqdm(disable=not (world.is_root and sys.stderr.isatty()), initial=state["step"], total=settings.steps)
    writer = _tensorboard(directory) if settings.tensorboard and world.is_root else None

    def save(step: int):
        state["recent"] = recent.over_ranks(world).totals.tolist()
        state.update(step=step, plateau=learner.plateau.state_dict(), seconds=before + time.time() - started)
        if world.is_root:
            checkpoint.save_checkpoint(checkpoint_directory, learner, state)

    for step in range(state["step"], settings.steps):
        rate = learner.set_rate(step)
        learner.optimizer.zero_grad(set_to_none=True)
        batch, total = _batch(len(training), settings, network, step), 0.0
        for k in batch[group::groups]:
            loss, differences = _loss(learner.model, training[k], settings, world if ranks > 1 else World())
            (loss / settings.batch).backward()
            recent.add(*differences)
            total += loss.item()
        total, stop = sum_gradients(learner.model, world, total, float(world.stop_requested))
        if not np.isfinite(total):
            raise ValueError(
                f"step {step}: the loss of {', '.join(str(train_paths[k]) for k in batch)} is {total}. Lower "
                f"training.learning_rate; the last checkpoint is in {checkpoint_directory}."
            )
        learner.step()
        last = step + 1 == settings.steps
        if (step + 1) % settings.validate_every == 0 or last:
            errors = _evaluate(learner.result, validation, world)
            learner.after_validation(errors["mae_mev"])
            row = {"member": network, "step": step + 1, "learning_rate": rate}
            row |= {"train_mae_mev": recent.over_ranks(world).means()["mae_mev"]}
            row |= {f"validation_{k}": v for k, v in errors.items()} | {f"baseline_{k}": v for k, v in baseline.items()}
            state["rows"].append(row | {"seconds": before + time.time() - started})
            recent = Errors()
            if errors["mae_mev"] < state["best"]:
                state["best"] = errors["mae_mev"]
                learner.best = {k: v.detach().clone() for k, v in learner.result.state_dict().items()}
            save(step + 1)
            for name, value in row.items() if writer else ():
                writer.add_scalar(name, value, step + 1)
            progress(
                f"step {step + 1} of {settings.steps}: training {row['train_mae_mev']:.3f}, validation {errors['mae_mev']:.3f} meV "
                f"(onsite {errors['mae_mev_onsite']:.2f}, offsite {errors['mae_mev_offsite']:.3f}; "
                f"reference {baseline['mae_mev']:.3f})"
            )
        bar.update()
        if stop and not last:
            save(step + 1)
            raise Stopped(f"stopped by a signal after step {step + 1} of {settings.steps}; start again to go on")
    if not learner.best:
        raise ValueError("no validation error was a number. Lower training.learning_rate.")
    if world.is_root:
        write_text(Path(directory) / "train.csv", _table(state["rows"]))
        record = settings.model_dump(exclude={"members"}) | {
            "validation_mae_mev": [state["best"]],
            "seconds": [round(state["seconds"], 1)],
        }
        sizes = model_config.network.model_dump() | {"lmax": lmax}
        save_model(directory, [learner.best], sizes, reference_path, record)
    world.barrier()


class Learner:
    """A network that is being trained: with its optimiser and learning rate, and its best weights so far."""

    def __init__(self, model_config: Model, reference: Reference, world: World, seed: int):
        self.settings = settings = model_config.training
        torch.manual_seed(seed)
        self.model = build_network(model_config.network, reference).to(world.device, _dtype(settings))
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
        self.best = {}

    @property
    def result(self) -> HamiltonianNetwork:
        """What is validated and written."""
        return self.average.module if self.average else self.model

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)

    def set_rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to zero, plateau or constant."""
        settings = self.settings
        rate = min(1.0, (step + 1) / max(1, settings.warmup))
        if settings.schedule == "cosine":
            rate *= settings.learning_rate * 0.5 * (1 + np.cos(np.pi * step / settings.steps))
        elif settings.schedule == "plateau":
            rate *= self.plateau.get_last_lr()[0]
        else:
            rate *= settings.learning_rate
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        return rate

    def after_validation(self, error: float):
        if self.settings.schedule == "plateau":
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = self.plateau.get_last_lr()[0]  # without warm-up, which is not the scheduler's to lower
            self.plateau.step(error)


def _dtype(settings: Training) -> torch.dtype:
    return torch.float64 if settings.precision == "float64" else torch.float32


def _loss(model, structure: Example, settings: Training, world: World):
    """This rank's share of the loss of a structure, which the ranks of `world` have: the ranks' shares add up to it."""
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
def _evaluate(model, structures: list[Example], world: World) -> dict[str, float]:
    """Errors over all ranks' structures; of the reference alone where model is None."""
    errors = Errors()
    for structure in structures:
        if model is None:
            predicted = tuple(
                {k: torch.zeros_like(v) for k, v in part.items()} for part in (structure.offsite, structure.onsite)
            )
        else:
            predicted = model(structure.inputs, structure.exchange)
        errors.add(*differences_mev(predicted, structure))
    return errors.over_ranks(world).means()


def _batch(n: int, settings: Training, network: int, step: int) -> list[int]:
    """Structures of a step: each epoch a new permutation, a function of seeds and step alone, so that a resume repeats it."""
    positions = np.arange(step * settings.batch, (step + 1) * settings.batch)
    return [int(np.random.default_rng([settings.seed + network, p // n]).permutation(n)[p % n]) for p in positions]


def _fingerprint(model_config: Model, network: int, *paths) -> str:
    """Hash of the data and of the settings that a network's weights depend on."""
    content = model_config.model_dump(mode="json", exclude={"description": True, "training": {"members"}})
    digest = hashlib.sha256(json.dumps([checkpoint.SCHEMA, network, content], sort_keys=True).encode())
    for path in (p for group in paths for p in ([group] if isinstance(group, (str, Path)) else group)):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _table(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _tensorboard(directory):
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, seldom asked for

    return SummaryWriter(Path(directory) / "tensorboard")


def sum_gradients(model, world: World, *more: float) -> list[float]:
    """Sum the gradients of all weights over ranks, in place, and some numbers with them, in one message; return the numbers."""
    if world.size == 1:
        return list(more)
    weights = list(model.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    extra = torch.tensor(more, dtype=grads[0].dtype, device=grads[0].device)
    flat = world.sum(torch.cat([*(g.flatten() for g in grads), extra]))
    for p, g in zip(weights, flat.split([p.numel() for p in weights] + [len(more)])):
        p.grad = g.view_as(p)
    return flat[len(flat) - len(more) :].tolist()
