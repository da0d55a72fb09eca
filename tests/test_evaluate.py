"""`hamscale evaluate`: a row per structure, a row per slab, a line per set."""

import json

import numpy as np
import pytest
import torch
import yaml

from hamscale.cli import main
from hamscale.config import Network
from hamscale.files import facts, read_table
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.tensors import build_network
from hamscale.operators import write_operators
from helpers import SZV, hafnia, model_hamiltonian, rattled


@pytest.fixture(scope="module")
def project(tmp_path_factory, szv):
    """A model of random weights, and DFT (a Hamiltonian that stands for it) of a short and of a long structure."""
    root = tmp_path_factory.mktemp("project")
    reference = fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], 5.0)
    write_reference(root / "reference.h5", reference)
    torch.manual_seed(0)
    settings = Network(layers=1, channels=4, hidden=4, values=4)
    network = build_network(settings, reference)
    model = root / "results" / "toy" / "models" / "tiny"
    save_model(model, [network.state_dict()], settings.model_dump(), root / "reference.h5", {})
    source = {"builder": {"name": "bulk", "arguments": {"name": "HfO"}}, "split": "test", "count": 1}  # never built here
    material = {
        "species": {"Hf": {"basis": SZV}, "O": {"basis": SZV}},
        "structures": {"short": source, "long": source},
        "analysis": {"kgrid": [1, 1, 1], "slab_angstrom": 3.6},
    }
    (root / "toy.yaml").write_text(yaml.safe_dump(material, sort_keys=False))
    for name, atoms in (("short", hafnia(3)), ("long", rattled(hafnia(0).repeat((1, 1, 3)), 1, 0.05))):
        write_operators(root / "results" / "toy" / "operators" / f"{name}-000.h5", model_hamiltonian(atoms, szv))
    return root


def test_slabs_stand_beside_errors(project, capsys):
    model = project / "results" / "toy" / "models" / "tiny"
    out = project / "evaluation.csv"
    assert main(["evaluate", str(model), "--material", str(project / "toy.yaml"), "--out", str(out)]) == 0
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    slabs = [line for line in lines if "slab" in line]
    assert [(s["structure"], s["slab"]) for s in slabs] == [("long-000", k) for k in range(3)]
    assert [line["set"] for line in lines if "mae_mev" in line] == ["short", "long"]
    assert last["structures"] == 2
    rows, of_slabs = read_table(out).set_index("structure"), read_table(project / "evaluation_slabs.csv")
    assert facts(project / "evaluation_slabs.csv")["model"] == "tiny"
    long = of_slabs[of_slabs["structure"] == "long-000"]
    worst = (long["predicted_ev"] - long["dft_ev"]).abs().max()
    assert rows.loc["long-000", "slab_error_ev"] == pytest.approx(worst, rel=1e-4)
    assert np.isnan(rows.loc["short-000", "slab_error_ev"])
    np.testing.assert_allclose([s["predicted_ev"] for s in slabs], long["predicted_ev"], atol=1e-4)


def test_errors_of_t_stand_beside_those_of_h_if_the_material_asks(project, capsys):
    model, material = project / "results" / "toy" / "models" / "tiny", yaml.safe_load((project / "toy.yaml").read_text())
    material["analysis"]["transmission"] = {"kgrid": [1, 1, 8], "points": 20, "window_ev": 8}
    asked, out = project / "asked" / "toy.yaml", project / "t.csv"
    asked.parent.mkdir()
    asked.write_text(yaml.safe_dump(material, sort_keys=False))
    assert main(["evaluate", str(model), "--material", str(asked), "--sets", "short", "--out", str(out)]) == 0
    row, told = read_table(out).iloc[0], json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["transmission_error"] == pytest.approx(row["transmission_error"], rel=1e-5)
    assert row["transmission_error"] > 0
    assert row["baseline_transmission_error"] > 0


def test_a_set_without_dft_is_named(project, capsys):
    model = project / "results" / "toy" / "models" / "tiny"
    (project / "results" / "toy" / "operators" / "short-000.h5").rename(project / "kept.h5")
    try:
        assert main(["evaluate", str(model), "--material", str(project / "toy.yaml")]) == 1
        assert "no DFT of short-000. Make it" in capsys.readouterr().err
        assert main(["evaluate", str(model), "--material", str(project / "toy.yaml"), "--sets", "long"]) == 0
    finally:
        (project / "kept.h5").rename(project / "results" / "toy" / "operators" / "short-000.h5")
