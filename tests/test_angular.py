"""The properties that the docstrings of hamscale.angular state."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hamscale.angular import clebsch_gordan, edge_rotations, flip, real_spherical_harmonics, rotation_matrix

EDGES = np.concatenate(
    [np.eye(3), -np.eye(3), [[1, 1, 1], [1e-9, 0, 1], [1e-9, 0, -1]], np.random.default_rng(0).normal(size=(5, 3))]
)


def test_p_and_d_harmonics_are_those_of_cp2k():
    x, y, z = v = np.array([0.36, -0.48, 0.8])
    np.testing.assert_allclose(real_spherical_harmonics(1, v), [y, z, x], atol=1e-15)
    d = np.array([x * y, y * z, (3 * z**2 - 1) / (2 * np.sqrt(3)), x * z, (x**2 - y**2) / 2]) * np.sqrt(3)
    np.testing.assert_allclose(real_spherical_harmonics(2, v), d, atol=1e-15)


@pytest.mark.parametrize("l", range(7))
def test_rotation_matrices_are_a_representation(l):
    R1, R2 = Rotation.random(2, rng=np.random.default_rng(1)).as_matrix()
    D1, D2 = rotation_matrix(l, R1), rotation_matrix(l, R2)
    np.testing.assert_allclose(rotation_matrix(l, R1 @ R2), D1 @ D2, atol=1e-13)
    np.testing.assert_allclose(D1 @ D1.T, np.eye(2 * l + 1), atol=1e-13)


@pytest.mark.parametrize("l1", range(4))
@pytest.mark.parametrize("l2", range(4))
def test_coupling_is_orthonormal_and_commutes_with_rotations(l1, l2, rotation):
    columns = []
    for L in range(abs(l1 - l2), l1 + l2 + 1):
        C = clebsch_gordan(l1, l2, L)
        D1, D2, D = (rotation_matrix(l, rotation) for l in (l1, l2, L))
        np.testing.assert_allclose(np.einsum("ai,bj,ck,ijk->abc", D1, D2, D, C), C, atol=1e-13)
        np.testing.assert_allclose(clebsch_gordan(l2, l1, L).transpose(1, 0, 2), (-1) ** (l1 + l2 + L) * C, atol=1e-14)
        columns.append(C.reshape(-1, 2 * L + 1))
    T = np.concatenate(columns, 1)
    np.testing.assert_allclose(T.T @ T, np.eye(T.shape[1]), atol=1e-13)


def test_coupling_is_that_of_e3nn_up_to_sign():
    """e3nn's pole is y: its harmonics of (x, y, z) are ours of (z, x, y)."""
    from e3nn import o3

    for l1, l2, L in [(1, 1, 0), (1, 1, 2), (2, 1, 3), (2, 2, 1), (3, 2, 4)]:
        theirs = o3.wigner_3j(l1, l2, L).double().numpy() * np.sqrt(2 * L + 1)
        ours = clebsch_gordan(l1, l2, L)
        sign = np.sign((theirs * ours).sum())
        np.testing.assert_allclose(sign * theirs, ours, atol=1e-6)  # their table is float32 by default


def test_cached_coefficients_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        clebsch_gordan(1, 1, 2)[0, 0, 0] = 1


@pytest.mark.parametrize("l", range(7))
def test_edge_rotation_takes_the_edge_to_the_pole(l):
    D = edge_rotations(EDGES, l)[l]
    pole = np.zeros(2 * l + 1)
    pole[l] = 1
    np.testing.assert_allclose(
        np.einsum("eij,ej->ei", D, real_spherical_harmonics(l, EDGES)), np.tile(pole, (len(EDGES), 1)), atol=1e-13
    )
    np.testing.assert_allclose(D @ D.transpose(0, 2, 1), np.tile(np.eye(2 * l + 1), (len(EDGES), 1, 1)), atol=1e-13)


@pytest.mark.parametrize("l", range(7))
def test_edge_rotation_is_the_matrix_of_one_rotation_for_all_degrees(l):
    order = [2, 0, 1]  # l = 1 is (y, z, x)
    for e, D1 in enumerate(edge_rotations(EDGES, 1)[1]):
        np.testing.assert_allclose(edge_rotations(EDGES, l)[l][e], rotation_matrix(l, D1[np.ix_(order, order)]), atol=1e-12)


@pytest.mark.parametrize("l", range(5))
def test_frame_of_the_reversed_edge_is_turned_by_pi_about_x(l):
    forward, backward = edge_rotations(EDGES, l)[l], edge_rotations(-EDGES, l)[l]
    np.testing.assert_allclose(backward, flip(l)[:, None] * forward, atol=1e-13)
