"""The workflow under a real Snakemake, to the end on real CP2K runs, and what it says of a wrong configuration."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sisl

from conftest import TOY, copy_workflow
from hamscale.analysis.spectra import eigenvalues
from hamscale.operators import read_operators
from hamscale.units import HARTREE_IN_EV

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

MODEL = {"network": {"layers": 1, "channels": 4, "hidden": 4}, "training": {"steps": 6, "validate_every": 3}}


def snakemake(folder, *arguments, **environment):
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment
    command = [BIN / "snakemake", "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


@pytest.fixture
def project(tmp_path):
    """A copy of the workflow with a toy material."""
    return copy_workflow(tmp_path, TOY, {"tiny": MODEL})


def test_from_config_to_predicted_hamiltonian_and_report(project):
    config = project / "config" / "config.yaml"
    config.write_text(config.read_text() + "export: [quatrex, tbtrans]\n")
    result = snakemake(project, "--show-failed-logs")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = pd.read_csv(project / "results" / "summary.csv")
    assert list(summary["structure"]) == ["test-000"]
    assert summary["mae_mev"].notna().all()
    tiled = read_operators(project / "results" / "toy" / "predicted" / "tiny" / "tiled-000.h5")
    assert (len(tiled.atoms), tiled.attributes["source"]) == (4, "predicted")
    assert max(tiled.hermiticity_error().values()) == 0
    log = (project / "logs" / "toy" / "operators" / "train-000.log").read_text()
    assert "against those CP2K printed: max" in log

    exported = project / "results" / "toy" / "export" / "tiny" / "tiled-000"
    assert (exported / "quatrex" / "hamiltonian.h5").is_file()
    back = sisl.get_sile(exported / "hamiltonian.nc").read_hamiltonian()
    assert np.abs(back.eigh() - eigenvalues(tiled, (0, 0, 0))[0] * HARTREE_IN_EV).max() < 1e-8

    again = snakemake(project)
    assert "Nothing to be done" in again.stdout + again.stderr

    # another k-grid of the analysis runs the analysis again, not CP2K
    material = project / "config" / "materials" / "toy.yaml"
    material.write_text(TOY.replace("band_points: 12", "band_points: 14"))
    planned = snakemake(project, "-n").stdout
    assert "analyse" in planned
    assert "dft " not in planned
    # one structure more: one CP2K run more
    material.write_text(TOY.replace("count: 2", "count: 3"))
    planned = snakemake(project, "-n", "--quiet", "rules").stdout
    assert re.search(r"^dft +1$", planned, re.M), planned
    # another cutoff of CP2K: all of them
    material.write_text(TOY.replace("cutoff_ry: 80", "cutoff_ry: 90"))
    planned = snakemake(project, "-n", "--quiet", "rules").stdout
    assert re.search(r"^dft +4$", planned, re.M), planned
    material.write_text(TOY)

    report = snakemake(project, "--report", "report.html")
    assert report.returncode == 0, report.stderr
    text = (project / "report.html").read_text()
    assert "bands.png" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", text)  # one file, nothing from elsewhere

    table = subprocess.run([BIN / "hamscale", "table", "results/summary.csv"], cwd=project, capture_output=True, text=True)
    assert "two-centre" in table.stdout


def test_an_unconverged_run_is_reported_and_the_others_go_on(project):
    material = project / "config" / "materials" / "toy.yaml"
    material.write_text(TOY.replace("eps_default: 1.0e-8", "eps_default: 1.0e-8, max_scf: 3"))
    result = snakemake(project, "--keep-going", "--show-failed-logs", "results/toy/dft/train-000", "results/toy/dft/train-001")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    for identifier in ("train-000", "train-001"):
        assert f"results/toy/inputs/{identifier}.inp: the SCF did not converge (last step 3" in output
        assert not (project / "results" / "toy" / "dft" / identifier).exists()


@pytest.mark.parametrize("config", ["config/config.yaml", "config/demo.yaml"])
def test_every_rule_of_the_shipped_configurations_is_planned(config, tmp_path):
    for name in ("Snakefile", "workflow", "config", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    result = snakemake(tmp_path, "-n", "--configfile", config)
    assert result.returncode == 0, result.stderr
    for rule in (
        "structure",
        "input",
        "dft",
        "operators",
        "reference",
        "graph",
        "train",
        "predict",
        "analyse",
        "figures",
    ):
        assert f"{rule} " in result.stdout


def test_lint_is_clean():
    result = snakemake(ROOT, "--lint")
    assert result.returncode == 0, result.stderr


def test_wrong_settings_are_told_in_lines_without_a_traceback(project):
    material = project / "config" / "materials" / "toy.yaml"
    material.write_text(TOY.replace("cutoff_ry: 80", "cutof_ry: 80").replace("count: 2", "count: many"))
    result = snakemake(project, "-n")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "config/materials/toy.yaml: dft.cutof_ry: Extra inputs are not permitted" in output
    assert "config/materials/toy.yaml: structures.train.count: Input should be a valid integer" in output
    assert "Traceback" not in output


def test_a_material_without_a_file_is_told(project):
    (project / "config" / "config.yaml").write_text("runs: [{material: unobtainium, model: tiny}]\n")
    result = snakemake(project, "-n")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "config/materials/unobtainium.yaml: no such file" in output
    assert "toy" in output
    assert "Traceback" not in output
