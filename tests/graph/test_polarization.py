"""Potentials and fields of charges and induced dipoles, of all periodic images."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from scipy.spatial.transform import Rotation
from scipy.special import erf, erfc

from hamscale.angular import rotation_matrix
from hamscale.graph.polarization import (
    FEWEST_WAVES,
    SPLIT_ANGSTROM,
    WAVES_PER_ATOM,
    WIDTH_ANGSTROM,
    _split_angstrom,
    _Waves,
    neutral_charges,
    potentials,
)
from hamscale.units import angstrom_to_bohr
from helpers import WATER, hafnia, rotated

ELEMENTS = [8, 72]


def _direct(atoms: Atoms, charges, dipoles):
    """Potential and field at the atoms, wave by wave."""
    cell, r, width = (angstrom_to_bohr(np.asarray(x)) for x in (atoms.cell, atoms.positions, WIDTH_ANGSTROM))
    reciprocal, phi, E = 2 * np.pi * np.linalg.inv(cell).T, np.zeros(len(atoms)), np.zeros((len(atoms), 3))
    for order in np.ndindex(31, 31, 31):
        k = (np.array(order) - 15) @ reciprocal
        if 0 < k @ k < (6 / width) ** 2:
            S = ((charges - 1j * dipoles @ k) * np.exp(-1j * r @ k)).sum()
            w = 4 * np.pi / np.linalg.det(cell) * np.exp(-(k @ k) * width**2 / 2) / (k @ k)
            phi += (w * S * np.exp(1j * r @ k)).real
            E += (-1j * k * (w * S * np.exp(1j * r @ k))[:, None]).real
    return phi, E


def test_they_are_the_sums_over_plane_waves():
    atoms = hafnia(0)
    of = [np.where(atoms.numbers == z, 1.0, 0.0) for z in ELEMENTS]
    phi, E = zip(*(_direct(atoms, q, np.zeros((len(atoms), 3))) for q in of))
    felt, squares, fields = potentials(atoms, ELEMENTS, np.eye(2))
    np.testing.assert_allclose(felt[:, :2], np.stack(phi, 1), atol=1e-9)
    np.testing.assert_allclose(fields[:, :, :2], np.stack(E, 2)[:, [1, 2, 0]], atol=1e-9)
    induced = _direct(atoms, np.zeros(len(atoms)), of[0][:, None] * E[1])  # at oxygen, of the field of hafnium
    np.testing.assert_allclose(felt[:, 3], induced[0], atol=1e-9)
    np.testing.assert_allclose(fields[:, :, 3], induced[1][:, [1, 2, 0]], atol=1e-9)
    np.testing.assert_allclose(squares[:, 1], (E[0] * E[1]).sum(1), atol=1e-9)
    assert (felt.shape[1], squares.shape[1], fields.shape[2]) == (6, 3, 6)


def test_one_distribution_of_charges_has_one_field_that_polarizes():
    atoms = hafnia(0)
    q = np.where(atoms.numbers == 72, 4.0, -2.0)
    _, E = _direct(atoms, q, np.zeros((len(atoms), 3)))
    felt, squares, fields = potentials(atoms, ELEMENTS, np.array([[-2.0], [4.0]]))
    phi_hafnium, E_hafnium = _direct(atoms, np.zeros(len(atoms)), (atoms.numbers == 72)[:, None] * E)
    np.testing.assert_allclose(felt[:, 2], phi_hafnium, atol=1e-8)
    np.testing.assert_allclose(fields[:, :, 2], E_hafnium[:, [1, 2, 0]], atol=1e-8)
    np.testing.assert_allclose(squares[:, 0], (E**2).sum(1), atol=1e-8)
    assert (felt.shape[1], squares.shape[1], fields.shape[2]) == (3, 1, 3)


def _of_slab(atoms: Atoms, charges) -> np.ndarray:
    """Potential of Gaussian charges of a slab, wave by wave of its plane (D. E. Parry, Surf. Sci. 49, 433 (1975))."""
    cell, r, width = (angstrom_to_bohr(np.asarray(x)) for x in (atoms.cell, atoms.positions, WIDTH_ANGSTROM))
    u, v = cell[atoms.pbc]
    area = np.linalg.norm(np.cross(u, v))
    n = np.cross(u, v) / area
    waves = 2 * np.pi * np.linalg.inv([u, v, n]).T[:2]
    d = r[:, None] - r
    z, w = d @ n, width * 2**0.5
    phi = -2 * np.pi / area * (z * erf(z / w) + w / np.pi**0.5 * np.exp(-((z / w) ** 2)))
    for order in np.ndindex(29, 29):
        G = (np.array(order) - 14) @ waves
        if 0 < (g := np.linalg.norm(G)) < 9 / width:
            up, down = (np.exp(s * g * z) * erfc(g * w / 2 + s * z / w) for s in (1, -1))
            phi += np.pi / area / g * np.cos(d @ G) * (up + down)
    return phi @ charges


def _of_wire(atoms: Atoms, charges, images: int = 4000) -> np.ndarray:
    """Potential of Gaussian charges of a wire, image by image, whose sum converges as that of charges without a net one."""
    cell, r, width = (angstrom_to_bohr(np.asarray(x)) for x in (atoms.cell, atoms.positions, WIDTH_ANGSTROM))
    along = np.arange(-images, images + 1)[:, None] * cell[atoms.pbc]
    d = np.maximum(np.linalg.norm(r[:, None, None] - r[:, None] + along, axis=-1), 1e-9)
    return ((erf(d / width / 2**0.5) / d).sum(-1) * charges).sum(1)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(("slab", "direct"), [(True, _of_slab), (False, _of_wire)], ids=["slab", "wire"])
def test_nothing_repeats_a_slab_or_a_wire_across(slab, direct, axis, rotation):
    random = np.random.default_rng(axis)
    cell = np.roll(np.roll([[3.0, 0, 0], [-1, 2.5, 0], [0, 0, 9]], axis, 0), axis, 1) @ rotation.T
    pbc = np.roll([slab, slab, not slab], axis)
    atoms = Atoms("NaClNaCl", random.normal(0, 1.5, (4, 3)), cell=cell, pbc=pbc)
    charges = np.array([1.0, -1.0, 2.0, -2.0])
    phi, E = _Waves(atoms).of_charges(charges)
    np.testing.assert_allclose(phi, direct(atoms, charges), rtol=0, atol=2e-8)
    for x in range(3):  # an atom moves with its images, which add a constant to its potential
        up, down = atoms.copy(), atoms.copy()
        up.positions[0, x] += 1e-3
        down.positions[0, x] -= 1e-3
        difference = direct(up, charges)[0] - direct(down, charges)[0]
        assert abs(E[0, x] + difference / angstrom_to_bohr(2e-3)) < 2e-5


def test_charges_that_make_every_structure_neutral_are_found():
    assert neutral_charges(np.array([[8], [64]])).shape == (1, 0)  # a crystal of one element has none
    of_hafnia = neutral_charges(np.array([[8, 4], [64, 32]]))
    np.testing.assert_allclose(np.abs(of_hafnia[:, 0]), np.array([1, 2]) / 5**0.5, atol=1e-12)
    assert of_hafnia[0, 0] * of_hafnia[1, 0] < 0
    assert neutral_charges(np.array([[8, 4], [7, 4]])).shape == (2, 0)  # two compositions leave no charge
    counts = np.array([[4, 8, 16], [2, 4, 8]])
    of_three = neutral_charges(counts)
    assert of_three.shape == (3, 2)
    np.testing.assert_allclose(counts @ of_three, 0, atol=1e-12)


def _of_a_wave(cells: int, charges) -> float:
    """Peak to peak of the potential where all atoms of rock salt are displaced along a wave as long as the cell."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat((1, 1, cells))
    z = atoms.positions[:, 2]
    atoms.positions[:, 2] += 0.1 * np.cos(2 * np.pi * z / (5.64 * cells))
    felt = potentials(atoms, [11, 17], np.array(charges))[0][:, 0]
    sodium = felt[atoms.numbers == 11]
    return float(sodium.max() - sodium.min())


