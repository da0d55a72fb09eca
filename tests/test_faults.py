"""Every verb, killed or out of disk at any of its writes, twice at once, or without what others take for granted.

At some of them, or with HAMSCALE_FAULTS=all at each (`make fuzz`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import faults
from faults import STEPS, contents, disturbed, hidden, on_ranks, place
from hamscale.basis import cp2k_data_directory
from helpers import PATIENCE

ALL = "HAMSCALE_FAULTS" in os.environ
# processes of these begin where an earlier one ended: a second call does not write all again
RESUMES = ("batch", "train", "train 1")
WRITING = [name for name in STEPS if name.split()[0] not in ("table", "schema", "verify")]
SLOW = ("plot-structure", "plot-paper")
ONE_OF_EACH_WAY = ("structure", "dft", "graph", "train", "predict", "dos", "export deeph", "analyse")  # to write
SOME = [name for name in WRITING if ALL or name not in SLOW]
# whose libraries write in ways of their own
FILLING = (
    WRITING
    if ALL
    else (*ONE_OF_EACH_WAY, "export quatrex", "export tshs", "export tbtrans", "export cp2k", "plot-transmission")
)
FEWEST_OF_A_RANK = (60, 40)  # changes of files by each rank of a prediction on two, at least


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a name of several scripts."""
    return tmp_path_factory.mktemp("a b") / "Übung 数据"


