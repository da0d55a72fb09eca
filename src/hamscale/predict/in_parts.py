"""Run the forward pass of the network in bounded memory: some atoms and the edges into them at a time, layer after layer.

Between layers only the features of atoms are kept, (A, K, C) each. The features of the edges, of which there are hundreds
of times as many, follow from them edge by edge and are recomputed for every layer. In addition the memory holds the
read-out of all edges and the tensors of one piece.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ..graph.coupling import Coupling
from ..graph.graph import Graph
from ..graph.reference import Reference
from ..inputs.tensors import piece_inputs
from ..model.network import HamiltonianNetwork, Inputs
from ..model.readout import hermitian_mean
from ..pairs import ByElement, flip

EDGES_AT_ONCE = 1 << 17


@torch.inference_mode()
def forward_in_parts(
    networks: list[HamiltonianNetwork],
    graph: Graph,
    reference: Reference,
    dtype: torch.dtype = torch.float32,
    edges_at_once: int = EDGES_AT_ONCE,
) -> tuple[dict, dict]:
    """Compute the output of networks for a whole graph, as numpy arrays, Hartree.

    Returns their mean offsite (z_i, z_j) -> (G, n), and onsite z -> (networks, A_z, n).
    The result equals that of one pass of each network up to rounding, for any value of edges_at_once.
    """
    elements, device = sorted(reference.basis), next(networks[0].parameters()).device
    # computed for the whole graph, because charges act beyond any piece
    crystal_field = reference.crystal_field.known_of(graph)
    species = torch.from_numpy(np.searchsorted(elements, graph.atoms.numbers)).to(device)
    lmax, layers = networks[0].lmax, len(networks[0].node_updates)
    features = [[network.embed(species)] for network in networks]  # for each network, those after each layer
    for layer in range(layers):
        for x in features:
            x.append(torch.empty_like(x[0]))
        for piece, known in _pieces(graph, crystal_field, edges_at_once):
            inputs, atoms = _inputs(piece, known, reference, lmax, dtype, device)
            for network, x in zip(networks, features):
                local = [values[atoms] for values in x[: layer + 1]]
                nodes = network.next_nodes(layer, inputs, local[-1], _edge_features(network, inputs, local))
                x[-1][atoms[: inputs.atoms]] = nodes
    coupling, kept = reference.coupling, torch.empty(0, dtype=dtype).numpy().dtype
    offsite = {(a, b): np.zeros((len(graph.edges.between(a, b)), coupling[a, b].size), kept) for a, b in graph.elements}
    onsite: dict[int, list[list[np.ndarray]]] = {z: [[] for _ in networks] for z in np.unique(graph.atoms.numbers).tolist()}
    done = dict.fromkeys(offsite, 0)
    for piece, known in _pieces(graph, crystal_field, edges_at_once):
        inputs, atoms = _inputs(piece, known, reference, lmax, dtype, device)
        for k, (network, x) in enumerate(zip(networks, features)):
            local = [values[atoms] for values in x]
            for (a, b), values in zip(inputs.pairs, _edge_features(network, inputs, local)):
                key = elements[a], elements[b]
                offsite[key][done[key] : done[key] + len(values)] += (values / len(networks)).cpu().numpy()
            for s, values in network.read_onsite(inputs, local[-1][: inputs.atoms]).items():
                onsite[elements[s]][k].append(values.cpu().numpy())
        for (a, b), pair in inputs.pairs.items():
            done[elements[a], elements[b]] += len(pair.edges)
    _make_hermitian(graph, coupling, offsite)
    return offsite, {z: np.stack([np.concatenate(parts) for parts in of_networks]) for z, of_networks in onsite.items()}


def _edge_features(network: HamiltonianNetwork, inputs: Inputs, x: list[torch.Tensor]) -> list[torch.Tensor]:
    """Recompute the features of edges after a layer from those of atoms: x[0] before the first, x[n] after layer n - 1."""
    edges = network.first_edges(inputs, x[0])
    for layer, nodes in enumerate(x[1:]):
        edges = network.next_edges(layer, inputs, nodes, edges)
    return edges


def _pieces(graph: Graph, crystal_field: ByElement, edges_at_once: int) -> Iterator[tuple[Graph, np.ndarray]]:
    """Yield (piece, atoms known to it: its own, then the sources that it does not own), in the order of the atoms."""
    ends = np.searchsorted(graph.edges[:, 0], np.arange(len(graph.atoms) + 1))
    atom = 0
    while atom < len(graph.atoms):
        last = max(atom + 1, int(np.searchsorted(ends, ends[atom] + edges_at_once, side="right")) - 1)
        edges, owned = graph.edges.take(slice(ends[atom], ends[last])), np.arange(atom, last)
        sources = np.unique(edges[:, 1])
        ghosts = sources[(sources < atom) | (sources >= last)]
        spans = {z: slice(*np.searchsorted(graph.atoms_of(z), [atom, last])) for z in crystal_field}
        own = {z: crystal_field[z][span] for z, span in spans.items()}
        piece = replace(graph, edges=edges, owned=owned, offsite={}, onsite={}, crystal_field=own)
        yield piece, np.concatenate([owned, ghosts])
        atom = last


def _inputs(
    piece: Graph, known: np.ndarray, reference: Reference, lmax: int, dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, torch.Tensor]:
    """Build the tensors of a piece, and the atoms known to it, on a device."""
    inputs = piece_inputs(piece, reference, lmax, dtype, known[len(piece.owned) :]).to(device)
    return inputs, torch.from_numpy(known).to(device)


def _make_hermitian(graph: Graph, coupling: Coupling, offsite: dict) -> None:
    """Replace each block by the mean of itself and the adjoint of (j, i, -R), in place, some pairs at a time."""
    rows, flipped = graph.edges.place_in_elements, graph.edges.find(flip(graph.edges.table))
    for first in range(0, len(graph.edges), EDGES_AT_ONCE):
        some = np.arange(first, min(first + EDGES_AT_ONCE, len(graph.edges)))
        some = some[some < flipped[some]]
        numbers = graph.atoms.numbers[graph.edges[some, :2]]
        for a, b in graph.elements:
            of_pair = (numbers == (a, b)).all(1)
            own, other = rows[some[of_pair]], rows[flipped[some[of_pair]]]
            (to_own, sign), (to_other, other_sign) = coupling[a, b].edge_adjoint, coupling[b, a].edge_adjoint
            read, partner = torch.from_numpy(offsite[a, b][own]), torch.from_numpy(offsite[b, a][other])
            mean = hermitian_mean(read, partner, torch.from_numpy(to_own), torch.from_numpy(sign).to(read.dtype)).numpy()
            offsite[a, b][own], offsite[b, a][other] = mean, mean[:, to_other] * other_sign
