"""Parsed H and S against what CP2K itself printed of them."""

import re
import shutil

import numpy as np
import pytest

from hamscale.angular import rotation_matrix
from hamscale.dft.csr import RECORD, read_csr
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import eigenvalue_check, read_run
from hamscale.graph.overlap import overlap_table
from hamscale.operators import read_operators, write_operators
from hamscale.units import hartree_to_ev
from helpers import DATA, DZVP, basis_of


def test_recorded_silicon_at_its_four_kpoints(si8):
    assert len(si8.orbital_energies[0]) == 4
    assert si8.orbital_energies[1].shape == (4, 32)
    assert eigenvalue_check(si8) < 5e-9


def test_recorded_silicon_files_of_what_is_above_a_threshold(recorded, si8):
    """CP2K's own binary files; leaving out what is below 1e-9 costs 3e-8 Ha."""
    cut = read_run(recorded["si8_cut"], si8.atoms, si8.basis)
    assert 5e-9 < eigenvalue_check(cut) < 5e-8
    rows = {tuple(p): b for b, p in enumerate(si8.pairs.tolist())}
    for b, pair in enumerate(cut.pairs.tolist()):
        assert np.abs(cut.block(cut.hamiltonian, b) - si8.block(si8.hamiltonian, rows[tuple(pair)])).max() < 1.1e-9


def test_recorded_silicon_at_seven_band_points(si8):
    from scipy.linalg import eigh

    text = (DATA / "si8" / "bands.bs").read_text()
    points = re.findall(r"#  Point \d+ +Spin 1: +(\S+) +(\S+) +(\S+).*\n.*\n((?: +\d+ +\S+ +\S+\n)+)", text)
    assert len(points) == 7
    for *k, table in points:
        printed = np.array([float(line.split()[1]) for line in table.splitlines()])
        H, S = si8.at_k([float(x) for x in k])
        # printed to 1e-8 eV, at k-points printed to 1e-8
        assert np.abs(hartree_to_ev(eigh(H, S, eigvals_only=True)) - printed).max() < hartree_to_ev(5e-9)


@pytest.mark.parametrize("matrix", ["KS", "S"])
def test_text_and_binary_files_are_the_same_matrix(recorded, matrix):
    binary, text = (read_csr(recorded[f"h2o_{kind}"] / f"h2o_{kind}-{matrix}_SPIN_1-1_0.csr") for kind in ("bin", "txt"))
    for ours, theirs in zip(binary[:2], text[:2]):
        assert np.array_equal(ours, theirs)
    np.testing.assert_allclose(binary[2], text[2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["water", "silicon", "hafnia"])
def test_real_runs_give_the_energies_cp2k_printed(runs, name):
    directory, basis, atoms = runs[name]
    operators = read_run(directory, atoms, basis)
    assert eigenvalue_check(operators) < 5e-8
    assert max(operators.hermiticity_error().values()) == 0
    assert operators.attributes["eps_threshold"] == 1e-14


def test_kpoints_of_the_log_are_fractions_in_a_triclinic_cell(runs):
    directory, _, _ = runs["silicon"]
    np.testing.assert_allclose(parse_output(directory / "run.out").kpoints, [[-0.25, 0, 0]], atol=1e-6)


def test_operators_file_keeps_the_printed_energies(runs, tmp_path):
    directory, basis, atoms = runs["silicon"]
    write_operators(tmp_path / "a.h5", read_run(directory, atoms, basis))
    assert eigenvalue_check(read_operators(tmp_path / "a.h5")) < 5e-8


def test_h_and_s_turn_with_the_molecule(runs, rotation):
    """Two CP2K runs, one of the turned molecule: proves orbital order, signs and the parser. H to CP2K's grid noise."""
    straight, turned = (read_run(d, a, b) for d, b, a in (runs["water"], runs["water_turned"]))
    blocks = [rotation_matrix(l, rotation) for z in straight.atoms.numbers for l in straight.basis[int(z)].l]
    D = np.zeros((straight.n_orbitals,) * 2)
    start = 0
    for block in blocks:
        D[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    (H, S), (H_turned, S_turned) = straight.at_k((0, 0, 0)), turned.at_k((0, 0, 0))
    assert np.abs(D @ S @ D.T - S_turned).max() < 1e-9
    noise = np.abs(D @ H @ D.T - H_turned)
    assert noise.max() < 3.4e-4  # largest seen at 200 Ry; 1.2e-4 at 400 Ry
    assert np.abs(H - H_turned).max() > 0.01  # the turn is not a symmetry of the molecule


@pytest.mark.parametrize("name", ["water", "silicon", "hafnia"])
def test_two_centre_integrals_are_cp2k_overlap(runs, name):
    directory, basis, atoms = runs[name]
    operators = read_run(directory, atoms, basis)
    table, vectors = overlap_table(basis), operators.pairs.vectors
    worst = max(np.abs(table.blocks(a, b, vectors[k]) - at.take(operators.overlap)).max() for a, b, k, at in operators.groups())
    assert worst < 5e-7  # CP2K leaves out what is small at EPS_DEFAULT 1e-10


@pytest.fixture
def spoilt(runs, tmp_path):
    """A copy of the silicon run, to spoil."""
    directory, basis, atoms = runs["silicon"]
    shutil.copytree(directory, tmp_path / "run")
    return tmp_path / "run", basis, atoms


def _largest(directory, kind="KS"):
    return max(directory.glob(f"run-{kind}_*.csr"), key=lambda p: p.stat().st_size)


def _refused(spoilt, message):
    directory, basis, atoms = spoilt
    with pytest.raises(ValueError, match=message) as error:
        read_run(directory, atoms, basis)
    assert str(directory) in str(error.value)


def test_half_a_record_is_refused(spoilt):
    path = _largest(spoilt[0])
    path.write_bytes(path.read_bytes()[:-7])
    _refused(spoilt, "expected whole records of 24")


def test_a_file_cut_at_a_record_is_refused(spoilt):
    path = _largest(spoilt[0])
    path.write_bytes(path.read_bytes()[: -24 * 20])
    _refused(spoilt, "differs from its adjoint|no transposed block")


@pytest.mark.parametrize("kept", [-24, 0], ids=["last record lost", "emptied"])
@pytest.mark.parametrize("kind", ["KS", "S"])
def test_a_diagonal_element_lost_at_a_record_is_refused(spoilt, kind, kept):
    """The last record of R = 0 is the last diagonal element: the matrix without it is still Hermitian."""
    path = spoilt[0] / f"run-{kind}_SPIN_1_R_1-1_0.csr"
    path.write_bytes(path.read_bytes()[:kept])
    _refused(spoilt, "diagonal elements")


def test_a_singular_overlap_names_the_kpoint(runs):
    directory, basis, atoms = runs["silicon"]
    operators = read_run(directory, atoms, basis)
    operators.overlap = np.zeros_like(operators.overlap)
    with pytest.raises(ValueError, match=r"k-point \[-0.25.*S\(k\) positive definite"):
        eigenvalue_check(operators)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"(MO\| +1 +)-\d\S+", r"\1NaN", "orbital energy is not a number"),
        (r"(MO\| +1 +)-\d\S+", r"\1*******", "orbital energy is not a number"),
        (r"BRILLOUIN\|", "lost", "an image table and no k-points"),
        (r"Atomic kind:", "lost", "basis set of Si is missing"),
        (r"SCF run converged", "SCF run NOT converged", "the SCF did not converge"),
    ],
    ids=["NaN energy", "stars for an energy", "no k-points", "no basis", "not converged"],
)
def test_a_log_that_does_not_say_all_is_refused(spoilt, pattern, replacement, message):
    log = spoilt[0] / "run.out"
    log.write_text(re.sub(pattern, replacement, log.read_text(), count=0 if replacement == "lost" else 1))
    _refused(spoilt, message)


