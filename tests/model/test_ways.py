"""Both ways of arranging the operations on chunks; the number of operations; and tensors that are made on another device."""

from dataclasses import fields, replace

import pytest
import torch
from test_slow_network import CUTOFF, SIZES, fast_and_slow, loss, relative, structure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hamscale.config import Network
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.model.chunks import Way
from hamscale.model.network import Inputs
from hamscale.model.operations import Operations
from hamscale.model.rotations import EdgeRotations
from helpers import hafnia, model_hamiltonian

ALL = 10**9


@pytest.fixture(scope="module")
def reference(szv):
    return fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], CUTOFF)


@pytest.mark.parametrize(("size", "recompute"), [*((size, False) for size in SIZES), (SIZES[1], True)])
def test_both_ways_give_the_same(reference, size, recompute):
    """Outputs, loss and all gradients, of the positions too, in one chunk and in several."""
    network, graph, inputs = fast_and_slow(reference, size, structure(), chunk=3)
    results, chunks = [], []
    for way, edges in ((Way.CACHED, 0), (Way.BATCHED, ALL), (Way.BATCHED, 8)):
        arranged = inputs.arranged(way, edges)
        chunks.append(len(arranged.spans))
        vectors = torch.from_numpy(graph.edges.vectors).requires_grad_()
        arranged = replace(arranged, distances=vectors.norm(dim=1), rotations=EdgeRotations.apply(vectors, network.lmax))
        outputs = network(arranged, recompute=recompute)
        value = loss(outputs)
        gradients = torch.autograd.grad(value, [*network.parameters(), vectors])
        results.append([v.detach() for part in outputs for v in part.values()] + [value.detach(), *gradients])
    assert chunks[0] > chunks[2] > chunks[1] == 1
    n = len(results[0]) - len(gradients)
    assert all(values.abs().max() > 0 for values in results[0])
    for others in results[1:]:
        assert max(relative(a, b) for a, b in zip(others[:n], results[0][:n])) < 1e-12
        largest = max(float(g.abs().max()) for g in results[0][n:])
        assert max(float((a - b).abs().max()) for a, b in zip(others[n:], results[0][n:])) < 1e-12 * largest


@pytest.mark.parametrize("size", SIZES[:2], ids=lambda s: f"lmax {s['lmax']}, {s['layers']} layers")
def test_both_ways_give_the_same_with_short_messages(reference, size):
    """Sums of bfloat16 are rounded in another order: the difference is small beside that of short messages themselves."""
    network, _, inputs = fast_and_slow(reference, size, structure())
    network.messages_in(torch.bfloat16)
    results = []
    for way in Way:
        outputs = network(inputs.arranged(way, ALL))
        gradients = torch.autograd.grad(loss(outputs), list(network.parameters()))
        results.append(torch.cat([t.detach().flatten() for t in (*outputs[0].values(), *outputs[1].values(), *gradients)]))
    assert (results[0] - results[1]).norm() < 0.01 * results[0].norm()


def operations(network, inputs: Inputs, backward: bool) -> int:
    network.zero_grad(set_to_none=True)
    with Operations() as counted, torch.set_grad_enabled(backward):
        outputs = [v for part in network(inputs) for v in part.values()]
        if backward:
            torch.autograd.backward(outputs, outputs)
    return len(counted)


def test_a_pass_takes_few_operations_and_no_more_for_more_atoms(szv):
    reference = fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], 4.0)
    torch.manual_seed(0)
    # the number of operations does not depend on the number of channels, and few take less time
    network = build_network(Network(layers=2, lmax=4, channels=2, hidden=2, values=2, feed_forward=4), reference)
    counts = {}
    for atoms in (hafnia(0).repeat((2, 2, 1)), hafnia(0).repeat((6, 6, 3))):
        graph = structure_graph(atoms, reference.basis, reference.cutoff_angstrom)
        inputs = graph_inputs(graph, reference, network.lmax, torch.float32).arranged(Way.BATCHED, ALL)
        counts[len(atoms)] = operations(network, inputs, False), operations(network, inputs, True)
    assert counts[12] == counts[324]
    forward, both = counts[12]
    assert forward <= 450
    assert both <= 1400


class OnlyOn(TorchDispatchMode):
    """Context in which an operation with a tensor on another device is an error."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != self.device:
                raise RuntimeError(f"{func}: a tensor on {tensor.device}")
        return result


def gradients(network, inputs: Inputs) -> list[Tensor]:
    """Gradients of the weights, and of the geometry."""
    outputs = [v for part in network(inputs) for v in part.values()]
    return list(torch.autograd.grad(outputs, [*network.parameters(), inputs.distances, inputs.rotations], outputs))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float64", "bfloat16 messages"])
def test_a_pass_makes_all_its_tensors_on_the_device_of_its_inputs(reference, dtype):
    """The device has no numbers: a number that the host reads, for which it would wait for a GPU, is an error as well."""
    network, _, inputs = fast_and_slow(reference, SIZES[1], structure())
    inputs.distances.requires_grad_()
    inputs.rotations.requires_grad_()
    network, moved = network.messages_in(dtype).to("meta"), inputs.to("meta").arranged(Way.BATCHED, ALL)
    with OnlyOn("meta"):
        assert all(g.device.type == "meta" for g in gradients(network, moved))
        for name in (f.name for f in fields(Inputs)):  # a tensor elsewhere is found, whichever it is
            if isinstance(getattr(moved, name), Tensor) and name != "source":  # which `ends` has as well
                with pytest.raises(RuntimeError, match="cpu"):
                    gradients(network, replace(moved, **{name: getattr(inputs, name)}))


def test_operations_count_bytes_and_products():
    """By hand: 8 bytes a number; a view costs nothing, a gather the rows that it takes, and an expanded tensor counts once."""
    a, b = torch.ones(3, 4, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64)
    index, out = torch.tensor([0, 2]), torch.empty(3, 5, dtype=torch.float64)
    with Operations() as counted:
        torch.mm(a, b, out=out)
        a.T.mul_(2)
        a.index_select(0, index)
        a.add(torch.ones(1, 1, dtype=torch.float64).expand(3, 4))
        a.view(12)
        torch.empty(3)
    found = [(o.name, o.kind, o.bytes, o.flop) for o in counted.counted if o.name != "ones"]
    assert found == [
        ("mm", "product", 8 * (12 + 20 + 15), 2 * 3 * 4 * 5),
        ("mul", "elementwise", 8 * (12 + 12), 0),
        ("index_select", "gather", 8 * (8 + 2 + 8), 0),
        ("add", "elementwise", 8 * (12 + 1 + 12), 0),
    ]
