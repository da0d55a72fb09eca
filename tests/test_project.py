"""A project of one's own: `hamscale init`, from the clone and from a wheel that knows nothing of the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hamscale import __version__
from hamscale.project import create_project, root
from helpers import hafnia

CLONE = Path(__file__).parents[1]
SOURCES = ("src", "workflow", "config", "envs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment of processes that take hamscale from a built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    source = folder / "source"  # building leaves folders behind
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=CLONE, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLONE / name, source / name)
    subprocess.run([*build, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel], check=True
    )
    return os.environ | {"PYTHONPATH": str(folder / "site")}


def of_wheel(installed, folder, *command):
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=folder, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_wheel_has_all_that_a_project_needs(installed, tmp_path):
    where = "import hamscale, sys; print(hamscale.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=installed, capture_output=True, text=True).stdout
    assert found.startswith(installed["PYTHONPATH"])
    assert of_wheel(installed, tmp_path, "hamscale", "--version") == f"hamscale {__version__}\n"
    hafnia(0).write(tmp_path / "a.extxyz")
    model = CLONE / "resources" / "models" / "hfo2"
    of_wheel(installed, tmp_path, "hamscale", "predict", model, "a.extxyz", "--out", "h.h5")
    of_wheel(installed, tmp_path, "hamscale", "export", "h.h5", "--to", "quatrex", "--out", "device")
    of_wheel(installed, tmp_path, "hamscale", "partition", "a.extxyz", "--cutoff", "5", "--parts", "2", "--out", "p.h5")
    of_wheel(installed, tmp_path, "hamscale", "init", "mine")
    planned = of_wheel(installed, tmp_path / "mine", "snakemake", "-n")
    assert "train                 1" in planned
    assert str(CLONE / "workflow") not in planned


def test_a_new_project_plans_its_example(tmp_path):
    create_project(tmp_path / "mine")
    for profile in ([], ["--profile", "alps"]):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-n", *profile], cwd=tmp_path / "mine", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "train                 1" in done.stdout + done.stderr
    runs = yaml.safe_load((tmp_path / "mine" / "config" / "config.yaml").read_text())["runs"]
    assert runs == [{"material": "silicon", "model": "demo"}]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("my own")
    with pytest.raises(ValueError, match="exists, expected a new or an empty folder"):
        create_project(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_clone_is_the_root_where_the_package_is_not_installed():
    assert (root() / "workflow" / "hamscale.smk").is_file()
