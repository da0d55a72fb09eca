"""The scripts that make the tables of the figures, on a CPU as on a GPU: what they measure on, and where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hamscale.files import read_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments):
    command = [sys.executable, BENCHMARKS / f"{name}.py", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


SMALL = ("--strong-atoms", 24, "--weak-atoms", 12, "--cutoff", 4, "--only", "node-update")


def test_scaling_is_measured_on_the_ranks_that_there_are_and_says_on_what(tmp_path):
    result = run("scaling", "measure", "--ranks", 1, 2, *SMALL, "--exchange", "torch-float16", "--raw", tmp_path)
    assert result.returncode == 0, result.stderr
    table = read_table(tmp_path / "scaling_measured.csv")
    assert json.loads(result.stdout.splitlines()[-1])["device"].endswith("a core per rank")
    assert set(table["device"].str.split(", ").str[-1]) == {"a core per rank"}
    assert set(table["exchange"]) == {"torch-float16"}
    assert table.groupby("ranks")["method"].unique().map(set).to_dict() == {1: {"one rank"}, 2: {"low-nn", "metis", "min-nn"}}
    assert set(table.loc[table["ranks"] == 2, "rank"]) == {0, 1}
    edges = table.drop_duplicates(["ranks", "rank", "method"]).groupby(["ranks", "method"])["edges"].sum()
    assert edges.nunique() == 1  # whoever has them


def test_throughput_says_on_what_it_was_measured_and_keeps_rows_of_other_devices(tmp_path):
    (tmp_path / "fig3.csv").write_text("device,channels,messages\nanother,16,70\n")
    result = run("throughput", "--most-atoms", 2, "--longest", 0.1, "--repeats", 1, "--raw", tmp_path)
    assert result.returncode == 0, result.stderr
    devices = set(read_table(tmp_path / "fig3.csv")["device"])
    assert "another" in devices
    assert any(device.endswith(", 1 thread") for device in devices)


@pytest.mark.parametrize("command", [("throughput",), ("scaling", "measure")])
def test_a_gpu_that_is_not_there_is_told_in_one_line(tmp_path, command):
    result = run(*command, "--device", "cuda")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "--device cuda: torch sees no GPU on this machine. Start it where there is one, or give --device cpu."
    ]
