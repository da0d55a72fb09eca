"""Every verb of the command line on a tiny material, and what its process does to files, sockets and other programs.

python tests/faults.py FOLDER RECORDED    runs the verbs once, undisturbed, and prints what each did as JSON

A verb is killed, or runs out of disk, in a fork of a server that has imported everything (`disturbed`).
"""

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import yaml
from ase import Atoms
from safetensors import safe_open

import hamscale.cli
from hamscale.container import Sink
from helpers import DATA, TOY, basis_of, model_hamiltonian
from ranks import CONTEXT, environment, free_port


@dataclass(frozen=True)
class Step:
    """A command line in which {given}, {made} and {out} stand for folders.

    copies: what lies in its folder before it begins, from where to where. repeats: whether it takes the place of an old result;
    exports refuse to.
    """

    arguments: tuple[str, ...]
    copies: tuple[tuple[str, str], ...] = ()
    repeats: bool = True

    def command(self, root: Path, out: Path) -> list[str]:
        return [word.format(given=root / "given", made=root / "made", out=out) for word in self.arguments]

    def prepare(self, root: Path, out: Path) -> None:
        out.mkdir(parents=True)
        for source, target in self.copies:
            source, target = Path(source.format(given=root / "given", made=root / "made")), out / target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)


def step(line: str, *copies: tuple[str, str], repeats: bool = True) -> Step:
    return Step(tuple(line.split()), copies, repeats)


TOY_YAML, MODEL = "{given}/toy.yaml", "{made}/train/model"
CELL, H = "{made}/structure/test-000.extxyz", "{made}/predict/test-000.h5"
GRAPHS = "{made}/reference/reference.h5 --train {made}/graph/g/a.h5 --validation {made}/graph/g/b.h5"
TABLES = (("{made}/analyse/t", "results/toy/analysis/m/a"), ("{made}/view/v", "results/toy/analysis/m/a"))
EXPORTS = {
    f"export {target}": step(f"export {{given}}/chain.h5 --to {target} --out {{out}}/{name}", repeats="." in name)
    for target, name in (
        ("quatrex", "q"), ("sisl", "a.nc"), ("tbtrans", "b.nc"), ("tshs", "a.TSHS"), ("deeph", "d"), ("cp2k", "c"),
        ("cp2k-text", "t"), ("matrixmarket", "m"), ("deeptb", "p"),
    )
}  # fmt: skip
STEPS = {
    "structure": step(f"structure {TOY_YAML} --id test-000 --out {{out}}/test-000.extxyz"),
    "input": step(f"input {TOY_YAML} {CELL} --out {{out}}/a.inp"),
    "prepare": step(f"prepare {TOY_YAML} --out {{out}}/all"),
    "dft": step("dft {given}/run.inp --out {out}/run --command '{given}/cp2k'"),
    "batch": step("batch {given}/run.inp --store {out}/store --out {out}/record.json --command '{given}/cp2k'"),
    "collect": step(
        "collect {given}/run.inp --store {out}/store --record {out}/record.json --out {out}/runs/run",
        ("{made}/batch", "."),
    ),
    "operators": step("operators {given}/si8.yaml {given}/si8.extxyz {given}/si8_cut --out {out}/a.h5"),
    "reference": step(f"reference {TOY_YAML} {{given}}/a.h5 {{given}}/b.h5 --out {{out}}/reference.h5"),
    "graph": step("graph {made}/reference/reference.h5 {given}/a.h5 {given}/b.h5 --out {out}/g"),
    "partition": step(f"partition {CELL} --cutoff 5 --parts 2 --out {{out}}/p.h5"),
    "train": step(f"train {{given}}/m.yaml {GRAPHS} --out {{out}}/model --checkpoint {{out}}/c"),
    "train 1": step(f"train {{given}}/m.yaml {GRAPHS} --network 1 --out {{out}}/model --checkpoint {{out}}/c"),
    "join": step(f"join {MODEL} {{made}}/train_1/model --out {{out}}/model"),
    "predict": step(f"predict {MODEL} {CELL} --material {TOY_YAML} --out {{out}}/test-000.h5"),
    "predict reference": step(f"predict {MODEL} {CELL} --reference-only --out {{out}}/test-000.h5"),
    "dos": step("dos {out}/a.h5 --clusters 2 --radius 5 --core 3 --out {out}/dos.csv", ("{given}/without_levels.h5", "a.h5")),
    "transmission": step("transmission {given}/chain.h5 --axis a --kgrid 40 1 1 --points 20 --out {out}/t.csv"),
    **EXPORTS,
    "export cp2k-restart": step("export {given}/chain.h5 --to cp2k-restart --kgrid 2 1 1 --out {out}/r.kp"),
    "import": step("import {made}/export_deeph/d --out {out}/a.h5"),
    "analyse": step(
        f"analyse {TOY_YAML} --dft {{given}}/test-000.h5 --predicted {H} --baseline {{made}}/predict_reference/test-000.h5 "
        "--out {out}/t"
    ),
    "evaluate": step(
        f"evaluate {{out}}/results/toy/models/m --material {TOY_YAML} --out {{out}}/rows.csv",
        (MODEL, "results/toy/models/m"),
        ("{given}/test-000.h5", "results/toy/operators/test-000.h5"),
    ),
    "view": step(f"view {H} --parts 2 --out {{out}}/v"),
    "quality": step(f"quality {CELL} --out {{out}}/q"),
    "index": step("index --results {out}/results --out {out}/index.html", *TABLES),
    "plot-structure": step(f"plot-structure {{made}}/analyse/t {MODEL}/train.csv --out {{out}}/f"),
    "plot-transmission": step("plot-transmission {made}/analyse/t/transmission.csv --out {out}/f"),
    "paper-tables": step("paper-tables --label a b --analysis {made}/analyse/t --view {made}/view/v --out {out}/raw"),
    "plot-paper": step(f"plot-paper --figure fig5 --raw {DATA.parents[1]}/resources/raw --out {{out}}/p"),
    "summary": step("summary {made}/analyse/t/summary.csv --out {out}/summary.csv"),
    "table": step("table {made}/analyse/t/summary.csv"),
    "schema": step("schema"),
    "verify": step(f"verify {H} {MODEL}"),
    "verify in a sandbox": step(f"verify --sandbox {H}"),
}


