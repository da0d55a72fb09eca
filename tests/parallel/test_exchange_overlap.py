"""Work between the halves of an exchange: results are those of one whole exchange after the other, over undivided edges."""

import numpy as np
import pytest
import torch

from hamscale.config import Network
from hamscale.graph.codec import BlockCodec
from hamscale.graph.reference import fit_reference
from hamscale.inputs.ranks import rank_part
from hamscale.inputs.tensors import build_network, graph_inputs, piece_inputs
from hamscale.model.chunks import Way
from hamscale.model.readout import hermitian_mean
from hamscale.parallel.env import World
from helpers import hafnia, model_hamiltonian, rattled
from ranks import on_ranks

SETTINGS = Network(lmax=3, layers=3, channels=4, hidden=4, values=4, feed_forward=8, radial=8)


def in_turn(network, part, reference, inputs):
    """Edges in the order of the graph; nothing is done while features travel."""
    whole = piece_inputs(part.graph, reference, 3, torch.float64, part.halo.ghosts, 100)
    x = network.embed(whole.species)
    edges = network.first_edges(whole, x)
    for layer in range(SETTINGS.layers):
        x = part.exchange(network.next_nodes(layer, whole, x, edges, True))
        edges = network.next_edges(layer, whole, x, edges, True)
    raw = dict(zip(whole.pairs, edges))
    theirs = part.exchange.post_edges(raw)()
    known = {pair: torch.cat([raw[pair], *([theirs[pair]] if pair in theirs else [])]) for pair in raw}
    offsite = {
        (s_i, s_j): hermitian_mean(raw[s_i, s_j], known[s_j, s_i][p.flipped], p.adjoint, p.sign)
        for (s_i, s_j), p in inputs.pairs.items()
    }
    return offsite, network.read_onsite(whole, x[: whole.atoms])


def both(world: World, graph, reference, way: Way, recompute: bool):
    """Outputs and gradients of this rank, with work between the halves and in turn, and the share of edges without ghosts."""
    part, results = rank_part(graph, reference, world, world.size), []
    inputs = graph_inputs(part.graph, reference, 3, torch.float64, 100, part.halo).arranged(way, 200)
    for run in (lambda n: n(inputs, part.exchange, recompute), lambda n: in_turn(n, part, reference, inputs)):
        torch.manual_seed(1)
        network = build_network(SETTINGS, reference).double()
        outputs = [v for values in run(network) for v in values.values()]
        torch.manual_seed(world.rank)
        sum((v * torch.randn(v.shape, dtype=v.dtype)).sum() for v in outputs).mul(1e3).backward()
        outputs = torch.cat([v.detach().flatten() for v in outputs])
        results.append((outputs.numpy(), torch.cat([p.grad.flatten() for p in network.parameters()]).numpy()))
    own, others = inputs.parts
    assert (own.source < inputs.atoms).all()
    assert (others.source >= inputs.atoms).all()
    return *results, len(own.source) / len(part.graph.edges)


@pytest.mark.parametrize(("ranks", "way", "recompute"), [(2, Way.BATCHED, True), (4, Way.CACHED, False)])
def test_work_between_the_halves_of_an_exchange_changes_nothing(szv, ranks, way, recompute):
    reference = fit_reference([model_hamiltonian(hafnia(s), szv) for s in range(2)], 5.0)
    graph = BlockCodec(reference).encode(model_hamiltonian(rattled(hafnia().repeat((2, 2, 2)), 3), szv))
    for (outputs, gradients), (expected, expected_gradients), share in on_ranks(ranks, both, graph, reference, way, recompute):
        assert 0.05 < share < 0.95
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        np.testing.assert_allclose(gradients, expected_gradients, rtol=0, atol=1e-12 * np.abs(expected_gradients).max())
