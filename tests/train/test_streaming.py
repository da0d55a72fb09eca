"""Structures of a training that come from their files: in order, in bounded memory, with the same losses whatever is cached."""

import csv
import shutil
import threading

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hamscale.config import Model
from hamscale.files import fingerprint
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import SCHEMA, read_graph, write_graph
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.tensors import example
from hamscale.parallel.env import World
from hamscale.train.loop import Stopped, TrainingFiles, shares, train
from hamscale.train.structures import AHEAD, Structures
from helpers import hafnia, model_hamiltonian

NETWORK = {"layers": 1, "channels": 4, "hidden": 4, "values": 4, "feed_forward": 4, "radial": 4, "lmax": 2}


@pytest.fixture(scope="module")
def reference(szv):
    return fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], 4.0)


@pytest.fixture(scope="module")
def graphs(reference, szv):
    return [BlockCodec(reference).encode(model_hamiltonian(hafnia(seed), szv)) for seed in range(6)]


@pytest.fixture(scope="module")
def files(reference, graphs, tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    write_reference(root / "reference.h5", reference)
    for k, graph in enumerate(graphs):
        write_graph(root / f"{k}.h5", graph)
    return TrainingFiles(root / "reference.h5", [root / f"{k}.h5" for k in range(5)], [root / "5.h5"])


class Reader:
    """Prepares structures, and remembers which, on which thread."""

    def __init__(self, graphs, reference):
        self.graphs, self.reference, self.read = graphs, reference, []

    def __call__(self, number):
        self.read.append(number)
        assert threading.current_thread() is not threading.main_thread()
        if number == 13:
            raise ValueError("no luck")
        return example(self.graphs[number], self.reference, 2, torch.float32)


@pytest.fixture
def reader(graphs, reference):
    return Reader(graphs, reference)


ORDER = [3, 0, 1, 2, 4, 3, 0, 1, 2, 4, 3]


def taken(reader, order, keeps, room):
    """The first positions of what comes, by which structures are known."""
    with Structures(reader, order, keeps, room) as structures:
        return [structure.inputs.distances[0].item() for structure in structures]


@pytest.mark.parametrize("room", [0.0, 2.5, 100.0])
def test_structures_come_in_order_and_those_for_which_there_is_room_are_read_once(reader, room, graphs, reference):
    alone = [example(graph, reference, 2, torch.float32) for graph in graphs]
    found = taken(reader, ORDER, lambda number: True, room * alone[0].nbytes)
    assert found == [alone[number].inputs.distances[0].item() for number in ORDER]
    once = set(ORDER[: int(room)])  # those that come first
    assert [number for number in reader.read if number in once] == ORDER[: int(room)][: len(once)]
    assert len(reader.read) == len(ORDER) if room == 0 else len(reader.read) < len(ORDER)


def test_only_what_this_rank_keeps_stays_in_memory(reader):
    taken(reader, ORDER, lambda number: number % 2 == 0, 1e9)
    assert sorted(reader.read) == [0, 1, 1, 2, 3, 3, 3, 4]


def test_a_structure_in_use_is_not_read_again(reader):
    """A single one that fits into no cache is in memory once."""
    taken(reader, [2] * 20, lambda number: True, 0.0)
    assert reader.read == [2]


def test_no_more_is_read_than_is_needed_soon(reader):
    with Structures(reader, iter(ORDER), lambda number: True, 0.0) as structures:
        for n in range(3):
            next(structures)
            structures.pool.submit(int).result()  # what was asked for has been read
            assert reader.read == ORDER[: n + 1 + AHEAD]


def test_what_goes_wrong_is_told_when_the_structure_is_due(reader):
    with Structures(reader, [0, 13, 1], lambda number: True, 1e9) as structures:
        next(structures)
        with pytest.raises(ValueError, match="no luck"):
            next(structures)


def run(files, folder, world=None, stop_after=None, **training):
    settings = {"steps": 12, "validate_every": 4, "batch": 2} | training
    model = Model.model_validate({"network": NETWORK, "training": settings})
    world = world or World()
    train(model, files, folder / "model", folder / "checkpoint", world=world)
    with open(folder / "model" / "train.csv") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return rows, load_file(folder / "model" / "weights.safetensors")


class StoppedAt(World):
    """One rank that is asked to stop after so many steps."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    @property
    def stop_requested(self):
        self.left -= 1
        return self.left <= 0

    @stop_requested.setter
    def stop_requested(self, value):
        pass


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_changes_no_bit_and_neither_does_a_stop(files, tmp_path, batch):
    rows, weights = run(files, tmp_path / "all", batch=batch)
    size = example(read_graph(files.train[0]), reference_of(files), 2, torch.float32).nbytes / 2**30
    for name, room in (("none", 0.0), ("two", 2.5 * size)):
        folder = tmp_path / name
        with pytest.raises(Stopped):
            run(files, folder, StoppedAt(5), batch=batch, cache_gib=room)
        again, found = run(files, folder, batch=batch, cache_gib=size)
        assert again == rows
        assert all(torch.equal(weights[key], found[key]) for key in weights)


def reference_of(files):
    from hamscale.graph.reference import read_reference

    return read_reference(files.reference)


@pytest.mark.parametrize(("structures", "groups"), [(1, 1), (5, 2), (8, 4), (7, 3), (2, 4)])
def test_a_batch_is_shared_evenly_and_groups_keep_their_own(structures, groups):
    random = np.random.default_rng(structures)
    own = 0
    for _ in range(50):
        batch = random.integers(0, 100, structures).tolist()
        parts = shares(batch, groups)
        assert sorted(sum(parts, [])) == sorted(batch)
        assert max(map(len, parts)) == -(-structures // groups)
        own += sum(k % groups == group for group, part in enumerate(parts) for k in part)
    assert own >= 50 * structures / groups


def test_a_graph_made_again_has_the_same_fingerprint_and_another_has_another(graphs, tmp_path):
    for name in "ab":
        write_graph(tmp_path / f"{name}.h5", graphs[0])
    with h5py.File(tmp_path / "a.h5", "r+") as file:  # as if written at another time by another version
        file.attrs["created"] = file.attrs["git_commit"] = "another"
    same = {fingerprint(tmp_path / f"{name}.h5", SCHEMA) for name in "ab"}
    others = [read_graph(tmp_path / "a.h5") for _ in range(3)]
    others[0].onsite[72][0, 0] += 1e-12
    others[1].edges.table[0, 2] += 1
    others[2].attributes["gauge_hartree"] += 1e-12
    for k, graph in enumerate(others):
        write_graph(tmp_path / f"{k}.h5", graph)
    assert len(same) == 1
    assert len(same | {fingerprint(tmp_path / f"{k}.h5", SCHEMA) for k in range(3)}) == 4


def test_a_file_without_a_fingerprint_is_known_by_its_bytes(files, tmp_path):
    for name in "ab":
        shutil.copy(files.train[0], tmp_path / f"{name}.h5")
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            del file.attrs["sha256"]
            file["onsite/72"][0, 0] += {"a": 0.0, "b": 1e-3}[name]
    found = {fingerprint(path, SCHEMA) for path in (tmp_path / "a.h5", tmp_path / "b.h5", files.train[0])}
    assert len(found) == 3
    read_graph(tmp_path / "a.h5")
    (tmp_path / "c.h5").write_bytes(files.train[0].read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"c\.h5: not a complete HDF5 file"):
        fingerprint(tmp_path / "c.h5", SCHEMA)


def test_a_training_goes_on_with_graphs_made_again_and_not_with_others(files, graphs, tmp_path, caplog):
    copies = [tmp_path / path.name for path in files.train]
    for path, graph in zip(copies, graphs):
        write_graph(path, graph)
    mine = TrainingFiles(files.reference, copies, files.validation)
    _, first = run(mine, tmp_path, steps=4)
    write_graph(copies[1], graphs[1])
    _, again = run(mine, tmp_path, steps=4, cache_gib=7.0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1
    write_graph(copies[1], graphs[0])
    run(mine, tmp_path, steps=4)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2
