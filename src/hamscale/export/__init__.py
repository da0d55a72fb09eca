"""Write matrices for other codes and read those of other codes: `hamscale export` and `hamscale import`.

docs/files.md describes the formats.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..operators import SPINS, write_operators
from . import cp2k, deeph, matrixmarket, quatrex, siesta
from .stream import stored

# formats that hold both spins; of the others each spin has a folder of its own
OF_BOTH_SPINS = ("sisl", "tbtrans", "tshs", "cp2k", "cp2k-text")
TARGETS: dict[str, Callable[..., list[str]]] = {
    "quatrex": quatrex.write,
    "sisl": siesta.write,
    "tbtrans": partial(siesta.write, suffix=".nc"),
    "tshs": partial(siesta.write, suffix=".TSHS"),
    "deeph": deeph.write,
    "cp2k": cp2k.write,
    "cp2k-text": partial(cp2k.write, binary=False),
    "matrixmarket": matrixmarket.write,
}


def export(path: str | Path, target: str, out: str | Path, **options: object) -> list[str]:
    """Write an `operators/1` file in another code's format, and return lines that say what was written.

    A spin-polarised structure is written as one, or, in formats of one H, to the folders OUT/up and OUT/down.
    options: `transport`, `repeat`, `blocks`, `origin` and `allow_mismatch` of quatrex. Raises ValueError for an unknown target,
    for options that belong to another target, and where the target's `write` does.
    """
    if target not in TARGETS:
        raise ValueError(f"--to is {target!r}, expected one of {', '.join(TARGETS)}.")
    if options and target != "quatrex":
        names = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"{names} came with --to {target}, expected --to quatrex with it. Leave it out.")
    with stored(path) as file:
        if file.spins == 1 or target in OF_BOTH_SPINS:
            return TARGETS[target](file, out, **options)
        lines = []
        for name, channel in zip(SPINS, file.channels):
            lines += [f"spin {name}: {line}" for line in TARGETS[target](channel, Path(out) / name, **options)]
        return lines


def import_deeph(source: str | Path, out: str | Path) -> list[Path]:
    """Convert a DeepH data set to `operators/1` files, and return the paths of the files written.

    A folder with one structure becomes the file `out`. A folder with many becomes the folder `out`, with one file per
    structure, named after it. Raises ValueError as `deeph.data_folders` and `deeph.read` do; files that were written before
    stay.
    """
    source, out, written = Path(source), Path(out), []
    for folder in deeph.data_folders(source):
        name = "-".join(folder.relative_to(source).parts)
        written.append(out / f"{name}.h5" if name else out)
        write_operators(written[-1], deeph.read(folder))
    return written
