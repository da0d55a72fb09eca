import pytest

from hamscale.basis import read_element_basis
from helpers import DZVP, SZV, basis_of


@pytest.mark.parametrize(
    ("element", "name", "shells", "valence", "potential"),
    [
        ("H", DZVP, (0, 0, 1), 1, "GTH-PBE-q1"),
        ("O", DZVP, (0, 0, 1, 1, 2), 6, "GTH-PBE-q6"),
        ("Hf", SZV, (0, 0, 1, 2), 12, "GTH-PBE-q12"),
        ("Ga", DZVP, (0, 0, 1, 1, 2, 2, 3), 13, "GTH-PBE-q13"),  # the file also has a potential for 3 electrons
    ],
)
def test_shells_and_valence_come_from_the_files(element, name, shells, valence, potential):
    basis = read_element_basis(element, name, "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS")
    assert (basis.l, basis.valence, basis.potential) == (shells, valence, potential)
    assert basis.n_orbitals == sum(2 * l + 1 for l in shells) == basis.shell_slices[-1].stop


def test_basis_and_potential_may_be_named_with_their_electrons():
    short = read_element_basis("Si", SZV, "GTH-PBE", "BASIS_MOLOPT", "GTH_POTENTIALS")
    long = read_element_basis("Si", f"{SZV}-q4", "GTH-PBE-q4", "BASIS_MOLOPT", "GTH_POTENTIALS")
    assert (short.text, short.potential) == (long.text, long.potential)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Xx", SZV, "GTH-PBE"), "'Xx' is not a chemical element"),
        (("Hf", "QZVP", "GTH-PBE"), "element Hf has no basis set QZVP; it has SZV-MOLOPT-SR-GTH"),
        (("Hf", SZV, "GTH-BP"), "element Hf has no potential GTH-BP for 12 valence electrons"),
        (("Fm", SZV, "GTH-PBE"), "it has no basis set of this element"),
    ],
)
def test_what_the_files_lack_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_element_basis(*arguments, "BASIS_MOLOPT", "GTH_POTENTIALS")


def test_missing_file_and_unknown_element():
    with pytest.raises(ValueError, match="BASIS_NOWHERE: no such file"):
        read_element_basis("H", SZV, "GTH-PBE", "BASIS_NOWHERE", "GTH_POTENTIALS")
    with pytest.raises(ValueError, match="no basis for element O; this basis holds H"):
        basis_of(H=SZV)[8]


def test_difference_names_what_differs():
    assert basis_of(O=SZV, H=SZV).difference(basis_of(O=SZV)) == ""
    assert "O: SZV" in basis_of(O=SZV, H=SZV).difference(basis_of(O=DZVP))
