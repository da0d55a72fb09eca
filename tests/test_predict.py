import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms

from hamscale.analysis.spectra import find_levels
from hamscale.angular import edge_rotations
from hamscale.cli import main
from hamscale.config import Analysis, Network
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import structure_graph
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import load_model, save_model
from hamscale.inputs.tensors import build_network
from hamscale.operators import read_operators
from hamscale.predict import predict
from hamscale.structures import wrap_as_cp2k, write_structure_file
from hamscale.units import hartree_to_mev
from helpers import hafnia, model_hamiltonian


@pytest.fixture(scope="module")
def model(tmp_path_factory, szv):
    """A model folder with random weights."""
    root = tmp_path_factory.mktemp("model")
    reference = fit_reference([model_hamiltonian(hafnia(seed), szv) for seed in range(2)], 5.0)
    write_reference(root / "fitted.h5", reference)
    torch.manual_seed(0)
    settings = Network(layers=2, channels=8, hidden=8, values=8)
    network = build_network(settings, reference)
    save_model(root / "m", [network.state_dict()], settings.model_dump(), root / "fitted.h5", {})
    return root / "m"


def test_several_networks_predict_their_mean(model, tmp_path):
    _, reference = load_model(model)
    settings = Network(layers=2, channels=8, hidden=8, values=8).model_dump()
    torch.manual_seed(3)
    weights = [build_network(Network(**settings), reference).state_dict() for _ in range(3)]
    for name, networks in [("all", weights), *((f"{k}", [w]) for k, w in enumerate(weights))]:
        save_model(tmp_path / name, networks, settings, model / "reference.h5", {})
    of = lambda name: predict(tmp_path / name, hafnia(5), dtype=torch.float64)  # noqa: E731
    apart, together = [of(name) for name in "012"], of("all")
    matrices = [p.operators().hamiltonian for p in apart]
    np.testing.assert_allclose(together.operators().hamiltonian, np.mean(matrices, axis=0), atol=1e-13)
    assert np.abs(matrices[0] - matrices[1]).max() > 1e-6
    # blocks less the reference: their variance over networks is that of the blocks
    variances = [np.var([p.blocks.onsite[z] for p in apart], axis=0, ddof=1).ravel() for z in apart[0].blocks.onsite]
    expected = hartree_to_mev(np.concatenate(variances).mean() ** 0.5)
    assert together.attributes["onsite_spread_mev"] == pytest.approx(expected, rel=1e-9)
    assert "onsite_spread_mev" not in apart[0].attributes


