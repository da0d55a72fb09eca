"""P ranks give what one gives: loss, every gradient, H; on structures that fill all ranks, some, or one."""

import gc
from collections import Counter

import numpy as np
import pytest
import torch
from ase import Atoms

from hamscale.config import Network
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import UnbuiltGraph
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import load_model, save_model
from hamscale.inputs.ranks import MOST_EDGES, rank_example, rank_part
from hamscale.inputs.tensors import build_network, differences_mev, graph_inputs
from hamscale.inputs.union import unions
from hamscale.operators import read_operators
from hamscale.pairs import PairList
from hamscale.parallel.env import World
from hamscale.parallel.exchange import CupyExchange
from hamscale.partition import partition
from hamscale.predict import predict
from hamscale.predict.in_parts import forward_in_parts
from hamscale.structures import with_vacuum, wrap_as_cp2k
from hamscale.train.loop import sum_gradients
from hamscale.train.loss import eigenvalue_error, l1_l2
from helpers import WATER, hafnia, model_hamiltonian, rattled
from ranks import on_ranks

CUTOFF, LAYERS, CHANNELS, LMAX = 5.0, 3, 4, 4


def molecules() -> Atoms:
    """Water twice, far apart, and an oxygen alone: parts without neighbours, a rank without edges."""
    water = rattled(WATER, 1)
    far = water.copy()
    far.positions += [40, 0, 0]
    alone = Atoms("O", [(0, 40, 0)])
    return Atoms((water + far + alone).get_chemical_symbols(), (water + far + alone).positions)


def slab(seed: int) -> Atoms:
    """Two cells of hafnia that repeat along two directions alone."""
    atoms = hafnia(seed).repeat((2, 1, 1))
    atoms.pbc = (True, True, False)
    return wrap_as_cp2k(with_vacuum(atoms, 6.0))


@pytest.fixture(scope="module")
def cases(tmp_path_factory, szv):
    """name -> (folder of a model, reference, graph)."""
    from helpers import basis_of

    wet = basis_of(H="SZV-MOLOPT-GTH", O="SZV-MOLOPT-GTH")
    result = {}
    for name, basis, train, atoms in (
        ("crystal", szv, [hafnia(s) for s in range(2)], rattled(hafnia().repeat((2, 2, 1)), 3)),
        ("small cell", szv, [hafnia(s) for s in range(2)], hafnia(4)),
        ("slab", szv, [slab(s) for s in range(2)], slab(4)),
        ("molecules", wet, [rattled(WATER, s) for s in range(3)], molecules()),
    ):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        reference = fit_reference([model_hamiltonian(a, basis) for a in train], CUTOFF)
        write_reference(folder / "fitted.h5", reference)
        settings = Network(lmax=LMAX, layers=LAYERS, channels=CHANNELS, hidden=6, values=4, feed_forward=8, radial=8)
        torch.manual_seed(1)
        network = build_network(settings, reference).double()
        save_model(folder / "model", [network.state_dict()], settings.model_dump(), folder / "fitted.h5", {})
        operators = model_hamiltonian(atoms, basis)
        result[name] = folder, reference, BlockCodec(reference).encode(operators), operators
    return result


def step(world: World, cases: dict, out):
    """Of every case: loss, gradients, statistics; H goes to a file."""
    result = {}
    for name, (folder, reference, graph, operators) in cases.items():
        (network,), _ = load_model(folder / "model")
        network = network.double()
        more = {"operators": operators, "directions": 3}
        part = rank_example(graph, reference, network.lmax, torch.float64, 200, world, world.size, **more)
        differences = differences_mev(network(part.inputs, part.exchange), part)
        loss = sum(l1_l2(d, 10.0, n) for d, n in zip(differences, part.counts))
        loss = loss + 0.3 * eigenvalue_error(sum(a @ d for a, d in zip(part.directions, differences)), world)
        loss.backward()
        (total,) = sum_gradients(network, world, loss.item())
        gradients = {n: p.grad.numpy() for n, p in network.named_parameters()}
        predict(folder / "model", graph.atoms, dtype=torch.float64, world=world).write(out / f"{name}.h5", world)
        result[name] = total, gradients, getattr(part.exchange, "statistics", None)
    return result


