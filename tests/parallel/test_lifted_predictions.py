"""Predictions whose false states are lifted: in memory, in a file, by ranks, and left as they are where asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms

from hamscale.cli import main
from hamscale.config import Network
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.tensors import build_network
from hamscale.operators import read_operators
from hamscale.predict import predict, prediction
from hamscale.structures import write_structure_file
from helpers import DZVP, basis_of, model_hamiltonian
from ranks import on_ranks

ATOMS = Atoms("Ga2", [(0.1, 0, 0), (1.2, 1.9, 1.3)], cell=[5.5, 5.6, 5.7], pbc=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with random weights of a basis whose S nearly misses directions, the floor put where it has work."""
    root = tmp_path_factory.mktemp("model")
    reference = fit_reference([model_hamiltonian(ATOMS, basis_of(Ga=DZVP))], 4.0)
    assert np.isfinite(reference.floor_hartree)
    write_reference(root / "fitted.h5", replace(reference, floor_hartree=reference.floor_hartree + 0.3))
    torch.manual_seed(0)
    settings = Network(layers=1, channels=4, hidden=4, values=4, feed_forward=4, lmax=2)
    network = build_network(settings, reference)
    save_model(root / "m", [network.state_dict()], settings.model_dump(), root / "fitted.h5", {})
    return root / "m"


def test_the_file_is_what_is_computed_in_memory(model, tmp_path):
    lifted, plain = (predict(model, ATOMS, lifted=lifted) for lifted in (True, False))
    lifted.write(tmp_path / "lifted.h5")
    plain.write(tmp_path / "plain.h5")
    found, left = (read_operators(tmp_path / f"{name}.h5") for name in ("lifted", "plain"))
    np.testing.assert_array_equal(found.hamiltonian, lifted.operators().hamiltonian)
    np.testing.assert_array_equal(left.hamiltonian, plain.operators().hamiltonian)
    assert found.attributes["lifted_states"] > 0
    change = np.abs(found.hamiltonian - left.hamiltonian).mean()
    assert found.attributes["lifted_mean_change_mev"] == pytest.approx(27211.386 * change, rel=1e-6)
    assert "lifted_states" not in left.attributes
    assert found.attributes["suspect_states"] >= 0  # somebody has looked


def test_the_reference_alone_is_left_as_it_is(model):
    assert "lifted_states" not in predict(model, ATOMS, reference_only=True).operators().attributes


def on_each(world, model, path):
    predict(model, ATOMS, world=world).write(path, world)


def test_ranks_write_one_file_lifted_as_by_one(model, tmp_path):
    on_ranks(2, on_each, model, tmp_path / "two.h5")
    two, one = read_operators(tmp_path / "two.h5"), predict(model, ATOMS).operators()
    np.testing.assert_allclose(two.hamiltonian, one.hamiltonian, atol=1e-7)
    assert two.attributes["lifted_states"] == pytest.approx(one.attributes["lifted_states"], rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["two.h5"]


def test_the_command_can_leave_it_out(model, tmp_path):
    write_structure_file(tmp_path / "ga.extxyz", ATOMS)
    arguments = ["predict", str(model), str(tmp_path / "ga.extxyz"), "--out", str(tmp_path / "h.h5")]
    assert main([*arguments, "--not-lifted"]) == 0
    assert "lifted_states" not in read_operators(tmp_path / "h.h5").attributes
    assert main(arguments) == 0
    assert read_operators(tmp_path / "h.h5").attributes["lifted_states"] > 0


def test_large_structures_are_not_lifted_and_told_of(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "LARGEST_DENSE", 10)
    with pytest.warns(UserWarning, match="50 orbitals: states along directions that S nearly misses are lifted"):
        predict(model, ATOMS).write(tmp_path / "h.h5")
    assert "lifted_states" not in read_operators(tmp_path / "h.h5").attributes
