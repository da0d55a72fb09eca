"""Files are read some atoms' rows at a time: the same elements whatever the pieces, and never all of them in memory."""

import tracemalloc

import h5py
import numpy as np
import pytest

import hamscale.cli
from hamscale.export import TARGETS, export, stream
from hamscale.operators import SHARD, join_shards, read_operators, shard_path, write_pieces
from hamscale.structures import wrap_as_cp2k
from helpers import forged, hafnia, model_hamiltonian, written


def elements(path) -> dict:
    """(matrix, R) -> dense matrix, and the order of the rows is checked."""
    found, last = {}, {}
    with stream.stored(path) as file:
        for rows in file.rows():
            for name in ("hamiltonian", "overlap"):
                for R, row, column, value in file.by_cell(rows, getattr(rows, name)):
                    matrix = found.setdefault((name, R), np.zeros((file.n_orbitals,) * 2))
                    matrix[row, column] = value
                    place = row * file.n_orbitals + column
                    assert place[0] > last.get((name, R), -1)
                    assert (np.diff(place) > 0).all()
                    last[name, R] = place[-1]
                    assert value.all()
    return found


@pytest.mark.parametrize("piece", [1, 3000, 1 << 20])
def test_pieces_make_up_the_matrix(dft, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(stream, "PIECE", piece)
    found = elements(written(tmp_path, dft))
    for name in ("hamiltonian", "overlap"):
        for R, matrix in dft.csr(getattr(dft, name)).items():
            if matrix.count_nonzero():
                assert np.array_equal(found.pop((name, R)), matrix.toarray())
    assert not found


def test_shards_of_ranks_are_one_matrix(dft, tmp_path):
    """Atoms of two ranks in turns: rows come in the order of the atoms."""
    for rank, atoms in enumerate(([0, 2], [1])):
        part = dft.select(np.isin(dft.pairs[:, 0], atoms))
        piece = (slice(0, len(part.hamiltonian)), part.hamiltonian, part.overlap)
        shard, named = shard_path(tmp_path / "a.h5", "ab12", rank), {"prediction": "ab12"}
        write_pieces(shard, part.atoms, part.basis, part.pairs, [piece], named, layout=SHARD)
    join_shards(tmp_path / "a.h5", "ab12", 2, {})
    whole, joined = elements(written(tmp_path, dft)), elements(tmp_path / "a.h5")
    assert whole.keys() == joined.keys()
    assert all(np.array_equal(whole[key], joined[key]) for key in whole)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])  # among the values
    with pytest.raises(ValueError, match=rf"{shard}: damaged: bytes"):
        read_operators(tmp_path / "a.h5")
    shard.unlink()
    with pytest.raises(ValueError, match="its shard .* is missing"):
        export(tmp_path / "a.h5", "quatrex", tmp_path / "out")


@pytest.fixture(scope="module")
def sizes(szv, tmp_path_factory):
    """Files of 12 and of 27 atoms."""
    return [
        written(tmp_path_factory.mktemp("size"), model_hamiltonian(wrap_as_cp2k(hafnia(5).repeat((n, n, 1))), szv))
        for n in (2, 3)
    ]


@pytest.mark.parametrize("target", ["quatrex", "deeph", "cp2k"])
def test_memory_does_not_grow_with_the_values(sizes, tmp_path, monkeypatch, target):
    """Peak of what is allocated: of the 5 MB that H and S of the larger file have more, the tables of pairs need 0.7."""
    monkeypatch.setattr(stream, "PIECE", 30_000)
    peak, values = [], []
    for number, path in enumerate(sizes):
        with h5py.File(path) as file:
            values.append(2 * file["hamiltonian"].size * 8)
        tracemalloc.start()
        export(path, target, tmp_path / str(number))
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peak[1] - peak[0] < 0.3 * (values[1] - values[0]), (peak, values)


def test_nan_is_refused_and_nothing_is_left(dft, tmp_path):
    path = written(tmp_path, dft)
    with forged(path) as file:
        file["overlap"][17] = np.nan
    for target in ("quatrex", "deeph", "deeptb", "cp2k", "matrixmarket", "tshs"):
        with pytest.raises(ValueError, match=f"{path}: overlap holds NaN"):
            export(path, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_with_something_in_it_is_not_touched(dft, tmp_path):
    path = written(tmp_path, dft)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ValueError, match="exists, expected a new or an empty folder"):
        export(path, "quatrex", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "a.h5", "--to", "wannier", "--out", "out"], f"--to is 'wannier', expected one of {', '.join(TARGETS)}"),
        (["export", "nowhere.h5", "--to", "quatrex", "--out", "out"], "nowhere.h5: no such file"),
        (["export", "a.h5", "--to", "quatrex", "--out", "out", "--transport", "z"], "--transport is 'z', expected an axis"),
        (["export", "a.h5", "--to", "deeph", "--out", "out", "--repeat", "3"], "--repeat came with --to deeph"),
        (["import", "nowhere", "--out", "out"], "nowhere: no file NAME-KS_SPIN_1"),
    ],
)
def test_errors_are_one_line(dft, tmp_path, monkeypatch, capsys, arguments, message):
    written(tmp_path, dft).rename(tmp_path / "a.h5")
    monkeypatch.chdir(tmp_path)
    assert hamscale.cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hamscale: error: ")
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_the_verb_says_what_was_written(dft, tmp_path, capsys):
    path = written(tmp_path, dft)
    assert hamscale.cli.main(["export", str(path), "--to", "quatrex", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: unit cell of 18 orbitals, dense, neighbour cells to [4, 4, 4]; nothing is dropped\n"
        f"{tmp_path / 'out'}: quatrex_config.toml (quatrex 0.1.0 and later), quatrex_config_0.0.1.toml (before): along c, "
        "k-points [6, 6, 1], without energies\n"
    )