@pytest.fixture(scope="module")
def whole(root, recorded, tmp_path_factory):
    """What every verb did when nothing disturbed it.

    Without a home, a locale, a PATH with git or Slurm; into folders whose files are for the user and the group.
    """
    environment = {"LC_ALL": "C", "HOME": "/dev/null/home", "PATH": "/nowhere", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "CP2K_DATA_DIR": str(cp2k_data_directory())}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # or a new installation has changes that a later call has not
    root.mkdir()
    (root / "elsewhere").mkdir()
    command = [sys.executable, faults.__file__, root, recorded["si8"].parent]
    done = subprocess.run(command, cwd=root / "elsewhere", env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return {name: faults.Did(**did) for name, did in json.loads(done.stdout).items()}


def points(last: int, most: int | None = None) -> list[int]:
    """One of the numbers from 1 to `last`; with HAMSCALE_FAULTS all, or so many that no more are wanted."""
    n = min(last, most or last) if ALL else 1
    return [1 + (2 * k + 1) * last // (2 * n) for k in range(n)]


def test_verbs_need_nothing_around_them(root, whole):
    """No network, no home, no other program than Python and CP2K (and what lists fonts).

    Nothing is written outside of --out and the folder of temporary files; permissions are those of the user's umask.
    """
    for name, did in whole.items():
        assert did.connected == [], name
        assert set(did.started) <= {"git", "cp2k", "fc-list", Path(sys.executable).name}, name
        inside = str(place(root, name)), f"{tempfile.gettempdir()}/tmp", f"{tempfile.gettempdir()}/matplotlib-"
        outside = [path for _, path in did.changes if path and not path.startswith(inside)]
        assert outside == [], name
    assert list((root / "elsewhere").iterdir()) == []
    for path in (root / "made").rglob("*"):
        if path.name not in ("cp2k",):
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def second(name: str, root: Path, out: Path, expected: dict, environs: Sequence[dict[str, str]] = ({},)) -> None:
    """Run a verb where it was disturbed before, and compare. An export refuses to write where one is, which must be whole."""
    for again in disturbed(STEPS[name].command(root, out), environs):
        refused = not STEPS[name].repeats and "exists, expected a new or an empty folder" in again.errors
        assert again.code == 0 or refused, again.errors
    same(contents(out), expected)
    assert hidden(out) == []


def same(found: dict, expected: dict) -> None:
    assert [path for path in found | expected if found.get(path) != expected.get(path)] == []


def begin(name: str, root: Path, out: Path, over: bool) -> dict:
    """Lay out what is there before a verb runs, perhaps its old result, and return what that is."""
    if over and STEPS[name].repeats and name not in RESUMES:
        shutil.copytree(place(root, name), out)
    else:
        STEPS[name].prepare(root, out)
    return contents(out)


def no_half(name: str, before: dict, expected: dict, out: Path) -> None:
    """Every file is the old one or a whole new one; the checkpoint of a training is that of some step."""
    old_or_new = {path: ("folder", before.get(path), expected.get(path)) for path in contents(out)}
    halves = [path for path, content in contents(out).items() if content not in old_or_new[path]]
    assert [path for path in halves if name not in RESUMES] == []


@pytest.mark.parametrize("name", SOME)
def test_a_verb_that_is_killed_leaves_no_half_and_a_second_call_completes(name, root, whole, tmp_path):
    expected = contents(place(root, name))
    for number in points(len(whole[name].changes)):
        out = tmp_path / str(number)
        before = begin(name, root, out, over=number % 2 == 1)
        (killed,) = disturbed(STEPS[name].command(root, out), kill_at=[number])
        assert killed.code == -signal.SIGKILL, killed.errors
        no_half(name, before, expected, out)
        second(name, root, out, expected)
        shutil.rmtree(out)


@pytest.mark.parametrize("name", [name for name in FILLING if name not in ("batch", "collect")])
def test_a_full_disk_is_one_line_and_leaves_no_half(name, root, whole, tmp_path):
    """A limit of the size of files, from nothing to a byte less than the largest file the verb writes.

    `dft` keeps the files of CP2K that had no room beside --out; `batch` records it, and `collect` writes nothing but links.
    """
    expected = contents(place(root, name))
    written = {Path(path) for event, path in whole[name].changes if event == "os.rename"}
    results = [path for path in place(root, name).rglob("*") if path.is_file() and written & {path, *path.parents}]
    largest = max(path.stat().st_size for path in results)
    for limit in points(largest, most=20):
        out = tmp_path / str(limit)
        before = begin(name, root, out, over=limit % 2 == 1)
        (full,) = disturbed(STEPS[name].command(root, out), largest=limit - 1)
        lines = full.errors.splitlines()
        assert full.code == 1, full.errors
        assert lines[-1].startswith("hamscale: error: ")
        assert [line for line in lines if "rror" in line or "Traceback" in line] == lines[-1:]
        assert hidden(out) == []
        shutil.rmtree(out / "run.failed", ignore_errors=True)
        no_half(name, before, expected, out)
        shutil.rmtree(out)


@pytest.mark.parametrize("name", WRITING if ALL else ONE_OF_EACH_WAY)
def test_two_of_the_same_at_once_both_end_well(name, root, whole, tmp_path):
    STEPS[name].prepare(root, tmp_path / "out")
    second(name, root, tmp_path / "out", contents(place(root, name)), [{}, {}])


def on_two_ranks(root: Path, out: Path, kill_at: Sequence[int] = ()) -> list[faults.Did]:
    """Predict on two ranks, each of which writes a shard."""
    return disturbed(STEPS["predict"].command(root, out), on_ranks(2), kill_at)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_leaves_no_half_and_a_second_call_completes(rank, root, whole, tmp_path):
    """On one rank after two, too: nothing is left of the shards."""
    assert [did.code for did in on_two_ranks(root, tmp_path / "whole")] == [0, 0]
    expected, of_one = contents(tmp_path / "whole"), contents(place(root, "predict"))
    assert len(expected) == 3
    for number in points(FEWEST_OF_A_RANK[rank]):
        out = tmp_path / str(number)
        before = begin("predict", root, out, over=True)
        done = on_two_ranks(root, out, [number * (k == rank) for k in range(2)])
        assert done[rank].code == -signal.SIGKILL, done[rank].errors
        other = done[1 - rank]
        if other.code != 0:  # the killed one had nothing left to tell it
            assert other.code == 1
            assert other.errors.splitlines()[-1].startswith("hamscale: error: rank ")
            assert "Traceback" not in other.errors
        no_half("predict", before | expected, of_one, out)
        assert [did.code for did in on_two_ranks(root, out)] == [0, 0]
        same(contents(out), expected)
        assert hidden(out) == []
        second("predict", root, out, of_one)


@pytest.mark.parametrize("late", [2.0, 12.0])
def test_a_rank_that_is_late(late, root, whole, tmp_path):
    """Within the time that the other waits nothing happens; later than that each ends in a line."""
    ranks = [environment | {"HAMSCALE_TIMEOUT_SECONDS": "6"} for environment in on_ranks(2)]
    both = disturbed(STEPS["predict"].command(root, tmp_path / "out"), ranks, kill_at=[0, 3], late=late)
    if late < 6:
        assert [did.code for did in both] == [0, 0]
        return
    for did in both:
        assert did.code == 1
        (line,) = did.errors.splitlines()
        assert line.startswith("hamscale: error: all ranks are alive (a beat every 1 s), but one did not answer in time")
    assert contents(tmp_path / "out") == {}


def test_two_predictions_at_once_on_two_ranks_each(root, whole, tmp_path):
    assert [did.code for did in on_two_ranks(root, tmp_path / "whole")] == [0, 0]
    arguments = STEPS["predict"].command(root, tmp_path / "out")
    assert [did.code for did in disturbed(arguments, [*on_ranks(2), *on_ranks(2)])] == [0] * 4
    same(contents(tmp_path / "out"), contents(tmp_path / "whole"))
    assert hidden(tmp_path / "out") == []


def test_a_clock_that_steps_back_changes_nothing(root, whole, tmp_path):
    """What is there seems to come from the future."""
    for name in ("dft", "train", "predict", "analyse"):
        out = tmp_path / name
        shutil.copytree(place(root, name), out)
        for path in out.rglob("*"):
            os.utime(path, (4e9, 4e9))
        second(name, root, out, contents(place(root, name)))
