"""The Alps profile, unchanged, on a real Slurm of two nodes with four stand-ins for GPUs each; and what goes wrong on clusters.

First the pipeline; then, on a copy of its folder, a training that one fault after the other meets, and that ends all the same.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from filelock import FileLock

from hamscale.operators import read_operators
from hamscale.train.checkpoint import read_checkpoint, write_checkpoint
from helpers import PATIENCE, TOY, copy_workflow

LAB = Path(tempfile.gettempdir(), "slurm_lab_of_tests")
ROOT, HERE, BIN = Path(__file__).parents[2], Path(__file__).parent, Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
# one run of CP2K after the other, of two ranks of one thread each: there are two real cores
STEP = "srun --exact --nodes=1 --ntasks=2 --mem=1000 workflow/cp2k_on_gpu.sh cp2k.psmp"
CLUSTER = f"cluster={{runs_per_job: 2, at_once: 1, train_retries: 5, cp2k: '{STEP}'}}"
# beside the toy's structures one that does not converge
TORN = "  torn: {split: test, builder: {name: bulk, arguments: {name: Si, crystalstructure: diamond, a: 6.9}}}\n"
MATERIAL = (
    TOY.replace("eps_default: 1.0e-8", "eps_default: 1.0e-8, max_scf: 25")
    .replace("count: 2", "count: 1")
    .replace("repeat: [2, 1, 1]", "repeat: [2, 2, 1]")
    .replace("graph:", f"{TORN}graph:")
)
NETWORK = {"layers": 1, "channels": 4, "hidden": 4, "values": 4, "feed_forward": 8, "radial": 8}
MODELS = {
    "tiny": {"steps": 6, "validate_every": 3},
    "long": {"steps": 10**6, "validate_every": 20, "schedule": "constant"},  # outlasts every fault
}
# not what needs the structure that does not converge, nor figures, which no job draws
TARGETS = (
    "results/toy/predicted/tiny/tiled-000.h5",
    "results/toy/analysis/tiny/test-000/summary.csv",
    "results/toy/operators/torn-000.h5",
)
# the profile's training but for its size: two ranks on one node
PROFILE = yaml.safe_load((ROOT / "alps" / "config.yaml").read_text())
TRAIN = PROFILE["set-resources"]["train"] | {
    "nodes": 1, "tasks_per_node": 2, "cpus_per_task": 1, "runtime": 60, "launch": "srun --nodes=1 --ntasks-per-node=2",
}  # fmt: skip


def lab(command: str):
    env = os.environ | {"SLURM_LAB_DIR": str(LAB)}
    return subprocess.run(["bash", HERE / "lab.sh", command], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def slurm(cp2k):
    """A Slurm of two nodes, which run CP2K. A machine has one: its ports and /etc/slurm are those of all sessions of tests."""
    with FileLock(LAB.with_suffix(".lock"), timeout=PATIENCE):
        started = lab("start")
        assert started.returncode == 0, started.stdout + started.stderr
        yield
        lab("stop")


def start(folder: Path, *arguments, profile: str = "alps") -> subprocess.Popen:
    """`snakemake --profile alps` in a folder."""
    command = [sys.executable, HERE / "impatient_snakemake.py", "--profile", profile, "--config", CLUSTER]
    log = open(folder / "snakemake.log", "a")  # noqa: SIM115
    return subprocess.Popen([*command, *arguments], cwd=folder, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)


@pytest.fixture(scope="module")
def pipeline(slurm, tmp_path_factory):
    """The folder of a whole run, with its exit code."""
    folder = tmp_path_factory.mktemp("pipeline")
    models = {name: {"network": NETWORK, "training": training} for name, training in MODELS.items()}
    copy_workflow(folder, MATERIAL, models)
    return folder, start(folder, "--", *TARGETS).wait(PATIENCE)


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
    assert sorted(p.name for p in store.iterdir()) == ["test-000", "torn-000.failed", "train-000", "validation-000"]
    before = (store / "test-000").stat().st_mtime_ns
    assert start(folder, "--", "results/toy/dft/torn-000").wait(PATIENCE) != 0
    log = (folder / "logs" / "toy" / "batches" / "1.log").read_text()
    assert "test-000: done before" in log
    assert (store / "test-000").stat().st_mtime_ns == before


def test_the_profile_of_a_plain_slurm_with_conda_trains_on_a_node(pipeline, tmp_path):
    """Unchanged but for conda, which is not here: the rules take the environment Snakemake is in."""
    folder = copy_run(pipeline[0], tmp_path / "plain")
    for made in ("models", "networks", "checkpoints"):
        shutil.rmtree(folder / "results" / "toy" / made)
    model = "results/toy/models/tiny/weights.safetensors"
    arguments = ["--sdm", "env-modules", "--rerun-triggers", "mtime", "--", model]
    assert start(folder, *arguments, profile="workflow/profiles/slurm").wait(PATIENCE) == 0, (
        folder / "snakemake.log"
    ).read_text()[-3000:]
    assert (folder / model).is_file()
    assert [(job["JobState"], job["NodeCnt"]) for job in jobs_done(folder)] == [("COMPLETED", "1")]


def copy_run(source: Path, folder: Path) -> Path:
    """Workflow, configuration and results, without what Snakemake remembers of them."""
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".snakemake", "snakemake.log", "logs"))


def jobs_done(folder: Path) -> list[dict[str, str]]:
    """Slurm's records of the jobs of a folder that ended, by the time of their end."""
    records = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in completed_jobs().splitlines()]
    return [record for record in records if record["WorkDir"] == str(folder)]


