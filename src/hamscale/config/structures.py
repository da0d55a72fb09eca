"""Define the sets of structures of a material: where they come from, and how they are disordered."""

import typing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ..runs import Snapshot, members, snapshots
from .section import Section

Split = Literal["train", "validation", "test", "teach", "predict"]
# what a material may name and so run; entry points of this group, of packages that are installed, are others
CALCULATORS = (
    "chgnet.model.dynamics.CHGNetCalculator",
    "ase.calculators.emt.EMT",
    "ase.calculators.lj.LennardJones",
    "ase.calculators.morse.MorsePotential",
)
CALCULATOR_PLUGINS = "hamscale.calculators"


class File(Section):
    """Structures of a file."""

    path: str = Field(
        description="any file ASE reads; several frames become several structures of this one set; several splits may share a "
        "crystal, a file of one frame, if each displaces it by rattle_angstrom or melt_quench"
    )


class Builder(Section):
    """A structure that ASE builds."""

    name: Literal["bulk", "molecule", "surface", "fcc100", "fcc111", "graphene", "nanotube", "mx2"] = Field(
        description="a function of ase.build"
    )
    arguments: dict = Field(default_factory=dict, description="its arguments, in ASE's units (Angstrom)")


class Spacegroup(Section):
    """A crystal by its symmetry."""

    spacegroup: int = Field(ge=1, le=230, description="number in the International Tables")
    cellpar: tuple[float, float, float, float, float, float] = Field(
        description="a, b, c (Angstrom), alpha, beta, gamma (degrees)"
    )
    basis: list[tuple[str, float, float, float]] = Field(
        description="element and fractional coordinates of each inequivalent atom"
    )


class Tile(Section):
    """Copies of another structure, as many as `repeat` of the set says."""

    of: str = Field(description="identifier of another structure of this material, e.g. test-000")


class MeltQuench(Section):
    """Amorphous cells: Langevin dynamics at constant volume, cooled linearly, then relaxed.

    The result is deterministic on one machine; the structure file is the record.
    """

    calculator: str = Field(
        CALCULATORS[0],
        description=f"an ASE calculator: {', '.join(CALCULATORS)}, or the name of an entry point of the group "
        f"{CALCULATOR_PLUGINS} of an installed package; CHGNet's weights are in its wheel",
    )
    arguments: dict = Field(default_factory=dict, description="arguments of the calculator")
    density_g_cm3: PositiveFloat | None = Field(None, description="the cell is scaled to this density first (g/cm^3)")
    melt_kelvin: PositiveFloat = Field(4000.0, description="temperature of the melt (K)")
    melt_steps: PositiveInt = Field(400, description="steps at that temperature, from a random packing")
    quench_kelvin: PositiveFloat = Field(300.0, description="temperature at the end of the quench (K)")
    quench_steps: PositiveInt = Field(600, description="steps of linear cooling")
    relax_steps: NonNegativeInt = Field(30, description="steps of relaxation of the positions at the end")
    timestep_fs: PositiveFloat = Field(2.0, description="time step (fs)")
    friction_per_fs: PositiveFloat = Field(0.01, description="friction of the Langevin thermostat (1/fs)")

    @field_validator("calculator")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CALCULATORS and name not in entry_points(group=CALCULATOR_PLUGINS).names:
            raise ValueError(
                f"expected one of {', '.join(CALCULATORS)}, or the name of an entry point of the group {CALCULATOR_PLUGINS} of "
                f"a package that is installed, found {name!r}"
            )
        return name


SOURCES = ("file", "dft", "operators", "builder", "spacegroup", "tile")


class Transport(Section):
    """An open device: which way the current flows, and what its leads repeat."""

    unsaid = frozenset({"kgrid", "undisturbed"})

    axis: Literal["a", "b", "c"] = Field("c", description="cell vector along which the current flows")
    leads: tuple[PositiveInt, PositiveInt] = Field(
        description="atoms of the block at the left and at the right end that a lead repeats for ever; it couples with the "
        "next such block alone, and its image must be at the other end of the cell or beside it"
    )
    kgrid: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None, description="grid of k, one along the axis; default: that of analysis.transmission"
    )
    undisturbed: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="atoms at the left and the right end that rattle_angstrom and melt_quench leave where they are; default: "
        "twice those of the leads, so that a lead and what it couples with are as the source has them",
    )

    @model_validator(mode="after")
    def _around_leads(self) -> typing.Self:
        if self.undisturbed and min(a - b for a, b in zip(self.undisturbed, self.leads)) < 0:
            raise ValueError(
                f"undisturbed is {list(self.undisturbed)}, expected as many atoms as the leads {list(self.leads)} have"
            )
        return self


