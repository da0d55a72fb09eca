"""H and S of any structure from a trained network, or from the reference alone."""

import time
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from .analysis.levels import UNKNOWN
from .analysis.spectra import find_levels
from .angular import edge_rotations
from .config import Analysis
from .graph.crystal_field import shifted
from .graph.dataset import Graph, structure_graph
from .graph.overlap import overlap_table, two_centre_blocks
from .graph.reference import Reference
from .operators import (
    SHARD,
    Operators,
    canonical_pairs,
    group_by_species,
    is_onsite,
    join_shards,
    match_pairs,
    pair_vectors,
    read_operators,
    rows_of_elements,
    store_levels,
    write_pieces,
)
from .parallel.env import World
from .stream import forward_in_parts
from .structures import wrap_as_cp2k
from .train.checkpoint import load_model
from .train.ranks import rank_part
from .train.tensors import graph_inputs
from .units import hartree_to_mev

STREAMED = 1 << 22  # values written at a time
LONGER = 2.0  # a structure so many times as long as the longest training cell is warned of
LARGEST_DENSE = 2000  # orbitals of which band edges are found while predicting; `hamscale dos` finds those of more
K_GRID = Analysis(kgrid_length_angstrom=20)


@dataclass
class Prediction:
    """H and S of a structure, or of a rank's rows of it, before they are put together.

    pieces() makes them, operators() in memory, write() into a file. offsite: coupled residuals, as `assemble` takes them; onsite: coupled blocks;
    shifts: z -> (A_z, n, n) of all atoms of the structure (CrystalField.shifts).
    """

    graph: Graph
    reference: Reference
    pairs: np.ndarray
    offsite: dict
    onsite: dict
    shifts: dict
    attributes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.rows = rows_of_elements(self.graph.atoms.numbers)

    def operators(self) -> Operators:
        atoms, basis = self.graph.atoms, self.reference.basis
        n = int(np.prod(basis.n_orbitals(atoms.numbers)[self.pairs[:, :2]], axis=1).sum())
        H, S = np.empty(n), np.empty(n)
        for span, hamiltonian, overlap in self.pieces():
            H[span], S[span] = hamiltonian, overlap
        return Operators(atoms, basis, self.pairs, H, S, self.attributes)

    def write(self, path, world: World = World(), analysis: Analysis = K_GRID):  # noqa: B008
        """Write `operators/1`, a piece at a time: neither H nor S is ever whole in memory.

        With several ranks, each writes a shard, PATH.shards/rank-N.h5, and the first then the file that reads as all of them.
        Band edges are found on the k-grid of the analysis where there are no more than LARGEST_DENSE orbitals.
        """
        atoms, basis, path = self.graph.atoms, self.reference.basis, Path(path)
        self.attributes |= UNKNOWN
        if world.size == 1:
            write_pieces(path, atoms, basis, self.pairs, self.pieces(), self.attributes)
        else:
            shards = [path.with_name(f"{path.name}.shards") / f"rank-{rank}.h5" for rank in range(world.size)]
            write_pieces(shards[world.rank], atoms, basis, self.pairs, self.pieces(), self.attributes, schema=SHARD)
            world.barrier()
            if world.is_root:
                join_shards(path, shards, self.attributes)
        if world.is_root and basis.n_orbitals(atoms.numbers).sum() <= LARGEST_DENSE:
            _add_levels(path, analysis)
        world.barrier()

    def pieces(self):
        """Yields (slice of the values, H in Hartree, S) in the order of the pairs, blocks whole.

        A block and its transposed one are made from the lesser of the two pairs, so that both matrices are Hermitian to the last
        bit. A pair that is not in offsite, and every pair beyond the cutoff, is the reference.
        """
        started = time.time()
        graph, basis = self.graph, self.reference.basis
        orbitals = basis.n_orbitals(graph.atoms.numbers)
        offsets = np.concatenate([[0], np.cumsum(np.prod(orbitals[self.pairs[:, :2]], axis=1))])
        lesser, turned = canonical_pairs(self.pairs)
        rows, atom_rows = graph.rows(match_pairs(self.pairs, graph.edges)), graph.atom_rows()
        bounds = np.unique(np.searchsorted(offsets, np.arange(0, offsets[-1] + STREAMED, STREAMED)).clip(max=len(lesser)))
        for first, last in pairwise(bounds):
            within = offsets[first : last + 1] - offsets[first]
            H, S = np.empty(within[-1]), np.empty(within[-1])
            for z_i, z_j, blocks, index in group_by_species(graph.atoms.numbers, orbitals, lesser[first:last], within):
                of = first + blocks
                h, s = self._blocks(z_i, z_j, lesser[of], turned[of], rows[of], atom_rows)
                shape = (-1, basis[z_i].n_orbitals, basis[z_j].n_orbitals)
                for values, block in ((H, h), (S, s)):
                    transposed = block.reshape(shape).transpose(0, 2, 1).reshape(index.shape)
                    values[index] = np.where(turned[of, None], transposed, block)
            yield slice(int(offsets[first]), int(offsets[last])), H, S
        self.attributes["wall_seconds"] = self.attributes.get("wall_seconds", 0.0) + time.time() - started

    def _blocks(self, z_i: int, z_j: int, pairs, turned, rows, atom_rows):
        """H and S of pairs of two elements, (G, n_i * n_j) each.

        rows: where the edge of the pair, of the reversed pair if turned, stands in offsite; -1 beyond the cutoff.
        """
        reference = self.reference
        coupling, vectors = reference.coupling[z_i, z_j], pair_vectors(self.graph.atoms, pairs)
        S = overlap_table(reference.basis).blocks(z_i, z_j, vectors)
        H, own = np.empty_like(S), is_onsite(pairs)
        if own.any():
            coupled = self.onsite[z_i][atom_rows[pairs[own, 0]]]
            H[own] = coupling.blocks(coupled)
            n = reference.basis[z_i].n_orbitals
            for values in (H, S):
                square = values[own].reshape(-1, n, n)
                values[own] = ((square + square.transpose(0, 2, 1)) / 2).reshape(-1, n * n)
        far = ~own
        if far.any():
            distances = np.linalg.norm(vectors[far], axis=1)
            i, j = self.rows[pairs[far, :2]].T
            H[far] = two_centre_blocks(coupling, reference.offsite(z_i, z_j, distances), vectors[far])
            H[far] += shifted(S[far], self.shifts[z_i][i], self.shifts[z_j][j])
        near = far & (rows >= 0)
        if (z_i, z_j) in self.offsite and near.any():
            framed = np.empty((near.sum(), coupling.size))
            straight, index_sign = ~turned[near], coupling.edge_adjoint
            framed[straight] = self.offsite[z_i, z_j][rows[near][straight]]
            framed[~straight] = self.offsite[z_j, z_i][rows[near][~straight]][:, index_sign[0]] * index_sign[1]
            rest = coupling.rotate(framed, edge_rotations(vectors[near], max(coupling.slots)), inverse=True)
            H[near] += coupling.blocks(rest)
        return H, S


