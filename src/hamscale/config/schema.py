"""Define the files that a user writes: one YAML file per material, one per model, and the list of runs.

Every field with a dimension states its unit.
"""

import re
import typing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ..runs import Snapshot, members, snapshots

Split = Literal["train", "validation", "test", "predict"]
# of a material or a model: a part of paths, which must not lead out of their folders
NAME = "[A-Za-z0-9_]+"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
# what a material may name and so run; entry points of this group, of packages that are installed, are others
CALCULATORS = (
    "chgnet.model.dynamics.CHGNetCalculator",
    "ase.calculators.emt.EMT",
    "ase.calculators.lj.LennardJones",
    "ase.calculators.morse.MorsePotential",
)
CALCULATOR_PLUGINS = "hamscale.calculators"


class Section(BaseModel):
    """Part of a file.

    unsaid: fields that are left out of dumps where they have their default, so that hashes and parameters of rules of a file
    that does not use them are those of versions that lacked them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    unsaid: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields = type(self).model_fields
        default = {name: fields[name].get_default(call_default_factory=True) for name in self.unsaid}
        return {name: value for name, value in handler(self).items() if name not in default or value != default[name]}


# --------------------------------------------------------------------------------------------------------------- material


class Species(Section):
    """One element; its shells, orbitals and valence charge are read from CP2K's files."""

    basis: str = Field(description="name of the basis set in the basis file, e.g. SZV-MOLOPT-SR-GTH")
    potential: str = Field("GTH-PBE", description="name of the pseudopotential; without -qN the one that fits the basis")


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

    split: Split = Field(description="train, validation and test get DFT; predict does not")
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


class Smearing(Section):
    """Fractional occupation of levels near the Fermi level."""

    method: Literal["fermi_dirac"] = Field("fermi_dirac", description="distribution of the electrons")
    temperature_kelvin: PositiveFloat = Field(300.0, description="electronic temperature (K)")


class Spin(Section):
    """Spin-polarised (unrestricted) Kohn-Sham: one H for spin up and one for spin down."""

    magnetization: dict[str, float] = Field(
        default_factory=dict,
        description="moment of each atom of an element at the start (Bohr magnetons), e.g. Fe: 3; of elements left out: 0",
    )


class Dft(Section):
    """Settings of CP2K: Quickstep GPW, diagonalisation with Broyden mixing, spin-restricted unless `spin` is there.

    Molecules of two spins are mixed by DIIS.
    """

    unsaid = frozenset({"spin", "elpa_kernel"})

    functional: str = Field("PBE", description="exchange-correlation functional of CP2K")
    basis_file: str = Field("BASIS_MOLOPT", description="file of CP2K's data folder, or a path")
    potential_file: str = Field("GTH_POTENTIALS", description="file of CP2K's data folder, or a path")
    cutoff_ry: PositiveFloat = Field(400.0, description="plane-wave cutoff of the finest grid (Ry)")
    rel_cutoff_ry: PositiveFloat = Field(50.0, description="relative cutoff (Ry)")
    kpoints: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (1, 1, 1), description="Monkhorst-Pack grid; one along directions that are not periodic"
    )
    kpoint_length_angstrom: PositiveFloat | None = Field(
        None, description="instead of kpoints: round(this / |a|) along each cell vector, so that cells of all sizes agree (A)"
    )
    eps_default: PositiveFloat = Field(1e-10, description="EPS_DEFAULT: how far H and S reach (1)")
    eps_scf: PositiveFloat = Field(1e-7, description="convergence of the density matrix (1)")
    max_scf: PositiveInt = Field(100, description="steps before an SCF counts as failed")
    mixing_alpha: PositiveFloat = Field(0.4, description="fraction of the new density (1)")
    smearing: Smearing | None = Field(None, description="for small gaps and metals")
    spin: Spin | None = Field(None, description="spin-polarised runs, e.g. {magnetization: {Fe: 3}}; {} starts without moments")
    elpa_kernel: Literal["AUTO", "GENERIC"] = Field(
        "AUTO", description="ELPA_KERNEL of the diagonalisation; GENERIC where the default of a build is slow (docs/alps.md)"
    )
    csr_threshold: NonNegativeFloat = Field(
        1e-14, description="elements of H (Ha) and S (1) below this are not written; zero writes every zero too"
    )


