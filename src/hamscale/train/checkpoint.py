"""Checkpoints and models as safetensors and JSON: nothing that is read can run code.

A checkpoint holds all that the next step depends on, so that a resumed run repeats an undisturbed one bit by bit.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..config import Network, validate
from ..files import atomic, provenance, write_text
from ..graph.reference import Reference, read_reference
from ..model.network import HamiltonianNetwork
from .tensors import build_network

MODEL_SCHEMA = "model/2"
CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(directory, learner, trained: list[dict], state: dict):
    """Weights, Adam's moments, best weights so far, those of networks trained before, and a JSON state (step, schedule, rows of
    train.csv) in one file."""
    tensors = {f"model.{n}": t for n, t in learner.model.state_dict().items()}
    for n, p in learner.model.named_parameters():
        tensors |= {f"adam.{k}.{n}": torch.as_tensor(v) for k, v in learner.optimizer.state.get(p, {}).items()}
    for k, weights in enumerate([*trained, learner.best]):
        tensors |= {f"best.{k}.{n}": t for n, t in weights.items()}
    if learner.average:
        tensors |= {f"average.{n}": t for n, t in learner.average.state_dict().items()}
    state = state | {"trained": len(trained)}
    with atomic(Path(directory) / CHECKPOINT) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})


def load_checkpoint(
    directory, learner, fingerprint: str, progress=print, is_root: bool = True
) -> tuple[list[dict], dict] | None:
    """(weights of networks trained before, state) and the learner filled in; None if there is none to go on from.

    One that belongs to other settings or data than `fingerprint` names is put aside, by the root, and not used. Raises ValueError if the file
    is cut short.
    """
    path = Path(directory) / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a checkpoint ({error}). Delete it to start anew.") from None
    if state["fingerprint"] != fingerprint:
        old = path.with_name(f"{state['fingerprint'][:12]}.{CHECKPOINT}")
        if is_root:
            path.replace(old)
        progress(f"the checkpoint found belongs to other settings or training data: starting anew; it is kept as {old}")
        return None
    learner.model.load_state_dict(_part(tensors, "model."))
    for name, p in learner.model.named_parameters():
        moments = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in tensors}
        if moments:
            # Adam counts steps on the CPU
            learner.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    if learner.average:
        learner.average.load_state_dict(_part(tensors, "average."))
    learner.plateau.load_state_dict(state["plateau"])
    *trained, learner.best = (_part(tensors, f"best.{k}.") for k in range(state["trained"] + 1))
    return trained, state


def _part(tensors: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def save_model(directory, members: list[dict], network: dict, reference_path, training: dict):
    """weights.safetensors, config.json and the reference it was trained with: all that prediction needs.

    members: weights of each network; network: fields of config.Network, lmax a number; training: a record.
    """
    directory = Path(directory)
    tensors = {f"{k}.{name}": v.detach().contiguous() for k, weights in enumerate(members) for name, v in weights.items()}
    with atomic(directory / "weights.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic(directory / "reference.h5") as temporary:
        shutil.copyfile(reference_path, temporary)
    content = {
        "schema": MODEL_SCHEMA,
        "network": network,
        "members": len(members),
        "training": training,
    } | provenance()
    write_text(directory / "config.json", json.dumps(content, indent=2) + "\n")


def load_model(directory) -> tuple[list[HamiltonianNetwork], Reference]:
    """The trained networks (float32, on the CPU), of which the mean is the prediction, and their reference.

    Raises ValueError (file, found, expected) if a part is missing, cut short or does not fit the others.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a model folder as `hamscale train` writes it.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if content.get("schema") != MODEL_SCHEMA:
        raise ValueError(f"{path}: schema is {content.get('schema')!r}, expected {MODEL_SCHEMA!r}.")
    reference = read_reference(directory / "reference.h5")
    network = validate(path, content["network"], Network)
    models = [build_network(network, reference).eval() for _ in range(content["members"])]
    try:
        tensors = load_file(directory / "weights.safetensors")
        for k, model in enumerate(models):
            model.load_state_dict(_part(tensors, f"{k}."))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{directory / 'weights.safetensors'}: does not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return models, reference
