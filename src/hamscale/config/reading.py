"""Read and validate the files that a user writes, with errors that name the file and the field."""

import hashlib
import json
import typing
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .schema import Config, Material, Model

Schema = TypeVar("Schema", bound=BaseModel)


def _load(path: str | Path, model: type[Schema]) -> Schema:
    return validate(path, _read(path), model)


def _read(path: str | Path) -> object:
    path = Path(path)
    if not path.is_file():
        available = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"{path}: no such file. Expected a YAML file; in {path.parent} there are: {available}.")
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def validate(source: str | Path, content: object, model: type[Schema]) -> Schema:
    """Return the pydantic model of `content`.

    Raises one ValueError that names the source, every wrong field, and what the field expects.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            field = ".".join(str(part) for part in e["loc"]) or "(top)"
            found = "" if e["type"] in ("missing", "value_error") else f", found {e['input']!r:.80}"
            hint = ". Known keys: " + ", ".join(_fields(model, e["loc"][:-1])) if e["type"] == "extra_forbidden" else ""
            lines.append(f"{source}: {field}: {e['msg'].removeprefix('Value error, ')}{found}{hint}")
        raise ValueError("\n".join(lines)) from None


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the names of the fields at a place of a model: one of them may be what a misspelt key was meant to be."""
    for part in location:
        annotation = (
            model.model_fields[part].annotation if hasattr(model, "model_fields") and part in model.model_fields else model
        )
        candidates = [annotation]
        while candidates:
            candidate = candidates.pop()
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
            candidates += typing.get_args(candidate)
    return list(getattr(model, "model_fields", {}))


def load_material(path: str | Path) -> Material:
    """Return the material of a file, with the settings of the material that it extends filled in.

    Raises ValueError if an extension changes its structures or their DFT, because those belong to the other material.
    """
    content = _read(path)
    if not isinstance(content, dict) or not content.get("extends"):
        return validate(path, content, Material)
    other = Path(path).with_name(f"{content['extends']}.yaml")
    parent = _read(other)
    if isinstance(parent, dict) and parent.get("extends"):
        raise ValueError(
            f"{path}: extends {content['extends']}, which extends another itself. Name {parent['extends']} instead."
        )
    material, base = validate(path, _merged(parent, content), Material), validate(other, parent, Material)
    for name, s in material.structures.items():
        same = {"split", "count"}
        if name not in base.structures or s.model_dump(exclude=same) != base.structures[name].model_dump(exclude=same):
            raise ValueError(
                f"{path}: structures.{name} differs from that of {content['extends']} in more than split and count. Add it "
                "there: structures and their DFT are of the material that is extended."
            )
        if s.count > base.structures[name].count:
            raise ValueError(
                f"{path}: structures.{name}.count is {s.count}, but {content['extends']} has {base.structures[name].count}. "
                "Raise it there."
            )
    if material.dft != base.dft or material.species != base.species:
        raise ValueError(f"{path}: dft or species differ from those of {content['extends']}. Make it a material of its own.")
    return material


def _merged(parent: object, content: object) -> object:
    """Merge `content` over `parent`, key by key; None removes a key."""
    if not (isinstance(parent, dict) and isinstance(content, dict)):
        return content
    keys = [*parent, *(k for k in content if k not in parent)]
    merged = {k: _merged(parent.get(k), content[k]) if k in content else parent[k] for k in keys}
    return {k: v for k, v in merged.items() if v is not None}


def load_model(path: str | Path) -> Model:
    return _load(path, Model)


def load_config(path: str | Path) -> Config:
    return _load(path, Config)


def sha256(model: BaseModel) -> str:
    return hashlib.sha256(json.dumps(model.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def check_configuration(content: Config) -> Config:
    """Validate every file that a configuration names, and return the configuration.

    Raises one ValueError that lists every error of every file.
    """
    errors = []
    for run in content.runs:
        for load, file in (
            (load_material, f"config/materials/{run.material}.yaml"),
            (load_model, f"config/models/{run.model}.yaml"),
        ):
            try:
                load(file)
            except ValueError as error:
                errors += [line for line in str(error).splitlines() if line not in errors]
    if errors:
        raise ValueError("\n".join(errors))
    return content
