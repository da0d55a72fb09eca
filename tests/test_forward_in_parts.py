import numpy as np
import pytest
import torch
from ase import Atoms

from conftest import hafnia, model_hamiltonian
from hamscale.config import Network
from hamscale.graph.dataset import structure_graph
from hamscale.graph.reference import fit_reference
from hamscale.stream import forward_in_parts
from hamscale.train.tensors import build_network, graph_inputs

CUTOFF = 5.0


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("edges_at_once", [1, 300, 10**6])
def test_any_number_of_edges_at_once_gives_what_one_pass_gives(szv, layers, edges_at_once):
    reference = fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], CUTOFF)
    torch.manual_seed(0)
    network = build_network(Network(layers=layers, channels=4, hidden=4, values=4), reference).double()
    # one atom has no neighbour: a part without edges
    apart = Atoms("HfO", [(0, 0, 0), (20, 20, 20)], cell=[40] * 3, pbc=True)
    for atoms in (hafnia(5), apart):
        graph = structure_graph(atoms, reference.basis, CUTOFF)
        with torch.no_grad():
            expected = network(graph_inputs(graph, reference, network.lmax, torch.float64))
        offsite, onsite = forward_in_parts(network, graph, reference, torch.float64, edges_at_once)
        elements = sorted(reference.basis)
        for (a, b), values in expected[0].items():
            np.testing.assert_allclose(offsite[elements[a], elements[b]], values.numpy(), rtol=0, atol=1e-12)
        for s, values in expected[1].items():
            np.testing.assert_allclose(onsite[elements[s]], values.numpy(), rtol=0, atol=1e-12)
