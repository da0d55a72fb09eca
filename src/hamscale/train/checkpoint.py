"""Save and load checkpoints as safetensors and JSON, neither of which can run code when it is read.

A checkpoint holds everything on which the next step depends, so that a resumed run repeats an undisturbed one bit by bit.
"""

import json
import logging
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import atomic, sweep
from ..inputs.model_folder import with_prefix
from .learner import Learner

log = logging.getLogger(__name__)

SCHEMA = "checkpoint/3"
CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(directory: str | Path, learner: Learner, state: dict) -> None:
    """Write the weights, the moments of Adam, the best weights so far and a JSON state to one file.

    The state holds the step, the schedule and the rows of train.csv.
    """
    tensors = {f"model.{n}": t for n, t in learner.model.state_dict().items()}
    for n, p in learner.model.named_parameters():
        tensors |= {f"adam.{k}.{n}": torch.as_tensor(v) for k, v in learner.optimizer.state.get(p, {}).items()}
    tensors |= {f"best.{n}": t for n, t in learner.best.items()}
    if learner.average:
        tensors |= {f"average.{n}": t for n, t in learner.average.state_dict().items()}
    write_checkpoint(Path(directory) / CHECKPOINT, tensors, state)


def write_checkpoint(path: str | Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write tensors and a JSON state to one file, atomically, with a digest of both."""
    tensors, text = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, json.dumps(state)
    with atomic(path) as temporary:
        temporary.write_bytes(save(tensors, {"state": text, "xxh3_128": _digest(tensors, text)}))


def _digest(tensors: dict[str, torch.Tensor], state: str) -> str:
    """Return a digest of a checkpoint."""
    digest = xxhash.xxh3_128(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the tensors and the state of a checkpoint. Raises ValueError if it is cut short or damaged."""
    try:
        with safe_open(path, "pt") as file:
            written, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(tensors, written["state"]) != written["xxh3_128"]:
            raise ValueError("it is damaged: its digest is another")
        return tensors, json.loads(written["state"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a checkpoint of this version ({error}). Delete it to start anew.") from None


def load_checkpoint(directory: str | Path, learner: Learner, fingerprint: str, is_root: bool = True) -> dict | None:
    """Restore the learner and return the state, or return None if there is no checkpoint to resume from.

    A checkpoint that belongs to settings or data other than those of `fingerprint` is renamed by the root rank and not
    used.
    Raises ValueError as `read_checkpoint` does.
    """
    path = Path(directory) / CHECKPOINT
    if is_root:
        sweep(path)  # a training that is complete writes no other
    if not path.is_file():
        return None
    tensors, state = read_checkpoint(path)
    if state["fingerprint"] != fingerprint:
        old = path.with_name(f"{state['fingerprint'][:12]}.{CHECKPOINT}")
        if is_root:
            path.replace(old)
            log.info(f"the checkpoint found belongs to other settings or training data: starting anew; it is kept as {old}")
        return None
    learner.model.load_state_dict(with_prefix(tensors, "model."))
    for name, p in learner.model.named_parameters():
        moments = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in tensors}
        if moments:
            # Adam counts steps on the CPU
            learner.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    if learner.average:
        learner.average.load_state_dict(with_prefix(tensors, "average."))
    learner.plateau.load_state_dict(state["plateau"])
    learner.best = with_prefix(tensors, "best.")
    return state
