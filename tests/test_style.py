"""Form of the code: linter, formatter, types, and who may import whom; and the lock of its environment."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def _pins(lock: str, environment: dict[str, str]) -> dict[str, str]:
    """The versions that a lock installs under a version of Python."""
    lines = (Path(__file__).parents[1] / "envs" / lock).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    chosen = [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in chosen}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_what_its_packages_need_under_every_python(python):
    """cp2k-input-tools wants another Pint from 3.12 on. Only setuptools is left to pip, which venv no longer brings."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    pins = _pins("cpu.lock", environment)
    for name in pins:
        for needed in map(Requirement, metadata.requires(name) or []):
            if (needed.marker is None or needed.marker.evaluate(environment)) and needed.name != "setuptools":
                version = pins.get(canonicalize_name(needed.name))
                assert version is not None, f"{name} needs {needed}"
                assert needed.specifier.contains(version, prereleases=True), f"{name} needs {needed}, locked is {version}"
