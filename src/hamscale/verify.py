"""Verify files of hamscale: that they are whole, hold what their schemas say, mean something, and belong together."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .container import MADE_OF, Source, identity, is_protected, open_h5, schema_of
from .graph.graph import GRAPH, GraphFile
from .graph.reference import REFERENCE, read_reference
from .inputs.model_folder import load_model, model_identity, model_parts
from .layout import Layout
from .operators import JOINED, OPERATORS, SHARD, check_meaning, read_operators, read_structure
from .partition.halo import PARTITION
from .sandbox import run_limited
from .train.checkpoint import CHECKPOINT, read_checkpoint

MEMORY = 2**33  # of a process that verifies a file, beside what the file needs: torch alone takes some GiB
DIFFERENCE_ANGSTROM = 1e-9  # of an edge's length from the cutoff, by rounding


@dataclass(frozen=True)
class Verified:
    """A file or a model folder that was found to be whole.

    kind: operators, reference, graph, partition, model, checkpoint or shard. identity: digest of what is in it.
    made_of: by kind, the identities of what it was made of.
    """

    path: Path
    kind: str
    identity: str
    made_of: dict[str, list[str]] = field(default_factory=dict)


def verify(path: str | Path) -> Verified:
    """Read a file, or a model folder, whole, and hold it against its digests, its schema and its meaning.

    Operators: H and S Hermitian, S one on its diagonal. Graphs: edges within the cutoff, each with its flipped edge, as many
    targets as edges. References and models: finite, and as large as the basis says. Partitions: each atom has an owner.
    Raises ValueError, with the path, for the first thing that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        load_model(path)
        return Verified(path, "model", model_identity(path), model_parts(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a file or a folder of hamscale.")
    if path.name.endswith(CHECKPOINT):
        read_checkpoint(path)
        return Verified(path, "checkpoint", identity(path))
    if not is_protected(path):  # perhaps of an earlier version
        readers: list[Callable] = [read_operators, read_reference]
        errors = []
        for kind, reader in zip(("operators", "reference"), readers):
            try:
                reader(path)
            except ValueError as error:
                errors.append(str(error))
            else:
                return Verified(path, kind, identity(path))
        raise ValueError(errors[0])
    with closing(Source(path)) as source:
        source.compare_all()
    checks = {of.schema: (kind, of, check) for kind, of, check in CHECKS}
    if (schema := schema_of(path)) not in checks:
        raise ValueError(f"{path}: schema is {schema!r}, expected one of {', '.join(checks)}.")
    kind, layout, check = checks[schema]
    check(path)
    with open_h5(path, layout) as file:
        return Verified(path, kind, identity(path), json.loads(file.attrs.get(MADE_OF, "{}")))


def _operators(path: Path) -> None:
    operators = read_operators(path)
    try:
        check_meaning(operators)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shard(path: Path) -> None:
    with open_h5(path, SHARD) as file:
        for name in ("hamiltonian", "overlap"):
            if not np.isfinite(file[name][:]).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity.")


def _graph(path: Path) -> None:
    source = GraphFile(path)
    graph = source.part()
    if len(graph.edges) and graph.edges.distances.max() > graph.cutoff_angstrom + DIFFERENCE_ANGSTROM:
        raise ValueError(f"{path}: an edge is {graph.edges.distances.max():.3f} A long, the cutoff {graph.cutoff_angstrom} A.")
    if not np.array_equal(graph.degrees(), source.degrees()):
        raise ValueError(f"{path}: /degrees are not those of /edges.")
    try:
        _ = graph.edges.flipped_index
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _partition(path: Path) -> None:
    with open_h5(path, PARTITION) as file:
        read_structure(file)
        owner, parts = file["owner"][:], int(file.attrs["parts"])
        if len(owner) and not (owner.min() >= 0 and owner.max() < parts):
            raise ValueError(f"{path}: its owners are not those of {parts} parts. Make it anew with `hamscale partition`.")


CHECKS: tuple[tuple[str, Layout, Callable[[Path], object]], ...] = (
    ("operators", OPERATORS, _operators),
    ("operators", JOINED, _operators),
    ("shard", SHARD, _shard),
    ("reference", REFERENCE, read_reference),
    ("graph", GRAPH, _graph),
    ("partition", PARTITION, _partition),
)


def artefacts(path: str | Path) -> Iterator[Path]:
    """Yield the files and model folders of hamscale at or below a path, in ascending order.

    Of HDF5 files in a folder those that are protected are taken, since others may be anyone's.
    """
    path = Path(path)
    if not path.is_dir() or (path / "config.json").is_file():
        yield path
        return
    for inner in sorted(path.iterdir()):
        if inner.is_dir() and not inner.is_symlink():
            yield from artefacts(inner)
        elif inner.name.endswith(CHECKPOINT) or (inner.suffix == ".h5" and is_protected(inner)):
            yield inner


def mixed(found: list[Verified]) -> Iterator[str]:
    """Yield a line for everything that was made of something else than what lies beside it.

    A graph, for instance, is made of operators and of a reference: if there are operators, but not those, it does not belong
    to them. Nothing is said where there are none at all.
    """
    there: dict[str, set[str]] = {}
    for one in found:
        there.setdefault(one.kind, set()).add(one.identity)
    for one in found:
        structure = one.path.parent.parent / "structures" / f"{one.path.stem}.extxyz"
        if "structure" in one.made_of and structure.is_file() and identity(structure) not in one.made_of["structure"]:
            yield f"{one.path}: was made of another structure than {structure} holds. Make it again."
        for kind, identities in one.made_of.items():
            if kind in there and not set(identities) <= there[kind]:
                yield f"{one.path}: was made of another {kind} than those that lie here. Make it again."


def verify_in_sandbox(path: Path) -> str:
    """Verify a path in a process with limits of memory and time (`sandbox.run_limited`), and return what it prints.

    Raises ValueError, with a line that says what is wrong.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if not path.exists():
        raise ValueError(f"{path}: no such file. Expected a file or a folder of hamscale.")
    return run_limited([sys.executable, "-m", "hamscale", "verify", str(path)], files, MEMORY)
