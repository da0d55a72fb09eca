"""H and S of any structure from a trained network, or from the two-centre reference alone."""

import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from .angular import edge_rotations
from .graph.dataset import Graph, structure_graph
from .graph.overlap import overlap_table, two_centre_blocks
from .graph.reference import Reference
from .operators import Operators, group_by_species, is_onsite, match_pairs, pair_vectors
from .structures import wrap_as_cp2k
from .train.checkpoint import load_model
from .train.tensors import graph_inputs


def predict(model_directory, atoms: Atoms, reference_only: bool = False, dtype=torch.float32) -> Operators:
    """H and S of a structure, Hermitian by construction, in the reference's energy gauge.

    H: two-centre reference on all pairs, plus the network's output within its cutoff. S: exact two-centre integrals, so that
    eigenvalues need no DFT. The pairs are those that overlap by more than 1e-8 or lie within the cutoff.
    Raises ValueError if the structure holds an element, or a kind of periodicity, that the model was not trained on.
    """
    started = time.time()
    model, reference = load_model(model_directory)
    _check_known(atoms, reference, model_directory)
    atoms = wrap_as_cp2k(atoms)
    graph = structure_graph(atoms, reference.basis, reference.cutoff_angstrom)
    offsite, onsite = {}, {}
    if not reference_only:
        model = model.to(dtype)
        with torch.inference_mode():
            offsite, onsite = model(graph_inputs(graph, reference, model.lmax, dtype))
    elements = sorted(reference.basis)
    operators = assemble(
        graph,
        reference,
        {(elements[i], elements[j]): v.double().numpy() for (i, j), v in offsite.items()},
        {elements[s]: v.double().numpy() for s, v in onsite.items()},
    )
    operators.attributes = {
        "source": "reference" if reference_only else "predicted",
        "model": Path(model_directory).name,
        "cutoff_angstrom": reference.cutoff_angstrom,
        "wall_seconds": time.time() - started,
    }
    return operators


def _check_known(atoms: Atoms, reference: Reference, where):
    unknown = sorted(set(atoms.numbers.tolist()) - set(reference.basis))
    if unknown:
        raise ValueError(
            f"{where}: the structure holds {', '.join(chemical_symbols[z] for z in unknown)}, but the model was trained on "
            f"{', '.join(e.element for e in reference.basis.values())} only. Train a model on a material with these elements."
        )
    if bool(atoms.pbc.all()) != reference.periodic:
        raise ValueError(
            f"{where}: the structure is {'' if atoms.pbc.all() else 'not '}periodic, the model was trained on structures that "
            f"{'are' if reference.periodic else 'are not'}: their energies have different zeros."
        )


def assemble(graph: Graph, reference: Reference, offsite: dict, onsite: dict) -> Operators:
    """Operators from coupled residuals: offsite (z_i, z_j) -> (G, n) in edge frames, onsite z -> (A_z, n), Hartree.

    A pair that is not in offsite, and every pair beyond the cutoff, is the two-centre reference.
    """
    atoms, basis = graph.atoms, reference.basis
    overlap = overlap_table(basis)
    pairs = overlap.pairs(atoms, at_least_angstrom=graph.cutoff_angstrom)
    orbitals = basis.n_orbitals(atoms.numbers)
    offsets = np.concatenate([[0], np.cumsum(orbitals[pairs[:, 0]] * orbitals[pairs[:, 1]])])
    H, S = np.empty(offsets[-1]), np.empty(offsets[-1])
    self_pair = is_onsite(pairs)
    rows, atom_rows = graph.rows(match_pairs(pairs, graph.edges)), graph.atom_rows()
    for z_i, z_j, blocks, index in group_by_species(atoms.numbers, orbitals, pairs, offsets):
        coupling = reference.coupling[z_i, z_j]
        vectors = pair_vectors(atoms, pairs[blocks])
        S[index] = overlap.blocks(z_i, z_j, vectors)
        own = self_pair[blocks]
        if own.any():
            coupled = np.zeros((own.sum(), coupling.size))
            coupled[:, coupling.zero_order] = reference.onsite_mean[z_i]
            if z_i in onsite:
                coupled += onsite[z_i][atom_rows[pairs[blocks[own], 0]]]
            H[index[own]] = coupled @ coupling.transform.T
        far = ~own
        if far.any():
            distances = np.linalg.norm(vectors[far], axis=1)
            H[index[far]] = two_centre_blocks(coupling, reference.offsite(z_i, z_j, distances), vectors[far])
        near = far & (rows[blocks] >= 0)
        if (z_i, z_j) in offsite and near.any():
            rotations = edge_rotations(vectors[near], max(coupling.slots))
            rest = coupling.rotate(offsite[z_i, z_j][rows[blocks[near]]], rotations, inverse=True)
            H[index[near]] += rest @ coupling.transform.T
    operators = Operators(atoms, basis, pairs, H, S)
    # equal sums in another order differ in the last bit: make both matrices exactly Hermitian
    operators.make_hermitian(operators.hamiltonian)
    operators.make_hermitian(operators.overlap)
    return operators
