"""`hamscale verify`: files and folders that are whole, mean something, and belong together."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hamscale.config import Network
from hamscale.container import create_h5, identity
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import write_graph
from hamscale.graph.neighbours import Neighbourhood
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import load_model, save_model, with_prefix
from hamscale.inputs.tensors import build_network
from hamscale.layout import Array, Layout
from hamscale.operators import write_operators
from hamscale.partition import partition
from hamscale.partition.halo import write_partition
from hamscale.predict import predict
from hamscale.verify import artefacts, mixed, verify
from helpers import SZV, basis_of, forged, model_hamiltonian, silicon


@pytest.fixture(scope="module")
def basis():
    return basis_of(Si=SZV)


@pytest.fixture(scope="module")
def results(basis, tmp_path_factory):
    """Operators, reference, graph, partition, a model and a prediction that were made of one another."""
    folder = tmp_path_factory.mktemp("results")
    operators = model_hamiltonian(silicon(), basis)
    write_operators(folder / "operators" / "a.h5", operators)
    reference = fit_reference([operators], 5.0)
    made_of = {"operators": [identity(folder / "operators" / "a.h5")]}
    write_reference(folder / "reference.h5", reference, made_of)
    graph = BlockCodec(reference).encode(operators)
    write_graph(folder / "graphs" / "a.h5", graph, made_of | {"reference": [identity(folder / "reference.h5")]})
    write_partition(folder / "p.h5", partition(graph.atoms, Neighbourhood(graph.atoms, 5.0), 5.0, 2), graph.atoms)
    sizes = Network(lmax=2, channels=4, layers=1, hidden=4, heads=1, values=4, attention=4, feed_forward=8)
    torch.manual_seed(0)
    for name in ("m", "other"):
        network = build_network(sizes, reference)
        save_model(folder / "models" / name, [network.state_dict()], sizes.model_dump(), folder / "reference.h5", {})
    predict(folder / "models" / "m", graph.atoms).write(folder / "predicted" / "a.h5")
    return folder


def copied(results, tmp_path):
    return shutil.copytree(results, tmp_path / "results")


def of_command(*arguments):
    done = subprocess.run([sys.executable, "-m", "hamscale", "verify", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_a_folder_that_is_whole(results):
    found = [verify(path) for path in artefacts(results)]
    assert sorted(one.kind for one in found) == ["graph", "model", "model", "operators", "operators", "partition", "reference"]
    assert not list(mixed(found))


@pytest.mark.parametrize("options", [[], ["--sandbox"]])
def test_the_verb_says_what_is_whole_and_what_is_not(results, tmp_path, options):
    folder = copied(results, tmp_path)
    code, lines, errors = of_command(*options, folder)
    assert (code, len(lines), errors) == (0, 7, [])
    data = bytearray((folder / "graphs" / "a.h5").read_bytes())
    data[3000] ^= 1
    (folder / "graphs" / "a.h5").write_bytes(data)
    code, lines, errors = of_command(*options, folder)
    assert code == 1
    assert len(errors) == 1
    assert errors[0].startswith(f"hamscale: error: {folder}/graphs/a.h5: damaged: bytes 512 to ")


def larger_diagonal(file):
    (block,) = np.flatnonzero((file["pairs"][:] == 0).all(1))
    file["overlap"][file["offsets"][block]] = 1.1


def more_targets(file):
    targets = file["offsite/14-14"][:]
    del file["offsite/14-14"]
    file["offsite/14-14"] = np.concatenate([targets, targets[:2]])


FORGED = {
    "H not Hermitian": (
        "operators/a.h5",
        lambda f: f["hamiltonian"].__setitem__(1, 0.5),
        "hamiltonian differs from its adjoint",
    ),
    "S off its diagonal": ("operators/a.h5", larger_diagonal, "the diagonal of S differs from one"),
    "NaN": ("operators/a.h5", lambda f: f["overlap"].__setitem__(0, np.nan), "overlap holds NaN"),
    "an element": ("operators/a.h5", lambda f: f["structure/numbers"].__setitem__(0, 300), "no atomic numbers"),
    "another element": ("operators/a.h5", lambda f: f["structure/numbers"].__setitem__(0, 6), "basis"),
    "atoms beyond": ("operators/a.h5", lambda f: f["pairs"].__setitem__((0, 1), 99), "beyond the 2 of the structure"),
    "a scale": ("reference.h5", lambda f: f["onsite/14/scale"].__setitem__(0, 0.0), "a scale is not above zero"),
    "NaN in a table": ("reference.h5", lambda f: f["offsite/14-14/two_centre"].__setitem__((0, 0), np.nan), "holds NaN"),
    "a target": ("graphs/a.h5", lambda f: f["onsite/14"].__setitem__((0, 0), np.inf), "holds NaN or infinity"),
    "targets": ("graphs/a.h5", more_targets, "has 58 targets, expected 56"),
    "an edge": ("graphs/a.h5", lambda f: f["edges"].__setitem__((0, 2), 40), "A long|transposed"),
    "degrees": ("graphs/a.h5", lambda f: f["degrees"].__setitem__((0, 0), 1), "/degrees are not those"),
    "an owner": ("p.h5", lambda f: f["owner"].__setitem__(0, 7), "its owners are not those of 2 parts"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_means_nothing_is_refused_though_its_digests_are_right(results, tmp_path, name):
    file, change, message = FORGED[name]
    shutil.copy(results / file, tmp_path / "a.h5")
    with forged(tmp_path / "a.h5") as opened:
        change(opened)
    with pytest.raises(ValueError, match=message) as error:
        verify(tmp_path / "a.h5")
    assert str(tmp_path / "a.h5") in str(error.value)


def test_files_that_were_made_of_others_are_named(results, tmp_path, basis):
    folder = copied(results, tmp_path)
    write_operators(folder / "operators" / "a.h5", model_hamiltonian(silicon(seed=1), basis))
    lines = list(mixed([verify(path) for path in artefacts(folder)]))
    assert len(lines) == 2
    assert lines[0] == f"{folder}/graphs/a.h5: was made of another operators than those that lie here. Make it again."
    assert lines[1].startswith(f"{folder}/reference.h5: was made of another operators")
    shutil.rmtree(folder / "models" / "m")
    assert any("predicted/a.h5: was made of another model" in line for line in mixed([verify(p) for p in artefacts(folder)]))


def test_operators_of_another_structure_are_named(results, tmp_path):
    folder = copied(results, tmp_path)
    (folder / "structures").mkdir()
    (folder / "structures" / "a.extxyz").write_text("one")
    with forged(folder / "operators" / "a.h5") as file:
        file.attrs["made_of"] = json.dumps({"structure": [identity(folder / "structures" / "a.extxyz")]})
    assert not list(mixed([verify(folder / "operators" / "a.h5")]))
    (folder / "structures" / "a.extxyz").write_text("another")
    (line,) = mixed([verify(folder / "operators" / "a.h5")])
    assert line.startswith(f"{folder}/operators/a.h5: was made of another structure than {folder}/structures/a.extxyz")


@pytest.mark.parametrize("name", ["weights.safetensors", "reference.h5", "config.json"])
def test_a_folder_with_files_of_two_models_is_refused(results, tmp_path, name, basis):
    folder = copied(results, tmp_path) / "models" / "m"
    if name == "reference.h5":
        write_reference(folder / name, fit_reference([model_hamiltonian(silicon(seed=1), basis)], 5.0))
    else:
        shutil.copy(results / "models" / "other" / name, folder / name)
    with pytest.raises(ValueError, match="damaged or of another model"):
        load_model(folder)


def test_a_number_changed_in_config_json_is_found(results, tmp_path):
    folder = copied(results, tmp_path) / "models" / "m"
    text = (folder / "config.json").read_text()
    for before, after in (('"layers": 1', '"layers": 2'), ('"digest"', '"dagest"'), ("model/5", "model/4"), ("{", "[" * 9999)):
        (folder / "config.json").write_text(text.replace(before, after, 1))
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_model(folder)


def test_weights_that_are_no_numbers_are_refused(results, tmp_path):
    folder = copied(results, tmp_path) / "models" / "m"
    weights = load_file(folder / "weights.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "w")
    sizes = Network(lmax=2, channels=4, layers=1, hidden=4, heads=1, values=4, attention=4, feed_forward=8)
    save_model(tmp_path / "new", [with_prefix(weights, "0.")], sizes.model_dump(), folder / "reference.h5", {})
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        load_model(tmp_path / "new")


def test_a_schema_that_nobody_knows_is_named(tmp_path):
    with create_h5(tmp_path / "a.h5", Layout("graph/9", {"numbers": Array("i8", ("*",))})) as file:
        file["numbers"] = [1, 2]
    with pytest.raises(ValueError, match="schema is 'graph/9', expected one of operators/2"):
        verify(tmp_path / "a.h5")
