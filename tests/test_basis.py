import pytest

from hamscale.basis import find_data_file, read_element_basis
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


HYDROGEN = """# a comment
H  SZV SZV-q1
  1
  1  0  1  2  1  1
      1.25  0.30 0.10
      0.25 -0.70 0.90   ! another
O  SZV SZV-q6
  1
  1  0  0  1  1
      1.25  0.30
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.25  0.30 0.10", "-1.25 0.30 0.10", "an exponent is below 1e-6"),
        ("1.25  0.30 0.10", "nan 0.30 0.10", "no basis set SZV|not in CP2K's format|lines, expected"),
        ("1.25  0.30 0.10", "1e999999999 0.30 0.10", "not finite, too large, or of more than 40 decimals"),
        ("1.25  0.30 0.10", "1e-999999999 0.30 0.10", "not finite, too large, or of more than 40 decimals"),
        ("1.25  0.30 0.10", "1.25 0.30", "a line without exponent and 2 coefficients"),
        ("1.25  0.30 0.10", "1.25 0.30 0.1_0", "not in CP2K's format"),
        ("0.10\n      0.25 -0.70 0.90", "0\n      0.25 -0.70 0", "a shell whose coefficients are all zero"),
        ("  1\n  1  0  1", "  2\n  1  0  1", "not in CP2K's format: list index out of range"),
        ("  1\n  1  0  1", "  0\n  1  0  1", "lines, expected those of 0 sets"),
        ("  1\n  1  0  1", "  999999999999\n  1  0  1", "not in CP2K's format"),
        ("1  0  1  2  1  1", "1  0  1  1  1  1", "5 lines, expected those of 1 sets and no more"),
        ("1  0  1  2  1  1", "1  0  1  99999999999  1  1", "Not enough exponents found"),
        ("1  0  1  2  1  1", "1  0  9  2  1  1", "is no line of n, lmin, lmax"),
        ("1  0  1  2  1  1", "1  1  0  2  1  1", "is no line of n, lmin, lmax"),
        ("1  0  1  2  1  1", "1  0  1  2  1  0", "a line without exponent and 1 coefficients"),
        ("O  SZV", "H  SZV", "SZV of H is there 2 times, with other numbers"),
        ("# a comment", "\0", "a binary file, expected text"),
    ],
)
def test_a_basis_file_that_was_changed_is_refused_in_a_line(old, new, message, tmp_path):
    assert HYDROGEN.count(old) == 1
    path = tmp_path / "BASIS"
    path.write_text(HYDROGEN)
    assert read_element_basis("H", "SZV", "GTH-PBE", str(path), "GTH_POTENTIALS").l == (0, 1)
    path.write_text(HYDROGEN.replace(old, new))
    with pytest.raises(ValueError, match=message) as refused:
        read_element_basis("H", "SZV", "GTH-PBE", str(path), "GTH_POTENTIALS")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_entries_of_other_elements_and_spellings_do_not_belong_to_one(tmp_path):
    """CP2K's own files have titles such as NA or H (41), notes behind numbers, and kinds of entries that are not read."""
    first, second = HYDROGEN.split("O  SZV")
    for title in ("HE  SZV", "O  (41) SZV", "****\nO  SZV", "END\nO  SZV"):
        path = tmp_path / "BASIS"
        path.write_text(first.replace("2  1  1\n", "2  1  1    1s  2p\n") + title + second)
        assert read_element_basis("H", "SZV", "GTH-PBE", str(path), "GTH_POTENTIALS").l == (0, 1)


@pytest.mark.parametrize("electrons", ["-1", "999", "x", ""])
def test_a_potential_that_was_changed_is_refused_in_a_line(electrons, tmp_path):
    lines = find_data_file("GTH_POTENTIALS").read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("H GTH-PBE-q1"))
    path = tmp_path / "POTENTIALS"
    path.write_text("\n".join([lines[place], electrons, *lines[place + 2 : place + 4]]) + "\n")
    with pytest.raises(ValueError, match="POTENTIALS: ") as refused:
        read_element_basis("H", SZV, "GTH-PBE", "BASIS_MOLOPT", str(path))
    assert "\n" not in str(refused.value)
