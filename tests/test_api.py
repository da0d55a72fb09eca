"""The Python interface: what is asked of a model and of operators, against the functions behind it, sisl and ASE."""

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.spectrum.band_structure import BandStructure
from scipy.linalg import eigh

import hamscale
from hamscale import api
from hamscale.analysis.density import mulliken_charges
from hamscale.operators import Operators as Blocks
from hamscale.predict import predict
from hamscale.structures import k_grid, kpoint_counts
from hamscale.units import hartree_to_ev
from helpers import SZV, basis_of, hafnia, model_hamiltonian, silicon, written

MODEL = Path(__file__).parents[1] / "resources" / "models" / "hfo2"


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    operators = model_hamiltonian(silicon(), basis_of(Si=SZV))
    return hamscale.read_operators(written(tmp_path_factory.mktemp("api"), operators))


def test_a_model_predicts_what_the_command_predicts():
    model, atoms = hamscale.load_model(MODEL), hafnia(0)
    assert model.elements == ["O", "Hf"]
    assert repr(model) == f"Model(hfo2: O, Hf, cutoff {model.cutoff:g} A)"
    predicted = model.predict(atoms)
    assert isinstance(predicted, hamscale.Operators)
    assert isinstance(predicted, Blocks)
    assert np.array_equal(predicted.hamiltonian, predict(MODEL, atoms).operators().hamiltonian)


def test_eigenvalues_are_those_of_h_and_s_in_ev(crystal):
    kpoints = [[0.1, 0.2, 0.3], [0, 0, 0], [0.5, 0, 0]]
    expected = np.array([eigh(*crystal.at_k(k), eigvals_only=True) for k in kpoints])
    np.testing.assert_allclose(crystal.eigenvalues(kpoints), hartree_to_ev(expected), rtol=1e-10)
    np.testing.assert_allclose(crystal.eigenvalues(kpoints[1]), hartree_to_ev(expected[1]), rtol=1e-10)


def test_charges_are_those_of_a_grid_by_length_and_cancel(crystal):
    charges = crystal.charges(10.0)
    np.testing.assert_allclose(charges, mulliken_charges(crystal, *k_grid(kpoint_counts(crystal.atoms, (1, 1, 1), 10.0))))
    assert charges.sum() == pytest.approx(0, abs=1e-9)


def test_bands_are_an_object_of_ase(crystal):
    bands = crystal.bands(points=30)
    assert isinstance(bands, BandStructure)
    assert bands.energies.shape == (1, len(bands.path.kpts), 8)
    np.testing.assert_allclose(bands.energies[0], crystal.eigenvalues(bands.path.kpts), rtol=1e-10)
    assert bands.reference == pytest.approx(hartree_to_ev(crystal.levels().fermi_level))
    assert crystal.bands("GX", 10).path.path == "GX"
    with pytest.raises(ValueError, match="special points"):
        crystal.bands("GQ")


def test_a_density_of_states_holds_all_states(crystal):
    dos = crystal.dos(width=0.2)
    assert np.trapezoid(dos.get_weights(), dos.get_energies()) == pytest.approx(2 * crystal.n_orbitals, rel=1e-4)


def test_a_molecule_has_levels_and_no_bands():
    atoms = silicon()
    atoms.pbc = False
    molecule = api._with_methods(model_hamiltonian(atoms, basis_of(Si=SZV)))
    assert molecule.eigenvalues([0, 0, 0]).shape == (8,)
    with pytest.raises(ValueError, match="not periodic and has no bands"):
        molecule.bands()


def test_sisl_finds_the_same_eigenvalues(crystal):
    k = [0.1, 0.2, 0.3]
    np.testing.assert_allclose(crystal.to_sisl().eigh(k), crystal.eigenvalues(k), atol=1e-7)


def test_operators_are_written_and_read_again(crystal, tmp_path):
    crystal.write(tmp_path / "a.h5")
    assert np.array_equal(hamscale.read_operators(tmp_path / "a.h5").overlap, crystal.overlap)


def test_import_takes_what_is_asked_for_and_nothing_else():
    code = "import sys, hamscale; assert 'torch' not in sys.modules; hamscale.load_model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hamscale.nothing


def test_examples_of_the_page_on_python_are_right(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    failed, tried = doctest.testfile(str(Path("docs/python.md").absolute()), module_relative=False)
    assert (failed, tried > 8) == (0, True)
