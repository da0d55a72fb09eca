"""Convert a graph and a reference into the input of the network, and its output into differences from the targets."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import Network
from ..graph.graph import Graph
from ..graph.reference import Reference
from ..model.network import AtomInputs, Exchange, HamiltonianNetwork, Inputs, NoExchange, PairInputs, bytes_of, moved
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
    potentials = reference.crystal_field.potential is not None
    return HamiltonianNetwork(lmax, len(elements), reference.cutoff_angstrom, slots, onsite, network, potentials)


def graph_inputs(
    graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, chunk: int = 768, halo: Halo | None = None
) -> Inputs:
    """Build the tensors of a graph, or of a rank's part of one when `halo` is given.

    chunk: number of edges that are processed together, rounded so that all edges into an atom are in one chunk.
    """
    flipped, elements = flipped_rows(graph, halo), sorted(reference.basis)
    if halo is None:
        inputs = piece_inputs(graph, reference, lmax, dtype, np.empty(0, np.int64), chunk)
    else:
        own = np.isin(graph.edges[:, 1], halo.owned)
        graph = replace(graph, crystal_field=reference.crystal_field.known_of(graph))  # computed once
        inputs, from_ghosts = (
            piece_inputs(replace(graph, edges=graph.edges.take(kept)), reference, lmax, dtype, halo.ghosts, chunk)
            for kept in (own, ~own)
        )
        from_ghosts = replace(from_ghosts, atoms_of={}, whole=False)
        inputs = replace(inputs, from_ghosts=from_ghosts, whole=False)
    for (s_i, s_j), pair in inputs.pairs.items():
        edges = graph.edges.between(elements[s_i], elements[s_j])
        pair.flipped = torch.from_numpy(flipped[edges])
        if halo is not None:
            pair.rows = torch.from_numpy(np.argsort(np.argsort(~own[edges], kind="stable")))
    return inputs


def piece_inputs(
    graph: Graph, reference: Reference, lmax: int, dtype: torch.dtype, ghosts: np.ndarray, chunk: int = 768
) -> Inputs:
    """Build the tensors of a piece of a graph: some atoms and edges into them, without pairing blocks and adjoints.

    ghosts: sources of its edges that the piece does not own.
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
    spans = _spans(degrees, chunk)
    pairs = {}
    for z_i, z_j in graph.elements:
        edges, pair = graph.edges.between(z_i, z_j), coupling[z_i, z_j]
        index, sign = pair.edge_adjoint
        scale = torch.from_numpy(reference.offsite_scale(z_i, z_j, graph.edges.distances[edges])).to(dtype)
        ends = np.searchsorted(edges, [[first, last] for first, last, _, _ in spans]).tolist()
        pairs[elements.index(z_i), elements.index(z_j)] = PairInputs(
            torch.from_numpy(edges),
            [slice(*e) for e in ends],
            torch.full((len(edges),), -1),
            torch.from_numpy(index),
            torch.from_numpy(sign).to(dtype),
            scale[:, torch.from_numpy(pair.slot)],
        )
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
                torch.from_numpy(reference.scale_of_atoms(z)).to(dtype),
                torch.from_numpy(reference.crystal_field.deviation(z, crystal_field[z])).to(dtype),
            )
    species = np.searchsorted(elements, graph.atoms.numbers[known])
    return Inputs(
        torch.from_numpy(species),
        torch.from_numpy(source),
        torch.from_numpy(destination),
        torch.from_numpy(np.column_stack([source, destination]).ravel()),
        torch.from_numpy(species[destination] * len(elements) + species[source]),
        torch.from_numpy(graph.edges.distances).to(dtype),
        layout(lmax).rotations(graph.edges.vectors, dtype),
        degrees.tolist(),
        torch.from_numpy(np.concatenate([[0], np.cumsum(degrees)])),
        spans,
        pairs,
        atoms_of,
    )


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
