"""A sheet of boron nitride and a chain of hydrogen, from their configuration to predicted H, on real CP2K runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sisl
import yaml

from hamscale.analysis.spectra import eigenvalues
from hamscale.cli import main
from hamscale.dft.outputs import eigenvalue_check
from hamscale.files import facts
from hamscale.operators import read_operators
from hamscale.units import HARTREE_IN_EV
from helpers import SZV
from ranks import start_cli

SHEET = {
    "species": {"B": {"basis": SZV}, "N": {"basis": SZV}},
    "dft": {"cutoff_ry": 120, "rel_cutoff_ry": 40, "kpoints": [1, 2, 2]},
    "source": {"builder": {"name": "graphene", "arguments": {"formula": "BN", "a": 2.5, "size": [2, 1, 1]}}},
    "train": 3,
    "graph": {"cutoff_angstrom": 5.0, "charges": {"B": 3, "N": -3}},
    "periodic": [True, True, False],
}
CHAIN = {
    "species": {"H": {"basis": SZV}},
    "dft": {"cutoff_ry": 120, "rel_cutoff_ry": 40, "kpoint_length_angstrom": 8},
    "source": {
        "spacegroup": {"spacegroup": 1, "cellpar": [2, 4, 4, 90, 90, 90], "basis": [["H", 0.1, 0, 0], ["H", 0.5, 0, 0]]},
        "open": ["b", "c"],
        "repeat": [2, 1, 1],
    },
    "train": 6,
    "graph": {"cutoff_angstrom": 4.0},
    "periodic": [True, False, False],
}
MODEL = {
    "network": {"layers": 1, "channels": 8, "hidden": 8},
    "training": {"steps": 200, "validate_every": 20, "learning_rate": 0.01},
}


def hamscale(*arguments):
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="module", params=[SHEET, CHAIN], ids=["sheet", "chain"])
def project(request, cp2k, tmp_path_factory) -> tuple[Path, dict]:
    """Everything from structures to predictions, by the commands of the workflow."""
    root, case = tmp_path_factory.mktemp("project"), request.param
    source = case["source"] | {"rattle_angstrom": 0.05, "strain": 0.02}
    sets = {"train": case["train"], "validation": 1, "test": 1}
    structures = {name: source | {"split": name, "count": n} for name, n in sets.items()}
    structures["tiled"] = {"split": "predict", "tile": {"of": "test-000"}, "repeat": [2, 1, 1]}
    material = {key: case[key] for key in ("species", "dft", "graph")} | {"structures": structures}
    (root / "toy.yaml").write_text(yaml.safe_dump(material | {"analysis": {"kgrid": [3, 3, 3], "band_points": 20}}))
    (root / "tiny.yaml").write_text(yaml.safe_dump(MODEL))
    names = [f"{name}-{k:03d}" for name, n in sets.items() for k in range(n)]
    for name in (*names, "tiled-000"):
        hamscale("structure", root / "toy.yaml", "--id", name, "--out", root / f"{name}.extxyz")
    for name in names:
        hamscale("input", root / "toy.yaml", root / f"{name}.extxyz", "--out", root / f"{name}.inp")
        hamscale("dft", root / f"{name}.inp", "--out", root / name)
        hamscale("operators", root / "toy.yaml", root / f"{name}.extxyz", root / name, "--out", root / f"{name}.h5")
    hamscale("reference", root / "toy.yaml", *(root / f"{name}.h5" for name in names[:-2]), "--out", root / "reference.h5")
    operators = [root / f"{name}.h5" for name in names[:-1]]
    hamscale("graph", root / "reference.h5", *operators, "--out", root / "graphs")
    *train, validation = (root / "graphs" / path.name for path in operators)
    hamscale(
        *("train", root / "tiny.yaml", root / "reference.h5", "--train", *train, "--validation", validation),
        *("--out", root / "tiny", "--checkpoint", root / "checkpoint"),
    )
    for name in ("train-000", "test-000", "tiled-000"):
        structure, out = root / f"{name}.extxyz", root / f"{name}.predicted.h5"
        hamscale("predict", root / "tiny", structure, "--material", root / "toy.yaml", "--out", out)
    structure, out = root / "train-000.extxyz", root / "train-000.baseline.h5"
    hamscale("predict", root / "tiny", structure, "--material", root / "toy.yaml", "--out", out, "--reference-only")
    return root, case


def test_h_and_s_of_cp2k(project):
    root, case = project
    for path in sorted(root.glob("t*-00?.h5")) + [root / "validation-000.h5"]:
        operators = read_operators(path)
        assert operators.atoms.pbc.tolist() == case["periodic"]
        assert eigenvalue_check(operators) < 5e-9
        reach = np.abs(operators.pairs[:, 2:]).max(0)
        assert ((reach > 1) == case["periodic"]).all()
        assert not reach[~operators.atoms.pbc].any()


def test_s_from_tables_is_that_of_cp2k(project):
    root, _ = project
    dft, predicted = (read_operators(root / f"test-000.{name}") for name in ("h5", "predicted.h5"))
    rows = predicted.pairs.find(dft.pairs)
    for b, row in enumerate(rows):
        own = dft.block(dft.overlap, b)
        found = predicted.block(predicted.overlap, row) if row >= 0 else np.zeros_like(own)
        assert np.abs(own - found).max() < 5e-7


def test_what_was_learnt_is_predicted(project, tmp_path):
    """Of a structure of the training: so few do not teach the network of others."""
    root, case = project
    dft, predicted, baseline = (root / f"train-000.{name}" for name in ("h5", "predicted.h5", "baseline.h5"))
    hamscale(
        *("analyse", root / "toy.yaml", "--dft", dft, "--predicted", predicted, "--baseline", baseline, "--out", tmp_path),
    )
    row = pd.read_csv(tmp_path / "summary.csv").iloc[0]
    assert row["mae_mev"] < 0.9 * row["baseline_mae_mev"]
    hamscale("view", predicted, "--parts", 2, "--out", tmp_path)
    assert facts(tmp_path / "atoms.csv")["periodic"] == case["periodic"]


def test_a_tile_has_the_states_of_its_cell(project):
    """At k = 0 those of the cell at k = 0 and at the middle of the zone's edge."""
    root, case = project
    cell, tile = (read_operators(root / f"{name}.predicted.h5") for name in ("test-000", "tiled-000"))
    assert tile.atoms.pbc.tolist() == case["periodic"]
    expected = np.sort(eigenvalues(cell, [(0, 0, 0), (0.5, 0, 0)]).ravel())
    np.testing.assert_allclose(eigenvalues(tile, (0, 0, 0))[0], expected, atol=2e-6)


def test_two_ranks_predict_what_one_does(project, tmp_path):
    root, _ = project
    processes = start_cli(2, "predict", root / "tiny", root / "tiled-000.extxyz", "--out", tmp_path / "out.h5")
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, two = read_operators(root / "tiled-000.predicted.h5"), read_operators(tmp_path / "out.h5")
    assert np.array_equal(one.pairs, two.pairs)
    np.testing.assert_allclose(two.hamiltonian, one.hamiltonian, atol=1e-6)


def test_exports_keep_bands_and_periodicity(project, tmp_path):
    root, case = project
    path = root / "test-000.predicted.h5"
    ours = read_operators(path)
    hamscale("export", path, "--to", "tbtrans", "--out", tmp_path / "h.nc")
    back = sisl.get_sile(tmp_path / "h.nc").read_hamiltonian()
    assert ((back.nsc > 1) == case["periodic"]).all()
    expected = eigenvalues(ours, (0.2, 0.3, 0))[0] - ours.attributes["fermi_level_hartree"]
    assert np.abs(back.eigh((0.2, 0.3, 0)) - expected * HARTREE_IN_EV).max() < 1e-8
