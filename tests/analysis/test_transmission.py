import json
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from scipy.linalg import eigh
from scipy.special import expit

from hamscale import api
from hamscale.analysis import greens, transmission
from hamscale.analysis.spectra import compare_spectra
from hamscale.analysis.transmission_tables import transmission_summary, transmission_table
from hamscale.cli import main
from hamscale.config import Analysis, Transmission, Transport
from hamscale.files import facts, read_table
from hamscale.operators import Operators
from hamscale.pairs import PairList
from hamscale.units import BOLTZMANN_IN_HARTREE_PER_KELVIN, ev_to_hartree, hartree_to_ev, mev_to_hartree
from helpers import basis_of, magnetic, written


@pytest.fixture(scope="module")
def chain() -> Operators:
    """A chain of hydrogen along c: e(q) = -0.2 cos(2 pi q) / (1 + 0.4 cos(2 pi q)), from -1/7 to 1/3 Hartree."""
    atoms = Atoms("H", cell=[8, 8, 3], pbc=(False, False, True))
    pairs = PairList(atoms, [[0, 0, 0, 0, R] for R in (-1, 0, 1)])
    H, S = np.array([-0.1, 0.0, -0.1]), np.array([0.2, 1.0, 0.2])
    return Operators(atoms, basis_of(H="SZV-MOLOPT-GTH"), pairs, H, S)


def counted_slowly(operators: Operators, axis: int, counts: tuple[int, int, int], energies: np.ndarray) -> np.ndarray:
    """All points of the grid one by one, none left out for time reversal: the mean over the lines of the bands that rise."""
    result = np.zeros((operators.spins, len(energies)))
    along = np.eye(3, dtype=int)[axis]
    lines = [index for index in np.ndindex(*counts) if index[axis] == 0]
    for spin in range(operators.spins):
        for line in lines:
            points = [(np.array(line) + along * q) / counts for q in [*range(counts[axis]), 0]]
            bands = [eigh(*operators.at_k(k, spin), eigvals_only=True) for k in points]
            for before, after in zip(bands, bands[1:]):
                result[spin] += ((before[:, None] < energies) & (energies <= after[:, None])).sum(0)
    return result / len(lines)


@pytest.mark.parametrize("axis", [0, 1])
def test_bands_that_rise_are_those_of_all_points_counted_one_by_one(solid, axis):
    counts = (4, 3, 2 if solid.atoms.pbc[2] else 1) if axis == 0 else (3, 5, 1)
    lines = transmission.band_lines(solid, axis, counts[axis], *transmission.lines_across(counts, axis))
    energies = np.linspace(lines.energies.min() - 0.05, lines.energies.max() + 0.05, 203)
    np.testing.assert_allclose(lines.transmission(energies), counted_slowly(solid, axis, counts, energies), atol=1e-12)


def test_each_spin_is_counted_and_t_is_their_mean(sheet):
    both = magnetic(sheet)
    found = transmission.of_bands(both, "a", (8, 3, 1), window_ev=15, points=200)
    np.testing.assert_allclose(found.sharp, counted_slowly(both, 0, (8, 3, 1), found.energies), atol=1e-12)
    table = found.table()
    np.testing.assert_allclose(table["transmission"], (table["transmission_up"] + table["transmission_down"]) / 2)
    assert np.abs(table["transmission_up"] - table["transmission_down"]).max() > 0.1


def test_a_chain_transmits_within_its_band(chain):
    """Half filled, it is a metal with its Fermi level at e(1/4) = 0, where a mode is open."""
    found = transmission.of_bands(chain, window_ev=hartree_to_ev(0.5), points=400, kgrid=(1, 1, 400))
    assert found.levels.metal
    assert found.conductances() == {"transmission_fermi_level": pytest.approx(1, abs=1e-3)}
    inside = (found.energies > -1 / 7) & (found.energies <= 1 / 3)
    np.testing.assert_array_equal(found.sharp[0], inside)


def test_smearing_is_the_integral_over_the_steps(chain):
    """A step from zero to one at e, smeared, is the Fermi function of e about the energy."""
    energies, width = np.linspace(-0.2, 0.4, 100), 600 * BOLTZMANN_IN_HARTREE_PER_KELVIN
    lines = transmission.band_lines(chain, 2, 400, *transmission.lines_across((1, 1, 400), 2))
    expected = expit((energies + 1 / 7) / width) - expit((energies - 1 / 3) / width)
    np.testing.assert_allclose(lines.smeared(energies, 600.0)[0], expected, atol=3e-4)


def test_smearing_keeps_the_integral_of_samples():
    edges = np.linspace(-1, 1, 401)
    means = np.where(np.abs(edges[1:] - 0.0025) < 0.3, 2.0, 0.0)[None]
    found = transmission.smear(edges, edges, means, 1000.0)
    assert np.trapezoid(found[0], edges) == pytest.approx(means.sum() * 0.005, rel=1e-3)


def test_points_along_a_closed_line_count_once(chain):
    """An even and an odd number of points, halved by time reversal, are those of the whole line."""
    for N in (5, 6):
        lines = transmission.band_lines(chain, 2, N, *transmission.lines_across((1, 1, N), 2))
        cosine = np.cos(2 * np.pi * np.arange(N) / N)
        np.testing.assert_allclose(lines.energies[0, 0, :, 0], -0.2 * cosine / (1 + 0.4 * cosine), atol=1e-12)


