"""States along directions that S nearly misses: the floor of DFT, and a prediction that is lifted to it in real space."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from ase import Atoms

from hamscale.graph.codec import BlockCodec
from hamscale.graph.lifting import LOW, Lifted, find_floor, lift, low_states
from hamscale.graph.reference import fit_reference, read_reference, write_reference
from hamscale.units import ev_to_hartree, hartree_to_ev, hartree_to_mev
from helpers import DZVP, basis_of, hafnia, model_hamiltonian

RANDOM = np.random.default_rng(4).random((5, 3))


@pytest.fixture(scope="module")
def dft():
    """Gallium in DZVP, whose S has eigenvalues of 0.005."""
    atoms = Atoms("Ga2", [(0.1, 0, 0), (1.2, 1.9, 1.3)], cell=[4.5, 4.6, 4.7], pbc=True)
    return model_hamiltonian(atoms, basis_of(Ga=DZVP))


@pytest.fixture(scope="module")
def predicted(dft):
    """With errors of 30 meV in elements of near atoms, less with distance, Hermitian."""
    noise = np.random.default_rng(0).normal(0, ev_to_hartree(0.03), len(dft.hamiltonian))
    noise *= np.repeat(np.exp(-((dft.pairs.distances / 3) ** 2)), np.diff(dft.offsets))
    return replace(dft, hamiltonian=dft.hamiltonian + (noise + dft.transposed(noise)) / 2)


def direct(H, S, floor):
    """H(k) with the lifts of the definition, by a loop over states."""
    s, U = np.linalg.eigh(S)
    U, s = U[:, s < LOW], s[s < LOW]
    energies, c = scipy.linalg.eigh(U.conj().T @ H @ U, np.diag(s))
    for n, e in enumerate(energies):
        if e < floor:
            w = S @ (U @ c[:, n])
            H = H + (floor - e) * np.outer(w, w.conj())
    return H


def lowest(operators, kpoints=RANDOM):
    return min(low_states(*operators.at_k(k))[0][0] for k in kpoints)


def test_low_states_are_normed_by_s_and_lie_in_its_low_directions(dft):
    H, S = dft.at_k(RANDOM[0])
    energies, w = low_states(H, S)
    assert len(energies) == (np.linalg.eigvalsh(S) < LOW).sum() > 1
    np.testing.assert_allclose(w.conj().T @ S @ w, np.eye(len(energies)), atol=1e-9)
    np.testing.assert_allclose(w.conj().T @ H @ w, np.diag(energies), atol=1e-9)
    assert (np.square(np.abs(w)).sum(0) > 1 / LOW).all()


def test_the_floor_is_the_lowest_of_the_training_structures_on_the_zero_of_predictions(dft, tmp_path):
    other = model_hamiltonian(Atoms("Ga2", [(0.1, 0, 0), (1.3, 1.9, 1.3)], cell=dft.atoms.cell, pbc=True), dft.basis)
    moved = replace(other, hamiltonian=other.hamiltonian + 0.7 * other.overlap)  # DFT of another zero
    reference = fit_reference([dft, moved], 4.0)
    gauges = [BlockCodec(reference).encode(o).attributes["gauge_hartree"] for o in (dft, moved)]
    assert gauges[1] - gauges[0] == pytest.approx(0.7, abs=0.05)
    expected = min(find_floor(o, gauge) for o, gauge in zip((dft, moved), gauges))
    assert reference.floor_hartree == pytest.approx(expected, abs=1e-9)
    write_reference(tmp_path / "reference.h5", reference)
    assert read_reference(tmp_path / "reference.h5").floor_hartree == reference.floor_hartree


def test_a_basis_without_such_directions_has_no_floor_and_is_left_alone(szv):
    operators = model_hamiltonian(hafnia(), szv)
    assert find_floor(operators) == np.inf
    same, done = lift(operators, 0.0)
    assert same is operators
    assert done == Lifted()


def test_errors_bring_states_down_and_the_lift_brings_them_back(dft, predicted):
    floor = lowest(dft, np.vstack([RANDOM, np.random.default_rng(9).random((20, 3))]))
    assert lowest(predicted) < floor - ev_to_hartree(0.3)
    lifted, done = lift(predicted, floor)
    assert lowest(lifted) > floor - 0.2 * (floor - lowest(predicted))  # between the points of the grid, too
    assert done.states > 1
    assert done.largest_ev > hartree_to_ev(floor - lowest(predicted)) / 2
    change = np.abs(lifted.hamiltonian - predicted.hamiltonian)
    assert done.mean_change_mev == pytest.approx(hartree_to_mev(change.mean()))
    assert done.mean_change_mev < 3  # smaller than the errors
    assert lifted.hermiticity_error()["hamiltonian"] < 1e-12


def test_in_real_space_it_is_the_lift_of_every_k(dft, predicted):
    """Nearly, between the points of the grid; what pairs beyond the reach of S would have is left out."""
    floor = lowest(dft)
    lifted, _ = lift(predicted, floor)
    for k in (*RANDOM, np.zeros(3)):
        H, S = predicted.at_k(k)
        wanted = direct(H, S, floor)
        assert np.abs(lifted.at_k(k)[0] - wanted).max() < 0.3 * np.abs(wanted - H).max()


def test_what_lies_above_the_floor_stays(dft):
    same, done = lift(dft, lowest(dft, np.random.default_rng(1).random((200, 3))) - 0.1)
    assert same is dft
    assert done.states == 0


def test_a_molecule_is_lifted_exactly():
    atoms = Atoms("Ga2", [(0.0, 0, 0), (1.2, 1.9, 1.3)])
    dft = model_hamiltonian(atoms, basis_of(Ga=DZVP))
    H, S = dft.at_k((0, 0, 0))
    floor = low_states(H, S)[0][0] + 0.3
    lifted, done = lift(dft, floor)
    np.testing.assert_allclose(lifted.at_k((0, 0, 0))[0], direct(H, S, floor), atol=1e-12)
    assert done.states >= 1
    assert done.largest_ev == pytest.approx(hartree_to_ev(0.3), rel=1e-6)
