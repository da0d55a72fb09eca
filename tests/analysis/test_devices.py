"""Green's functions of devices against band counting, sisl, and formulas."""

from dataclasses import replace

import numpy as np
import pytest
import sisl
from ase import Atoms

from hamscale import api
from hamscale.analysis import greens, transmission
from hamscale.analysis.devices import assemble, cut
from hamscale.operators import Operators
from hamscale.pairs import PairList
from hamscale.units import ev_to_hartree, mev_to_hartree
from helpers import basis_of, magnetic


def away_from_extrema(lines: transmission.Lines, energies: np.ndarray, margin_ev: float) -> np.ndarray:
    """Energies of which no band has an extremum within a margin, on the lines."""
    e = lines.energies
    before, after = np.roll(e, 1, 2), np.roll(e, -1, 2)
    extrema = e[((e >= before) & (e >= after)) | ((e <= before) & (e <= after))]
    return np.abs(energies[:, None] - extrema).min(1) > ev_to_hartree(margin_ev)


@pytest.mark.parametrize(
    ("name", "axis", "counts", "lead", "kgrid"),
    [("magnetic si8", 2, (1, 1, 9), 3, (2, 1, 1)), ("dft", 0, (12, 1, 1), 4, (1, 2, 1))],
)
def test_copies_transmit_as_many_modes_as_bands_rise(request, name, axis, counts, lead, kgrid):
    """Within 1e-3 at energies that are 5 meV from extrema of bands; the leads are three or four cells."""
    operators = request.getfixturevalue(name.split()[-1])
    operators = magnetic(operators) if "magnetic" in name else operators
    atoms = lead * len(operators.atoms)
    lines = transmission.band_lines(operators, axis, 1500, *transmission.lines_across(kgrid, axis))
    energies = np.linspace(lines.energies.min(), lines.energies.max(), 5000)
    open_ones = energies[away_from_extrema(lines, energies, 5e-3) & (lines.transmission(energies).max(0) > 0.1)]
    energies = open_ones[:: len(open_ones) // 12]
    found = greens.of_device(operators.repeat(counts), "abc"[axis], (atoms, atoms), kgrid, energies=energies)
    np.testing.assert_allclose(found.sharp, lines.transmission(energies), atol=1e-3)
    assert found.about["beyond_neighbours_share"] < 1e-9
    assert found.about["leads_couple"] == "across the end of the cell"


@pytest.fixture(scope="module")
def barrier(si8) -> Operators:
    """Nine cells of silicon along c, of which the middle one is up to 2 eV higher, in the file of the user from 0 to L."""
    operators = si8.repeat((1, 1, 9))
    height = np.zeros(len(operators.atoms))
    height[32:40] = ev_to_hartree(np.linspace(0.5, 2.0, 8))
    i, j = operators.pairs[:, 0], operators.pairs[:, 1]
    raised = np.repeat((height[i] + height[j]) / 2, np.diff(operators.offsets))
    return replace(operators, hamiltonian=operators.hamiltonian + raised * operators.overlap)


def test_sisl_finds_the_same_transmission_of_a_barrier(si8, barrier):
    """Its self-energies of electrodes, and a dense Green's function, of the same H and S, to 1e-4."""
    k = [0.25, 0.25, 0]
    device = cut(barrier.atoms, barrier.pairs, 2, (24, 24))
    chain = assemble(barrier, device, np.array(k))
    electrode = api._with_methods(si8.repeat((1, 1, 3))).to_sisl()
    whole = api._with_methods(barrier).to_sisl()
    whole.set_nsc(c=1)
    left, right = (sisl.RecursiveSI(electrode, side, eta=greens.ETA_EV) for side in ("-C", "+C"))
    order = np.arange(electrode.no)
    transmitted: list[float] = []
    for energy in (-1.0, 0.5, 3.7, 5.0, 8.0):
        H, S = (getattr(whole, name)(k, format="array") for name in ("Hk", "Sk"))
        sigma = [np.zeros_like(H) for _ in range(2)]
        for found, side, place in zip(sigma, (left, right), (order, order + len(H) - len(order))):
            found[np.ix_(place, place)] = side.self_energy(energy, k)
        G = np.linalg.inv(energy * S - H - sigma[0] - sigma[1])
        of_left, of_right = (1j * (found - found.conj().T) for found in sigma)
        expected = np.trace(of_left @ G @ of_right @ G.conj().T).real
        transmitted.append(expected)
        found = greens.chain_transmission(chain, ev_to_hartree(greens.ETA_EV), ev_to_hartree(energy))
        assert found == pytest.approx(expected, abs=1e-4)
    assert 0.5 < min(transmitted[:4]) < 1


HOP, LEFT, MIDDLE, RIGHT = -0.1, 0.0, 0.03, 0.05  # Hartree


@pytest.fixture
def junction() -> Operators:
    """Chains of hydrogen, of two spacings and onsite energies, on both sides of an atom, and coupled across the cell's end."""
    z = [0.1, 3.1, 6.1, 9.1, 12.1, 15.3, 18.5, 21.7, 24.9]
    atoms = Atoms("H9", [(0, 0, height) for height in z], cell=[9, 9, 28], pbc=(False, False, True))
    onsite = [LEFT] * 4 + [MIDDLE] + [RIGHT] * 4
    blocks = {(i, i, 0): (energy, 1.0) for i, energy in enumerate(onsite)}
    blocks |= {(i, (i + 1) % 9, (i + 1) // 9): (HOP if i < 8 else 0.07, 0.0) for i in range(9)}
    blocks |= {(j, i, -R): values for (i, j, R), values in blocks.items()}
    pairs = PairList(atoms, [(i, j, 0, 0, R) for i, j, R in sorted(blocks)])
    H, S = np.array([blocks[key] for key in sorted(blocks)]).T.copy()
    return Operators(atoms, basis_of(H="SZV-MOLOPT-GTH"), pairs, H, S)


def test_leads_of_two_kinds_are_the_pairs_of_blocks_at_the_ends(junction):
    """E = e + 2 t cos(k) of either lead, whose self-energy is t exp(i k): T = B_l B_r / |E - e_m - S_l - S_r|^2."""
    energies = np.linspace(-0.14, 0.19, 30)
    found = greens.of_device(junction, "c", (2, 2), energies=energies)
    sigma = [HOP * np.exp(-1j * np.arccos((energies - e) / (2 * HOP) + 0j)) for e in (LEFT, RIGHT)]
    sigma = [np.where(s.imag > 0, s.conj(), s) for s in sigma]
    expected = 4 * sigma[0].imag * sigma[1].imag / np.abs(energies - MIDDLE - sigma[0] - sigma[1]) ** 2
    np.testing.assert_allclose(found.sharp[0], expected, atol=1e-4)
    assert 0.3 < expected.max() < 1
    assert found.about["leads_couple"] == "as the two blocks at an end"
    assert found.about["blocks_orbitals"] == [2, 2, 1, 2, 2]


def test_what_lies_beyond_neighbours_is_told(si8):
    """Blocks of two cells, where silicon couples over three."""
    device = si8.repeat((1, 1, 9))
    chain = assemble(device, cut(device.atoms, device.pairs, 2, (16, 16)), np.zeros(3))
    assert 0 < chain.beyond[0] < 1e-8
    assert 0 < chain.beyond[1] < 1e-9


def test_ends_that_do_not_repeat_are_refused(barrier, junction):
    with pytest.raises(ValueError, match=r"leads of 8 and 12 atoms do not repeat: the last block has other atoms"):
        cut(barrier.atoms, barrier.pairs, 2, (8, 12))
    shorter = junction.atoms.copy()
    shorter.positions[0, 2] += 0.2
    with pytest.raises(ValueError, match=r"the second is 0\.\d+ A from the first"):
        cut(shorter, junction.pairs, 2, (2, 2))
    with pytest.raises(ValueError, match="leads of 40 and 40 atoms, expected one or more each, and others of the 72 between"):
        cut(barrier.atoms, barrier.pairs, 2, (40, 40))
    higher = barrier.hamiltonian.copy()
    first_cell = np.repeat(barrier.pairs[:, 0] < 24, np.diff(barrier.offsets))
    higher[first_cell] += mev_to_hartree(100.0) * barrier.overlap[first_cell]
    device = cut(barrier.atoms, barrier.pairs, 2, (24, 24))
    with pytest.raises(ValueError, match="the leads do not repeat: onsite energies .* differ from those of its image by"):
        assemble(replace(barrier, hamiltonian=higher), device, np.zeros(3))


def test_a_device_too_short_for_its_leads_is_refused(si8):
    short = si8.repeat((1, 1, 5))
    with pytest.raises(ValueError, match="the leads, of 16 and 16 atoms, couple with each other past the 8 atoms between"):
        cut(short.atoms, short.pairs, 2, (16, 16))


def test_a_plane_at_the_corner_of_the_cell_is_not_torn_by_rounding(barrier):
    """Atoms of the first plane of silicon at -1e-9 A and at 1e-9 A are all in the first block."""
    moved = barrier.atoms.copy()
    moved.positions[:, 2] += np.random.default_rng(0).choice([-1e-9, 1e-9], len(moved))
    expected, found = (cut(atoms, barrier.pairs, 2, (24, 24)) for atoms in (barrier.atoms, moved))
    assert [sorted(block) for block in found.blocks] == [sorted(block) for block in expected.blocks]
    assert (np.abs(found.cells) <= 1).all()
