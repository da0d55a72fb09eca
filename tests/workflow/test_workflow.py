"""The workflow under a real Snakemake, to the end on real CP2K runs, and what it says of a wrong configuration."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from hamscale.analysis.spectra import eigenvalues
from hamscale.dft.run import cp2k_command
from hamscale.files import facts, read_table
from hamscale.operators import read_operators
from hamscale.units import HARTREE_IN_EV
from helpers import DATA, TOY, copy_workflow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

ON_REQUEST = {
    *("partition", "export", "export_sisl"),
    "quality",  # of sets made by melt and quench
    "transmission",  # of devices without DFT
    *(
        "ablation",
        "size_table",
        "dos_table",
        "domains",
        "partition_table",
        "scaling_measured",
        "scaling_modelled",
        "scaling_partitions",
        "throughput",
    ),
    "roofline",
    "teach",
}
DEVICE = "  device: {split: predict, tile: {of: test-000}, repeat: [1, 1, 9], transport: {leads: [6, 6], kgrid: [4, 1, 1]}}\n"
WITH_DEVICE = TOY.replace("graph:", f"{DEVICE}graph:")
MODEL = {"network": {"layers": 1, "channels": 4, "hidden": 4}, "training": {"steps": 6, "validate_every": 3}}


def snakemake(folder, *arguments, **environment):
    # no active environment: rules find the `hamscale` of the interpreter that runs Snakemake
    others = [path for path in os.environ["PATH"].split(":") if Path(path) != BIN]
    env = os.environ | {"PATH": ":".join(others)} | environment
    command = [BIN / "snakemake", "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


@pytest.fixture
def project(tmp_path):
    """A copy of the workflow with a toy material."""
    return copy_workflow(tmp_path, TOY, {"tiny": MODEL})


@pytest.fixture(scope="module")
def finished(cp2k, tmp_path_factory):
    """The same, run to its end with its exports, with its report."""
    folder = copy_workflow(tmp_path_factory.mktemp("finished"), WITH_DEVICE, {"tiny": MODEL})
    config = folder / "config" / "config.yaml"
    config.write_text(config.read_text() + "export: [quatrex, tbtrans]\n")
    result = snakemake(folder, "--show-failed-logs")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = snakemake(folder, "--report", "report.html")
    assert report.returncode == 0, report.stderr
    assert "ERROR/" not in report.stderr  # of a caption
    return folder


def test_structures_and_inputs_of_a_material_are_prepared_once(finished):
    """All that one process writes is there before the first of it is taken."""
    (folder,) = (finished / "results" / "toy" / "prepared").iterdir()
    copies = [path for kind in ("structures", "inputs") for path in (finished / "results" / "toy" / kind).iterdir()]
    prepared = [folder / path.name for path in copies if (folder / path.name).exists()]
    assert len(prepared) > 4
    assert max(path.stat().st_mtime_ns for path in prepared) <= min(path.stat().st_mtime_ns for path in copies)


def test_from_config_to_predicted_hamiltonian(finished):
    import sisl

    project = finished
    summary = pd.read_csv(project / "results" / "summary.csv")
    assert list(summary["structure"]) == ["test-000"]
    assert summary["mae_mev"].notna().all()
    assert summary["transmission_error"].notna().all()
    assert (project / "results" / "figures" / "toy" / "tiny" / "test-000" / "transmission.png").is_file()
    assert (project / "results" / "figures" / "toy" / "tiny" / "device-000" / "transmission.png").is_file()
    table = project / "results" / "toy" / "analysis" / "tiny" / "device-000" / "transmission.csv"
    assert facts(table)["leads_atoms"] == [6, 6]
    assert facts(table)["kgrid"] == [4, 1, 1]
    assert read_table(table)["transmission"].max() > 0.1
    tiled = read_operators(project / "results" / "toy" / "predicted" / "tiny" / "tiled-000.h5")
    assert (len(tiled.atoms), tiled.attributes["source"]) == (4, "predicted")
    assert max(tiled.hermiticity_error().values()) == 0
    log = (project / "logs" / "toy" / "operators" / "train-000.log").read_text()
    assert "against those CP2K printed: max" in log

    exported = project / "results" / "toy" / "export" / "tiny" / "tiled-000"
    assert (exported / "quatrex" / "hamiltonian.h5").is_file()
    back = sisl.get_sile(exported / "hamiltonian.nc").read_hamiltonian()
    # sisl puts its zero at the Fermi level of a netCDF file as it reads
    expected = eigenvalues(tiled, (0, 0, 0))[0] - tiled.attributes["fermi_level_hartree"]
    assert np.abs(back.eigh() - expected * HARTREE_IN_EV).max() < 1e-8

    again = snakemake(project)
    assert "Nothing to be done" in again.stdout + again.stderr

    # another k-grid of the analysis runs the analysis again, not CP2K
    material = project / "config" / "materials" / "toy.yaml"
    material.write_text(WITH_DEVICE.replace("band_points: 12", "band_points: 14"))
    planned = snakemake(project, "-n").stdout
    assert "analyse" in planned
    assert "dft " not in planned
    # one structure more: one CP2K run more
    material.write_text(WITH_DEVICE.replace("count: 2", "count: 3"))
    planned = snakemake(project, "-n", "--quiet", "rules").stdout
    assert re.search(r"^dft +1$", planned, re.M), planned
    # another cutoff of CP2K: all of them
    material.write_text(WITH_DEVICE.replace("cutoff_ry: 80", "cutoff_ry: 90"))
    planned = snakemake(project, "-n", "--quiet", "rules").stdout
    assert re.search(r"^dft +4$", planned, re.M), planned
    material.write_text(WITH_DEVICE)

    table = subprocess.run([BIN / "hamscale", "table", "results/summary.csv"], cwd=project, capture_output=True, text=True)
    assert "reference" in table.stdout


USERS = """
species: {Si: {basis: SZV-MOLOPT-SR-GTH}}
structures:
  train: {dft: runs/md, split: train}
  validation: {dft: runs/oth*, split: validation}
  test: {dft: runs/**/last-KS_*.csr, split: test}
  tiled: {split: predict, tile: {of: test-000}, repeat: [2, 1, 1]}
