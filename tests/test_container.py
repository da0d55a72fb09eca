"""Protected files: damage, forgery, storage elsewhere, and files that crash libhdf5."""

import os
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest

from hamscale.container import BLOCK, PART, Source, create_h5, edit_h5, identity, open_foreign, open_h5
from hamscale.layout import Array, Layout
from hamscale.sandbox import run_limited
from helpers import forged

LAYOUT = Layout(
    "numbers/2",
    {
        "few": Array("i4", ("n", 2)),
        "ends": Array("i8", ("n+1",)),
        "many/*": Array("f8", ("m",), leading=(2,)),
        "more": Array("bool", (3,), optional=True),
    },
    {"length": float},
    earlier="numbers/1",
)
MANY = 3 * PART // 8 + 17  # doubles of more than three parts


def write(path, seed=0):
    random = np.random.default_rng(seed)
    with create_h5(path, LAYOUT, length=1.5) as file:
        file["few"], file["ends"] = np.arange(8, dtype=np.int32).reshape(4, 2), np.arange(5)
        file["many/a"], file["many/b"] = random.normal(size=MANY), random.normal(size=(2, MANY))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("container") / "a.h5")


def test_any_reader_of_hdf5_reads_a_protected_file(path):
    with h5py.File(path) as file, open_h5(path, LAYOUT) as ours:
        assert file.userblock_size == BLOCK
        for name in ("few", "ends", "many/a", "many/b"):
            assert np.array_equal(file[name], ours[name])
    assert path.read_bytes()[:BLOCK].decode().split("\n")[:2] == ["hamscale container 1", "schema numbers/2"]


def test_rows_are_read_one_by_one_in_any_order(path):
    """Spans that begin and end within parts: what is handed over is what lies there."""
    with h5py.File(path) as file:
        expected = file["many/b"][:]
    random = np.random.default_rng(1)
    with open_h5(path, LAYOUT) as file:
        for _ in range(50):
            first, last = sorted(random.integers(0, MANY, 2))
            assert np.array_equal(file["many/b"][1, first:last], expected[1, first:last])


