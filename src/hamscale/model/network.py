"""Map a graph to the coupled blocks of H by an SO(2)-equivariant network: nodes give onsite blocks, edges offsite blocks.

Shapes: A atoms, E directed edges j -> i sorted by destination i, K = (lmax+1)^2, R = 2 K rows, C channels of each, half of
config's, n coupled components of a pair. Rows, parities and groups: see rotations.py.
The message of an edge is computed in the frame of that edge and stays there: only node features are rotated. Communication
between ranks takes place in `exchange` alone; the network does not depend on its implementation. The atoms of a rank
are the A atoms that it owns and, after them, its ghosts: the sources of its edges that other ranks own. A single process
has no ghosts. Messages of edges whose source is owned are computed while the features of ghosts travel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..config import Network
from .chunks import Chunk, Way, apply
from .layers import DegreeLinear, FeedForward, Norm, RowMatrices, constant
from .readout import SMALL_READOUT, Components, Degrees, Slots, hermitian_mean, of_parity
from .rotations import NATURAL, PARITIES, layout
from .updates import EdgeEmbedding, EdgeUpdate, MessageSum

ByPair = dict[tuple[int, int], Tensor]  # of edges between elements s_i and s_j


class Exchange(Protocol):
    """Exchange of data between the ranks that share a structure.

    It has two halves, between which work that needs none of the data can be done.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Append the features of the ghosts to those of the owned atoms: both halves of `post` in turn."""

    def post(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to append the features of the ghosts to those of the owned atoms; the function returned ends it."""

    def post_edges(self, blocks: ByPair) -> Callable[[], ByPair]:
        """Begin to exchange read-outs; the function returned gives those of the flipped edges that other ranks own.

        It gives those alone; none if there are no other ranks.
        """


