import numpy as np
import pytest

from hamscale.graph.codec import BlockCodec
from hamscale.graph.crystal_field import Ions
from hamscale.graph.graph import read_graph, write_graph
from hamscale.graph.reference import fit_reference, read_reference, write_reference
from hamscale.units import mev_to_hartree
from helpers import DZVP, SZV, basis_of, hafnia, model_hamiltonian, silicon


@pytest.fixture(scope="module")
def structures(szv):
    return [model_hamiltonian(hafnia(seed), szv) for seed in range(4)]


@pytest.fixture(scope="module")
def reference(structures):
    return fit_reference(structures, 6.0)


def _shifted(operators, mu):
    from dataclasses import replace

    return replace(operators, hamiltonian=operators.hamiltonian + mu * operators.overlap)


def test_a_gauge_shift_of_a_structure_changes_no_target(structures, reference):
    """H and H + mu S are the same physics: mu is found, and targets do not move."""
    mu = mev_to_hartree(170.0)
    plain, shifted = (BlockCodec(reference).encode(o) for o in (structures[0], _shifted(structures[0], mu)))
    assert shifted.attributes["gauge_hartree"] - plain.attributes["gauge_hartree"] == pytest.approx(mu, abs=1e-12)
    for key in plain.offsite:
        assert np.abs(plain.offsite[key] - shifted.offsite[key]).max() < 1e-12


def test_shifts_among_training_structures_do_not_spoil_the_fit(structures, reference):
    moved = fit_reference([_shifted(o, mu) for o, mu in zip(structures, (0.01, -0.02, 0.03, -0.02))], 6.0)
    for key in reference.two_centre:
        assert np.abs(moved.two_centre[key] - reference.two_centre[key]).max() < 1e-6


def test_a_two_centre_hamiltonian_is_learnt_exactly_but_for_interpolation(szv):
    """S itself is two-centre: what the reference leaves of it is the error of linear interpolation."""
    from dataclasses import replace

    operators = [model_hamiltonian(hafnia(seed), szv) for seed in range(6)]
    operators = [replace(o, hamiltonian=0.5 * o.overlap.copy()) for o in operators]
    graph = BlockCodec(fit_reference(operators, 6.0)).encode(operators[0])
    total = np.abs(operators[0].hamiltonian).mean()
    assert graph.attributes["baseline_mae_hartree"] < 0.02 * total


def test_targets_are_of_the_order_of_their_scale(structures, reference):
    graph = BlockCodec(reference).encode(structures[1])
    ratios = []
    for (a, b), target in graph.offsite.items():
        scale = reference.offsite_scale(a, b, graph.edges.distances[graph.edges.between(a, b)])[
            :, reference.coupling[a, b].slot
        ]
        ratios.append((target / scale).ravel())
    assert 0.3 < np.sqrt(np.mean(np.concatenate(ratios) ** 2)) < 3


def test_charges_are_kept_with_the_reference(structures, tmp_path):
    fitted = fit_reference(structures, 6.0, ions=Ions(3.0, {8: -2.0, 72: 4.0}))
    write_reference(tmp_path / "r.h5", fitted)
    back = read_reference(tmp_path / "r.h5")
    assert back.crystal_field.near_angstrom == 3.0
    for name in ("charges", "coefficients"):
        assert np.array_equal(getattr(back.crystal_field, name), getattr(fitted.crystal_field, name))
    assert np.array_equal(back.crystal_field.charges, [[-2.0], [4.0]])
    assert back.longest_cell_angstrom == fitted.longest_cell_angstrom > 3
    for key, target in BlockCodec(fitted).encode(structures[1]).onsite.items():
        assert np.array_equal(BlockCodec(back).encode(structures[1]).onsite[key], target)


def test_files_read_back_the_same(structures, reference, tmp_path):
    write_reference(tmp_path / "r.h5", reference)
    back = read_reference(tmp_path / "r.h5")
    for name in ("centre", "mean", "overlap"):
        for z, values in getattr(reference.crystal_field, name).items():
            assert np.array_equal(getattr(back.crystal_field, name)[z], values)
    for z, tables in reference.crystal_field.tables.items():
        assert all(np.array_equal(a, b) for a, b in zip(back.crystal_field.tables[z], tables, strict=True))
    graph = BlockCodec(back).encode(structures[0])
    write_graph(tmp_path / "g.h5", graph)
    again = read_graph(tmp_path / "g.h5")
    assert np.array_equal(again.edges, graph.edges)
    assert again.attributes == graph.attributes
    for key in graph.offsite:
        assert np.array_equal(again.offsite[key], graph.offsite[key])


def test_parts_of_the_reference_can_be_left_out(structures):
    """Without the crystal field the onsite reference is the mean block of the element.

    Without tables bonds have Mulliken's form alone.
    """
    operators = structures[0]
    whole, flat, bare = (
        fit_reference(structures, 6.0, crystal_field=field, two_centre=two_centre)
        for field, two_centre in ((True, True), (False, True), (False, False))
    )
    for z, blocks in BlockCodec(flat).encode(operators).crystal_field.items():
        assert np.ptp(blocks, axis=0).max() == 0
        np.testing.assert_allclose(blocks[0][flat.coupling[z, z].zero_order], whole.crystal_field.centre[z], atol=1e-12)
    assert any(np.abs(table).max() > 1e-3 for table in flat.two_centre.values())
    assert all(np.abs(table).max() == 0 for table in bare.two_centre.values())
    errors = [BlockCodec(r).encode(operators).attributes["baseline_mae_hartree"] for r in (whole, flat, bare)]
    assert errors[0] < errors[1] < errors[2]


def test_share_outside_the_cutoff_is_recorded(structures):
    shares = [fit_reference(structures, r).outside_fraction for r in (4.0, 6.0, 8.0)]
    operators = structures[0]
    distances = operators.pairs.distances
    outside = np.repeat(distances >= 4.0, np.diff(operators.offsets))
    one = fit_reference([operators], 4.0).outside_fraction
    assert one == pytest.approx(np.abs(operators.hamiltonian[outside]).sum() / np.abs(operators.hamiltonian).sum())
    assert shares[0] > shares[1] > shares[2] > 0


def test_auto_cutoff_is_the_reach_of_h_at_the_threshold(structures):
    reference = fit_reference(structures[:1], "auto", 1e-3)
    operators = structures[0]
    distances = operators.pairs.distances
    beyond = distances >= reference.cutoff_angstrom
    largest = np.maximum.reduceat(np.abs(operators.hamiltonian), operators.offsets[:-1])
    assert largest[beyond].max() <= 1e-3 < largest[distances > reference.cutoff_angstrom - 1e-4].max()


def test_cutoff_beyond_the_data_is_refused(structures):
    with pytest.raises(ValueError, match=r"cutoff_angstrom is 20.0 A, but H of the training data reaches only 1\d"):
        fit_reference(structures, 20.0)


def test_what_does_not_belong_together_is_refused(structures, reference):
    with pytest.raises(ValueError, match="in different bases: O"):
        fit_reference([structures[0], model_hamiltonian(hafnia(), basis_of(Hf=SZV, O=DZVP))], 6.0)
    with pytest.raises(ValueError, match="no basis for element Si"):
        BlockCodec(reference).encode(model_hamiltonian(silicon(), basis_of(Si=SZV)))
    with pytest.raises(ValueError, match="differs from that of the reference"):
        BlockCodec(reference).encode(model_hamiltonian(hafnia(), basis_of(Hf=SZV, O=DZVP)))
    with pytest.raises(ValueError, match="no training structure"):
        fit_reference([], 6.0)
