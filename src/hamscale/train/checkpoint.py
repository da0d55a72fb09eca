"""Checkpoints and models as safetensors and JSON: nothing that is read can run code.

A checkpoint holds all that the next step depends on, so that a resumed run repeats an undisturbed one bit by bit.
"""

import csv
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
SCHEMA = "checkpoint/2"
CHECKPOINT = "checkpoint.safetensors"
OF_EACH = ("validation_mae_mev", "seconds")  # of a model's training, a number for each network


def save_checkpoint(directory, learner, state: dict):
    """Weights, Adam's moments, best weights so far and a JSON state (step, schedule, rows of train.csv) in one file."""
    tensors = {f"model.{n}": t for n, t in learner.model.state_dict().items()}
    for n, p in learner.model.named_parameters():
        tensors |= {f"adam.{k}.{n}": torch.as_tensor(v) for k, v in learner.optimizer.state.get(p, {}).items()}
    tensors |= {f"best.{n}": t for n, t in learner.best.items()}
    if learner.average:
        tensors |= {f"average.{n}": t for n, t in learner.average.state_dict().items()}
    with atomic(Path(directory) / CHECKPOINT) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})


def load_checkpoint(directory, learner, fingerprint: str, progress=print, is_root: bool = True) -> dict | None:
    """The state, and the learner filled in; None if there is none to go on from.

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
    learner.best = _part(tensors, "best.")
    return state


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


def join(directories: list[Path], out):
    """One model of the networks of several, which differ in their seeds alone; train.csv has the rows of all.

    Raises ValueError if sizes, settings or references differ, a network is given twice, or a file is cut short.
    """
    contents, tables = [_config(d) for d in directories], [(d / "train.csv").read_text() for d in directories]
    first, reference = contents[0], directories[0] / "reference.h5"
    settings = lambda content: {k: v for k, v in content["training"].items() if k not in OF_EACH}  # noqa: E731
    members = []
    for k, (directory, content) in enumerate(zip(directories, contents)):
        for what, alike in (
            ("network's size", content["network"] == first["network"]),
            ("settings of training", settings(content) == settings(first)),
            ("reference", (directory / "reference.h5").read_bytes() == reference.read_bytes()),
        ):
            if not alike:
                raise ValueError(f"{directory}: {what} other than in {directories[0]}. Join what one model file trained.")
        for other, earlier in zip(directories[:k], tables):
            if both := _networks(tables[k]) & _networks(earlier):
                raise ValueError(f"{directory}: holds network {min(both)}, as {other} does. Give each network once.")
        try:
            tensors = load_file(directory / "weights.safetensors")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{directory / 'weights.safetensors'}: not readable ({error}). Train this network again."
            ) from None
        members += [_part(tensors, f"{n}.") for n in range(content["members"])]
    record = first["training"] | {name: sum((c["training"][name] for c in contents), []) for name in OF_EACH}
    save_model(out, members, first["network"], reference, record)
    write_text(Path(out) / "train.csv", tables[0] + "".join(t.split("\n", 1)[1] for t in tables[1:]))


def load_model(directory) -> tuple[list[HamiltonianNetwork], Reference]:
    """The trained networks (float32, on the CPU), of which the mean is the prediction, and their reference.

    Raises ValueError (file, found, expected) if a part is missing, cut short or does not fit the others.
    """
    directory = Path(directory)
    path, content = directory / "config.json", _config(directory)
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


def _networks(table: str) -> set[int]:
    """Which networks a train.csv is of."""
    return {int(row["member"]) for row in csv.DictReader(table.splitlines())}


def _config(directory: Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a model folder as `hamscale train` writes it.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if content.get("schema") != MODEL_SCHEMA:
        raise ValueError(f"{path}: schema is {content.get('schema')!r}, expected {MODEL_SCHEMA!r}.")
    return content