def predict(
    model_directory,
    atoms: Atoms,
    reference_only: bool = False,
    dtype=torch.float32,
    world: World = World(),  # noqa: B008
    exchange: str = "torch",
) -> Prediction:
    """H and S of any structure, Hermitian by construction, in the reference's energy gauge; of several ranks each has its rows.

    H: the reference on all pairs, plus the mean of what the model's networks give within their cutoff; attribute onsite_spread_mev: how much
    they differ (standard deviation, root mean square over onsite components), which grows with the error, if less. S: exact two-centre
    integrals, so that eigenvalues need no DFT. The pairs are those that overlap by more than 1e-8 or lie within the cutoff.
    Raises ValueError if the structure holds an element, or a kind of periodicity, that the model was not trained on; warns of one that is
    more than twice as long as the longest training cell.
    """
    started = time.time()
    networks, reference = load_model(model_directory)
    _check_known(atoms, reference, model_directory)
    if world.is_root:
        _warn_of_length(atoms, reference)
    graph = structure_graph(wrap_as_cp2k(atoms), reference.basis, reference.cutoff_angstrom)
    halo = swap = None
    if world.size > 1:
        graph, halo, swap = rank_part(graph, reference, world, world.size, exchange=exchange)
    graph.crystal_field = reference.crystal_field.of_graph(graph)
    attributes = {
        "source": "reference" if reference_only else "predicted",
        "model": Path(model_directory).name,
        "cutoff_angstrom": reference.cutoff_angstrom,
        "longest_training_cell_angstrom": reference.longest_cell_angstrom,
    }
    offsite, onsite = {}, {}
    if not reference_only:
        networks = [network.to(world.device, dtype) for network in networks]
        if world.size == 1:
            offsite, of_networks = forward_in_parts(networks, graph, reference, dtype)
        else:
            offsite, of_networks = _forward_on_ranks(networks, graph, reference, dtype, halo, swap)
        onsite = {z: values.mean(0) for z, values in of_networks.items()}
        if len(networks) > 1:
            variances = [np.var(values, axis=0, ddof=1, dtype=np.float64) for values in of_networks.values()]
            sums = [sum(v.sum() for v in variances), sum(v.size for v in variances)]
            total, count = world.sum(torch.tensor(sums, dtype=torch.float64, device=world.device)).tolist()
            attributes["onsite_spread_mev"] = hartree_to_mev((total / count) ** 0.5)
    prediction = assemble(graph, reference, offsite, onsite, world)
    prediction.attributes = attributes | {"wall_seconds": time.time() - started}
    return prediction


