"""Data of DeePTB, read by its rules: blocks by atoms and cell, orbitals by l, the number of their shell and m."""

import ast
import json
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest

from hamscale.basis import Basis, shells_only
from hamscale.export import export
from hamscale.operators import Operators
from hamscale.units import HARTREE_IN_EV
from helpers import bands_hartree, bands_of_cells, written


def in_order(operators: Operators, order: dict[int, list[int]]) -> Operators:
    """The same operators with the shells of elements in another order, which DeePTB's format cannot hold."""
    elements, index = [], {}
    for z, element in operators.basis.items():
        l = [element.l[shell] for shell in order[z]]
        elements.append(replace(element, text=shells_only(l)))
        index[z] = np.concatenate([np.arange(element.n_orbitals)[element.shell_slices[shell]] for shell in order[z]])
    numbers, values = operators.atoms.numbers, {}
    for name in ("hamiltonian", "overlap"):
        blocks = [operators.block(getattr(operators, name), b) for b in range(len(operators.pairs))]
        blocks = [block[np.ix_(index[numbers[i]], index[numbers[j]])] for block, (i, j) in zip(blocks, operators.pairs[:, :2])]
        values[name] = np.concatenate([block.ravel() for block in blocks])
    return replace(operators, basis=Basis(elements), **values)


def read(folder) -> tuple[dict, list[list[tuple]]]:
    """Matrices (name, R) -> {(i, orbital, j, orbital): value}, and the orbitals (l, shell, m) of each atom."""
    basis = ast.literal_eval((folder / "basis.dat").read_text())
    info = json.loads((folder / "info.json").read_text())
    numbers = np.loadtxt(folder / "atomic_numbers.dat", ndmin=1)
    assert info["nframes"] == 1
    assert info["natoms"] == len(numbers)
    orbitals = []
    for number in numbers:
        shells = re.findall(r"(\d)([spdfgh])", basis["Hf" if number == 72 else "O" if number == 8 else "H"])
        named = [("spdfgh".index(letter), shell) for count, letter in shells for shell in range(int(count))]
        orbitals.append([(l, shell, m) for l, shell in named for m in range(-l, l + 1)])
    found = {}
    for name in ("hamiltonian", "overlap"):
        with h5py.File(folder / f"{name}s.h5") as file:
            for key, dataset in file["0"].items():
                i, j, *R = (int(number) for number in key.split("_"))
                block = dataset[:]
                assert block.shape == (len(orbitals[i]), len(orbitals[j]))
                found[name, i, j, *R] = block
    return found, orbitals


def test_every_element_is_where_deeptb_looks_for_it(dft, tmp_path):
    """Shells out of order in our file: each element is found by the l, the number and the m of its orbitals."""
    order = {z: list(range(len(element.l)))[::-1] for z, element in dft.basis.items()}
    ours = in_order(dft, order)
    (line,) = export(written(tmp_path, ours), "deeptb", tmp_path / "set.0")
    assert "{'O': '1s1p', 'Hf': '2s1p1d'}" in line
    found, orbitals = read(tmp_path / "set.0")
    assert len(found) == 2 * len(ours.pairs)
    for name, unit in (("hamiltonian", HARTREE_IN_EV), ("overlap", 1.0)):
        for b, (i, j, *R) in enumerate(ours.pairs.tolist()):
            block, theirs = ours.block(getattr(ours, name), b) * unit, found[name, i, j, *R]
            places = []
            for atom in (i, j):
                l_of = ours.basis[ours.atoms.numbers[atom]].l
                named = [(l, l_of[:s].count(l), m) for s, l in enumerate(l_of) for m in range(-l, l + 1)]
                places.append([named.index(orbital) for orbital in orbitals[atom]])
            np.testing.assert_allclose(theirs, block[np.ix_(*places)], atol=1e-12)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "set.0" / "positions.dat"), ours.atoms.positions, atol=1e-12)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "set.0" / "cell.dat"), np.asarray(ours.atoms.cell), atol=1e-12)
    assert np.loadtxt(tmp_path / "set.0" / "pbc.dat").tolist() == [1, 1, 1]


def test_bands_of_what_was_written_are_ours(dft, tmp_path):
    export(written(tmp_path, dft), "deeptb", tmp_path / "set.0")
    found, orbitals = read(tmp_path / "set.0")
    start = np.concatenate([[0], np.cumsum([len(of_atom) for of_atom in orbitals])])
    cells = {"hamiltonian": {}, "overlap": {}}
    for (name, i, j, *R), block in found.items():
        matrix = cells[name].setdefault(tuple(R), np.zeros((start[-1],) * 2))
        matrix[start[i] : start[i + 1], start[j] : start[j + 1]] = block
    assert np.abs(bands_of_cells(*cells.values()) - bands_hartree(dft) * HARTREE_IN_EV).max() < 1e-8


def test_shells_that_deeptb_cannot_name_are_refused(water, tmp_path):
    many = Basis(replace(element, text=shells_only([0] * 10)) for element in water.basis.values())
    path = written(tmp_path, replace(water, basis=many, hamiltonian=np.zeros(900), overlap=np.zeros(900)))
    with pytest.raises(ValueError, match="has shells of l .*, expected l up to 5 and at most 9 of each"):
        export(path, "deeptb", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_molecule_is_said_not_to_repeat(water, tmp_path):
    export(written(tmp_path, water), "deeptb", tmp_path / "w.0")
    assert json.loads((tmp_path / "w.0" / "info.json").read_text())["pbc"] == [False] * 3
