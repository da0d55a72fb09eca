"""Compute real spherical harmonics, Clebsch-Gordan coefficients and rotation matrices in CP2K's order and signs.

The order is m = -l..l, with pole z and no Condon-Shortley sign: Y_1 = (y, z, x), Y_2 = (xy, yz, 3z2-r2, xz, x2-y2) times
positive factors. All arrays are float64 numpy.
Everything here is a constant or is evaluated once per structure; the network's own rotations are in model/rotations.py.
"""

from functools import lru_cache
from math import factorial, sqrt

import numpy as np
from scipy.special import sph_harm_y

ROWS = 192  # a multiple of the tiles of every BLAS kernel


def row_product(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Compute rows @ matrix, (G, m) @ (m, n), with each row independent, to the last bit, of the other rows.

    In a single product the rounding of a row depends on the number of rows: BLAS chooses kernels by shape, and treats the
    rows left over at the end with other kernels.
    """
    padded = np.zeros((-(-len(rows) // ROWS), ROWS, rows.shape[1]))
    padded.reshape(-1, rows.shape[1])[: len(rows)] = rows
    return (padded @ matrix).reshape(-1, matrix.shape[1])[: len(rows)]


def real_spherical_harmonics(l: int, vectors: np.ndarray) -> np.ndarray:
    """Compute Y_lm of the directions of `vectors`, scaled so that Y_lm(z) = delta_m0 (Racah's normalisation).

    (..., 3) -> (..., 2l+1).
    With this scale D^l_{m0}(R) = Y_lm(R z): an m = 0 coefficient f in the edge frame is f * Y_lm(edge) in the global frame.
    """
    x, y, z = np.moveaxis(np.asarray(vectors, dtype=float), -1, 0)
    theta, phi = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)
    harmonics = np.empty(theta.shape + (2 * l + 1,))
    for m in range(l + 1):
        complex_harmonic = (-1) ** m * sph_harm_y(l, m, theta, phi)  # removes the Condon-Shortley sign
        if m == 0:
            harmonics[..., l] = complex_harmonic.real
        else:
            harmonics[..., l + m] = sqrt(2) * complex_harmonic.real
            harmonics[..., l - m] = sqrt(2) * complex_harmonic.imag
    return harmonics * sqrt(4 * np.pi / (2 * l + 1))


@lru_cache
def clebsch_gordan(l1: int, l2: int, L: int) -> np.ndarray:
    """Compute the real coupling coefficients C[m1, m2, M], (2 l1+1, 2 l2+1, 2L+1).

    sum_{m1 m2} C[m1,m2,M] C[m1,m2,M'] = delta_MM', different L are orthogonal, and
    C[m1,m2,M] = sum D^l1_{m1 n1} D^l2_{m2 n2} D^L_{M N} C[n1,n2,N] for every rotation.
    Exchange: C^{l2 l1 L}[m2,m1,M] = C^{l1 l2 L}[m1,m2,M] (-1)^(l1+l2+L), which is a choice for l1 != l2 and follows from
    the definition for l1 = l2.
    Raises ValueError if l1 and l2 do not couple to L.
    Reference: Racah's formula, e.g. D. A. Varshalovich et al., Quantum Theory of Angular Momentum (1988), eq. 8.2.1(3).
    """
    if not abs(l1 - l2) <= L <= l1 + l2:
        raise ValueError(f"l = {l1}, {l2} couple to L = {abs(l1 - l2)}..{l1 + l2}, not to {L}.")
    if l1 < l2:
        coefficients = (-1) ** (l1 + l2 + L) * clebsch_gordan(l2, l1, L).transpose(1, 0, 2)
    else:
        complex_coefficients = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * L + 1))
        for m1 in range(-l1, l1 + 1):
            for m2 in range(-l2, l2 + 1):
                if abs(m1 + m2) <= L:
                    complex_coefficients[l1 + m1, l2 + m2, L + m1 + m2] = _racah(l1, m1, l2, m2, L, m1 + m2)
        a, b, c = _real_from_complex(l1), _real_from_complex(l2), _real_from_complex(L)
        coefficients = np.einsum("ia,jb,kc,abc->ijk", a, b, c.conj(), complex_coefficients)
        # they are purely imaginary if l1+l2+L is odd; any fixed phase would serve
        coefficients = coefficients.real if (l1 + l2 + L) % 2 == 0 else coefficients.imag
    coefficients = np.ascontiguousarray(coefficients)
    coefficients.flags.writeable = False  # the array is cached, so no caller may change it
    return coefficients


def _racah(l1: int, m1: int, l2: int, m2: int, L: int, M: int) -> float:
    f = factorial
    prefactor = (
        (2 * L + 1) * f(l1 + l2 - L) * f(l1 - l2 + L) * f(-l1 + l2 + L) / f(l1 + l2 + L + 1)
        * f(L + M) * f(L - M) * f(l1 - m1) * f(l1 + m1) * f(l2 - m2) * f(l2 + m2)
    )  # fmt: skip
    total = 0.0
    for k in range(max(0, l2 - L - m1, l1 - L + m2), min(l1 + l2 - L, l1 - m1, l2 + m2) + 1):
        total += (-1) ** k / (
            f(k) * f(l1 + l2 - L - k) * f(l1 - m1 - k) * f(l2 + m2 - k) * f(L - l2 + m1 + k) * f(L - l1 - m2 + k)
        )
    return sqrt(prefactor) * total


def _real_from_complex(l: int) -> np.ndarray:
    """Return the unitary U[m, n] that gives the real harmonic m from the complex harmonics n.

    The real harmonics have no Condon-Shortley sign, the complex ones do.
    """
    U = np.zeros((2 * l + 1, 2 * l + 1), dtype=complex)
    U[l, l] = 1
    for m in range(1, l + 1):
        U[l + m, l + m], U[l + m, l - m] = (-1) ** m / sqrt(2), 1 / sqrt(2)
        U[l - m, l + m], U[l - m, l - m] = -1j * (-1) ** m / sqrt(2), 1j / sqrt(2)
    return U


@lru_cache
def _sample_directions() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 3))


def rotation_matrix(l: int, R: np.ndarray) -> np.ndarray:
    """Compute D^l(R) with Y_l(R v) = D^l(R) Y_l(v), (2l+1, 2l+1), for a proper or improper rotation R (3, 3).

    D(R1 R2) = D(R1) D(R2), D^T D = 1. The matrix is solved from the harmonics of fixed directions, which is suitable for
    tests and set-up but too slow for edges.
    """
    v = _sample_directions()
    return np.linalg.lstsq(real_spherical_harmonics(l, v), real_spherical_harmonics(l, v @ np.asarray(R).T), rcond=None)[0].T


@lru_cache
def generators(l: int) -> np.ndarray:
    """Return J (3, 2l+1, 2l+1), the antisymmetric generators of rotations.

    D^l of a small turn by w (radians, about x, y, z) is 1 + sum_k w_k J_k.
    """
    about_z = np.zeros((2 * l + 1,) * 2)
    for m in range(1, l + 1):
        about_z[l + m, l - m], about_z[l - m, l + m] = -m, m
    z_to_x, z_to_y = ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    turns = [rotation_matrix(l, np.array(R)) for R in (z_to_x, z_to_y)] + [np.eye(2 * l + 1)]
    return np.stack([D @ about_z @ D.T for D in turns])


def edge_rotations(vectors: np.ndarray, lmax: int) -> list[np.ndarray]:
    """Compute D^l(Q_e), l = 0..lmax, of the rotation Q_e that takes edge e to +z: lmax+1 arrays (E, 2l+1, 2l+1).

    Q = Ry(-theta) Rz(-phi), with the third angle zero; phi = 0 on +z and pi on -z. Therefore, for every edge, poles
    included, the frame of the reversed edge is the frame of the edge turned by pi about x: D^l(Q_rev) = diag(`flip(l)`)
    D^l(Q). The result is deterministic.
    """
    x, y, z = np.asarray(vectors, dtype=float).T
    rho = np.hypot(x, y)
    r = np.hypot(rho, z)
    pole = rho <= 1e-12 * r
    rho_safe = np.where(pole, 1.0, rho)
    # exp(-i m phi) and exp(-i m theta) are computed as powers, so the angles themselves are never needed
    about_z = np.where(pole, np.where(z < 0, -1.0, 1.0), x / rho_safe) - 1j * np.where(pole, 0.0, y / rho_safe)
    about_y = (z - 1j * np.where(pole, 0.0, rho)) / r
    rotations, phase_z, phase_y = [], [np.ones_like(about_z)], [np.ones_like(about_y)]
    for l in range(lmax + 1):
        if l:
            phase_z.append(phase_z[-1] * about_z)
            phase_y.append(phase_y[-1] * about_y)
        trigonometric = np.stack([p.real for p in phase_y] + [p.imag for p in phase_y[1:]], 1)  # (E, 2l+1)
        D = row_product(trigonometric, _turn_about_y(l)).reshape(-1, 2 * l + 1, 2 * l + 1)
        c = np.stack([p.real for p in phase_z], 1)[:, None, :]
        s = np.stack([p.imag for p in phase_z[1:]], 1)[:, None, :] if l else None
        result = D * np.concatenate([c[..., :0:-1], c], 2)  # times D^l(Rz(-phi)) from the right
        if l:
            plus, minus = D[..., l + 1 :], D[..., l - 1 :: -1] if l > 1 else D[..., :1]
            result[..., l + 1 :] += minus * s
            result[..., :l] -= (plus * s)[..., ::-1]
        rotations.append(result)
    return rotations


@lru_cache
def _turn_about_y(l: int) -> np.ndarray:
    """Return the linear map from [cos m a (m = 0..l), sin m a (m = 1..l)] to D^l(Ry(a)), (2l+1, (2l+1)^2)."""
    n = 2 * l + 1
    quarter = rotation_matrix(l, np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]))  # takes z to y
    parts = np.zeros((n, n, n))
    parts[0, l, l] = 1
    for m in range(1, l + 1):
        parts[m, l + m, l + m] = parts[m, l - m, l - m] = 1
        parts[l + m, l + m, l - m], parts[l + m, l - m, l + m] = -1, 1
    return (quarter @ parts @ quarter.T).reshape(n, n * n)


def flip(l: int) -> np.ndarray:
    """Return the signs (2l+1,) that a turn by pi about x gives Y_lm: (-1)^(l+m) for m >= 0, -(-1)^(l+m) for m < 0."""
    m = np.arange(-l, l + 1)
    return (-1.0) ** (l + m) * np.where(m < 0, -1, 1)
