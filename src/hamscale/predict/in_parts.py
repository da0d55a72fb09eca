"""Run the forward pass of the network in bounded memory: some atoms and the edges into them at a time, layer after layer.

Between layers only the features of atoms are kept, (A, K, C) each. The features of the edges, of which there are hundreds
of times as many, follow from them edge by edge and are recomputed for every layer. In addition the memory holds the
read-out of all edges and the tensors of one piece. If ranks share the structure, these are the edges into a rank's own atoms,
and the features of atoms are exchanged after every layer, as in one pass over all edges.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from ..graph.coupling import Coupling
from ..graph.graph import Graph
from ..graph.reference import Reference
from ..inputs.tensors import flipped_rows, piece_inputs
from ..model.network import Exchange, HamiltonianNetwork, Inputs, NoExchange
from ..model.readout import hermitian_mean
from ..pairs import ByElement, ByPair
from ..partition.halo import Halo

EDGES_AT_ONCE = 1 << 17


@torch.inference_mode()
def forward_in_parts(
    networks: list[HamiltonianNetwork],
    graph: Graph,
    reference: Reference,
    dtype: torch.dtype = torch.float32,
    edges_at_once: int = EDGES_AT_ONCE,
    halo: Halo | None = None,
    exchange: Exchange = NoExchange(),  # noqa: B008
) -> tuple[ByPair, ByElement]:
    """Compute the output of networks for a graph, or for a rank's part of one, as numpy arrays, Hartree.

    Returns their mean offsite (z_i, z_j) -> (G, n), and onsite z -> (networks, A_z, n).
    The result equals that of one pass of each network up to rounding, for any value of edges_at_once.
    halo, exchange: those of the part (inputs.ranks.RankPart).
    """
    elements, device = sorted(reference.basis), next(networks[0].parameters()).device
    # computed for all atoms at once, because charges act beyond any piece
    crystal_field = reference.crystal_field.known_of(graph)
    known = graph.owned if halo is None else np.concatenate([graph.owned, halo.ghosts])
    row = np.full(len(graph.atoms), -1)
    row[known] = np.arange(len(known))
    species = torch.from_numpy(np.searchsorted(elements, graph.atoms.numbers[known])).to(device)
    lmax, layers = networks[0].lmax, len(networks[0].node_updates)
    features = [[network.embed(species)] for network in networks]  # for each network, those after each layer
    is_first = halo is None or halo.rank == 0
    bar = tqdm(desc="edges", total=(layers + 1) * len(graph.edges), unit_scale=True, disable=None if is_first else True)

    def pieces() -> Iterator[tuple[Inputs, torch.Tensor]]:
        """Yield the tensors of each piece and the rows of its atoms, first those whose edges it has."""
        for piece, sources in _pieces(graph, crystal_field, edges_at_once):
            rows = torch.from_numpy(row[np.concatenate([piece.owned, sources])])
            yield piece_inputs(piece, reference, lmax, dtype, sources).to(device), rows.to(device)
            bar.update(len(piece.edges))

    for layer in range(layers):
        for x in features:
            x.append(x[0].new_empty(len(graph.owned), *x[0].shape[1:]))
        for inputs, rows in pieces():
            for network, x in zip(networks, features):
                local = [values[rows] for values in x[: layer + 1]]
                nodes = network.next_nodes(layer, inputs, local[-1], _edge_features(network, inputs, local))
                x[-1][rows[: inputs.atoms]] = nodes
        for x in features:
            x[-1] = exchange(x[-1])
    coupling, kept = reference.coupling, torch.empty(0, dtype=dtype).numpy().dtype
    offsite = {(a, b): np.zeros((len(graph.edges.between(a, b)), coupling[a, b].size), kept) for a, b in graph.elements}
    own_elements = np.unique(graph.atoms.numbers[graph.owned]).tolist()
    onsite: dict[int, list[list[np.ndarray]]] = {z: [[] for _ in networks] for z in own_elements}
    done = dict.fromkeys(offsite, 0)
    for inputs, rows in pieces():
        for k, (network, x) in enumerate(zip(networks, features)):
            local = [values[rows] for values in x]
            for (s_i, s_j), values in zip(inputs.pairs, _edge_features(network, inputs, local)):
                key = elements[s_i], elements[s_j]
                offsite[key][done[key] : done[key] + len(values)] += (values / len(networks)).cpu().numpy()
            for s, values in network.read_onsite(inputs, local[-1][: inputs.atoms]).items():
                onsite[elements[s]][k].append(values.cpu().numpy())
        for (s_i, s_j), pair in inputs.pairs.items():
            done[elements[s_i], elements[s_j]] += len(pair.edges)
    bar.close()
    read = {(elements.index(a), elements.index(b)): torch.from_numpy(v).to(device) for (a, b), v in offsite.items()}
    theirs = exchange.post_edges(read)()
    partners = {(elements[s_i], elements[s_j]): v.cpu().numpy() for (s_i, s_j), v in theirs.items()}
    offsite = {(elements[s_i], elements[s_j]): v.cpu().numpy() for (s_i, s_j), v in read.items()}  # as others have it
    _make_hermitian(graph, coupling, offsite, flipped_rows(graph, halo), partners)
    return offsite, {z: np.stack([np.concatenate(parts) for parts in of_networks]) for z, of_networks in onsite.items()}


def _edge_features(network: HamiltonianNetwork, inputs: Inputs, x: list[torch.Tensor]) -> list[torch.Tensor]:
    """Recompute the features of edges after a layer from those of atoms: x[0] before the first, x[n] after layer n - 1."""
    edges = network.first_edges(inputs, x[0])
    for layer, nodes in enumerate(x[1:]):
        edges = network.next_edges(layer, inputs, nodes, edges)
    return edges


def _pieces(graph: Graph, crystal_field: ByElement, edges_at_once: int) -> Iterator[tuple[Graph, np.ndarray]]:
    """Yield (piece, the sources of its edges that it does not own), in the order of the owned atoms."""
    owned = graph.owned
    ends = np.append(np.searchsorted(graph.edges[:, 0], owned), len(graph.edges))
    first = 0
    while first < len(owned):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + edges_at_once, side="right")) - 1)
        edges, atoms = graph.edges.take(slice(ends[first], ends[last])), owned[first:last]
        spans = {z: slice(*np.searchsorted(graph.atoms_of(z), [atoms[0], atoms[-1] + 1])) for z in crystal_field}
        own = {z: crystal_field[z][span] for z, span in spans.items()}
        piece = replace(graph, edges=edges, owned=atoms, offsite={}, onsite={}, crystal_field=own)
        yield piece, np.setdiff1d(edges[:, 1], atoms)
        first = last


def _make_hermitian(graph: Graph, coupling: Coupling, offsite: ByPair, flipped: np.ndarray, partners: ByPair) -> None:
    """Replace each block by the mean of itself and the adjoint of (j, i, -R), in place, some blocks at a time.

    flipped (E,): `flipped_rows`. partners: blocks of the flipped edges that other ranks own.
    """
    for a, b in graph.elements:
        others, n = flipped[graph.edges.between(a, b)], len(offsite[b, a])
        (to_own, sign), (to_other, other_sign) = coupling[a, b].edge_adjoint, coupling[b, a].edge_adjoint

        def mean(rows: np.ndarray, partner: np.ndarray) -> np.ndarray:
            read = torch.from_numpy(offsite[a, b][rows])  # noqa: B023
            adjoint = torch.from_numpy(to_own), torch.from_numpy(sign).to(read.dtype)  # noqa: B023
            return hermitian_mean(read, torch.from_numpy(partner), *adjoint).numpy()

        for first in range(0, len(others), EDGES_AT_ONCE):
            other = others[first : first + EDGES_AT_ONCE]
            own = first + np.arange(len(other))
            cut = other >= n
            if cut.any():
                offsite[a, b][own[cut]] = mean(own[cut], partners[b, a][other[cut] - n])
            once = ~cut & (own < other if a == b else a < b)  # the mean is written to both blocks
            own, other = own[once], other[once]
            values = mean(own, offsite[b, a][other])
            offsite[a, b][own], offsite[b, a][other] = values, values[:, to_other] * other_sign
