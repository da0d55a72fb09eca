"""Structures united into one graph give what they give one by one: losses and gradients, elements and edges they lack too."""

import pytest
import torch
from ase import Atoms

from hamscale.config import Network, Training
from hamscale.graph.codec import BlockCodec
from hamscale.graph.reference import fit_reference
from hamscale.inputs.tensors import build_network, differences_mev, example
from hamscale.inputs.union import unions, unite
from hamscale.parallel.env import World
from hamscale.train.loop import _loss
from helpers import WATER, basis_of, hafnia, model_hamiltonian, rattled

CHUNK = 60


@pytest.fixture(scope="module", params=["crystals", "molecules"])
def structures(request, szv):
    """(reference, examples): crystals of two sizes; molecules, among them one without oxygen and an atom without edges."""
    if request.param == "crystals":
        atoms = [hafnia(0), rattled(hafnia().repeat((2, 1, 1)), 3), hafnia(1)]
        basis, train = szv, atoms[:2]
    else:
        basis = basis_of(H="SZV-MOLOPT-GTH", O="SZV-MOLOPT-GTH")
        hydrogen = Atoms("H2", [(0, 0, 0), (0.1, 0, 0.74)])
        atoms = [hydrogen, rattled(WATER, 1), Atoms("O", [(0, 0, 0)]), rattled(WATER, 2), hydrogen]
        train = [rattled(WATER, seed) for seed in range(3)]
    reference = fit_reference([model_hamiltonian(a, basis) for a in train], 4.0)
    graphs = [BlockCodec(reference).encode(model_hamiltonian(a, basis)) for a in atoms]
    return reference, [example(graph, reference, 2, torch.float64, CHUNK) for graph in graphs]


def network_of(reference):
    torch.manual_seed(0)
    settings = Network(layers=2, channels=4, hidden=4, values=4, feed_forward=4, radial=4, lmax=2)
    return build_network(settings, reference).double()


def losses_and_gradients(network, united):
    network.zero_grad()
    losses = []
    for union in united:
        for structure, predicted in union.split(network(union.inputs, union.exchange)):
            losses.append(_loss(differences_mev(predicted, structure), structure, Training(), World()))
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_a_union_is_its_members_one_by_one(structures):
    reference, members = structures
    network = network_of(reference)
    expected, gradients = losses_and_gradients(network, [unite([member], CHUNK) for member in members])
    union = unite(members, 2 * CHUNK)
    assert len(union.inputs.spans) < sum(len(member.inputs.spans) for member in members)
    losses, found = losses_and_gradients(network, [union])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert found.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12 * max(1, largest))


def test_structures_are_united_while_they_are_small(structures):
    _, members = structures
    edges = [member.edges for member in members]
    assert [union.members for union in unions(members, sum(edges), CHUNK)] == [members]
    assert [union.members for union in unions(members, 0, CHUNK)] == [[member] for member in members]
    most = edges[0] + edges[1]
    united = [union.members for union in unions(members, most, CHUNK)]
    assert sum(united, []) == members
    assert united[0][:2] == members[:2]
    for first, after in zip(united, united[1:]):
        assert sum(member.edges for member in first) + after[0].edges > most
    assert all(sum(member.edges for member in of) <= most or len(of) == 1 for of in united)
