"""Which rank a process is, from what Slurm says where its programs are missing."""

import os
import subprocess
import sys

import pytest
from ranks import free_port

from hamscale.parallel.env import first_host
from helpers import PATIENCE


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
import torch
from hamscale.parallel.env import world
with world() as w:
    print(w.rank, w.sum(torch.tensor([w.rank + 1.0])).item())
"""


@pytest.mark.parametrize("hosts", ["127.0.0.[1-2]", None], ids=["of the step", "MASTER_ADDR"])
def test_two_tasks_of_srun_meet_inside_a_container(hosts, tmp_path):
    """Only srun's variables: no scontrol, no other program on the PATH."""
    port = free_port()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER", "RANK", "WORLD"))}
    tasks = []
    for rank in range(2):
        variables = {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "MASTER_PORT": str(port),
        }
        variables |= {"SLURM_STEP_NODELIST": hosts} if hosts else {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", PROGRAM]
        environment = plain | variables | {"PATH": str(tmp_path)}
        tasks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for rank, task in enumerate(tasks):
        output, errors = task.communicate(timeout=PATIENCE)
        assert task.returncode == 0, errors
        assert output.split() == [str(rank), "3.0"]