def test_nan_is_refused(spoilt):
    path = _largest(spoilt[0])
    records = np.fromfile(path, RECORD)
    records["value"][3] = np.nan
    records.tofile(path)
    _refused(spoilt, "holds NaN")


def test_a_missing_and_a_surplus_image_are_refused(spoilt):
    path = _largest(spoilt[0], "S")
    saved = path.read_bytes()
    path.unlink()
    _refused(spoilt, "image table lists .* missing number")
    path.write_bytes(saved)
    (spoilt[0] / "run-S_SPIN_1_R_999-1_0.csr").write_bytes(saved)
    _refused(spoilt, "number 999 is not in the table")


def test_tables_that_disagree_are_refused(spoilt):
    log = spoilt[0] / "run.out"
    head, tail = log.read_text().split("  S CSR write|")
    log.write_text(head + "  S CSR write|" + re.sub(r"(\n +2 +)-?\d+", r"\g<1>9", tail, count=1))
    _refused(spoilt, "image tables of H and S differ")


def test_another_basis_than_configured_is_refused(spoilt):
    directory, _, atoms = spoilt
    _refused(
        (directory, basis_of(Si=DZVP), atoms), "run with basis SZV-MOLOPT-SR-GTH of 4 orbitals, the configuration says DZVP"
    )


def test_another_structure_is_refused(spoilt):
    directory, basis, atoms = spoilt
    moved = atoms.copy()
    moved.positions[0, 0] += 0.01
    _refused((directory, basis, moved), "not those of the structure")
    stretched = atoms.copy()
    stretched.cell[0] *= 1.01
    _refused((directory, basis, stretched), "the cell of the run is")


def test_a_version_that_is_too_old_is_refused(spoilt):
    log = spoilt[0] / "run.out"
    log.write_text(log.read_text().replace("CP2K version 2023.1", "CP2K version 9.1"))
    _refused(spoilt, "this is CP2K 9.1, which is too old")


def test_complex_matrices_are_refused(tmp_path):
    record = np.dtype([("h", "<i4"), ("i", "<i4"), ("j", "<i4"), ("v", "<c16"), ("t", "<i4")])
    np.array([(24, 1, 1, 1 + 0j, 24)] * 3, record).tofile(tmp_path / "a.csr")
    with pytest.raises(ValueError, match="REAL_SPACE"):
        read_csr(tmp_path / "a.csr")
