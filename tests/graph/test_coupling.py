import numpy as np
import pytest

from hamscale.angular import clebsch_gordan, edge_rotations, rotation_matrix
from hamscale.graph.coupling import pair_coupling
from helpers import DZVP, basis_of

RNG = np.random.default_rng(0)
BASIS = basis_of(Ga=DZVP, As=DZVP)  # l = 0..3 and 0..2
PAIRS = [(31, 31), (31, 33), (33, 31), (33, 33)]


@pytest.mark.parametrize(("z_i", "z_j"), PAIRS)
def test_block_to_coupled_and_back(z_i, z_j):
    pair = pair_coupling(BASIS, z_i, z_j)
    blocks = RNG.normal(size=(10, pair.size))
    coupled = blocks @ pair.transform
    assert np.abs(coupled @ pair.transform.T - blocks).max() < 1e-12
    np.testing.assert_allclose(np.linalg.norm(coupled, axis=1), np.linalg.norm(blocks, axis=1), rtol=1e-13)


def test_every_pair_of_l_up_to_three_and_its_layout():
    """Each coupled component, shell pair by shell pair, against the sum of the definition."""
    pair = pair_coupling(BASIS, 31, 31)
    block = RNG.normal(size=(25, 25))
    coupled = block.reshape(-1) @ pair.transform
    shells = BASIS[31]
    assert {(shells.l[a], shells.l[b]) for s in pair.slots.values() for a, b in s} == {
        (a, b) for a in range(4) for b in range(4)
    }
    position = 0
    for L, slots in pair.slots.items():
        for M in range(2 * L + 1):
            for a, b in slots:
                part = block[shells.shell_slices[a], shells.shell_slices[b]]
                expected = (clebsch_gordan(shells.l[a], shells.l[b], L)[:, :, M] * part).sum()
                assert abs(coupled[position] - expected) < 1e-12
                assert (pair.degree[position], pair.order[position]) == (L, M - L)
                position += 1
    assert position == 625


@pytest.mark.parametrize(("z_i", "z_j"), PAIRS)
def test_coupled_vectors_turn_by_degree(z_i, z_j, rotation):
    pair = pair_coupling(BASIS, z_i, z_j)
    D = [np.zeros((BASIS[z].n_orbitals,) * 2) for z in (z_i, z_j)]
    for matrix, z in zip(D, (z_i, z_j)):
        for l, where in zip(BASIS[z].l, BASIS[z].shell_slices):
            matrix[where, where] = rotation_matrix(l, rotation)
    block = RNG.normal(size=(BASIS[z_i].n_orbitals, BASIS[z_j].n_orbitals))
    turned = (D[0] @ block @ D[1].T).reshape(1, -1) @ pair.transform
    rotations = [rotation_matrix(L, rotation)[None] for L in range(7)]
    np.testing.assert_allclose(turned, pair.rotate(block.reshape(1, -1) @ pair.transform, rotations), atol=1e-12)
    np.testing.assert_allclose(pair.rotate(turned, rotations, inverse=True), block.reshape(1, -1) @ pair.transform, atol=1e-12)


@pytest.mark.parametrize(("z_i", "z_j"), PAIRS)
def test_adjoint_is_the_coupled_vector_of_the_transpose(z_i, z_j):
    forward, backward = pair_coupling(BASIS, z_i, z_j), pair_coupling(BASIS, z_j, z_i)
    blocks = RNG.normal(size=(4, BASIS[z_i].n_orbitals, BASIS[z_j].n_orbitals))
    coupled = blocks.reshape(4, -1) @ forward.transform
    reversed_ = blocks.transpose(0, 2, 1).reshape(4, -1) @ backward.transform
    index, sign = forward.adjoint
    np.testing.assert_allclose(reversed_[:, index] * sign, coupled, atol=1e-13)
    vectors = np.array([[1.0, 2, 3], [0, 0, 1], [0, 0, -1], [-1, 0, 0]])
    index, sign = forward.edge_adjoint
    ours = forward.rotate(coupled, edge_rotations(vectors, 6))
    theirs = backward.rotate(reversed_, edge_rotations(-vectors, 6))
    np.testing.assert_allclose(theirs[:, index] * sign, ours, atol=1e-12)
