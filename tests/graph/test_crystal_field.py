"""The linear reference of onsite blocks."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hamscale.graph import crystal_field
from hamscale.graph.coupling import Coupling
from hamscale.graph.crystal_field import CrystalField, Ions, densities, onsite_blocks
from hamscale.graph.crystal_field_fit import fit_crystal_field
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference
from helpers import hafnia, model_hamiltonian, rattled, rotated, silicon

CUTOFF, NEAR = 5.0, 4.5
CHARGES = np.array([[-2.0], [4.0]])  # of O and Hf
COEFFICIENTS = np.array([-0.4, -1.0, -2.0])


@pytest.fixture(scope="module")
def structures(szv):
    """Onsite blocks that are a crystal field of made-up tables exactly, and the tables."""
    rng, coupling, made, tables = np.random.default_rng(0), Coupling(szv), [], {}
    for seed in range(12):
        operators = model_hamiltonian(hafnia(seed), szv)
        of = onsite_blocks(operators, coupling, structure_graph(operators.atoms, szv, CUTOFF), NEAR, CHARGES, 3.0)
        for z in of.blocks if seed == 0 else ():
            # smooth functions of the distance, one per slot and element of the neighbour; fields and polarizabilities
            tables[z] = []
            for L, slots in coupling[z, z].slots.items():
                far = {0: 1, 1: 3}.get(L, 0)
                n_knots = (of.features[z].by_degree[L].shape[2] - far) // 2
                amplitude, phase = rng.normal(0, 0.1, (2, 2, len(slots)))
                waves = amplitude[:, None] * np.cos(3 * np.arange(n_knots)[:, None] / n_knots + 20 * phase[:, None])
                tables[z].append(np.concatenate([waves.reshape(2 * n_knots, -1), rng.normal(0, 0.1, (far, len(slots)))]))
        zeros = {z: np.zeros(coupling[z, z].n_slots) for z in tables}
        exact = CrystalField(coupling, NEAR, CHARGES, zeros, zeros, tables, COEFFICIENTS, of.overlap, zeros)
        made.append(replace(of, blocks={z: exact.onsite(z, f) for z, f in of.features.items()}))
    return coupling, made


def _fit(some, coupling, periodic=True) -> CrystalField:
    return fit_crystal_field(some, coupling, periodic, NEAR, CHARGES, formal=True)


def _left(field, structures) -> float:
    """Share of the blocks' sum of squares that the field leaves, their mean and gauge taken out."""
    left = whole = 0.0
    for s in structures:
        mu = field.gauge(s)
        for z, blocks in s.blocks.items():
            left += ((blocks - mu * s.overlap[z] - field.onsite(z, s.features[z])) ** 2).sum()
            whole += ((blocks - np.mean(np.concatenate([t.blocks[z] for t in structures]), 0)) ** 2).sum()
    return left / whole


def test_blocks_that_are_linear_in_the_neighbours_are_found_on_structures_not_seen(structures):
    coupling, made = structures
    assert _left(_fit(made[:9], coupling), made[9:]) < 0.02


def test_coefficients_of_formal_charges_stay_within_physics(structures):
    """Potentials ten times those of the formal charges, and of the wrong sign: as much as physics has, and none."""
    coupling, made = structures
    for factor, expected in ((10.0, -1.0), (-10.0, 0.0)):
        moved = [
            replace(s, blocks={z: factor * np.outer(f.potentials @ COEFFICIENTS, s.overlap[z]) for z, f in s.features.items()})
            for s in made
        ]
        assert _fit(moved, coupling).coefficients[0] == pytest.approx(expected, abs=1e-6)
        free = fit_crystal_field(moved, coupling, True, NEAR, CHARGES, formal=False)
        assert free.coefficients[0] == pytest.approx(factor * COEFFICIENTS[0], rel=0.1)


def test_a_potential_moves_all_elements_and_orbitals_alike(structures):
    """What the coefficients add to a block is along S, and the same for every element."""
    coupling, made = structures
    field = _fit(made, coupling)
    felt = replace(field, coefficients=field.coefficients + np.array([0.1, 0.0, 0.0]))
    for z, f in made[0].features.items():
        difference = felt.onsite(z, f) - field.onsite(z, f)
        np.testing.assert_allclose(difference, 0.1 * np.outer(f.potentials[:, 0], made[0].overlap[z]), atol=1e-12)


