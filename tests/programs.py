"""Programs outside Python that some tests run: each is a fixture and a marker of the same name, and may be missing."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from hamscale.dft.run import cp2k_command


@dataclass(frozen=True)
class Program:
    """A program, how to install it, and whether it is there."""

    name: str
    install: str
    is_there: Callable[[], bool]


def _has_cp2k() -> bool:
    try:
        cp2k_command()
    except ValueError:
        return False
    return True


def _has_chromium() -> bool:
    return all(map(shutil.which, ("chromium", "chromedriver"))) and find_spec("selenium") is not None


def _has_mkdocs() -> bool:
    return all(map(find_spec, ("mkdocs", "material", "mkdocstrings", "latex2mathml", "markdown_exec")))


def _has_slurm() -> bool:
    """Slurm's daemons are started by the tests themselves, which takes root."""
    return all(map(shutil.which, ("slurmctld", "slurmd", "srun", "munged"))) and os.geteuid() == 0


# marker and fixture -> program; the markers are described in pyproject.toml
PROGRAMS = {
    "cp2k": Program("CP2K", "workflow/setup_cp2k.sh", _has_cp2k),
    "browser": Program("Chromium with its driver", "tests/setup_programs.sh", _has_chromium),
    "graphviz": Program("graphviz", "tests/setup_programs.sh", lambda: shutil.which("dot") is not None),
    "mkdocs": Program("MkDocs", "make .venv/docs", _has_mkdocs),
    "mpirun": Program("mpirun (Open MPI)", "tests/setup_programs.sh", lambda: shutil.which("mpirun") is not None),
    "slurm": Program("Slurm (run as root)", "tests/setup_programs.sh", _has_slurm),
}


def missing_programs() -> dict[str, str]:
    """Return the programs that are not on this machine: marker -> name and the script that installs it."""
    return {
        marker: f"{program.name}, which {program.install} installs"
        for marker, program in PROGRAMS.items()
        if not program.is_there()
    }
