"""Define the runs of a configuration, config/config.yaml, how they become jobs, and what the command line may name."""

import typing
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from .section import Name, Section


class Run(Section):
    """A material and the model that learns it."""

    material: Name = Field(description="NAME of config/materials/NAME.yaml")
    model: Name = Field(description="NAME of config/models/NAME.yaml")


class Cluster(Section):
    """Settings of how work is cut into jobs. A profile sets them; on one machine none is needed."""

    runs_per_job: PositiveInt = Field(1, description="CP2K runs of one job; 1: each is a job of its own")
    at_once: PositiveInt = Field(1, description="CP2K runs of a job that run side by side")
    cp2k: str = Field("", description="command that runs CP2K, e.g. a step of a job: srun --exact --ntasks=8 ... cp2k.psmp")
    train_retries: NonNegativeInt = Field(
        0, description="how often training is submitted again: after its walltime, or a failure"
    )


Export = Literal["quatrex", "tbtrans", "tshs", "deeph", "deeptb", "cp2k", "cp2k-text", "matrixmarket"]
# names in the registries of partition, parallel, export and figures, repeated for the command line, which does not import these
PARTITIONERS = ("low-nn", "metis", "min-nn")
EXCHANGES = ("torch", "torch-float16", "torch-bfloat16", "cupy", "cupy-float16", "cupy-bfloat16")
EXPORTS = ("sisl", "cp2k-restart", *typing.get_args(Export))
PAPER_FIGURES = ("fig3", "fig5", "fig6", "fig7", "fig8", "learning", "roofline", "size")


class Figure8(Section):
    """Structures that figure 8 shows, from one of the runs."""

    material: Name = Field(description="NAME of config/materials/NAME.yaml")
    model: Name = Field(description="NAME of config/models/NAME.yaml")
    structures: dict[str, str] = Field(description="label: held-out structure, e.g. amorphous: test-000")
    tiled: dict[str, str] = Field(description="label: structure whose predicted H is shown", min_length=1, max_length=1)


class Config(Section):
    """List of runs and their settings: the content of config/config.yaml."""

    runs: Annotated[list[Run], Field(min_length=1, description="which material is learnt by which model")]
    cluster: Cluster = Field(Cluster(), description="how work is cut into jobs; a profile sets it")
    export: list[Export] = Field([], description="formats that every prediction of a test or predict set is exported to")
    raw: Literal["resources/raw", "results/raw"] = Field(
        "resources/raw", description="tables that the paper's figures are drawn from; results/raw: measured here, anew"
    )
    figure_8: Figure8 | None = Field(None, description="for results/raw/fig8_*.csv")