class Graph(Section):
    """Edges of the network, and the reference that it starts from."""

    cutoff_angstrom: PositiveFloat | Literal["auto"] = Field(
        "auto", description="radius of the network's edges (A), or auto: the reach of H at auto_threshold_hartree"
    )
    auto_threshold_hartree: PositiveFloat = Field(
        1e-4, description="auto: edges reach to the last block with an element above (Ha)"
    )
    near_angstrom: PositiveFloat = Field(
        4.5, description="reference: neighbours of an atom further away act by their charges alone; the first shells (A)"
    )
    charges: dict[str, float] = Field(
        default_factory=dict,
        description="reference: formal charges of ions (e), e.g. Hf: 4, O: -2: carries further from those trained on; of "
        "all elements or of none; the training structures are to be neutral with them",
    )
    far: bool = Field(
        True,
        description="reference: potentials of charges and of the dipoles they induce, over all periodic images; only charges "
        "that leave the training structures neutral have one, so there is none in a crystal of one element",
    )
    crystal_field: bool = Field(
        True,
        description="reference: onsite blocks follow the neighbours of their atom; else they are the mean of their element",
    )
    two_centre: bool = Field(True, description="reference: offsite blocks have tables over the distance")


class Transmission(Section):
    """T(E) of DFT and of the prediction, smeared at the temperature of the analysis."""

    axis: Literal["a", "b", "c"] = Field(
        "c", description="cell vector along which the current flows; that of a device is its own"
    )
    kgrid: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None, description="grid of k; default: round(40 A / |a|) across the axis, round(640 A / |a|) along it"
    )
    window_ev: PositiveFloat = Field(2.0, description="energies reach so far beyond the band edges, or either side of E_F (eV)")
    points: PositiveInt | None = Field(None, ge=2, description="number of energies; default 1000, of a device 200")


class Analysis(Section):
    """Eigenvalues, bands and densities of states of DFT and of the prediction."""

    unsaid = frozenset({"transmission"})

    kgrid: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (2, 2, 2), description="Gamma-centred grid for eigenvalues and DOS"
    )
    kgrid_length_angstrom: PositiveFloat | None = Field(
        None, description="instead of kgrid: round(this / |a|) along each cell vector, so that cells of all sizes agree (A)"
    )
    temperature_kelvin: PositiveFloat = Field(
        300.0, description="temperature of the Fermi function that fills the bands of a metal (K)"
    )
    slab_angstrom: PositiveFloat = Field(
        5.5,
        description="thickness of the slices along the longest periodic cell vector whose mean potentials are compared (A)",
    )
    band_path: str | None = Field(None, description="special points of ASE, e.g. GXWK; the lattice's own path by default")
    band_points: PositiveInt | None = Field(
        None, description="k-points along the band path; default: 240, fewer for more than 125 orbitals, at least 60"
    )
    overlap_threshold: NonNegativeFloat = Field(
        0.0,
        lt=1,
        description="directions in which the overlap is smaller than this (1) are left out of predicted eigenvalues, bands and "
        "densities of states: against false states of a basis that is nearly singular; 0: none, 5e-3 is a value to try",
    )
    transmission: Transmission | None = Field(
        None, description="T(E), compared with DFT's; {} takes the defaults, of cells of a dozen atoms in seconds"
    )


