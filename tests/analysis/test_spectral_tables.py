"""Spectra on grids that time reversal thins unevenly, levels of molecules, band paths; completes test_spectra.py."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene
from ase.dft.kpoints import parse_path_string

from hamscale.analysis.levels import levels_on_grid, occupations
from hamscale.analysis.spectra import (
    Comparison,
    analysis_grid,
    band_path,
    bands_table,
    compare_spectra,
    density_of_states,
    dos_table,
    eigenvalues,
    k_grid,
    spectral_summary,
)
from hamscale.config import Analysis
from hamscale.units import ev_to_hartree, hartree_to_mev
from helpers import model_hamiltonian

GRID = Analysis(kgrid=(3, 2, 1), band_points=12)


def perturbed(operators, seed=0, size=5e-3):
    noise = np.random.default_rng(seed).normal(0, size, len(operators.hamiltonian))
    return replace(operators, hamiltonian=operators.hamiltonian + (noise + operators.transposed(noise)) / 2)


def full_grid(size):
    return np.stack(np.meshgrid(*[np.arange(n) / n for n in size], indexing="ij"), -1).reshape(-1, 3)


def test_reduced_grid_averages_as_the_full_one(dft):
    points, weights = k_grid(GRID.kgrid)
    np.testing.assert_allclose(weights @ eigenvalues(dft, points), eigenvalues(dft, full_grid(GRID.kgrid)).mean(0), atol=1e-9)


def test_a_molecule_has_only_gamma(water):
    points, weights, counts = analysis_grid(water, GRID)
    assert points.tolist() == [[0, 0, 0]]
    assert (weights.tolist(), counts) == ([1], (0, 0, 0))


def test_a_constant_times_s_is_an_error_of_a_molecule(water):
    predicted = replace(water, hamiltonian=water.hamiltonian + 0.01 * water.overlap)
    summary = spectral_summary(compare_spectra(water, predicted, water, GRID))
    assert summary["eigenvalue_mae_mev_occupied"] == pytest.approx(hartree_to_mev(0.01), rel=1e-9)


def test_states_are_filled_by_pairs_of_valence_electrons(si8, water):
    for operators, electrons in ((water, 6 + 1 + 1), (si8, 8 * 4)):
        share = compare_spectra(operators, operators, operators, GRID).occupations
        np.testing.assert_array_equal(share.sum(1), electrons // 2)
        assert set(np.unique(share)) == {0, 1}


def test_density_of_states_is_a_sum_of_gaussians():
    energies, weights, grid = np.array([[0.0, 1.0], [0.5, 2.0]]), np.array([0.25, 0.75]), np.linspace(-1, 3, 7)
    expected = [
        sum(
            2 * w * np.exp(-0.5 * ((x - e) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
            for row, w in zip(energies, weights)
            for e in row
        )
        for x in grid
    ]
    np.testing.assert_allclose(density_of_states(energies, weights, grid, 0.3), expected, rtol=1e-12)


def test_energies_of_tables_are_from_the_valence_band_maximum(si8):
    dft = si8
    c = compare_spectra(dft, perturbed(dft), dft, GRID)
    points, _ = k_grid(GRID.kgrid)
    assert c.edge == eigenvalues(dft, points)[:, : dft.n_electrons // 2].max()
    density = dos_table(c)
    assert (density["dft_states_per_ev"] == density["baseline_states_per_ev"]).all()
    assert not np.allclose(density["dft_states_per_ev"], density["predicted_states_per_ev"])


def test_levels_of_a_molecule_stand_at_x_zero(water):
    table = bands_table(water, water, water, compare_spectra(water, water, water, GRID), GRID)
    assert len(table) == water.n_orbitals
    assert (table["x_per_angstrom"] == 0).all()
    np.testing.assert_array_equal(table["dft_ev"], table["predicted_ev"])


def test_summary_is_of_the_shifted_energies():
    dft, predicted = np.array([[0.0, 1.0, 3.0]]), np.array([[0.1, 0.9, 3.5]])
    levels = tuple(levels_on_grid(e, np.ones(1), 4, 300.0) for e in (dft, predicted, dft))
    summary = spectral_summary(Comparison(dft, predicted, dft, np.ones(1), np.array([[1.0, 1.0, 0.0]]), levels, (0.0, 0.0)))
    assert summary["eigenvalue_mae_mev_occupied"] == pytest.approx(hartree_to_mev(0.1))
    assert summary["gap_error_mev"] == pytest.approx(hartree_to_mev(0.6))
    assert summary["baseline_eigenvalue_mae_mev_occupied"] == 0
    assert not summary["metal_dft"]
    assert np.isnan(summary["fermi_level_dft_ev"])


def test_a_metal_has_no_gap_and_its_states_count_as_much_as_they_are_filled():
    """Two bands that overlap: one electron more or less in each, by the Fermi function."""
    dft = ev_to_hartree(np.array([[0.0, 0.4], [0.5, 0.9]]))
    weights = np.array([0.5, 0.5])
    levels = levels_on_grid(dft, weights, 2, 1000.0)
    share = occupations(dft, levels, 1000.0)
    assert 2 * weights @ share.sum(1) == pytest.approx(2, abs=1e-9)
    predicted = dft + ev_to_hartree(np.array([[0.0, 0.0], [0.1, 0.2]]))
    summary = spectral_summary(Comparison(dft, predicted, dft, weights, share, (levels,) * 3, (0.0, 0.0)))
    assert summary["metal_dft"]
    assert summary["gap_dft_ev"] == 0
    expected = 1000 * (0.1 * share[1, 0] + 0.2 * share[1, 1]) / share.sum()
    assert summary["eigenvalue_mae_mev_occupied"] == pytest.approx(expected, rel=1e-9)
    assert summary["fermi_level_dft_ev"] == 0  # the zero of the tables of a metal
    assert summary["states_at_fermi_level_dft_per_ev"] > 0.1


def test_the_shift_makes_the_error_over_the_whole_grid_least(si8):
    """No other shift has less. A point that stands for k and -k counts twice; the reference has all points of the grid."""
    dft = si8
    predicted, n = perturbed(dft), dft.n_electrons // 2
    a, b = (eigenvalues(o, full_grid(GRID.kgrid))[:, :n] for o in (dft, predicted))
    c = compare_spectra(dft, predicted, dft, GRID)
    errors = [np.abs(b + shift - a).mean() for shift in (a - b).ravel()]
    assert np.abs(b + c.shifts[0] - a).mean() == pytest.approx(min(errors), rel=1e-9)
    expected = hartree_to_mev(min(errors))
    assert spectral_summary(c)["eigenvalue_mae_mev_occupied"] == pytest.approx(expected, rel=1e-9)


def test_a_special_point_that_strain_took_away_is_told(dft):
    """X, W and K are points of the cubic lattice; a strained cell is triclinic and has others."""
    cell = np.asarray(dft.atoms.cell) @ (np.eye(3) + np.random.default_rng(0).normal(0, 0.02, (3, 3)))
    strained = model_hamiltonian(Atoms(dft.atoms.numbers, dft.atoms.positions, cell=cell, pbc=True), dft.basis)
    analysis = Analysis(kgrid=(1, 1, 1), band_path="GXWK", band_points=6)
    c = compare_spectra(strained, strained, strained, analysis)
    with pytest.raises(
        ValueError, match="analysis.band_path is 'GXWK', but the lattice of this cell .* has the special points"
    ):
        bands_table(strained, strained, strained, c, analysis)


@pytest.mark.parametrize(
    ("atoms", "path", "end"),
    [
        (graphene("BN", vacuum=6), "GMKG", [0, 0, 0]),
        (Atoms("BN", cell=[[2.5, 0, 0], [0, 12, 0], [-1.25, 0, 2.5 * 0.75**0.5]], pbc=(1, 0, 1)), "GMKG", [0, 0, 0]),
        (Atoms("H", cell=[12, 12, 2], pbc=(0, 0, 1)), "GX", [0, 0, 0.5]),
    ],
    ids=["sheet", "sheet along a and c", "chain along c"],
)
def test_the_path_of_a_slab_or_a_wire_lies_where_it_is_periodic(atoms, path, end):
    kpoints, x, labels, _ = band_path(atoms, None, 20)
    assert "".join(labels) == path
    assert not kpoints[:, ~atoms.pbc].any()
    np.testing.assert_allclose(kpoints[-1], end, atol=1e-12)
    assert (np.diff(x) > 0).all()


@pytest.mark.parametrize("points", [5, 20, 60, 200])
@pytest.mark.parametrize("element", ["Si", "Zn", "Fe"], ids=["fcc", "hcp", "bcc"])
def test_a_path_breaks_only_where_it_jumps_however_few_points(element, points):
    """ASE's own axis takes short legs for jumps: fcc at 12 points had 5 breaks instead of one and 60 % of its length."""
    atoms = bulk(element)
    cell = atoms.cell
    special = cell.bandpath(None, npoints=0)
    parts = parse_path_string(special.path)
    kpoints, x, labels, segments = band_path(atoms, None, points)
    assert np.flatnonzero(np.diff(x) < 1e-9).tolist() == np.flatnonzero(np.diff(segments)).tolist()
    assert segments[-1] == len(parts) - 1
    step = np.linalg.norm(np.diff(2 * np.pi * kpoints @ cell.reciprocal(), axis=0), axis=1)
    inside = np.diff(segments) == 0
    np.testing.assert_allclose(np.diff(x)[inside], step[inside], atol=1e-9)
    for number, names in enumerate(parts):
        found = [(label, k) for label, k, s in zip(labels, kpoints, segments) if label and s == number]
        assert len(found) == len(names)
        for name, (label, k) in zip(names, found):
            assert name in label.split("|")
            np.testing.assert_allclose(k, special.special_points[name], atol=1e-12)
    assert abs(len(kpoints) - points) <= 2 * sum(map(len, parts))
