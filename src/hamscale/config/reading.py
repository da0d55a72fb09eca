"""Read and validate the files that a user writes, with errors that name the file and the field."""

import hashlib
import json
import re
import typing
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .material import Material
from .model import Model
from .runs import Config
from .section import NAME

Schema = TypeVar("Schema", bound=BaseModel)

LARGEST = 1 << 20  # bytes of a file
MOST_NODES = 100_000  # of a file, with what aliases stand for written out


def _load(path: str | Path, model: type[Schema]) -> Schema:
    return validate(path, read_yaml(path), model)


def read_yaml(path: str | Path) -> object:
    """Read a YAML file as data: numbers, texts, lists and mappings.

    Raises ValueError, with the file and the line, for what is not YAML or not UTF-8, for a tag that is not data, a key that is
    there twice, and aliases or nesting that make a small file a huge one.
    """
    path = Path(path)
    if not path.is_file():
        available = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"{path}: no such file. Expected a YAML file; in {path.parent} there are: {available}.")
    content = path.read_bytes()
    if len(content) > LARGEST:
        raise ValueError(f"{path}: {len(content)} bytes, expected a configuration of at most {LARGEST}.")
    try:
        loader = yaml.SafeLoader(content.decode())
        node = loader.get_single_node()
        count = 0 if node is None else _written_out(path, node, {})
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}). Save it as UTF-8.") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a configuration.") from None
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    try:
        return loader.construct_document(node) if count else None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _not_yaml(path, error) from None


def _not_yaml(path: Path, error: Exception) -> ValueError:
    """Return the error that says in one line what PyYAML found, with the line where it says one."""
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return ValueError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML: {problem:.300}")


def _written_out(path: Path, node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of nodes below a node, counting those of an alias wherever it stands.

    known: the numbers of nodes that were counted, by id; 0 of those that are being counted.
    """
    where = f"{path}, line {node.start_mark.line + 1}"
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"{where}: an anchor that holds its own alias is not data.")
        return known[id(node)]
    known[id(node)], count = 0, 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(
                        f"{path}, line {key.start_mark.line + 1}: the key {key.value!r} is there twice. Remove one of the two."
                    )
                seen.add(key.value)
            count += _written_out(path, key, known) + _written_out(path, value, known)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_written_out(path, item, known) for item in node.value)
    if count > MOST_NODES:
        raise ValueError(f"{where}: aliases make it more than {MOST_NODES} values. Write out what they stand for.")
    known[id(node)] = count
    return count


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
    content = read_yaml(path)
    if not isinstance(content, dict) or not content.get("extends"):
        return validate(path, content, Material)
    if not re.fullmatch(NAME, str(content["extends"])):
        raise ValueError(f"{path}: extends: found {content['extends']!r:.80}, expected the NAME of another material, {NAME}.")
    other = Path(path).with_name(f"{content['extends']}.yaml")
    parent = read_yaml(other)
    if isinstance(parent, dict) and parent.get("extends"):
        raise ValueError(
            f"{path}: extends {content['extends']}, which extends another itself. Name {parent['extends']} instead."
        )
    material, base = validate(path, _merged(parent, content), Material), validate(other, parent, Material)
    for name, s in material.structures.items():
        same = {"split", "count", "transport"}
        if name not in base.structures or s.model_dump(exclude=same) != base.structures[name].model_dump(exclude=same):
            raise ValueError(
                f"{path}: structures.{name} differs from that of {content['extends']} in more than split, count and "
                "transport. Add it there: structures and their DFT are of the material that is extended."
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
