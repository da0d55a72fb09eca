"""Begin a project of one's own: configuration, an example, and a Snakefile that takes the rules from the package."""

import shutil
from pathlib import Path

from . import __version__
from .files import atomic_folder

MATERIALS, MODELS, PROFILES = ("silicon",), ("demo", "small"), ("alps", "slurm")
SNAKEFILE = """# Made by `hamscale init` of version {version}. The rules are those of the hamscale that runs Snakemake.
from hamscale.project import root


include: root() / "workflow" / "hamscale.smk"


rule all:
    default_target: True
    localrule: True
    input:
        targets(),
"""
CONFIG = """# What to run: each material learnt by a model. `snakemake --cores 2` makes all of it.
runs:
  - {material: silicon, model: demo}
"""
IGNORED = "results/\nlogs/\n.snakemake/\n"


def root() -> Path:
    """Return the folder that holds workflow/, config/ and envs/: in the installed package, or the clone it runs from."""
    installed = Path(__file__).parent / "project"
    return installed if installed.is_dir() else Path(__file__).parents[2]


def create_project(folder: str | Path) -> None:
    """Write a folder in which `snakemake --cores 2` runs the example, and to which materials and models are added.

    Raises ValueError if the folder exists and is not empty.
    """
    source = root()
    with atomic_folder(folder) as new:
        (new / "Snakefile").write_text(SNAKEFILE.format(version=__version__))
        (new / ".gitignore").write_text(IGNORED)
        for part, names in (("materials", MATERIALS), ("models", MODELS)):
            (new / "config" / part).mkdir(parents=True)
            for name in names:
                shutil.copy(source / "config" / part / f"{name}.yaml", new / "config" / part)
        (new / "config" / "config.yaml").write_text(CONFIG)
        for profile in PROFILES:
            shutil.copytree(source / "workflow" / "profiles" / profile, new / profile)
        (new / "workflow").mkdir()
        shutil.copy(source / "workflow" / "cp2k_on_gpu.sh", new / "workflow")
