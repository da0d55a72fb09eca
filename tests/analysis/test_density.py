"""Charges of atoms, also as CP2K prints them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.dft.kpoints import monkhorst_pack

from hamscale.analysis.density import mulliken_charges, mulliken_populations
from hamscale.basis import Basis, material_basis
from hamscale.dft.inputs import cp2k_input
from hamscale.dft.outputs import read_run
from hamscale.dft.run import run_cp2k
from hamscale.structures import k_grid, wrap_as_cp2k
from helpers import DZVP, SZV, hafnia, material, model_hamiltonian


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


def printed_by_cp2k(atoms, settings, folder):
    """Operators of a run of CP2K, and the rows of its table: electrons, charge; of two spins up, down, charge, moment."""
    atoms, basis = wrap_as_cp2k(atoms), material_basis(settings)
    (folder / "a.inp").write_text(cp2k_input(atoms, settings, basis))
    run_cp2k(folder / "a.inp", folder / "a")
    output = (folder / "a" / "run.out").read_text().split("Mulliken Population Analysis")[-1].split("# Total")[0]
    rows = [line.split()[3:] for line in output.splitlines() if re.match(r" +\d+ +[A-Z][a-z]? ", line)]
    return read_run(folder / "a", atoms, basis), np.array(rows, float)


def test_charges_are_those_that_cp2k_prints_of_a_crystal(cp2k, tmp_path):
    atoms = bulk("BN", "zincblende", a=3.6)
    atoms.positions[1] += 0.1
    settings = material({"B": SZV, "N": SZV}, cutoff_ry=120, rel_cutoff_ry=30, kpoints=(3, 2, 1), eps_scf=1e-8)
    operators, rows = printed_by_cp2k(atoms, settings, tmp_path)
    grid = monkhorst_pack((3, 2, 1)), np.full(6, 1 / 6)
    np.testing.assert_allclose(mulliken_populations(operators, *grid)[0], rows[:, 0], atol=2e-5)
    np.testing.assert_allclose(mulliken_charges(operators, *grid), rows[:, 1], atol=2e-5)
    assert np.abs(rows[:, 1]).min() > 0.05


def test_charges_and_moments_are_those_that_cp2k_prints_of_a_radical(cp2k, tmp_path):
    """NH2, whose odd electron is on the nitrogen."""
    atoms = Atoms("NHH", [(0, 0, 0.14), (0, 0.8, -0.49), (0, -0.8, -0.49)], cell=[7.0] * 3)
    atoms.center()
    atoms.info["multiplicity"] = 2
    settings = material({"N": DZVP, "H": DZVP}, cutoff_ry=150, rel_cutoff_ry=30, eps_scf=1e-7, spin={})
    operators, rows = printed_by_cp2k(atoms, settings, tmp_path)
    gamma = np.zeros((1, 3)), np.ones(1)
    up, down = mulliken_populations(operators, *gamma)
    np.testing.assert_allclose([up, down, up - down], rows[:, [0, 1, 3]].T, atol=2e-5)
    np.testing.assert_allclose(mulliken_charges(operators, *gamma), rows[:, 2], atol=2e-5)
    assert rows[0, 3] > 0.8