def test_a_gauge_of_each_structure_is_found_and_taken_out(structures):
    coupling, made = structures
    shifts = np.random.default_rng(1).normal(0, 0.02, len(made))
    shifts -= shifts.mean()
    moved = [replace(s, blocks={z: b + mu * s.overlap[z] for z, b in s.blocks.items()}) for s, mu in zip(made, shifts)]
    plain, shifted = (_fit(some, coupling) for some in (made, moved))
    np.testing.assert_allclose(shifted.coefficients, plain.coefficients, atol=1e-6)
    for z in plain.tables:
        for a, b in zip(shifted.tables[z], plain.tables[z]):
            np.testing.assert_allclose(a, b, atol=1e-6)
    found = [shifted.gauge(b) - plain.gauge(a) for a, b in zip(made, moved)]
    np.testing.assert_allclose(found, shifts, atol=1e-7)


def test_a_molecules_zero_is_its_own(structures):
    coupling, made = structures
    moved = [replace(s, blocks={z: b + 0.1 * s.overlap[z] for z, b in s.blocks.items()}) for s in made]
    plain, shifted = (_fit(some, coupling, False) for some in (made, moved))
    for z in plain.mean:
        np.testing.assert_allclose(
            shifted.mean[z] - plain.mean[z], 0.1 * made[0].overlap[z][coupling[z, z].zero_order], atol=1e-9
        )


def test_charges_that_do_not_make_the_training_set_neutral_are_refused():
    with pytest.raises(ValueError, match="graph.charges leave a structure of the training set with a charge of 1"):
        Ions(charges={8: -2.0, 72: 5.0}).distributions([8, 72], [hafnia()])
    assert Ions(far=False).distributions([8, 72], [hafnia()]).shape == (2, 0)
    assert Ions().distributions([14], [silicon()]).shape == (1, 0)
    np.testing.assert_array_equal(Ions(charges={8: -2.0, 72: 4.0}).distributions([8, 72], [hafnia()]), CHARGES)


def test_densities_are_the_sum_over_neighbours_and_turn_with_the_structure(szv):
    from hamscale.angular import real_spherical_harmonics, rotation_matrix

    atoms = hafnia(3)
    graph = structure_graph(atoms, szv, CUTOFF)
    found = densities(graph, sorted(szv), 4)
    n_knots = found.shape[2] // 2
    # one atom, one element, the plain definition
    i, z = 2, 8
    expected = np.zeros((25, n_knots))
    for (a, b), v in zip(graph.edges[:, :2], graph.edges.vectors):
        if a == i and atoms.numbers[b] == z:
            d, u = np.linalg.norm(v), np.linalg.norm(v) / CUTOFF
            hats = np.maximum(0, 1 - np.abs(d / CUTOFF * n_knots - np.arange(n_knots)))
            harmonics = np.concatenate([real_spherical_harmonics(L, v[None])[0] for L in range(5)])
            expected += np.outer(harmonics, hats) * (1 - 10 * u**3 + 15 * u**4 - 6 * u**5)
    np.testing.assert_allclose(found[i, :, :n_knots], expected, atol=1e-12)
    R = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()
    turned = rotated(atoms, R)
    D = np.zeros((25, 25))
    for L in range(5):
        D[L * L : (L + 1) ** 2, L * L : (L + 1) ** 2] = rotation_matrix(L, R)
    np.testing.assert_allclose(densities(structure_graph(turned, szv, CUTOFF), sorted(szv), 4), D @ found, atol=1e-9)


def test_some_atoms_at_a_time_are_all_atoms(structures, szv, monkeypatch):
    coupling, made = structures
    field = _fit(made, coupling)
    graph = structure_graph(hafnia(4), szv, CUTOFF)
    whole = field.of_graph(graph)
    monkeypatch.setattr(crystal_field, "ATOMS_AT_ONCE", 3)
    for z, blocks in field.of_graph(graph).items():
        np.testing.assert_allclose(blocks, whole[z], atol=1e-14)


def test_the_vacuum_of_a_sheet_and_where_it_lies_in_it_change_nothing(sheet):
    """Features and blocks of a sheet: its open cell vector means nothing."""
    structures = [model_hamiltonian(rattled(sheet.atoms, seed), sheet.basis) for seed in range(3)]
    reference = fit_reference(structures, CUTOFF)
    assert reference.crystal_field.charges.shape == (2, 1)
    moved = sheet.atoms.copy()
    moved.set_cell([*np.asarray(moved.cell)[:2], [0, 0, 31.0]])
    moved.positions[:, 2] += 4.0
    before, after = (
        reference.crystal_field.of_graph(structure_graph(atoms, sheet.basis, CUTOFF)) for atoms in (sheet.atoms, moved)
    )
    for z in before:
        np.testing.assert_allclose(after[z], before[z], rtol=0, atol=1e-9)
