"""Spin-polarised runs of CP2K: their input, their two matrices H, odd electrons, charges."""

from dataclasses import replace

import numpy as np
import pytest

from hamscale.analysis.spectra import find_levels
from hamscale.basis import material_basis
from hamscale.building import build_structure
from hamscale.config import Analysis, Material, sha256
from hamscale.dft.inputs import cp2k_input, electrons_by_spin
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import eigenvalue_check, read_run
from hamscale.dft.run import check_run, run_cp2k
from hamscale.operators import read_operators
from hamscale.structures import read_structure_file
from helpers import DATA, SZV, basis_of, material, silicon, unpacked, written

RECORDED = DATA / "cp2k"


def oxygen(charge: int = 0, multiplicity: int | None = None, **dft) -> Material:
    structures = {
        "train": {
            "split": "train",
            "builder": {"name": "molecule", "arguments": {"name": "O2"}},
            "box_angstrom": 7.0,
            "rattle_angstrom": 0.02,
            "seed": 1,
            "charge": charge,
            "multiplicity": multiplicity,
        }
    }
    content = {"species": {"O": {"basis": SZV}}, "dft": {"cutoff_ry": 200, "rel_cutoff_ry": 40} | dft, "structures": structures}
    return Material.model_validate(content)


def test_a_recorded_run_gives_a_matrix_of_each_spin(tmp_path):
    folder, atoms = unpacked("h2-uks-2026.2", tmp_path / "run"), read_structure_file(RECORDED / "h2.extxyz")
    check_run(folder, 0)
    operators = read_run(folder, atoms, basis_of(H=SZV))
    assert operators.spins == 2
    assert operators.hamiltonian.shape == (2, len(operators.overlap))
    assert eigenvalue_check(operators) < 1e-11
    assert operators.orbital_energies[1].shape == (2, 1, 2)
    wrong = replace(operators, hamiltonian=operators.hamiltonian + np.array([[0.0], [1e-3]]) * operators.overlap)
    assert eigenvalue_check(wrong) == pytest.approx(1e-3)  # the second spin is looked at
    back = read_operators(written(tmp_path, operators))
    assert np.array_equal(back.hamiltonian, operators.hamiltonian)
    assert np.array_equal(back.orbital_energies[1], operators.orbital_energies[1])
    (folder / "run-KS_SPIN_2-1_0.csr").unlink()
    with pytest.raises(ValueError, match="1 files of KS_SPIN_2, found 0"):
        check_run(folder, 0)


@pytest.mark.parametrize("version", ["2023.1", "2026.2"])
def test_tables_of_both_spins_are_read_in_turn(version, tmp_path):
    """The log has ALPHA and BETA of the first k-point, then of the second."""
    output = parse_output(unpacked(f"si2-uks-{version}", tmp_path / "run") / "run.out")
    assert output.spins == 2
    assert output.mo_energies.shape == (2, 4, 8)
    text = (tmp_path / "run/run.out").read_text()
    table = text[text.index("BETA EIGENVALUES AND OCCUPATION NUMBERS FOR K POINT 3") :].splitlines()[3:11]
    np.testing.assert_array_equal(output.mo_energies[1, 2], [float(line.split()[2]) for line in table])


def test_the_triplet_of_oxygen(cp2k, tmp_path):
    """Its moment is two Bohr magnetons, also where only the energies of both spins say so; spin up lies lower."""
    settings = oxygen(spin={"magnetization": {"O": 1}})
    atoms, basis = build_structure(settings, "train-000"), material_basis(settings)
    (tmp_path / "o2.inp").write_text(cp2k_input(atoms, settings, basis))
    run_cp2k(tmp_path / "o2.inp", tmp_path / "run")
    operators = read_run(tmp_path / "run", atoms, basis)
    assert eigenvalue_check(operators) < 2e-8
    assert find_levels(operators, Analysis()).filled == (7, 5)
    up, down = (of_spin[0] for of_spin in operators.orbital_energies[1])
    assert (up[:7] < down[:7]).all()
    with pytest.raises(ValueError, match="the run has charge 0, the structure 1"):
        read_run(tmp_path / "run", build_structure(oxygen(charge=1), "train-000"), basis)


def test_electrons_of_each_spin():
    def of(charge=0, multiplicity=None, **spin) -> tuple[int, ...]:
        settings = oxygen(charge, multiplicity, spin=spin)
        return electrons_by_spin(build_structure(settings, "train-000"), settings, material_basis(settings))

    assert of() == (6, 6)
    assert of(magnetization={"O": 1}) == (7, 5)
    assert of(multiplicity=3) == (7, 5)
    assert of(charge=1) == (6, 5)
    assert of(charge=-1, magnetization={"O": 1}) == (7, 6)
    assert of(charge=1, multiplicity=4) == (7, 4)
    for multiplicity in (2, 7):  # of twelve electrons, of which eight orbitals hold at most eight of one spin
        with pytest.raises(ValueError, match=f"12 valence electrons cannot have multiplicity {multiplicity}"):
            of(multiplicity=multiplicity)


def test_a_charge_needs_no_spin_if_electrons_pair(tmp_path):
    settings = oxygen(charge=2)
    atoms, basis = build_structure(settings, "train-000"), material_basis(settings)
    text = cp2k_input(atoms, settings, basis)
    assert "CHARGE 2\n" in text
    assert "UKS" not in text
    with pytest.raises(ValueError, match="11 valence electrons, expected an even number.*dft.spin"):
        cp2k_input(build_structure(oxygen(charge=1), "train-000"), oxygen(charge=1), basis)


def test_settings_without_spin_and_charge_have_the_hash_they_had():
    """Results of earlier versions are not made anew."""
    settings = oxygen()
    assert "spin" not in settings.dft.model_dump()
    assert "charge" not in settings.structures["train"].model_dump()
    assert sha256(settings.dft) != sha256(oxygen(spin={}).dft)
    assert oxygen(charge=1).structures["train"].model_dump(exclude={"count"})["charge"] == 1


def test_a_moment_of_an_element_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="dft.spin.magnetization has Fe, expected elements of species: O"):
        oxygen(spin={"magnetization": {"Fe": 3}})
    with pytest.raises(ValueError, match="structures.train.multiplicity is 3, expected with dft.spin"):
        oxygen(multiplicity=3)


def test_a_metal_keeps_a_moment_only_if_its_multiplicity_is_given():
    settings = oxygen(smearing={}, spin={"magnetization": {"O": 1}})
    atoms, basis = build_structure(settings, "train-000"), material_basis(settings)
    assert "FIXED_MAGNETIC_MOMENT" not in cp2k_input(atoms, settings, basis)
    atoms.info["multiplicity"] = 3
    assert "FIXED_MAGNETIC_MOMENT 2.0" in cp2k_input(atoms, settings, basis)
    settings, atoms = material({"Si": SZV}, smearing={}, spin={}), silicon()
    atoms.info["multiplicity"] = 3
    with pytest.raises(ValueError, match="multiplicity 3 with dft.smearing and k-points: CP2K cannot hold"):
        cp2k_input(atoms, settings, material_basis(settings))
