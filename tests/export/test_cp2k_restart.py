"""The density matrix, and CP2K that begins from it."""

import numpy as np
import pytest
from scipy.linalg import eigh

from hamscale.analysis.density import density_matrix
from hamscale.basis import material_basis
from hamscale.cli import main
from hamscale.dft.inputs import cp2k_input
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import read_run
from hamscale.dft.run import run_cp2k
from hamscale.operators import write_operators
from hamscale.structures import k_grid, wrap_as_cp2k
from helpers import SZV, hafnia, material, model_hamiltonian, silicon, written


@pytest.mark.parametrize("charge", [0, -1])
def test_the_density_matrix_holds_the_electrons(charge, szv):
    """Also an odd number of them, with which every crystal is a metal."""
    operators = model_hamiltonian(hafnia(), szv)
    operators.atoms.info["charge"] = charge
    (values,) = density_matrix(operators, *k_grid((2, 3, 1)))
    assert operators.n_electrons % 2 == charge % 2
    assert values @ operators.overlap == pytest.approx(operators.n_electrons, abs=1e-9)


def test_the_density_matrix_is_a_sum_over_filled_states(si8):
    """State by state, on the whole grid of k."""
    operators, counts = si8, (3, 1, 2)
    (values,) = density_matrix(operators, *k_grid(counts))
    starts = np.cumsum(operators.orbitals) - operators.orbitals
    for pair in range(0, len(operators.pairs), 397):
        (i, j, *R), expected = operators.pairs[pair], 0.0
        rows, columns = (slice(starts[a], starts[a] + operators.orbitals[a]) for a in (i, j))
        for k in np.ndindex(counts):
            H, S = operators.at_k(k := np.array(k) / counts)
            for state in eigh(H, S)[1].T[: operators.n_electrons // 2]:
                expected += 2 / 6 * np.outer(state[rows], state[columns].conj()) * np.exp(-2j * np.pi * k @ R)
        np.testing.assert_allclose(operators.block(values, pair), expected.real, atol=1e-9)
        np.testing.assert_allclose(expected.imag, 0, atol=1e-9)


@pytest.mark.parametrize("spin", [None, {"magnetization": {"Si": 0.1}}], ids=["restricted", "polarised"])
def test_cp2k_begins_from_the_density_of_its_own_hamiltonian_and_is_done(cp2k, spin, tmp_path):
    settings = material({"Si": SZV}, cutoff_ry=80, rel_cutoff_ry=30, kpoints=(3, 2, 1), eps_scf=1e-9, spin=spin)
    atoms, basis = wrap_as_cp2k(silicon()), material_basis(settings)
    (tmp_path / "a.inp").write_text(cp2k_input(atoms, settings, basis))
    run_cp2k(tmp_path / "a.inp", tmp_path / "a")
    write_operators(tmp_path / "a.h5", read_run(tmp_path / "a", atoms, basis))
    arguments = ["export", f"{tmp_path}/a.h5", "--to", "cp2k-restart", "--kgrid", "3", "2", "1", "--out", f"{tmp_path}/a.kp"]
    assert main(arguments) == 0
    (tmp_path / "b.inp").write_text(cp2k_input(atoms, settings, basis, tmp_path / "a.kp"))
    run_cp2k(tmp_path / "b.inp", tmp_path / "b")
    first, second = (parse_output(tmp_path / name / "run.out") for name in "ab")
    assert first.scf_steps > 6
    assert second.scf_steps <= 2
    assert second.total_energy == pytest.approx(first.total_energy, abs=1e-8)


def test_what_cp2k_cannot_begin_from_is_refused(tmp_path, szv, capsys):
    path = str(written(tmp_path, model_hamiltonian(hafnia(), szv)))
    assert main(["export", path, "--to", "cp2k-restart", "--out", f"{tmp_path}/a.kp"]) == 1
    assert "without --kgrid, expected that of the run" in capsys.readouterr().err
    assert main(["export", path, "--to", "sisl", "--kgrid", "1", "1", "1", "--out", f"{tmp_path}/a.nc"]) == 1
    assert "--kgrid came with --to sisl, expected --to cp2k-restart" in capsys.readouterr().err
