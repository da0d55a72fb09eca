"""Runs of CP2K that were not made by hamscale: other names, text files, folded images, molecular dynamics."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_versions import RECORDED

import hamscale.cli
from hamscale.dft.csr import RECORD, read_csr
from hamscale.dft.geometry import run_atoms
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import eigenvalue_check, read_run, unfold
from hamscale.dft.run import cp2k_command
from hamscale.export import cp2k_runs
from hamscale.graph.overlap import overlap_table
from hamscale.graph.placement import overlap_deviations, placed_by_overlap
from hamscale.operators import Operators, read_operators
from hamscale.pairs import PairList
from hamscale.runs import first_file, snapshot, snapshots
from hamscale.structures import read_structure_file
from helpers import DATA, SZV, basis_of, shared_by_workers, unpacked

DYNAMICS = (DATA / "cp2k" / "user.inp").read_text()
BASIS = {"Si": SZV, "H": "SZV-MOLOPT-GTH"}


def _changed(*changes: tuple[str, str]) -> str:
    text = DYNAMICS
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text)
        assert count, pattern
    return text


ENERGY = ("RUN_TYPE MD", "RUN_TYPE ENERGY")
HYDROGEN = [
    ENERGY,
    ("EPS_DEFAULT 1e-8", "EPS_DEFAULT 1e-6"),
    ("CUTOFF 80", "CUTOFF 100"),
    (r"A 0 2.*\n.*B.*\n.*C 2.*", "ABC 12 11.5 11"),
    (r"Si 0 0 0\n.*", "H 6.3 5.95 5.6\n H 7 6.15 5.7\n H 5.5 5.45 5.3\n H 4.8 5.25 5.4"),
    (r"KIND Si\n.*\n.*", "KIND H\n BASIS_SET SZV-MOLOPT-GTH\n POTENTIAL GTH-PBE-q1"),
    (r"&MO ON", "&MO ON\n NDIGITS 12"),
]
GAMMA = (r"&KPOINTS\n.*\n *&END\n", "")
# name of the folder -> input; the log's name and that of the files are no one's convention
RUNS = {
    "md": DYNAMICS,
    "optimisation": _changed(("RUN_TYPE MD", "RUN_TYPE GEO_OPT"), (r"&MD\n(.*\n)*?  &END", "&GEO_OPT\n MAX_ITER 2\n  &END")),
    "triangle": _changed(ENERGY, ("PROJECT simd", "PROJECT up-2"), ("REAL_SPACE T", "REAL_SPACE T\n UPPER_TRIANGULAR T")),
    "border": _changed(
        ENERGY, (r"A 0 2.*\n.*B.*\n.*C 2.*", "ABC 4.2 3.9 4.6"), (r"Si 0 0 0\n.*", "SCALED\n Si 0.1 0 0.02\n Si 0.5 0.5 0.5")
    ),
    "large": _changed(*HYDROGEN, GAMMA, (r"REAL_SPACE T", "BINARY T")),
    "large_images": _changed(*HYDROGEN, ("MONKHORST-PACK 2 1 1", "MONKHORST-PACK 1 1 1")),
}


@pytest.fixture(scope="module")
def users(cp2k, tmp_path_factory) -> dict[str, Path]:
    with shared_by_workers(tmp_path_factory, "users") as root:
        for name, text in RUNS.items():
            folder = root / name
            if not folder.exists():
                folder.mkdir(parents=True)
                (folder / "my.inp").write_text(text)
                subprocess.run(
                    [*cp2k_command(), "-i", "my.inp", "-o", "job-17.log"], cwd=folder, check=True, capture_output=True
                )
    return {name: root / name for name in RUNS}


@pytest.mark.parametrize(("name", "steps"), [("md", 4), ("optimisation", 3)])
def test_every_step_is_a_structure_of_its_own(users, name, steps):
    basis, previous = basis_of(Si=SZV), None
    found = snapshots(users[name])
    assert [run.step for run in found] == list(range(steps))
    for run in found:
        operators = cp2k_runs.read(first_file(run), basis)
        assert eigenvalue_check(operators) < 6e-7  # six decimals are printed, at every SCF step
        assert overlap_deviations(operators).max() < 1e-6  # EPS_DEFAULT
        assert previous is None or np.abs(operators.atoms.positions - previous).max() > 1e-3
        previous = operators.atoms.positions


def test_positions_of_the_log_cost_less_than_its_screening(users):
    """Six decimals against the ten of a trajectory: 5e-7 A, and 5e-7 in S."""
    run, basis = snapshots(users["md"])[0], basis_of(Si=SZV)
    operators = cp2k_runs.read(first_file(run), basis)
    rounded = operators.atoms.copy()
    rounded.positions = np.round(rounded.positions + 4.9e-7, 6)
    table = overlap_table(basis)
    for z_i, z_j, rows, _ in operators.groups():
        exact, of_log = (
            table.blocks(z_i, z_j, PairList(atoms, operators.pairs[rows]).vectors) for atoms in (operators.atoms, rounded)
        )
        assert np.abs(exact - of_log).max() < 1e-6


def test_upper_triangles_are_completed(users, tmp_path):
    """By a real run, and exactly by files of which what is below the diagonal was taken away."""
    assert np.concatenate([np.subtract(*read_csr(p)[:2]) for p in users["triangle"].glob("*.csr")]).max() == 0
    operators = cp2k_runs.read(users["triangle"], basis_of(Si=SZV))
    assert eigenvalue_check(operators) < 6e-7
    folder, atoms = unpacked("si2-2026.2", tmp_path / "whole"), read_structure_file(RECORDED / "si2.extxyz")
    whole = read_run(folder, atoms, basis_of(Si=SZV))
    for path in folder.glob("*.csr"):
        records = np.fromfile(path, RECORD)
        records[records["row"] <= records["column"]].tofile(path)
    half = read_run(folder, atoms, basis_of(Si=SZV))
    assert np.array_equal(half.pairs, whole.pairs)
    np.testing.assert_allclose(half.hamiltonian, whole.hamiltonian, rtol=0, atol=1e-15)


def test_an_atom_on_the_border_of_the_cell_is_placed_by_its_overlap(users):
    """Whichever of -1/2 and 1/2 CP2K's last bit chose: counted from the other side, S shows it, and it is put right."""
    operators = cp2k_runs.read(users["border"], basis_of(Si=SZV))
    assert overlap_deviations(operators).max() < 1e-5
    pairs = operators.pairs.table.copy()
    pairs[:, 2:] += np.array([[0, 0, 0], [0, -1, 1]])[pairs[:, 1]] - np.array([[0, 0, 0], [0, -1, 1]])[pairs[:, 0]]
    wrong = replace(operators, pairs=PairList(operators.atoms, pairs)).sorted()
    assert overlap_deviations(wrong).max() > 0.1
    right = placed_by_overlap(wrong)
    assert np.array_equal(right.pairs, operators.pairs)
    assert np.array_equal(right.overlap, operators.overlap)


