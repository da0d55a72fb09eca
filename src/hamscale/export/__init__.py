"""Matrices for other codes, and other codes' matrices for us: `hamscale export`, `hamscale import`. Formats: docs/files.md."""

from collections.abc import Callable
from pathlib import Path

from ..operators import write_operators
from . import cp2k, deeph, matrixmarket, quatrex, siesta
from .stream import stored

TARGETS: dict[str, Callable] = {
    "quatrex": quatrex.write,
    "sisl": siesta.write,
    "tbtrans": lambda *arguments: siesta.write(*arguments, suffix=".nc"),
    "tshs": lambda *arguments: siesta.write(*arguments, suffix=".TSHS"),
    "deeph": deeph.write,
    "cp2k": cp2k.write,
    "cp2k-text": lambda *arguments: cp2k.write(*arguments, binary=False),
    "matrixmarket": matrixmarket.write,
}


def export(path, target: str, out, **options) -> list[str]:
    """Write an `operators/1` file in another code's format; returns lines that say what was written.

    options: `transport`, `repeat`, `blocks` of quatrex. Raises ValueError for an unknown target, options of another target, and
    what the target's `write` raises.
    """
    if target not in TARGETS:
        raise ValueError(f"--to is {target!r}, expected one of {', '.join(TARGETS)}.")
    if options and target != "quatrex":
        names = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"{names} came with --to {target}, expected --to quatrex with it. Leave it out.")
    with stored(path) as file:
        return TARGETS[target](file, out, **options)


def import_deeph(source, out) -> list[Path]:
    """DeepH data set -> `operators/1`; returns the files written.

    A folder with one structure becomes the file `out`, one with many the folder `out` with a file per structure, of its name.
    Raises ValueError as `deeph.data_folders` and `deeph.read` do; files that were written before stay.
    """
    source, out, written = Path(source), Path(out), []
    for folder in deeph.data_folders(source):
        name = "-".join(folder.relative_to(source).parts)
        written.append(out / f"{name}.h5" if name else out)
        write_operators(written[-1], deeph.read(folder))
    return written
