"""One line on stderr, exit code 1, no traceback, nothing written."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import hamscale.cli
from hamscale import config
from hamscale.container import create_h5
from hamscale.export import TARGETS
from hamscale.files import atomic_folder, write_text
from hamscale.layout import Array, Layout
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


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


ANY = Layout("any/1", {"values": Array("f8", ("n",)), "more": Array("f8", ("m",))})


def write_numbers(path, n):
    with create_h5(path, ANY) as file:
        file["values"], file["more"] = np.ones(n), np.ones(500)


def test_a_full_disk_leaves_what_was_there(small_disk):
    """Text and HDF5, of any size that does not fit: an error of one line, the old result, no half file."""
    target = small_disk / "a"
    write_text(target, "old")
    with pytest.raises(OSError, match="No space"):
        write_text(target, "x" * 400_000)
    for kilobytes in (247, 248, 249, 250, 256, 1000):  # the first of them fails only when the file is closed
        with pytest.raises(OSError, match="cannot be written") as error:
            write_numbers(target, kilobytes * 128)
        assert str(error.value) == f"{target}: cannot be written: No space left on device. What was there is unchanged."
        assert target.read_text() == "old"
        assert [p.name for p in small_disk.iterdir()] == ["a"]


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    """At every size up to that of the whole file: of files of HDF5, which crashes if it cannot finish one."""
    code = f"""
import resource, numpy as np
from hamscale.container import create_h5
from hamscale.layout import Array, Layout
layout = Layout("any/1", {{"*/values": Array("f8", (200,))}})
for limit in range(0, 60_000, 1000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with create_h5("{tmp_path}/a.h5", layout) as file:
            for n in range(5):
                file[f"group {{n}}/values"] = np.ones(200)
                file.attrs[f"text {{n}}"] = "x" * 1000
        print("whole", limit)
        break
    except OSError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    *refused, whole = result.stdout.splitlines()
    assert whole.startswith("whole")
    assert len(refused) > 20
    assert set(refused) == {f"{tmp_path}/a.h5: cannot be written: File too large. What was there is unchanged."}
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


LEAVES = """
import sys, time
from hamscale.files import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_of_a_living_one(tmp_path):
    target = tmp_path / "result [1].txt"
    start = lambda: subprocess.Popen([sys.executable, "-c", LEAVES, target], stdout=subprocess.PIPE, text=True)  # noqa: E731
    killed, alive = start(), start()
    for process in (killed, alive):
        assert process.stdout.readline() == "writing\n"
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_text(target, "whole")
    assert target.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2  # the result, and what the living process writes
    alive.kill()
    alive.wait()
    write_text(target, "again")
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_beside_a_whole_folder_is_removed_by_who_finds_the_folder(tmp_path):
    target = tmp_path / "result"
    process = subprocess.Popen([sys.executable, "-c", LEAVES, target], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    target.mkdir()
    (target / "file").write_text("whole")
    with pytest.raises(ValueError, match="exists, expected a new or an empty folder"), atomic_folder(target):
        pass
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_of_results_are_those_of_the_user(tmp_path, mask):
    code = f"import os; os.umask({mask}); from hamscale.files import *; write_text('a', ''); \nwith atomic_folder('b'): pass"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o666 & ~mask, 0o777 & ~mask]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_command_in_one_line_and_leaves_nothing(number, tmp_path):
    """Here a command that waits for CP2K, for which a shell stands that only says that it has begun."""
    (tmp_path / "run.inp").write_text("")
    program = tmp_path / "cp2k"
    program.write_text(f"#!/bin/sh\n[ $1 = --version ] || touch {tmp_path}/begun\n[ $1 = --version ] || exec sleep 600\n")
    program.chmod(0o755)
    command = [sys.executable, "-m", "hamscale", "dft", tmp_path / "run.inp", "--out", tmp_path / "out", "--command", program]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # whatever started the tests, as nohup, may ignore it  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    name = signal.Signals(number).name
    assert errors == f"hamscale: error: ended by {name}; what it was about to write is not there\n"
    assert process.returncode == 128 + number
    assert sorted(p.name for p in tmp_path.iterdir()) == ["begun", "cp2k", "run.inp"]


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m hamscale schema | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("{\n", "")
    assert result.returncode in (0, 128 + signal.SIGPIPE)


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "folder" / "out.h5"
    assert hamscale.cli.main(["predict", "nowhere", "nowhere.extxyz", "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"hamscale: error: {out}: cannot be written: {tmp_path / 'file'} is not a folder.\n"


def test_the_version_is_the_one_to_be_cited(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        hamscale.cli.main(["--version"])
    assert capsys.readouterr().out == f"hamscale {hamscale.__version__}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hamscale.__version__