def test_folded_images_of_a_large_cell_are_unfolded(users, caplog):
    folded, resolved = (cp2k_runs.read(users[name], basis_of(H=BASIS["H"])) for name in ("large", "large_images"))
    assert "every pair is taken at its nearest image" in caplog.text
    assert folded.pairs[:, 2:].any()
    assert np.array_equal(folded.pairs, resolved.pairs)
    np.testing.assert_allclose(folded.hamiltonian, resolved.hamiltonian, rtol=0, atol=1e-12)


def test_folded_images_of_a_smaller_cell_are_refused_with_the_cell_that_would_do(users):
    """H reaches 4.8 A here: two images of a pair are as near in a cell of 9.5 A, and not in one of 9.7 A."""
    operators: Operators = cp2k_runs.read(users["large"], basis_of(H=BASIS["H"]))
    reach = 2 * operators.basis[1].radius_angstrom(1e-3)
    for edge, refused in ((2 * reach - 0.05, True), (2 * reach + 0.05, False)):
        atoms = operators.atoms.copy()
        atoms.set_cell([edge] * 3)
        atoms.positions[1] = atoms.positions[0] + [reach - 0.035, 0, 0]
        pairs = PairList(atoms, [[0, 1, 0, 0, 0]])
        if refused:
            with pytest.raises(ValueError, match=rf"planes are more than {2 * reach:.1f} A apart, found {edge:.1f} A"):
                unfold("here", pairs, operators.basis, 1e-3)
        else:
            assert unfold("here", pairs, operators.basis, 1e-3).tolist() == [[0, 1, 0, 0, 0]]


def test_matrices_of_kpoints_are_refused_with_the_key_to_set(tmp_path):
    folder = unpacked("si8-kpoint-complex-text-2023.1", tmp_path / "run")
    with pytest.raises(ValueError, match="complex H.k., not H.R.. Set REAL_SPACE .TRUE. in &KS_CSR_WRITE and &S_CSR_WRITE"):
        cp2k_runs.read(folder, basis_of(Si=SZV))


@pytest.fixture
def run(tmp_path) -> Path:
    """A recorded run under other names."""
    folder = unpacked("si2-2026.2", tmp_path / "mine")
    for path in list(folder.glob("run-*")):
        path.rename(folder / path.name.replace("run-", "x.y-z-"))
    log = (folder / "run.out").read_text()
    (folder / "run.out").rename(folder / "slurm-123")
    (folder / "slurm-123").write_text(re.sub(r"(Project name .* )run$", r"\1x.y-z", log, flags=re.M))
    return folder


