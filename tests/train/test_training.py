"""Training on a Hamiltonian that is more than two-centre: it learns, resumes exactly, and refuses what cannot be."""

import csv
import json
import logging
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hamscale.config import Model
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import read_graph, write_graph
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import join, load_model
from hamscale.inputs.ranks import rank_example
from hamscale.inputs.tensors import differences_mev, example
from hamscale.operators import write_operators
from hamscale.parallel.env import World
from hamscale.train.loop import TrainingFiles, train
from hamscale.train.loss import eigenvalue_error, l1_l2
from helpers import hafnia, model_hamiltonian

NETWORK = {"layers": 1, "channels": 8, "hidden": 8, "values": 8, "feed_forward": 16, "radial": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory, szv):
    """(reference, training graphs, validation graphs) as files."""
    root = tmp_path_factory.mktemp("data")
    structures = [model_hamiltonian(hafnia(seed), szv) for seed in range(6)]
    reference = fit_reference(structures[:4], 5.0)
    write_reference(root / "reference.h5", reference)
    for k, operators in enumerate(structures):
        write_graph(root / f"{k}.h5", BlockCodec(reference).encode(operators))
    return root / "reference.h5", [root / f"{k}.h5" for k in range(4)], [root / f"{k}.h5" for k in (4, 5)]


