import numpy as np
import pytest
from scipy.linalg import eigh

from hamscale.operators import read_operators, write_operators
from helpers import forged, hafnia, model_hamiltonian


@pytest.fixture
def operators(szv):
    return model_hamiltonian(hafnia(), szv)


def test_a_file_reads_back_the_same(operators, tmp_path):
    write_operators(tmp_path / "a.h5", operators)
    back = read_operators(tmp_path / "a.h5")
    for name in ("pairs", "offsets", "hamiltonian", "overlap"):
        assert np.array_equal(getattr(back, name), getattr(operators, name))
    assert back.basis.difference(operators.basis) == ""
    assert np.array_equal(back.atoms.positions, operators.atoms.positions)


def test_adjoint_is_the_transposed_block_of_the_opposite_cell(operators):
    adjoint, reverse = (
        operators.transposed(operators.overlap * 0 + np.arange(len(operators.overlap))),
        operators.pairs.flipped_index,
    )
    values = np.arange(len(operators.overlap), dtype=float)
    for b in range(0, len(operators.pairs), 97):
        i, j, *R = operators.pairs[b]
        assert operators.pairs[reverse[b]].tolist() == [j, i, *(-np.array(R)).tolist()]
        assert np.array_equal(operators.block(adjoint, b), operators.block(values, reverse[b]).T)


def test_h_of_k_is_the_phased_sum_over_cells(operators):
    """Slow and obvious: block by block into a dense matrix; and the sparse matrices of each cell."""
    k = np.array([0.13, 0.27, -0.41])
    start = np.concatenate([[0], np.cumsum(operators.orbitals)])
    expected = np.zeros((operators.n_orbitals,) * 2, complex)
    for b, (i, j, *R) in enumerate(operators.pairs):
        phase = np.exp(2j * np.pi * (k @ R))
        expected[start[i] : start[i + 1], start[j] : start[j + 1]] += phase * operators.block(operators.hamiltonian, b)
    H, S = operators.at_k(k)
    np.testing.assert_allclose(H, expected, atol=1e-13)
    np.testing.assert_allclose(H, H.conj().T, atol=1e-13)
    sparse = sum(np.exp(2j * np.pi * (k @ np.array(R))) * M.toarray() for R, M in operators.csr(operators.overlap).items())
    np.testing.assert_allclose(S, sparse, atol=1e-13)


def _spoil(path, how):
    with forged(path) as file:
        how(file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda f: f.attrs.__setitem__("schema", "operators/9"), "schema is 'operators/9', expected 'operators/2'"),
        (lambda f: f["hamiltonian"].__setitem__(5, np.nan), "hamiltonian holds NaN"),
        (lambda f: f["overlap"].attrs.__setitem__("unit", "eV"), "overlap has unit 'eV', expected '1'"),
        (lambda f: f["pairs"].__setitem__((3, slice(2, 5)), [7, 7, 7]), "has no transposed block"),
        (lambda f: f["offsets"].__setitem__(3, 7), "offsets do not fit the basis"),
        (lambda f: f.__delitem__("structure"), "structure"),
        (lambda f: f["basis/O"].attrs.__setitem__("sha256", "0"), "basis of O"),
    ],
)
def test_a_spoilt_file_is_refused_with_its_name(operators, tmp_path, how, message):
    path = tmp_path / "a.h5"
    write_operators(path, operators)
    _spoil(path, how)
    with pytest.raises(ValueError, match=message) as error:
        read_operators(path)
    assert str(error.value).count(str(path)) == 1


def test_a_file_cut_short_is_refused(operators, tmp_path):
    path = tmp_path / "a.h5"
    write_operators(path, operators)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_operators(path)
    with pytest.raises(ValueError, match="no such file"):
        read_operators(tmp_path / "b.h5")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(operators, tmp_path):
    path = tmp_path / "a.h5"
    write_operators(path, operators)
    before = path.read_bytes()
    operators.attributes = {"cannot": object()}
    with pytest.raises(TypeError):
        write_operators(path, operators)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_made_hermitian_in_place(operators):
    noisy = operators.hamiltonian + np.random.default_rng(0).normal(size=len(operators.hamiltonian))
    adjoint, before = operators.transposed(noisy), noisy.copy()
    assert operators.make_hermitian(noisy) == np.abs(before - adjoint).max()
    assert np.array_equal(noisy, (before + adjoint) / 2)
    assert operators.make_hermitian(noisy) == 0


def test_copies_of_a_cell_have_its_bands_folded(solid):
    """At k of the large cell lie the states of all k of the small one that differ by its reciprocal vectors."""
    counts = (2, 3, 2 if solid.atoms.pbc[2] else 1)
    large, k = solid.repeat(counts), np.array([0.3, -0.2, 0.1]) * solid.atoms.pbc
    assert np.array_equal(large.atoms.positions, solid.atoms.repeat(counts).positions)
    folded = [solid.at_k((k + copy) / counts) for copy in np.ndindex(*counts)]
    expected = np.sort(np.concatenate([eigh(H, S, eigvals_only=True) for H, S in folded]))
    np.testing.assert_allclose(eigh(*large.at_k(k), eigvals_only=True), expected, atol=1e-9)
    assert max(large.hermiticity_error().values()) < 1e-12
