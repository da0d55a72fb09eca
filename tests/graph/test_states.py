"""Directions in which errors of H move eigenvalues, against eigenvalues of H with such an error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import read_graph, write_graph
from hamscale.graph.reference import fit_reference
from hamscale.graph.states import directions, eigenvalue_directions
from hamscale.inputs.ranks import rank_example
from hamscale.inputs.tensors import differences_mev
from hamscale.parallel.env import World
from helpers import hafnia, model_hamiltonian

CUTOFF = 5.0


@pytest.fixture(scope="module")
def case(szv):
    """(operators, the same with a small error within the cutoff, graph of each)."""
    operators = model_hamiltonian(hafnia(), szv)
    reference = fit_reference([operators, model_hamiltonian(hafnia(1), szv)], CUTOFF)
    error = np.random.default_rng(0).normal(size=len(operators.hamiltonian))
    error = (error + operators.transposed(error)) / 2
    distances = operators.pairs.distances
    error[np.repeat(distances >= CUTOFF, np.diff(operators.offsets))] = 0
    wrong = replace(operators, hamiltonian=operators.hamiltonian + 1e-8 * error)
    return operators, wrong, BlockCodec(reference).encode(operators), BlockCodec(reference).encode(wrong)


def product(of_direction, a, b) -> float:
    parts = zip(of_direction, (a.offsite, a.onsite), (b.offsite, b.onsite))
    return sum((d[key] * (of_b[key] - of_a[key])).sum() for d, of_a, of_b in parts for key in d)


@pytest.mark.parametrize("k", [(0, 0, 0), (0.5, 0, 0.5), (0.13, 0.31, -0.22)], ids=str)
def test_a_direction_gives_the_first_order_shift_of_eigenvalues(case, k):
    operators, wrong, graph, of_wrong = case
    k, gauge = np.array(k), of_wrong.attributes["gauge_hartree"] - graph.attributes["gauge_hartree"]
    (H, S), (W, _) = operators.at_k(k), wrong.at_k(k)
    (before, v), after = eigh(H, S), eigh(W, S, eigvals_only=True)
    far = np.repeat(operators.pairs.distances >= CUTOFF, np.diff(operators.offsets))
    within = replace(operators, overlap=np.where(far, 0, operators.overlap)).at_k(k)[1]
    for n in (3, 11):
        signs = np.zeros(n + 1)
        signs[n] = 1
        # targets are of H - mu S within the cutoff, and mu is fitted to each
        expected = after[n] - before[n] - gauge * (v[:, n].conj() @ within @ v[:, n]).real
        found = directions(operators, graph, k[None], signs[None])
        found = product([{key: d[0] for key, d in part.items()} for part in found], graph, of_wrong)
        assert found == pytest.approx(expected, abs=2e-3 * 1e-8)


def test_directions_are_in_the_order_of_a_graph_that_was_a_file(case, tmp_path):
    """Of elements whose order by name is not that by number."""
    operators, _, graph, _ = case
    reference = fit_reference([operators, model_hamiltonian(hafnia(1), operators.basis)], CUTOFF)
    write_graph(tmp_path / "graph.h5", graph)
    found = []
    for of in (graph, read_graph(tmp_path / "graph.h5")):
        part = rank_example(of, reference, 2, torch.float64, 500, World(), 1, operators=operators, directions=3)
        zero = tuple({key: torch.zeros_like(v) for key, v in targets.items()} for targets in (part.offsite, part.onsite))
        found.append(sum(a @ d for a, d in zip(part.directions, differences_mev(zero, part))))
    torch.testing.assert_close(found[0], found[1])


def test_directions_average_to_the_mean_square_error_less_the_common_shift(case):
    operators, wrong, graph, of_wrong = case
    found = eigenvalue_directions(operators, graph, 400)
    squares = [product([{z: v[m] for z, v in part.items()} for part in found], graph, of_wrong) ** 2 for m in range(400)]
    states, expected = operators.n_electrons // 2 * 5 // 4, []
    for k in np.random.default_rng(1).random((60, 3)):
        (H, S), (W, _) = operators.at_k(k), wrong.at_k(k)
        shifts = (eigh(W, S, eigvals_only=True) - eigh(H, S, eigvals_only=True))[:states]
        expected.append(((shifts - shifts.mean()) ** 2).mean())
    assert np.mean(squares) == pytest.approx(np.mean(expected), rel=0.15)
