import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from hamscale.graph.neighbours import Neighbourhood, edges_within
from hamscale.pairs import PairList, flip
from helpers import hafnia

CASES = {
    "two atoms, cutoff three times the cell": (ase.build.bulk("Si", "diamond", a=5.431), 3 * 3.84),
    "slab": (ase.build.fcc111("Al", (2, 2, 3), vacuum=6.0), 7.0),
    "molecule": (ase.build.molecule("CH3CH2OH"), 4.0),
    "molecule in a box": (ase.build.molecule("H2O", cell=[8] * 3), 4.0),
    "triclinic": (hafnia(2), 9.0),
    "very oblique": (Atoms("HeNe", [(0, 0, 0), (1, 1, 1)], cell=[[3, 0, 0], [2.7, 1.5, 0], [2.5, 1.2, 2]], pbc=True), 6.0),
}


@pytest.mark.parametrize(("atoms", "cutoff"), CASES.values(), ids=CASES.keys())
def test_edges_are_those_of_ase(atoms, cutoff):
    edges = edges_within(atoms, cutoff)
    i, j, S = neighbor_list("ijS", atoms, cutoff)
    expected = sorted(map(tuple, np.column_stack([i, j, S]).tolist()))
    assert [tuple(e) for e in edges.tolist()] == expected  # as a set, and sorted


@pytest.mark.parametrize(("atoms", "cutoff"), CASES.values(), ids=CASES.keys())
def test_the_edges_into_some_atoms_are_those_of_all(atoms, cutoff):
    """Also where atoms lie outside of the cell, and where a part lies at two of its faces."""
    atoms, cutoff = atoms.copy(), cutoff + 1e-3  # no edge of exactly that length, which `degrees` may count or not
    if atoms.pbc.any():
        atoms.positions[::2] += np.array([2, -1, 1]) * atoms.pbc @ np.asarray(atoms.cell)
    whole = edges_within(atoms, cutoff)
    for owned in ([0], [len(atoms) - 1], np.arange(0, len(atoms), 2), np.arange(len(atoms)), []):
        owned = np.array(owned, int)
        expected = whole.table[np.isin(whole[:, 0], owned)]
        assert np.array_equal(edges_within(atoms, cutoff, owned).table, expected)
        degrees = np.bincount(expected[:, 0], minlength=len(atoms))[owned]
        assert np.array_equal(Neighbourhood(atoms, cutoff, owned).degrees(), degrees)
    assert [i.tolist() for i, _ in Neighbourhood(atoms, cutoff)] == [whole[:, 0].tolist()]


def test_a_part_at_a_corner_of_the_cell_is_searched_in_its_surroundings_alone():
    side = 30
    atoms = Atoms("He" * side**3, np.indices((side,) * 3).reshape(3, -1).T * 3.0, cell=[3.0 * side] * 3, pbc=True)
    owned = np.flatnonzero(((atoms.positions < 8) | (atoms.positions > 80)).all(1))  # the eight corners
    neighbourhood = Neighbourhood(atoms, 5.0, owned)
    assert len(owned) == 6**3
    assert len(neighbourhood.index) <= 10**3
    assert sum(len(table) for table in neighbourhood.tables()) == 18 * len(owned)


def test_vector_of_the_reversed_edge_is_the_negative_to_the_last_bit():
    atoms = hafnia(4)
    edges = edges_within(atoms, 8.0)
    vectors = edges.vectors
    backwards = PairList(atoms, flip(edges.table)).vectors
    assert np.array_equal(vectors, -backwards)
    assert (np.linalg.norm(vectors, axis=1) < 8.0).all()


def test_no_edges():
    assert np.asarray(edges_within(Atoms("H", cell=[9] * 3, pbc=True), 2.0)).shape == (0, 5)


def test_atoms_too_close_are_refused():
    with pytest.raises(ValueError, match="0.200 A apart"):
        edges_within(Atoms("H2", [(0, 0, 0), (0, 0, 0.2)], cell=[9] * 3, pbc=True), 2.0)


def test_the_cutoff_is_strict_to_the_last_bit():
    """A neighbour at exactly the cutoff is no edge, whatever way the sum of its vector rounds."""
    atoms = ase.build.bulk("Si", "diamond", a=5.431)
    lengths = np.unique(edges_within(atoms, 9.0).distances)
    for cutoff in lengths:
        edges = edges_within(atoms, cutoff)
        assert (edges.distances < cutoff).all()
