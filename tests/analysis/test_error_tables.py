"""Tables of errors against loops over blocks, written as they are defined; completes test_errors.py."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hamscale.analysis.errors import (
    align_gauge,
    block_errors,
    error_by_distance,
    error_by_pair,
    error_summary,
    hamiltonian_decay,
)
from hamscale.pairs import find_pairs
from hamscale.units import hartree_to_mev, mev_to_hartree
from helpers import rattled

ALL = 100.0  # a cutoff beyond every block


@pytest.fixture(scope="module")
def noise(dft):
    """A perturbation with <S, noise> = 0: the energy gauge cannot take any of it away."""
    values = np.random.default_rng(1).normal(0, mev_to_hartree(3.0), len(dft.overlap))
    return values - dft.overlap * (dft.overlap @ values) / (dft.overlap @ dft.overlap)


def distances(operators):
    return operators.pairs.distances


def slow_blocks(dft, predicted, cutoff):
    """(pair, onsite, distance, errors, DFT values) in meV of every block of either, one at a time."""
    mu = align_gauge(dft, predicted)
    shifted = dft.hamiltonian - mu * dft.overlap
    first = {tuple(p): dft.block(shifted, b) for b, p in enumerate(dft.pairs.tolist())}
    second = {tuple(p): predicted.block(predicted.hamiltonian, b) for b, p in enumerate(predicted.pairs.tolist())}
    symbols, positions, cell = dft.atoms.get_chemical_symbols(), dft.atoms.positions, np.asarray(dft.atoms.cell)
    result = []
    for i, j, *R in first.keys() | second.keys():
        d = np.linalg.norm(positions[j] + np.array(R) @ cell - positions[i])
        if d < cutoff:
            zero = np.zeros((dft.orbitals[i], dft.orbitals[j]))
            a, b = first.get((i, j, *R), zero), second.get((i, j, *R), zero)
            pair = "-".join(sorted((symbols[i], symbols[j])))
            result.append((pair, i == j and R == [0, 0, 0], d, hartree_to_mev(b - a).ravel(), hartree_to_mev(a).ravel()))
    return result


def mean_abs(arrays):
    return np.abs(np.concatenate(list(arrays))).mean()


def test_gauge_is_the_least_squares_one(dft, noise):
    predicted = replace(dft, hamiltonian=dft.hamiltonian - 0.1 * dft.overlap + 50 * noise)
    mu = align_gauge(dft, predicted)
    squares = [((dft.hamiltonian - m * dft.overlap - predicted.hamiltonian) ** 2).sum() for m in (mu - 1e-3, mu, mu + 1e-3)]
    assert squares[1] < min(squares[0], squares[2])


def test_a_molecule_has_an_absolute_zero(water):
    mu = 0.01
    predicted = replace(water, hamiltonian=water.hamiltonian - mu * water.overlap)
    assert align_gauge(water, predicted) == 0
    expected = hartree_to_mev(mu * np.abs(water.overlap).mean())
    assert error_summary(block_errors(water, predicted, ALL))["mae_mev"] == pytest.approx(expected, rel=1e-12)


def test_a_known_perturbation_gives_the_known_error(dft, noise):
    summary = error_summary(block_errors(dft, replace(dft, hamiltonian=dft.hamiltonian + noise), ALL))
    error = hartree_to_mev(noise)
    onsite = np.repeat(distances(dft) < 1e-6, np.diff(dft.offsets))
    assert summary["mae_mev"] == pytest.approx(np.abs(error).mean(), rel=1e-9)
    assert summary["mae_mev_onsite"] == pytest.approx(np.abs(error[onsite]).mean(), rel=1e-9)
    assert summary["mae_mev_offsite"] == pytest.approx(np.abs(error[~onsite]).mean(), rel=1e-9)
    assert summary["rmse_mev"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-9)
    assert summary["max_abs_error_mev"] == pytest.approx(np.abs(error).max(), rel=1e-9)
    assert summary["elements"] == len(error)


def test_tables_equal_loops_over_the_blocks_of_both(dft, noise):
    """DFT lacks blocks the prediction has, and the other way round; some lie beyond the cutoff."""
    d = distances(dft)
    odd = np.random.default_rng(3).random(len(d)) < 0.3
    predicted = replace(dft, hamiltonian=dft.hamiltonian + noise).select((d < 5.5) & ~odd)
    shorter = dft.select((d < 4.5) | ((d > 5) & odd))
    cutoff = 6.2
    blocks, slow = block_errors(shorter, predicted, cutoff), slow_blocks(shorter, predicted, cutoff)
    assert len(blocks) == len(slow)

    by_pair = error_by_pair(blocks).set_index(["pair", "onsite"])
    assert set(by_pair.index) == {(pair, onsite) for pair, onsite, *_ in slow}
    for key, row in by_pair.iterrows():
        errors = [e for pair, onsite, _, e, _ in slow if (pair, onsite) == key]
        assert row["mae_mev"] == pytest.approx(mean_abs(errors), rel=1e-9)
        assert row["max_abs_error_mev"] == pytest.approx(max(np.abs(e).max() for e in errors), rel=1e-9)
        assert row["block_mae_mev_p50"] == pytest.approx(np.median([np.abs(e).mean() for e in errors]), rel=1e-9)
        assert (row["blocks"], row["elements"]) == (len(errors), sum(map(len, errors)))

    by_distance = error_by_distance(blocks)
    assert by_distance["blocks"].sum() == sum(not onsite for _, onsite, *_ in slow)
    for row in by_distance.itertuples():
        inside = [s for s in slow if not s[1] and abs(s[2] - row.distance_angstrom) < 0.25]
        assert row.mae_mev == pytest.approx(mean_abs(s[3] for s in inside), rel=1e-9)
        assert row.mean_abs_dft_mev == pytest.approx(mean_abs(s[4] for s in inside), rel=1e-9)


def test_pairs_are_found_as_by_a_dictionary():
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(-3, 4, (200, 5)), axis=0)
    wanted = rng.integers(-4, 5, (300, 5))
    rows = {tuple(p): row for row, p in enumerate(pairs.tolist())}
    assert find_pairs(wanted, pairs).tolist() == [rows.get(tuple(w), -1) for w in wanted.tolist()]
    assert (find_pairs(wanted, pairs[:0]) == -1).all()


def test_errors_say_what_differs(dft):
    with pytest.raises(ValueError, match="positions of the operators differ by .*e-0.* A"):
        block_errors(dft, replace(dft, atoms=rattled(dft.atoms, 3, 1e-4)), ALL)
    molecule = dft.atoms.copy()
    molecule.pbc = False
    with pytest.raises(ValueError, match="periodic along .* and along"):
        block_errors(dft, replace(dft, atoms=molecule), ALL)
    other = replace(dft, basis=type(dft.basis)(replace(e, text=e.text + "\n") for e in dft.basis.values()))
    with pytest.raises(ValueError, match="different bases: O: SZV-MOLOPT-SR-GTH"):
        block_errors(dft, other, ALL)


def test_decay_has_the_size_of_every_block(dft):
    table = hamiltonian_decay(dft)
    d = distances(dft)
    largest = [np.abs(dft.block(dft.hamiltonian, b)).max() for b in range(len(dft.pairs))]
    z = dft.atoms.numbers[dft.pairs[:, :2]]
    once = (d > 1e-6) & (z[:, 0] <= z[:, 1])  # O-Hf: the transposed blocks of Hf-O are left out
    expected = pd.DataFrame({"d": d[once], "h": hartree_to_mev(np.array(largest)[once])}).sort_values(["d", "h"])
    found = table.sort_values(["distance_angstrom", "max_abs_h_mev"])
    np.testing.assert_allclose(found["distance_angstrom"], expected["d"], rtol=1e-12)
    assert found["max_abs_h_mev"].sum() == pytest.approx(expected["h"].sum(), rel=1e-9)
    assert (table["mean_abs_h_mev"] <= table["max_abs_h_mev"]).all()
    assert set(table["pair"]) == {"Hf-Hf", "Hf-O", "O-O"}


@pytest.mark.parametrize("most", [1, 7, 50])
def test_decay_has_no_more_blocks_of_a_pair_than_asked(dft, most):
    assert hamiltonian_decay(dft, most)["pair"].value_counts().max() <= most
