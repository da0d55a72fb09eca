"""Predict and look at H and S from Python.

    import ase.io
    import hamscale

    model = hamscale.load_model("resources/models/hfo2")
    predicted = model.predict(ase.io.read("cell.extxyz"))
    predicted.bands().plot()
    predicted.dos().plot()

Energies are in eV here, as in ASE, and in the zero of the operators; fields of the operators themselves are in Hartree.
"""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.dft.kpoints import BandPath
from ase.spectrum.band_structure import BandStructure
from ase.spectrum.dosdata import GridDOSData
from numpy.typing import ArrayLike

from . import operators as blocks
from .analysis import density, greens, levels, spectra, transmission
from .config import Analysis
from .predict import predict
from .predict.model import TrainedModel
from .units import hartree_to_ev

if TYPE_CHECKING:
    import sisl

MARGIN = 5  # widths by which the energies of a density of states reach beyond the outermost levels
BINS = 5  # energies per width


class Operators(blocks.Operators):
    """H and S of a structure (operators.Operators) with what is commonly asked of them.

    operators = hamscale.read_operators("results/hfo2/predicted/hfo2/test-000.h5")
    operators.at_k([0, 0, 0])          # dense H(k), Hartree, and S(k)
    operators.eigenvalues([0, 0, 0])   # eV
    """

    def eigenvalues(self, kpoints: ArrayLike, overlap_threshold: float = 0.0) -> np.ndarray:
        """Compute the eigenvalues of H(k) c = e S(k) c in eV, ascending.

        Returns (n,) of one k-point (3,), in fractions of the reciprocal lattice, and (K, n) of several (K, 3); of two spins
        (2, n) or (2, K, n), spin up first. overlap_threshold: leaves out directions in which S is smaller
        (`analysis.spectra.eigenvalues`). Raises ValueError if S(k) is not positive definite.
        """
        k = np.asarray(kpoints, float)
        found = hartree_to_ev(spectra.eigenvalues(self, np.atleast_2d(k), overlap_threshold))
        shape = (*((2,) if self.spins == 2 else ()), *k.shape[:-1], -1)
        return found.reshape(shape)

    def levels(self, kgrid_length_angstrom: float = 20.0, temperature_kelvin: float = 300.0) -> levels.Levels:
        """Find the band edges or the Fermi level (Hartree) on the grid round(length / |a|) along each vector."""
        return spectra.find_levels(self, self._analysis(kgrid_length_angstrom, temperature_kelvin))

    def bands(self, path: str | None = None, points: int = 120) -> BandStructure:
        """Compute the bands along a path of special points, e.g. "GXWKG", about so many k-points in all.

        path: by default that of the lattice, in the plane of a slab and on the axis of a wire. Returns an
        `ase.spectrum.band_structure.BandStructure`: energies (spins, K, n) in eV, the reference is the Fermi level or the
        middle of the gap, and `.plot()` draws it. Raises ValueError for a structure that is not periodic, and if the lattice
        lacks a special point.
        """
        if not self.atoms.pbc.any():
            raise ValueError("the structure is not periodic and has no bands. Ask for eigenvalues([0, 0, 0]).")
        kpoints, _, _, _ = spectra.band_path(self.atoms, path, points)
        named = self.atoms.cell.bandpath(path, npoints=0, pbc=self.atoms.pbc)
        bandpath = BandPath(named.cell, kpoints, named.special_points, named.path)
        energies = hartree_to_ev(spectra.eigenvalues(self, kpoints)).reshape(self.spins, len(kpoints), -1)
        return BandStructure(bandpath, energies, hartree_to_ev(self.levels().fermi_level))

    def dos(self, width: float = 0.1, kgrid_length_angstrom: float = 20.0) -> GridDOSData:
        """Compute the density of states on a k-grid, levels as Gaussians of standard deviation `width` in eV.

        Returns an `ase.spectrum.dosdata.GridDOSData`: get_energies() in eV, get_weights() in states per eV and cell, both
        spins together; `.plot()` draws it. All eigenvalues are computed: for large structures see `hamscale dos`.
        """
        kpoints, weights, _ = spectra.analysis_grid(self, self._analysis(kgrid_length_angstrom))
        energies = hartree_to_ev(spectra.eigenvalues(self, kpoints))
        low, high = energies.min() - MARGIN * width, energies.max() + MARGIN * width
        grid = np.linspace(low, high, int(np.ceil((high - low) / width * BINS)) + 1)
        density = levels.density_of_states(energies, weights, grid, width)
        return GridDOSData(grid, density, {"label": self.atoms.get_chemical_formula()})

    def charges(self, kgrid_length_angstrom: float = 20.0, temperature_kelvin: float = 300.0) -> np.ndarray:
        """Compute the Mulliken charges of the atoms from the states on the grid round(length / |a|), (A,), in units of e.

        All states are computed, and their density matrix. Raises ValueError if the valence electrons of an element are not
        known, as in data of other codes.
        """
        kpoints, weights, _ = spectra.analysis_grid(self, self._analysis(kgrid_length_angstrom))
        return density.mulliken_charges(self, kpoints, weights, temperature_kelvin)

    def transmission(
        self,
        axis: str = "c",
        leads: tuple[int, int] | None = None,
        kgrid: tuple[int, int, int] | None = None,
        window: float = 2.0,
        points: int | None = None,
        temperature_kelvin: float = 300.0,
    ) -> transmission.Transmission:
        """Compute the transmission T(E) along an axis, at energies up to `window` in eV beyond the band edges.

        By default the cell repeats for ever, and T counts bands (`analysis.transmission`). leads: the structure is a device,
        whose leads repeat so many atoms at its left and its right end (`analysis.greens`). kgrid: by default round(40 A / |a|)
        across the axis and round(640 A / |a|) along it. Of the result, `.table()` is a data frame, T of one spin: the
        conductance is 2 e^2/h T; `.conductances()` has T at the band edges and between them. Raises ValueError if the
        structure is not periodic along the axis, or its ends do not repeat.
        """
        if leads:
            return greens.of_device(self, axis, leads, kgrid, window, points, temperature_kelvin)
        return transmission.of_bands(self, axis, kgrid, window, points, temperature_kelvin)

    def to_sisl(self) -> "sisl.Hamiltonian":
        """Return a sisl.Hamiltonian, non-orthogonal, H in eV, orbitals in our order with Siesta's signs.

        Raises ValueError if sisl is not installed.
        """
        from .export.siesta import hamiltonian
        from .export.stream import stored

        with tempfile.TemporaryDirectory() as folder:
            self.write(path := Path(folder) / "operators.h5")
            with stored(path) as opened:
                return hamiltonian(opened)

    def write(self, path: str | Path) -> None:
        """Write a file of schema `operators/2`, atomically (docs/files.md)."""
        blocks.write_operators(path, self)

    def _analysis(self, length: float, temperature: float = 300.0) -> Analysis:
        return Analysis(kgrid_length_angstrom=length, temperature_kelvin=temperature)


