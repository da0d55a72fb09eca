"""Density of states of sampled clusters against that of all eigenvalues."""

import json

import numpy as np
import pytest
from ase import Atoms
from scipy.linalg import eigh

from hamscale.analysis import regions
from hamscale.analysis.spectra import find_levels
from hamscale.cli import main
from hamscale.config import Analysis
from hamscale.files import read_table
from hamscale.operators import open_operators, write_operators
from hamscale.units import hartree_to_ev
from helpers import hafnia, model_hamiltonian


@pytest.fixture(scope="module")
def crystal(szv):
    return model_hamiltonian(hafnia(0).repeat((4, 3, 3)), szv)


@pytest.fixture(scope="module")
def path(crystal, tmp_path_factory):
    path = tmp_path_factory.mktemp("dos") / "o.h5"
    write_operators(path, crystal)
    return path


def test_a_cluster_has_the_blocks_of_its_atoms_one_by_one(crystal, path):
    rows = {tuple(pair): b for b, pair in enumerate(crystal.pairs.tolist())}
    with open_operators(path) as found:
        structure = regions.Structure(found)
        cluster, which, distances = structure.cluster(7, 5.0)
    near = [b for b in range(len(crystal.pairs)) if crystal.pairs[b, 0] == 7 and structure.distances[b] <= 5.0]
    members = crystal.pairs[near, 1:]
    assert which.tolist() == members[:, 0].tolist()
    assert len(set(map(tuple, members.tolist()))) > 20
    np.testing.assert_array_equal(distances, structure.distances[near])
    expected = {}
    for a, (i, *R) in enumerate(members.tolist()):
        for b, (j, *Q) in enumerate(members.tolist()):
            row = rows.get((i, j, *(np.array(Q) - R).tolist()))
            if row is not None:
                expected[a, b, 0, 0, 0] = row
    assert [tuple(pair) for pair in cluster.pairs.tolist()] == sorted(expected)
    for values, of_cluster in ((crystal.hamiltonian, cluster.hamiltonian), (crystal.overlap, cluster.overlap)):
        for b, pair in enumerate(cluster.pairs.tolist()):
            np.testing.assert_array_equal(cluster.block(of_cluster, b), crystal.block(values, expected[tuple(pair)]))


def test_shares_sum_to_two_per_level_and_per_orbital(crystal, path):
    with open_operators(path) as found:
        cluster, _, _ = regions.Structure(found).cluster(0, 5.0)
    levels, share, _ = regions.shares(cluster)
    np.testing.assert_allclose(share.sum(0), 2, rtol=1e-9)
    np.testing.assert_allclose(share.sum(1), 2 * cluster.orbitals, rtol=1e-9)
    # first moments: half of each atom's is the trace of its block of S^-1 H
    H, S = cluster.at_k((0, 0, 0))
    trace = np.add.reduceat(np.diag(np.linalg.solve(S, H)), np.cumsum(cluster.orbitals) - cluster.orbitals)
    np.testing.assert_allclose(share @ levels / 2, trace, rtol=1e-6)


def test_of_a_molecule_within_one_cluster_it_is_exact(szv, tmp_path):
    molecule = Atoms("HfO2", [[0, 0, 0], [1.9, 0, 0], [0, 2.0, 0.3]])
    write_operators(tmp_path / "m.h5", model_hamiltonian(molecule, szv))
    table, facts, *_ = regions.dos_table(tmp_path / "m.h5", 3, 9.0, 9.0, 0.2, 1000.0, exact=True)
    np.testing.assert_allclose(table["states_per_ev"], table["exact_states_per_ev"], atol=1e-9)
    assert facts["states"] == pytest.approx(2 * 18)
    assert facts["cluster_atoms"] == 3


