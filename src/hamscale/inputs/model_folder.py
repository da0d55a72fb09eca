"""Write and read folders of trained models.

A folder holds the weights of all networks, the reference they were trained with, and a record of the training. The formats
are safetensors, HDF5 and JSON, none of which can run code when it is read.
"""

import csv
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import Network, validate
from ..files import atomic, provenance, write_text
from ..graph.reference import Reference, read_reference
from ..model.network import HamiltonianNetwork
from .tensors import build_network

SCHEMA = "model/4"
OF_EACH = ("validation_mae_mev", "seconds")  # entries of the training record with one number for each network


def save_model(directory: str | Path, networks: list[dict], network: dict, reference_path: str | Path, training: dict) -> None:
    """Write weights.safetensors, config.json and the reference: all files that prediction needs.

    networks: weights of each network.
    network: fields of config.Network, with lmax a number.
    reference_path: the reference that the networks were trained with.
    training: a record of the training.
    """
    directory = Path(directory)
    tensors = {f"{k}.{name}": v.detach().contiguous() for k, weights in enumerate(networks) for name, v in weights.items()}
    with atomic(directory / "weights.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic(directory / "reference.h5") as temporary:
        shutil.copyfile(reference_path, temporary)
    content = {
        "schema": SCHEMA,
        "network": network,
        "networks": len(networks),
        "training": training,
    } | provenance()
    write_text(directory / "config.json", json.dumps(content, indent=2) + "\n")


def join(directories: list[Path], out: str | Path) -> None:
    """Join several models, whose networks differ in their seeds alone, into one model.

    Its train.csv has the rows of all models.
    Raises ValueError if sizes, settings or references differ, a network is given twice, or a file is cut short.
    """
    contents, tables = [_config(d) for d in directories], [(d / "train.csv").read_text() for d in directories]
    first, reference = contents[0], directories[0] / "reference.h5"
    settings = lambda content: {k: v for k, v in content["training"].items() if k not in OF_EACH}  # noqa: E731
    networks = []
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
        networks += [with_prefix(tensors, f"{n}.") for n in range(content["networks"])]
    record = first["training"] | {name: sum((c["training"][name] for c in contents), []) for name in OF_EACH}
    save_model(out, networks, first["network"], reference, record)
    write_text(Path(out) / "train.csv", tables[0] + "".join(t.split("\n", 1)[1] for t in tables[1:]))


def load_model(directory: str | Path) -> tuple[list[HamiltonianNetwork], Reference]:
    """Read the trained networks (float32, on the CPU), the mean of which is the prediction, and their reference.

    Raises ValueError (file, found, expected) if a part is missing, cut short or does not fit the others.
    """
    directory = Path(directory)
    path, content = directory / "config.json", _config(directory)
    reference = read_reference(directory / "reference.h5")
    network = validate(path, content["network"], Network)
    models = [build_network(network, reference).eval() for _ in range(content["networks"])]
    try:
        tensors = load_file(directory / "weights.safetensors")
        for k, model in enumerate(models):
            model.load_state_dict(with_prefix(tensors, f"{k}."))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{directory / 'weights.safetensors'}: does not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return models, reference


def with_prefix(tensors: dict, prefix: str) -> dict:
    """Select the tensors whose names begin with a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _networks(table: str) -> set[int]:
    """Return the numbers of the networks that a train.csv describes."""
    return {int(row["network"]) for row in csv.DictReader(table.splitlines())}


def _config(directory: Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a model folder as `hamscale train` writes it.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {content.get('schema')!r}, expected {SCHEMA!r}.")
    return content
