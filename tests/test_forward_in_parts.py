import numpy as np
import pytest
import torch
from ase import Atoms

from hamscale.config import Network
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.predict.in_parts import forward_in_parts
from helpers import hafnia, model_hamiltonian

CUTOFF = 5.0


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("edges_at_once", [1, 300, 10**6])
def test_any_number_of_edges_at_once_gives_the_mean_of_what_one_pass_of_each_network_gives(szv, layers, edges_at_once):
    reference = fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], CUTOFF)
    torch.manual_seed(0)
    settings = Network(layers=layers, channels=4, hidden=4, values=4)
    networks = [build_network(settings, reference).double() for _ in range(2)]
    # one atom has no neighbour: a part without edges
    apart = Atoms("HfO", [(0, 0, 0), (6, 6, 6)], cell=[12] * 3, pbc=True)
    for atoms in (hafnia(5), apart):
        graph = structure_graph(atoms, reference.basis, CUTOFF)
        inputs = graph_inputs(graph, reference, networks[0].lmax, torch.float64)
        with torch.no_grad():
            expected = [network(inputs) for network in networks]
        offsite, onsite = forward_in_parts(networks, graph, reference, torch.float64, edges_at_once)
        elements = sorted(reference.basis)
        for a, b in expected[0][0]:
            mean = sum(of_network[0][a, b] for of_network in expected).numpy() / 2
            np.testing.assert_allclose(offsite[elements[a], elements[b]], mean, rtol=0, atol=1e-12)
        for s in expected[0][1]:
            each = [of_network[1][s].numpy() for of_network in expected]
            np.testing.assert_allclose(onsite[elements[s]], each, rtol=0, atol=1e-12)
