"""Potentials of charges: their kernel, the reference without them, and predictions whose charges are self-consistent."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms

from hamscale.analysis.density import mulliken_charges
from hamscale.analysis.spectra import analysis_grid
from hamscale.cli import main
from hamscale.config import Analysis, Network
from hamscale.container import create_h5
from hamscale.graph.charges import ChargeKernel
from hamscale.graph.codec import BlockCodec
from hamscale.graph.crystal_field import Ions
from hamscale.graph.graph import read_graph, write_graph
from hamscale.graph.lifting import find_floor
from hamscale.graph.polarization import AtomicCharges, potentials
from hamscale.graph.reference import REFERENCE, fit_reference, read_reference, write_reference
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.tensors import build_network, graph_inputs
from hamscale.operators import read_operators, write_basis, write_operators
from hamscale.predict import predict, prediction
from hamscale.predict.self_consistent import MOST_STEPS, TOLERANCE, Anderson, self_consistent
from hamscale.structures import write_structure_file
from helpers import DZVP, SZV, WATER, basis_of, hafnia, model_hamiltonian, rattled, rotated
from ranks import on_ranks

GRID = Analysis(kgrid=(2, 2, 2))
KERNEL_OF_GALLIUM = ChargeKernel({31: 0.4}, -0.9)
KERNEL = ChargeKernel({8: 0.5, 72: 0.4}, -0.9)
SETTINGS = Network(layers=2, channels=8, hidden=8, values=8)
IONS = Ions(3.0, {8: -2.0, 72: 4.0})


def charges(operators):
    kpoints, weights, _ = analysis_grid(operators, GRID)
    return mulliken_charges(operators, kpoints, weights, GRID.temperature_kelvin)


def ionic(seed, basis):
    """H with the potentials of its own charges: the fixed point of a model Hamiltonian and KERNEL, and its u."""
    bare = model_hamiltonian(hafnia(seed), basis)
    operators, done = self_consistent(bare, KERNEL, np.zeros(3), GRID)
    assert done.converged
    return replace(operators, mulliken_charges=done.charges), KERNEL.of(bare.atoms)(done.charges)


def charged(basis, bare_of=lambda operators: operators):
    """H with the potentials of given charges, which are not those of its states, in cells of three shapes."""
    made, rng = [], np.random.default_rng(0)
    for seed in range(9):
        atoms = hafnia(seed) if seed < 3 else rattled(hafnia(seed).repeat(((2, 1, 1), (1, 1, 3))[seed % 2]), seed)
        bare, q = (
            bare_of(model_hamiltonian(atoms, basis)),
            np.where(atoms.numbers == 72, 1.4, -0.7) + rng.normal(0, 0.1, len(atoms)),
        )
        q -= q.mean()
        made.append(replace(bare.with_potential(KERNEL.of(bare.atoms)(q)), mulliken_charges=q))
    return made


@pytest.fixture(scope="module")
def structures(szv):
    return charged(szv)


@pytest.fixture(scope="module")
def reference(structures):
    return fit_reference(structures, 5.0, ions=IONS, self_consistent=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory, reference):
    """A model with random weights, whose potentials in one pass are therefore wrong."""
    root = tmp_path_factory.mktemp("model")
    write_reference(root / "fitted.h5", reference)
    torch.manual_seed(0)
    network = build_network(SETTINGS, reference)
    save_model(root / "m", [network.state_dict()], SETTINGS.model_dump(), root / "fitted.h5", {})
    return root / "m"


def test_potentials_of_atomic_charges_are_those_of_elements_where_charges_are_theirs():
    atoms = hafnia(2)
    expected, *_ = potentials(atoms, [8, 72], np.array([[-2.0], [4.0]]))
    np.testing.assert_allclose(AtomicCharges(atoms)(np.where(atoms.numbers == 72, 4.0, -2.0)), expected[:, 0], atol=1e-12)


def test_potentials_of_atomic_charges_are_linear_and_those_of_a_supercell():
    atoms, q = hafnia(2), np.array([1.0, -0.3, 0.2])
    one = [AtomicCharges(atoms)(unit) for unit in np.eye(3)]
    np.testing.assert_allclose(AtomicCharges(atoms)(q), q @ one, atol=1e-12)
    np.testing.assert_allclose(np.array(one), np.transpose(one), atol=1e-10)  # felt alike both ways
    copies = AtomicCharges(atoms.repeat((2, 1, 2)))(np.tile(q, 4))
    np.testing.assert_allclose(copies, np.tile(q @ one, 4), atol=1e-9)


def test_a_potential_is_felt_by_halves_at_both_ends(si8):
    """Block by block; a common potential shifts all energies alike."""
    u = np.random.default_rng(0).normal(size=8)
    found = si8.with_potential(u)
    for b in np.random.default_rng(1).integers(0, len(si8.pairs), 50):
        i, j = si8.pairs[b, :2]
        expected = si8.block(si8.hamiltonian, b) + (u[i] + u[j]) / 2 * si8.block(si8.overlap, b)
        np.testing.assert_allclose(found.block(found.hamiltonian, b), expected, atol=1e-14)
    H, S = si8.with_potential(np.full(8, 0.3)).at_k([0.1, 0.2, 0.3])
    np.testing.assert_allclose(H, si8.at_k([0.1, 0.2, 0.3])[0] + 0.3 * S, atol=1e-12)


def test_mixing_finds_the_fixed_point_of_a_linear_map_that_diverges_by_itself():
    """In no more steps than there are dimensions, and two."""
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(4, 4)) - 2 * np.eye(4), rng.normal(size=4)
    assert np.abs(np.linalg.eigvals(A)).max() > 1
    x, mixer = np.zeros(4), Anderson()
    for _ in range(6):
        x = mixer(x, A @ x + b - x)
    np.testing.assert_allclose(A @ x + b, x, atol=1e-8)


def test_long_waves_of_charge_are_screened_most():
    """(1 + V) y = q, and what is left of a wave along a cell falls with the square of its length."""
    atoms = hafnia(2).repeat((1, 1, 8))
    felt = KERNEL.of(atoms)
    q = np.random.default_rng(0).normal(size=len(atoms))
    left = felt.screened(q)
    np.testing.assert_allclose(left + AtomicCharges(atoms)(left), q, atol=1e-2 * np.abs(q).max())
    shares = []
    for n in (1, 2):
        wave = np.sin(2 * np.pi * n * atoms.get_scaled_positions()[:, 2])
        shares.append(felt.screened(wave) @ wave / (wave @ wave))
    assert shares[0] < 0.2
    assert 2.5 < shares[1] / shares[0] < 5


def test_charges_that_come_out_are_those_that_went_in(szv):
    bare = model_hamiltonian(hafnia(0), szv)
    found, done = self_consistent(bare, KERNEL, np.zeros(3), GRID)
    assert done.converged
    assert done.residual < TOLERANCE
    assert 2 < done.steps < MOST_STEPS
    np.testing.assert_allclose(charges(found), done.charges, atol=10 * TOLERANCE)
    expected = bare.with_potential(KERNEL.of(bare.atoms)(done.charges))
    np.testing.assert_array_equal(found.hamiltonian, expected.hamiltonian)
    assert done.change == pytest.approx(np.abs(done.charges - charges(bare)).max())
    assert done.change > 10 * TOLERANCE


def test_wrong_potentials_of_one_pass_are_taken_out(szv):
    """Whatever they are, the end is the same, and that is what the loop is for."""
    right, u = ionic(1, szv)
    for seed in range(3):
        wrong = np.random.default_rng(seed).normal(0, 0.1, 3)
        found, done = self_consistent(right.with_potential(wrong), KERNEL, u + wrong, GRID)
        assert done.converged
        assert np.abs(found.hamiltonian - right.hamiltonian).max() < 20 * TOLERANCE
        assert np.abs(right.with_potential(wrong).hamiltonian - right.hamiltonian).max() > 0.05


def test_where_it_does_not_converge_one_pass_is_kept_and_said(szv):
    bare = model_hamiltonian(hafnia(0), szv)
    with pytest.warns(UserWarning, match=r"not self-consistent after 50 steps.*H is that of one pass"):
        found, done = self_consistent(bare, ChargeKernel({8: -40.0, 72: -40.0}, -0.9), np.zeros(3), GRID)
    np.testing.assert_array_equal(found.hamiltonian, bare.hamiltonian)
    assert (done.converged, done.steps, done.change) == (False, MOST_STEPS, 0.0)
    np.testing.assert_allclose(done.charges, charges(bare), atol=1e-12)
    assert done.attributes()["self_consistent"] == 0


def test_a_singular_overlap_leaves_one_pass_and_is_said(szv):
    bare = model_hamiltonian(hafnia(0), szv)
    wrong = replace(bare, overlap=-bare.overlap)
    with pytest.warns(UserWarning, match=r"not positive definite.*H is that of one pass"):
        found, done = self_consistent(wrong, KERNEL, np.zeros(3), GRID)
    np.testing.assert_array_equal(found.hamiltonian, wrong.hamiltonian)
    assert (done.converged, done.charges) == (False, None)


def test_the_kernel_of_data_is_found(szv):
    """Where nothing else differs between the atoms of an element, the fit finds all of it, whatever the gauges."""
    gauges = iter(np.linspace(-0.05, 0.05, 9))
    alike = charged(szv, lambda o: replace(o, hamiltonian=(0.5 + next(gauges)) * o.overlap))
    kernel = fit_reference(alike, 5.0, ions=IONS, self_consistent=True).crystal_field.potential.kernel
    assert kernel.coefficient == pytest.approx(KERNEL.coefficient, abs=0.02)
    assert kernel.hardness == pytest.approx(KERNEL.hardness, abs=0.02)


def test_the_floor_of_low_directions_is_that_of_h_with_its_potentials():
    """Predictions, which have them, are lifted to it."""
    atoms = Atoms("Ga2", [(0.1, 0, 0), (1.2, 1.9, 1.3)], cell=[4.5, 4.6, 4.7], pbc=True)
    bare = model_hamiltonian(atoms, basis_of(Ga=DZVP))
    q = np.array([0.02, -0.02])
    charged_too = replace(bare.with_potential(KERNEL_OF_GALLIUM.of(atoms)(q)), mulliken_charges=q)
    fitted = fit_reference([charged_too], 4.0, self_consistent=True)
    found = find_floor(charged_too, BlockCodec(fitted).encode(charged_too).attributes["gauge_hartree"])
    assert np.isfinite(found)
    assert fitted.floor_hartree == pytest.approx(found, abs=1e-9)


def test_targets_put_back_give_the_dft_hamiltonian(structures, reference):
    """Within the cutoff, less the gauge; the potentials that were taken out are in it again."""
    operators = structures[0]
    graph = BlockCodec(reference).encode(operators)
    decoded = BlockCodec(reference).decode(graph, graph.offsite, graph.onsite)
    u = reference.crystal_field.potential.kernel.of(operators.atoms)(operators.mulliken_charges)
    np.testing.assert_allclose(decoded.potential, u, atol=1e-12)
    back, gauge = decoded.operators(), graph.attributes["gauge_hartree"]
    rows = {tuple(pair): b for b, pair in enumerate(operators.pairs.tolist())}
    near = np.flatnonzero(back.pairs.distances < 5.0)
    assert len(near) > 100
    for b in near:
        a = rows[tuple(back.pairs[b].tolist())]
        expected = operators.block(operators.hamiltonian, a) - gauge * operators.block(operators.overlap, a)
        np.testing.assert_allclose(back.block(back.hamiltonian, b), expected, atol=1e-12)


def test_what_is_left_to_learn_does_not_depend_on_the_charges(structures, reference):
    """H with other potentials and the charges that make them has the same targets, except for u itself."""
    operators, kernel = structures[0], reference.crystal_field.potential.kernel
    q = operators.mulliken_charges + [0.1, -0.05, -0.05]
    u = kernel.of(operators.atoms)
    moved = operators.with_potential(u(q) - u(operators.mulliken_charges))
    one, other = (BlockCodec(reference).encode(o) for o in (operators, replace(moved, mulliken_charges=q)))
    for key in one.offsite:
        np.testing.assert_allclose(other.offsite[key], one.offsite[key], atol=1e-12)
    for z in one.onsite:
        np.testing.assert_allclose(other.onsite[z][:, :-1], one.onsite[z][:, :-1], atol=1e-12)
        assert np.abs(other.onsite[z][:, -1] - one.onsite[z][:, -1]).max() > 1e-3


def test_files_hold_charges_and_what_was_fitted_to_them(structures, reference, tmp_path):
    write_operators(tmp_path / "o.h5", structures[0])
    np.testing.assert_array_equal(read_operators(tmp_path / "o.h5").mulliken_charges, structures[0].mulliken_charges)
    write_reference(tmp_path / "r.h5", reference)
    back = read_reference(tmp_path / "r.h5")
    one, other = (BlockCodec(r).encode(structures[1]) for r in (reference, back))
    for z in one.onsite:
        np.testing.assert_array_equal(one.onsite[z], other.onsite[z])
        np.testing.assert_array_equal(reference.scale_of_atoms(z), back.scale_of_atoms(z))
        np.testing.assert_array_equal(
            reference.crystal_field.deviation(z, one.crystal_field[z]), back.crystal_field.deviation(z, one.crystal_field[z])
        )
    write_graph(tmp_path / "g.h5", one)
    for z, target in read_graph(tmp_path / "g.h5").onsite.items():
        np.testing.assert_array_equal(target, one.onsite[z])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("numbers", lambda a: a * np.nan, "NaN or infinity"),
        ("numbers", lambda a: -a, "not above zero"),
        ("coefficients", lambda a: a[:-1], "other coefficients"),
        ("table/8", lambda a: a[:-1], "does not belong"),
    ],
)
def test_a_reference_whose_parts_do_not_fit_is_refused(reference, tmp_path, name, change, said):
    write_reference(tmp_path / "r.h5", reference)
    with h5py.File(tmp_path / "r.h5") as file:
        content: dict = {}
        file.visititems(lambda path, item: content.update({path: item[()]}) if isinstance(item, h5py.Dataset) else None)
        attributes = dict(file.attrs)
    content[f"self_consistent/{name}"] = change(content[f"self_consistent/{name}"])
    own = {k: v for k, v in attributes.items() if k in REFERENCE.attributes}
    with create_h5(tmp_path / "wrong.h5", REFERENCE, **own) as file:
        write_basis(file, reference.basis)
        for path, values in content.items():
            if not path.startswith("basis"):
                file[path] = values
    with pytest.raises(ValueError, match=said):
        read_reference(tmp_path / "wrong.h5")


def test_the_potential_of_an_atom_turns_with_the_structure(model, reference):
    """It is a number: a network with random weights gives the same for every orientation, and another for other neighbours."""
    R = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    R *= np.sign(np.linalg.det(R))
    of = lambda atoms: predict(model, atoms, dtype=torch.float64, self_consistent=True).loop.potential  # noqa: E731
    np.testing.assert_allclose(of(rotated(hafnia(7), R)), of(hafnia(7)), atol=1e-10)
    assert np.abs(of(hafnia(7)) - of(hafnia(8))).max() > 1e-3
    only = predict(model, hafnia(7), reference_only=True).blocks.potential
    assert np.abs(of(hafnia(7)) - only).max() > 1e-5


def test_the_network_learns_of_the_potential_by_its_own_output(reference, structures):
    """Its gradient reaches weights that nothing else reads, and the potential of the reference is an input."""
    graph = BlockCodec(reference).encode(structures[0])
    torch.manual_seed(0)
    network = build_network(SETTINGS, reference).double()
    inputs = graph_inputs(graph, reference, network.lmax, torch.float64)
    network(inputs)[1][0][:, -1].sum().backward()
    assert network.potential_readout.grad[0].abs().max() > 0
    assert all(weights.grad is None or weights.grad.abs().max() == 0 for weights in network.onsite_readout.values())
    before = network(inputs)[1][0].detach()
    inputs.atoms_of[0].crystal_field[:, -1] += 1
    assert (network(inputs)[1][0].detach() - before).abs().max() > 1e-6


def test_a_prediction_is_self_consistent_in_memory_and_in_its_file(model, tmp_path):
    made = predict(model, hafnia(9), self_consistent=True, analysis=GRID)
    found = made.operators()
    one_pass = predict(model, hafnia(9), self_consistent=False).operators()
    assert found.attributes["self_consistent"] == 1
    assert "self_consistent" not in one_pass.attributes
    np.testing.assert_allclose(charges(found), found.mulliken_charges, atol=10 * TOLERANCE)
    of_charges = made.blocks.reference.crystal_field.potential.kernel.of(found.atoms)
    w = of_charges(found.mulliken_charges) - made.loop.potential
    np.testing.assert_allclose(found.hamiltonian, one_pass.with_potential(w).hamiltonian, atol=1e-12)
    assert np.abs(w).max() > 1e-3
    made.write(tmp_path / "p.h5", analysis=GRID)
    back = read_operators(tmp_path / "p.h5")
    np.testing.assert_array_equal(back.hamiltonian, found.hamiltonian)
    np.testing.assert_array_equal(back.mulliken_charges, found.mulliken_charges)
    assert back.attributes["charge_steps"] > 2
    assert back.attributes["charge_residual"] < TOLERANCE
    assert back.attributes["metal"] in (0, 1)  # band edges were looked for


def on_each(world, model, path):
    predict(model, hafnia(9), world=world, self_consistent=True, analysis=GRID).write(path, world, GRID)


def test_ranks_write_one_file_self_consistent_as_by_one(model, tmp_path):
    on_ranks(2, on_each, model, tmp_path / "two.h5")
    predict(model, hafnia(9), self_consistent=True, analysis=GRID).write(tmp_path / "one.h5", analysis=GRID)
    one, two = (read_operators(tmp_path / f"{name}.h5") for name in ("one", "two"))
    np.testing.assert_allclose(two.hamiltonian, one.hamiltonian, atol=1e-5)
    assert two.attributes["charge_steps"] > 1


def test_a_large_structure_is_predicted_in_one_pass_and_that_is_said(model, monkeypatch):
    monkeypatch.setattr(prediction, "LARGEST_DENSE", 17)
    with pytest.warns(UserWarning, match="18 orbitals: charges are made self-consistent in structures of at most 17"):
        found = predict(model, hafnia(9), self_consistent=True).operators()
    np.testing.assert_array_equal(found.hamiltonian, predict(model, hafnia(9), self_consistent=False).operators().hamiltonian)


def test_what_cannot_be_done_is_refused(structures, model, szv, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"hold no charges of its atoms.*hamscale operators"):
        fit_reference([replace(o, mulliken_charges=None) for o in structures], 5.0, self_consistent=True)
    water = replace(model_hamiltonian(WATER, basis_of(O=SZV, H=SZV)), mulliken_charges=np.zeros(3))
    with pytest.raises(ValueError, match="without periodic directions"):
        fit_reference([water], 5.0, self_consistent=True)
    plain = fit_reference(structures, 5.0)
    write_reference(tmp_path / "plain.h5", plain)
    save_model(tmp_path / "m", [build_network(SETTINGS, plain).state_dict()], SETTINGS.model_dump(), tmp_path / "plain.h5", {})
    with pytest.raises(ValueError, match=r"trained without their potentials.*self_consistent: true"):
        predict(tmp_path / "m", hafnia(9), self_consistent=True)
    write_structure_file(tmp_path / "a.extxyz", hafnia(9))
    arguments = ["predict", str(model), str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "p.h5")]
    assert main([*arguments, "--self-consistent", "--one-pass"]) == 1
    assert "exclude each other" in capsys.readouterr().err


def test_a_self_consistent_prediction_teaches_and_one_of_one_pass_is_refused(model, reference, tmp_path, capsys):
    """What a network then learns of an atom is u of the charges found, and of the blocks what the teacher says without u."""
    write_structure_file(tmp_path / "a.extxyz", hafnia(9))
    write_reference(tmp_path / "r.h5", reference)
    for name, option in (("found", "--self-consistent"), ("plain", "--one-pass")):
        path = str(tmp_path / f"{name}.h5")
        assert main(["predict", str(model), str(tmp_path / "a.extxyz"), option, "--out", path]) == 0
    assert main(["graph", str(tmp_path / "r.h5"), str(tmp_path / "found.h5"), "--out", str(tmp_path / "g")]) == 0
    graph, found = read_graph(tmp_path / "g" / "found.h5"), read_operators(tmp_path / "found.h5")
    u = reference.crystal_field.potential.kernel.of(found.atoms)(found.mulliken_charges)
    for z, target in graph.onsite.items():
        np.testing.assert_allclose(target[:, -1] + graph.crystal_field[z][:, -1], u[graph.atoms_of(z)], atol=1e-12)
    assert main(["graph", str(tmp_path / "r.h5"), str(tmp_path / "plain.h5"), "--out", str(tmp_path / "g")]) == 1
    assert "not self-consistent, expected one of `hamscale predict --self-consistent`" in capsys.readouterr().err
