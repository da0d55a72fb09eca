"""Training over processes that are real, and that die."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from hamscale.cli import main
from hamscale.config import Model
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import read_graph, write_graph
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.parallel.env import World
from hamscale.structures import write_structure_file
from hamscale.train.loop import TrainingFiles, train
from helpers import PATIENCE, hafnia, model_hamiltonian, wait_for
from ranks import on_ranks, start_cli

NETWORK = {"layers": 2, "channels": 4, "hidden": 4, "values": 4, "feed_forward": 8, "radial": 8, "lmax": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory, szv):
    """(reference, training graphs, validation graphs) as files."""
    root = tmp_path_factory.mktemp("data")
    structures = [model_hamiltonian(hafnia(seed).repeat((2, 1, 1)), szv) for seed in range(3)]
    reference = fit_reference(structures[:2], 5.0)
    write_reference(root / "reference.h5", reference)
    for k, operators in enumerate(structures):
        write_graph(root / f"{k}.h5", BlockCodec(reference).encode(operators))
    return root / "reference.h5", [root / "0.h5", root / "1.h5"], [root / "2.h5"]


TRAINING = {"steps": 20, "validate_every": 4, "schedule": "plateau", "patience": 1, "batch": 2, "precision": "float64"}


def run(world, data, folder, options=(), **training):
    model = Model.model_validate({"network": NETWORK, "training": TRAINING | training})
    options = dict(options)
    files = TrainingFiles(*data, partitions=options.pop("partitions", ()))
    train(model, files, folder / "model", folder / "checkpoint", world=world, **options)


def losses(folder) -> list[tuple[float, float, float]]:
    with open(folder / "model" / "train.csv") as file:
        rows = list(csv.DictReader(file))
    return [(float(r["train_mae_mev"]), float(r["validation_mae_mev"]), float(r["learning_rate"])) for r in rows]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The curve of one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(World(), data, folder)
    return losses(folder)


def twice(world, data, folder):
    short = {"steps": 20, "precision": "float32", "learning_rate": 1e-3}
    for name, options in (("shared", {}), ("groups", {"ranks_per_structure": max(1, world.size // 2)})):
        run(world, data, folder / name, options, **short)


def test_twenty_steps_on_four_ranks_are_those_on_one(data, tmp_path):
    """In float32, four ranks sharing each structure and two by two.

    Adam makes some 1e-4 of the loss from 1e-7 of rounding within these steps; float64, as in the other tests, stays at 1e-16.
    """
    twice(World(), data, tmp_path / "one")
    on_ranks(4, twice, data, tmp_path / "four")
    for name in ("shared", "groups"):
        for ours, one in zip(losses(tmp_path / "four" / name), losses(tmp_path / "one" / name), strict=True):
            assert ours == pytest.approx(one, rel=2e-3)


def command(data, folder):
    reference, train_graphs, validation = data
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump({"network": NETWORK, "training": TRAINING}))
    return [
        "train", path, reference, "--train", *train_graphs, "--validation", *validation,
        "--out", folder / "model", "--checkpoint", folder / "checkpoint",
    ]  # fmt: skip


def wait_for_checkpoint(folder, processes):
    """Wait until the processes, which are to run on meanwhile, have written a checkpoint."""

    def written():
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes if p.poll() is not None]
        return (folder / "checkpoint" / "checkpoint.safetensors").is_file()

    wait_for(written, "a checkpoint is written")


def finish(processes):
    """(exit code, standard output, standard error) of each; none may hang."""
    return [(p.wait(PATIENCE), *p.communicate()) for p in processes]


def test_a_killed_rank_ends_the_others_by_name_and_two_ranks_go_on(data, undisturbed, tmp_path):
    processes = start_cli(4, *command(data, tmp_path))
    wait_for_checkpoint(tmp_path, processes)
    processes[2].send_signal(signal.SIGKILL)
    for rank, (code, _, errors) in enumerate(finish(processes)):
        if rank != 2:
            assert code == 1
            # torch's own threads may complain after our last line
            said = [line for line in errors.splitlines() if line.startswith("hamscale: error:")]
            assert said[-1].startswith("hamscale: error: rank 2 of 4 ended without a word (killed"), errors
    assert not (tmp_path / "model").exists()
    results = finish(start_cli(2, *command(data, tmp_path)))  # to the curve that nothing disturbed
    assert [code for code, *_ in results] == [0, 0], results
    assert "resumed at step" in results[0][2]
    for ours, one in zip(losses(tmp_path), undisturbed, strict=True):
        assert ours == pytest.approx(one, rel=2e-3)


def test_a_stop_asked_of_one_rank_stops_all_with_a_checkpoint_and_one_rank_goes_on(data, undisturbed, tmp_path):
    processes = start_cli(3, *command(data, tmp_path))
    wait_for_checkpoint(tmp_path, processes)
    processes[2].send_signal(signal.SIGUSR1)
    results = finish(processes)
    assert [code for code, *_ in results] == [85] * 3, results
    assert "stopped by a signal after step" in results[0][2].splitlines()[-1]
    assert not (tmp_path / "model").exists()
    run(World(), data, tmp_path)
    for ours, one in zip(losses(tmp_path), undisturbed, strict=True):
        assert ours == pytest.approx(one, rel=2e-3)


def meets_an_error(world):
    if world.rank == 1:
        raise ValueError("no such luck")
    world.barrier()


def test_the_cause_of_an_error_on_one_rank_is_told_by_the_others():
    with pytest.raises(AssertionError, match=r"RankLost: rank 1 of 2 ended: ValueError: no such luck"):
        on_ranks(2, meets_an_error)


def test_settings_that_do_not_fit_the_ranks_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="1 ranks, 3 per structure: expected a divisor"):
        run(World(), data, tmp_path, {"ranks_per_structure": 3})
    with pytest.raises(ValueError, match="1 partitions for 2 training and 1 validation structures"):
        run(World(), data, tmp_path, {"partitions": ["a.h5"]})


def test_partitions_from_files_are_used(data, undisturbed, tmp_path):
    files = []
    for k, graph in enumerate([*data[1], *data[2]]):
        write_structure_file(tmp_path / f"{k}.extxyz", read_graph(graph).atoms)
        files.append(tmp_path / f"{k}-metis-2.h5")
        arguments = [tmp_path / f"{k}.extxyz", "--cutoff", 5, "--parts", 2, "--method", "metis", "--out", files[-1]]
        assert main(["partition", *map(str, arguments)]) == 0
    on_ranks(2, run, data, tmp_path, {"partitions": files})
    for ours, one in zip(losses(tmp_path), undisturbed, strict=True):
        assert ours == pytest.approx(one, rel=2e-3)
    with pytest.raises(AssertionError, match="its structure is another one. Make it anew with `hamscale partition`"):
        on_ranks(2, run, data, tmp_path / "exchanged", {"partitions": files[::-1]})


def test_torchrun_starts_it_and_a_model_comes_out(data, undisturbed, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "hamscale", *map(str, command(data, tmp_path))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    for ours, one in zip(losses(tmp_path), undisturbed, strict=True):
        assert ours == pytest.approx(one, rel=2e-3)
    assert load_file(tmp_path / "model" / "weights.safetensors")