class NoExchange:
    """Exchange of a single process, which owns every atom and every edge."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def post(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def post_edges(self, blocks: ByPair) -> Callable[[], ByPair]:
        return dict


@dataclass
class Inputs:
    """One structure, or a rank's part of it, as tensors.

    species      # (A + ghosts,) | index of the element in the network's list
    source, destination  # (E,) | atoms j and i; destination ascending
    ends         # (2 E,) | both of every edge in turn
    pair         # (E,) | index of the two elements, s_i species + s_j
    distances    # (E,)  | Angstrom
    rotations    # (E, P + 1) | packed Wigner matrices, Layout.rotations
    degrees      # A ints | number of incoming edges of each atom
    offsets      # (A + 1,) | the first incoming edge of each atom, and the number of all edges
    spans        # [(first edge, last, first atom, last)] | chunks of edges processed together, all edges into these atoms
    pairs        # [(s_i, s_j)] -> PairInputs | the edges between two elements
    atoms_of     # s -> AtomInputs | the atoms of an element
    way          # how the operations on a chunk are arranged
    from_ghosts  # Inputs | the edges whose source is a ghost, if those above are the others alone
    whole        # whether the edges above are all into these atoms
    """

    species: Tensor
    source: Tensor
    destination: Tensor
    ends: Tensor
    pair: Tensor
    distances: Tensor
    rotations: Tensor
    degrees: list[int]
    offsets: Tensor
    spans: list[tuple[int, int, int, int]]
    pairs: dict = field(default_factory=dict)
    atoms_of: dict = field(default_factory=dict)
    way: Way = Way.CACHED
    from_ghosts: "Inputs | None" = None
    whole: bool = True

    def to(self, device: torch.device | str) -> "Inputs":
        """Return the same inputs on another device, arranged as suits it."""
        return moved(self, device).arranged(Way.of(device), edges_that_fit(torch.device(device)))

    def arranged(self, way: Way, edges: int) -> "Inputs":
        """Return the same inputs for a way of working on chunks; if it is the batched one, in chunks of at most `edges` edges.

        Chunks are joined, never divided: one that has more edges stays.
        """
        from_ghosts = self.from_ghosts and self.from_ghosts.arranged(way, edges)
        if way is Way.CACHED:
            return replace(self, way=way, from_ghosts=from_ghosts)
        groups: list[list[int]] = []
        for k, (_, last, *_) in enumerate(self.spans):
            if groups and last - self.spans[groups[-1][0]][0] <= edges:
                groups[-1].append(k)
            else:
                groups.append([k])
        ends = [(group[0], group[-1]) for group in groups]
        spans = [(self.spans[a][0], self.spans[b][1], self.spans[a][2], self.spans[b][3]) for a, b in ends]
        pairs = {
            key: replace(pair, spans=[slice(pair.spans[a].start, pair.spans[b].stop) for a, b in ends])
            for key, pair in self.pairs.items()
        }
        return replace(self, way=way, spans=spans, pairs=pairs, from_ghosts=from_ghosts)

    @property
    def atoms(self) -> int:
        return len(self.degrees)

    @property
    def parts(self) -> list["Inputs"]:
        """Return these edges and, if they are apart, those whose source is a ghost."""
        return [self] if self.from_ghosts is None else [self, self.from_ghosts]

    def chunk(self, k: int, distances: Tensor, rotations: Tensor) -> Chunk:
        """Return the edges of a span as a Chunk.

        distances, rotations: those of all edges.
        """
        first, last, first_atom, last_atom = self.spans[k]
        edges, offsets = slice(first, last), self.offsets[first_atom : last_atom + 1]
        return Chunk(
            edges,
            slice(first_atom, last_atom),
            self.degrees[first_atom:last_atom],
            offsets - first if first else offsets,
            self.destination[edges],
            self.ends[2 * first : 2 * last],
            self.pair[edges],
            distances[edges],
            rotations[edges],
            self.pairs,
            self.way,
        )


EDGES_AT_ONCE = 100_000  # enough to fill a GPU


def edges_that_fit(device: torch.device) -> int:
    """Return the number of edges of a chunk on a device: EDGES_AT_ONCE, or fewer if its free memory is small.

    The buffers of an edge take 45 KiB with 16 channels and lmax 4, 340 KiB with 128; here each has one MiB.
    """
    if device.type != "cuda":
        return EDGES_AT_ONCE
    free, _ = torch.cuda.mem_get_info(device)
    return min(EDGES_AT_ONCE, max(1, free >> 20))


T = TypeVar("T")


def moved(value: T, device: torch.device | str) -> T:
    """Return a tensor, or a dict, tuple or dataclass with all its tensors, on another device; anything else as it is."""
    result: object = value
    if isinstance(value, Tensor):
        result = value.to(device)
    elif isinstance(value, dict):
        result = {key: moved(v, device) for key, v in value.items()}
    elif isinstance(value, tuple):
        result = tuple(moved(v, device) for v in value)
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return cast(T, result)


def bytes_of(value: object) -> int:
    """Return the size of a tensor, or of all tensors in a dict, tuple or dataclass, bytes."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(bytes_of(getattr(value, f.name)) for f in fields(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return sum(map(bytes_of, parts))


@dataclass
class PairInputs:
    """The edges between elements s_i and s_j, and the data of their coupled components.

    edges (G,): rows of the edges, ascending.
    flipped (G,): rows of the flipped edges among the edges of (s_j, s_i) and, after them, those that other ranks own; -1 if
    blocks are not paired with their adjoints.
    rows (G,): rows of the edges among `edges` and, after them, those of `Inputs.from_ghosts`; None: there are no such.
    spans: rows of `edges` in each chunk.
    adjoint (n,), sign (n,): PairCoupling.edge_adjoint.
    scale (G, n): Hartree.
    `flipped`, `rows` and all results are in the order of the graph, and of all edges of a rank, `Inputs.from_ghosts` too.
    """

    edges: Tensor
    spans: list[slice]
    flipped: Tensor
    adjoint: Tensor
    sign: Tensor
    scale: Tensor
    rows: Tensor | None = None


@dataclass
class AtomInputs:
    """The atoms of element s, and the data of their coupled components.

    atoms (A_s,): rows of the atoms.
    adjoint (n,), sign (n,): PairCoupling.adjoint.
    scale (n,): Hartree.
    crystal_field (A_s, n): deviation of the reference block of each atom, CrystalField.deviation.
    Where the network also has the potentials of atoms, `scale` and `crystal_field` have one more, the last.
    """

    atoms: Tensor
    adjoint: Tensor
    sign: Tensor
    scale: Tensor
    crystal_field: Tensor


