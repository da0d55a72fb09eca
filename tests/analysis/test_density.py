"""Charges of atoms, also as CP2K prints them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from ase.dft.kpoints import monkhorst_pack

from hamscale.analysis.density import mulliken_charges, mulliken_populations
from hamscale.basis import Basis, material_basis
from hamscale.dft.inputs import cp2k_input
from hamscale.dft.outputs import read_run
from hamscale.dft.run import run_cp2k
from hamscale.structures import k_grid, wrap_as_cp2k
from helpers import SZV, hafnia, material, model_hamiltonian


@pytest.mark.parametrize("charge", [0, -1, 2])
def test_the_sum_of_the_charges_is_the_charge_of_the_structure(charge, szv):
    operators = model_hamiltonian(hafnia(), szv)
    operators.atoms.info["charge"] = charge
    assert mulliken_charges(operators, *k_grid((2, 3, 1))).sum() == pytest.approx(charge, abs=1e-9)


def test_populations_are_those_of_each_state(si8):
    """State by state, on the whole grid: sum_n f_n c_a^* (S c)_a of the rows a of each atom."""
    operators, counts = si8, (3, 1, 2)
    expected = np.zeros(operators.n_orbitals)
    for k in np.ndindex(counts):
        H, S = operators.at_k(np.array(k) / counts)
        L = np.linalg.inv(np.linalg.cholesky(S))
        states = L.conj().T @ np.linalg.eigh(L @ H @ L.conj().T)[1]
        filled = states[:, : operators.n_electrons // 2]
        expected += 2 / 6 * (filled.conj() * (S @ filled)).sum(1).real
    of_atoms = np.add.reduceat(expected, np.cumsum(operators.orbitals) - operators.orbitals)
    np.testing.assert_allclose(mulliken_populations(operators, *k_grid(counts)), of_atoms[None], atol=1e-9)


def test_elements_without_valence_electrons_have_no_charges(szv):
    operators = model_hamiltonian(hafnia(), szv)
    operators.basis = Basis(replace(element, valence=0) for element in operators.basis.values())
    operators.attributes["electrons"] = 48
    with pytest.raises(ValueError, match="does not say how many valence electrons Hf has"):
        mulliken_charges(operators, *k_grid((1, 1, 1)))


@pytest.mark.parametrize("spin", [None, {"magnetization": {"B": 0.5}}], ids=["restricted", "polarised"])
def test_charges_and_moments_are_those_that_cp2k_prints(cp2k, spin, tmp_path):
    smearing = {"temperature_kelvin": 3000} if spin else None
    of_dft = {"cutoff_ry": 120, "rel_cutoff_ry": 30, "kpoints": (3, 2, 1), "eps_scf": 1e-8, "smearing": smearing, "spin": spin}
    settings = material({"B": SZV, "N": SZV}, **of_dft)
    atoms = bulk("BN", "zincblende", a=3.6)
    atoms.positions[1] += 0.1
    atoms, basis = wrap_as_cp2k(atoms), material_basis(settings)
    (tmp_path / "a.inp").write_text(cp2k_input(atoms, settings, basis))
    run_cp2k(tmp_path / "a.inp", tmp_path / "a")
    operators = read_run(tmp_path / "a", atoms, basis)
    output = (tmp_path / "a" / "run.out").read_text().split("Mulliken Population Analysis")[-1].split("# Total")[0]
    rows = [line.split()[3:] for line in output.splitlines() if re.match(r" +\d+ +[BN] ", line)]
    # CP2K's columns: electrons, net charge; of two spins up, down, net charge, moment
    rows, charge = np.array(rows, float), -2 if spin else -1
    arguments = operators, monkhorst_pack((3, 2, 1)), np.full(6, 1 / 6), 3000.0 if spin else 300.0
    np.testing.assert_allclose(mulliken_populations(*arguments).T, rows[:, : operators.spins], atol=2e-5)
    np.testing.assert_allclose(mulliken_charges(*arguments), rows[:, charge], atol=2e-5)
    assert np.abs(rows[:, charge]).min() > 0.05
