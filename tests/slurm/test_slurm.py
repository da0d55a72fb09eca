"""The Alps profile, unchanged, on a real Slurm of two nodes with four stand-ins for GPUs each; and what goes wrong on clusters.

First the pipeline; then, on a copy of its folder, a training that a fault meets.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from conftest import TOY, copy_workflow
from hamscale.operators import read_operators

pytestmark = pytest.mark.slurm

LAB = Path(tempfile.gettempdir(), "slurm_lab_of_tests")
ROOT, HERE, BIN = Path(__file__).parents[2], Path(__file__).parent, Path(sys.executable).parent
# two runs of CP2K side by side, a rank of one thread each: there are two real cores
STEP = "srun --exact --overlap --nodes=1 --ntasks=1 cp2k.psmp"
CLUSTER = f"cluster={{runs_per_job: 3, at_once: 2, train_retries: 5, cp2k: '{STEP}'}}"
# beside the toy's structures one that does not converge
TORN = "  torn: {split: test, builder: {name: bulk, arguments: {name: Si, crystalstructure: diamond, a: 6.9}}}\n"
MATERIAL = (
    TOY.replace("eps_default: 1.0e-8", "eps_default: 1.0e-8, max_scf: 25")
    .replace("repeat: [2, 1, 1]", "repeat: [2, 2, 1]")
    .replace("graph:", f"{TORN}graph:")
)
NETWORK = {"layers": 1, "channels": 4, "hidden": 4, "values": 4, "feed_forward": 8, "radial": 8}
MODELS = {
    "tiny": {"steps": 6, "validate_every": 3},
    "cancelled": {"steps": 150, "validate_every": 10, "schedule": "constant"},
    "endless": {"steps": 10**6, "validate_every": 10, "schedule": "constant"},
}
# all but what needs the structure that does not converge, and the figures of the method
TARGETS = (
    "results/toy/predicted/tiny/tiled-000.h5",
    "results/figures/toy/tiny/test-000/bands.png",
    "results/toy/operators/torn-000.h5",
)
# two ranks on one node
TRAIN = ["mpi=srun", "nodes=1", "tasks_per_node=2", "cpus_per_task=1", "launch=srun --nodes=1 --ntasks-per-node=2"]


def lab(command: str):
    env = os.environ | {"SLURM_LAB_DIR": str(LAB)}
    return subprocess.run(["bash", HERE / "lab.sh", command], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of two nodes."""
    if not shutil.which("slurmctld"):
        installed = lab("install")
        if installed.returncode:
            if os.environ.get("CI"):
                pytest.fail(f"Slurm's packages cannot be installed: {installed.stderr[-500:]}")
            pytest.skip(f"Slurm's packages are not there and cannot be installed: {installed.stderr[-200:]}")
    started = lab("start")
    assert started.returncode == 0, started.stdout + started.stderr
    yield
    lab("stop")


def start(folder: Path, *arguments) -> subprocess.Popen:
    """`snakemake --profile alps` in a folder; polling faster than on Alps."""
    command = [BIN / "snakemake", "--profile", "alps", "--slurm-init-seconds-before-status-checks", "1", "--config", CLUSTER]
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    log = open(folder / "snakemake.log", "a")  # noqa: SIM115
    return subprocess.Popen([*command, *arguments], cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True)


@pytest.fixture(scope="module")
def pipeline(slurm, tmp_path_factory):
    """The folder of a whole run, with its exit code."""
    folder = tmp_path_factory.mktemp("pipeline")
    models = {name: {"network": NETWORK, "training": training} for name, training in MODELS.items()}
    copy_workflow(folder, MATERIAL, models)
    return folder, start(folder, "--", *TARGETS).wait(600)