def test_the_potential_of_charges_that_are_not_neutral_grows_with_the_wavelength():
    """As 1 / k, which no screening stops: why only neutral charges are allowed. Theirs falls."""
    one_element, neutral = ([_of_a_wave(cells, q) for cells in (2, 4, 8)] for q in ([[1.0], [0.0]], [[1.0], [-1.0]]))
    assert one_element[1] > 1.8 * one_element[0]
    assert one_element[2] > 1.8 * one_element[1]
    assert neutral[2] < 0.7 * neutral[1]
    assert neutral[1] < 0.8 * neutral[0]
    assert neutral[2] < 0.02 * one_element[2]


def test_with_the_short_ranged_remainder_it_is_madelungs_constant():
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    distance, width = angstrom_to_bohr(5.64 / 2), angstrom_to_bohr(WIDTH_ANGSTROM)
    charges = np.where(atoms.numbers == 11, 1.0, -1.0)
    phi, _ = _Waves(atoms).of_charges(charges)
    many = atoms.repeat(5)
    r = angstrom_to_bohr(np.linalg.norm(many.positions - many.positions[8 * 62], axis=1))
    q = np.tile(charges, 125)
    other = r > 0
    near = (q * erfc(np.where(other, r, 1) / (2**0.5 * width)) / np.where(other, r, 1))[other].sum()
    own = (2 / np.pi) ** 0.5 / width  # a Gaussian's potential at its own centre
    assert (phi[0] + near - own) * distance == pytest.approx(-1.747564594633, abs=1e-7)


