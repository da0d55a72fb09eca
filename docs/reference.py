"""Write the pages of the reference from the code: the fields of the YAML files, and the commands of the command line.

They are made of what the program itself reads, the pydantic schema and the parser of arguments, when the site is built.
"""

import argparse
import html
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from hamscale.cli import _parser
from hamscale.config import Config, Material, Model, Section

UNITS = ("A", "K", "fs", "1/fs", "g/cm^3", "Ry", "Ha", "meV", "GiB", "e", "Bohr magnetons", "1")

# -------------------------------------------------------------------------------------------------- fields of the YAML files


def sections(model: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield every section of a file with its place, e.g. `structures.NAME.melt_quench`, the whole file first."""
    yield path, model
    for name in model.model_fields:
        for inner, here in _inside(model, name, path):
            yield from sections(inner, here)


def _inside(model: type[Section], field: str, path: str) -> list[tuple[type[Section], str]]:
    """Return the sections that a field of a section holds, with their places."""
    found = _sections_of(model.model_fields[field].annotation)
    return [(inner, f"{path}.{field}".lstrip(".") + {dict: ".NAME", list: "[]"}.get(many, "")) for inner, many in found]


def _anchor(path: str) -> str:
    return re.sub(r"\W+", "-", path.lower()).strip("-")


def _sections_of(annotation: object, many: object = None) -> Iterator[tuple[type[Section], object]]:
    """Yield the sections in an annotation, each with `dict` or `list` where there are many of it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, many
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation):
        yield from _sections_of(argument, origin if origin in (dict, list) else many)


def unit(description: str) -> str:
    """Return the unit that a description has in parentheses, several with commas, or nothing."""
    return ", ".join(found for found in re.findall(r"\(([^()]+)\)", description) if found in UNITS)


def _type(schema: dict) -> tuple[str, list[str]]:
    """Return the type of a value in words, and its limits, from its JSON schema."""
    if "anyOf" in schema:
        found = [_type(of) for of in schema["anyOf"] if of.get("type") != "null"]
        return " or ".join(name for name, _ in found), [limit for _, limits in found for limit in limits]
    if "$ref" in schema:
        return "section", []
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")])), []
    signs = {
        "exclusiveMinimum": "> {}", "minimum": "at least {}", "exclusiveMaximum": "< {}", "maximum": "at most {}",
        "multipleOf": "a multiple of {}", "maxLength": "at most {} characters", "pattern": "`{}`",
        "minProperties": "at least {} of them",
    }  # fmt: skip
    limits = [sign.format(schema[name]) for name, sign in signs.items() if name in schema]
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}.get(schema.get("type", ""))
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        names = list(dict.fromkeys(_type(item)[0] for item in items))
        limits += list(dict.fromkeys(limit for item in items for limit in _type(item)[1]))
        if "prefixItems" not in schema:
            limits += [
                f"at {side} {schema[key]} of them"
                for side, key in (("least", "minItems"), ("most", "maxItems"))
                if key in schema
            ]
        kind = f"{len(items)} of: {', '.join(names)}" if "prefixItems" in schema else f"list of: {names[0]}"
    elif schema.get("type") == "object":
        values = schema.get("additionalProperties")
        kind = f"names, each with: {_type(values)[0]}" if isinstance(values, dict) else "names and values"
    return kind or "any", limits


def _cell(text: str) -> str:
    """Return text that may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _default(schema: dict, required: bool) -> str:
    if required:
        return "required"
    value = schema.get("default")
    if value in (None, "", [], {}) or isinstance(value, dict):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def fields_page(model: type[Section], title: str, introduction: str) -> str:
    """Return the page of a file: a table of the fields of each of its sections."""
    parts = [f"# {title}", introduction]
    for path, section in sections(model):
        schema = section.model_json_schema()
        if path:
            parts += [f"## `{path}` {{#{_anchor(path)}}}", f"{section.__doc__}".replace("\n    ", "\n").strip()]
        rows = ["| field | type | unit | default | limits | meaning |", "| --- | --- | --- | --- | --- | --- |"]
        for name, field in section.model_fields.items():
            of = schema["properties"][name]
            kind, limits = _type(of)
            for _, place in _inside(section, name, path):
                kind = kind.replace("section", f"[section](#{_anchor(place)})")
            description = field.description or ""
            cells = [f"`{name}`", kind, unit(description), _default(of, field.is_required()), "; ".join(limits), description]
            rows.append(f"| {' | '.join(map(_cell, cells))} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------- command line


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every command by its name."""
    (found,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def _values(action: argparse.Action) -> str:
    """Return what is given to an option or argument, in words."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    kind = {int: "integer", float: "number", str: "text", Path: "path"}[action.type]  # type: ignore[index]
    return f"{kind}, several" if action.nargs in ("+", "*") else kind


def commands_page() -> str:
    """Return the page of the command line: usage and arguments of every command."""
    parts = [
        "# Command line",
        "`hamscale COMMAND --help` prints the same. Every rule of the workflow is one of these commands. Results that a "
        "program may read go to standard output, everything else to standard error. A mistake in your data or settings "
        "is told in one line, and the exit code is 1. A training that a signal stopped exits with 85.",
    ]
    parts.append(
        "\n".join(f"* [`{name}`](#{name}): {parser.description.splitlines()[0]}" for name, parser in commands().items())
    )
    for name, parser in commands().items():
        rows = ["| argument | value | default | meaning |", "| --- | --- | --- | --- |"]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            shown = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
            none = action.default in (None, [], False, argparse.SUPPRESS)
            default = "required" if action.required else "" if none else f"`{action.default}`"
            rows.append(f"| {' | '.join(map(_cell, (shown, _values(action), default, action.help or '')))} |")
        text = html.escape("\n".join(line.strip() for line in parser.description.splitlines()), quote=False)
        usage = parser.format_usage().removeprefix("usage: ")
        parts += [f"## `{name}` {{#{name}}}", text, f"```\n{usage}```", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def generated_pages() -> dict[str, str]:
    """Return the pages that are made from the code: place in docs/ -> Markdown."""
    return {
        "reference/material.md": fields_page(
            Material,
            "Material",
            "The fields of `config/materials/NAME.yaml`. [New material](../new_material.md) shows a whole file. A field that "
            "is not in these tables is refused. `hamscale schema --kind material` prints the JSON schema, for editors.",
        ),
        "reference/model.md": fields_page(
            Model,
            "Model",
            "The fields of `config/models/NAME.yaml`. Every field has a default, so that an empty file is a model. What the "
            "settings of the network mean is explained in [Method](../method.md#network).",
        ),
        "reference/runs.md": fields_page(
            Config,
            "List of runs",
            "The fields of `config/config.yaml`, or of another file that `snakemake --configfile` is given.",
        ),
        "reference/commands.md": commands_page(),
    }