# ---------------------------------------------------------------------------------------------------------------------- faults


class Training:
    """A training of two ranks on a copy of the pipeline's folder, under `snakemake --profile alps`."""

    def __init__(self, pipeline: Path, folder: Path):
        self.folder = copy_run(pipeline, folder)
        (folder / "config" / "config.yaml").write_text("runs: [{material: toy, model: long}]\n")
        self.log, self.checkpoint = folder / "logs/toy/train/long-0.log", folder / "results/toy/checkpoints/long-0"
        self.model = folder / "results/toy/models/long"
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        resources = [f"train:{name}={value}" for name, value in TRAIN.items()]
        target = str((self.model / "weights.safetensors").relative_to(self.folder))
        return start(self.folder, "--rerun-triggers", "mtime", "--set-resources", *resources, "--", target)

    def text(self) -> str:
        """The log of the rule, which Snakemake empties before it tries again."""
        return self.log.read_text() if self.log.is_file() else ""

    def snakemakes_log(self) -> str:
        """It has the logs of the attempts that failed."""
        return (self.folder / "snakemake.log").read_text()

    def wait_for(self, condition, seconds: int = PATIENCE):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if result := condition():
                return result
            assert self.process.poll() is None, self.snakemakes_log()[-5000:]
            time.sleep(0.2)
        raise AssertionError(
            f"nothing in {seconds} s. {slurm_says('squeue')}{self.snakemakes_log()[-3000:]}{self.text()[-2000:]}"
        )

    def jobs(self, *states: str) -> list[str]:
        """Slurm's jobs of this folder that did not end."""
        found = [line.split() for line in slurm_says("squeue", "-h", "-o", "%A %T %Z").splitlines()]
        return [job for job, state, where in found if where == str(self.folder) and (not states or state in states)]

    def running(self) -> str:
        """The job, once it trains and has written a checkpoint."""
        (job,) = self.wait_for(lambda: re.search(r"^step \d+ of", self.text(), re.M) and self.jobs("RUNNING"))
        return job

    def resumed(self, before: str) -> int:
        """The step at which the next attempt resumes. before: the log of the last one, which goes on for a while."""
        found = self.wait_for(
            lambda: not self.text().startswith(before) and re.search(r"^resumed at step (\d+)$", self.text(), re.M)
        )
        return int(found[1])

    def end_processes(self):
        """All that runs in the folder but Snakemake itself."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.pid != self.process.pid:
                    process.kill()
                    found.append(process)
        psutil.wait_procs(found, timeout=PATIENCE)


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def training(pipeline, tmp_path_factory):
    """One training for all faults but the last: each test takes it running, and leaves it running."""
    result = Training(pipeline[0], tmp_path_factory.mktemp("faults") / "run")
    yield result
    result.process.kill()
    for job in result.jobs():
        subprocess.run(["scancel", job])
    result.end_processes()


def test_a_cancelled_job_is_submitted_again_and_resumes(training):
    job, before = training.running(), training.text()
    slurm_says("scancel", job)
    assert training.resumed(before) >= 20
    assert training.running() != job


def test_training_stops_at_the_signal_of_the_walltime_and_resumes_at_the_step_it_left(training):
    """Slurm sends the signal of the profile's --signal once the limit is near, here by a limit shorter than at the start."""
    job, before, log = training.running(), training.text(), len(training.snakemakes_log())
    elapsed = datetime.now() - datetime.fromisoformat(slurm_says("squeue", "-h", "-j", job, "-o", "%S").strip())
    slurm_says("scontrol", "update", f"JobId={job}", f"TimeLimit={int(elapsed.total_seconds() / 60) + 4}")
    step = training.resumed(before)
    failed = training.snakemakes_log()[log:]
    assert re.findall(r"^stopped by a signal after step (\d+) of", failed, re.M) == [str(step)]
    # both ranks, which srun names together or one by one
    assert sorted(re.findall(r"tasks? (\S+): Exited with exit code 85", failed)) in (["0", "1"], ["0-1"])
    assert training.running() != job


