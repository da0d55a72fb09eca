"""The SO(2)-equivariant network that turns a graph into the coupled blocks of H: nodes give onsite, edges offsite blocks.

Shapes: A atoms, E directed edges j -> i sorted by destination i, K = (lmax+1)^2, C channels, n coupled components of a pair.
Messages of edge e stand in its own frame and stay there: only node features are rotated. Communication enters at
`x = exchange(x)`; the network knows nothing of it. A rank's atoms are those it owns, A, and after them its ghosts, sources of its
edges that others own; without ranks there are none.
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from ..config import Network
from .chunks import Chunk, apply
from .layers import DegreeLinear, FeedForward, Norm
from .readout import SMALL_READOUT
from .updates import EdgeEmbedding, EdgeUpdate, Messages


class NoExchange:
    """Of one process: it owns every atom and every edge."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def edges(self, blocks: dict) -> dict:
        return blocks


@dataclass
class Inputs:
    """One structure, or a rank's part of it, as tensors.

    species      # (A + ghosts,) | index of the element in the network's list
    source, destination  # (E,) | atoms j and i; destination ascending
    distances    # (E,)  | Angstrom
    rotations    # (E, P + 1) | packed Wigner matrices, Layout.rotations
    degrees      # A ints | incoming edges of each atom
    spans        # [(first edge, last, first atom, last)] | whole destinations: what is processed together
    pairs        # [(s_i, s_j)] -> PairInputs | the edges between two elements
    atoms_of     # s -> AtomInputs | the atoms of an element
    """

    species: Tensor
    source: Tensor
    destination: Tensor
    distances: Tensor
    rotations: Tensor
    degrees: list[int]
    spans: list[tuple[int, int, int, int]]
    pairs: dict = field(default_factory=dict)
    atoms_of: dict = field(default_factory=dict)
    n_species: int = 1

    def to(self, device) -> "Inputs":
        """The same on another device."""
        return _moved(self, device)

    @property
    def atoms(self) -> int:
        return len(self.degrees)

    def chunk(self, k: int, distances: Tensor, rotations: Tensor) -> Chunk:
        """The edges of a span; distances and rotations are those of all edges."""
        first, last, first_atom, last_atom = self.spans[k]
        edges, destination, source = slice(first, last), self.destination[first:last], self.source[first:last]
        return Chunk(
            edges,
            slice(first_atom, last_atom),
            self.degrees[first_atom:last_atom],
            source,
            destination - first_atom,
            self.species[destination] * self.n_species + self.species[source],
            distances[edges],
            rotations[edges],
            self.pairs,
        )


def _moved(value, device):
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(v, device) for key, v in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass
class PairInputs:
    """The edges between elements s_i and s_j, and where their coupled components stand.

    edges (G,) ascending, reverse (G,): rows of the reversed edges among the edges of (s_j, s_i) and, after them, those that
    other ranks own; spans: rows of edges in each
    chunk; adjoint (n,), sign (n,): PairCoupling.edge_adjoint; scale (G, n): Hartree.
    """

    edges: Tensor
    spans: list[slice]
    reverse: Tensor
    adjoint: Tensor
    sign: Tensor
    scale: Tensor


@dataclass
class AtomInputs:
    """The atoms (A_s,) of element s; adjoint (n,), sign (n,): PairCoupling.adjoint; scale (n,): Hartree; crystal_field (A_s, n): what the
    reference knows of each, CrystalField.deviation."""

    atoms: Tensor
    adjoint: Tensor
    sign: Tensor
    scale: Tensor
    crystal_field: Tensor


class CrystalFieldEmbedding(nn.Module):
    """A linear map, per element and degree, of the crystal field at each atom: (A, K, C).

    It brings what messages cannot carry, potentials and fields of charges at any distance, to where layers mix it with the rest.
    """

    def __init__(self, lmax: int, slots: dict, channels: int):
        super().__init__()
        self.lmax, self.channels = lmax, channels
        self.slots = {s: of for (s, other), of in slots.items() if s == other}
        self.weights = nn.ParameterDict(
            {
                f"{s}-{L}": nn.Parameter(torch.randn(n, channels) / n**0.5)
                for s, of in self.slots.items()
                for L, n in of.items()
                if lmax >= L
            }
        )

    def forward(self, inputs: Inputs) -> Tensor:
        result = inputs.distances.new_zeros(inputs.atoms, (self.lmax + 1) ** 2, self.channels)
        for s, a in inputs.atoms_of.items():
            blocks = a.crystal_field.split([(2 * L + 1) * n for L, n in self.slots[s].items()], 1)
            for (L, n), block in zip(self.slots[s].items(), blocks):
                if self.lmax >= L:
                    result[a.atoms, L * L : (L + 1) ** 2] = block.unflatten(1, (2 * L + 1, n)) @ self.weights[f"{s}-{L}"]
        return result


