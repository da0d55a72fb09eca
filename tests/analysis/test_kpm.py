"""Density of states by polynomials against that of all eigenvalues."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.linalg import eigh

from conftest import hafnia, model_hamiltonian
from hamscale.analysis import kpm
from hamscale.cli import main
from hamscale.files import read_table
from hamscale.operators import write_operators


@pytest.fixture(scope="module")
def operators(szv):
    return model_hamiltonian(hafnia(0).repeat((2, 1, 1)), szv)


def test_matrices_are_those_of_the_gamma_point(operators, monkeypatch):
    monkeypatch.setattr(kpm, "ATOMS_AT_ONCE", 5)
    for sparse, dense in zip(kpm.gamma_matrices(operators), operators.at_k((0, 0, 0))):
        np.testing.assert_allclose(sparse.toarray(), dense, atol=1e-13)


def test_it_is_the_dense_one_within_its_error(operators):
    H, S = kpm.gamma_matrices(operators)
    found = kpm.moments(H, S, 60, vectors=40)
    levels = eigh(H.toarray(), S.toarray(), eigvals_only=True)
    x = (levels - found.centre) / found.half
    assert np.abs(x).max() < 1
    exact = kpm.Moments(np.cos(np.multiply.outer(np.arange(60), np.arccos(x))).sum(1)[None], found.centre, found.half)
    energies = np.linspace(levels[0], levels[-1], 50)
    (density, error), (expected, _) = found.density_of_states(energies), exact.density_of_states(energies)
    assert np.mean(np.abs(density - expected) < 2 * error) > 0.8
    assert (np.abs(density - expected) < 6 * error).all()
    assert error.mean() < 0.2 * expected.mean()


def test_it_integrates_to_two_per_orbital_and_levels_are_narrow(operators):
    H, S = kpm.gamma_matrices(operators)
    found = kpm.moments(H, S, 60, vectors=2)
    energies = found.centre + found.half * np.linspace(-0.9999, 0.9999, 20001)
    density, _ = found.density_of_states(energies)
    assert np.trapezoid(density, energies) == pytest.approx(2 * operators.n_orbitals, rel=2e-3)
    one = kpm.Moments(np.cos(np.arange(200) * np.pi / 2)[None], 0.0, 1.0).density_of_states(np.linspace(-0.2, 0.2, 801))[0]
    width = (one * np.linspace(-0.2, 0.2, 801) ** 2).sum() / one.sum()
    assert width**0.5 == pytest.approx(np.pi / 200, rel=0.05)


def test_an_overlap_that_is_not_positive_definite_is_refused(operators):
    H, S = kpm.gamma_matrices(operators)
    smallest = np.linalg.eigvalsh(S.toarray())[0]
    with pytest.raises(ValueError, match="not positive definite"):
        kpm.moments(H, (S - 2 * smallest * sp.identity(S.shape[0])).tocsr(), 10)


def test_the_verb_writes_a_table_with_errors(operators, tmp_path, capsys):
    write_operators(tmp_path / "o.h5", operators)
    assert main(["dos", str(tmp_path / "o.h5"), "--moments", "80", "--vectors", "3", "--out", str(tmp_path / "dos.csv")]) == 0
    table, about = read_table(tmp_path / "dos.csv"), json.loads(capsys.readouterr().out.splitlines()[-1])
    assert about["orbitals"] == operators.n_orbitals
    assert about["states"] == pytest.approx(2 * operators.n_orbitals, rel=1e-2)
    below = table[table["energy_ev"] <= 0]
    assert np.trapezoid(below["states_per_ev"], below["energy_ev"]) == pytest.approx(operators.n_electrons, rel=0.02)
    assert (table["standard_error_states_per_ev"] > 0).mean() > 0.9
    assert main(["dos", str(tmp_path / "o.h5"), "--vectors", "1", "--out", str(tmp_path / "one.csv")]) == 1
    assert "one vector has no error" in capsys.readouterr().err
