"""Mean potentials of slabs: what a wave of potential adds, and what does not count."""

from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk

from hamscale.analysis.slabs import atom_potentials, slab_errors, slab_table
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference
from hamscale.units import ev_to_hartree
from helpers import SZV, basis_of, hafnia, model_hamiltonian, rattled


@pytest.fixture(scope="module")
def long(szv):
    """Six cells of disordered hafnia."""
    return model_hamiltonian(rattled(hafnia(0).repeat((1, 1, 6)), 1, 0.05), szv)


def with_potential(operators, v):
    """H + 1/2 (v_i + v_j) S: an electrostatic potential that varies slowly."""
    of_pair = (v[operators.pairs[:, 0]] + v[operators.pairs[:, 1]]) / 2
    return replace(
        operators, hamiltonian=operators.hamiltonian + np.repeat(of_pair, np.diff(operators.offsets)) * operators.overlap
    )


def test_a_potential_moves_the_potential_of_atoms_by_itself(long):
    v = np.random.default_rng(0).normal(0, 0.01, len(long.atoms))
    np.testing.assert_allclose(atom_potentials(with_potential(long, v)) - atom_potentials(long), v, atol=1e-12)


def test_a_wave_is_seen_slab_by_slab(long):
    z = long.atoms.cell.scaled_positions(long.atoms.positions)[:, 2] % 1
    v = ev_to_hartree(0.3 * np.sin(2 * np.pi * z))
    table = slab_table(long, with_potential(long, v), long, 3.6)
    assert len(table) == 6
    expected = [0.3 * np.sin(2 * np.pi * z[(z * 6).astype(int) == k]).mean() for k in range(6)]
    expected -= 0.3 * np.sin(2 * np.pi * z).mean()
    np.testing.assert_allclose(table["predicted_ev"] - table["dft_ev"], expected, atol=1e-12)
    np.testing.assert_allclose(table["baseline_ev"], table["dft_ev"], atol=1e-12)
    assert table["atoms"].sum() == len(long.atoms)
    assert slab_errors(table)["slab_error_ev"] == pytest.approx(np.abs(expected).max())
    assert slab_errors(table)["baseline_slab_error_ev"] == pytest.approx(0, abs=1e-12)


def test_a_shift_and_the_mean_of_an_element_do_not_count(long):
    v = np.where(long.atoms.numbers == 8, 0.2, 0.2)
    table = slab_table(long, with_potential(long, v), long, 3.6)
    np.testing.assert_allclose(table["predicted_ev"], table["dft_ev"], atol=1e-12)
    # the same potential on all atoms of an element, of DFT and of the prediction alike
    of_element = np.where(long.atoms.numbers == 8, 0.1, -0.3)
    moved = slab_table(with_potential(long, of_element), with_potential(long, of_element), long, 3.6)
    np.testing.assert_allclose(moved["dft_ev"], table["dft_ev"], atol=1e-10)


def test_a_short_cell_and_a_molecule_are_one_slab(dft, water):
    for operators in (dft, water):
        table = slab_table(operators, operators, operators, 5.5)
        assert len(table) == 1
        assert table["atoms"].iloc[0] == len(operators.atoms)
        assert np.isnan(slab_errors(table)["slab_error_ev"])


def test_the_reference_of_short_cells_has_no_false_potential_in_a_long_one():
    """A crystal of one element, whose charges no fit may invent: a device of nine cells whose middle is displaced.

    With a charge fitted to silicon the potential of its slabs was wrong by more than one eV.
    """
    basis = basis_of(Si=SZV)
    unit = bulk("Si", "diamond", a=5.431, cubic=True)
    reference = fit_reference([model_hamiltonian(rattled(unit, seed), basis) for seed in range(6)], 6.0)
    assert reference.crystal_field.charges.shape == (1, 0)
    atoms = unit.repeat((1, 1, 9))
    middle = np.arange(24, 48)
    atoms.positions[middle] += np.random.default_rng(0).normal(0, 0.1, (24, 3))
    exact = model_hamiltonian(rattled(atoms, 0, 0.0), basis)
    graph = structure_graph(exact.atoms, basis, reference.cutoff_angstrom)
    predicted = BlockCodec(reference).decode(graph, {}, {}).operators()
    table = slab_table(exact, predicted, predicted, 5.5)
    assert len(table) == 9
    assert slab_errors(table)["slab_error_ev"] < 0.1
    assert table["dft_ev"].abs().max() > 0.1  # there is something to see
