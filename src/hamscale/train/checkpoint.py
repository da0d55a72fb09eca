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

MODEL_SCHEMA = "model/1"
CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(directory, model, optimizer, best: dict, state: dict):
    """Weights, Adam's moments, best weights so far and a JSON state (step, schedule, rows of train.csv) in one file."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = {f"model.{n}": t for n, t in model.state_dict().items()} | {f"best.{n}": t for n, t in best.items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors |= {f"adam.{k}.{names[id(p)]}": torch.as_tensor(v) for k, v in optimizer.state.get(p, {}).items()}
    with atomic(Path(directory) / CHECKPOINT) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})


def load_checkpoint(
    directory, model, optimizer, fingerprint: str, progress=print, is_root: bool = True
) -> tuple[dict, dict] | None:
    """(best weights, state) and the model and optimizer filled in; None if there is none to go on from.

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
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    model.load_state_dict(part("model."))
    for name, p in model.named_parameters():
        moments = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in tensors}
        if moments:
            # Adam counts steps on the CPU
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    return part("best."), state


def save_model(directory, model: HamiltonianNetwork, weights: dict, network: Network, reference_path, training: dict):
    """weights.safetensors, config.json and the reference it was trained with: all that prediction needs. training: a record."""
    directory = Path(directory)
    with atomic(directory / "weights.safetensors") as temporary:
        save_file({k: v.detach().contiguous() for k, v in weights.items()}, temporary)
    with atomic(directory / "reference.h5") as temporary:
        shutil.copyfile(reference_path, temporary)
    content = {
        "schema": MODEL_SCHEMA,
        "network": network.model_dump() | {"lmax": model.lmax},
        "training": training,
    } | provenance()
    write_text(directory / "config.json", json.dumps(content, indent=2) + "\n")


def load_model(directory) -> tuple[HamiltonianNetwork, Reference]:
    """The trained network (float32, on the CPU) and its reference.

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
    model = build_network(validate(path, content["network"], Network), reference)
    try:
        model.load_state_dict(load_file(directory / "weights.safetensors"))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{directory / 'weights.safetensors'}: does not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval(), reference
