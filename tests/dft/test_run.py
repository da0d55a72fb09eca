"""Real CP2K runs that go wrong: each is refused with its cause, and nothing is left where a result would be."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hamscale.dft.run import run_cp2k
from helpers import PATIENCE, SZV, calculate, material, silicon, wait_for


def _fails(tmp_path, message, atoms=None, **dft):
    settings = material({"Si": SZV}, **({"cutoff_ry": 80, "rel_cutoff_ry": 30} | dft))
    with pytest.raises(ValueError, match=message) as error:
        calculate(atoms or silicon(), settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_an_unconverged_scf_is_refused_with_its_last_change(cp2k, tmp_path):
    text = _fails(tmp_path, "the SCF did not converge", max_scf=3)
    assert "run.inp" in text
    assert "last step 3" in text
    assert (tmp_path / "run.failed" / "run.out").is_file()


def test_what_cp2k_aborts_with_is_told(cp2k, tmp_path):
    (tmp_path / "run.inp").write_text("&GLOBAL\n  RUN_TYP ENERGY\n&END GLOBAL\n")
    with pytest.raises(ValueError, match="exit code 1.*RUN_TYP") as error:
        run_cp2k(tmp_path / "run.inp", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_killed_cp2k_is_told(cp2k, tmp_path):
    """kill -9 of the very CP2K process while it runs."""
    settings = material({"Si": SZV}, cutoff_ry=400)
    from hamscale.basis import material_basis
    from hamscale.dft.inputs import cp2k_input

    (tmp_path / "run.inp").write_text(cp2k_input(silicon(), settings, material_basis(settings)))
    command = [sys.executable, "-m", "hamscale", "dft", str(tmp_path / "run.inp"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    # not the process that is asked for its version before
    search = ["pgrep", "-P", str(process.pid), "-f", "run.out"]
    child, *_ = wait_for(lambda: subprocess.run(search, capture_output=True, text=True).stdout.split(), "CP2K starts")
    os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "killed by signal 9" in errors
    assert not (tmp_path / "run").exists()


def _program(path: Path, script: str) -> str:
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    path.chmod(0o755)
    (path.parent / "run.inp").write_text("")
    return str(path)


def test_a_kill_that_a_launcher_reports_is_told(tmp_path):
    """mpirun, srun and shells exit with 128 + the signal of the program they started."""
    with pytest.raises(ValueError, match="killed by signal 9"):
        run_cp2k(tmp_path / "run.inp", tmp_path / "run", _program(tmp_path / "launcher", "exit 137"))


def test_files_half_written_leave_nothing_but_the_failed_run(tmp_path):
    command = _program(tmp_path / "dies", "printf 12345 > run-KS_SPIN_1-1_0.csr; echo begun > run.out; kill -9 $$")
    for _ in range(2):  # a second failure takes the place of the first
        with pytest.raises(ValueError, match=r"killed by signal 9.*no SCF step.*run\.failed/run\.out"):
            run_cp2k(tmp_path / "run.inp", tmp_path / "run", command)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dies", "run.failed", "run.inp"]
    assert sorted(p.name for p in (tmp_path / "run.failed").glob("run*")) == ["run-KS_SPIN_1-1_0.csr", "run.inp", "run.out"]


def test_a_failure_leaves_a_former_run_whole(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.out").write_text("former")
    with pytest.raises(ValueError, match="the SCF did not converge"):
        run_cp2k(tmp_path / "run.inp", tmp_path / "run", _program(tmp_path / "ends", "echo PROGRAM ENDED AT > run.out"))
    assert (tmp_path / "run" / "run.out").read_text() == "former"


def test_missing_cp2k_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "run.inp").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HAMSCALE_CP2K", raising=False)
    with pytest.raises(ValueError, match="not found on PATH. Install Debian's package cp2k"):
        run_cp2k(tmp_path / "run.inp", tmp_path / "run")
    with pytest.raises(ValueError, match="no-such-cp2k"):
        run_cp2k(tmp_path / "run.inp", tmp_path / "run", "no-such-cp2k")