def _log(run: Path, pattern: str, replacement: str) -> None:
    path = run / "slurm-123"
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.M)
    assert count, pattern
    path.write_text(text)


def test_files_of_any_name_are_found(run):
    assert (snapshot(run).project, snapshot(run).step) == ("x.y-z", 0)
    assert eigenvalue_check(cp2k_runs.read(run, basis_of(Si=SZV))) < 5e-9
    (run / "slurm-123").unlink()
    with pytest.raises(ValueError, match="its log is missing. Expected CP2K's output of project x.y-z"):
        cp2k_runs.read(run, basis_of(Si=SZV))


def test_a_run_without_orbital_energies_is_read_with_a_warning(run, caplog):
    _log(run, r"MO\|", "lost")
    assert cp2k_runs.read(run, basis_of(Si=SZV)).orbital_energies is None
    assert "H was checked by nothing. Set &PRINT &MO ON" in caplog.text


def test_the_last_orbital_energies_count_and_their_decimals(run):
    """CP2K prints them at every SCF step by default, with six decimals."""
    log = (run / "slurm-123").read_text()
    first = log.index(" MO| EIGENVALUES")
    table = log[first : log.index("\n\n", first)]
    earlier = re.sub(r"(?m)^( MO\| +\d+ +)\S+", r"\g<1>9.000000", table.replace("NUMBERS FOR", "NUMBERS AFTER SCF STEP 3 FOR"))
    (run / "slurm-123").write_text(log.replace(table, earlier + "\n\n" + table))
    assert eigenvalue_check(cp2k_runs.read(run, basis_of(Si=SZV))) < 5e-9
    _log(run, r"^( MO\| +\d+ +-?\d\.\d{6})\d+", r"\1")
    assert parse_output(run / "slurm-123").mo_decimals == 6
    assert 1e-7 < eigenvalue_check(cp2k_runs.read(run, basis_of(Si=SZV))) < 2e-6


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (
            r"(Potential information for +)GTH-PBE-q4",
            r"\1GTH-BLYP-q4",
            "potential GTH-BLYP-q4, the configuration says GTH-PBE-q4",
        ),
        (
            r"(Orbital Basis Set +)SZV-MOLOPT-SR-GTH",
            r"\1SZV-GTH",
            "basis SZV-GTH of 4 orbitals, the configuration says SZV-MOLOPT",
        ),
        (r"(Number of electrons: +)8", r"\g<1>9", "9 electrons, the pseudopotentials of the configuration leave 8"),
        (r"(^ MO\| +1 +-0\.)\d", r"\g<1>9", "eigenvalues of H.k., S.k. differ from those CP2K printed by .* Ha"),
        (r"( Si +14 +-)0\.0", r"\g<1>0.1", "S differs from the two-centre integrals of the basis by"),
        ("SCF run converged", "SCF run NOT converged", "the SCF did not converge"),
    ],
    ids=["potential", "basis", "electrons", "other matrices", "other positions", "not converged"],
)
def test_another_run_than_the_material_says_is_refused_in_a_line(run, pattern, replacement, message):
    _log(run, pattern, replacement)
    with pytest.raises(ValueError, match=message) as error:
        cp2k_runs.read(run, basis_of(Si=SZV))
    assert "\n" not in str(error.value)


def test_a_step_that_is_in_no_trajectory_is_refused_with_the_key_to_set(users, tmp_path):
    folder = shutil.copytree(users["md"], tmp_path / "md")
    (folder / "simd-pos-1.xyz").unlink()
    assert len(run_atoms(snapshots(folder)[0])) == 2  # those of the first step are in the log
    with pytest.raises(ValueError, match="step 2: its positions are missing.*&TRAJECTORY with FORMAT XYZ"):
        run_atoms(snapshots(folder)[2])


def test_many_runs_are_imported_and_those_refused_are_told(users, run, tmp_path, capsys):
    """`hamscale import` of a folder of folders writes what can be read, and says of the rest why not, a line each."""
    folder = tmp_path / "runs"
    shutil.copytree(run, folder / "a_9")
    shutil.copytree(users["md"], folder / "a_10")
    unpacked("si8-gamma-folded-accepted-2023.1", folder / "b")
    (tmp_path / "m.yaml").write_text(
        "species: {Si: {basis: SZV-MOLOPT-SR-GTH}}\nstructures: {train: {split: train, builder: {name: bulk}}}\n"
    )
    arguments = ["import", str(folder), "--material", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "operators")]
    assert hamscale.cli.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "005.h5" in lines[0]
    assert "folded the matrices of all periodic images into one" in lines[0]
    assert sorted(path.name for path in (tmp_path / "operators").iterdir()) == [f"00{n}.h5" for n in range(5)]
    assert len(read_operators(tmp_path / "operators" / "000.h5").orbital_energies[0]) == 4  # a_9 comes before a_10
