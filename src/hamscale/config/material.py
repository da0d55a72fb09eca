"""Define a material, config/materials/NAME.yaml: its basis, its DFT, the graph and the analysis of its structures."""

import re
import typing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ..runs import Snapshot
from .section import NAME, Name, Section
from .structures import Split, StructureSet, Transport


class Species(Section):
    """One element; its shells, orbitals and valence charge are read from CP2K's files."""

    basis: str = Field(description="name of the basis set in the basis file, e.g. SZV-MOLOPT-SR-GTH")
    potential: str = Field("GTH-PBE", description="name of the pseudopotential; without -qN the one that fits the basis")


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


class Prediction(Section):
    """How H is predicted."""

    self_consistent: bool = Field(
        False,
        description="potentials follow from the charges of the predicted states, iterated; reference and networks learn the "
        "rest. For ionic solids whose charges differ from those trained on: other phases, larger or amorphous cells",
    )
    teacher: str | None = Field(
        None,
        description="folder of a model, e.g. results/hfo2/models/hfo2, whose self-consistent predictions of the sets with "
        "split teach are learnt beside DFT: so that one pass has what the loop finds",
    )

    @model_validator(mode="after")
    def _of_charges(self) -> typing.Self:
        if self.teacher and not self.self_consistent:
            raise ValueError(f"teacher is {self.teacher}, expected with self_consistent: true")
        return self


class Material(Section):
    """Settings of a material: the content of config/materials/NAME.yaml."""

    unsaid = frozenset({"prediction"})

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
    prediction: Prediction = Field(Prediction(), description="charges that are self-consistent")
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
        taught = [name for name, s in self.structures.items() if s.split == "teach"]
        if taught and not self.prediction.teacher:
            raise ValueError(f"structures.{taught[0]} has split teach, expected with prediction.teacher, whose H is learnt")
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
