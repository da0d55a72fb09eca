from dataclasses import replace

import numpy as np
import pytest

from hamscale.analysis import errors
from hamscale.units import mev_to_hartree
from helpers import SZV, basis_of, hafnia, model_hamiltonian, silicon


def _changed(operators, hamiltonian):
    return replace(operators, hamiltonian=hamiltonian)


def test_a_shift_of_the_energy_zero_is_no_error(dft):
    shifted = _changed(dft, dft.hamiltonian - mev_to_hartree(300.0) * dft.overlap)
    assert errors.align_gauge(dft, shifted) == pytest.approx(mev_to_hartree(300.0))
    assert errors.error_summary(errors.block_errors(dft, shifted, 20.0))["mae_mev"] < 1e-9


def test_errors_are_means_over_elements_done_slowly(dft):
    noise = np.random.default_rng(0).normal(0, mev_to_hartree(5.0), len(dft.hamiltonian))
    predicted = _changed(dft, dft.hamiltonian + noise)
    mu = errors.align_gauge(dft, predicted)
    distances = dft.pairs.distances
    sums = {"onsite": [], "offsite": []}
    for b, d in enumerate(distances):
        if d < 6.0:
            difference = dft.block(predicted.hamiltonian, b) - dft.block(dft.hamiltonian, b) + mu * dft.block(dft.overlap, b)
            sums["onsite" if d < 1e-9 else "offsite"].append(np.abs(difference).ravel() / mev_to_hartree(1.0))
    sums = {k: np.concatenate(v) for k, v in sums.items()}
    summary = errors.error_summary(blocks := errors.block_errors(dft, predicted, 6.0))
    assert summary["mae_mev_onsite"] == pytest.approx(sums["onsite"].mean(), rel=1e-10)
    assert summary["mae_mev_offsite"] == pytest.approx(sums["offsite"].mean(), rel=1e-10)
    assert summary["mae_mev"] == pytest.approx(np.concatenate(list(sums.values())).mean(), rel=1e-10)
    for table in (errors.error_by_pair(blocks), errors.error_by_distance(blocks)):
        part = table[~table["onsite"]] if "onsite" in table else table
        assert (part["mae_mev"] * part["elements"]).sum() / part["elements"].sum() == pytest.approx(
            sums["offsite"].mean(), rel=1e-10
        )


def test_a_block_that_one_side_lacks_is_zero(dft):
    keep = dft.pairs.distances < 3.0
    less = dft.select(keep)
    lost = errors.error_summary(errors.block_errors(dft, less, 6.0))
    gained = errors.error_summary(errors.block_errors(less, dft, 6.0))
    zeroed = _changed(dft, np.where(np.repeat(keep, np.diff(dft.offsets)), dft.hamiltonian, 0.0))
    expected = errors.error_summary(errors.block_errors(dft, zeroed, 6.0))
    assert lost == pytest.approx(expected)
    assert lost["mae_mev"] > 0.1
    assert gained["elements"] == lost["elements"]


def test_a_molecule_is_not_shifted(szv):
    atoms = hafnia()
    atoms.pbc = False
    operators = model_hamiltonian(atoms, szv)
    assert errors.align_gauge(operators, _changed(operators, operators.hamiltonian + 0.1 * operators.overlap)) == 0


def test_other_structures_and_bases_are_refused(dft, szv):
    with pytest.raises(ValueError, match="expected the same atoms"):
        errors.block_errors(dft, model_hamiltonian(silicon(), basis_of(Si=SZV)), 5.0)
    with pytest.raises(ValueError, match="expected the same structure"):
        errors.block_errors(dft, model_hamiltonian(hafnia(9), szv), 5.0)


def test_decay_lists_each_pair_of_blocks_once(dft):
    table = errors.hamiltonian_decay(dft)
    assert set(table["pair"]) == {"Hf-Hf", "Hf-O", "O-O"}
    offsite = (dft.pairs.distances > 1e-9).sum()
    hetero = (table["pair"] == "Hf-O").sum()
    assert len(table) + hetero == offsite
    assert (table["max_abs_h_mev"] >= table["mean_abs_h_mev"]).all()
