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
from tqdm import tqdm

from ..config import Model, Training
from ..files import write_text
from ..graph.dataset import read_graph
from ..graph.reference import read_reference
from ..parallel.env import World
from . import checkpoint
from .loss import Errors, l1_l2
from .ranks import my_part, sum_gradients
from .tensors import Example, build_network, differences_mev


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
):
    """Train one network and write it to `directory`; resumes from `checkpoint_directory` if a checkpoint is there.

    What is written is the network with the lowest validation error seen. train.csv has a row per validation; errors are means
    over coupled components within the cutoff, those of edges in their frame. Any number of ranks gives what one rank gives, but
    for rounding. ranks_per_structure: how many share one; default all; so many structures of a batch are in work at once as
    there are groups of ranks. partitions: a file for every training, then for every validation structure, or none.
    Raises ValueError if the loss is not finite, Stopped where a signal of world.stop_on_signals() came to any rank.
    """
    settings, started = model_config.training, time.time()
    progress = progress if world.is_root else lambda message: None
    ranks = ranks_per_structure or world.size
    if world.size % ranks:
        raise ValueError(f"{world.size} ranks, {ranks} per structure: expected a divisor of the number of ranks.")
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    reference = read_reference(reference_path)
    torch.manual_seed(settings.seed)
    model = build_network(model_config.network, reference).to(world.device, dtype)
    if settings.precision == "mixed":
        model.messages_in(torch.bfloat16)
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
    parts = [
        my_part(read_graph(path), reference, model.lmax, dtype, settings.chunk, world, ranks, file, exchange)
        for path, file in zip([*train_paths, *validation_paths], partitions)
    ]
    training, validation = parts[: len(train_paths)], parts[len(train_paths) :]
    group, groups = world.rank // ranks, world.size // ranks
    validation = validation[group::groups]
    baseline = _evaluate(None, validation, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=settings.factor, patience=settings.patience)
    fingerprint = _fingerprint(model_config, reference_path, train_paths, validation_paths)
    best, recent = {}, Errors()
    state = {"step": 0, "best": float("inf"), "rows": [], "seconds": 0.0, "fingerprint": fingerprint}
    if found := checkpoint.load_checkpoint(checkpoint_directory, model, optimizer, fingerprint, progress, world.is_root):
        best, state = found
        plateau.load_state_dict(state["plateau"])
        recent = Errors(state["recent"]) if world.is_root else recent
        progress(f"resumed at step {state['step']}")
    world.barrier()  # none writes a checkpoint before all have read it
    before = state["seconds"]
    steps = tqdm(
        range(state["step"], settings.steps),
        disable=not (world.is_root and sys.stderr.isatty()),
        initial=state["step"],
        total=settings.steps,
    )
    writer = _tensorboard(directory) if settings.tensorboard and world.is_root else None

    def save(step: int):
        state["recent"] = recent.over_ranks(world).totals.tolist()
        state.update(step=step, plateau=plateau.state_dict(), seconds=before + time.time() - started)
        if world.is_root:
            checkpoint.save_checkpoint(checkpoint_directory, model, optimizer, best, state)

    for step in steps:
        rate = _rate(settings, plateau, step)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        batch, total = _batch(len(training), settings, step), 0.0
        for k in batch[group::groups]:
            loss, differences = _loss(model, training[k], settings)
            (loss / settings.batch).backward()
            recent.add(*differences)
            total += loss.item()
        total, stop = sum_gradients(model, world, total, float(world.stop_requested))
        if not np.isfinite(total):
            raise ValueError(
                f"step {step}: the loss of {', '.join(str(train_paths[k]) for k in batch)} is {total}. Lower "
                f"training.learning_rate; the last checkpoint is in {checkpoint_directory}."
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        if (step + 1) % settings.validate_every == 0 or step + 1 == settings.steps:
            errors = _evaluate(model, validation, world)
            if settings.schedule == "plateau":
                for parameters in optimizer.param_groups:
                    parameters["lr"] = plateau.get_last_lr()[0]  # without warm-up, which is not the scheduler's to lower
                plateau.step(errors["mae_mev"])
            row = {"step": step + 1, "learning_rate": rate, "train_mae_mev": recent.over_ranks(world).means()["mae_mev"]}
            row |= {f"validation_{k}": v for k, v in errors.items()} | {f"baseline_{k}": v for k, v in baseline.items()}
            state["rows"].append(row | {"seconds": before + time.time() - started})
            recent = Errors()
            if errors["mae_mev"] < state["best"]:
                state["best"] = errors["mae_mev"]
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            save(step + 1)
            for name, value in row.items() if writer else ():
                writer.add_scalar(name, value, step + 1)
            progress(
                f"step {step + 1} of {settings.steps}: training {row['train_mae_mev']:.3f}, validation {errors['mae_mev']:.3f} meV "
                f"(onsite {errors['mae_mev_onsite']:.2f}, offsite {errors['mae_mev_offsite']:.3f}; "
                f"reference {baseline['mae_mev']:.3f})"
            )
        if stop and step + 1 < settings.steps:
            save(step + 1)
            raise Stopped(f"stopped by a signal after step {step + 1} of {settings.steps}; start again to go on")
    if world.is_root:
        write_text(Path(directory) / "train.csv", _table(state["rows"]))
        record = settings.model_dump() | {"validation_mae_mev": state["best"], "seconds": round(state["seconds"], 1)}
        checkpoint.save_model(directory, model, best, model_config.network, reference_path, record)
    world.barrier()


def _loss(model, structure: Example, settings: Training):
    """This rank's share of the loss of a structure: the ranks' shares add up to it."""
    predicted = model(structure.inputs, structure.exchange, settings.recompute)
    offsite, onsite = differences_mev(predicted, structure)
    n_offsite, n_onsite = structure.counts
    loss = l1_l2(offsite, settings.l2_scale_mev, n_offsite)
    loss = loss + settings.onsite_weight * l1_l2(onsite, settings.l2_scale_mev, n_onsite)
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


def _rate(settings: Training, plateau, step: int) -> float:
    """Learning rate of a step: linear warm-up, then cosine to zero, plateau or constant."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.schedule == "cosine":
        return settings.learning_rate * warm * 0.5 * (1 + np.cos(np.pi * step / settings.steps))
    if settings.schedule == "plateau":
        return plateau.get_last_lr()[0] * warm
    return settings.learning_rate * warm


def _batch(n: int, settings: Training, step: int) -> list[int]:
    """Structures of a step: each epoch a new permutation, a function of seed and step alone, so that a resume repeats it."""
    positions = np.arange(step * settings.batch, (step + 1) * settings.batch)
    return [int(np.random.default_rng([settings.seed, p // n]).permutation(n)[p % n]) for p in positions]


def _fingerprint(model_config: Model, *paths) -> str:
    """Hash of the settings and of the data, by content."""
    digest = hashlib.sha256(json.dumps(model_config.model_dump(mode="json"), sort_keys=True).encode())
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
