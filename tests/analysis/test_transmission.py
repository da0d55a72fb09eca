import numpy as np
import pytest
from ase import Atoms
from scipy.linalg import eigh
from scipy.special import expit

from hamscale.analysis import transmission
from hamscale.operators import Operators
from hamscale.pairs import PairList
from hamscale.units import BOLTZMANN_IN_HARTREE_PER_KELVIN, hartree_to_ev
from helpers import basis_of, magnetic


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
    assert found.conductances() == {"fermi_level": pytest.approx(1, abs=1e-3)}
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
    assert transmission.transport_grid(sheet, 0, None) == (round(640 / a), round(40 / b), 1)
    assert transmission.transport_grid(chain, 2, None) == (1, 1, round(640 / 3))


def test_an_axis_that_is_not_periodic_and_too_few_points_are_refused(sheet):
    with pytest.raises(ValueError, match="the axis of transport is c, but the structure is periodic along XY"):
        transmission.of_bands(sheet, "c")
    with pytest.raises(ValueError, match="the axis of transport is 'z', expected a, b or c"):
        transmission.of_bands(sheet, "z")
    with pytest.raises(ValueError, match="3 points along the axis of transport, expected 4 or more"):
        transmission.of_bands(sheet, "a", (3, 3, 1))
