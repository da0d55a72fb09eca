"""What quatrex reads, read by its documented rules with numpy alone (sources: hamscale/export/quatrex.py)."""

import itertools
import json
import tomllib
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from hamscale.analysis.spectra import find_levels
from hamscale.config import Analysis
from hamscale.export import export
from hamscale.operators import read_operators
from hamscale.structures import read_structure_file, wrap_as_cp2k
from hamscale.units import HARTREE_IN_EV, ev_to_hartree, hartree_to_ev
from helpers import SZV, bands_hartree, bands_of_cells, basis_of, hafnia, model_hamiltonian, written


@pytest.fixture
def path(solid, tmp_path):
    return written(tmp_path, solid)


def read_cells(path) -> dict:
    """Dense matrices by cell from the items of an HDF5 file, as load_hdf5_dict and distributed_load of quatrex say."""
    cells = {}
    with h5py.File(path) as file:
        for key, item in file.items():
            assert key[0] == "["
            assert key[-1] == "]"
            assert " " not in key
            if item.attrs["format"] == "ndarray":
                matrix = item[:]
            else:
                assert item.attrs["format"] == "coo"
                matrix = np.zeros(item.attrs["shape"])
                np.add.at(matrix, (item["row"][:], item["col"][:]), item["data"][:])
            cells[tuple(int(x) for x in key.strip("[]").split(","))] = matrix
    return cells


def settings_of_device(folder) -> dict:
    return tomllib.loads((folder / "quatrex_config.toml").read_text())["device"]


def read_structure(path):
    """Cell, symbols and positions as distributed_read_xyz of quatrex takes them."""
    with open(path) as file:
        count, line = int(file.readline()), file.readline()
    assert line.startswith("Lattice=")
    cell = np.array(line.split("=")[1].strip().split('"')[1].split(), dtype=float).reshape(3, 3)
    symbols, positions = np.loadtxt(path, skiprows=2, usecols=0, dtype=str), np.loadtxt(path, skiprows=2, usecols=(1, 2, 3))
    assert len(symbols) == count
    return cell, symbols, positions


def check_grid(cells):
    """What load_matrices of quatrex asks of the cells."""
    keys = np.array(list(cells))
    assert (0, 0, 0) in cells
    assert np.array_equal(keys.max(0), -keys.min(0))
    assert len(cells) == np.prod(2 * keys.max(0) + 1)
    assert len({matrix.shape for matrix in cells.values()}) == 1


def test_bands_of_the_unit_cell_are_ours(solid, path, tmp_path):
    export(path, "quatrex", tmp_path / "out")
    H, S = (read_cells(tmp_path / "out" / f"{name}.h5") for name in ("hamiltonian", "overlap"))
    assert H.keys() == S.keys()
    check_grid(H)
    assert np.abs(bands_of_cells(H, S) - bands_hartree(solid) * HARTREE_IN_EV).max() < 1e-8
    cell, symbols, positions = read_structure(tmp_path / "out" / "structure.xyz")
    np.testing.assert_allclose(cell, solid.atoms.cell, atol=1e-12)
    np.testing.assert_allclose(positions, solid.atoms.positions, atol=1e-8)
    assert symbols.tolist() == solid.atoms.get_chemical_symbols()
    device = settings_of_device(tmp_path / "out")
    assert device["construct_from_unit_cell"]
    assert device["neighbor_cell_cutoff"] == np.abs(solid.pairs[:, 2:]).max(0).tolist()
    assert sum(device["num_orbitals_per_atom"][s] for s in symbols) == solid.n_orbitals


