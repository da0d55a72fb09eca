"""Recorded runs of several versions of CP2K, and what the log leaves to be known: exact k-points, folded matrices, ranks."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hamscale.basis import find_data_file, material_basis
from hamscale.dft.inputs import cp2k_input
from hamscale.dft.log import parse_output
from hamscale.dft.outputs import eigenvalue_check, exact_kpoints, read_run
from hamscale.dft.run import check_run, run_batch, run_cp2k
from hamscale.graph.overlap import overlap_table
from hamscale.structures import read_structure_file
from helpers import DATA, DZVP, SZV, basis_of, material, silicon, unpacked

RECORDED = DATA / "cp2k"
VERSIONS = ("2023.1", "2025.1", "2026.2")
CASES = {
    "h2o": ("water.extxyz", {"H": DZVP, "O": DZVP}),
    "si2": ("si2.extxyz", {"Si": SZV}),
    "si8": ("si8p.extxyz", {"Si": SZV}),
    "bn": ("bn.extxyz", {"B": SZV, "N": SZV}),
    "h2chain": ("chain.extxyz", {"H": SZV}),
}


# HAMSCALE_TEST_CP2K=DIR adds runs of the version that get_cp2k.sh unpacked there (CONTRIBUTING.md)
SCRIPT = Path(__file__).with_name("run_cp2k.sh")
OTHER_VERSION = {"other version": str(SCRIPT)} if "HAMSCALE_TEST_CP2K" in os.environ else {}
TWO_RANKS = {"installed version": "mpirun --allow-run-as-root --oversubscribe -n 2 cp2k.psmp"} | {
    name: f"{command} -n 2" for name, command in OTHER_VERSION.items()
}


def _read(name: str, folder: Path):
    structure, sets = CASES[name.split("-")[0]]
    return read_run(unpacked(name, folder), read_structure_file(RECORDED / structure), basis_of(**sets))


@pytest.mark.parametrize("case", ["h2o", "si2"])
def test_versions_write_the_same_matrices(case, tmp_path):
    of_version = {version: _read(f"{case}-{version}", tmp_path / version) for version in VERSIONS}
    for version, operators in of_version.items():
        check_run(tmp_path / version, 0)
        assert operators.attributes["code"] == f"CP2K {version}"
        assert eigenvalue_check(operators) < 5e-9
        assert np.array_equal(operators.pairs, of_version["2023.1"].pairs)
        for name in ("hamiltonian", "overlap"):
            np.testing.assert_allclose(getattr(operators, name), getattr(of_version["2023.1"], name), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "images", "open_axes"),
    [("bn-xy-2026.2", 73, [2]), ("h2chain-x-2023.1", 11, [1, 2]), ("h2chain-x-2026.2", 11, [1, 2])],
)
def test_a_sheet_and_a_chain_have_no_images_across(name, images, open_axes, tmp_path):
    operators = _read(name, tmp_path / "run")
    check_run(tmp_path / "run", 0)
    assert len(parse_output(tmp_path / "run" / "run.out").images) == images
    assert not operators.pairs[:, [2 + axis for axis in open_axes]].any()
    assert eigenvalue_check(operators) < 5e-9
    table = overlap_table(operators.basis)
    for z_i, z_j, blocks, places in operators.groups():
        found = table.blocks(z_i, z_j, operators.pairs.vectors[blocks])
        np.testing.assert_allclose(found, places.take(operators.overlap), rtol=0, atol=5e-7)


def test_a_run_of_another_periodicity_is_refused(tmp_path):
    atoms = read_structure_file(RECORDED / "bn.extxyz")
    atoms.pbc = True
    with pytest.raises(ValueError, match="the run is periodic along XY, the structure along XYZ"):
        read_run(unpacked("bn-xy-2026.2", tmp_path / "run"), atoms, basis_of(B=SZV, N=SZV))


@pytest.mark.parametrize("name", ["si8-gamma-folded-accepted-2023.1", "si8-gamma-ot-text-2023.1", "si8-gamma-ot-text-2026.2"])
def test_a_matrix_with_its_images_folded_is_refused(name, tmp_path):
    """H of the Gamma point alone passes every other check: it is Hermitian, and its eigenvalues are those that CP2K printed."""
    with pytest.raises(ValueError, match=r"folded.*SCHEME MONKHORST-PACK 1 1 1.*REAL_SPACE .TRUE."):
        _read(name, tmp_path / "run")


@pytest.mark.parametrize("version", ["2023.1", "2026.2"])
def test_ranks_that_shared_the_kpoints_are_told(version, tmp_path):
    with pytest.raises(ValueError, match="2 k-points, expected 4.*PARALLEL_GROUP_SIZE 0"):
        parse_output(unpacked(f"si2-2ranks-{version}", tmp_path / "run") / "run.out")


@pytest.mark.parametrize("name", ["2025.1", "2026.2", "2ranks-2026.2"])
def test_an_unconverged_run_of_a_version_that_aborts_gets_the_same_advice(name, tmp_path):
    with pytest.raises(ValueError, match="the SCF did not converge.*last step 3.*Raise dft.max_scf"):
        check_run(unpacked(f"unconverged-{name}", tmp_path / "run"), 1)


def _script(path: Path, version: str, does: str) -> str:
    """A program that tells its version, as CP2K does, and otherwise does what a test wants."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo " CP2K version {version}"; exit; }}\n{does}\n')
    path.chmod(0o755)
    (path.parent / "run.inp").write_text("")
    return str(path)


