"""Find the errors of H that change eigenvalues: directions in the space of coupled components, from the states of DFT.

To first order an error dH changes eigenvalue n at k by v^+ dH(k) v, with H(k) v = e S(k) v and v^+ S(k) v = 1. This is a
linear function of the blocks,

    d e_n(k) = sum_ijR sum_ab dH_ijR[a, b] Re(conj(v_ia) v_jb exp(2 pi i k.R))

A structure has thousands of states. A sum over the states of one k with random signs r_n represents all of them: the mean
of its square over the signs is sum_n (d e_n)^2 (M. F. Hutchinson, Commun. Stat. Simul. Comput. 19, 433 (1990)). Signs whose
sum is zero remove the common shift of all states, which is the energy gauge.
"""

import numpy as np

from ..angular import edge_rotations
from ..basis import ElementBasis
from ..operators import Operators
from ..pairs import ByElement, ByPair
from ..workers import eigh
from .coupling import Coupling
from .graph import Graph


def eigenvalue_directions(operators: Operators, graph: Graph, count: int, seed: int = 0) -> tuple[ByPair, ByElement]:
    """Compute `count` directions, each at a random k, that project errors of H onto errors of eigenvalues.

    Returns (offsite (z_i, z_j) -> (count, G, n) in edge frames, onsite z -> (count, A_z, n)), with components in the order
    of the targets.
    The product of a direction with the errors of coupled components, squared and averaged over directions, estimates the
    mean square error of eigenvalues less their common shift. The states are the occupied ones and a quarter as many above
    them.
    """
    random, occupied = np.random.default_rng(seed), operators.n_electrons // 2
    states = min(operators.n_orbitals, occupied + max(1, occupied // 4))
    states *= operators.spins
    signs = random.choice([-1.0, 1.0], (count, states))
    kpoints = random.random((count, 3)) * graph.atoms.pbc
    return directions(operators, graph, kpoints, (signs - signs.mean(1, keepdims=True)) / states**0.5)


def directions(operators: Operators, graph: Graph, kpoints: np.ndarray, signs: np.ndarray) -> tuple[ByPair, ByElement]:
    """Compute the weights of errors of H components in sum_n signs_n d e_n(k), for every k.

    kpoints (D, 3) with their signs (D, states), or (D, 2 states), first of spin up. The errors of offsite (G, n) and onsite
    (A_z, n) components are multiplied with the weights and summed. Returns the weights of the offsite components, (D, G, n),
    and of the onsite components, (D, A_z, n).
    """
    coupling, basis, numbers = Coupling(graph.basis, operators.spins), graph.basis, graph.atoms.numbers
    starts = np.cumsum(basis.n_orbitals(numbers)) - basis.n_orbitals(numbers)
    densities: list[list[np.ndarray]] = []  # of every k, one matrix for each spin
    for k, of_k in zip(kpoints, signs):
        densities.append([])
        for spin, of_spin in enumerate(np.split(of_k, operators.spins)):
            v = eigh(*operators.at_k(k, spin), subset_by_index=(0, len(of_spin) - 1))[1]
            densities[-1].append((v.conj() * of_spin) @ v.T)
    offsite, onsite = {}, {}
    for key in graph.elements:
        of_pair, pair = graph.edges.between(*key), coupling[key]
        edges, turns = graph.edges[of_pair], edge_rotations(graph.edges.vectors[of_pair], max(pair.slots))
        offsite[key] = np.empty((len(kpoints), len(edges), pair.size), np.float32)
        for m, (k, of_spins) in enumerate(zip(kpoints, densities)):
            blocks = _blocks(of_spins, starts[edges[:, 0]], starts[edges[:, 1]], basis[key[0]], basis[key[1]])
            blocks = (blocks * np.exp(2j * np.pi * edges[:, 2:] @ k)[:, None]).real
            offsite[key][m] = pair.rotate(blocks @ pair.transform, turns)
    for z in np.unique(numbers).tolist():
        at, pair = starts[graph.atoms_of(z)], coupling[z, z]
        of_densities = [_blocks(of_spins, at, at, basis[z], basis[z]).real @ pair.transform for of_spins in densities]
        onsite[z] = np.array(of_densities, np.float32)
    return offsite, onsite


def _blocks(
    densities: list[np.ndarray], rows: np.ndarray, columns: np.ndarray, first: ElementBasis, second: ElementBasis
) -> np.ndarray:
    """Extract the blocks of pairs of atoms from the dense density matrix of each spin, (G, spins * n_i * n_j)."""
    i = rows[:, None, None] + np.arange(first.n_orbitals)[:, None]
    j = columns[:, None, None] + np.arange(second.n_orbitals)
    return np.concatenate([of_spin[i, j].reshape(len(rows), first.n_orbitals * second.n_orbitals) for of_spin in densities], 1)