class StructureSet(Section):
    """Structures of one split, `count` of them, named SET-000, SET-001, ..., from exactly one source."""

    unsaid = frozenset({"dft", "operators", "open", "vacuum_angstrom", "charge", "multiplicity", "transport"})

    split: Split = Field(
        description="train, validation and test get DFT; teach gets H with self-consistent charges from prediction.teacher and "
        "is learnt too; predict gets neither"
    )
    file: File | None = Field(None, description="source: structures of a file")
    dft: str | None = Field(
        None,
        description="source: runs of CP2K that are there: a folder, with those below it, or a pattern, e.g. runs/md_*; "
        "every step that wrote H and S is a structure, and `count` is their number unless it is given",
    )
    operators: str | None = Field(
        None,
        description="source: H and S of other codes that are there: a folder of a DeepH data set, with those below it, files "
        "of H and S, or a pattern, e.g. dataset/*; `count` is their number unless it is given; no species are needed",
    )
    builder: Builder | None = Field(None, description="source: a structure that ASE builds")
    spacegroup: Spacegroup | None = Field(None, description="source: a crystal by its symmetry")
    tile: Tile | None = Field(None, description="source: another structure, which `repeat` tiles")
    repeat: tuple[PositiveInt, PositiveInt, PositiveInt] = Field((1, 1, 1), description="tiling along a, b, c")
    decorate: dict[str, dict[str, PositiveInt]] = Field(
        default_factory=dict,
        description="sites of a symbol -> shares of the symbols that take them at random, e.g. Ge: {Ge: 1, Sb: 2, vacancy: 1}",
    )
    melt_quench: MeltQuench | None = Field(None, description="make it amorphous")
    box_angstrom: PositiveFloat | None = Field(None, description="put a molecule, not periodic, into a cube of this edge (A)")
    open: list[Literal["a", "b", "c"]] = Field(
        default_factory=list,
        max_length=2,
        description="directions that are not periodic, besides those that the source leaves open: [c] makes a slab, [b, c] a "
        "wire; repeat comes before it",
    )
    vacuum_angstrom: float = Field(
        12.0,
        ge=10,
        description="of a slab or a wire: an open cell vector is twice as long as the atoms reach along it, plus this (A)",
    )
    charge: int = Field(0, description="charge of each structure (e); a periodic one gets a uniform background against it")
    multiplicity: PositiveInt | None = Field(
        None, description="2S+1 of each structure; default: what dft.spin.magnetization gives, else 1 or 2"
    )
    count: PositiveInt = Field(1, description="number of structures")
    rattle_angstrom: NonNegativeFloat = Field(0.0, description="standard deviation of Gaussian displacements (A)")
    strain: NonNegativeFloat = Field(0.0, le=0.3, description="standard deviation of the six components of random strain (1)")
    seed: int = Field(0, description="with the set's name and the structure's number: the same numbers on every machine")
    transport: Transport | None = Field(
        None,
        description="the structures are open devices, whose T(E) is compared with DFT's; rattle_angstrom and melt_quench then "
        "disturb the inner atoms alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _count_runs(cls, content: object) -> object:
        for source, listed in (("dft", snapshots), ("operators", members)):
            if isinstance(content, dict) and isinstance(content.get(source), str) and "count" not in content:
                return content | {"count": len(listed(content[source]))}
        return content

    @model_validator(mode="after")
    def _one_source(self) -> typing.Self:
        sources = [name for name in SOURCES if getattr(self, name)]
        if len(sources) != 1:
            raise ValueError(f"has sources {sources}, expected exactly one of {', '.join(SOURCES)}")
        if self.box_angstrom and self.open:
            raise ValueError("has box_angstrom, for a molecule, and open, for a slab or a wire: expected at most one of them")
        for source in ("dft", "operators"):
            changes = sorted(self.model_fields_set - {source, "split", "count", "transport"})
            if getattr(self, source) and changes:
                raise ValueError(
                    f"has {source} and {', '.join(changes)}, expected split, count and transport alone beside {source}: "
                    "H and S are there"
                )
        return self

    @property
    def built(self) -> bool:
        """Tell whether structures are made here, and not taken from H and S that are there."""
        return not (self.dft or self.operators)

    def imported(self) -> list[Path]:
        """Return the folders and files of a set with `operators`, those of its structures first.

        Raises ValueError if there are fewer than structures.
        """
        found = members(self.operators or "")
        self._count_within(f"{self.operators}: {len(found)} structures", len(found))
        return found[: self.count]

    def runs(self) -> list[Snapshot]:
        """Return the runs of a set with `dft`, those of its structures first.

        Raises ValueError if there are fewer than structures.
        """
        found = snapshots(self.dft or "")
        self._count_within(f"{self.dft}: {len(found)} structures with H and S", len(found))
        return found[: self.count]

    def _count_within(self, told: str, number: int) -> None:
        if number < self.count:
            raise ValueError(f"{told}, but count is {self.count}. Lower it.")