def test_from_config_to_predicted_hamiltonian_through_slurm(pipeline):
    folder, code = pipeline
    log = (folder / "snakemake.log").read_text()
    tiled = read_operators(folder / "results" / "toy" / "predicted" / "tiny" / "tiled-000.h5")
    assert (len(tiled.atoms), tiled.attributes["source"]) == (8, "predicted"), log[-3000:]
    shards = folder / "results" / "toy" / "predicted" / "tiny" / "tiled-000.h5.shards"
    assert len(list(shards.iterdir())) == 4  # one per task of the node
    # trained on two nodes, and predicted on one
    nodes = re.findall(r"NodeCnt=(\d+)", completed_jobs())
    assert nodes.count("2") == 1
    assert len(nodes) >= 6
    # the structure that does not converge is reported, the rest goes on, and the exit code says so
    assert code != 0
    assert re.search(r"torn-000.inp: the SCF did not converge \(last step 25", log + read_logs(folder))
    assert (folder / "results" / "figures" / "toy" / "tiny" / "test-000" / "bands.png").is_file()
    assert pd.read_csv(folder / "results" / "toy" / "analysis" / "tiny" / "test-000" / "summary.csv")["mae_mev"].notna().all()
    assert not (folder / "results" / "toy" / "dft" / "torn-000").exists()


def read_logs(folder: Path) -> str:
    return "".join(p.read_text() for p in (folder / "logs" / "toy").rglob("*.log"))


def completed_jobs() -> str:
    return (LAB / "jobcomp.log").read_text()


def test_a_run_refused_is_run_again_alone(pipeline):
    """What was accepted stays: the next start plans one batch, and its log says what was done before."""
    folder, _ = pipeline
    store = folder / "results" / "toy" / "runs"
    assert sorted(p.name for p in store.iterdir()) == [
        "test-000", "torn-000.failed", "train-000", "train-001", "validation-000",
    ]  # fmt: skip
    before = (store / "test-000").stat().st_mtime_ns
    assert start(folder, "--", "results/toy/dft/torn-000").wait(200) != 0
    log = (folder / "logs" / "toy" / "batches" / "1.log").read_text()
    assert "test-000: done before" in log
    assert (store / "test-000").stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------------------------------------- faults


class Training:
    """A training on a copy of the pipeline's folder, watched through its log."""

    def __init__(self, pipeline: Path, folder: Path, model: str, runtime: int, *extra: str):
        shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns(".snakemake", "snakemake.log", "logs"))
        self.folder, self.target = folder, f"results/toy/models/{model}/weights.safetensors"
        self.log, self.checkpoint = folder / f"logs/toy/train/{model}.log", folder / f"results/toy/checkpoints/{model}"
        self.resources = ["--set-resources", *[f"train:{r}" for r in [*TRAIN, f"runtime={runtime}", *extra]]]
        (folder / "config" / "config.yaml").write_text(f"runs: [{{material: toy, model: {model}}}]\n")
        self.process = self.start()

    def start(self):
        return start(self.folder, *self.resources, "--rerun-triggers", "mtime", "--", self.target)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """What still runs of this folder is ended, and the nodes are whole again."""
        self.process.kill()
        for _ in range(300):
            for job in self.jobs():
                subprocess.run(["scancel", "--signal=KILL", "--full", job], capture_output=True)
                subprocess.run(["scancel", job], capture_output=True)
            for line in subprocess.run(
                ["sinfo", "-h", "-N", "-p", "normal", "-o", "%N %t"], capture_output=True, text=True
            ).stdout.splitlines():
                node, state = line.split()
                if state.rstrip("*~#!%$@^-") not in ("idle", "alloc", "mix", "comp"):  # refused where it came back by itself
                    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True)
            if not self.jobs() and nodes_that_are("idle") == 2:
                return
            time.sleep(0.2)
        raise AssertionError(subprocess.run(["sinfo", "-N"], capture_output=True, text=True).stdout)

    def step(self, words: str) -> int:
        """The number after some words of the log, once they stand there."""
        self.wait_for(lambda: re.search(rf"{words} (\d+)", self.text()))
        return int(re.search(rf"{words} (\d+)", self.text())[1])

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def wait_for(self, condition, seconds: int = 240):
        for _ in range(seconds * 5):
            if condition():
                return
            if self.process.poll() not in (None, -9):
                break
            time.sleep(0.2)
        raise AssertionError((self.folder / "snakemake.log").read_text()[-3000:] + self.text()[-2000:])

    def jobs(self, state: str = "") -> list[str]:
        """Slurm jobs of this folder, by its working directory."""
        lines = subprocess.run(["squeue", "-h", "-o", "%A|%T|%Z"], capture_output=True, text=True).stdout.splitlines()
        found = [line.split("|") for line in lines]
        return [job for job, s, where in found if Path(where) == self.folder and (state in s if state else s in ACTIVE)]

    def running(self) -> str:
        self.wait_for(lambda: (self.checkpoint / "checkpoint.safetensors").is_file() and self.jobs("RUNNING"))
        return self.jobs("RUNNING")[0]