class Material(Section):
    """Settings of a material: the content of config/materials/NAME.yaml."""

    description: str = Field("", description="what the material is, for people")
    extends: Name | None = Field(
        None,
        description="NAME of another material, whose structures, DFT and keys these are unless said here: other splits and "
        "counts, another graph or analysis; `set: null` leaves a set out",
    )
    species: dict[str, Species] = Field(
        default_factory=dict,
        description="element -> basis and potential; needed unless all sets have `operators`, whose basis is in their data",
    )
    dft: Dft = Field(Dft(), description="settings of CP2K")
    structures: Annotated[dict[str, StructureSet], Field(min_length=1, description="set name -> how to make it")]
    graph: Graph = Field(Graph(), description="edges and reference")
    analysis: Analysis = Field(Analysis(), description="eigenvalues, bands, densities of states")

    @model_validator(mode="after")
    def _splits(self) -> typing.Self:
        trajectories: dict[str, set[str]] = {}
        if not self.species and (lacking := [name for name, s in self.structures.items() if not s.operators]):
            raise ValueError(f"species are missing, expected those of structures.{', structures.'.join(lacking)}")
        for name, s in self.structures.items():
            if not re.fullmatch(NAME, name):
                raise ValueError(f"structures.{name}: the name of a set is letters, digits and _ only")
            if (s.multiplicity or 1) > 1 and not self.dft.spin:
                raise ValueError(f"structures.{name}.multiplicity is {s.multiplicity}, expected with dft.spin: {{}}")
            if s.file and not (
                s.rattle_angstrom or s.melt_quench
            ):  # a file that is displaced must hold one crystal: building.py
                trajectories.setdefault(s.file.path, set()).add(s.split)
            for run in s.runs() if s.dft else []:
                trajectories.setdefault(str(run.folder / run.project), set()).add(s.split)
            for member in s.imported() if s.operators else []:
                trajectories.setdefault(str(member), set()).add(s.split)
            if s.tile and s.tile.of not in self.identifiers():
                raise ValueError(f"structures.{name}.tile.of is {s.tile.of!r}, expected one of {', '.join(self.identifiers())}")
        for element in self.dft.spin.magnetization if self.dft.spin else ():
            if element not in self.species:
                raise ValueError(
                    f"dft.spin.magnetization has {element}, expected elements of species: {', '.join(self.species)}"
                )
        if self.graph.charges and self.species and set(self.graph.charges) != set(self.species):
            raise ValueError(
                f"graph.charges has {', '.join(sorted(self.graph.charges))}, expected one for each of "
                f"{', '.join(sorted(self.species))}, or none"
            )
        for path, splits in trajectories.items():
            if len(splits) > 1:
                raise ValueError(
                    f"{path} feeds the splits {', '.join(sorted(splits))}: frames of one trajectory are nearly the same "
                    "structure and must stay in one split. A crystal may feed several if these sets have rattle_angstrom."
                )
        return self

    def run(self, identifier: str) -> Snapshot | None:
        """Return the run that a structure is of; None if it is not of a set with `dft`."""
        s, number = self._place(identifier)
        return s.runs()[number] if s and s.dft else None

    def transport(self, identifier: str) -> Transport | None:
        """Return how current flows through a structure, with its grid of k; None if it is no device, or of no set."""
        s, _ = self._place(identifier)
        if s is None or s.transport is None:
            return None
        of_all = self.analysis.transmission
        return s.transport.model_copy(update={"kgrid": s.transport.kgrid or (of_all and of_all.kgrid)})

    def imported(self, identifier: str) -> Path | None:
        """Return the folder or file that a structure is imported from; None if it is not of a set with `operators`."""
        s, number = self._place(identifier)
        return s.imported()[number] if s and s.operators else None

    def _place(self, identifier: str) -> tuple[StructureSet | None, int]:
        """Return the set of a structure and its number in it; no set if it is none of this material."""
        if identifier not in self.identifiers():
            return None, 0
        name, number = identifier.rsplit("-", 1)
        return self.structures[name], int(number)

    def identifiers(self, *splits: Split) -> list[str]:
        """Return the identifiers of all structures, or of those of the given splits."""
        return [
            f"{name}-{number:03d}"
            for name, s in self.structures.items()
            if not splits or s.split in splits
            for number in range(s.count)
        ]

    def quick_sets(self) -> dict[str, StructureSet]:
        """Return the sets whose structures are built in milliseconds: not by melt and quench, nor of a tile."""
        return {name: s for name, s in self.structures.items() if s.built and not (s.melt_quench or s.tile)}


