"""Tests on a machine without CP2K, Chromium, graphviz and Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
MODULES = ("tests/dft/test_run.py", "tests/slurm/test_slurm.py", "tests/test_page.py", "tests/workflow/test_workflow.py")


def _collected_without_programs(*options: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "HAMSCALE_CP2K"))}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options, *MODULES]
    return subprocess.run(command, cwd=ROOT, env=inherited | {"PATH": str(BIN)}, capture_output=True, text=True)


def test_what_needs_a_missing_program_is_left_out_and_the_program_named():
    result = _collected_without_programs()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_files_half_written_leave_nothing_but_the_failed_run" in result.stdout
    for needy in (
        "test_a_killed_cp2k_is_told",
        "test_slurm.py::",
        "_and_zooms",
        "test_the_report_opens",
        "test_the_graphs_render",
    ):
        assert needy not in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "missing are" in line]
    assert re.match(  # MkDocs is a package of Python, which is there or not
        "tests marked cp2k, browser, graphviz, (mkdocs, )?mpirun, slurm are not run: "
        "missing are CP2K, which workflow/setup_cp2k.sh installs;",
        line,
    )


def test_make_test_takes_no_missing_program_for_an_answer():
    result = _collected_without_programs("--all-programs")
    assert result.returncode == 4
    assert "missing are CP2K, which workflow/setup_cp2k.sh installs; Chromium" in result.stderr
