from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import eigh

from hamscale.analysis import spectra
from hamscale.config import Analysis
from hamscale.units import hartree_to_ev, mev_to_hartree
from helpers import model_hamiltonian, rotated

ANALYSIS = Analysis(kgrid=(2, 2, 1), band_points=12)


def test_eigenvalues_are_those_of_the_summed_images(dft):
    k = np.array([0.1, -0.3, 0.25])
    H, S = (
        sum(np.exp(2j * np.pi * (k @ np.array(R))) * M.toarray() for R, M in dft.csr(v).items())
        for v in (dft.hamiltonian, dft.overlap)
    )
    np.testing.assert_allclose(spectra.eigenvalues(dft, k)[0], eigh(H, S, eigvals_only=True), atol=1e-12)


def test_eigenvalues_do_not_turn_with_the_structure(dft, szv, rotation):
    turned = model_hamiltonian(rotated(dft.atoms, rotation), szv)
    k = [(0.1, 0.2, 0.3)]
    np.testing.assert_allclose(spectra.eigenvalues(dft, k), spectra.eigenvalues(turned, k), atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (3, 2, 1), (4, 3, 5)])
def test_grid_of_half_the_points_gives_the_mean_over_all(size):
    """Of any function that is even in k, as energies are."""
    energy = lambda k: np.cos(2 * np.pi * k @ [1, 2, -1]) + np.cos(2 * np.pi * k[..., 0]) ** 3  # noqa: E731
    points, weights = spectra.k_grid(size)
    full = np.stack(np.meshgrid(*[np.arange(n) / n for n in size], indexing="ij"), -1).reshape(-1, 3)
    assert weights.sum() == pytest.approx(1)
    assert (energy(points) * weights).sum() == pytest.approx(energy(full).mean())
    assert np.abs(points).max() <= 0.5


def test_one_shift_is_taken_out(dft):
    shifted = replace(dft, hamiltonian=dft.hamiltonian + mev_to_hartree(200.0) * dft.overlap)
    comparison = spectra.compare_spectra(dft, shifted, dft, ANALYSIS)
    assert comparison.shifts[0] == pytest.approx(-mev_to_hartree(200.0))
    summary = spectra.spectral_summary(comparison)
    assert summary["eigenvalue_mae_mev_occupied"] < 1e-8
    assert abs(summary["gap_error_mev"]) < 1e-8


def test_gap_and_occupied_error_done_slowly(si8):
    dft, predicted = si8, replace(si8, hamiltonian=si8.hamiltonian * 1.01)
    points, _ = spectra.k_grid(ANALYSIS.kgrid)
    a, b = (np.array([eigh(*o.at_k(k), eigvals_only=True) for k in points]) for o in (dft, predicted))
    n = dft.n_electrons // 2
    shift = np.median(a[:, :n] - b[:, :n])
    summary = spectra.spectral_summary(spectra.compare_spectra(dft, predicted, dft, ANALYSIS))
    assert summary["eigenvalue_mae_mev_occupied"] == pytest.approx(
        np.abs(a[:, :n] - b[:, :n] - shift).mean() / mev_to_hartree(1)
    )
    assert summary["gap_dft_ev"] == pytest.approx(hartree_to_ev(a[:, n].min() - a[:, n - 1].max()))


def test_density_of_states_holds_two_electrons_per_state(dft):
    comparison = spectra.compare_spectra(dft, dft, dft, ANALYSIS)
    energies = hartree_to_ev(comparison.dft)
    grid = np.linspace(energies.min() - 2, energies.max() + 2, 20000)
    dos = spectra.density_of_states(energies, comparison.weights, grid)
    assert np.trapezoid(dos, grid) == pytest.approx(2 * dft.n_orbitals, rel=1e-6)


def test_bands_at_gamma_are_the_eigenvalues_there(dft):
    comparison = spectra.compare_spectra(dft, dft, dft, ANALYSIS)
    table = spectra.bands_table(dft, dft, dft, comparison, ANALYSIS)
    x = table[table["label"].str.contains("G")]["x_per_angstrom"].iloc[0]
    gamma = table[(table["x_per_angstrom"] == x) & (table["label"] != "")].iloc[: dft.n_orbitals]
    expected = hartree_to_ev(spectra.eigenvalues(dft, (0, 0, 0))[0] - comparison.edge)
    np.testing.assert_allclose(np.sort(gamma["dft_ev"]), expected, atol=1e-9)
    assert not table.duplicated(["segment", "x_per_angstrom", "band"]).any()


def test_an_overlap_cut_too_short_is_told(dft):
    near = dft.select(dft.pairs.distances < 3.0)
    with pytest.raises(ValueError, match="not positive definite .*S must reach as far as the basis"):
        spectra.eigenvalues(near, (0, 0, 0))