def make_inputs(given: Path, recorded: Path) -> None:
    """Write what the verbs begin with."""
    from hamscale import config
    from hamscale.analysis.false_states import Suspects
    from hamscale.analysis.levels import UNKNOWN
    from hamscale.building import build_structure
    from hamscale.operators import write_operators
    from hamscale.structures import wrap_as_cp2k, write_structure_file
    from helpers import SZV, atoms_of_log

    given.mkdir(parents=True)
    (given / "toy.yaml").write_text(TOY)
    material, basis = config.load_material(given / "toy.yaml"), basis_of(Si=SZV)
    for name, structure in (("a", "train-000"), ("b", "train-001"), ("test-000", "test-000")):
        write_operators(given / f"{name}.h5", model_hamiltonian(build_structure(material, structure), basis))
    operators = model_hamiltonian(build_structure(material, "test-000"), basis)
    chain = Atoms("Si2", [(0, 5, 5), (2.3, 5, 5.5)], cell=(6, 12, 12), pbc=(True, False, False))  # few images
    energies = {"source": "dft", "wall_seconds": 0.0, "fermi_level_hartree": 0.1}
    write_operators(given / "chain.h5", replace(model_hamiltonian(wrap_as_cp2k(chain), basis), attributes=energies))
    unknown = {"source": "predicted", "model": "m"} | UNKNOWN | Suspects().attributes()
    write_operators(given / "without_levels.h5", replace(operators, attributes=operators.attributes | unknown))
    network = {"lmax": 2, "channels": 4, "layers": 1, "hidden": 4, "heads": 1, "values": 4, "attention": 4, "feed_forward": 8}
    training = {"steps": 4, "validate_every": 2, "networks": 2, "schedule": "plateau"}
    (given / "m.yaml").write_text(yaml.safe_dump({"network": network, "training": training}))
    shutil.copytree(recorded / "si8_cut", given / "si8_cut")
    write_structure_file(given / "si8.extxyz", atoms_of_log(recorded / "si8_cut"))
    (given / "si8.yaml").write_text(TOY)
    shutil.copytree(recorded / "h2o_bin", given / "recorded")
    (given / "run.inp").write_text("&GLOBAL\n&END GLOBAL\n")
    copied = '[ "$1" = --version ] || /bin/cp "${0%/*}"/recorded/* .'
    (given / "cp2k").write_text(f"#!/bin/sh\n{copied}\n")
    (given / "cp2k").chmod(0o755)