class CrystalFieldEmbedding(nn.Module):
    """Linear map, per element and degree, of the crystal field at each atom to natural node features, (A, R, C).

    Its unnatural components are zero: the neighbours of an atom enter each by its direction alone.

    It supplies information that messages cannot carry, the potentials and fields of charges at any distance, to the layers
    that mix it with all other features.
    """

    def __init__(self, lmax: int, slots: dict[int, Degrees], channels: int, potentials: bool):
        super().__init__()
        self.lmax, self.channels, self.slots = lmax, channels, slots
        self.potential = nn.Parameter(torch.randn(len(slots), channels)) if potentials else None
        self.weights = nn.ParameterDict(
            {
                f"{s}-{L}": nn.Parameter(torch.randn(n, channels) / n**0.5)
                for s, degrees in self.slots.items()
                for L, parities in degrees.items()
                if lmax >= L and (n := len(of_parity(parities, NATURAL)))
            }
        )
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        degrees = [l for l in range(lmax + 1) for _ in range(2 * l + 1)]  # of the natural rows
        rows = {s: [f"{s}-{l}" for l in degrees] for s in slots}
        self.gather = RowMatrices(shapes, rows, dict.fromkeys(slots, (0, channels)))
        for s in slots:
            constant(self, f"columns_{s}", self._columns(s))

    def _columns(self, s: int) -> Tensor:
        """Return the components of a block that each natural row takes, (K, slots); rows with fewer slots repeat the first."""
        columns, first = torch.zeros(self.gather.shapes[s][:2], dtype=torch.int64), 0
        for L, parities in self.slots[s].items():
            own = torch.tensor(of_parity(parities, NATURAL), dtype=torch.int64)
            for order in range(2 * L + 1):
                if self.lmax >= L:
                    columns[L * L + order, : len(own)] = first + own
                first += len(parities)
        return columns.flatten()

    def forward(self, inputs: Inputs) -> Tensor:
        matrices = self.gather(self.weights.values())
        natural = inputs.distances.new_zeros(inputs.atoms, layout(self.lmax).size, self.channels)
        for s, a in inputs.atoms_of.items():
            of_rows = a.crystal_field.index_select(1, self.get_buffer(f"columns_{s}")).unflatten(1, (len(matrices[s]), -1))
            of_atoms = torch.bmm(of_rows.transpose(0, 1), matrices[s]).transpose(0, 1)
            if self.potential is not None:
                of_atoms = torch.cat([of_atoms[:, :1] + a.crystal_field[:, -1:, None] * self.potential[s], of_atoms[:, 1:]], 1)
            natural.index_copy_(0, a.atoms, of_atoms)
        return torch.cat([natural, torch.zeros_like(natural)], 1)


