"""Write and read folders of trained models.

A folder holds the weights of all networks, the reference they were trained with, and a record of the training. The formats
are safetensors, HDF5 and JSON, none of which can run code when it is read.
"""

import csv
import json
import shutil
import warnings
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..config import Network, validate
from ..container import identity
from ..files import provenance, together
from ..graph.reference import Reference, read_reference
from ..model.network import HamiltonianNetwork
from .tensors import build_network

SCHEMA = "model/5"
EARLIER = "model/4"  # without digests
FILES = ("weights.safetensors", "reference.h5")
LARGEST_CONFIG = 1 << 24  # bytes
OF_EACH = ("validation_mae_mev", "seconds")  # entries of the training record with one number for each network


def save_model(
    directory: str | Path,
    networks: list[dict],
    network: dict,
    reference_path: str | Path,
    training: dict,
    data: str | None = None,
    table: str | None = None,
) -> None:
    """Write weights.safetensors, config.json and the reference, all files that prediction needs, and train.csv.

    config.json has the digests of the others and of itself, and comes last, so that a folder is whole or refused.

    networks: weights of each network.
    network: fields of config.Network, with lmax a number.
    reference_path: the reference that the networks were trained with.
    training: a record of the training.
    data: a hash of the training data, where it is known.
    table: the text of train.csv.
    """
    directory = Path(directory)
    tensors = {f"{k}.{name}": v.detach().contiguous() for k, weights in enumerate(networks) for name, v in weights.items()}
    with together(directory, last="config.json") as folder:
        (folder / "weights.safetensors").write_bytes(save(tensors))
        shutil.copyfile(reference_path, folder / "reference.h5")
        if table is not None:
            (folder / "train.csv").write_text(table)
        content = {
            "schema": SCHEMA,
            "network": network,
            "networks": len(networks),
            "training": training,
            "data": data,
            "files": {name: identity(folder / name) for name in FILES},
        } | provenance()
        (folder / "config.json").write_text(json.dumps(content | {"digest": _digest(content)}, indent=2) + "\n")


def _digest(content: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


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
            ("training data", content.get("data") == first.get("data")),
            ("reference", (directory / "reference.h5").read_bytes() == reference.read_bytes()),
        ):
            if not alike:
                raise ValueError(f"{directory}: {what} other than in {directories[0]}. Join what one model file trained.")
        for other, earlier in zip(directories[:k], tables):
            if both := _networks(tables[k]) & _networks(earlier):
                raise ValueError(f"{directory}: holds network {min(both)}, as {other} does. Give each network once.")
        tensors = _weights(directory)
        networks += [with_prefix(tensors, f"{n}.") for n in range(content["networks"])]
    record = first["training"] | {name: sum((c["training"][name] for c in contents), []) for name in OF_EACH}
    table = tables[0] + "".join(t.split("\n", 1)[1] for t in tables[1:])
    save_model(out, networks, first["network"], reference, record, first.get("data"), table)


def load_model(directory: str | Path) -> tuple[list[HamiltonianNetwork], Reference]:
    """Read the trained networks (float32, on the CPU), the mean of which is the prediction, and their reference.

    Raises ValueError (file, found, expected) if a part is missing, cut short or does not fit the others.
    """
    directory = Path(directory)
    path, content = directory / "config.json", _config(directory)
    reference = read_reference(directory / "reference.h5")
    network = validate(path, content["network"], Network)
    tensors = _weights(directory)
    found = {name.split(".")[0] for name in tensors}
    if found != {str(k) for k in range(len(found))} or len(found) != content["networks"]:
        raise ValueError(f"{path}: networks is {content['networks']!r}, weights.safetensors holds {len(found)}.")
    models = [build_network(network, reference).eval() for _ in found]
    try:
        for k, model in enumerate(models):
            model.load_state_dict(with_prefix(tensors, f"{k}."))
    except RuntimeError as error:
        raise ValueError(
            f"{directory / 'weights.safetensors'}: does not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return models, reference


def first_weights(directory: str | Path, number: int, network: HamiltonianNetwork) -> dict[str, torch.Tensor]:
    """Read the weights of a network of a model, with which another training begins.

    number: which of its networks; after the last it begins with the first again. network: the one that is to have them.
    Raises ValueError as `load_model` does, and if the network is of other elements, shells or sizes.
    """
    directory = Path(directory)
    content, tensors = _config(directory), _weights(directory)
    weights, own = with_prefix(tensors, f"{number % content['networks']}."), network.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        found, expected = (tuple(of[name].shape) if name in of else None for of in (weights, own))
        if found != expected:
            raise ValueError(
                f"{directory}: a training cannot begin with its weights: {name} has the shape {found}, the network of this "
                f"training {expected}. Expected a model of the same elements, basis sets and `network`, and alike in "
                "prediction.self_consistent."
            )
    return weights


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    """Read the weights of all networks. Raises ValueError if they are cut short or not finite."""
    path = directory / "weights.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}). Train this network again.") from None
    if wrong := [name for name, values in tensors.items() if not torch.isfinite(values).all()]:
        raise ValueError(f"{path}: {wrong[0]} holds NaN or infinity. Train this network again.")
    return tensors


def model_identity(directory: str | Path) -> str:
    """Return the digest that names a model: that of config.json, in which are those of the other files.

    Raises ValueError if config.json is missing or damaged.
    """
    return _digest(_content(Path(directory)))


def model_parts(directory: str | Path) -> dict[str, list[str]]:
    """Return the identity of the reference of a model, by kind; empty for a model of before, which does not have it."""
    files = _content(Path(directory)).get("files", {})
    return {"reference": [files["reference.h5"]]} if files else {}


def with_prefix(tensors: dict, prefix: str) -> dict:
    """Select the tensors whose names begin with a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _networks(table: str) -> set[int]:
    """Return the numbers of the networks that a train.csv describes."""
    return {int(row["network"]) for row in csv.DictReader(table.splitlines())}


def _content(directory: Path) -> dict:
    """Read config.json, without its own digest. Raises ValueError if it is missing, damaged or none."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a model folder as `hamscale train` writes it.")
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"more than {LARGEST_CONFIG} bytes")
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (SCHEMA, EARLIER):
        raise ValueError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}.")
    if missing := {"network", "networks", "training"} - content.keys():
        raise ValueError(f"{path}: {min(missing)} is missing. Train the model again.")
    if schema == EARLIER and "digest" not in content:
        warnings.warn(f"{path}: written by an earlier version (schema {EARLIER}), not protected.", stacklevel=3)
        return content
    if content.pop("digest", None) != _digest(content):
        raise ValueError(f"{path}: damaged or changed by hand: its digest is another. Copy the folder again.")
    return content


def _config(directory: Path) -> dict:
    """Read config.json, and compare the files that it names with their digests.

    Raises ValueError as `_content` does, and if one is missing, damaged or of another model.
    """
    content = _content(directory)
    for name in FILES if "files" in content else ():
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name}: no such file. Copy the whole folder of the model.")
        if (found := identity(directory / name)) != content["files"][name]:
            raise ValueError(
                f"{directory / name}: damaged or of another model: its digest is {found}, config.json has "
                f"{content['files'][name]}. Copy the folder again from where it came."
            )
    return content
