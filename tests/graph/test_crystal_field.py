"""The linear reference of onsite blocks."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from conftest import hafnia, model_hamiltonian, rotated
from hamscale.graph import crystal_field
from hamscale.graph.coupling import Coupling
from hamscale.graph.crystal_field import Ions, densities, fit_crystal_field, onsite_blocks
from hamscale.graph.dataset import structure_graph
from hamscale.graph.polarization import columns

CUTOFF = 5.0
IONS = Ions()


@pytest.fixture(scope="module")
def structures(szv):
    """Onsite blocks that are a crystal field of made-up tables exactly, and the tables."""
    rng, coupling, made, tables = np.random.default_rng(0), Coupling(szv), [], {}
    for seed in range(12):
        operators = model_hamiltonian(hafnia(seed), szv)
        of = onsite_blocks(operators, coupling, structure_graph(operators.atoms, szv, CUTOFF), IONS)
        for z in of.blocks if seed == 0 else ():
            # smooth functions of the distance, one per slot and element of the neighbour; charges and polarizabilities
            tables[z] = []
            for L, slots in coupling[z, z].slots.items():
                far = columns(2, L, False)
                n_knots = (of.features[z][L].shape[2] - far) // 2
                amplitude, phase = rng.normal(0, 0.1, (2, 2, len(slots)))
                waves = amplitude[:, None] * np.cos(3 * np.arange(n_knots)[:, None] / n_knots + 20 * phase[:, None])
                tables[z].append(np.concatenate([waves.reshape(2 * n_knots, -1), rng.normal(0, 1, (far, len(slots)))]))
        zeros = {z: np.zeros(coupling[z, z].n_slots) for z in tables}
        exact = crystal_field.CrystalField(coupling, IONS, zeros, zeros, tables, of.overlap)
        made.append(replace(of, blocks={z: exact.onsite(z, f) for z, f in of.features.items()}))
    return coupling, made


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
    assert _left(fit_crystal_field(made[:9], coupling, True, IONS), made[9:]) < 0.02


def test_a_gauge_of_each_structure_is_found_and_taken_out(structures):
    coupling, made = structures
    shifts = np.random.default_rng(1).normal(0, 0.02, len(made))
    shifts -= shifts.mean()
    moved = [replace(s, blocks={z: b + mu * s.overlap[z] for z, b in s.blocks.items()}) for s, mu in zip(made, shifts)]
    plain, shifted = (fit_crystal_field(some, coupling, True, IONS) for some in (made, moved))
    for z in plain.tables:
        for a, b in zip(shifted.tables[z], plain.tables[z]):
            np.testing.assert_allclose(a, b, atol=1e-7)
    found = [shifted.gauge(b) - plain.gauge(a) for a, b in zip(made, moved)]
    np.testing.assert_allclose(found, shifts, atol=1e-8)


def test_a_molecules_zero_is_its_own(structures):
    coupling, made = structures
    moved = [replace(s, blocks={z: b + 0.1 * s.overlap[z] for z, b in s.blocks.items()}) for s in made]
    plain, shifted = (fit_crystal_field(some, coupling, False, IONS) for some in (made, moved))
    for z in plain.mean:
        np.testing.assert_allclose(
            shifted.mean[z] - plain.mean[z], 0.1 * made[0].overlap[z][coupling[z, z].zero_order], atol=1e-9
        )


def test_densities_are_the_sum_over_neighbours_and_turn_with_the_structure(szv):
    from hamscale.angular import real_spherical_harmonics, rotation_matrix

    atoms = hafnia(3)
    graph = structure_graph(atoms, szv, CUTOFF)
    found = densities(graph, sorted(szv), 4)
    n_knots = found.shape[2] // 2
    # one atom, one element, the plain definition
    i, z = 2, 8
    expected = np.zeros((25, n_knots))
    for (a, b), v in zip(graph.edges[:, :2], graph.vectors):
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
    field = fit_crystal_field(made, coupling, True, IONS)
    graph = structure_graph(hafnia(4), szv, CUTOFF)
    whole = field.of_graph(graph)
    monkeypatch.setattr(crystal_field, "ATOMS_AT_ONCE", 3)
    for z, blocks in field.of_graph(graph).items():
        np.testing.assert_allclose(blocks, whole[z], atol=1e-14)