def test_targets_put_back_give_the_dft_hamiltonian(szv):
    """Gauge, reference, frames and coupling undone: what was taken apart is put together again."""
    operators = model_hamiltonian(hafnia(), szv)
    reference = fit_reference([operators, model_hamiltonian(hafnia(1), szv)], 6.0)
    graph = BlockCodec(reference).encode(operators)
    back = BlockCodec(reference).decode(graph, graph.offsite, graph.onsite).operators()
    gauge = graph.attributes["gauge_hartree"]
    rows = {tuple(p): b for b, p in enumerate(operators.pairs.tolist())}
    distances = back.pairs.distances
    for b in np.flatnonzero(distances < 6.0):
        a = rows[tuple(back.pairs[b].tolist())]
        expected = operators.block(operators.hamiltonian, a) - gauge * operators.block(operators.overlap, a)
        np.testing.assert_allclose(back.block(back.hamiltonian, b), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_tiled_structure_has_the_unit_cells_hamiltonian_tiled(model, dtype, tolerance):
    unit = hafnia(5)
    tiled = unit.repeat((2, 2, 2))
    small, large = (predict(model, atoms, dtype=dtype).operators() for atoms in (unit, tiled))
    # atom a of the large cell is atom a % n of the small one, in the cell its position says
    wrapped, n = wrap_as_cp2k(tiled), len(unit)
    of_unit = np.arange(len(tiled)) % n
    offset = unit.cell.scaled_positions(wrapped.positions - small.atoms.positions[of_unit])
    np.testing.assert_allclose(offset, np.round(offset), atol=1e-9)
    offset = np.round(offset).astype(int)
    i, j, R = large.pairs[:, 0], large.pairs[:, 1], large.pairs[:, 2:]
    pairs = np.column_stack([of_unit[i], of_unit[j], 2 * R + offset[j] - offset[i]])
    rows = {tuple(p): b for b, p in enumerate(small.pairs.tolist())}
    assert len(large.pairs) == 8 * len(small.pairs)
    worst = 0.0
    for b, pair in enumerate(pairs.tolist()):
        a = rows[tuple(pair)]
        worst = max(worst, np.abs(large.block(large.hamiltonian, b) - small.block(small.hamiltonian, a)).max())
        assert np.abs(large.block(large.overlap, b) - small.block(small.overlap, a)).max() < 1e-10
    assert worst < tolerance * np.abs(small.hamiltonian).max()


def test_bands_of_the_tiled_cell_are_the_folded_ones(model):
    from scipy.linalg import eigh

    unit = hafnia(5)
    small, large = (predict(model, atoms, dtype=torch.float64).operators() for atoms in (unit, unit.repeat((2, 1, 1))))
    folded = np.concatenate([eigh(*small.at_k((k, 0, 0)), eigvals_only=True) for k in (0.0, 0.5)])
    np.testing.assert_allclose(eigh(*large.at_k((0, 0, 0)), eigvals_only=True), np.sort(folded), atol=1e-9)


def test_prediction_is_hermitian_with_the_exact_overlap(model, szv):
    operators = predict(model, hafnia(6)).operators()
    assert operators.hermiticity_error() == {"hamiltonian": 0.0, "overlap": 0.0}
    exact = model_hamiltonian(wrap_as_cp2k(hafnia(6)), szv)
    np.testing.assert_allclose(operators.at_k((0.1, 0.2, 0.3))[1], exact.at_k((0.1, 0.2, 0.3))[1], atol=1e-10)


def test_a_file_written_in_pieces_holds_what_memory_holds(model, tmp_path, monkeypatch):
    prediction = predict(model, hafnia(6))
    expected = prediction.operators()
    monkeypatch.setattr("hamscale.graph.codec.VALUES_AT_ONCE", len(expected.hamiltonian) // 7)
    pieces = [span for span, *_ in prediction.blocks.pieces()]
    assert len(pieces) > 5
    assert [p.stop for p in pieces[:-1]] == [p.start for p in pieces[1:]]
    prediction.write(tmp_path / "a.h5")
    written = read_operators(tmp_path / "a.h5")
    assert written.hermiticity_error() == {"hamiltonian": 0.0, "overlap": 0.0}
    for name in ("pairs", "offsets"):
        assert np.array_equal(getattr(written, name), getattr(expected, name))
    for name in ("hamiltonian", "overlap"):  # the shapes of matrix products differ
        np.testing.assert_allclose(getattr(written, name), getattr(expected, name), rtol=0, atol=1e-14)


def test_reference_only_is_two_centre_and_what_the_crystal_field_does_to_bonds(model):
    """Less 1/2 (D_i S_ii^-1 S_ij + S_ij S_jj^-1 D_j) every offsite block has M = 0 alone in its edge's frame."""
    assert predict(model, hafnia(6), reference_only=True).operators().attributes["source"] == "reference"
    from hamscale.graph.reference import coupled_groups, read_reference

    reference = read_reference(model / "reference.h5")
    coupling, field, rng = reference.coupling, reference.crystal_field, np.random.default_rng(0)
    tables = {z: [rng.normal(0, 0.01, t.shape) for t in of_z] for z, of_z in field.tables.items()}
    field = replace(field, tables=tables)
    reference = replace(reference, crystal_field=field)
    operators = BlockCodec(reference).decode(structure_graph(wrap_as_cp2k(hafnia(6)), reference.basis, 5.0), {}, {}).operators()
    rest = operators.hamiltonian.copy()
    diagonal = {
        pair[0]: block for block, pair in enumerate(operators.pairs.tolist()) if pair[0] == pair[1] and not any(pair[2:])
    }
    blocks = lambda k: (operators.block(operators.hamiltonian, k), operators.block(operators.overlap, k))  # noqa: E731
    D = {}
    for atom, k in diagonal.items():
        z = int(operators.atoms.numbers[atom])
        pair = coupling[z, z]
        mean = np.zeros(pair.size)
        mean[pair.zero_order] = field.centre[z]
        H, S = blocks(k)
        D[atom] = (H - (pair.transform @ mean).reshape(H.shape)) @ np.linalg.inv(S)
    for k, (i, j, *_) in enumerate(operators.pairs):
        S = blocks(k)[1]
        rest[operators.offsets[k] : operators.offsets[k + 1]] -= (0.5 * (D[i] @ S + S @ D[j].T)).ravel()
    turned = 0.0
    for part in (operators, replace(operators, hamiltonian=rest)):
        for z_i, z_j, _, onsite, coupled, vectors in coupled_groups(part, coupling, 0.0):
            if not onsite:
                pair = coupling[z_i, z_j]
                framed = pair.rotate(coupled, edge_rotations(vectors, max(pair.slots)))
                off_axis = np.abs(framed[:, pair.order != 0]).max()
                if part is operators:
                    turned = max(turned, off_axis)
                else:
                    assert off_axis < 1e-12
    assert turned > 1e-6


def test_the_network_adds_to_the_reference_within_its_cutoff_only(model):
    whole, alone = (predict(model, hafnia(6), reference_only=alone).operators() for alone in (False, True))
    far = np.repeat(whole.pairs.distances >= 5.0, np.diff(whole.offsets))
    assert np.abs((whole.hamiltonian - alone.hamiltonian)[far]).max() == 0
    assert np.abs((whole.hamiltonian - alone.hamiltonian)[~far]).max() > 1e-5


def test_elements_and_boundaries_not_trained_on_are_refused(model):
    with pytest.raises(ValueError, match="holds Si, but the model was trained on O, Hf only"):
        predict(model, Atoms("SiO2", [(0, 0, 0), (0, 0, 1.6), (0, 1.6, 0)], cell=[5] * 3, pbc=True))
    with pytest.raises(ValueError, match="not periodic, the model was trained on structures that are"):
        predict(model, Atoms("HfO", [(0, 0, 0), (0, 0, 1.9)], cell=[9] * 3))
    with pytest.raises(ValueError, match="config.json: no such file"):
        predict(model.parent / "nowhere", hafnia())


def test_a_structure_twice_as_long_as_the_training_cells_is_warned_of(model):
    """The training cells are 3.6 A long; both lengths are named."""
    with pytest.warns(UserWarning, match=r"the structure is 10.8 A long, the longest training cell 3.6 A"):
        long = predict(model, hafnia(5).repeat((1, 1, 3)), reference_only=True)
    assert long.attributes["longest_training_cell_angstrom"] == pytest.approx(3.592, abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, hafnia(5).repeat((1, 1, 2)), reference_only=True)


def test_band_edges_are_found_with_a_prediction(model, tmp_path):
    """On the k-grid of the analysis; a large structure has places for them, which `hamscale dos` fills."""
    prediction, analysis = predict(model, hafnia(6)), Analysis(kgrid=(3, 2, 1))
    prediction.write(tmp_path / "a.h5", analysis=analysis)
    written = read_operators(tmp_path / "a.h5")
    expected = find_levels(written, analysis).attributes()
    assert {name: written.attributes[name] for name in expected}["metal"] == expected["metal"] >= 0
    assert written.attributes["fermi_level_hartree"] == expected["fermi_level_hartree"]
    assert written.attributes["levels_kgrid"].tolist() == [3, 2, 1]


def test_band_edges_of_a_large_structure_are_left_to_clusters(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hamscale.predict.prediction.LARGEST_DENSE", 10)
    predict(model, hafnia(6)).write(tmp_path / "a.h5")
    assert read_operators(tmp_path / "a.h5").attributes["metal"] == -1
    assert np.isnan(read_operators(tmp_path / "a.h5").attributes["mid_gap_hartree"])
    arguments = ["dos", str(tmp_path / "a.h5"), "--clusters", "3", "--radius", "4", "--core", "2"]
    assert main([*arguments, "--out", str(tmp_path / "dos.csv")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stored"]
    attributes = read_operators(tmp_path / "a.h5").attributes
    assert attributes["levels_clusters"] == 3
    assert np.isfinite(attributes["fermi_level_hartree"])
    assert attributes["fermi_level_standard_error_hartree"] > 0


@pytest.mark.parametrize("verb", ["predict", "partition"])
def test_without_git_on_the_path_nothing_is_lost(model, tmp_path, verb):
    write_structure_file(tmp_path / "s.extxyz", hafnia(6))
    arguments = {
        "predict": [model, tmp_path / "s.extxyz"],
        "partition": [tmp_path / "s.extxyz", "--cutoff", "5", "--parts", "2"],
    }[verb]
    command = [sys.executable, "-m", "hamscale", verb, *arguments, "--out", tmp_path / "out.h5"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["git_commit"] == ""
        assert file.attrs["hamscale_version"]


def test_graph_of_an_unknown_element(szv):
    with pytest.raises(ValueError, match="no basis for element Si"):
        structure_graph(Atoms("Si2", [(0, 0, 0), (0, 0, 2)], cell=[5] * 3, pbc=True), szv, 4.0)