def _with_methods(found: blocks.Operators) -> Operators:
    return Operators(**{f.name: getattr(found, f.name) for f in fields(found)})


class Model:
    """Trained model: a mean of networks, and the reference that they were trained with.

    model = hamscale.load_model("resources/models/hfo2")
    """

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained

    @property
    def elements(self) -> list[str]:
        """Return the symbols of the elements that the model knows."""
        return [element.element for element in self.trained.reference.basis.values()]

    @property
    def cutoff(self) -> float:
        """Return the distance in Angstrom up to which the network adds to the reference."""
        return self.trained.reference.cutoff_angstrom

    def predict(
        self,
        atoms: Atoms,
        lifted: bool = True,
        overlap: blocks.Operators | None = None,
        self_consistent: bool | None = None,
    ) -> Operators:
        """Predict H and S of a structure, in memory (`predict.predict`, which also writes large ones and knows ranks).

        overlap: operators of the structure, for S, where the basis of the model has no radial functions.
        self_consistent: whether charges follow from the predicted states; by default if the model was trained for it.
        Raises ValueError if the structure has an element, or a kind of periodicity, on which the model was not trained.
        """
        found = predict(self.trained, atoms, lifted=lifted, overlap=overlap, self_consistent=self_consistent)
        return _with_methods(found.operators())

    def __repr__(self) -> str:
        return f"Model({self.trained.name}: {', '.join(self.elements)}, cutoff {self.cutoff:g} A)"


def load_model(directory: str | Path) -> Model:
    """Read the folder of a trained model. Raises ValueError (file, found, expected) if it is damaged or not one."""
    return Model(TrainedModel.load(directory))


def read_operators(path: str | Path) -> Operators:
    """Read H and S of a file, DFT's or predicted. Raises ValueError (file, found, expected) if it is damaged or not one."""
    return _with_methods(blocks.read_operators(path))
