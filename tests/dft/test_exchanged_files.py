"""Runs of CP2K with files that are those of others: of matrices, or of basis sets."""

import re

import pytest

from hamscale.basis import Basis, find_data_file, read_element_basis
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import read_run
from hamscale.export import cp2k_runs
from hamscale.graph.placement import exchanged_images
from helpers import SZV, basis_of, hafnia, model_hamiltonian, unpacked


@pytest.fixture
def run(tmp_path):
    return unpacked("si2-2026.2", tmp_path / "run")


def _exchange(run, matrix, *cells):
    """Exchange the files of a matrix of two cells R, or give that of each cell to the next one."""
    images = parse_output(run / "run.out").images.tolist()
    paths = [run / f"run-{matrix}_SPIN_1_R_{1 + images.index(list(cell))}-1_0.csr" for cell in cells]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1]):
        path.write_bytes(content)


def test_images_of_s_that_were_exchanged_are_refused(run):
    cp2k_runs.read(run, basis_of(Si=SZV))
    for cell in ((0, 0, 1), (1, 0, 0)):
        _exchange(run, "S", cell, tuple(-n for n in cell))
    with pytest.raises(ValueError, match="S differs from the two-centre integrals of the basis by"):
        cp2k_runs.read(run, basis_of(Si=SZV))


def test_images_of_h_that_were_exchanged_are_refused(run):
    """Each with its opposite: H stays Hermitian, and where k and -k are alike the eigenvalues stay too."""
    operators = cp2k_runs.read(run, basis_of(Si=SZV))
    cp2k_runs.check_images("it", operators)
    for cell in ((0, 0, 1), (1, 0, 0), (0, 1, 0)):
        _exchange(run, "KS", cell, tuple(-n for n in cell))
    exchanged = read_run(run, operators.atoms, operators.basis)  # Hermitian, complete, finite
    assert max(exchanged.hermiticity_error().values()) == 0
    with pytest.raises(ValueError, match=r"H of the image R = .* is that of R = .* by its S"):
        cp2k_runs.check_images("it", exchanged)


def test_no_image_of_a_model_is_taken_for_another(szv, si8):
    for operators in (si8, *(model_hamiltonian(hafnia(seed), szv) for seed in range(3))):
        assert exchanged_images(operators) == []


def _edited(folder, pattern: str, replacement: str) -> Basis:
    """The basis of silicon from a file of basis sets with one number changed."""
    text = find_data_file("BASIS_MOLOPT").read_text()
    start = text.index(f"Si {SZV}")
    end = text.index("#", start)
    changed, count = re.subn(pattern, replacement, text[start:end], count=1)
    assert count == 1
    path = folder / "BASIS"
    path.write_text(text[:start] + changed + text[end:])
    return Basis([read_element_basis("Si", SZV, "GTH-PBE", str(path), "GTH_POTENTIALS")])


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"1\.2567", "1.2568"), (r"(?<=1\.25676\d{7}  ).", "1"), (r"0\.0873", "0.0883")],
    ids=["exponent", "coefficient", "last exponent"],
)
def test_a_file_of_basis_sets_that_was_edited_after_the_run_is_refused(run, tmp_path, pattern, replacement):
    read_run(run, cp2k_runs.read_structure(run), basis_of(Si=SZV))
    edited = _edited(tmp_path, pattern, replacement)
    with pytest.raises(ValueError, match=f"Si was run with other exponents or coefficients than basis {SZV}") as refused:
        read_run(run, cp2k_runs.read_structure(run), edited)
    assert str(run / "run.out") in str(refused.value)
    assert "\n" not in str(refused.value)