@pytest.mark.parametrize("place", ["block", "superblock", "first part", "middle", "trailer", "last byte"])
def test_a_bit_that_flipped_is_found(path, tmp_path, place):
    data = bytearray(path.read_bytes())
    with closing(Source(path)) as source:
        size = source.size
    at = {"block": 60, "superblock": BLOCK, "first part": BLOCK + 2000, "middle": size // 2, "trailer": size + 3}
    data[at.get(place, len(data) - 1)] ^= 1
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.h5: damaged") as error, open_h5(tmp_path / "a.h5", LAYOUT) as file:
        _ = [file[name][:] for name in ("few", "ends", "many/a", "many/b")]
    assert "\n" not in str(error.value)


def test_what_is_read_is_compared_and_nothing_else(path, tmp_path):
    """A large file is read by parts: damage of one does not keep a rank from reading another."""
    data = bytearray(path.read_bytes())
    data[-20_000] ^= 1  # among the last values of many/b
    (tmp_path / "a.h5").write_bytes(data)
    with open_h5(tmp_path / "a.h5", LAYOUT) as file, h5py.File(path) as whole:
        assert np.array_equal(file["many/a"][:100], whole["many/a"][:100])
        with pytest.raises((OSError, ValueError)):
            file["many/b"][:]
    with closing(Source(tmp_path / "a.h5")) as source, pytest.raises(ValueError, match="damaged: bytes"):
        source.compare_all()


@pytest.mark.parametrize("length", [0, 7, 100, BLOCK, BLOCK + 100, -16, -1])
def test_a_file_cut_short_is_refused(path, tmp_path, length):
    (tmp_path / "a.h5").write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.h5: "), open_h5(tmp_path / "a.h5", LAYOUT):
        pass


def test_a_file_without_its_protection_is_refused(path, tmp_path):
    (tmp_path / "a.h5").write_bytes(path.read_bytes()[BLOCK:])
    with pytest.raises(ValueError, match="not protected, as files of numbers/2 are"), open_h5(tmp_path / "a.h5", LAYOUT):
        pass


def test_a_file_of_an_earlier_version_is_read_with_a_warning(path, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file, h5py.File(path) as whole:
        for name in whole:
            whole.copy(name, file)
        file.attrs["schema"], file.attrs["length"] = "numbers/1", 1.0
    with pytest.warns(UserWarning, match="not protected"), open_h5(tmp_path / "a.h5", LAYOUT) as file:
        assert len(file["many/a"]) == MANY


def outside(file, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(8 * MANY))
    del file["many/a"]
    file.create_dataset("many/a", (MANY,), float, external=[(str(tmp_path / "secret"), 0, 8 * MANY)])


def virtual(file, tmp_path):
    layout = h5py.VirtualLayout((MANY,), float)
    layout[:] = h5py.VirtualSource(".", "many/a", (MANY,), float)  # itself
    del file["many/a"]
    file.create_virtual_dataset("many/a", layout)


def replaced(name, **options):
    def change(file, _):
        del file[name]
        file.create_dataset(name, **options)

    return change


FORGERIES = {
    "external": (outside, "virtual, compressed or stored elsewhere"),
    "virtual": (virtual, "virtual, compressed or stored elsewhere"),
    "soft link": (lambda f, _: f.move("few", "x") or f.__setitem__("few", h5py.SoftLink("/x")), "link|no part"),
    "external link": (lambda f, p: f.__setitem__("more", h5py.ExternalLink(str(p / "x"), "/x")), "a link"),
    "cycle": (lambda f, _: f["many"].__setitem__("c", f["many"]), "no part"),
    "another dataset": (lambda f, _: f.__setitem__("other", [1]), "/other is no part of schema"),
    "a type": (replaced("few", shape=(4, 2), dtype="i8"), "/few has type <i8, expected i4"),
    "byte order": (replaced("few", shape=(4, 2), dtype=">i4"), "/few has type >i4"),
    "a shape": (replaced("ends", data=np.arange(7)), r"/few has shape \(4, 2\), expected \(n, here 6, 2\)"),
    "missing": (lambda f, _: f.__delitem__("ends"), "/ends is missing"),
    "huge": (replaced("few", shape=(2**40, 2), dtype="i4"), "shape|said to have"),
    "compressed": (replaced("few", shape=(4, 2), dtype="i4", compression="gzip"), "compressed"),
    "an attribute": (lambda f, _: f.attrs.__setitem__("length", "long"), "attribute length is 'long'"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused_before_its_data_are_read(path, tmp_path, name):
    change, message = FORGERIES[name]
    copy = tmp_path / "a.h5"
    copy.write_bytes(path.read_bytes())
    with forged(copy) as file:
        change(file, tmp_path)
    with pytest.raises(ValueError, match=message) as error, open_h5(copy, LAYOUT):
        pass
    assert str(copy) in str(error.value)


def test_a_writer_cannot_write_what_the_layout_does_not_say(tmp_path):
    with pytest.raises(ValueError, match="/few has type"), create_h5(tmp_path / "a.h5", LAYOUT, length=1.0) as file:
        file["few"] = np.arange(8.0).reshape(4, 2)
    assert not list(tmp_path.iterdir())


def test_an_edited_file_is_protected_and_keeps_the_rest(path, tmp_path):
    copy = tmp_path / "a.h5"
    copy.write_bytes(path.read_bytes())
    with edit_h5(copy, LAYOUT) as file:
        file.attrs.modify("length", 2.5)
    with open_h5(copy, LAYOUT) as file, open_h5(path, LAYOUT) as before:
        assert file.attrs["length"] == 2.5
        assert all(np.array_equal(file[name], before[name]) for name in ("few", "many/a", "many/b"))
    with closing(Source(copy)) as source:
        source.compare_all()
    assert identity(copy) != identity(path)


def test_an_identity_is_that_of_the_content(path, tmp_path):
    assert identity(path) == identity(path)
    other = write(tmp_path / "b.h5", seed=1)
    assert identity(other) != identity(path)


def test_a_foreign_file_that_crashes_libhdf5_is_a_line(tmp_path):
    """A virtual dataset that maps itself ends the interpreter of whoever reads it."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["many/a"] = np.zeros(MANY)
        virtual(file, tmp_path)
    with pytest.raises(ValueError, match=r"a\.h5") as error, open_foreign(tmp_path / "a.h5"):
        pass
    assert "\n" not in str(error.value)


CRASHES = {
    "crash": ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
    "memory": ("x = bytearray(2**32)", "MemoryError"),
    "time": ("while True: pass", "ended by signal"),
    "an error": ("raise SystemExit('what went wrong')", "what went wrong"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_process_that_reads_a_file_is_limited(tmp_path, monkeypatch, name):
    import sys

    monkeypatch.setattr("hamscale.sandbox.SECONDS", 1)
    (tmp_path / "a").write_text("content")
    code, message = CRASHES[name]
    with pytest.raises(ValueError, match=message):
        run_limited([sys.executable, "-c", code], [Path(tmp_path / "a")])


def test_processes_that_share_an_open_file_read_what_they_ask_for(path):
    """Two processes in turns, as clusters of `hamscale dos` are computed."""
    with h5py.File(path) as whole:
        expected = whole["many/a"][:]
    with open_h5(path, LAYOUT) as file:
        ends = []
        for k in range(3):
            if not (child := os.fork()):
                right = all(np.array_equal(file["many/a"][n : n + 5000], expected[n : n + 5000]) for n in range(k, MANY, 7919))
                os._exit(0 if right else 1)
            ends.append(child)
        assert [os.waitpid(child, 0)[1] for child in ends] == [0, 0, 0]
