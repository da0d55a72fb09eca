"""CP2K's CSR files, written by us and read by the parser of CP2K's own; MatrixMarket, read by scipy."""

import csv

import numpy as np
import pytest
import scipy.io

from hamscale.dft.csr import image_files, read_blocks
from hamscale.dft.log import image_table
from hamscale.export import export
from hamscale.export.matrixmarket import UNITS
from hamscale.runs import snapshot
from helpers import bands_hartree, bands_of_cells, written


@pytest.mark.parametrize(("target", "tolerance"), [("cp2k", 0), ("cp2k-text", 1e-15)])
def test_our_parser_reads_back_what_was_written(solid, recorded, tmp_path, target, tolerance):
    path, out = written(tmp_path, solid), tmp_path / "run"
    export(path, target, out)
    table = (out / "run-images.out").read_text()
    images = image_table(table, "KS")
    assert np.array_equal(images, image_table(table, "S"))
    assert not images[0].any()
    # a real log, with this table in the place of its own
    pairs, values = read_blocks(image_files(snapshot(out), images), images, solid.orbitals)
    nonzero = np.array(
        [solid.block(solid.hamiltonian, b).any() or solid.block(solid.overlap, b).any() for b in range(len(solid.pairs))]
    )
    expected = solid.select(nonzero)
    assert np.array_equal(pairs, expected.pairs)
    np.testing.assert_allclose(values["KS"], expected.hamiltonian, rtol=tolerance, atol=0)
    np.testing.assert_allclose(values["S"], expected.overlap, rtol=tolerance, atol=0)


@pytest.mark.parametrize("target", ["cp2k", "cp2k-text"])
def test_a_molecule_has_one_file_and_no_table(water, recorded, tmp_path, target):
    export(written(tmp_path, water), target, tmp_path / "run")
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert files == ["run-KS_SPIN_1-1_0.csr", "run-S_SPIN_1-1_0.csr", "structure.extxyz"]
    pairs, values = read_blocks(image_files(snapshot(tmp_path / "run"), None), np.zeros((1, 3), int), water.orbitals)
    assert np.array_equal(pairs, water.pairs)
    np.testing.assert_allclose(values["KS"], water.hamiltonian, rtol=1e-15)


def test_text_has_the_lines_of_cp2k(recorded, water, tmp_path):
    """Row, column and value stand in the same columns as in a file CP2K wrote."""
    export(written(tmp_path, water), "cp2k-text", tmp_path / "run")
    ours = (tmp_path / "run" / "run-KS_SPIN_1-1_0.csr").read_text().splitlines()
    theirs = (recorded["h2o_txt"] / "h2o_txt-KS_SPIN_1-1_0.csr").read_text().splitlines()
    for line in ours + theirs:
        assert len(line) == 39
        int(line[:8]), int(line[8:16]), float(line[16:])


def test_scipy_reads_the_matrices_and_the_bands_are_ours(solid, tmp_path):
    export(written(tmp_path, solid), "matrixmarket", tmp_path / "out")
    H, S = (
        {tuple(R): scipy.io.mmread(tmp_path / "out" / f"{name}_{R[0]}_{R[1]}_{R[2]}.mtx").toarray() for R in cells}
        for name, cells in ((name, np.unique(solid.pairs[:, 2:], axis=0).tolist()) for name in UNITS)
    )
    assert len(list((tmp_path / "out").glob("*.mtx"))) == len(H) + len(S)
    assert np.abs(bands_of_cells(H, S) - bands_hartree(solid)).max() < 1e-10
    for R, matrix in solid.csr(solid.hamiltonian).items():
        assert np.array_equal(matrix.toarray(), H[R])  # to the last bit
    with open(tmp_path / "out" / "orbitals.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == solid.n_orbitals
    assert np.array_equal(np.bincount([int(row["atom"]) for row in rows]), solid.orbitals)
    shells = solid.basis[solid.atoms.numbers[0]].l
    assert [int(row["m"]) for row in rows[: solid.orbitals[0]]] == [m for l in shells for m in range(-l, l + 1)]
