"""Write matrices for other codes and read those of other codes: `hamscale export` and `hamscale import`.

docs/files.md describes the formats.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..basis import Basis
from ..operators import SPINS, Operators, read_operators, write_operators
from ..runs import first_file, snapshots
from ..sandbox import probe
from . import cp2k, cp2k_restart, cp2k_runs, deeph, deeptb, matrixmarket, quatrex, siesta, tbtrans
from .device import Cutting
from .stream import stored

OF_DEVICES = ("quatrex", "tbtrans")
# formats that hold both spins; of the others each spin has a folder of its own
OF_BOTH_SPINS = ("sisl", "tbtrans", "tshs", "cp2k", "cp2k-text", "cp2k-restart")
TARGETS: dict[str, Callable[..., list[str]]] = {
    "quatrex": quatrex.write,
    "sisl": siesta.write,
    "tbtrans": tbtrans.write,
    "tshs": partial(siesta.write, suffix=".TSHS"),
    "deeph": deeph.write,
    "deeptb": deeptb.write,
    "cp2k": cp2k.write,
    "cp2k-text": partial(cp2k.write, binary=False),
    "cp2k-restart": cp2k_restart.write,
    "matrixmarket": matrixmarket.write,
}


def export(path: str | Path, target: str, out: str | Path, **options: object) -> list[str]:
    """Write an `operators/2` file in another code's format, and return lines that say what was written.

    A spin-polarised structure is written as one, or, in formats of one H, to the folders OUT/up and OUT/down.
    options: `transport`, `repeat`, `blocks`, `origin` and `allow_mismatch` of quatrex and tbtrans, `kgrid` of cp2k-restart.
    Raises ValueError for an unknown target, for options that belong to another target or come without `transport`, and where
    the target's `write` does.
    """
    if target not in TARGETS:
        raise ValueError(f"--to is {target!r}, expected one of {', '.join(TARGETS)}.")
    for name in options:
        flag = f"--{name.replace('_', '-')}"
        expected = ("cp2k-restart",) if name == "kgrid" else OF_DEVICES
        if target not in expected:
            raise ValueError(f"{flag} came with --to {target}, expected --to {' or '.join(expected)} with it. Leave it out.")
        if name in Cutting.__annotations__ and "transport" not in options:
            raise ValueError(f"{flag} came without --transport, expected an axis with it: a, b or c.")
    with stored(path) as file:
        if file.spins == 1 or target in OF_BOTH_SPINS:
            return TARGETS[target](file, out, **options)
        lines = []
        for name, channel in zip(SPINS, file.channels):
            lines += [f"spin {name}: {line}" for line in TARGETS[target](channel, Path(out) / name, **options)]
        return lines


def import_data(source: str | Path, out: str | Path, basis: Basis | None = None) -> list[Path]:
    """Convert a DeepH data set, or runs of CP2K, to `operators/2` files, and return the paths of the files written.

    source: a folder, or of CP2K also a file of H or a pattern (`runs.snapshots`). One structure becomes the file `out`.
    Many become files in the folder `out`: of DeepH named after their folders, of CP2K 000.h5, 001.h5, ... in their order.
    basis: that of a material, with which runs of CP2K are checked.

    Raises ValueError as `deeph.data_folders`, `deeph.read` and `cp2k_runs.read` do; of several errors in one, a line each, when
    everything else is written.
    """
    if Path(source).is_dir() and deeph.is_data_set(source):
        return _import_deeph(Path(source), Path(out))
    runs, out = snapshots(source), Path(out)
    if basis is None:
        raise ValueError(
            f"{source}: runs of CP2K, whose basis is that of a material. Add --material config/materials/NAME.yaml."
        )
    written, errors = [], []
    for number, run in enumerate(runs):
        path = out / f"{number:03d}.h5" if len(runs) > 1 else out
        try:
            write_operators(path, cp2k_runs.read(first_file(run), basis))
            written.append(path)
        except ValueError as error:
            errors.append(f"{path}: {error}")
    if errors:
        raise ValueError("\n".join(errors))
    return written


def read_data(path: str | Path, overlap_alone: bool = False) -> Operators:
    """Read H and S of a structure of `runs.members`: a file of operators, or a folder of a DeepH data set.

    overlap_alone: S alone is asked for, so that the folder needs no H. Raises ValueError as `read_operators` and `deeph.read`
    do.
    """
    return deeph.read(path, overlap_alone=overlap_alone) if Path(path).is_dir() else read_operators(path)


def _import_deeph(source: Path, out: Path) -> list[Path]:
    written, errors, folders = [], [], deeph.data_folders(source)
    try:
        probe(*(path for folder in folders for path in deeph.hdf5_files(folder)))  # one process for all
        probed = True
    except ValueError:  # which of them it is, each tells by itself
        probed = False
    for folder in folders:
        name = "-".join(folder.relative_to(source).parts)
        path = out / f"{name}.h5" if name else out
        try:
            write_operators(path, deeph.read(folder, probed))
            written.append(path)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return written
