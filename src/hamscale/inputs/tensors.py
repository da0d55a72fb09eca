"""Convert a graph and a reference into the input of the network, and its output into differences from the targets."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import Network
from ..graph.graph import Graph
from ..graph.reference import Reference
from ..model.network import AtomInputs, Exchange, HamiltonianNetwork, Inputs, Local, NoExchange, PairInputs, bytes_of, moved
from ..model.rotations import layout
from ..pairs import flip, sort_keys
from ..partition.halo import Halo
from ..units import hartree_to_mev


@dataclass(frozen=True)
class Example:
    """A structure, or a rank's part of it, with its targets.

    offsite {(s_i, s_j): (G, n)} in edge frames, onsite {s: (A_s, n)}, Hartree.
    counts: numbers of offsite and of onsite components of the whole structure.
    edges: number of edges of the whole structure.
    exchange: communication with the ranks that have the other parts.
    halo, blocks: of which the exchange is made, of a rank's part.
    directions: (D, offsite components) and (D, onsite components), whose products with the errors of components are sums of
    errors of eigenvalues (graph/states.py).
    """

    inputs: Inputs
    offsite: dict
    onsite: dict
    counts: tuple[int, int]
    edges: int
    exchange: Exchange = NoExchange()
    halo: Halo | None = None
    blocks: tuple[dict, dict] | None = None
    directions: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str) -> "Example":
        """Return the same example on another device."""
        tensors = {name: moved(getattr(self, name), device) for name in ("offsite", "onsite", "directions")}
        return replace(self, inputs=self.inputs.to(device), **tensors)

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors, bytes."""
        return sum(bytes_of(part) for part in (self.inputs, self.offsite, self.onsite, self.directions))


def build_network(network: Network, reference: Reference) -> HamiltonianNetwork:
    """Build the network for the elements, basis and cutoff of a reference.

    lmax "auto" is the highest L to which blocks couple, and 1 at least: blocks of s shells alone depend on angles too.
    """
    elements = sorted(reference.basis)
    coupling = reference.coupling
    slots = {(s_i, s_j): coupling[z_i, z_j].parities for s_i, z_i in enumerate(elements) for s_j, z_j in enumerate(elements)}
    onsite = {s: coupling[z, z].onsite_parities for s, z in enumerate(elements)}
    lmax = max(1, coupling.lmax) if network.lmax == "auto" else network.lmax
    return HamiltonianNetwork(lmax, len(elements), reference.cutoff_angstrom, slots, onsite, network)


def graph_inputs(
    graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, chunk: int = 768, halo: Halo | None = None
) -> Inputs:
    """Build the tensors of a graph, or of a rank's part of one when `halo` is given.

    chunk: number of edges that are processed together, rounded so that all edges into an atom are in one chunk. Of a rank's
    part, edges whose source is owned are in chunks of their own, which come first.
    """
    ghosts = np.empty(0, np.int64) if halo is None else halo.ghosts
    return _inputs(graph, reference, lmax, dtype, chunk, ghosts, flipped_rows(graph, halo), divided=halo is not None)


def piece_inputs(
    graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, ghosts: np.ndarray, chunk: int = 768
) -> Inputs:
    """Build the tensors of a piece of a graph: some atoms and the edges into them, without pairing blocks and adjoints.

    ghosts: sources of its edges that the piece does not own.
    """
    return _inputs(graph, reference, lmax, dtype, chunk, ghosts, np.full(len(graph.edges), -1))