@contextmanager
def told(receive):
    """Pass every message of a training to `receive`, which may raise."""
    handler, log = logging.Handler(), logging.getLogger("hamscale.train")
    handler.emit = lambda record: receive(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def run(data, directory, messages=None, network=0, **training):
    model = Model.model_validate({"network": NETWORK, "training": {"steps": 12, "validate_every": 4} | training})
    with told((messages if messages is not None else []).append):
        train(model, TrainingFiles(*data), directory / "model", directory / "checkpoint", network=network)
    with open(directory / "model" / "train.csv") as file:
        return list(csv.DictReader(file)), load_file(directory / "model" / "weights.safetensors")


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("schedule", "average"), [("cosine", 0.0), ("plateau", 0.8), ("constant", 0.0)])
def test_a_resumed_run_repeats_an_undisturbed_one_bit_by_bit(data, tmp_path, schedule, average):
    settings = {"steps": 12, "validate_every": 4, "schedule": schedule, "batch": 3, "patience": 1, "average": average}
    rows, weights = run(data, tmp_path / "whole", **settings)

    def stop(message):
        if message.startswith("step 8"):
            raise Stopped

    model = Model.model_validate({"network": NETWORK, "training": settings})
    with pytest.raises(Stopped), told(stop):
        train(model, TrainingFiles(*data), tmp_path / "broken" / "model", tmp_path / "broken" / "checkpoint")
    assert not (tmp_path / "broken" / "model").exists()
    messages = []
    again, resumed = run(data, tmp_path / "broken", messages, **settings)
    assert messages[0] == "resumed at step 8"
    for a, b in zip(rows, again, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Folders of the two networks of a model."""
    root = tmp_path_factory.mktemp("two")
    for k in range(2):
        run(data, root / f"{k}", network=k, networks=2 + k, seed=5)  # the second of a model that has grown
    return [root / f"{k}" / "model" for k in range(2)]


def test_networks_of_a_model_are_those_of_its_seeds(data, two, tmp_path):
    for k, directory in enumerate(two):
        _, alone = run(data, tmp_path / f"{k}", seed=5 + k)
        assert all(torch.equal(load_file(directory / "weights.safetensors")[name], value) for name, value in alone.items())
    assert not torch.equal(*(load_file(directory / "weights.safetensors")["0.atom_embedding"] for directory in two))


def test_a_model_joined_holds_its_networks_and_the_rows_of_all(two, tmp_path):
    join(two, tmp_path)
    models, reference = load_model(tmp_path)
    for model, directory in zip(models, two, strict=True):
        (alone,), of_one = load_model(directory)
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items())
        assert of_one.cutoff_angstrom == reference.cutoff_angstrom
    rows = (tmp_path / "train.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows] == [["network", "step"], *([k, n] for k in "01" for n in ("4", "8", "12"))]
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["networks"], len(record["training"]["seconds"])) == (2, 2)
    each = [json.loads((directory / "config.json").read_text())["training"]["validation_mae_mev"] for directory in two]
    assert record["training"]["validation_mae_mev"] == each[0] + each[1]


def test_what_is_no_model_together_is_not_joined(data, two, tmp_path):
    with pytest.raises(ValueError, match="holds network 0, as .* does"):
        join([two[0], two[0]], tmp_path / "model")
    run(data, tmp_path / "other", network=1, networks=2, seed=5, learning_rate=1e-3)
    with pytest.raises(ValueError, match="settings of training other than in"):
        join([two[0], tmp_path / "other" / "model"], tmp_path / "model")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        join([two[0], tmp_path / "nothing"], tmp_path / "model")
    torn = shutil.copytree(two[1], tmp_path / "torn")
    (torn / "weights.safetensors").write_bytes((torn / "weights.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"weights\.safetensors: damaged or of another model"):
        join([two[0], torn], tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("network", [-1, 2])
def test_a_network_the_model_lacks_is_refused(data, tmp_path, network):
    with pytest.raises(ValueError, match=rf"network {network}: found training.networks 2, expected 0 to 1"):
        run(data, tmp_path, network=network, networks=2)


def test_a_finished_network_is_not_trained_again_for_a_model_of_more(data, tmp_path):
    _, weights = run(data, tmp_path)
    messages = []
    _, again = run(data, tmp_path, messages, networks=3)
    assert messages == ["resumed at step 12"]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_the_moving_average_is_what_is_written(data, tmp_path):
    """Of three steps: w_3 = d (d w_1 + (1 - d) w_2) + (1 - d) w_3, the weights after each being those of shorter runs."""
    d, options = 0.7, {"schedule": "constant", "validate_every": 100}
    _, averaged = run(data, tmp_path / "average", steps=3, average=d, **options)
    plain = [run(data, tmp_path / f"{n}", steps=n, **options)[1] for n in (1, 2, 3)]
    for name, found in averaged.items():
        first, second, third = (weights[name] for weights in plain)
        torch.testing.assert_close(found, d * (d * first + (1 - d) * second) + (1 - d) * third)


def test_one_structure_is_learnt_by_heart(data, tmp_path):
    """What a network must be able to, before anything is said of structures it has not seen."""
    reference, graphs, _ = data
    rows, _ = run((reference, graphs[:1], graphs[:1]), tmp_path, steps=300, validate_every=100, learning_rate=1e-2)
    assert float(rows[-1]["validation_mae_mev"]) < 0.2 * float(rows[-1]["baseline_mae_mev"])


def test_the_written_model_is_the_best_one_seen_and_gives_its_error(data, tmp_path):
    rows, _ = run(data, tmp_path, steps=20, learning_rate=3e-2, schedule="constant")
    (model,), reference = load_model(tmp_path / "model")
    errors = []
    for path in data[2]:
        structure = example(read_graph(path), reference, model.lmax, torch.float32)
        with torch.no_grad():
            errors += [torch.cat(differences_mev(model(structure.inputs), structure)).abs()]
    best = min(float(row["validation_mae_mev"]) for row in rows)
    assert torch.cat(errors).mean().item() == pytest.approx(best, rel=1e-5)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["training"]["validation_mae_mev"] == pytest.approx(
        [best]
    )


def test_other_settings_start_anew_and_keep_the_old_checkpoint(data, tmp_path):
    run(data, tmp_path)
    messages = []
    run(data, tmp_path, messages, learning_rate=1e-3)
    assert "starting anew" in messages[0]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_a_finished_training_is_not_repeated(data, tmp_path):
    _, first = run(data, tmp_path)
    messages = []
    _, second = run(data, tmp_path, messages)
    assert messages == ["resumed at step 12"]
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_divergence_ends_the_run_with_its_step_and_structure(data, tmp_path):
    with pytest.raises(ValueError, match=r"step \d+: the loss of .*\.h5 is (nan|inf)"):
        run(data, tmp_path, learning_rate=1e25, warmup=0, gradient_clip=1e30, schedule="constant", steps=50)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "reference.h5", "config.json"])
def test_a_model_cut_short_is_refused(data, tmp_path, name):
    run(data, tmp_path, steps=4)
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path / "model")


def test_a_checkpoint_cut_short_is_refused(data, tmp_path):
    run(data, tmp_path, steps=4)
    path = tmp_path / "checkpoint" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a checkpoint"):
        run(data, tmp_path, steps=4)


def test_loss_is_l1_plus_l2():
    d = torch.tensor([1.0, -3.0, 2.0])
    assert l1_l2(d, 10.0).item() == pytest.approx(2.0 + np.mean([1, 9, 4]) / 10)
    assert l1_l2(d[:0], 10.0).item() == 0


def test_the_loss_of_eigenvalues_lowers_their_first_order_error(data, tmp_path, szv):
    """Of the structure trained on, with it and without; and without the operators it needs there is an error."""
    reference, graphs, _ = data
    operators = model_hamiltonian(hafnia(0), szv)
    write_operators(tmp_path / "operators.h5", operators)
    found = {}
    for weight in (0.0, 1.0):
        settings = {"steps": 80, "validate_every": 80, "learning_rate": 1e-2, "eigenvalue_weight": weight, "directions": 6}
        model, out = Model.model_validate({"network": NETWORK, "training": settings}), tmp_path / f"{weight}"
        train(model, TrainingFiles(reference, graphs[:1], graphs[:1], [tmp_path / "operators.h5"]), out, out / "checkpoint")
        (network,), of_model = load_model(out)
        part = rank_example(
            read_graph(graphs[0]), of_model, network.lmax, torch.float32, 768, World(), 1, operators=operators, directions=6
        )
        with torch.no_grad():
            errors = differences_mev(network(part.inputs), part)
        found[weight] = eigenvalue_error(sum(a @ d for a, d in zip(part.directions, errors)), World()).item()
    assert found[1.0] < 0.5 * found[0.0]
    with pytest.raises(ValueError, match="needs the operators of every training structure: found 0, expected 1"):
        train(model, TrainingFiles(reference, graphs[:1], graphs[:1]), out, out / "checkpoint")


def test_every_parameter_learns(data):
    """No dead weights: after two structures every parameter has a gradient somewhere."""
    from hamscale.graph.reference import read_reference
    from hamscale.inputs.tensors import build_network

    reference = read_reference(data[0])
    torch.manual_seed(0)
    model = build_network(Model.model_validate({"network": NETWORK | {"layers": 2}}).network, reference)
    random = np.random.default_rng(0)
    for path in data[1][:2]:
        graph = read_graph(path)
        for blocks in graph.crystal_field.values():  # of the model Hamiltonian it has L = 0 alone
            blocks += 1e-3 * random.normal(size=blocks.shape)
        structure = example(graph, reference, model.lmax, torch.float32)
        sum(d.square().sum() for d in differences_mev(model(structure.inputs), structure)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_tensorboard_is_written_where_asked(data, tmp_path):
    run(data, tmp_path, steps=4, tensorboard=True)
    assert list((tmp_path / "model" / "tensorboard").glob("events.*"))


def test_a_training_begins_with_the_weights_of_a_model(data, tmp_path):
    """Network by network, as its first validation says; a resumed one goes on from its own checkpoint."""
    rows, weights = run(data, tmp_path / "first")
    slow = {"learning_rate": 1e-9, "validate_every": 1, "steps": 1}
    again, same = run(data, tmp_path / "again", start_from=str(tmp_path / "first" / "model"), **slow)
    best = min(float(row["validation_mae_mev"]) for row in rows)
    assert float(again[0]["validation_mae_mev"]) == pytest.approx(best, rel=1e-4)
    assert float(run(data, tmp_path / "anew", **slow)[0][0]["validation_mae_mev"]) > 1.001 * best
    for name, values in weights.items():
        torch.testing.assert_close(same[name], values, atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "again" / "model" / "config.json").read_text())["training"]
    assert len(record["started_from"]) == 32
    messages: list[str] = []
    run(data, tmp_path / "again", messages, start_from=str(tmp_path / "first" / "model"), **slow)
    assert any("resumed at step 1" in message for message in messages)


def test_a_network_after_the_last_of_a_model_begins_with_the_first_again(data, tmp_path):
    for network in (0, 1):
        run(data, tmp_path / str(network), network=network, networks=2)
    join([tmp_path / "0" / "model", tmp_path / "1" / "model"], tmp_path / "both")
    slow = {"learning_rate": 1e-9, "validate_every": 1, "steps": 1, "networks": 4, "start_from": str(tmp_path / "both")}
    for network, origin in ((1, 1), (2, 0)):
        _, found = run(data, tmp_path / f"n{network}", network=network, **slow)
        for name, values in load_file(tmp_path / str(origin) / "model" / "weights.safetensors").items():
            torch.testing.assert_close(found[name], values, atol=1e-6, rtol=0)


def test_weights_of_another_size_are_refused(data, tmp_path):
    run(data, tmp_path / "first", steps=1)
    model = Model.model_validate({"network": NETWORK | {"channels": 12}, "training": {"steps": 1}})
    with pytest.raises(ValueError, match=r"cannot begin with its weights: .* has the shape .*same elements"):
        train(model, TrainingFiles(*data), tmp_path / "m", tmp_path / "c", start_from=tmp_path / "first" / "model")
