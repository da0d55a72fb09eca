"""The fast network against the slow one: outputs to 1e-12, all gradients to 1e-10, float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from slow_network import SlowNetwork

from hamscale.config import Network
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.model.rotations import EdgeRotations
from helpers import hafnia, model_hamiltonian

CUTOFF = 3.6


def structure() -> Atoms:
    """Random edges, edges along the axes, one atom without any edge."""
    atoms = hafnia(3)[:5] + Atoms("Hf2O2", [(20, 0, 0), (20, 0, 2.9), (20, 2.1, 0), (20, 2.1, 2.6)]) + Atoms("O", [(0, 20, 0)])
    atoms.set_cell([40, 40, 40])
    atoms.pbc = True
    return atoms


@pytest.fixture(scope="module")
def reference(szv):
    return fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], CUTOFF)


def relative(a, b) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max()) if b.numel() and b.abs().max() else float((a - b).abs().sum())


SIZES = [
    {"lmax": 1, "layers": 2, "channels": 6, "hidden": 10, "values": 8, "feed_forward": 14},
    {"lmax": 2, "layers": 2, "channels": 16, "hidden": 8, "values": 6, "feed_forward": 12, "heads": 3},
    {"lmax": 3, "layers": 3, "channels": 8, "hidden": 8, "values": 10, "feed_forward": 18, "heads": 1},
    {"lmax": 4, "layers": 1, "channels": 16, "hidden": 16, "values": 16, "feed_forward": 64},
    {"lmax": 5, "layers": 2, "channels": 4, "hidden": 6, "values": 4, "feed_forward": 8, "attention": 3},
    {"lmax": 6, "layers": 2, "channels": 6, "hidden": 4, "values": 4, "feed_forward": 6, "radial": 9},
]


def fast_and_slow(reference, size, atoms, chunk=20):
    torch.manual_seed(3)
    network = build_network(Network(**size), reference).double()
    for parameter in network.parameters():  # biases and scales at their initial 0 and 1 would hide errors
        parameter.data += 0.1 * torch.randn_like(parameter)
    graph = structure_graph(atoms, reference.basis, CUTOFF)
    random, field, crystal_field = np.random.default_rng(2), reference.crystal_field, {}
    for z in np.unique(atoms.numbers).tolist():
        pair = field.coupling[z, z]
        crystal_field[z] = 1e-3 * random.normal(size=(len(graph.atoms_of(z)), pair.size))
        crystal_field[z][:, pair.zero_order] += field.centre[z]
    graph = replace(graph, crystal_field=crystal_field)
    return network, graph, graph_inputs(graph, reference, network.lmax, torch.float64, chunk)


def loss(outputs):
    generator = torch.Generator().manual_seed(0)
    values = [v for part in outputs for v in part.values()]
    return sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"lmax {s['lmax']}, {s['layers']} layers")
def test_outputs_and_gradients_are_those_of_the_slow_network(reference, size, recompute):
    network, graph, inputs = fast_and_slow(reference, size, structure())
    slow = SlowNetwork(network)(inputs, graph.edges.vectors)
    fast = network(inputs, recompute=recompute)
    for a, b in zip(fast, slow):
        assert a.keys() == b.keys()
        for key in a:
            assert relative(a[key], b[key]) < 1e-12
    names, parameters = zip(*network.named_parameters())
    ours = torch.autograd.grad(loss(fast), parameters)
    theirs = torch.autograd.grad(loss(slow), parameters, allow_unused=True)
    for name, a, b in zip(names, ours, theirs):
        assert b is not None, f"{name}: no gradient, a dead weight"
        assert b.abs().max() > 0, f"{name}: no gradient, a dead weight"
        assert relative(a, b) < 1e-9, name  # a gradient may be small beside the terms it is the sum of


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_threads_divide_the_chunks_and_change_nothing(reference, recompute):
    network, _, inputs = fast_and_slow(reference, SIZES[1], structure(), chunk=8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 50):  # more threads than chunks, too
            torch.set_num_threads(threads)
            outputs = network(inputs, recompute=recompute)
            gradients = torch.autograd.grad(loss(outputs), list(network.parameters()))
            results.append([v.detach() for part in outputs for v in part.values()] + list(gradients))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for a, *others in zip(*results):
        assert torch.equal(others[0], others[1])  # the same threads, the same bits
        assert all(relative(b, a) < 1e-12 for b in others)


@pytest.mark.parametrize("size", SIZES[:3], ids=lambda s: f"lmax {s['lmax']}, {s['layers']} layers")
def test_short_messages_change_little(reference, size):
    """bfloat16 holds 8 bits: outputs and gradients stay within a few per cent, and nothing else is shortened for good."""
    network, _, inputs = fast_and_slow(reference, size, structure())
    results = []
    for dtype in (None, torch.bfloat16, None):
        outputs = network.messages_in(dtype)(inputs)
        gradients = torch.autograd.grad(loss(outputs), list(network.parameters()))
        results.append([v.detach() for part in outputs for v in part.values()] + list(gradients))
    n = len(results[0]) - len(list(network.parameters()))
    for part in (slice(n), slice(n, None)):  # outputs, gradients
        full, short = (torch.cat([v.flatten() for v in r[part]]) for r in results[:2])
        assert 1e-4 < (short - full).norm() / full.norm() < 0.05
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2]))


def test_inputs_move_whole(reference):
    """To a device without numbers: what stays behind is found, and all shapes arrive."""
    _, _, inputs = fast_and_slow(reference, SIZES[0], structure())
    moved = inputs.to("meta")
    parts = [(moved, inputs), *((moved.pairs[k], p) for k, p in inputs.pairs.items())]
    parts += [(moved.atoms_of[k], a) for k, a in inputs.atoms_of.items()]
    for there, here in parts:
        for name, value in vars(here).items():
            if isinstance(value, torch.Tensor):
                assert getattr(there, name).device.type == "meta"
                assert getattr(there, name).shape == value.shape


def test_inference_gives_what_training_gives(reference):
    network, _, inputs = fast_and_slow(reference, SIZES[1], structure())
    trained = network(inputs)
    with torch.inference_mode():
        inferred = network(inputs)
    for a, b in zip(trained, inferred):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_gradient_with_respect_to_positions_is_that_of_differences_of_energies(reference):
    """At the poles too: some edges of the structure lie along z. Outputs are turned back to the global frame first."""
    network, graph, inputs = fast_and_slow(reference, SIZES[1], structure())
    onsite_weights = {s: torch.randn(network(inputs)[1][s].shape, dtype=torch.float64) for s in inputs.atoms_of}

    def energy(displacements):
        i, j = torch.from_numpy(graph.edges[:, 0]), torch.from_numpy(graph.edges[:, 1])
        vectors = torch.from_numpy(graph.edges.vectors) + displacements[j] - displacements[i]
        inputs.distances, inputs.rotations = vectors.norm(dim=1), EdgeRotations.apply(vectors, network.lmax)
        offsite, onsite = network(inputs)
        # the squares of offsite components do not change when a frame turns about its edge
        return sum(v.square().sum() for v in offsite.values()) + sum((onsite[s] * w).sum() for s, w in onsite_weights.items())

    displacements = torch.zeros(len(graph.atoms), 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(displacements), displacements)
    assert torch.isfinite(gradient).all()
    along_z = np.hypot(*graph.edges.vectors[:, :2].T) == 0
    assert along_z.sum() == 4
    rng, h = np.random.default_rng(0), 2e-6  # the attention has kinks, one of them 5e-6 away
    for atom in range(len(graph.atoms)):
        step = torch.zeros_like(displacements)
        step[atom] = torch.from_numpy(rng.normal(size=3))
        with torch.no_grad():
            numeric = (energy(h * step) - energy(-h * step)) / (2 * h)
        assert abs(numeric - (gradient * step).sum()) < 1e-7 * gradient.abs().max()