def _inputs(
    graph: Graph,
    reference: Reference,
    lmax: int,
    dtype: torch.dtype,
    chunk: int,
    ghosts: np.ndarray,
    flipped: np.ndarray,
    divided: bool = False,
) -> Inputs:
    """Build the tensors of a graph from the atoms that it knows and the rows of flipped edges.

    flipped (E,): row of the flipped edge of every edge among those of its elements; -1 if blocks are not paired with their
    adjoints.
    divided: whether edges whose source is owned come first.
    """
    elements, coupling = sorted(reference.basis), reference.coupling
    known = np.concatenate([graph.owned, ghosts])
    row = np.full(len(graph.atoms), -1)
    row[known] = np.arange(len(known))
    source, destination = row[graph.edges[:, 1]], row[graph.edges[:, 0]]
    if (source < 0).any():
        i, j, *R = graph.edges[np.flatnonzero(source < 0)[0]].tolist()
        raise ValueError(
            f"edge ({i}, {j}, {R}) needs atom {j}, which this partition does not send here. Was it made with a smaller cutoff?"
        )
    degrees = np.bincount(destination, minlength=len(graph.owned))
    order, spans, local = None, _spans(degrees, chunk), None
    distances, vectors = graph.edges.distances, graph.edges.vectors
    if divided:
        own = source < len(graph.owned)
        order, n = np.argsort(~own, kind="stable"), int(own.sum())
        of_own = np.bincount(destination[own], minlength=len(degrees))
        spans, others = _spans(of_own, chunk), _spans(degrees - of_own, chunk)
        local = Local(n, len(spans), of_own.tolist(), _offsets(of_own))
        spans = spans + [(first + n, last + n, atom, last_atom) for first, last, atom, last_atom in others]
        source, destination, distances, vectors = (a[order] for a in (source, destination, distances, vectors))
    pairs = _pair_inputs(graph, reference, dtype, flipped, spans, order)
    crystal_field = reference.crystal_field.known_of(graph)
    atoms_of = {}
    for s, z in enumerate(elements):
        if (atoms := graph.atoms_of(z)).size:
            pair = coupling[z, z]
            index, sign = pair.adjoint
            atoms_of[s] = AtomInputs(
                torch.from_numpy(row[atoms]),
                torch.from_numpy(index),
                torch.from_numpy(sign).to(dtype),
                torch.from_numpy(reference.onsite_scale[z][pair.slot]).to(dtype),
                torch.from_numpy(reference.crystal_field.deviation(z, crystal_field[z])).to(dtype),
            )
    species = np.searchsorted(elements, graph.atoms.numbers[known])
    return Inputs(
        torch.from_numpy(species),
        torch.from_numpy(source),
        torch.from_numpy(destination),
        torch.from_numpy(np.column_stack([source, destination]).ravel()),
        torch.from_numpy(species[destination] * len(elements) + species[source]),
        torch.from_numpy(distances).to(dtype),
        layout(lmax).rotations(vectors, dtype),
        degrees.tolist(),
        _offsets(degrees),
        spans,
        pairs,
        atoms_of,
        local=local,
    )


def _pair_inputs(
    graph: Graph, reference: Reference, dtype: torch.dtype, flipped: np.ndarray, spans: list, order: np.ndarray | None
) -> dict[tuple[int, int], PairInputs]:
    """Build the inputs of the edges between any two elements, (s_i, s_j).

    order (E,): row in the graph of each edge, in the order of the spans; None: that is the order of the graph.
    """
    elements, pairs = sorted(reference.basis), {}
    place = None if order is None else np.argsort(order)
    for z_i, z_j in graph.elements:
        edges, pair = graph.edges.between(z_i, z_j), reference.coupling[z_i, z_j]
        index, sign = pair.edge_adjoint
        of_spans, places, rows = edges, edges, None
        if place is not None:
            by_place = np.argsort(place[edges])
            of_spans, rows = edges[by_place], torch.from_numpy(np.argsort(by_place))
            places = place[of_spans]
        scale = torch.from_numpy(reference.offsite_scale(z_i, z_j, graph.edges.distances[of_spans])).to(dtype)
        ends = np.searchsorted(places, [[first, last] for first, last, *_ in spans]).tolist()
        pairs[elements.index(z_i), elements.index(z_j)] = PairInputs(
            torch.from_numpy(places),
            [slice(*e) for e in ends],
            torch.from_numpy(flipped[edges]),
            torch.from_numpy(index),
            torch.from_numpy(sign).to(dtype),
            scale[:, torch.from_numpy(pair.slot)],
            rows,
        )
    return pairs


@dataclass
class CutEdges:
    """Edges whose source is owned by another rank.

    edges (N,): rows of these edges, by neighbour, then in the order of the edges.
    neighbour (N,): the rank that owns the source.
    partners (N,): the same edges in the order in which their flipped edges arrive: by neighbour, then as that rank orders
    them.
    """

    edges: np.ndarray
    neighbour: np.ndarray
    partners: np.ndarray


def _cut_edges(graph: Graph, halo: Halo) -> CutEdges:
    owner = np.full(len(graph.atoms), -1)
    for neighbour, span in halo.receive.items():
        owner[halo.ghosts[span]] = neighbour
    neighbour = owner[graph.edges[:, 1]]
    cut = np.flatnonzero(neighbour >= 0)
    cut = cut[np.argsort(neighbour[cut], kind="stable")]
    theirs = sort_keys(flip(graph.edges[cut]))
    return CutEdges(cut, neighbour[cut], cut[np.lexsort((theirs, neighbour[cut]))])