@pytest.fixture(scope="module")
def alone(cases, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return step(World(), cases, out), {name: read_operators(out / f"{name}.h5") for name in cases}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_agree_with_one_process(cases, alone, tmp_path, ranks):
    expected, operators = alone
    results = on_ranks(ranks, step, cases, tmp_path)
    for name, (loss, gradients, _) in expected.items():
        for result in results:
            total, own, _ = result[name]
            assert total == pytest.approx(loss, rel=1e-10)
            for weight, gradient in gradients.items():
                np.testing.assert_allclose(own[weight], gradient, rtol=0, atol=1e-10 * max(1, np.abs(gradient).max()))
        joined = read_operators(tmp_path / f"{name}.h5")
        assert np.array_equal(joined.pairs, operators[name].pairs)
        assert joined.attributes["source"] == "predicted"
        for matrix in ("hamiltonian", "overlap"):
            np.testing.assert_allclose(getattr(joined, matrix), getattr(operators[name], matrix), rtol=0, atol=1e-10)
        assert max(joined.hermiticity_error().values()) < 1e-14
        _check_statistics(cases[name][2], ranks, [result[name][2] for result in results])


def _check_statistics(graph, ranks, statistics):
    """An exchange of features per layer and direction, one of read-out blocks; the bytes the partition says."""
    plan = partition(graph.atoms, [(graph.edges[:, 0], graph.edges[:, 1])], CUTOFF, ranks)
    owner = plan.owner
    components = {pair: t.shape[1] for pair, t in graph.offsite.items()}
    for rank, (s, neighbours, sent) in enumerate(zip(statistics, plan.per_rank()["neighbours"], plan.per_rank()["sent"])):
        if not neighbours:
            assert not s.exchanges
            continue
        assert s.exchanges == {"nodes": LAYERS, "edges": 1, "nodes backward": LAYERS, "edges backward": 1}
        assert s.messages == neighbours * (2 * LAYERS + 2)
        width = (LMAX + 1) ** 2 * CHANNELS * 8
        assert s.bytes_sent["nodes"] == LAYERS * sent * width
        cut = graph.edges[(owner[graph.edges[:, 0]] == rank) & (owner[graph.edges[:, 1]] != rank)]
        kinds = Counter(map(tuple, graph.atoms.numbers[cut[:, :2]].tolist()))
        assert s.bytes_sent["edges"] == 8 * sum(n * components[pair] for pair, n in kinds.items())


def what_a_rank_holds(world: World, cases: dict):
    """Of every case: edges in memory and its own, and the difference of a forward pass in parts from one in whole."""
    result = {}
    for name, (folder, reference, graph, _) in cases.items():
        source = UnbuiltGraph(graph.atoms.copy(), graph.basis, CUTOFF)
        part = rank_part(source, reference, world, world.size)
        held = {id(table.base if table.base is not None else table): len(table) for table in _tables(source.atoms)}
        (network,), _ = load_model(folder / "model")
        networks, options = [network.double()], {"halo": part.halo, "exchange": part.exchange}
        found = forward_in_parts(networks, part.graph, reference, torch.float64, edges_at_once=50, **options)
        inputs = graph_inputs(part.graph, reference, network.lmax, torch.float64, 200, part.halo)
        with torch.inference_mode():
            expected = network(inputs, part.exchange)
        elements = sorted(reference.basis)
        differences = [found[0][elements[i], elements[j]] - v.numpy() for (i, j), v in expected[0].items()]
        differences += [found[1][elements[s]][0] - v.numpy() for s, v in expected[1].items()]
        result[name] = (
            sum(held.values()),
            len(part.graph.edges),
            max((np.abs(d).max(initial=0) for d in differences), default=0),
        )
    return result


def _tables(atoms: Atoms) -> list[np.ndarray]:
    """The tables of all pairs of atoms of a structure that are in memory."""
    gc.collect()
    return [pairs.table for pairs in gc.get_objects() if type(pairs) is PairList and pairs.atoms is atoms]


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_holds_its_own_edges_alone_and_predicts_some_at_a_time(cases, ranks):
    results = on_ranks(ranks, what_a_rank_holds, cases)
    for name, (_, _, graph, _) in cases.items():
        assert sum(own for _, own, _ in (result[name] for result in results)) == len(graph.edges)
        for held, own, difference in (result[name] for result in results):
            assert held <= MOST_EDGES * own
            assert difference < 1e-12


def two_groups(world: World, cases: dict):
    """Each pair of ranks has a structure of its own; gradients are summed over all."""
    names = ["crystal", "small cell"]
    _, reference, graph, _ = cases[names[world.rank // 2]]
    torch.manual_seed(1)
    network = load_model(cases["crystal"][0] / "model")[0][0].double()
    part = rank_example(graph, reference, network.lmax, torch.float64, 200, world, 2)
    sum(d.abs().sum() for d in differences_mev(network(part.inputs, part.exchange), part)).backward()
    sum_gradients(network, world)
    return {n: p.grad.numpy() for n, p in network.named_parameters()}


def test_several_structures_at_once_with_several_ranks_each(cases):
    network = load_model(cases["crystal"][0] / "model")[0][0].double()
    for name in ("crystal", "small cell"):
        _, reference, graph, _ = cases[name]
        part = rank_example(graph, reference, network.lmax, torch.float64, 200, World(), 1)
        sum(d.abs().sum() for d in differences_mev(network(part.inputs, part.exchange), part)).backward()
    for result in on_ranks(4, two_groups, cases):
        for name, p in network.named_parameters():
            np.testing.assert_allclose(result[name], p.grad.numpy(), rtol=0, atol=1e-10 * max(1, p.grad.abs().max()))


def a_batch(world: World, cases: dict, edges: int):
    """Loss and gradients of a batch of structures, united up to so many edges, or one by one."""
    result = {}
    for names in (["crystal", "small cell", "crystal"], ["molecules", "molecules"]):
        network = load_model(cases[names[0]][0] / "model")[0][0].double()
        parts = []
        for name in names:
            _, reference, graph, operators = cases[name]
            more = {"operators": operators, "directions": 3}
            parts.append(rank_example(graph, reference, network.lmax, torch.float64, 200, world, world.size, **more))
        losses = []
        for union in unions(parts, edges, 200):
            for part, predicted in union.split(network(union.inputs, union.exchange)):
                offsite, onsite = differences = differences_mev(predicted, part)
                losses += [l1_l2(d, 10.0, n) for d, n in zip(differences, part.counts)]
                losses.append(0.3 * eigenvalue_error(part.directions[0] @ offsite + part.directions[1] @ onsite, world))
            statistics = getattr(union.exchange, "statistics", None)
        loss = sum(losses)
        loss.backward()
        (total,) = sum_gradients(network, world, loss.item())
        result[names[0]] = total, {n: p.grad.numpy() for n, p in network.named_parameters()}, statistics
    return result


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_batch_united_on_ranks_is_one_structure_after_another_on_one(cases, ranks):
    expected = a_batch(World(), cases, 0)
    for result in on_ranks(ranks, a_batch, cases, 10**9):
        for name, (loss, gradients, _) in expected.items():
            total, own, statistics = result[name]
            assert total == pytest.approx(loss, rel=1e-10)
            for weight, gradient in gradients.items():
                np.testing.assert_allclose(own[weight], gradient, rtol=0, atol=1e-10 * max(1, np.abs(gradient).max()))
            if ranks > 1 and statistics.messages:  # those of one structure for all
                assert statistics.exchanges == {"nodes": LAYERS, "edges": 1, "nodes backward": LAYERS, "edges backward": 1}


def test_cupy_exchange_without_cupy_or_a_gpu_is_refused(cases):
    graph = cases["crystal"][2]
    halo = rank_part(graph, cases["crystal"][1], World(0, 2), 2).halo
    with pytest.raises(ValueError, match="exchange 'cupy': .*use 'torch'|exchange 'cupy': the device is cpu"):
        CupyExchange(halo, World(0, 2))


def test_a_missing_shard_is_named(cases, tmp_path):
    on_ranks(2, step, {"small cell": cases["small cell"]}, tmp_path)
    next((tmp_path / "small cell.h5.shards").glob("*-1.h5")).unlink()
    with pytest.raises(ValueError, match="-1.h5 is missing. Move the folder of shards with the file"):
        read_operators(tmp_path / "small cell.h5")