def test_after_a_killed_snakemake_the_line_of_the_docs_ends_its_job_and_the_next_resumes(training):
    (way_out,) = re.findall(r"^.*--profile alps --unlock$", (ROOT / "docs" / "alps.md").read_text(), re.M)
    job, before = training.running(), training.text()
    training.process.kill()
    training.process.wait()
    # a mere new start is refused, and the job goes on
    assert training.start().wait(PATIENCE) != 0
    assert "LockException" in training.snakemakes_log()
    assert training.jobs() == [job]
    done = subprocess.run(["bash", "-c", way_out], cwd=training.folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not training.jobs()
    training.process = training.start()
    assert training.resumed(before) >= 20
    assert training.running() != job


def test_a_node_that_goes_down_gives_its_job_back_and_training_resumes_on_the_other_and_ends(training):
    job, before = training.running(), training.text()
    node = slurm_says("squeue", "-h", "-j", job, "-o", "%N").strip()
    slurm_says("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        training.wait_for(lambda: training.jobs("PENDING") == [job])
        training.end_processes()  # of a node that is gone nothing goes on
        # a million steps are not waited for: the last of them are left
        skip_to(training.checkpoint / "checkpoint.safetensors", MODELS["long"]["steps"] - 25)
        slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes else
        assert training.resumed(before) == MODELS["long"]["steps"] - 25
        assert training.process.wait(PATIENCE) == 0, training.snakemakes_log()[-3000:]
    finally:
        slurm_says("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert pd.read_csv(training.model / "train.csv")["step"].iloc[-1] == MODELS["long"]["steps"]
    assert (training.model / "weights.safetensors").is_file()
    last = jobs_done(training.folder)[-1]
    assert (last["JobId"], last["JobState"]) == (job, "COMPLETED")  # Snakemake waited for it, and submitted no other
    assert last["NodeList"] != node


def test_none_of_these_jobs_ran_beside_another(training):
    done = jobs_done(training.folder)
    assert len(done) > 1
    for earlier, later in zip(done, done[1:]):
        assert earlier["EndTime"] <= later["StartTime"], (earlier, later)


def skip_to(path: Path, step: int):
    """A checkpoint as if it were of a later step."""
    tensors, state = read_checkpoint(path)
    write_checkpoint(path, tensors, state | {"step": step})


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
        verbs = [
            ["operators", material, structure, results / "dft" / "test-000", "--out", disk / "operators.h5"],
            ["graph", results / "reference.h5", operators, "--out", disk / "graphs"],
            ["predict", results / "models" / "tiny", structure, "--out", disk / "predicted.h5"],
            ["dft", results / "inputs" / "test-000.inp", "--out", disk / "run"],
        ]
        started = [subprocess.Popen([BIN / "hamscale", *v], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for v in verbs]
        for (verb, *_), process in zip(verbs, started):
            said = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 1, (verb, said)
            assert "hamscale: error:" in said.splitlines()[-1]
        assert {p.name for p in disk.iterdir()} <= {"filler", "run.failed", "graphs"}
        assert not any((disk / "graphs").glob("*"))
    finally:
        subprocess.run(["umount", disk], check=True)