def test_default_grid_follows_the_cell(sheet, chain):
    a, b, _ = sheet.atoms.cell.lengths()
    assert transmission.transport_grid(sheet.atoms, 0, None) == (round(640 / a), round(40 / b), 1)
    assert transmission.transport_grid(chain.atoms, 2, None) == (1, 1, round(640 / 3))


def test_an_axis_that_is_not_periodic_and_too_few_points_are_refused(sheet):
    with pytest.raises(ValueError, match="the axis of transport is c, but the structure is periodic along XY"):
        transmission.of_bands(sheet, "c")
    with pytest.raises(ValueError, match="the axis of transport is 'z', expected a, b or c"):
        transmission.of_bands(sheet, "z")
    with pytest.raises(ValueError, match="a grid of k with 3 points along the axis of transport, expected 4 or more"):
        transmission.of_bands(sheet, "a", (3, 3, 1))


def test_the_command_writes_what_python_computes(chain, tmp_path, capsys):
    path = written(tmp_path, chain.repeat((1, 1, 5)))
    options = ["transmission", str(path), "--kgrid", "1", "1", "200", "--points", "50", "--out", str(tmp_path / "t.csv")]
    for leads in (None, (1, 1)):
        assert main([*options, *(["--leads", *map(str, leads)] if leads else [])]) == 0
        told = json.loads(capsys.readouterr().out)
        expected = api.read_operators(path).transmission(leads=leads, kgrid=(1, 1, 200), points=50)
        np.testing.assert_allclose(read_table(tmp_path / "t.csv"), expected.table(), rtol=1e-5, atol=1e-6)
        assert told["transmission_fermi_level"] == pytest.approx(1, abs=0.02)
        assert told["gap_ev"] == 0
        assert told["smallest_overlap_eigenvalue"] == pytest.approx(0.6, abs=0.1)
        assert told["suspect_states"] == 0
        assert facts(tmp_path / "t.csv")["method"] == told["method"] == ("Green's functions" if leads else "bands")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--axis", "c"], "the axis of transport is c, but the structure is periodic along XY. Choose"),
        (["--axis", "a", "--kgrid", "8", "0", "1"], "--kgrid is 0, expected more than zero"),
        (
            ["--axis", "a", "--leads", "1", "1"],
            "leads of 1 and 1 atoms, expected one or more each, and others of the 2 between",
        ),
    ],
)
def test_what_the_command_refuses_it_refuses_in_a_line(sheet, tmp_path, capsys, options, message):
    assert main(["transmission", str(written(tmp_path, sheet)), *options, "--out", str(tmp_path / "t.csv")]) == 1
    assert not (tmp_path / "t.csv").exists()
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.fixture(scope="module")
def raised(si8) -> Operators:
    """Silicon whose H is 100 meV times S higher, and 2 % larger."""
    return replace(si8, hamiltonian=1.02 * si8.hamiltonian + mev_to_hartree(100.0) * si8.overlap)


def test_errors_are_relative_to_dft_after_the_shift_of_eigenvalues(si8, raised):
    analysis = Analysis(kgrid=(2, 2, 1), transmission=Transmission(kgrid=(2, 1, 40), window_ev=3, points=200))
    c = compare_spectra(si8, raised, si8, analysis)
    table = transmission_table((si8, raised, si8), c, analysis, None)
    energies = ev_to_hartree(table["energy_ev"].to_numpy()) + c.edge
    lines = transmission.band_lines(raised, 2, 40, *transmission.lines_across((2, 1, 40), 2))
    np.testing.assert_allclose(table["predicted"], lines.smeared(energies - c.shifts[0], 300.0)[0], atol=1e-9)
    np.testing.assert_allclose(table["baseline"], table["dft"], atol=1e-9)
    found = transmission_summary(table, c)
    assert found["transmission_error"] == pytest.approx(np.abs(table["predicted"] - table["dft"]).sum() / table["dft"].sum())
    assert 0.01 < found["transmission_error"] < 1
    assert found["baseline_transmission_error"] < 1e-9
    assert found["transmission_valence_edge_dft"] > 0.01
    assert found["transmission_mid_gap_dft"] < 1e-3


def test_a_structure_declared_a_device_is_compared_by_greens_functions(si8, raised):
    dft, predicted = si8.repeat((1, 1, 9)), raised.repeat((1, 1, 9))
    analysis = Analysis(kgrid=(1, 1, 1), transmission=Transmission(window_ev=1, points=6))
    c = compare_spectra(dft, predicted, dft, analysis)
    table = transmission_table((dft, predicted, dft), c, analysis, Transport(axis="c", leads=(24, 24), kgrid=(1, 1, 1)))
    energies = ev_to_hartree(table["energy_ev"].to_numpy()) + c.edge
    expected = greens.of_device(predicted, "c", (24, 24), (1, 1, 1), energies=energies - c.shifts[0])
    np.testing.assert_allclose(table["predicted"], expected.smeared[0], atol=1e-9)


def test_no_table_where_none_is_asked_for(si8):
    analysis = Analysis(kgrid=(1, 1, 1))
    assert transmission_table((si8, si8, si8), compare_spectra(si8, si8, si8, analysis), analysis, None) is None
