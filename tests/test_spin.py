"""Structures of two spins from end to end: targets, predictions, tables and exports, and a magnetic molecule that is learnt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sisl
import torch
import yaml
from ase import Atoms
from scipy.spatial.transform import Rotation

from hamscale.analysis.errors import align_gauge, block_errors, error_summary, values_on
from hamscale.analysis.levels import levels_on_grid
from hamscale.analysis.regions import dos_table
from hamscale.analysis.tables import analysis_tables
from hamscale.angular import rotation_matrix
from hamscale.basis import material_basis
from hamscale.cli import main
from hamscale.config import Analysis, Network
from hamscale.dft.csr import read_blocks
from hamscale.dft.outputs import eigenvalue_check, read_run
from hamscale.export import export
from hamscale.graph.codec import BlockCodec
from hamscale.graph.graph import write_graph
from hamscale.graph.lifting import find_floor, lift
from hamscale.graph.reference import fit_reference, read_reference, write_reference
from hamscale.graph.states import directions
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.tensors import build_network
from hamscale.operators import SHARD, SPINS, join_shards, read_operators, shard_path, write_pieces
from hamscale.page import index_page
from hamscale.predict import predict
from hamscale.workers import eigh
from helpers import (
    DZVP,
    KPOINTS,
    SZV,
    bands_hartree,
    basis_of,
    calculate,
    hafnia,
    magnetic,
    material,
    model_hamiltonian,
    rotated,
    silicon,
    written,
)

ROOT = Path(__file__).parents[1]
CUTOFF = 5.0


@pytest.fixture(scope="module")
def crystal(szv):
    """Operators of two spins."""
    return magnetic(model_hamiltonian(hafnia(), szv))


@pytest.fixture(scope="module")
def reference(szv, crystal):
    return fit_reference([crystal, magnetic(model_hamiltonian(hafnia(1), szv))], CUTOFF)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    """A model with random weights, large enough that they matter."""
    root = tmp_path_factory.mktemp("model")
    write_reference(root / "fitted.h5", reference)
    torch.manual_seed(0)
    settings = Network(layers=2, channels=8, hidden=8, values=8, feed_forward=8)
    network = build_network(settings, reference)
    save_model(root / "m", [network.state_dict()], settings.model_dump(), root / "fitted.h5", {})
    return root / "m"


def test_targets_and_back_are_the_matrices_of_both_spins(crystal, reference):
    codec = BlockCodec(reference)
    graph = codec.encode(crystal)
    back = codec.decode(graph, graph.offsite, graph.onsite).operators()
    gauge, rows = graph.attributes["gauge_hartree"], crystal.pairs.find(back.pairs)
    near = np.flatnonzero((back.pairs.distances < CUTOFF) & (rows >= 0))
    expected = replace(crystal, hamiltonian=crystal.hamiltonian - gauge * crystal.overlap)
    for b in near:
        found = back.block(back.hamiltonian, b)
        np.testing.assert_allclose(found, expected.block(expected.hamiltonian, rows[b]), atol=1e-12)
    assert max(back.hermiticity_error().values()) < 1e-14
    with pytest.raises(ValueError, match="operators of 1 spins, the reference was fitted to 2"):
        codec.encode(crystal.channels[0])


def test_the_reference_is_what_was_written(crystal, reference, tmp_path):
    write_reference(tmp_path / "r.h5", reference)
    first, second = (BlockCodec(r).encode(crystal) for r in (reference, read_reference(tmp_path / "r.h5")))
    assert all(np.array_equal(first.offsite[key], second.offsite[key]) for key in first.offsite)


def test_runs_of_one_and_of_two_spins_do_not_mix(crystal):
    with pytest.raises(ValueError, match="have one H and two.*the same dft.spin"):
        fit_reference([crystal, crystal.channels[0]], CUTOFF)


def test_moments_of_both_directions_are_refused(crystal):
    """An antiferromagnet, or structures whose runs ended with opposite moments."""
    turned = replace(crystal, hamiltonian=crystal.hamiltonian[::-1])
    with pytest.raises(ValueError, match="atoms of O have exchange splittings from -.*point both ways.*magnetization"):
        fit_reference([crystal, turned], CUTOFF)


def test_both_matrices_turn_with_the_structure(model, reference):
    turn, atoms = Rotation.random(rng=np.random.default_rng(1)).as_matrix(), hafnia(7)
    straight, turned = (predict(model, a, dtype=torch.float64).operators() for a in (atoms, rotated(atoms, turn)))
    assert straight.spins == 2
    D = {}
    for z in (8, 72):
        element = reference.basis[z]
        D[z] = np.zeros((element.n_orbitals,) * 2)
        for l, where in zip(element.l, element.shell_slices):
            D[z][where, where] = rotation_matrix(l, turn)
    for b, (i, j, *_) in enumerate(straight.pairs):
        expected = D[atoms.numbers[i]] @ straight.block(straight.hamiltonian, b) @ D[atoms.numbers[j]].T
        np.testing.assert_allclose(turned.block(turned.hamiltonian, b), expected, atol=1e-9)
    alone = predict(model, atoms, reference_only=True).operators()
    assert (np.abs(straight.hamiltonian - alone.hamiltonian).max(1) > 1e-5).all()  # the network says something of both


def test_a_direction_gives_the_shift_of_eigenvalues_of_its_spin(crystal, reference):
    error = np.random.default_rng(0).normal(size=crystal.hamiltonian.shape) * np.repeat(
        crystal.pairs.distances < CUTOFF, np.diff(crystal.offsets)
    )
    wrong = replace(crystal, hamiltonian=crystal.hamiltonian + 1e-8 * (error + crystal.transposed(error)) / 2)
    graph, of_wrong = (BlockCodec(reference).encode(o) for o in (crystal, wrong))
    gauge, k, n = of_wrong.attributes["gauge_hartree"] - graph.attributes["gauge_hartree"], np.array(KPOINTS[2]), 5
    far = np.repeat(crystal.pairs.distances >= CUTOFF, np.diff(crystal.offsets))
    within = replace(crystal, overlap=np.where(far, 0, crystal.overlap)).at_k(k)[1]
    for spin in (0, 1):
        (before, v), after = eigh(*crystal.at_k(k, spin)), eigh(*wrong.at_k(k, spin), eigvals_only=True)
        signs = np.zeros(2 * (n + 1))
        signs[n + spin * (n + 1)] = 1
        parts = zip(
            directions(crystal, graph, k[None], signs[None]), (graph.offsite, graph.onsite), (of_wrong.offsite, of_wrong.onsite)
        )
        found = sum((d[key][0] * (b[key] - a[key])).sum() for d, a, b in parts for key in d)
        expected = after[n] - before[n] - gauge * (v[:, n].conj() @ within @ v[:, n]).real
        assert found == pytest.approx(expected, abs=2e-3 * 1e-8)


def test_each_spin_is_lifted_alone():
    """In a basis whose S nearly misses directions, where the lower of the spins has the floor."""
    atoms = Atoms("Ga2", [(0.1, 0, 0), (1.2, 1.9, 1.3)], cell=[5.5, 5.6, 5.7], pbc=True)
    operators = magnetic(model_hamiltonian(atoms, basis_of(Ga=DZVP)))
    floors = [find_floor(channel) for channel in operators.channels]
    assert floors[0] != floors[1]
    assert find_floor(operators) == min(floors)
    lifted, done = lift(operators, max(floors) + 0.3)
    alone = [lift(channel, max(floors) + 0.3) for channel in operators.channels]
    assert np.array_equal(lifted.hamiltonian, [of_spin.hamiltonian for of_spin, _ in alone])
    assert done.states == sum(of_spin.states for _, of_spin in alone) > 0


def test_errors_are_those_of_the_spins(crystal):
    noise = np.random.default_rng(0).normal(0, 1e-3, crystal.hamiltonian.shape) + 0.1 * crystal.overlap
    predicted = replace(crystal, hamiltonian=crystal.hamiltonian + noise)
    summary = error_summary(block_errors(crystal, predicted, np.inf))
    mu = align_gauge(crystal, predicted)
    assert mu == pytest.approx(-0.1, abs=1e-3)
    expected = np.abs(noise + mu * crystal.overlap).mean(1) * 27211.386
    np.testing.assert_allclose([summary[f"mae_mev_{spin}"] for spin in SPINS], expected, rtol=1e-6)
    assert summary["mae_mev"] == pytest.approx(expected.mean(), rel=1e-6)


def test_spins_fill_up_to_one_fermi_level():
    """Three electrons on levels of two spins, at two k-points of equal weight."""
    up, down = [[0.0, 0.2, 1.0], [0.1, 0.3, 1.1]], [[0.05, 0.6, 1.2], [0.1, 0.7, 1.3]]
    levels = levels_on_grid(np.array(up + down), np.full(4, 0.25), 3, 300.0, spins=2)
    assert (levels.metal, levels.filled) == (False, (2, 1))
    assert (levels.valence_band_maximum, levels.conduction_band_minimum) == (0.3, 0.6)
    down[0][1] = 0.25  # bands of the spins overlap
    levels = levels_on_grid(np.array(up + down), np.full(4, 0.25), 3, 300.0, spins=2)
    assert levels.metal
    assert 0.25 < levels.fermi_level < 0.3


def test_densities_of_clusters_add_up(crystal, tmp_path):
    """Two equal spins give what one H gives; two spins that differ have densities that differ, and sum to that of both."""
    same = magnetic(crystal.channels[0], 0.0)
    options = (4, 4.0, 2.0, 0.3, 8.0)
    one, _, levels, _ = dos_table(written(tmp_path, crystal.channels[0]), *options)
    two, _, of_two, _ = dos_table(written(tmp_path, same), *options)
    assert of_two == levels
    np.testing.assert_allclose(two["states_per_ev"], one["states_per_ev"], rtol=1e-9)
    table = dos_table(written(tmp_path, crystal), *options, exact=True)[0]
    np.testing.assert_allclose(table["states_up_per_ev"] + table["states_down_per_ev"], table["states_per_ev"], rtol=1e-9)
    assert np.abs(table["states_up_per_ev"] - table["states_down_per_ev"]).max() > 1


def test_shards_of_ranks_are_joined(crystal, tmp_path):
    for rank, atoms in enumerate(([0, 2], [1])):
        part = crystal.select(np.isin(crystal.pairs[:, 0], atoms))
        piece = (slice(0, len(part.overlap)), part.hamiltonian, part.overlap)
        shard, named = shard_path(tmp_path / "a.h5", "ab12", rank), {"prediction": "ab12"}
        write_pieces(shard, part.atoms, part.basis, part.pairs, [piece], named, layout=SHARD, spins=2)
    join_shards(tmp_path / "a.h5", "ab12", 2, {})
    assert np.array_equal(read_operators(tmp_path / "a.h5").hamiltonian, crystal.hamiltonian)


def test_formats_of_both_spins(crystal, tmp_path):
    path = written(tmp_path, crystal)
    for target, name in (("tbtrans", "h.nc"), ("tshs", "h.TSHS")):
        export(path, target, tmp_path / name)
        back = sisl.get_sile(tmp_path / name).read_hamiltonian()
        assert back.spin.is_polarized
        for spin, channel in enumerate(crystal.channels):
            bands = np.array([back.eigh(k, spin=spin) for k in KPOINTS])
            assert np.abs(bands - bands_hartree(channel) * 27.21138386).max() < 1e-7
    export(path, "cp2k", tmp_path / "csr")
    cells = sorted({tuple(R) for R in crystal.pairs[:, 2:].tolist()}, key=lambda R: (np.dot(R, R), R))
    labels = {"KS": "KS_SPIN_1", "KS_DOWN": "KS_SPIN_2", "S": "S_SPIN_1"}
    files = {
        name: [tmp_path / f"csr/csr-{label}_R_{n + 1}-1_0.csr" for n in range(len(cells))] for name, label in labels.items()
    }
    assert len(list((tmp_path / "csr").glob("*.csr"))) == 3 * len(cells)
    pairs, values = read_blocks(files, np.array(cells), crystal.orbitals)
    kept = crystal.select(np.isin(np.arange(len(crystal.pairs)), crystal.pairs.find(pairs)))
    assert np.array_equal(np.stack([values["KS"], values["KS_DOWN"]]), kept.hamiltonian)


@pytest.mark.parametrize("target", ["quatrex", "deeph", "deeptb", "matrixmarket"])
def test_formats_of_one_matrix_have_a_folder_of_each_spin(crystal, tmp_path, target):
    export(written(tmp_path, crystal), target, tmp_path / "both")
    for spin, channel in zip(SPINS, crystal.channels):
        export(written(tmp_path, channel), target, tmp_path / spin)
        names = sorted(path.name for path in (tmp_path / spin).iterdir())
        assert sorted(path.name for path in (tmp_path / "both" / spin).iterdir()) == names
        for name in names:
            if name not in ("energies.json", "info.json"):
                a, b = (folder / name for folder in (tmp_path / spin, tmp_path / "both" / spin))
                assert a.read_bytes() == b.read_bytes()


# ------------------------------------------------------------------------------------------------------------ with CP2K


def test_a_restricted_case_through_the_path_of_two_spins(cp2k, tmp_path):
    """CP2K runs silicon restricted and spin-polarised: H, the reference and what is decoded agree to 1e-12 Hartree."""
    found = []
    for name, options in (("restricted", {}), ("polarised", {"spin": {}})):
        settings = material({"Si": SZV}, cutoff_ry=100, rel_cutoff_ry=30, kpoints=(2, 1, 1), **options)
        atoms = silicon(1)
        calculate(atoms, settings, tmp_path / name)
        operators = read_run(tmp_path / name, atoms, material_basis(settings))
        assert eigenvalue_check(operators) < 1e-9
        codec = BlockCodec(fit_reference([operators], CUTOFF))
        graph = codec.encode(operators)
        decoded = [codec.decode(graph, *targets).operators() for targets in (({}, {}), (graph.offsite, graph.onsite))]
        for o in decoded:
            o.attributes |= {"cutoff_angstrom": CUTOFF, "wall_seconds": 0.0}
        tables = analysis_tables(operators, decoded[1], decoded[0], Analysis(), {"material": "si"})
        found.append((operators, *decoded, tables["summary"].iloc[0]))
    *restricted, row = found[0]
    *polarised, of_spins = found[1]
    for one, two in zip(restricted, polarised):
        assert np.abs(two.hamiltonian - one.hamiltonian).max() < 1e-12
        assert np.abs(two.overlap - one.overlap).max() == 0
    for name in ("mae_mev", "baseline_mae_mev", "eigenvalue_mae_mev_occupied", "eigenvalue_mae_mev_next", "gap_dft_ev"):
        assert of_spins[name] == pytest.approx(row[name], rel=1e-7)
    assert of_spins["moment_dft"] == 0


def test_both_spins_are_learnt(crystal, reference, tmp_path):
    graph, target = BlockCodec(reference).encode(crystal), tmp_path / "out"
    write_graph(tmp_path / "graph.h5", graph)
    write_reference(tmp_path / "reference.h5", reference)
    settings = {"network": {"channels": 8, "hidden": 8, "values": 8}, "training": {"steps": 60, "validate_every": 30}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    files = [str(tmp_path / name) for name in ("model.yaml", "reference.h5")]
    train = ["--train", str(tmp_path / "graph.h5"), "--out", str(target), "--checkpoint", str(tmp_path / "checkpoint")]
    assert main(["train", *files, *train]) == 0
    errors = pd.read_csv(target / "train.csv").iloc[-1]
    assert errors["validation_mae_mev"] < 0.75 * errors["baseline_mae_mev"]
    predicted, alone = (predict(target, crystal.atoms, reference_only=only).operators() for only in (False, True))
    of_model, of_reference = (error_summary(block_errors(crystal, o, CUTOFF)) for o in (predicted, alone))
    for spin in SPINS:
        assert of_model[f"mae_mev_{spin}"] < 0.75 * of_reference[f"mae_mev_{spin}"]
    splitting = [o.hamiltonian[0] - o.hamiltonian[1] for o in (predicted, alone)]
    expected = crystal.hamiltonian[0] - crystal.hamiltonian[1]
    errors = [np.abs(values_on(predicted, part, crystal) - expected).mean() for part in splitting]
    assert errors[0] < errors[1]


@pytest.fixture(scope="module")
def oxygen(cp2k, tmp_path_factory):
    """The folder of a toy training on the shipped material of the oxygen molecule, run through the commands to its page."""
    root = tmp_path_factory.mktemp("oxygen")
    content = yaml.safe_load((ROOT / "config/materials/o2.yaml").read_text())
    for name, count in (("train", 3), ("test", 1)):
        content["structures"][name] |= {"count": count, "rattle_angstrom": 0.02}
    (root / "o2.yaml").write_text(yaml.safe_dump(content))
    network = {"layers": 1, "channels": 8, "hidden": 8, "values": 8, "gaussians": 12}
    training = {"steps": 150, "validate_every": 50, "learning_rate": 5e-3, "eigenvalue_weight": 0.1, "directions": 4}
    (root / "toy.yaml").write_text(yaml.safe_dump({"network": network, "training": training}))

    def run(*arguments: object) -> None:
        assert main([str(a) for a in arguments]) == 0

    material, results = root / "o2.yaml", root / "results/o2"
    structures, runs, operators, graphs = (results / name for name in ("structures", "dft", "operators", "graphs"))
    ids = ["train-000", "train-001", "train-002", "test-000"]
    for i in ids:
        run("structure", material, "--id", i, "--out", structures / f"{i}.extxyz")
        run("input", material, structures / f"{i}.extxyz", "--out", results / f"inputs/{i}.inp")
        run("dft", results / f"inputs/{i}.inp", "--out", runs / i)
        run("operators", material, structures / f"{i}.extxyz", runs / i, "--out", operators / f"{i}.h5")
    trained = [operators / f"{i}.h5" for i in ids[:3]]
    run("reference", material, *trained, "--out", results / "reference.h5")
    run("graph", results / "reference.h5", *trained, "--out", graphs)
    sets = ["--train", *(graphs / f"{i}.h5" for i in ids[:3]), "--operators", *trained]
    model = results / "models/toy"
    run("train", root / "toy.yaml", results / "reference.h5", *sets, "--out", model, "--checkpoint", root / "checkpoint")
    structure, predicted, alone = structures / "test-000.extxyz", results / "predicted/toy", results / "reference/toy"
    run("predict", model, structure, "--out", predicted / "test-000.h5")
    run("predict", model, structure, "--reference-only", "--out", alone / "test-000.h5")
    files = [
        f"--{name}={folder / 'test-000.h5'}"
        for name, folder in (("dft", operators), ("predicted", predicted), ("baseline", alone))
    ]
    tables = results / "analysis/toy/test-000"
    run("analyse", material, *files, "--out", tables)
    run("view", predicted / "test-000.h5", "--parts", 2, "--out", tables)
    run("plot-structure", tables, model / "train.csv", "--out", results / "figures")
    run("summary", tables / "summary.csv", "--out", results / "summary.csv")
    run("evaluate", model, "--material", material, "--out", results / "evaluated.csv")
    return results


def test_a_magnetic_molecule_is_learnt(oxygen):
    """The triplet of the oxygen molecule, from its configuration to tables, figures and the page, by every command."""
    row = pd.read_csv(oxygen / "summary.csv").iloc[0]
    assert row["moment_dft"] == row["moment_predicted"] == 2
    # the reference is nearly exact, since a molecule of two atoms has one distance; before training the network is 20 meV off
    assert row["mae_mev"] < 20
    evaluated = pd.read_csv(oxygen / "evaluated.csv", comment="#").iloc[0]
    for name in ("mae_mev", "mae_mev_up", "mae_mev_down", "eigenvalue_mae_mev_occupied"):
        assert evaluated[name] == pytest.approx(row[name], rel=1e-4)  # tables have six digits
    predicted, dft = (read_operators(oxygen / f"{name}/test-000.h5") for name in ("predicted/toy", "operators"))
    assert predicted.spins == 2
    difference = [np.ptp(o.hamiltonian, axis=0).max() for o in (predicted, dft)]
    assert difference[0] == pytest.approx(difference[1], rel=0.1)  # the exchange splitting, 0.1 Hartree
    tables = oxygen / "analysis/toy/test-000"
    bands, dos, pairs = (pd.read_csv(tables / f"{name}.csv") for name in ("bands", "dos", "by_pair"))
    assert bands.groupby("spin").size().to_dict() == {"up": 8, "down": 8}
    np.testing.assert_allclose(dos["dft_up_states_per_ev"] + dos["dft_down_states_per_ev"], dos["dft_states_per_ev"])
    assert set(pairs["spin"]) == set(SPINS)
    below = dos[dos["energy_ev"] < 0.5]
    step = dos["energy_ev"].diff().iloc[1]
    assert [round(below[f"dft_{spin}_states_per_ev"].sum() * step) for spin in SPINS] == [7, 5]
    assert (oxygen / "figures/dos.png").is_file()
    assert '"moment_dft":2.0' in index_page(oxygen.parent)
