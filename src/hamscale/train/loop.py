"""Training: Adam on L1 + L2 of the blocks, one or more structures per step, exact resume."""

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
from . import checkpoint
from .loss import Errors, l1_l2
from .tensors import Example, build_network, differences_mev, example


def train(model_config: Model, reference_path, train_paths, validation_paths, directory, checkpoint_directory, progress=print):
    """Train one network and write it to `directory`; resumes from `checkpoint_directory` if a checkpoint is there.

    What is written is the network with the lowest validation error seen. train.csv has a row per validation; errors are means
    over coupled components within the cutoff, those of edges in their frame. Raises ValueError if the loss is not finite.
    """
    settings, started = model_config.training, time.time()
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    reference = read_reference(reference_path)
    torch.manual_seed(settings.seed)
    model = build_network(model_config.network, reference).to(dtype)
    if settings.precision == "mixed":
        model.messages_in(torch.bfloat16)
    # a validation structure may be missing in a small set: then the training structures stand in, and the log says so
    if not validation_paths:
        progress("no validation structures: the training structures are used instead")
    load = lambda paths: [example(read_graph(p), reference, model.lmax, dtype, settings.chunk) for p in paths]  # noqa: E731
    training, validation = load(train_paths), load(validation_paths or train_paths)
    baseline = _evaluate(None, validation)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=settings.factor, patience=settings.patience)
    fingerprint = _fingerprint(model_config, reference_path, train_paths, validation_paths)
    best, state = {}, {"step": 0, "best": float("inf"), "rows": [], "seconds": 0.0, "fingerprint": fingerprint}
    if found := checkpoint.load_checkpoint(checkpoint_directory, model, optimizer, fingerprint, progress):
        best, state = found
        plateau.load_state_dict(state["plateau"])
        progress(f"resumed at step {state['step']}")
    before = state["seconds"]
    steps = tqdm(
        range(state["step"], settings.steps), disable=not sys.stderr.isatty(), initial=state["step"], total=settings.steps
    )
    writer = _tensorboard(directory) if settings.tensorboard else None
    recent = Errors()
    for step in steps:
        rate = _rate(settings, plateau, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        for k in _batch(len(training), settings, step):
            loss, differences = _loss(model, training[k], settings)
            (loss / settings.batch).backward()
            recent.add(*differences)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"step {step}: the loss of {train_paths[k]} is {loss.item()}. Lower training.learning_rate; the last "
                    f"checkpoint is in {checkpoint_directory}."
                )
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        if (step + 1) % settings.validate_every == 0 or step + 1 == settings.steps:
            errors = _evaluate(model, validation)
            if settings.schedule == "plateau":
                for group in optimizer.param_groups:
                    group["lr"] = plateau.get_last_lr()[0]  # without warm-up, which is not the scheduler's to lower
                plateau.step(errors["mae_mev"])
            row = {"step": step + 1, "learning_rate": rate, "train_mae_mev": recent.means()["mae_mev"]}
            row |= {f"validation_{k}": v for k, v in errors.items()} | {f"baseline_{k}": v for k, v in baseline.items()}
            state["seconds"] = before + time.time() - started
            state["rows"].append(row | {"seconds": state["seconds"]})
            recent = Errors()
            if errors["mae_mev"] < state["best"]:
                state["best"] = errors["mae_mev"]
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            state |= {"step": step + 1, "plateau": plateau.state_dict()}
            checkpoint.save_checkpoint(checkpoint_directory, model, optimizer, best, state)
            for name, value in row.items() if writer else ():
                writer.add_scalar(name, value, step + 1)
            progress(
                f"step {step + 1} of {settings.steps}: training {row['train_mae_mev']:.3f}, validation {errors['mae_mev']:.3f} meV "
                f"(onsite {errors['mae_mev_onsite']:.2f}, offsite {errors['mae_mev_offsite']:.3f}; "
                f"two-centre reference {baseline['mae_mev']:.3f})"
            )
    write_text(Path(directory) / "train.csv", _table(state["rows"]))
    record = settings.model_dump() | {"validation_mae_mev": state["best"], "seconds": round(state["seconds"], 1)}
    checkpoint.save_model(directory, model, best, model_config.network, reference_path, record)


def _loss(model, structure: Example, settings: Training):
    offsite, onsite = differences_mev(model(structure.inputs, recompute=settings.recompute), structure)
    loss = l1_l2(offsite, settings.l2_scale_mev) + settings.onsite_weight * l1_l2(onsite, settings.l2_scale_mev)
    return loss, (offsite.detach(), onsite.detach())


@torch.no_grad()
def _evaluate(model, structures: list[Example]) -> dict[str, float]:
    """Errors over structures; of the two-centre reference alone where model is None."""
    errors = Errors()
    for structure in structures:
        if model is None:
            predicted = tuple(
                {k: torch.zeros_like(v) for k, v in part.items()} for part in (structure.offsite, structure.onsite)
            )
        else:
            predicted = model(structure.inputs)
        errors.add(*differences_mev(predicted, structure))
    return errors.means()


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