graph: {cutoff_angstrom: 5.0}
analysis: {kgrid: [2, 1, 1], band_points: 12}
"""


def test_runs_that_a_user_has_become_a_model_and_a_prediction_by_config_alone(cp2k, tmp_path):
    """Nobody's names; text files; no input, structure or run of hamscale's, and no CP2K that could run."""
    folder = copy_workflow(tmp_path, USERS, {"tiny": MODEL})
    dynamics = (DATA / "cp2k" / "user.inp").read_text()
    energy = dynamics.replace("RUN_TYPE MD", "RUN_TYPE ENERGY")
    inputs = {
        "md": dynamics,
        "other": energy.replace("PROJECT simd", "PROJECT a").replace("1.4 1.35 1.3", "1.4 1.3 1.4"),
        "deep/er": energy.replace("PROJECT simd", "PROJECT last").replace("1.4 1.35 1.3", "1.3 1.4 1.4"),
    }
    for name, text in inputs.items():
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "in").write_text(text)
        command = [*cp2k_command(), "-i", "in", "-o", "log.txt"]
        subprocess.run(command, cwd=folder / "runs" / name, check=True, capture_output=True)
    result = snakemake(
        folder, "--show-failed-logs", "--", "results/toy/predicted/tiny/tiled-000.h5", "results/summary.csv",
        HAMSCALE_CP2K="no-cp2k-is-run-here",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert not (folder / "results" / "toy" / "inputs").exists()
    assert len(list((folder / "results" / "toy" / "graphs").glob("train-*.h5"))) == 4  # one for every step
    assert pd.read_csv(folder / "results" / "summary.csv")["mae_mev"].notna().all()
    tiled = read_operators(folder / "results" / "toy" / "predicted" / "tiny" / "tiled-000.h5")
    assert (len(tiled.atoms), tiled.attributes["source"]) == (4, "predicted")
    again = snakemake(folder, "--", "results/summary.csv", HAMSCALE_CP2K="no-cp2k-is-run-here")
    assert "Nothing to be done" in again.stdout + again.stderr


# the tutorial's materials and models -> those of these tests, and its sizes -> some that take seconds
TOY_SIZES = [
    (r"\bhfo2(_demo)?\b", "toy"),
    (r"(?<=/)demo(?=[-/\s]|$)|(?<=model: )demo", "tiny"),
    (r"^make demo", "make -o setup CORES=2 demo"),  # `setup` is there
    # two atoms of silicon for eight of MgO, whose SCF takes longer
    (r'"MgO", "rocksalt", a=4\.212, cubic=True', '"Si", "diamond", a=5.431'),
    (r"^  Mg: (.*)\n  O: .*", r"  Si: \1"),
    (r"^  charges: .*\n", ""),
    ("cutoff_ry: 500.*", "cutoff_ry: 80\n  eps_default: 1.0e-8"),
    ("rel_cutoff_ry: 60", "rel_cutoff_ry: 30"),
    ("  kpoint_length_angstrom: 8", "  kpoint_length_angstrom: 3"),
    ("count: (12|2)", "count: 1"),
    (r"cutoff_angstrom: 8\.0", "cutoff_angstrom: 5.0"),
    (r"repeat\(\(3, 3, 3\)\)", "repeat((2, 2, 2))"),
    ("hamscale dos large.h5", "hamscale dos large.h5 --clusters 2 --radius 5"),
]


def tutorial_script(folder: Path) -> str:
    """The shell script of a reader of the tutorial, who writes its files and types its commands; at toy size."""
    script = ["set -e"]
    text = (ROOT / "docs" / "tutorial.md").read_text()
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        for pattern, instead in TOY_SIZES:
            body = re.sub(pattern, instead, body, flags=re.M)
        if language == "yaml":
            (folder / re.match(r"# (\S+)", body)[1]).write_text(body)
        else:
            script.append(f"python <<'END'\n{body}END" if language == "python" else body)
    return "\n".join(script)


def test_the_tutorial_from_its_first_line_to_its_last(finished, tmp_path):
    """The demo of it is the run of these tests, so that `make demo` finds nothing to do but the report."""
    folder = tmp_path / "clone"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("config", "demo"):
        (folder / "config" / f"{name}.yaml").write_text("runs: [{material: toy, model: tiny}]\n")
    (folder / ".venv").symlink_to(BIN.parent)
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env["PATH"] = ":".join(path for path in env["PATH"].split(":") if Path(path) != BIN)
    result = subprocess.run(["bash", "-c", tutorial_script(folder)], cwd=folder, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Nothing to be done" in result.stdout + result.stderr
    assert re.search(r"fermi_level -?\d+\.\d+", result.stdout)
    large = read_operators(folder / "large.h5")
    assert (len(large.atoms), large.attributes["source"]) == (14, "predicted")
    assert list(pd.read_csv(folder / "results" / "summary.csv")["material"]) == ["mgo"]
    assert (folder / "results" / "figures" / "mgo" / "tiny" / "test-000" / "bands.png").stat().st_size > 10_000


def shown(driver, category: str, what: str):
    """Click through the report to a result, and give the picture or frame it is shown in."""
    from selenium.common.exceptions import (
        ElementClickInterceptedException,
        NoSuchElementException,
        StaleElementReferenceException,
    )
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(driver.current_url.split("#")[0])
    # rows move while the report lays them out: a click that meets nothing, or is lost, is made again
    moving = (NoSuchElementException, StaleElementReferenceException, ElementClickInterceptedException)
    wait = WebDriverWait(driver, 120, poll_frequency=2, ignored_exceptions=moving)

    def click(by, link, then):
        """Click the link until what it leads to is there, and give that."""

        def there(driver):
            found = driver.find_elements(By.XPATH, then)
            return found[0] if found else driver.find_element(by, link).click()

        return wait.until(there)

    row = f"//tr[td[normalize-space()='{what}']]//a"
    if category == "toy":  # of two structures
        click(By.LINK_TEXT, category, "//a[normalize-space()='test-000']")
        category = "test-000"
    click(By.LINK_TEXT, category, row)
    if what.startswith("table"):
        return click(By.XPATH, row, "//iframe | //object")
    picture = click(By.XPATH, row, "//img[starts-with(@src, 'data:image/png')]")
    wait.until(lambda d: d.execute_script("return arguments[0].complete", picture))
    return picture


def test_the_report_opens_alone_and_a_click_on_a_figure_shows_it(finished, browser):
    from selenium.webdriver.common.by import By

    driver = browser.open(finished / "report.html")
    for category, what in (
        *(("toy", name) for name in ("bands", "error by distance", "heatmap", "training")),
        *(("Figures of the method", f"figure {n}") for n in (3, 8)),
    ):
        picture = shown(driver, category, what)
        assert picture.is_displayed(), what
        assert picture.get_property("naturalWidth") > 900, what
    for category, what, text in (
        ("toy", "table of errors", "Si-Si"),
        ("Summary", "table of errors, all structures", "eigenvalue_mae_mev_occupied"),
    ):
        driver.switch_to.frame(shown(driver, category, what))
        assert text in driver.find_element(By.TAG_NAME, "body").text
        driver.switch_to.default_content()
    assert [message for level, message in browser.console() if level == "SEVERE"] == []
    assert set(browser.requests()) == {(finished / "report.html").resolve().as_uri()}


def test_the_page_of_a_run_shows_it(finished, browser):
    from selenium.webdriver.common.by import By

    driver = browser.open(finished / "results" / "index.html")
    names = [option.text for option in driver.find_elements(By.CSS_SELECTOR, "#which option")]
    assert names == ["toy / tiny / device-000", "toy / tiny / test-000", "toy / tiny / tiled-000"]
    assert browser.console() == []


def test_imported_structures_are_planned_without_cp2k(tmp_path):
    """Sets with `operators`, no species: each becomes operators, and predictions take S from there."""
    for number in range(3):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        (tmp_path / "data" / str(number) / "info.json").write_text("{}")
    sets = ({"operators": f"data/{number}", "split": split} for number, split in enumerate(("train", "validation", "test")))
    copy_workflow(tmp_path, yaml.safe_dump({"structures": dict(zip("abc", sets))}), {"tiny": MODEL})
    planned = snakemake(tmp_path, "-n", "-p")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "hamscale operators config/materials/toy.yaml results/toy/structures/b-000.extxyz data/1" in planned.stdout
    assert "--overlap results/toy/operators/c-000.h5" in planned.stdout
    assert "rule dft:" not in planned.stdout
    assert "rule input:" not in planned.stdout


def test_figures_are_drawn_where_there_is_neither_cp2k_nor_a_gpu(tmp_path):
    """From what a clone holds; and with raw=results/raw they are planned from measurements made anew."""
    for name in ("Snakefile", "workflow", "config", "envs", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "sh", "env", "git", "which"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    result = snakemake(tmp_path, "figures", PATH=f"{BIN}:{tmp_path / 'bin'}", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    for name in ("fig3", "fig5", "fig6", "fig7", "fig8", "learning", "roofline", "size"):
        assert (tmp_path / "results" / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / "results" / "figures" / f"{name}.png").stat().st_size > 50_000
    anew = snakemake(tmp_path, "-n", "figures", "--configfile", "config/figures.yaml", "--config", "raw=results/raw").stdout
    for rule in (
        "throughput",
        "domains",
        "partition_table",
        "scaling_measured",
        "scaling_modelled",
        "paper_tables",
        "ablation",
        "size_table",
        "dos_table",
        "dft",
    ):
        assert re.search(rf"^{rule} +\d", anew, re.M), rule


def test_an_unconverged_run_is_reported_and_the_others_go_on(cp2k, project):
    material = project / "config" / "materials" / "toy.yaml"
    material.write_text(TOY.replace("eps_default: 1.0e-8", "eps_default: 1.0e-8, max_scf: 3"))
    result = snakemake(project, "--keep-going", "--show-failed-logs", "results/toy/dft/train-000", "results/toy/dft/train-001")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    for identifier in ("train-000", "train-001"):
        assert f"results/toy/inputs/{identifier}.inp: the SCF did not converge (last step 3" in output
        assert not (project / "results" / "toy" / "dft" / identifier).exists()


@pytest.fixture
def clone(tmp_path):
    """What is shipped, where nothing has run."""
    for name in ("Snakefile", "workflow", "config", "envs", "alps", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("config", ["config", "demo", "hfo2", "gst"])
def test_every_rule_of_the_shipped_configurations_is_planned(config, clone):
    result = snakemake(clone, "-n", "--configfile", f"config/{config}.yaml")
    assert result.returncode == 0, result.stderr
    for rule in (
        "structure",
        "input",
        "dft",
        "operators",
        "reference",
        "graphs",
        "train",
        "join",
        "predict",
        "analyse",
        "figures",
    ):
        assert f"{rule} " in result.stdout


def test_a_teacher_is_trained_before_it_teaches_and_before_what_begins_with_its_weights(clone):
    planned = snakemake(
        clone,
        "-np",
        "results/hfo2_taught/networks/hfo2_taught-0/weights.safetensors",
        "--configfile",
        "config/hfo2_taught.yaml",
    ).stdout
    waiting = re.findall(r"Job \d+: (.*)\nReason: .*results/hfo2/models/hfo2/weights.safetensors", planned)
    assert sum("to be learnt: hfo2_taught teach" in job for job in waiting) == 4
    assert "train hfo2_taught, network 0, on hfo2_taught" in waiting
    assert "hamscale predict results/hfo2/models/hfo2 results/hfo2/structures/teach-001.extxyz" in planned
    (graphs,) = re.findall(r"hamscale graph results/hfo2_taught/reference.h5 .*", planned)
    (learnt,) = re.findall(r"hamscale train config/models/hfo2_taught.yaml .*", planned)
    for path, command in (
        ("taught/teach_long-001.h5", graphs),
        ("graphs/teach_long-001.h5 --validation", learnt.replace("  ", " ")),
    ):
        assert path.split(" ")[0] in command


@pytest.mark.parametrize(("cores", "threads"), [(2, "1"), (16, "5")])
def test_the_networks_of_a_model_share_the_cores(clone, cores, threads):
    """Three of HfO2: side by side, not one after another on all cores."""
    options = ["--cores", str(cores), "--configfile", "config/hfo2.yaml"]
    planned = snakemake(clone, "-np", "results/hfo2/models/hfo2/weights.safetensors", *options).stdout
    commands = re.findall(r"OMP_NUM_THREADS:-(\d+)}.* hamscale train .* --network (\d) ", planned)
    assert sorted(commands) == [(threads, "0"), (threads, "1"), (threads, "2")]


def test_lint_is_clean():
    result = snakemake(ROOT, "--lint")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("profile", [("alps",), ("workflow/profiles/slurm", "--sdm", "env-modules")], ids=lambda p: p[0])
def test_the_profiles_plan_every_rule_without_slurm(profile, clone, tmp_path):
    """env-modules, which no rule names: Snakemake asks for conda even where it only plans."""
    programs = tmp_path / "bin"  # of the system none but these, whatever else is installed
    programs.mkdir()
    for name in ("sh", "bash", "which"):
        (programs / name).symlink_to(shutil.which(name))

    def say(*arguments):
        env = os.environ | {"PATH": f"{BIN}:{programs}"}
        return subprocess.run([BIN / "snakemake", *arguments], cwd=clone, capture_output=True, text=True, env=env)

    planned = say("--profile", *profile, "-n")
    assert planned.returncode == 0, planned.stderr
    rules = set(say("--profile", *profile, "--list-rules").stdout.split())
    assert {"dft_batch", "train", "join", "predict"} < rules
    table = set(re.findall(r"^(\w+) +\d+$", planned.stdout, re.M))
    # for looking, and for measuring the figures of the method anew: made on request alone
    assert rules - table == ON_REQUEST


def test_another_cluster_needs_little():
    alps, plain = (yaml.safe_load((ROOT / p / "config.yaml").read_text()) for p in ("alps", "workflow/profiles/slurm"))
    assert set(plain) - set(alps) == {"software-deployment-method"}
    assert {r for r in plain["set-resources"]} <= set(alps["set-resources"])


@pytest.mark.parametrize("graph", ["--dag", "--rulegraph"])
def test_the_graphs_render(graphviz, graph):
    text = snakemake(ROOT, graph, "--forceall", "--configfile", "config/demo.yaml")
    assert text.returncode == 0, text.stderr
    drawn = subprocess.run(["dot", "-Tsvg"], input=text.stdout, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    for rule in ("structure", "dft", "train", "predict", "analyse", "figures", "summary"):
        assert re.search(rf">{rule}\b", drawn.stdout), rule


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