class NodeUpdate(nn.Module):
    """x + linear(sum of messages), and in the first layer what is known of the crystal field; then feed-forward."""

    def __init__(self, lmax: int, species: int, cutoff: float, c: Network, slots: dict | None):
        first = slots is not None
        super().__init__()
        # before the first layer all features are scalars, and there is nothing to norm
        self.norm = nn.Identity() if first else Norm(lmax, c.channels)
        self.messages = Messages(lmax, species, cutoff, c, first)
        self.out = DegreeLinear(lmax, c.heads * c.values, c.channels)
        self.crystal_field = CrystalFieldEmbedding(lmax, slots, c.channels) if first and c.crystal_field else None
        self.feed_forward = FeedForward(lmax, c.channels, c.feed_forward)

    def forward(self, x: Tensor, edges: list[Tensor], inputs: Inputs, keep: bool) -> Tensor:
        (sums,) = apply(self.messages, inputs, x[:, 0] if self.messages.first else self.norm(x), edges, keep)
        x = x[: inputs.atoms] + self.out(sums)
        return self.feed_forward(x if self.crystal_field is None else x + self.crystal_field(inputs))


class HamiltonianNetwork(nn.Module):
    """Coupled blocks of H less the reference.

    slots: {(s_i, s_j): {L: slots}} for every pair of elements; L above lmax get no output (they stay at the reference).
    cutoff in Angstrom; c: the fields of config.Network.
    """

    def __init__(self, lmax: int, species: int, cutoff: float, slots: dict, c: Network):
        super().__init__()
        self.lmax, self.species, self.cutoff, self.slots = lmax, species, cutoff, slots
        C, layers = c.channels, c.layers
        self.atom_embedding = nn.Parameter(torch.randn(species, C))
        self.edge_embedding = EdgeEmbedding(lmax, species, cutoff, c)
        self.node_updates = nn.ModuleList(
            NodeUpdate(lmax, species, cutoff, c, slots if k == 0 else None) for k in range(layers)
        )
        self.edge_updates = nn.ModuleList(
            EdgeUpdate(lmax, species, cutoff, c, k == 0, slots if k == layers - 1 else None) for k in range(layers)
        )
        self.edge_update_norms = nn.ModuleList(Norm(lmax, C) for _ in range(layers))
        self.read_norm = Norm(lmax, C)
        self.onsite_readout = nn.ParameterDict(
            {
                f"{s}-{L}": nn.Parameter(SMALL_READOUT * torch.randn(C, n) / C**0.5)
                for s in range(species)
                for L, n in slots[s, s].items()
                if lmax >= L
            }
        )

    def messages_in(self, dtype: torch.dtype | None):
        """Let messages be computed in a shorter type (bfloat16); sums, features and their linear maps keep that of the weights."""
        for update in (*(u.messages for u in self.node_updates), *self.edge_updates):
            update.dtype = dtype
        return self

    def forward(self, inputs: Inputs, exchange=NoExchange(), recompute: bool = False):  # noqa: B008
        """Offsite {(s_i, s_j): (G, n)} in edge frames and onsite {s: (A_s, n)}, Hartree.

        Hermitian by construction: a block is the mean of its own read-out and of the adjoint of its partner's, (j, i, -R).
        exchange: appends what other ranks own, of atoms and of edges (parallel/exchange.py). recompute: less memory, a little more time.
        """
        x = self.embed(inputs.species)
        edges = apply(self.edge_embedding, inputs, x[:, 0], [])
        for node_update, edge_update, norm in zip(self.node_updates, self.edge_updates, self.edge_update_norms):
            x = exchange(node_update(x, edges, inputs, not recompute))
            edges = apply(edge_update, inputs, norm(x), edges, not recompute, last_use=True)
        raw = dict(zip(inputs.pairs, edges))
        known = exchange.edges(raw)
        offsite = {
            (s_i, s_j): torch.addcmul(raw[s_i, s_j], known[s_j, s_i][p.reverse].index_select(1, p.adjoint), p.sign).mul_(0.5)
            for (s_i, s_j), p in inputs.pairs.items()
        }
        return offsite, self.read_onsite(inputs, self.read_norm(x))

    def embed(self, species: Tensor) -> Tensor:
        """First features of atoms, (A, K, C): scalars of their elements."""
        scalars = self.atom_embedding[species]
        return torch.cat([scalars[:, None], scalars.new_zeros(len(scalars), (self.lmax + 1) ** 2 - 1, scalars.shape[1])], 1)

    def edge_features(self, inputs: Inputs, x: list[Tensor], layer: int) -> list[Tensor]:
        """Features of edges before node update `layer`, made anew from those of the atoms after each layer before, x[0..layer].

        For layer = number of layers: the read-out, (G, n) for each of inputs.pairs, not yet averaged with the reversed edges'.
        """
        edges = apply(self.edge_embedding, inputs, x[0][:, 0], [])
        for update, norm, features in zip(self.edge_updates, self.edge_update_norms, x[1 : layer + 1]):
            edges = apply(update, inputs, norm(features), edges, False, last_use=True)
        return edges

    def read_onsite(self, inputs: Inputs, x: Tensor) -> dict[int, Tensor]:
        onsite = {}
        for s, a in inputs.atoms_of.items():
            own = x[a.atoms]
            parts = [
                (own[:, L * L : (L + 1) ** 2] @ self.onsite_readout[f"{s}-{L}"]).flatten(1)
                if self.lmax >= L
                else own.new_zeros(len(own), (2 * L + 1) * n)
                for L, n in self.slots[s, s].items()
            ]
            read = torch.cat(parts, 1)
            onsite[s] = 0.5 * (read + read[:, a.adjoint] * a.sign) * a.scale
        return onsite
