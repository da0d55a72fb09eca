"""A prediction of two spins by ranks, each of which writes its rows of both matrices."""

import numpy as np
import torch

from hamscale.config import Network
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.tensors import build_network
from hamscale.operators import read_operators
from hamscale.predict import predict
from helpers import hafnia, magnetic, model_hamiltonian
from ranks import on_ranks


def on_each(world, model, path):
    predict(model, hafnia(7), world=world).write(path, world)


def test_ranks_write_what_one_writes(szv, tmp_path):
    reference = fit_reference([magnetic(model_hamiltonian(hafnia(), szv))], 5.0)
    write_reference(tmp_path / "fitted.h5", reference)
    torch.manual_seed(0)
    settings = Network(layers=2, channels=4, hidden=4, values=4, feed_forward=4)
    network = build_network(settings, reference)
    save_model(tmp_path / "m", [network.state_dict()], settings.model_dump(), tmp_path / "fitted.h5", {})
    on_ranks(2, on_each, tmp_path / "m", tmp_path / "two.h5")
    two, one = read_operators(tmp_path / "two.h5"), predict(tmp_path / "m", hafnia(7)).operators()
    assert one.spins == two.spins == 2
    np.testing.assert_allclose(two.hamiltonian, one.hamiltonian, atol=1e-7)
    assert two.attributes["metal"] in (0, 1)  # band edges were looked for