@pytest.mark.parametrize("axis", [0, 1])
def test_a_device_of_copies_is_block_tridiagonal_and_whole(solid, tmp_path, axis):
    """A device of N copies is H(R along the axis = n - m) in block (m, n), at every transverse cell, and nothing is dropped."""
    pbc = solid.atoms.pbc
    solid = replace(solid, atoms=Atoms(solid.atoms.numbers, solid.atoms.positions, cell=solid.atoms.cell, pbc=pbc))
    path = written(tmp_path, solid)
    reach = int(np.abs(solid.pairs[:, 2 + axis]).max())
    copies = 3 * reach
    lines = export(path, "quatrex", tmp_path / "out", transport="abc"[axis], repeat=copies, origin=-0.5)
    assert sum("is zero" in line for line in lines) == 2
    device = settings_of_device(tmp_path / "out")
    assert device["transport_direction"] == "abc"[axis]
    assert device["block_size"] == [reach * solid.n_orbitals] * 3
    for name, factor in (("hamiltonian", HARTREE_IN_EV), ("overlap", 1.0)):
        cells = read_cells(tmp_path / "out" / f"{name}.h5")
        check_grid(cells)
        ours = solid.csr(getattr(solid, name) * factor)
        n = solid.n_orbitals
        for R, matrix in cells.items():
            assert R[axis] == 0
            for first, second in itertools.product(range(copies), repeat=2):
                along = tuple(second - first if a == axis else x for a, x in enumerate(R))
                expected = ours[along].toarray() if along in ours else np.zeros((n, n))
                block = matrix[first * n : (first + 1) * n, second * n : (second + 1) * n]
                np.testing.assert_allclose(block, expected, atol=1e-12)
    _, _, positions = read_structure(tmp_path / "out" / "structure.xyz")
    shifted = solid.atoms.positions + (copies - 1) * np.asarray(solid.atoms.cell)[axis]
    np.testing.assert_allclose(positions[-len(solid.atoms) :], shifted, atol=1e-8)
    assert read_structure_file(tmp_path / "out" / "structure.xyz").pbc.tolist() == pbc.tolist()


def test_a_device_across_a_sheet_is_refused(sheet, tmp_path):
    with pytest.raises(ValueError, match="--transport is c, but the structure is periodic along XY"):
        export(written(tmp_path, sheet), "quatrex", tmp_path / "out", transport="c")


@pytest.fixture(scope="module")
def wire(szv):
    """One long disordered cell, its atoms in no order."""
    atoms = hafnia(2).repeat((1, 1, 6))
    atoms.positions += np.random.default_rng(3).normal(0, 0.05, atoms.positions.shape)
    atoms = wrap_as_cp2k(atoms[np.random.default_rng(4).permutation(len(atoms))])
    return model_hamiltonian(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True), szv)


def test_what_lies_beyond_neighbouring_blocks_is_dropped_and_told(wire, tmp_path):
    options = {"transport": "c", "blocks": 5, "origin": -0.5, "allow_mismatch": True}
    lines = export(written(tmp_path, wire), "quatrex", tmp_path / "out", **options)
    sizes = settings_of_device(tmp_path / "out")["block_size"]
    assert sum(sizes) == wire.n_orbitals
    cells = read_cells(tmp_path / "out" / "hamiltonian.h5")
    check_grid(cells)
    block = np.repeat(np.arange(5), sizes)
    near = np.abs(block[:, None] - block) <= 1
    assert not any(matrix[~near].any() for matrix in cells.values())
    # the device's orbitals are those of the atoms as structure.xyz lists them
    _, _, positions = read_structure(tmp_path / "out" / "structure.xyz")
    order = [int(np.argmin(np.linalg.norm(wire.atoms.positions - position, axis=1))) for position in positions]
    assert sorted(order) == list(range(len(order)))
    start = np.concatenate([[0], np.cumsum(wire.orbitals)])
    orbitals = np.concatenate([np.arange(start[atom], start[atom + 1]) for atom in order])
    dropped = []
    for R, matrix in wire.csr(wire.hamiltonian * HARTREE_IN_EV).items():
        if R[2] == 0:
            ours = matrix.toarray()[np.ix_(orbitals, orbitals)]
            np.testing.assert_allclose(cells[R], np.where(near, ours, 0), atol=1e-12)
            dropped.append(ours[~near])
    dropped = np.concatenate(dropped)
    (line,) = [line for line in lines if "of the hamiltonian" in line]
    assert f"{np.count_nonzero(dropped)} elements" in line
    assert f"{np.abs(dropped).max():.2e} eV" in line


