"""One line on stderr, exit code 1, no traceback, nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hamscale.cli
from hamscale import config
from hamscale.export import TARGETS
from hamscale.paper import PAPER
from hamscale.parallel.exchange import EXCHANGES
from hamscale.partition import METHODS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["structure", "nowhere.yaml", "--id", "a-000", "--out", "out"], "nowhere.yaml: no such file"),
        (["dft", "nowhere.inp", "--out", "out", "--command", "true"], "nowhere.inp: no such file"),
        (["graph", "nowhere.h5", "nowhere.h5", "--out", "out"], "nowhere.h5: no such file"),
        (["predict", "nowhere", "nowhere.extxyz", "--out", "out"], "nowhere"),
        (["train", "m.yaml", "r.h5", "--out", "out", "--checkpoint", "c"], "no graph was given"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert hamscale.cli.main(arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("hamscale: error: ")
    assert message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_check_reads_every_file_a_configuration_names():
    result = subprocess.run([sys.executable, "-m", "hamscale", "check", "config/config.yaml"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "config/config.yaml: good\n")


def test_choices_are_those_of_the_registries():
    """The command line does not import them, so that it answers at once."""
    assert set(config.PARTITIONERS) == set(METHODS)
    assert set(config.EXCHANGES) == set(EXCHANGES)
    assert set(config.EXPORTS) == set(TARGETS)
    assert set(config.PAPER_FIGURES) == set(PAPER)


def test_a_full_disk_leaves_nothing(tmp_path):
    """A real file system of 64 KiB: the write fails, the old result stays, no half file is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        from hamscale.files import write_text

        write_text(disk / "a", "old")
        with pytest.raises(OSError, match="No space"):
            write_text(disk / "a", "x" * 200_000)
        assert (disk / "a").read_text() == "old"
        assert [p.name for p in disk.iterdir()] == ["a"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_version_is_the_one_to_be_cited(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        hamscale.cli.main(["--version"])
    assert capsys.readouterr().out == f"hamscale {hamscale.__version__}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hamscale.__version__