# ------------------------------------------------------------------------------------------------------------------ model


Even = Annotated[int, Field(gt=0, multiple_of=2)]


class Network(Section):
    """Size of the network (docs/method.md)."""

    lmax: PositiveInt | Literal["auto"] = Field(
        "auto", description="highest degree of the features; auto: what the basis couples to"
    )
    channels: Even = Field(16, description="channels per degree and order; half of them have natural parity, half unnatural")
    layers: PositiveInt = Field(2, description="message-passing layers")
    hidden: Even = Field(16, description="channels between the two SO(2) convolutions, of both parities")
    heads: PositiveInt = Field(2, description="attention heads")
    values: Even = Field(16, description="channels per head, of both parities")
    attention: PositiveInt = Field(16, description="scalars per head that make the attention weight")
    feed_forward: Even = Field(64, description="channels inside the feed-forward, of both parities")
    gaussians: PositiveInt = Field(
        64, ge=2, description="Gaussians of the distance, from 0 to the cutoff, as wide as they are apart: fewer are smoother"
    )
    radial: PositiveInt = Field(64, description="width of the radial network")
    crystal_field: bool = Field(True, description="the first layer is told the reference's crystal field at each atom")


class Training(Section):
    """How the weights are found (docs/method.md)."""

    networks: PositiveInt = Field(
        1, description="networks, alike but for their seeds (seed, seed + 1, ...), whose mean is the prediction"
    )
    steps: PositiveInt = Field(1000, description="optimiser steps of each network")
    batch: PositiveInt = Field(1, description="structures per step")
    learning_rate: PositiveFloat = Field(5e-3, description="rate of Adam after the warm-up")
    schedule: Literal["cosine", "plateau", "constant"] = Field(
        "cosine", description="how the rate goes on: falls to zero as a cosine, falls when validation stops to improve, stays"
    )
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    patience: PositiveInt = Field(10, description="plateau: validations without improvement before the rate drops")
    factor: PositiveFloat = Field(0.5, lt=1, description="plateau: what the rate is multiplied by")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="shrinks weights by rate x this each step, apart from the gradient (AdamW): against learning by heart"
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of a moving average of the weights, which is then what is validated and written; 0: none",
    )
    gradient_clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    l2_scale_mev: PositiveFloat = Field(10.0, description="loss = mean |d| + mean d^2 / this (meV)")
    onsite_weight: PositiveFloat = Field(0.1, description="weight of the onsite blocks' loss beside that of the offsite ones")
    eigenvalue_weight: NonNegativeFloat = Field(
        0.0, description="weight of the root mean square error of eigenvalues, to first order, beside the loss of blocks"
    )
    directions: PositiveInt = Field(32, description="random sums of states per structure that eigenvalue errors are taken of")
    validate_every: PositiveInt = Field(50, description="steps")
    seed: int = Field(0, description="of the first weights and of the order of the structures; network K has seed + K")
    precision: Literal["float32", "float64", "mixed"] = Field(
        "float32", description="mixed: bfloat16 messages, the rest float32"
    )
    recompute: bool = Field(False, description="recompute chunks of edges in the backward pass: less memory, more time")
    chunk: PositiveInt = Field(768, description="edges per chunk, rounded to whole destinations")
    cache_gib: NonNegativeFloat = Field(
        2.0,
        description="memory of each rank in which structures stay once they are read; others are read again whenever they are "
        "needed, while a step computes (GiB)",
    )
    tensorboard: bool = Field(False, description="write errors for TensorBoard, beside the checkpoint")


class Model(Section):
    """Settings of a model: the content of config/models/NAME.yaml."""

    description: str = Field("", description="what the model is, for people")
    network: Network = Field(Network(), description="size of the network")
    training: Training = Field(Training(), description="how the weights are found")

    def of_weights(self) -> dict:
        """Return the settings on which the weights of a network depend, in the types of JSON."""
        return self.model_dump(mode="json", exclude={"description": True, "training": {"networks", "cache_gib"}})


# -------------------------------------------------------------------------------------------------------------------- run


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