def test_blocks_without_a_loss_are_found(wire, tmp_path):
    """Blocks of one long cell: none of them couples beyond its neighbours; those of half the length do."""
    path = written(tmp_path, wire.select(wire.pairs.distances < 5.0))
    lines = export(path, "quatrex", tmp_path / "out", transport="c", allow_mismatch=True)
    assert sum("is zero" in line for line in lines) == 2
    blocks = len(settings_of_device(tmp_path / "out")["block_size"])
    assert blocks >= 2
    more = export(path, "quatrex", tmp_path / "more", transport="c", blocks=2 * blocks, allow_mismatch=True)
    assert any("dropped" in line for line in more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "x"}, "--transport is 'x', expected an axis of the cell: a, b or c"),
        ({"blocks": 3}, "without --transport"),
        ({"origin": 0.5}, "without --transport"),
        ({"allow_mismatch": True}, "without --transport"),
        ({"transport": "a"}, "no tiling along a: .* Give --repeat 8"),
        ({"transport": "a", "repeat": 0}, "--repeat is 0, expected 1 or more"),
        ({"transport": "a", "blocks": 1}, "--blocks is 1, expected 2 or more"),
        ({"transport": "a", "blocks": 90}, "--blocks is 90, expected 2 or more, each with an atom in it"),
    ],
)
def test_impossible_devices_are_refused(dft, tmp_path, options, message):
    path = written(tmp_path, dft)
    with pytest.raises(ValueError, match=message) as error:
        export(path, "quatrex", tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


CELLS, LENGTH = 8, 8 * 5.431


@pytest.fixture(scope="module")
def device():
    """A wire of eight cells of silicon, drawn from 0 to its length; the two in the middle are displaced."""
    atoms = bulk("Si", "diamond", a=5.431, cubic=True).repeat((1, 1, CELLS))
    atoms.positions += 0.3
    z = atoms.positions[:, 2]
    middle = (z > 3 * 5.431) & (z < 5 * 5.431)
    atoms.positions[middle] += np.random.default_rng(0).normal(0, 0.1, (middle.sum(), 3))
    return atoms


def of_short_reach(atoms, folder):
    """H and S of a structure in a file, blocks within 5 A."""
    operators = model_hamiltonian(wrap_as_cp2k(atoms), basis_of(Si=SZV))
    return written(folder, operators.select(operators.pairs.distances < 5.0))


@pytest.fixture(scope="module")
def of_device(device, tmp_path_factory):
    return of_short_reach(device, tmp_path_factory.mktemp("device"))


def test_a_device_is_cut_where_the_file_was_drawn(of_device, device, tmp_path):
    """CP2K's wrapping would cut it in its middle. Leads are at the ends, and coordinates are those of the file."""
    lines = export(of_device, "quatrex", tmp_path / "out", transport="c", blocks=CELLS)
    assert [line.split(" repeats")[0] for line in lines if "repeats in" in line] == ["the first block", "the last block"]
    _, _, positions = read_structure(tmp_path / "out" / "structure.xyz")
    assert np.floor(positions[:, 2] / 5.431).astype(int).tolist() == np.repeat(np.arange(CELLS), 8).tolist()
    distance = np.linalg.norm(positions[:, None] - device.positions, axis=2)
    assert distance.min(1).max() < 1e-7
    order = distance.argmin(1)
    # every block of the home cell, by where its atoms are
    ours, cells = read_operators(of_device), read_cells(tmp_path / "out" / "hamiltonian.h5")
    rows = {tuple(pair): b for b, pair in enumerate(ours.pairs.tolist())}
    found = 0
    for first, second in itertools.product(range(len(order)), repeat=2):
        i, j = order[first], order[second]
        apart = (positions[second] - positions[first]) - (ours.atoms.positions[j] - ours.atoms.positions[i])
        row = rows.get((i, j, *np.round(apart / ours.atoms.cell.lengths()).astype(int).tolist()))
        expected = 0 if row is None else ours.block(ours.hamiltonian, row) * HARTREE_IN_EV
        block = cells[0, 0, 0][4 * first : 4 * first + 4, 4 * second : 4 * second + 4]
        np.testing.assert_allclose(block, expected, atol=1e-12)
        found += row is not None
    assert found > 500


@pytest.mark.parametrize("origin", [0.5, 0.4375])
def test_a_device_cut_in_its_middle_is_refused_unless_told(of_device, tmp_path, origin):
    options = {"transport": "c", "blocks": CELLS, "origin": origin}
    with pytest.raises(
        ValueError, match=r"the (first|last) of 8 blocks does not repeat.*differ by up to 0\.\d+ A.*meV.*--origin"
    ):
        export(of_device, "quatrex", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    lines = export(of_device, "quatrex", tmp_path / "out", **options, allow_mismatch=True)
    assert any("DOES NOT REPEAT" in line for line in lines)


def test_an_end_whose_potential_differs_is_refused(of_device, tmp_path):
    """Atoms repeat, H does not: a false potential, higher at one end."""
    operators = read_operators(of_device)
    z = operators.atoms.arrays["given_positions"][:, 2] / operators.atoms.cell.lengths()[2]
    u = ev_to_hartree(np.where(z < 0.2, 0.3, 0.0))  # over the first block and a half
    shift = np.repeat((u[operators.pairs[:, 0]] + u[operators.pairs[:, 1]]) / 2, np.diff(operators.offsets))
    operators.hamiltonian += shift * operators.overlap
    path = written(tmp_path, operators)
    with pytest.raises(ValueError, match=r"positions differ by up to 0.000 A, onsite energies by 300.0 meV"):
        export(path, "quatrex", tmp_path / "out", transport="c", blocks=4)


def test_an_atom_displaced_beyond_an_end_stays_with_its_plane(device, tmp_path):
    atoms = device.copy()
    plane = np.flatnonzero(atoms.positions[:, 2] < 0.4)
    atoms.positions[plane[0], 2] = -0.03
    export(of_short_reach(atoms, tmp_path), "quatrex", tmp_path / "out", transport="c", blocks=CELLS, allow_mismatch=True)
    _, _, positions = read_structure(tmp_path / "out" / "structure.xyz")
    assert positions[:, 2].min() == pytest.approx(-0.03, abs=1e-7)
    sizes = settings_of_device(tmp_path / "out")["block_size"]
    assert sizes == [32] * CELLS


def test_blocks_of_whole_cells_of_the_lead_are_chosen(of_device, tmp_path):
    """More blocks would fit, but cut the lead where it does not repeat."""
    export(of_device, "quatrex", tmp_path / "out", transport="c")
    assert settings_of_device(tmp_path / "out")["block_size"] == [32] * CELLS


def test_a_tilted_cell_is_warned_of(sheet, of_device, tmp_path):
    with pytest.warns(UserWarning, match="the cell is tilted: .* by up to 1.25 A .* quatrex before 0.1.0 finds no contact"):
        export(written(tmp_path, sheet), "quatrex", tmp_path / "tilted")
    with warnings.catch_warnings(record=True) as told:
        export(of_device, "quatrex", tmp_path / "upright")
    assert not any("tilted" in str(warning.message) for warning in told)


def test_a_contact_that_no_cell_holds_is_warned_of(device, tmp_path):
    atoms = device.copy()
    z = atoms.positions[:, 2]
    z[np.flatnonzero(z < 0.4)[0]], z[np.flatnonzero((z > 4) & (z < 5))[0]] = -0.4, 5.3
    path = of_short_reach(atoms, tmp_path)
    with pytest.warns(UserWarning, match="beyond it: quatrex will not find its contact"):
        export(path, "quatrex", tmp_path / "out", transport="c", blocks=CELLS, allow_mismatch=True)


def test_energies_of_the_file_are_those_of_the_contacts(si8, tmp_path):
    levels = find_levels(si8, Analysis())
    path = written(tmp_path, replace(si8, attributes=levels.attributes()))
    export(path, "quatrex", tmp_path / "out")
    energies = json.loads((tmp_path / "out" / "energies.json").read_text())
    assert energies["mid_gap_ev"] == pytest.approx(hartree_to_ev(levels.mid_gap), abs=1e-6)
    contacts = settings_of_device(tmp_path / "out")["contacts"]
    assert [contact["mid_gap_energy"] for contact in contacts] == [energies["mid_gap_ev"]] * 2
    electron = tomllib.loads((tmp_path / "out" / "quatrex_config.toml").read_text())["electron"]
    assert electron["energy_window_min"] < energies["valence_band_maximum_ev"] - 2
    assert electron["energy_window_max"] > energies["conduction_band_minimum_ev"] + 2


def test_unknown_energies_are_warned_of(si8, tmp_path):
    with pytest.warns(UserWarning, match="the file has no band edges"):
        export(written(tmp_path, si8), "quatrex", tmp_path / "out")
    assert "energy_window" not in (tmp_path / "out" / "quatrex_config.toml").read_text()


def test_a_molecule_has_no_transport_axis(water, tmp_path):
    path = written(tmp_path, water)
    with pytest.raises(ValueError, match="periodic"):
        export(path, "quatrex", tmp_path / "out", transport="a")
    export(path, "quatrex", tmp_path / "out")
    assert list(read_cells(tmp_path / "out" / "hamiltonian.h5")) == [(0, 0, 0)]
    assert not list((tmp_path / "out").glob("*.toml"))