ACTIVE = ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING")


def test_a_cancelled_job_is_submitted_again_and_finishes(pipeline, tmp_path):
    with Training(pipeline[0], tmp_path / "cancelled", "cancelled", 10) as t:
        first = t.running()
        subprocess.run(["scancel", first], check=True)
        assert t.process.wait(300) == 0, (t.folder / "snakemake.log").read_text()[-3000:]
        assert "resumed at step" in t.text()
        assert (t.folder / t.target).is_file()
        assert not t.jobs()


def nodes_that_are(state: str) -> int:
    return (
        subprocess.run(["sinfo", "-h", "-N", "-p", "normal", "-o", "%t"], capture_output=True, text=True)
        .stdout.split()
        .count(state)
    )


def test_walltime_the_signal_is_obeyed_and_training_goes_on_at_the_step_it_left(pipeline, tmp_path):
    """Slurm's own signal, 80 s before the end of 2 minutes; on Alps it is 3 minutes before the end of 12 hours."""
    with Training(pipeline[0], tmp_path / "walltime", "endless", 2, "slurm_extra=--signal=USR1@80") as t:
        stopped = t.step("stopped by a signal after step")
        t.wait_for(lambda: "exit code 85" in t.text())  # the line stands there until Snakemake submits the job again
        assert t.step("resumed at step") == stopped


def test_a_node_that_goes_down_gives_its_job_back_and_training_goes_on(pipeline, tmp_path):
    with Training(pipeline[0], tmp_path / "down", "endless", 30) as t:
        job = t.running()
        node = subprocess.run(["squeue", "-h", "-j", job, "-o", "%N"], capture_output=True, text=True).stdout.strip()
        before = t.text()
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], check=True)
        t.wait_for(lambda: t.jobs("PENDING") == [job])
        # a requeued job waits two minutes: that is Slurm's own prudence, and not what is tested
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
        t.wait_for(lambda: t.text() != before and "resumed at step" in t.text())
        assert t.jobs("RUNNING") == [job]  # the same job: Snakemake kept waiting for it
        assert t.process.poll() is None


def test_a_killed_snakemake_starts_again_by_the_line_of_the_docs_and_nothing_runs_twice(pipeline, tmp_path):
    (way_out,) = re.findall(r"^squeue --me .*--unlock$", (ROOT / "docs" / "alps.md").read_text(), re.M)
    with Training(pipeline[0], tmp_path / "killed", "endless", 30) as t:
        first = t.running()
        os.kill(t.process.pid, signal.SIGKILL)
        t.process.wait()
        assert t.jobs("RUNNING") == [first]  # it goes on without Snakemake
        env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", way_out], cwd=t.folder, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        t.process = t.start()
        t.wait_for(lambda: t.jobs("RUNNING") not in ([], [first]))
        t.wait_for(lambda: "resumed at step" in t.text())
        assert len(t.jobs()) == 1


def test_a_full_disk_leaves_no_half_file(pipeline, tmp_path):
    """A real file system of 1 MB, filled up: every verb that writes fails in a line, and nothing has the name of a result."""
    folder, disk = pipeline[0], tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        with open(disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while filler.write(b"x" * 4096):
                pass
        results, material = folder / "results" / "toy", folder / "config" / "materials" / "toy.yaml"
        structure, operators = results / "structures" / "test-000.extxyz", results / "operators" / "test-000.h5"
        for arguments in (
            ["operators", material, structure, results / "dft" / "test-000", "--out", disk / "operators.h5"],
            ["graph", results / "reference.h5", operators, "--out", disk / "graph.h5"],
            ["predict", results / "models" / "tiny", structure, "--out", disk / "predicted.h5"],
            ["dft", results / "inputs" / "test-000.inp", "--out", disk / "run"],
        ):
            done = subprocess.run([BIN / "hamscale", *map(str, arguments)], capture_output=True, text=True)
            assert done.returncode == 1, (arguments[0], done.stdout, done.stderr)
            assert "hamscale: error:" in done.stderr.splitlines()[-1]
            left = {p.name for p in disk.iterdir()} - {"filler", "run.failed"}
            assert not left, (arguments[0], left)
    finally:
        subprocess.run(["umount", disk], check=True)
