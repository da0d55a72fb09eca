"""States brought down along a direction that S nearly misses: counted beside DFT, told without it, and projected out."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg

from hamscale.analysis.false_states import (
    KPOINTS,
    Suspects,
    false_state_summary,
    false_states,
    find_suspects,
    looked_at,
)
from hamscale.analysis.levels import UNKNOWN, Levels
from hamscale.analysis.regions import dos_table
from hamscale.analysis.spectra import compare_spectra, eigenvalues, find_levels
from hamscale.config import Analysis
from hamscale.operators import read_operators, write_operators
from hamscale.pairs import PairList
from hamscale.predict.prediction import _add_levels
from hamscale.units import ev_to_hartree

GAMMA = Analysis(kgrid=(1, 1, 1))


def of_dense(operators, H, S):
    """Operators of a molecule whose dense matrices are given."""
    n = len(operators.atoms)
    table = np.array([(i, j, 0, 0, 0) for i in range(n) for j in range(n)])
    starts = np.cumsum(operators.orbitals) - operators.orbitals
    span = [slice(s, s + o) for s, o in zip(starts, operators.orbitals)]
    flat = lambda M: np.concatenate([M[span[i], span[j]].ravel() for i, j, *_ in table])  # noqa: E731
    return replace(operators, pairs=PairList(operators.atoms, table), hamiltonian=flat(H), overlap=flat(S))


@pytest.fixture
def nearly_singular(water):
    """(DFT, u, s): a molecule, in one direction u of which S is only 1e-3, with its state 80 eV above the occupied ones."""
    H, S = water.at_k((0, 0, 0))
    e, C = scipy.linalg.eigh(H, S)
    far = e[water.n_electrons // 2 - 1] + ev_to_hartree(80.0)
    u = C[:, -1] / np.linalg.norm(C[:, -1])
    rest = np.linalg.qr(np.column_stack([u, np.eye(len(S))[:, 1:]]))[0][:, 1:]  # the directions that S keeps
    small = 1e-3
    S = rest @ (rest.T @ S @ rest) @ rest.T + small * np.outer(u, u)
    H = rest @ (rest.T @ H @ rest) @ rest.T + small * far * np.outer(u, u)
    return of_dense(water, H, S), u, small


def brought_down(operators, u, small, to_ev):
    """The same, with an error of H along u that puts its state to an energy above the highest occupied one."""
    H, S = operators.at_k((0, 0, 0))
    return of_dense(operators, H + small * ev_to_hartree(to_ev - 80.0) * np.outer(u, u), S)


def test_a_state_brought_down_is_counted_and_told_without_dft(nearly_singular):
    dft, u, small = nearly_singular
    levels = find_levels(dft, GAMMA)
    wrong = brought_down(dft, u, small, 1.7)
    assert np.abs(wrong.hamiltonian - dft.hamiltonian).max() < ev_to_hartree(0.1)  # although the error is small
    summary = false_state_summary(dft, wrong, levels, 0.0)
    assert (summary["random_kpoints"], summary["false_states"], summary["suspect_states"]) == (1, 1, 1)
    assert summary["smallest_overlap_eigenvalue"] == pytest.approx(small)
    assert summary["eigenvalue_mae_mev_next"] > 100
    suspects = find_suspects(wrong, levels)
    assert (suspects.states, suspects.places, suspects.of) == (1, 1, 1)
    assert suspects.lowest_ev == suspects.highest_ev == pytest.approx(1.7, abs=1e-6)
    assert suspects.sentence().startswith("1 states at 1 of 1 random k-points are probably false: 1.70 to 1.70 eV")


def test_dft_itself_has_none(nearly_singular, solid, water):
    for operators in (nearly_singular[0], solid, water):
        levels = find_levels(operators, GAMMA)
        assert find_suspects(operators, levels).states == 0
        assert find_suspects(operators, levels).sentence() == ""
        summary = false_state_summary(operators, operators, levels, 0.0)
        assert (summary["false_states"], summary["suspect_states"], summary["eigenvalue_mae_mev_next"]) == (0, 0, 0)


def test_a_shift_of_all_states_is_no_error(nearly_singular):
    dft, u, small = nearly_singular
    wrong = brought_down(dft, u, small, 1.7)
    moved = replace(wrong, hamiltonian=wrong.hamiltonian + 0.3 * wrong.overlap)
    of = [false_state_summary(dft, o, find_levels(dft, GAMMA), shift) for o, shift in ((wrong, 0.0), (moved, -0.3))]
    assert of[0] == pytest.approx(of[1])


def test_a_state_is_false_by_half_an_ev_and_below_the_window_alone():
    levels = Levels(False, 0.05, 0.0, 0.1)
    dft = ev_to_hartree(np.array([[-1.0, 3.0, 6.0], [-1.0, 3.0, 6.0], [-1.0, 5.0, 6.0]]))
    predicted = ev_to_hartree(np.array([[-1.2, 2.6, 5.0], [-1.0, 2.4, 6.0], [-1.0, 4.2, 4.3]]))
    assert false_states(dft, predicted, levels).tolist() == [[False] * 3, [False, True, False], [False] * 3]


def test_random_kpoints_are_fewer_in_large_cells(dft, water):
    assert len(looked_at(dft)) == KPOINTS
    np.testing.assert_array_equal(looked_at(dft), looked_at(dft))
    large = replace(dft, attributes={})
    large.__dict__["orbitals"] = np.array([600])
    assert looked_at(large).shape == (20, 3)
    assert looked_at(water).tolist() == [[0, 0, 0]]


def test_projected_eigenvalues_are_those_of_the_remaining_directions(nearly_singular):
    dft, u, small = nearly_singular
    H, S = dft.at_k((0, 0, 0))
    rest = scipy.linalg.null_space(u[None])
    (found,) = eigenvalues(dft, [(0, 0, 0)], 5e-3)
    assert np.isinf(found).tolist() == [False] * (len(S) - 1) + [True]
    expected = scipy.linalg.eigh(rest.T @ H @ rest, rest.T @ S @ rest, eigvals_only=True)
    np.testing.assert_allclose(found[:-1], expected, atol=1e-9)
    np.testing.assert_allclose(eigenvalues(dft, [(0, 0, 0)], 1e-4), eigenvalues(dft, [(0, 0, 0)]), atol=1e-9)


def test_projection_removes_a_false_state_and_its_cost_stands_beside(nearly_singular):
    dft, u, small = nearly_singular
    wrong = brought_down(dft, u, small, 1.7)
    summary = false_state_summary(dft, wrong, find_levels(dft, GAMMA), 0.0, 5e-3)
    assert summary["false_states"] == 0
    assert summary["suspect_states"] == 1  # of the file, whatever the analysis leaves out
    assert summary["directions_left_out"] == 1
    assert summary["projection_cost_mev_occupied"] < 1e-6
    comparison = compare_spectra(dft, wrong, wrong, Analysis(kgrid=(1, 1, 1), overlap_threshold=5e-3))
    occupied = dft.n_electrons // 2
    np.testing.assert_allclose(comparison.predicted[:, :occupied], comparison.dft[:, :occupied], atol=1e-9)


def test_a_file_says_how_many_and_where(nearly_singular, tmp_path):
    dft, u, small = nearly_singular
    wrong = replace(brought_down(dft, u, small, 1.7), attributes=UNKNOWN | Suspects().attributes())
    path = tmp_path / "wrong.h5"
    write_operators(path, wrong)
    assert read_operators(path).attributes["suspect_states"] == -1
    with pytest.warns(UserWarning, match=r"1 states at 1 of 1 random k-points are probably false: 1.70 to 1.70 eV"):
        _add_levels(path, path, GAMMA)
    attributes = read_operators(path).attributes
    assert (attributes["suspect_states"], attributes["suspect_places_of"]) == (1, 1)
    assert attributes["suspect_lowest_ev"] == pytest.approx(1.7, abs=1e-6)


def test_clusters_of_a_large_file_tell_them_too(nearly_singular, tmp_path):
    """A molecule that lies in every cluster, once with the direction in its states and once without."""
    dft, u, small = nearly_singular
    write_operators(tmp_path / "wrong.h5", brought_down(dft, u, small, 0.8))
    arguments = tmp_path / "wrong.h5", 3, 9.0, 9.0, 0.05, 30.0
    _, facts, _, suspects = dos_table(*arguments)
    assert (suspects.states, suspects.places, suspects.of, facts["suspect_states"]) == (3, 3, 3, 3)
    assert facts["suspect_lowest_ev"] == facts["suspect_highest_ev"]
    table, facts, _, suspects = dos_table(*arguments, overlap_threshold=5e-3)
    assert (suspects.states, facts["directions_left_out"]) == (0, 1.0)
    assert facts["states"] == pytest.approx(2 * (dft.n_orbitals - 1))


def test_the_analysis_tells_them_in_a_line(nearly_singular, tmp_path):
    dft, u, small = nearly_singular
    facts = {"cutoff_angstrom": 5.0, "wall_seconds": 0.0, "source": "dft"}
    dft = replace(dft, attributes=facts)
    for name, operators in (("dft", dft), ("wrong", replace(brought_down(dft, u, small, 1.7), attributes=facts))):
        write_operators(tmp_path / f"{name}.h5", operators)
    (tmp_path / "water.yaml").write_text(
        "species: {H: {basis: SZV-MOLOPT-GTH}, O: {basis: SZV-MOLOPT-GTH}}\n"
        "structures: {test: {split: test, builder: {name: molecule, arguments: {name: H2O}}, box_angstrom: 8}}\n"
    )
    for name, told in (("wrong", True), ("dft", False)):
        files = ["--dft", tmp_path / "dft.h5", "--predicted", tmp_path / f"{name}.h5", "--baseline", tmp_path / "dft.h5"]
        arguments = ["analyse", tmp_path / "water.yaml", *files, "--out", tmp_path / name]
        result = subprocess.run([sys.executable, "-m", "hamscale", *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        said = "wrong.h5: false states at 1 of 1 random k-points, and states that look false without DFT at 1"
        assert (said in result.stderr) == told
        summary = (tmp_path / name / "summary.csv").read_text().splitlines()
        assert dict(zip(summary[0].split(","), summary[1].split(",")))["false_states"] == str(int(told))
