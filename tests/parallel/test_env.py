"""Which rank a process is, from what Slurm says where its programs are missing, and from what mpirun says."""

import os
import subprocess
import sys

import pytest

from hamscale.parallel.env import first_host, numbers
from helpers import PATIENCE
from ranks import free_port


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("nid001", "nid001"),
        ("nid[001-004,007],login1", "nid001"),
        ("nid[007,009]", "nid007"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]-node[03-04]", "rack1-node03"),
    ],
)
def test_the_first_host_of_a_list(hosts, expected):
    assert first_host(hosts) == expected


def test_no_host_is_told():
    with pytest.raises(ValueError, match="neither SLURM_STEP_NODELIST nor MASTER_ADDR is set. Set MASTER_ADDR"):
        first_host("")


PROGRAM = """
import sys
import torch
from hamscale.parallel.env import world
with world() as w:
    line = f"{w.rank} {w.sum(torch.tensor([w.rank + 1.0])).item()}"
    sys.stdout.write(line + "\\n")  # in one piece: mpirun mixes what two ranks print
"""


PLAIN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM", "MASTER", "RANK", "WORLD", "OMPI", "PMI", "MPI"))
}


@pytest.mark.parametrize("hosts", ["127.0.0.[1-2]", None], ids=["of the step", "MASTER_ADDR"])
def test_two_tasks_of_srun_meet_inside_a_container(hosts, tmp_path):
    """Only srun's variables: no scontrol, no other program on the PATH."""
    where = {"SLURM_STEP_NODELIST": hosts} if hosts else {"MASTER_ADDR": "127.0.0.1"}
    common = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port()), "PATH": str(tmp_path)} | where
    tasks = []
    for rank in range(2):
        environment = PLAIN | common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        command = [sys.executable, "-c", PROGRAM]
        tasks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for rank, task in enumerate(tasks):
        output, errors = task.communicate(timeout=PATIENCE)
        assert task.returncode == 0, errors
        assert output.split() == [str(rank), "3.0"]


def test_mpirun_starts_one_run_on_two_ranks(mpirun):
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=PLAIN, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0 3.0", "1 3.0"]


# as Open MPI 4 and MPICH's Hydra set them on one host
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_ess_base_jobid": "1749876737",
    "PMIX_RANK": "3",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def found(environment: dict[str, str]) -> tuple:
    """Rank, number of ranks and rank on the host, and where the ranks meet."""
    changed = dict(environment)
    return *numbers(changed), changed.get("MASTER_ADDR"), changed.get("MASTER_PORT")


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_ranks_of_mpirun_on_one_host_meet_there(environment):
    rank, size, local, host, port = found(environment)
    assert (rank, size, local, host) == (3, 4, 1, "127.0.0.1")
    assert 20000 <= int(port) < 32768  # no port that the kernel may have handed out
    assert found(environment)[-1] == port
    assert found(environment | {"MASTER_ADDR": "node7", "MASTER_PORT": "29"})[-2:] == ("node7", "29")


def test_runs_of_mpirun_side_by_side_meet_at_ports_of_their_own():
    assert found(OPEN_MPI)[-1] != found(OPEN_MPI | {"OMPI_MCA_ess_base_jobid": "1749942273"})[-1]


@pytest.mark.parametrize("launcher", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_helpers_that_mpirun_starts_by_srun_are_not_the_ranks(launcher):
    """A helper of each node is a task of a step, whose variables the ranks inherit."""
    helper = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "nid[007,009]", "SLURM_JOB_ID": "12"}
    apart = {name: "2" for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS") if name in launcher}
    *mine, host, port = found(launcher | helper | apart)
    assert (mine, host) == ([3, 4, 1], "nid007")
    assert int(port)


def test_tasks_of_srun_that_have_variables_of_pmi_too_are_those_of_srun():
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "nid[3-4]"}
    assert found(HYDRA | srun | {"SLURM_JOB_ID": "1"})[:4] == (2, 4, 0, "nid3")


def test_torchrun_is_asked_first_and_a_process_alone_is_one_rank():
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert found(OPEN_MPI | torchrun) == (1, 2, 0, "a", "1")
    assert found({}) == found({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) == (0, 1, 0, None, None)


def test_ranks_on_several_hosts_are_told_what_to_set():
    with pytest.raises(ValueError, match="several hosts and does not tell which has rank 0. Set MASTER_ADDR"):
        found(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    with pytest.raises(ValueError, match="has no name for its job. Set MASTER_PORT to a free port of node1"):
        found(HYDRA | {"MPI_LOCALNRANKS": "2", "MASTER_ADDR": "node1"})
    assert found(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node1"})[-1] == found(OPEN_MPI)[-1]
    with pytest.raises(ValueError, match="RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        found({"RANK": "0"})
