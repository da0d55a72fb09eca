"""From a graph and a reference to what the network takes, and from what it gives to what errors are taken of."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import Network
from ..graph.coupling import Coupling
from ..graph.dataset import Graph
from ..graph.reference import Reference
from ..model.network import AtomInputs, HamiltonianNetwork, Inputs, PairInputs
from ..model.rotations import layout
from ..units import hartree_to_mev


@dataclass
class Example:
    """A structure with targets: offsite {(s_i, s_j): (G, n)} in edge frames, onsite {s: (A_s, n)}, Hartree."""

    inputs: Inputs
    offsite: dict
    onsite: dict


def build_network(network: Network, reference: Reference) -> HamiltonianNetwork:
    """The network for the elements, basis and cutoff of a reference. lmax "auto" is the highest L blocks couple to."""
    elements = sorted(reference.basis)
    coupling = Coupling(reference.basis)
    slots = {
        (s_i, s_j): {L: len(pairs) for L, pairs in coupling[z_i, z_j].slots.items()}
        for s_i, z_i in enumerate(elements)
        for s_j, z_j in enumerate(elements)
    }
    lmax = coupling.lmax if network.lmax == "auto" else network.lmax
    return HamiltonianNetwork(lmax, len(elements), reference.cutoff_angstrom, slots, network.model_dump(exclude={"lmax"}))


def graph_inputs(graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, chunk: int = 768) -> Inputs:
    """Tensors of a graph. chunk: edges that are processed together, rounded to whole destinations."""
    elements = sorted(reference.basis)
    coupling = Coupling(reference.basis)
    species = np.searchsorted(elements, graph.atoms.numbers)
    degrees = np.bincount(graph.edges[:, 0], minlength=len(graph.atoms))
    spans = _spans(degrees, chunk)
    inputs = Inputs(
        torch.from_numpy(species),
        torch.from_numpy(graph.edges[:, 1].copy()),
        torch.from_numpy(graph.edges[:, 0].copy()),
        torch.from_numpy(graph.distances).to(dtype),
        layout(lmax).rotations(graph.vectors, dtype),
        degrees.tolist(),
        spans,
        n_species=len(elements),
    )
    row = np.empty(len(graph.edges), np.int64)  # of an edge among those of its pair of elements
    groups = {pair: graph.edges_of(*pair) for pair in graph.species_pairs()}
    for edges in groups.values():
        row[edges] = np.arange(len(edges))
    for (z_i, z_j), edges in groups.items():
        pair = coupling[z_i, z_j]
        index, sign = pair.edge_adjoint
        scale = reference.offsite_scale(z_i, z_j, graph.distances[edges])[:, pair.slot]
        ends = np.searchsorted(edges, [[first, last] for first, last, _, _ in spans]).tolist()
        inputs.pairs[elements.index(z_i), elements.index(z_j)] = PairInputs(
            torch.from_numpy(edges),
            [slice(*e) for e in ends],
            torch.from_numpy(row[graph.reverse[edges]]),
            torch.from_numpy(index),
            torch.from_numpy(sign).to(dtype),
            torch.from_numpy(scale).to(dtype),
        )
    for s, z in enumerate(elements):
        if (atoms := graph.atoms_of(z)).size:
            pair = coupling[z, z]
            index, sign = pair.adjoint
            scale = reference.onsite_scale[z][pair.slot]
            inputs.atoms_of[s] = AtomInputs(
                torch.from_numpy(atoms),
                torch.from_numpy(index),
                torch.from_numpy(sign).to(dtype),
                torch.from_numpy(scale).to(dtype),
            )
    return inputs


def _spans(degrees: np.ndarray, size: int) -> list[tuple[int, int, int, int]]:
    """(first edge, last, first atom, last) of whole destinations, each of about `size` edges, at least one atom."""
    ends = np.concatenate([[0], np.cumsum(degrees)])
    chunks, atom = [], 0
    while atom < len(degrees):
        last = max(atom + 1, int(np.searchsorted(ends, ends[atom] + size, side="right")) - 1)
        chunks.append((int(ends[atom]), int(ends[last]), atom, last))
        atom = last
    return chunks


def example(graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, chunk: int = 768) -> Example:
    elements = sorted(reference.basis)
    offsite = {
        (elements.index(z_i), elements.index(z_j)): torch.from_numpy(t).to(dtype) for (z_i, z_j), t in graph.offsite.items()
    }
    onsite = {elements.index(z): torch.from_numpy(t).to(dtype) for z, t in graph.onsite.items()}
    return Example(graph_inputs(graph, reference, lmax, dtype, chunk), offsite, onsite)


def differences_mev(predicted: tuple[dict, dict], example: Example) -> tuple[Tensor, Tensor]:
    """Prediction less target of all offsite and of all onsite components, flat, meV."""
    offsite, onsite = predicted
    off = [(offsite[key] - target).flatten() for key, target in example.offsite.items()]
    on = [(onsite[key] - target).flatten() for key, target in example.onsite.items()]
    empty = next(iter(example.onsite.values())).new_zeros(0)
    return hartree_to_mev(torch.cat([*off, empty])), hartree_to_mev(torch.cat([*on, empty]))