def test_it_nears_that_of_all_eigenvalues_and_errors_say_what_drawing_does(crystal, path):
    """All atoms: only the cut is left, and it falls with the radius. Few: within the errors it gives, and more have less."""
    every = [regions.dos_table(path, 10**6, radius, 0.0, 0.5, 60.0, exact=True)[1] for radius in (2.5, 4.0, 5.6)]
    cut = [facts["rms_deviation_states_per_ev"] for facts in every]
    assert cut[0] > 1.5 * cut[1] > 1.5**2 * cut[2]
    assert cut[2] < 0.05 * every[2]["mean_states_per_ev"]
    (all_atoms, every_atom, *_), (some, facts, *_) = (regions.dos_table(path, n, 4.0, 2.5, 0.5, 20.0) for n in (10**6, 20))
    error, deviation = (
        some["standard_error_states_per_ev"],
        np.interp(some["energy_ev"], all_atoms["energy_ev"], all_atoms["states_per_ev"]),
    )
    deviation = np.abs(deviation - some["states_per_ev"])
    assert np.sqrt(np.mean(deviation**2)) < 2 * np.sqrt(np.mean(error**2))
    assert error.max() > 0
    assert np.sqrt(np.mean(error**2)) > 1.5 * np.sqrt(np.mean(all_atoms["standard_error_states_per_ev"] ** 2))
    assert facts["states"] == pytest.approx(2 * crystal.n_orbitals, rel=1e-3)
    assert abs(facts["fermi_level_ev"] - every_atom["fermi_level_ev"]) < 3 * facts["fermi_level_standard_error_ev"]
    assert facts["fermi_level_standard_error_ev"] > 1.5 * every_atom["fermi_level_standard_error_ev"]


def test_exact_is_of_all_eigenvalues_from_the_fermi_level(crystal, path):
    table, facts, *_ = regions.dos_table(path, 20, 4.0, 2.5, 0.5, 1000.0, exact=True)
    levels = eigh(*crystal.at_k((0, 0, 0)), eigvals_only=True)
    step = table["energy_ev"].diff().mean()
    assert (table["exact_states_per_ev"] * step).sum() == pytest.approx(2 * len(levels), rel=1e-6)
    # as many states below it as electrons
    below = table["energy_ev"] + facts["fermi_level_ev"] <= facts["exact_fermi_level_ev"]
    assert (table["exact_states_per_ev"] * step)[below].sum() == pytest.approx(crystal.n_electrons, abs=3)
    mean = (table["exact_states_per_ev"] * table["energy_ev"] * step).sum() / (2 * len(levels))
    assert mean + facts["fermi_level_ev"] == pytest.approx(hartree_to_ev(levels.mean()), abs=0.02)


def test_band_edges_of_clusters_are_near_those_of_all_kpoints(si8, tmp_path):
    """Of silicon, whose clusters have a gap too; a metal has none."""
    write_operators(tmp_path / "si8.h5", si8)
    exact = find_levels(si8, Analysis(kgrid=(4, 4, 4)))
    _, facts, levels, _ = regions.dos_table(tmp_path / "si8.h5", 8, 10.0, 2.5, 0.2, 10.0)
    assert not levels.metal
    assert levels.clusters == 8
    assert hartree_to_ev(abs(levels.valence_band_maximum - exact.valence_band_maximum)) < 0.5
    assert hartree_to_ev(abs(levels.mid_gap - exact.mid_gap)) < 0.5
    assert facts["mid_gap_ev"] == pytest.approx(hartree_to_ev(levels.mid_gap), abs=1e-4)
    assert facts["mid_gap_standard_error_ev"] < 1e-3  # all atoms were drawn, and all are alike


def test_the_verb_writes_a_table_and_refuses_what_has_no_error(crystal, path, tmp_path, capsys, monkeypatch):
    verb = ["dos", str(path), "--radius", "4", "--core", "2", "--out", str(tmp_path / "dos.csv")]
    assert main([*verb, "--clusters", "6", "--width", "0.5", "--window", "5"]) == 0
    table, facts = read_table(tmp_path / "dos.csv"), json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["orbitals"] == crystal.n_orbitals
    assert facts["clusters"] == 6
    assert table["energy_ev"].abs().max() <= 5
    assert (table["standard_error_states_per_ev"] > 0).any()
    monkeypatch.setattr(regions, "DENSE", 10)
    for arguments, message in [
        (["--clusters", "1"], "1 clusters: expected two at least"),
        (["--radius", "400"], "expected 0 <= core <= radius <="),
        (["--core", "5"], "core 5 A, radius 4 A: expected 0 <= core"),
        (["--exact"], "expected at most 10. Take a smaller structure"),
    ]:
        assert main([*verb, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_an_overlap_that_is_not_positive_definite_is_refused(crystal, tmp_path):
    broken = crystal.select(np.ones(len(crystal.pairs), bool))
    broken.overlap = -broken.overlap
    write_operators(tmp_path / "o.h5", broken)
    with pytest.raises(ValueError, match="not positive definite"):
        regions.dos_table(tmp_path / "o.h5", 2, 4.0, 2.0, 0.2, 5.0)