def test_a_version_that_is_too_old_is_refused_before_it_runs(tmp_path):
    command = _script(tmp_path / "old", "2022.2", f"touch {tmp_path}/ran")
    for run in (
        lambda: run_cp2k(tmp_path / "run.inp", tmp_path / "run", command),
        lambda: run_batch([tmp_path / "run.inp"], tmp_path / "store", command=command),
    ):
        with pytest.raises(ValueError, match="CP2K 2022.2, which is too old; 2023.1 to 2026.2 are read"):
            run()
    assert not (tmp_path / "ran").exists()


def test_versions_between_those_tested_and_newer_ones_are_read(tmp_path, caplog):
    """A newer version gives a warning, once; the eigenvalue check is the guard."""
    folder = unpacked("si2-2026.2", tmp_path / "run")
    text = (folder / "run.out").read_text()
    for version, warnings in (("2023.2", 0), ("2024.3", 0), ("2026.1", 0), ("2027.1", 1), ("2027.1", 1)):
        (folder / "run.out").write_text(text.replace("CP2K version 2026.2", f"CP2K version {version}"))
        assert parse_output(folder / "run.out").version == version
        assert sum("which nobody has tried here" in record.message for record in caplog.records) == warnings


def test_a_data_folder_that_is_missing_is_told(tmp_path):
    """CP2K 2026.2-1 of Debian looks into a folder that is not there."""
    with pytest.raises(
        ValueError, match="exit code 1: The specified OLD file <BASIS_MOLOPT> cannot be opened.*/usr/share/cp2k/data"
    ):
        check_run(unpacked("no-data-dir-2026.2", tmp_path / "run"), 1)


def test_a_run_reads_the_data_folder_of_its_input(tmp_path):
    with pytest.raises(ValueError, match="did not converge"):
        run_cp2k(
            tmp_path / "run.inp",
            tmp_path / "run",
            _script(tmp_path / "prints", "2026.2", "echo $CP2K_DATA_DIR > run.out; echo PROGRAM ENDED AT >> run.out"),
        )
    assert (tmp_path / "run.failed" / "run.out").read_text().splitlines()[0] == str(find_data_file("BASIS_MOLOPT").parent)


def _input(atoms, **dft) -> str:
    settings = material({"Si": SZV}, **({"cutoff_ry": 80, "rel_cutoff_ry": 30} | dft))
    return cp2k_input(atoms, settings, material_basis(settings))


def _run(text: str, folder: Path, command: str | None = None):
    folder.mkdir(exist_ok=True)
    (folder / "run.inp").write_text(text)
    run_cp2k(folder / "run.inp", folder / "run", command)
    return read_run(folder / "run", silicon(1), basis_of(Si=SZV))


SCHEMES = {
    "full grid": "SCHEME MONKHORST-PACK 3 1 2\n FULL_GRID .TRUE.",
    "shifted": "SCHEME MACDONALD 3 2 1 0.123456789 0.25 0.333333333",
    "list": "SCHEME GENERAL\n KPOINT 0.123456789 0.1 0.333333333333 0.5\n KPOINT 0 0 0 0.5",
    "cartesian list": "SCHEME GENERAL\n UNITS CART_ANGSTROM\n KPOINT 0.123456789 0.1 0.333333333333 0.5\n KPOINT 0 0 0 0.5",
    "Gamma": "SCHEME GAMMA",
}


@pytest.mark.parametrize("scheme", [*[(2, 3, 1), (3, 3, 3), (1, 4, 5), (5, 1, 2), (6, 1, 1), (1, 1, 7)], *SCHEMES], ids=str)
def test_kpoints_are_exact(cp2k, scheme, tmp_path):
    """The log prints 0.33333: eigenvalues at that k-point are 1e-6 Ha off."""
    text = _input(silicon(1), kpoints=(1, 1, 1) if scheme in SCHEMES else scheme)
    if scheme in SCHEMES:
        text = re.sub("SCHEME.*", SCHEMES[scheme], re.sub(" +FULL_GRID.*\n", "", text))
    operators = _run(text, tmp_path)
    assert eigenvalue_check(operators) < 5e-9
    printed = parse_output(tmp_path / "run" / "run.out").kpoints
    assert np.abs(operators.orbital_energies[0] - printed).max() < 6e-6


def test_an_input_of_other_kpoints_is_refused(tmp_path):
    folder = unpacked("si2-2023.1", tmp_path / "run")
    output = parse_output(folder / "run.out")
    output.kpoint_grid = (3, 3, 3)
    with pytest.raises(ValueError, match="k-points differ.*by 8.3e-02"):
        exact_kpoints(folder / "run.inp", output, np.eye(3))


@pytest.mark.parametrize("command", TWO_RANKS.values(), ids=[*TWO_RANKS])
def test_two_ranks_print_all_their_kpoints(cp2k, command, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.fail("mpirun is not installed: it comes with Debian's package cp2k.")
    operators = _run(_input(silicon(1), kpoints=(2, 2, 2)), tmp_path, command)
    assert len(operators.orbital_energies[0]) == 4
    assert eigenvalue_check(operators) < 5e-9


if OTHER_VERSION:

    def test_another_version_computes_the_same_matrices(cp2k, tmp_path):
        text = _input(silicon(1), kpoints=(2, 2, 2))
        ours, other = _run(text, tmp_path / "ours"), _run(text, tmp_path / "other", OTHER_VERSION["other version"])
        assert other.attributes["code"] != ours.attributes["code"]
        assert eigenvalue_check(other) < 5e-9
        np.testing.assert_allclose(other.hamiltonian, ours.hamiltonian, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other.overlap, ours.overlap, rtol=0, atol=1e-12)
