"""Band edges and Fermi levels of bands that are known, and what files keep of them."""

from dataclasses import replace

import numpy as np
import pytest

from hamscale.analysis.levels import UNKNOWN, fermi_level, levels_on_grid, occupations
from hamscale.analysis.spectra import eigenvalues, find_levels, k_grid
from hamscale.config import Analysis
from hamscale.operators import read_operators, store_levels
from hamscale.units import BOLTZMANN_IN_HARTREE_PER_KELVIN, ev_to_hartree, hartree_to_ev
from helpers import written

GRID = Analysis(kgrid=(3, 2, 1))


def test_edges_of_an_insulator_are_over_all_kpoints():
    energies = np.array([[0.0, 1.0, 3.0], [0.2, 1.5, 2.0]])
    levels = levels_on_grid(energies, np.array([0.5, 0.5]), 4, 300.0, (2, 1, 1))
    assert (levels.metal, levels.valence_band_maximum, levels.conduction_band_minimum) == (False, 1.5, 2.0)
    assert levels.gap == pytest.approx(0.5)
    assert levels.mid_gap == levels.fermi_level == pytest.approx(1.75)
    assert levels.kgrid == (2, 1, 1)
    np.testing.assert_array_equal(occupations(energies, levels, 300.0), [[1, 1, 0], [1, 1, 0]])


def _chain(k, t=0.1):
    """A band of a chain of atoms, -2 t cos(2 pi k)."""
    return -2 * t * np.cos(2 * np.pi * k)


@pytest.mark.parametrize(("electrons", "expected"), [(1, 0.0), (0.5, -0.2 * np.cos(np.pi / 4))])
def test_the_fermi_level_of_a_chain_is_where_its_band_is_filled_to(electrons, expected):
    k = (np.arange(4000) + 0.5) / 4000
    found = fermi_level(_chain(k)[:, None], np.full(4000, 1 / 4000), electrons, 30.0)
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_odd_electron_and_bands_that_overlap_make_a_metal():
    k = (np.arange(400) + 0.5) / 400
    weights = np.full(400, 1 / 400)
    half_filled = levels_on_grid(_chain(k)[:, None], weights, 1, 300.0)
    overlapping = levels_on_grid(np.stack([_chain(k), 0.3 + _chain(k)], 1), weights, 2, 300.0)
    apart = levels_on_grid(np.stack([_chain(k), 0.5 + _chain(k)], 1), weights, 2, 300.0)
    assert [levels.metal for levels in (half_filled, overlapping, apart)] == [True, True, False]
    assert half_filled.gap == overlapping.gap == 0
    assert np.isnan(overlapping.valence_band_maximum)
    # density of states of a chain, two spins: 1 / (pi t sin(2 pi k_F)) per unit of energy, k_F = 1/4
    assert half_filled.states_at_fermi_level_per_ev == pytest.approx(1 / (np.pi * hartree_to_ev(0.1)), rel=0.02)
    assert apart.states_at_fermi_level_per_ev == 0


def test_the_fermi_function_fills_a_metal_at_its_temperature():
    energies = ev_to_hartree(np.linspace(-1, 1, 21))[None]
    levels = levels_on_grid(energies, np.ones(1), 21, 1000.0)
    share = occupations(energies, levels, 1000.0)
    x = (energies - levels.fermi_level) / (BOLTZMANN_IN_HARTREE_PER_KELVIN * 1000.0)
    np.testing.assert_allclose(share, 1 / (1 + np.exp(x)), rtol=1e-12)
    assert hartree_to_ev(BOLTZMANN_IN_HARTREE_PER_KELVIN * 300) == pytest.approx(0.02585, abs=1e-5)


def test_levels_of_operators_are_those_of_their_eigenvalues(si8):
    levels, energies = find_levels(si8, GRID), eigenvalues(si8, k_grid(GRID.kgrid)[0])
    n = si8.n_electrons // 2
    assert levels.valence_band_maximum == energies[:, n - 1].max()
    assert levels.conduction_band_minimum == energies[:, n].min()


def test_a_file_has_places_for_levels_that_are_found_later(si8, tmp_path):
    dft = si8
    levels = find_levels(dft, GRID)
    of_clusters = replace(levels, kgrid=(0, 0, 0), clusters=40)
    path = written(tmp_path, replace(dft, attributes=dft.attributes | UNKNOWN))
    assert store_levels(path, of_clusters.attributes())
    assert store_levels(path, replace(of_clusters, clusters=80).attributes())  # more clusters know better
    assert read_operators(path).attributes["levels_clusters"] == 80
    assert store_levels(path, levels.attributes())
    assert not store_levels(path, of_clusters.attributes())  # a grid knows best
    back = read_operators(path).attributes
    assert back["mid_gap_hartree"] == levels.mid_gap
    assert back["levels_kgrid"].tolist() == [3, 2, 1]
    assert np.array_equal(read_operators(path).hamiltonian, dft.hamiltonian)


def test_a_file_without_places_stays_as_it_is(dft, tmp_path):
    path = written(tmp_path, dft)
    before = path.read_bytes()
    assert not store_levels(path, find_levels(dft, GRID).attributes())
    assert path.read_bytes() == before
