"""Form of the code: linter, formatter, types, and who may import whom."""

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["snakefmt", "--check", "Snakefile", "workflow"],
        ["lint-imports"],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_form(command):
    result = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