class NodeUpdate(nn.Module):
    """Update of node features: x + linear(sum of messages), then a feed-forward layer.

    The first update also adds the embedding of the crystal field.
    """

    def __init__(
        self, lmax: int, species: int, cutoff: float, c: Network, layer: int, slots: dict[int, Degrees], potentials: bool
    ):
        super().__init__()
        first = layer == 0
        C = c.channels // 2
        # before the first layer all features are scalars that depend on the element alone: there is nothing to normalise
        self.norm = nn.Identity() if first else Norm(lmax, C)
        self.messages = MessageSum(lmax, species, cutoff, c, layer)
        self.out = DegreeLinear(lmax, c.heads * (c.values // 2), C)
        self.crystal_field = CrystalFieldEmbedding(lmax, slots, C, potentials) if first and c.crystal_field else None
        self.feed_forward = FeedForward(lmax, C, c.feed_forward // 2)

    def sums(self, x: Tensor, edges: list[Tensor], inputs: Inputs, keep: bool) -> list[Tensor]:
        """Compute the sums of the messages of some edges, as `MessageSum` returns them."""
        ends = by_parity(self.norm(x))[: len(self.messages.ends)] if self.messages.ends else x[:, 0].contiguous()
        return apply(self.messages, inputs, ends, edges, keep)

    def forward(self, x: Tensor, sums: list[list[Tensor]], inputs: Inputs) -> Tensor:
        """Compute the new features of owned atoms; sums: those of all edges into them, of some edges each."""
        x = x[: inputs.atoms] + self.out(merged(sums).flatten(1, 2))
        return self.feed_forward(x if self.crystal_field is None else x + self.crystal_field(inputs))


def merged(parts: list[list[Tensor]]) -> Tensor:
    """Compute the sums of messages over all edges into each atom, (A, 2, K, heads V).

    parts: the outputs of `MessageSum` for some of the edges each: sums M, with attention over these alone, and logarithms L of
    the sums of exp(logit) over them. The result is sum(exp(L) M) / sum(exp(L)), over the parts.
    """
    if len(parts) == 1:
        return parts[0][0]
    logarithms = torch.stack([of_part[1] for of_part in parts])  # -inf without edges
    shares = logarithms.clamp(min=torch.finfo(logarithms.dtype).min).softmax(0)[:, :, None, None, :, None]
    heads = logarithms.shape[2]
    return sum(share * of_part[0].unflatten(3, (heads, -1)) for share, of_part in zip(shares, parts)).flatten(3)


def by_parity(x: Tensor) -> Tensor:
    """Bring node features (A, R, C) into the form that messages gather, (2, A, C, K)."""
    return x.unflatten(1, (2, x.shape[1] // 2)).permute(1, 0, 3, 2).contiguous()


class HamiltonianNetwork(nn.Module):
    """Network that predicts the coupled blocks of H less the reference.

    It commutes with rotations and with reflections: see `layers.SO2Convolution`.
    slots: {(s_i, s_j): {L: parities}} for every pair of elements; onsite: {s: {L: parities}} for the blocks of atoms.
    potentials: whether it also reads and gives the potential of each atom (graph/charges.py), a component after the block's.
    Components with L above lmax have no output and stay at the reference.
    cutoff: in Angstrom.
    c: the fields of config.Network.

    network = build_network(settings, reference)  # the arguments follow from a reference
    offsite, onsite = network(graph_inputs(graph, reference, network.lmax, torch.float32))
    """

    def __init__(
        self,
        lmax: int,
        species: int,
        cutoff: float,
        slots: Slots,
        onsite: dict[int, Degrees],
        c: Network,
        potentials: bool = False,
    ):
        super().__init__()
        self.lmax, self.species, self.cutoff, self.slots, self.onsite_slots = lmax, species, cutoff, slots, onsite
        C, layers = c.channels // 2, c.layers
        self.atom_embedding = nn.Parameter(torch.randn(species, C))
        self.edge_embedding = EdgeEmbedding(lmax, species, cutoff, c)
        self.node_updates = nn.ModuleList(NodeUpdate(lmax, species, cutoff, c, k, onsite, potentials) for k in range(layers))
        self.edge_updates = nn.ModuleList(
            EdgeUpdate(lmax, species, cutoff, c, k == 0, slots if k == layers - 1 else None) for k in range(layers)
        )
        self.edge_update_norms = nn.ModuleList(Norm(lmax, C) for _ in range(layers))
        self.read_norm = Norm(lmax, C)
        self.onsite_readout = nn.ParameterDict(
            {
                f"{s}-{L}-{p}": nn.Parameter(SMALL_READOUT * torch.randn(C, n) / C**0.5)
                for s in range(species)
                for L, parities in onsite[s].items()
                for p in PARITIES[: min(layers, 2)]  # one layer gives nodes natural features alone
                if lmax >= L and (n := len(of_parity(parities, p)))
            }
        )
        self.potential_readout = nn.Parameter(SMALL_READOUT * torch.randn(species, C) / C**0.5) if potentials else None
        name = lambda s, L, p: f"{s}-{L}-{p}"  # noqa: E731
        rows = [(p, l, m) for p in PARITIES for l in range(lmax + 1) for m in range(-l, l + 1)]
        self.onsite_components = Components(rows, onsite, self.onsite_readout, C, name)

    def messages_in(self, dtype: torch.dtype | None) -> "HamiltonianNetwork":
        """Set a shorter type (bfloat16) in which messages are computed.

        Sums, features and their linear maps keep the type of the weights.
        """
        for update in (*(u.messages for u in self.node_updates), *self.edge_updates):
            update.dtype = dtype
        return self

    def forward(
        self,
        inputs: Inputs,
        exchange: Exchange = NoExchange(),  # noqa: B008
        recompute: bool = False,
    ) -> tuple[dict[tuple[int, int], Tensor], dict[int, Tensor]]:
        """Compute offsite {(s_i, s_j): (G, n)} in edge frames and onsite {s: (A_s, n)}, Hartree.

        The result is Hermitian by construction: a block is the mean of its own read-out and of the adjoint of the read-out
        of its partner (j, i, -R).
        exchange: appends the atoms and edges that other ranks own (parallel/exchange.py).
        recompute: saves memory at the cost of a little more time.
        """
        x, keep, last = self.embed(inputs.species), not recompute, len(self.node_updates) - 1
        edges = [self.first_edges(part, x) for part in inputs.parts]
        sums = [self.message_sums(0, part, x, e, keep) for part, e in zip(inputs.parts, edges)]
        for layer in range(last + 1):
            x = known = self.node_updates[layer](x, sums, inputs)
            wait = exchange.post(x)
            for n, part in enumerate(inputs.parts):
                if part is inputs.parts[-1]:
                    known = wait()
                edges[n] = self.next_edges(layer, part, known, edges[n], keep)
                if layer < last:
                    sums[n] = self.message_sums(layer + 1, part, known, edges[n], keep)
        raw = {
            pair: of_parts[0] if p.rows is None else torch.cat(of_parts).index_select(0, p.rows)
            for (pair, p), *of_parts in zip(inputs.pairs.items(), *edges)
        }
        wait_for_edges = exchange.post_edges(raw)
        onsite = self.read_onsite(inputs, x)
        known = raw | {pair: torch.cat([raw[pair], theirs]) for pair, theirs in wait_for_edges().items()}
        offsite = {
            (s_i, s_j): hermitian_mean(raw[s_i, s_j], known[s_j, s_i].index_select(0, p.flipped), p.adjoint, p.sign)
            for (s_i, s_j), p in inputs.pairs.items()
        }
        return offsite, onsite

    def embed(self, species: Tensor) -> Tensor:
        """Compute the first features of atoms, (A, R, C): scalars that depend on the element alone."""
        scalars = self.atom_embedding.index_select(0, species)
        rest = scalars.new_zeros(len(scalars), layout(self.lmax).rows - 1, scalars.shape[1])
        return torch.cat([scalars[:, None], rest], 1)

    def first_edges(self, inputs: Inputs, x: Tensor) -> list[Tensor]:
        """Compute the first features of edges, by chunk (E, C), from those of atoms."""
        return apply(self.edge_embedding, inputs, x[:, 0], [])

    def next_nodes(self, layer: int, inputs: Inputs, x: Tensor, edges: list[Tensor], keep: bool = False) -> Tensor:
        """Compute the features of the owned atoms after a layer, from those of all atoms and edges before it.

        inputs: those whose edges are all together.
        keep: keeps the largest intermediate of every edge for the adjoint.
        """
        return self.node_updates[layer](x, [self.message_sums(layer, inputs, x, edges, keep)], inputs)

    def message_sums(self, layer: int, inputs: Inputs, x: Tensor, edges: list[Tensor], keep: bool) -> list[Tensor]:
        """Compute the sums of messages over some edges, as `MessageSum` returns them, for `next_nodes`."""
        return cast(NodeUpdate, self.node_updates[layer]).sums(x, edges, inputs, keep)

    def next_edges(self, layer: int, inputs: Inputs, x: Tensor, edges: list[Tensor], keep: bool = False) -> list[Tensor]:
        """Compute the features of edges after a layer, from those of atoms after it and those of edges before it.

        After the last layer these are the read-outs (G, n) of each of inputs.pairs, before they are averaged with those of
        the flipped edges. Without gradients, the features before the layer are released.
        """
        update = cast(EdgeUpdate, self.edge_updates[layer])
        ends = by_parity(self.edge_update_norms[layer](x))[: len(update.ends)]
        return apply(update, inputs, ends, edges, keep, last_use=True)

    def read_onsite(self, inputs: Inputs, x: Tensor) -> dict[int, Tensor]:
        """Compute the onsite blocks of each element, (A_s, n), from the features of atoms after the last layer.

        With potentials the last component is that of each atom, (A_s, n + 1).
        """
        x, matrices, onsite = self.read_norm(x), self.onsite_components.gather(self.onsite_readout.values()), {}
        for s, a in inputs.atoms_of.items():
            outputs = torch.bmm(x.index_select(0, a.atoms).transpose(0, 1), matrices[s]).transpose(0, 1).flatten(1)
            read = outputs.index_select(1, self.onsite_components.places(s))
            blocks = hermitian_mean(read, read, a.adjoint, a.sign)
            if self.potential_readout is not None:
                blocks = torch.cat([blocks, x[a.atoms, 0] @ self.potential_readout[s, :, None]], 1)
            onsite[s] = blocks * a.scale
        return onsite