@torch.inference_mode()
def _forward_on_ranks(networks, graph: Graph, reference: Reference, dtype, halo, swap) -> tuple[dict, dict]:
    """What `forward_in_parts` gives, of a rank's part."""
    device, elements = next(networks[0].parameters()).device, sorted(reference.basis)
    inputs = graph_inputs(graph, reference, networks[0].lmax, dtype, halo=halo).to(device)
    means, onsite = {}, {}
    for network in networks:
        offsite, of_network = network(inputs, swap)
        for pair, values in offsite.items():
            values /= len(networks)
            means[pair] = means[pair].add_(values) if pair in means else values
        for s, values in of_network.items():
            onsite.setdefault(elements[s], []).append(values.cpu().numpy())
    offsite = {(elements[i], elements[j]): v.cpu().numpy() for (i, j), v in means.items()}
    return offsite, {z: np.stack(of_networks) for z, of_networks in onsite.items()}


def assemble(graph: Graph, reference: Reference, offsite: dict, onsite: dict, world: World = World()) -> Prediction:  # noqa: B008
    """From coupled residuals: offsite (z_i, z_j) -> (G, n) in edge frames, onsite z -> (A_z, n), Hartree."""
    pairs = overlap_table(reference.basis).pairs(graph.atoms, at_least_angstrom=graph.cutoff_angstrom)
    mine = np.zeros(len(graph.atoms), bool)
    mine[graph.owned] = True
    pairs = pairs[mine[pairs[:, 0]]]
    blocks, shifts = dict(reference.crystal_field.known_of(graph)), {}
    for z in np.unique(graph.atoms.numbers).tolist():
        atoms, here = np.flatnonzero(graph.atoms.numbers == z), graph.atoms_of(z)
        # bonds reach atoms of other ranks, also beyond the cutoff: every rank has the reference of all
        whole = torch.zeros(len(atoms), reference.coupling[z, z].size, dtype=torch.float64, device=world.device)
        if len(here):
            whole[torch.from_numpy(np.searchsorted(atoms, here))] = torch.from_numpy(blocks[z]).to(world.device)
        shifts[z] = reference.crystal_field.shifts(z, world.sum(whole).cpu().numpy())
    for z, rest in onsite.items():
        blocks[z] = blocks[z] + rest
    return Prediction(graph, reference, pairs, offsite, blocks, shifts)


def _add_levels(path: Path, analysis: Analysis):
    try:
        levels = find_levels(read_operators(path), analysis)
    except ValueError as error:  # S that is not positive definite: the matrices are worth having all the same
        warnings.warn(f"{path}: no band edges: {error}", stacklevel=2)
        return
    store_levels(path, levels.attributes())


def _warn_of_length(atoms: Atoms, reference: Reference):
    longest, trained = float(atoms.cell.lengths().max()), reference.longest_cell_angstrom
    if atoms.pbc.all() and longest > LONGER * trained:
        warnings.warn(
            f"the structure is {longest:.1f} A long, the longest training cell {trained:.1f} A: no training cell held potentials of so "
            "long a wave. Compare the slabs of a long structure with DFT (`hamscale evaluate`), or train on longer cells.",
            stacklevel=3,
        )


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