def place(root: Path, name: str) -> Path:
    """Where the results of a verb are, undisturbed."""
    return root / "made" / name.replace(" ", "_")


# ---- what a process does

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}


@dataclass
class Watch:
    """Hook that sees every change of a file by Python (https://docs.python.org/3/library/audit_events.html), and every fsync
    and every write of libhdf5. Before change number `kill_at` it ends the process by SIGKILL, or keeps it for `late` seconds.
    """

    kill_at: int = 0
    late: float = 0.0
    changes: list[tuple[str, str]] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def watch(self) -> None:
        sys.addaudithook(self._hear)
        os.fsync = self._before("fsync", os.fsync)
        for name in ("write", "truncate", "protect"):
            setattr(Sink, name, self._before(name, getattr(Sink, name)))

    def _before(self, name: str, function: Callable) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            self._change(name, "")
            return function(*arguments, **options)

        return wrapped

    def _hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITES and not isinstance(path, int) and os.fsdecode(path) != os.devnull:
                self._change(event, os.path.abspath(os.fsdecode(path)))
        elif event in CHANGES:
            paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
            # what is removed from an open folder is named within it
            self._change(event, os.path.abspath(paths[-1]) if not max(map(_number, arguments), default=-1) > 0 else "")
        elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
            self.connected.append(f"{event} {arguments[1:]}")
        elif event == "subprocess.Popen":
            self.started.append(os.path.basename(os.fsdecode(arguments[1][0])))

    def _change(self, event: str, path: str) -> None:
        self.changes.append((event, path))
        if len(self.changes) == self.kill_at:
            if not self.late:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.late)


def _number(argument: object) -> int:
    return argument if isinstance(argument, int) and not isinstance(argument, bool) else -1


@dataclass
class Did:
    """What a verb did: its exit code, what it printed, and which changes of files it made."""

    code: int
    output: str
    errors: str
    changes: list[tuple[str, str]] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)


def undisturbed(root: Path, recorded: Path) -> dict[str, Did]:
    """Run all verbs, one after another, in this process."""
    make_inputs(root / "given", recorded)
    watch, result = Watch(), {}
    watch.watch()
    for name, one in STEPS.items():
        out = place(root, name)
        one.prepare(root, out)
        watch.changes, watch.connected, watch.started = [], [], []
        before, streams = (sys.stdout, sys.stderr), (io.StringIO(), io.StringIO())
        sys.stdout, sys.stderr = streams
        try:
            code = hamscale.cli.main(one.command(root, out))
        finally:
            sys.stdout, sys.stderr = before
        output, errors = (stream.getvalue() for stream in streams)
        result[name] = Did(code, output, errors, list(watch.changes), list(watch.connected), list(watch.started))
        assert code == 0, (name, errors)
    return result


# ---- verbs that are disturbed


