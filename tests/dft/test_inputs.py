import numpy as np
import pytest
from ase import Atoms

from hamscale.basis import material_basis
from hamscale.dft.inputs import cp2k_input
from helpers import DZVP, SZV, WATER, hafnia, material, silicon

SILICON = material({"Si": SZV}, cutoff_ry=100)


def test_a_periodic_structure_gets_resolved_images_even_at_gamma():
    text = cp2k_input(silicon(), SILICON, material_basis(SILICON))
    for line in ("SCHEME MONKHORST-PACK 1 1 1", "REAL_SPACE .TRUE.", "BINARY .TRUE.", "METHOD BROYDEN_MIXING", "NDIGITS 12"):
        assert line in text
    assert "SMEAR" not in text
    assert "ADDED_MOS 4" in text  # 8 orbitals, 4 occupied


def test_a_molecule_gets_no_kpoints_and_open_boundaries():
    settings = material({"H": DZVP, "O": DZVP})
    text = cp2k_input(WATER, settings, material_basis(settings))
    assert "KPOINTS" not in text
    assert text.count("PERIODIC NONE") == 2
    assert "WAVELET" in text


def test_positions_are_written_to_full_precision():
    atoms = hafnia(3)
    settings = material({"Hf": SZV, "O": SZV})
    lines = cp2k_input(atoms, settings, material_basis(settings)).splitlines()
    start = next(k for k, line in enumerate(lines) if "&COORD" in line)
    written = np.array([[float(x) for x in line.split()[1:]] for line in lines[start + 1 : start + 4]])
    np.testing.assert_allclose(written, atoms.positions, atol=1e-13)


def test_the_grid_of_f_shells_and_the_kernel_of_elpa_are_written_where_they_matter():
    plain = cp2k_input(silicon(), SILICON, material_basis(SILICON))
    assert "BACKEND" not in plain
    assert "ELPA_KERNEL" not in plain
    gallium = material({"Ga": DZVP}, elpa_kernel="GENERIC")
    basis = material_basis(gallium)
    assert basis.lmax == 3
    atoms = silicon()
    atoms.symbols[:] = "Ga"
    text = cp2k_input(atoms, gallium, basis)
    assert "BACKEND CPU" in text
    assert "ELPA_KERNEL GENERIC" in text


def test_smearing_only_where_asked():
    settings = material({"Si": SZV}, smearing={"temperature_kelvin": 500})
    assert "ELECTRONIC_TEMPERATURE 500" in cp2k_input(silicon(), settings, material_basis(settings))


def test_a_functional_cp2k_does_not_know_is_refused_before_it_runs():
    settings = material({"Si": SZV}, functional="PBEE")
    with pytest.raises(ValueError, match="grammar refuses.*PBEE"):
        cp2k_input(silicon(), settings, material_basis(settings))


@pytest.mark.parametrize(("pbc", "solver"), [((1, 1, 0), "MT"), ((0, 1, 1), "MT"), ((0, 1, 0), "ANALYTIC")])
def test_a_slab_and_a_wire_have_the_solver_of_their_periodicity_and_no_kpoints_across(pbc, solver):
    settings = material({"H": SZV}, kpoints=(3, 3, 3))
    atoms = Atoms("H2", [(0, 0, 0), (0.5, 0.4, 0.3)], cell=[11, 11, 11], pbc=pbc)
    text = cp2k_input(atoms, settings, material_basis(settings))
    along = "".join(axis for axis, periodic in zip("XYZ", pbc) if periodic)
    assert text.count(f"PERIODIC {along}\n") == 2
    assert f"POISSON_SOLVER {solver}\n" in text
    assert "SCHEME MONKHORST-PACK " + " ".join("3" if periodic else "1" for periodic in pbc) in text


def test_open_cell_vectors_for_which_the_solver_is_wrong_are_refused():
    settings = material({"H": SZV})
    for cell, message in (
        ([3, 3, 10.5], r"open cell vector c is 10.50 A long, expected 10.60 A at least"),
        ([[3, 0, 0], [0, 3, 0], [0.5, 0, 12]], r"open cell vector c is \[0.5, 0.0, 12.0\] A, expected one along z"),
        ([[3, 0, 0.5], [0, 3, 0], [0, 0, 12]], "and the others perpendicular to it"),
        ([[0, 0, 12], [3, 0, 0], [0, 3, 0]], "change the order of its axes"),
    ):
        atoms = Atoms("H2", [(0, 0, 0), (0.5, 0.4, 0.3)], cell=cell, pbc=(1, 1, 0))
        with pytest.raises(ValueError, match=f"periodic along XY: the .*{message}"):
            cp2k_input(atoms, settings, material_basis(settings))


def test_odd_electrons_and_unwrapped_atoms_are_refused():
    settings = material({"H": DZVP, "O": DZVP})
    with pytest.raises(ValueError, match="7 valence electrons, expected an even number"):
        cp2k_input(WATER[:2], settings, material_basis(settings))
    atoms = silicon()
    atoms.positions[0] += np.asarray(atoms.cell)[0]
    with pytest.raises(ValueError, match="not wrapped"):
        cp2k_input(atoms, SILICON, material_basis(SILICON))
