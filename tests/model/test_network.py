"""Symmetries of the network, to rounding: rotation, reflection, translation, permutation, exchange of the ends of an edge."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms

from hamscale.angular import rotation_matrix
from hamscale.config import Network
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference
from hamscale.inputs.tensors import build_network, graph_inputs
from helpers import DZVP, basis_of, hafnia, model_hamiltonian, rotated

CUTOFF = 5.0
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4}


def _axes(seed: int) -> Atoms:
    """Atoms whose edges lie along +-x, +-y and +-z: where frames are degenerate."""
    return Atoms("HfO2Hf", [(0, 0, 0), (2.1, 0, 0), (0, 2.1, 0), (0, 0, 2.9)], cell=[6.3, 6.1, 6.5], pbc=True)


STRUCTURES = {"random": hafnia, "degenerate edges": _axes}


@pytest.fixture(scope="module")
def reference(szv):
    reference = fit_reference(
        [model_hamiltonian(hafnia(seed), szv) for seed in range(2)] + [model_hamiltonian(_axes(0), szv)], CUTOFF
    )
    # the model Hamiltonian's crystal field has L = 0 alone: here all degrees
    random = np.random.default_rng(0)
    for z, tables in reference.crystal_field.tables.items():
        for table, parities in zip(tables[1:], list(reference.coupling[z, z].parities.values())[1:], strict=True):
            natural = np.array(parities) == 0  # as a fit has it, up to rounding
            table[:] = 1e-3 * random.normal(size=table.shape) * natural
    return reference


@pytest.fixture(scope="module", params=[1, 2], ids=["1 layer", "2 layers"])
def network(request, reference):
    torch.manual_seed(0)
    return build_network(Network(layers=request.param, channels=8, hidden=8, values=8), reference)


def hamiltonian(network, reference, atoms, dtype, **options):
    """Predicted operators."""
    graph = structure_graph(atoms, reference.basis, CUTOFF)
    with torch.no_grad():
        offsite, onsite = network.to(dtype)(graph_inputs(graph, reference, network.lmax, dtype, **options))
    elements = sorted(reference.basis)
    return (
        BlockCodec(reference)
        .decode(
            graph,
            {(elements[i], elements[j]): v.double().numpy() for (i, j), v in offsite.items()},
            {elements[s]: v.double().numpy() for s, v in onsite.items()},
        )
        .operators()
    )


def scale_of(operators):
    return np.abs(operators.hamiltonian).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES.keys())
@pytest.mark.parametrize("inversion", [1, -1], ids=["turned", "turned and inverted"])
def test_hamiltonian_turns_with_the_structure(network, reference, rotation, inversion, make, dtype):
    """Rotations and, with an inversion, every reflection; orbitals of degree l are multiplied by (-1)^l by an inversion."""
    atoms = make(7)
    straight, turned = (hamiltonian(network, reference, a, dtype) for a in (atoms, rotated(atoms, inversion * rotation)))
    assert np.array_equal(straight.pairs, turned.pairs)
    D = {}
    for z in (8, 72):
        element = reference.basis[z]
        D[z] = np.zeros((element.n_orbitals,) * 2)
        for l, where in zip(element.l, element.shell_slices):
            D[z][where, where] = inversion**l * rotation_matrix(l, rotation)
    numbers = atoms.numbers
    worst = max(
        np.abs(
            D[numbers[i]] @ straight.block(straight.hamiltonian, b) @ D[numbers[j]].T - turned.block(turned.hamiltonian, b)
        ).max()
        for b, (i, j, *_) in enumerate(straight.pairs)
    )
    assert worst < DTYPES[dtype] * scale_of(straight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hamiltonian_ignores_translations(network, reference, dtype):
    atoms = hafnia(7)
    moved = atoms.copy()
    moved.positions += [0.11, -0.07, 0.05]
    a, b = (hamiltonian(network, reference, x, dtype) for x in (atoms, moved))
    assert np.abs(a.hamiltonian - b.hamiltonian).max() < DTYPES[dtype] * scale_of(a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hamiltonian_permutes_with_the_atoms(network, reference, dtype):
    atoms = hafnia(7).repeat((2, 1, 1))
    order = np.random.default_rng(0).permutation(len(atoms))
    a, b = hamiltonian(network, reference, atoms, dtype), hamiltonian(network, reference, atoms[order], dtype)
    renamed = np.column_stack([order[b.pairs[:, 0]], order[b.pairs[:, 1]], b.pairs[:, 2:]])
    row = {tuple(pair): k for k, pair in enumerate(a.pairs.tolist())}
    worst = max(
        np.abs(a.block(a.hamiltonian, row[tuple(pair)]) - b.block(b.hamiltonian, k)).max()
        for k, pair in enumerate(renamed.tolist())
    )
    assert worst < DTYPES[dtype] * scale_of(a)


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_hamiltonian_is_hermitian(network, reference, make):
    graph = structure_graph(make(3), reference.basis, CUTOFF)
    with torch.no_grad():
        offsite, onsite = network.double()(graph_inputs(graph, reference, network.lmax, torch.float64))
    operators = BlockCodec(reference).decode(
        graph,
        {(sorted(reference.basis)[i], sorted(reference.basis)[j]): v.numpy() for (i, j), v in offsite.items()},
        {sorted(reference.basis)[s]: v.numpy() for s, v in onsite.items()},
    ).operators()  # fmt: skip
    assert operators.hermiticity_error()["hamiltonian"] == 0
    # and not because assembling made it so: the network's own pairs are adjoint
    inputs = graph_inputs(graph, reference, network.lmax, torch.float64)
    for (i, j), p in inputs.pairs.items():
        other = offsite[j, i][p.flipped][:, p.adjoint] * p.sign
        assert (offsite[i, j] - other).abs().max() < 1e-12


def test_chunks_and_recomputing_change_nothing(network, reference):
    atoms = hafnia(5).repeat((2, 1, 1))
    graph = structure_graph(atoms, reference.basis, CUTOFF)
    gradients = []
    for chunk, recompute in ((10**9, False), (1, False), (100, True)):
        network.double().zero_grad()
        offsite, onsite = network(graph_inputs(graph, reference, network.lmax, torch.float64, chunk), recompute=recompute)
        loss = sum(v.square().sum() for v in (*offsite.values(), *onsite.values()))
        loss.backward()
        gradients.append([loss.item()] + [p.grad.abs().sum().item() for p in network.parameters() if p.grad is not None])
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(gradients[2], gradients[0], rtol=1e-9, atol=1e-14)


def test_a_network_can_be_left_without_the_crystal_field(reference):
    graph = structure_graph(hafnia(5), reference.basis, CUTOFF)
    told = {z: blocks + 1.0 for z, blocks in reference.crystal_field.of_graph(graph).items()}
    for crystal_field, moves in ((True, True), (False, False)):
        torch.manual_seed(0)
        network = build_network(Network(layers=1, channels=8, crystal_field=crystal_field), reference)
        with torch.no_grad():
            a, b = (
                network(graph_inputs(g, reference, network.lmax, torch.float32))[1]
                for g in (graph, replace(graph, crystal_field=told))
            )
        assert any((a[s] != b[s]).any() for s in a) == moves


def test_two_identical_forwards_are_bit_identical(network, reference):
    a, b = (hamiltonian(network, reference, hafnia(1), torch.float32) for _ in range(2))
    assert np.array_equal(a.hamiltonian, b.hamiltonian)


def test_far_apart_structures_do_not_see_each_other(network, reference):
    """Receptive field of messages: a change beyond layers x cutoff (and the edge's own ends) changes no block. Potentials reach
    further, so they are those of the first structure in both."""
    atoms = Atoms("Hf2O2", [(0, 0, 0), (30, 0, 0), (0, 2, 0), (30, 2, 0)], cell=[80, 20, 20], pbc=True)
    moved = atoms.copy()
    moved.positions[3, 1] += 0.3
    field = reference.crystal_field.of_graph(structure_graph(atoms, reference.basis, CUTOFF))
    results = []
    for x in (atoms, moved):
        graph = replace(structure_graph(x, reference.basis, CUTOFF), crystal_field=field)
        with torch.no_grad():
            offsite, onsite = network.double()(graph_inputs(graph, reference, network.lmax, torch.float64))
        results.append([*offsite.values(), *onsite.values()])
    # of two atoms of an element, and of an edge either way, the first is of the pair that did not move
    for a, b in zip(*results, strict=True):
        assert len(a) == len(b) == 2
        assert (a[0] - b[0]).abs().max() < 1e-13
        assert a[0].abs().max() > 0
    assert any((a[1] - b[1]).abs().max() > 1e-9 for a, b in zip(*results, strict=True))


def test_lmax_follows_the_basis_and_a_smaller_one_leaves_the_rest_at_the_reference():
    basis = basis_of(Ga=DZVP)
    atoms = Atoms("Ga2", [(0.1, 0, 0), (1.2, 1.9, 1.3)], cell=[4.5, 4.6, 4.7], pbc=True)
    reference = fit_reference([model_hamiltonian(atoms, basis)], CUTOFF)
    torch.manual_seed(0)
    assert build_network(Network(layers=1), reference).lmax == 6
    small = build_network(Network(layers=1, lmax=2, channels=4), reference)
    graph = structure_graph(atoms, basis, CUTOFF)
    with torch.no_grad():
        offsite, _ = small(graph_inputs(graph, reference, 2, torch.float32))
    degree = reference.coupling[31, 31].degree
    assert offsite[0, 0][:, degree > 2].abs().max() == 0
    assert offsite[0, 0][:, degree <= 2].abs().max() > 0


def test_an_atom_without_edges(network, reference):
    atoms = Atoms("HfO", [(0, 0, 0), (0, 0, 9)], cell=[20, 20, 20], pbc=True)
    assert np.isfinite(hamiltonian(network, reference, atoms, torch.float64).hamiltonian).all()
