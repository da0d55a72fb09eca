"""Graphs in files: a rank reads the rows of its atoms, and finds them also in files made before they were counted."""

import numpy as np
import pytest

from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import GraphFile, UnbuiltGraph, read_graph, write_graph
from hamscale.graph.reference import fit_reference
from helpers import hafnia, model_hamiltonian

CUTOFF = 5.0


@pytest.fixture(scope="module")
def graph(szv):
    reference = fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], CUTOFF)
    return BlockCodec(reference).encode(model_hamiltonian(hafnia(2).repeat((2, 2, 1)), szv))


def assert_equal(found, expected):
    assert np.array_equal(found.edges.table, expected.edges.table)
    assert found.owned.tolist() == expected.owned.tolist()
    for name in ("offsite", "onsite", "crystal_field"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        for key, values in theirs.items():
            assert np.array_equal(ours[key], values), (name, key)


PARTS = ([0], [1, 2, 3, 7], [0, 4, 5, 11], range(12), [])


def test_a_part_read_from_a_file_is_that_of_the_whole_graph(graph, tmp_path):
    write_graph(tmp_path / "graph.h5", graph)
    source = GraphFile(tmp_path / "graph.h5")
    assert source.components == graph.components
    assert source.degrees().tolist() == graph.degrees().tolist()
    for owned in PARTS:
        owned = np.array(owned, int)
        assert_equal(source.part(owned), graph.part(owned))
    assert_equal(read_graph(tmp_path / "graph.h5"), graph)


def test_a_part_made_from_positions_is_that_of_the_whole_graph(graph):
    source = UnbuiltGraph(graph.atoms, graph.basis, CUTOFF)
    assert source.degrees().tolist() == graph.degrees().tolist()
    for owned in PARTS:
        owned = np.array(owned, int)
        assert np.array_equal(source.part(owned).edges.table, graph.part(owned).edges.table)
        assert set(source.part(owned).elements) <= set(graph.elements)