def _child(
    arguments: list[str], ends: tuple, environ: dict[str, str], kill_at: int, largest: int | None, late: float = 0.0
) -> None:
    os.environ.update(environ)
    sys.dont_write_bytecode = True
    for number, end in zip((1, 2), ends):
        os.dup2(end.fileno(), number)
    Watch(kill_at, late).watch()
    if largest is not None:  # writing more is an error, as on a full disk: Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    code = hamscale.cli.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def disturbed(
    arguments: list[str],
    environs: Sequence[dict[str, str]] = ({},),
    kill_at: Sequence[int] = (0,),
    largest: int | None = None,
    late: float = 0.0,
) -> list[Did]:
    """Run a verb in a process for each environment, at once.

    kill_at: at which of its changes each is killed, or kept for `late` seconds; 0: not. largest: bytes that a file may have.
    """
    started = []
    for environ, kill in zip(environs, [*kill_at, *[0] * len(environs)]):
        readers, writers = zip(CONTEXT.Pipe(False), CONTEXT.Pipe(False))
        given = (arguments, writers, {"OMP_NUM_THREADS": "1"} | environ, kill, largest, late)
        process = CONTEXT.Process(target=_child, args=given)
        process.start()
        for end in writers:
            end.close()
        started.append((process, readers))
    result = []
    for process, readers in started:
        output, errors = (_read(end.fileno()) for end in readers)
        process.join()
        result.append(Did(process.exitcode, output, errors))
    return result


def on_ranks(size: int) -> list[dict[str, str]]:
    """The environments of ranks that meet."""
    port = free_port()
    return [environment(rank, size, port) for rank in range(size)]


def _read(handle: int) -> str:
    pieces = []
    while piece := os.read(handle, 1 << 16):
        pieces.append(piece)
    return b"".join(pieces).decode()


# ---- what is in files, but for when they were made

WHEN = ("created", "git_commit", "wall_seconds", "seconds", "prediction", "digest", "xxh3_128", "shards")
WHEN_TEXT = re.compile(r'"(created|git_commit|digest|\w*seconds)": ?("[^"]*"|\[[^\]]*\]|[-+.\de]+)')


def contents(folder: Path) -> dict[str, object]:
    """What is in the files of a folder, by their paths in it, and empty folders; nothing of hidden ones (`hidden`)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if (path.is_file() or not any(path.iterdir())) and not any(part.startswith(".") for part in inner.parts):
            name = re.sub(r"[a-z0-9_]{8}-(\d+\.h5)$", r"NAME-\1", str(inner))
            found[name] = _content(path) if path.is_file() else "folder"
    return found


def _content(path: Path) -> object:
    if path.suffix in (".h5", ".nc"):
        return _of_h5(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            about = {k: WHEN_TEXT.sub("", v) for k, v in (file.metadata() or {}).items() if k not in WHEN}
            return about, {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    if path.suffix in (".json", ".html"):
        return WHEN_TEXT.sub("", path.read_text())
    if path.suffix == ".csv":
        lines = WHEN_TEXT.sub("", path.read_text()).splitlines()
        head, body = [line for line in lines[:1] if line[0] == "#"], [line for line in lines if line[0] != "#"]
        return head, [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(body)]
    return path.read_bytes()


def _of_h5(path: Path) -> dict[str, object]:
    result: dict[str, object] = {}

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        for key in item.attrs:
            if key not in (*WHEN, "DIMENSION_LIST", "REFERENCE_LIST"):  # addresses in the file
                result[f"{name}@{key}"] = repr(item.attrs[key])
        # sisl defines BZ_displ and writes nothing into it
        if isinstance(item, h5py.Dataset) and name not in (*WHEN, "SETTINGS/BZ_displ"):
            result[name] = item.shape, np.asarray(item[()]).tobytes()

    with h5py.File(path, "r", locking=False) as file:
        add("", file)
        file.visititems(add)
    return result


def hidden(folder: Path) -> list[str]:
    """Hidden files and folders, which no verb may leave."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


if __name__ == "__main__":
    os.umask(0o027)
    print(json.dumps({name: asdict(did) for name, did in undisturbed(Path(sys.argv[1]), Path(sys.argv[2])).items()}))