def flipped_rows(graph: Graph, halo: Halo | None = None) -> np.ndarray:
    """Find the row of the flipped edge of every edge among those of its pair of elements, (E,).

    Edges of this rank are counted first, then the flipped edges that other ranks own.
    Raises ValueError for an edge without a flipped edge.
    """
    rows = graph.edges.find_in_elements(flip(graph.edges.table))
    if halo is not None:
        cut = _cut_edges(graph, halo)
        numbers = graph.atoms.numbers[graph.edges[cut.partners, :2]]
        for z_i, z_j in graph.elements:
            of_pair = cut.partners[(numbers == (z_i, z_j)).all(1)]
            rows[of_pair] = len(graph.edges.between(z_j, z_i)) + np.arange(len(of_pair))
    if (rows < 0).any():
        i, j, *R = graph.edges[np.flatnonzero(rows < 0)[0]].tolist()
        raise ValueError(f"edge ({i}, {j}, {R}) has no flipped edge (j, i, -R). Is the graph complete?")
    return rows


def block_plan(graph: Graph, halo: Halo, elements: list[int]) -> tuple[dict, dict]:
    """List the blocks of edges that TorchExchange sends and receives, by neighbour and pair (s_i, s_j).

    Returns the rows (N,) to send, and the numbers of rows to receive.
    """
    cut, rows = _cut_edges(graph, halo), graph.edges.place_in_elements
    numbers = graph.atoms.numbers[graph.edges[cut.edges, :2]]
    send: dict[int, dict] = {n: {} for n in halo.send}
    receive: dict[int, dict] = {n: {} for n in halo.send}
    for z_i, z_j in graph.elements:
        of_pair = (numbers == (z_i, z_j)).all(1)
        for n in halo.send:
            mine = cut.edges[of_pair & (cut.neighbour == n)]
            send[n][elements.index(z_i), elements.index(z_j)] = rows[mine]
            receive[n][elements.index(z_j), elements.index(z_i)] = len(mine)
    return send, receive


def _offsets(degrees: np.ndarray) -> Tensor:
    """Return the first edge of each atom, and the number of all edges, (A + 1,)."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(degrees)]))


def _spans(degrees: np.ndarray, size: int) -> list[tuple[int, int, int, int]]:
    """Divide the edges into spans of about `size` edges: (first edge, last, first atom, last).

    A span has all edges into its atoms, and at least one atom.
    """
    ends = np.concatenate([[0], np.cumsum(degrees)])
    chunks, atom = [], 0
    while atom < len(degrees):
        last = max(atom + 1, int(np.searchsorted(ends, ends[atom] + size, side="right")) - 1)
        chunks.append((int(ends[atom]), int(ends[last]), atom, last))
        atom = last
    return chunks or [(0, 0, 0, 0)]  # a rank without atoms


def example(
    graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, chunk: int = 768, halo: Halo | None = None
) -> Example:
    """Build the training example (inputs, targets) of a graph, or of this rank's part when `halo` is given."""
    elements = sorted(reference.basis)
    offsite = {
        (elements.index(z_i), elements.index(z_j)): torch.from_numpy(t).to(dtype) for (z_i, z_j), t in graph.offsite.items()
    }
    onsite = {elements.index(z): torch.from_numpy(t).to(dtype) for z, t in graph.onsite.items() if len(t)}
    inputs = graph_inputs(graph, reference, lmax, dtype, chunk, halo)
    return Example(inputs, offsite, onsite, graph.components, len(graph.edges), halo=halo)


def flat_directions(directions: tuple[dict, dict], example: Example, elements: list[int]) -> tuple[Tensor, Tensor]:
    """Flatten `eigenvalue_directions` into the order of components that `differences_mev` gives for the example."""
    offsite, onsite = directions
    parts = (
        [offsite[elements[i], elements[j]] for i, j in example.offsite],
        [onsite[elements[s]] for s in example.onsite],
    )
    empty, dtype = np.empty((len(next(iter(onsite.values()))), 0), np.float32), example.inputs.distances.dtype
    flat = lambda d: d.reshape(len(d), d.shape[1] * d.shape[2])  # noqa: E731
    of_offsite, of_onsite = (torch.from_numpy(np.concatenate([empty, *map(flat, part)], 1)).to(dtype) for part in parts)
    return of_offsite, of_onsite


def differences_mev(predicted: tuple[dict, dict], example: Example) -> tuple[Tensor, Tensor]:
    """Subtract the targets from a prediction: all offsite and all onsite components, flat, meV."""
    empty = example.inputs.distances.new_zeros(0)
    offsite, onsite = (
        torch.cat([empty, *((part[key] - target).flatten() for key, target in targets.items())]) * hartree_to_mev(1.0)
        for part, targets in zip(predicted, (example.offsite, example.onsite))
    )
    return offsite, onsite