def test_scalars_stay_and_vectors_turn_with_the_structure():
    atoms, R = hafnia(2), Rotation.from_rotvec([0.3, 1.2, -0.5]).as_matrix()
    (*scalars, vectors), (*scalars_turned, vectors_turned) = (
        potentials(a, ELEMENTS, np.eye(2)) for a in (atoms, rotated(atoms, R))
    )
    for turned, straight in zip(scalars_turned, scalars):
        np.testing.assert_allclose(turned, straight, atol=1e-9)
    np.testing.assert_allclose(vectors_turned, np.einsum("mn,anf->amf", rotation_matrix(1, R), vectors), atol=1e-9)


def test_a_supercell_has_the_same():
    atoms = hafnia(1)
    for one, many in zip(potentials(atoms, ELEMENTS, np.eye(2)), potentials(atoms.repeat((2, 1, 3)), ELEMENTS, np.eye(2))):
        np.testing.assert_allclose(many, np.concatenate([one] * 6), atol=1e-8)


def test_the_field_is_the_gradient():
    atoms, step = hafnia(3), 1e-4
    charges = np.where(atoms.numbers == 72, 2.0, -1.0)
    charges[0] = 0  # a test charge
    values = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[0, 1] += sign * step
        values.append(_Waves(moved).of_charges(charges)[0][0])
    slope = (values[0] - values[1]) / (2 * angstrom_to_bohr(step))
    assert -slope == pytest.approx(_Waves(atoms).of_charges(charges)[1][0, 1], abs=1e-7)


def test_an_element_that_is_absent_has_zeros():
    felt, _, fields = potentials(hafnia(0), [8, 14, 72], np.eye(3))
    assert not felt[:, 1].any()
    assert not fields[:, :, 1].any()
    assert felt[:, [0, 2]].all()


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False)], ids=["bulk", "slab"])
def test_vacuum_takes_wider_gaussians_and_gives_the_same(pbc):
    """A molecule in a box of 30 A against the waves of the Gaussians themselves, without a sum near by."""
    atoms = Atoms("OHH", WATER.positions + 1.0, cell=np.diag([30.0, 28, 29]), pbc=pbc)
    assert _split_angstrom(atoms) > SPLIT_ANGSTROM
    charges = np.array([[1.0], [-2.0]])
    felt, _, fields = potentials(atoms, [1, 8], charges)
    waves = _Waves(atoms)
    phi, E = waves.of_charges(np.where(atoms.numbers == 8, -2.0, 1.0))
    np.testing.assert_allclose(felt[:, 0], phi, rtol=0, atol=2e-8)
    np.testing.assert_allclose(fields[:, :, 0], E[:, [1, 2, 0]], rtol=0, atol=2e-8)
    induced, of_dipoles = waves.of_dipoles((atoms.numbers == 8)[:, None] * E)
    np.testing.assert_allclose(felt[:, 2], induced, rtol=0, atol=2e-8)
    np.testing.assert_allclose(fields[:, :, 2], of_dipoles[:, [1, 2, 0]], rtol=0, atol=2e-8)


def test_waves_follow_the_atoms_and_not_the_vacuum():
    def waves(atoms: Atoms) -> int:
        return int(np.prod(_Waves(atoms, _split_angstrom(atoms)).shape))

    for box in (90.0, 200.0, 2000.0):
        assert waves(Atoms("OHH", WATER.positions, cell=[box] * 3, pbc=True)) <= FEWEST_WAVES
        assert waves(Atoms("OHH", WATER.positions, cell=[box] * 3, pbc=[True, False, False])) <= FEWEST_WAVES
    crystal = hafnia(0).repeat(3)
    assert _split_angstrom(crystal) == SPLIT_ANGSTROM
    assert waves(crystal) < WAVES_PER_ATOM * len(crystal)
