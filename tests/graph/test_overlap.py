import numpy as np
import pytest
from pyscf import gto

from hamscale.graph.overlap import overlap_table
from hamscale.operators import Operators
from hamscale.units import angstrom_to_bohr
from helpers import DZVP, basis_of, hafnia

BASIS = basis_of(Ga=DZVP, O=DZVP)


def _integrals(z_i, z_j, vector):
    """One block from PySCF directly, its p orbitals put from x, y, z to y, z, x."""
    molecules, order = [], []
    for z, position in ((z_i, np.zeros(3)), (z_j, vector)):
        element = BASIS[z]
        shells = [[l, *np.column_stack([e, c]).tolist()] for l, e, c in element.shells]
        molecules.append(
            gto.M(atom=[("He", angstrom_to_bohr(position))], basis={"He": shells}, unit="Bohr", spin=None, verbose=0)
        )
        start, index = 0, []
        for l in element.l:  # already ascending in these sets
            index += [start + m for m in ([1, 2, 0] if l == 1 else range(2 * l + 1))]
            start += 2 * l + 1
        order.append(index)
    return gto.intor_cross("int1e_ovlp_sph", *molecules)[np.ix_(*order)]


@pytest.mark.parametrize("pair", [(31, 31), (31, 8), (8, 31), (8, 8)])
@pytest.mark.parametrize("vector", [(0.31, -1.2, 0.7), (0, 0, 1.0137), (0, 0, -2.5), (-1.7, 0, 0), (3.1, 4.2, -2.2)])
def test_blocks_are_the_integrals(pair, vector):
    blocks = overlap_table(BASIS).blocks(*pair, np.array([vector], dtype=float))
    assert np.abs(blocks.reshape(-1) - _integrals(*pair, np.array(vector, dtype=float)).reshape(-1)).max() < 1e-10


def test_orbitals_are_normalised():
    diagonal = overlap_table(BASIS).blocks(31, 31, np.zeros((1, 3))).reshape(25, 25).diagonal()
    np.testing.assert_allclose(diagonal, 1, atol=1e-6)


def test_nothing_that_overlaps_is_left_out(szv):
    """Pairs beyond those listed overlap by less than 1e-8, and S(k) is positive definite."""
    atoms, table = hafnia(), overlap_table(szv)
    pairs = table.pairs(atoms)
    more = table.pairs(atoms, at_least_angstrom=17.0)
    listed = set(map(tuple, pairs.tolist()))
    assert listed < set(map(tuple, more.tolist()))
    numbers, cell = atoms.numbers, np.asarray(atoms.cell)
    for i, j, *R in (p for p in more.tolist() if tuple(p) not in listed):
        vector = atoms.positions[j] + np.array(R) @ cell - atoms.positions[i]
        assert np.abs(table.blocks(numbers[i], numbers[j], vector[None])).max() < 1e-8
    vectors = atoms.positions[pairs[:, 1]] + pairs[:, 2:] @ cell - atoms.positions[pairs[:, 0]]
    S = np.concatenate(
        [table.blocks(numbers[p[0]], numbers[p[1]], v[None])[0] for p, v in zip(pairs, vectors * (np.abs(vectors) > 1e-12))]
    )
    operators = Operators(atoms, szv, pairs, np.zeros_like(S), S)
    assert np.linalg.eigvalsh(operators.at_k((0.1, 0.2, 0.3))[1])[0] > 0.05
