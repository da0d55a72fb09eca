"""What quatrex reads, read by its documented rules with numpy alone (sources: hamscale/export/quatrex.py)."""

import itertools
import tomllib

import h5py
import numpy as np
import pytest

from conftest import bands_hartree, bands_of_cells, hafnia, model_hamiltonian, written
from hamscale.export import export
from hamscale.structures import wrap_as_cp2k
from hamscale.units import HARTREE_IN_EV


@pytest.fixture
def path(solid, tmp_path):
    return written(tmp_path, solid)


def read_cells(path) -> dict:
    """Dense matrices by cell from the groups of an HDF5 file, as load_hdf5_dict and distributed_load of quatrex say."""
    cells = {}
    with h5py.File(path) as file:
        for key, group in file.items():
            assert key[0] == "["
            assert key[-1] == "]"
            assert " " not in key
            assert group.attrs["format"] == "coo"
            matrix = np.zeros(group.attrs["shape"])
            np.add.at(matrix, (group["row"][:], group["col"][:]), group["data"][:])
            cells[tuple(int(x) for x in key.strip("[]").split(","))] = matrix
    return cells


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
    device = tomllib.loads((tmp_path / "out" / "device.toml").read_text())["device"]
    assert device["construct_from_unit_cell"]
    assert device["neighbor_cell_cutoff"] == np.abs(solid.pairs[:, 2:]).max(0).tolist()
    assert sum(device["num_orbitals_per_atom"][s] for s in symbols) == solid.n_orbitals


@pytest.mark.parametrize("axis", [0, 2])
def test_a_device_of_copies_is_block_tridiagonal_and_whole(solid, path, tmp_path, axis):
    """A device of N copies is H(R along the axis = n - m) in block (m, n), at every transverse cell, and nothing is dropped."""
    reach = int(np.abs(solid.pairs[:, 2 + axis]).max())
    copies = 3 * reach
    lines = export(path, "quatrex", tmp_path / "out", transport="abc"[axis], repeat=copies)
    assert sum("is zero" in line for line in lines) == 2
    device = tomllib.loads((tmp_path / "out" / "device.toml").read_text())["device"]
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


@pytest.fixture(scope="module")
def wire(szv):
    """One long disordered cell, its atoms in no order."""
    atoms = hafnia(2).repeat((1, 1, 6))
    atoms.positions += np.random.default_rng(3).normal(0, 0.05, atoms.positions.shape)
    return model_hamiltonian(wrap_as_cp2k(atoms[np.random.default_rng(4).permutation(len(atoms))]), szv)


def test_what_lies_beyond_neighbouring_blocks_is_dropped_and_told(wire, tmp_path):
    lines = export(written(tmp_path, wire), "quatrex", tmp_path / "out", transport="c", blocks=5)
    sizes = tomllib.loads((tmp_path / "out" / "device.toml").read_text())["device"]["block_size"]
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


def test_the_most_blocks_without_a_loss_are_found(wire, tmp_path):
    """Blocks of one long cell: as many as can be, and none of them couples beyond its neighbours."""
    path = written(tmp_path, wire.select(np.linalg.norm(wire.vectors(), axis=1) < 5.0))
    lines = export(path, "quatrex", tmp_path / "out", transport="c")
    assert sum("is zero" in line for line in lines) == 2
    blocks = len(tomllib.loads((tmp_path / "out" / "device.toml").read_text())["device"]["block_size"])
    assert blocks >= 2
    more = export(path, "quatrex", tmp_path / "more", transport="c", blocks=blocks + 1)
    assert any("dropped" in line for line in more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "x"}, "--transport is 'x', expected an axis of the cell: a, b or c"),
        ({"blocks": 3}, "without --transport"),
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


def test_a_molecule_has_no_transport_axis(water, tmp_path):
    path = written(tmp_path, water)
    with pytest.raises(ValueError, match="periodic"):
        export(path, "quatrex", tmp_path / "out", transport="a")
    export(path, "quatrex", tmp_path / "out")
    assert list(read_cells(tmp_path / "out" / "hamiltonian.h5")) == [(0, 0, 0)]
