"""The SO(2)-equivariant network that turns a graph into the coupled blocks of H: nodes give onsite, edges offsite blocks.

Shapes: A atoms, E directed edges j -> i sorted by destination i, K = (lmax+1)^2, C channels, n coupled components of a pair.
Messages of edge e stand in its own frame and stay there: only node features are rotated. Communication enters at one line,
`x = exchange(x)`; the network knows nothing of it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import FeedForward, Norm, RadialBasis, RadialNetwork, envelope, gate
from .rotations import layout
from .so2 import DegreeLinear, SO2Convolution


@dataclass
class Inputs:
    """One structure as tensors.

    species      # (A,)  | index of the element in the network's list
    source, destination  # (E,) | atoms j and i; destination ascending
    distances    # (E,)  | Angstrom
    rotations    # (E, P) | packed Wigner matrices, Layout.pack
    degrees      # A ints | incoming edges of each atom
    chunks       # [(first edge, last, first atom, last)] | whole destinations
    pairs        # [(s_i, s_j)] -> PairInputs | the edges between two elements
    atoms_of     # s -> AtomInputs | the atoms of an element
    """

    species: Tensor
    source: Tensor
    destination: Tensor
    distances: Tensor
    rotations: Tensor
    degrees: list[int]
    chunks: list[tuple[int, int, int, int]]
    pairs: dict = field(default_factory=dict)
    atoms_of: dict = field(default_factory=dict)


@dataclass
class PairInputs:
    """The edges between elements s_i and s_j, and where their coupled components stand.

    edges (G,), reverse (G,): rows of the reversed edges among the edges of (s_j, s_i);
    adjoint (n,), sign (n,): PairCoupling.edge_adjoint; scale (G, n): Hartree.
    """

    edges: Tensor
    reverse: Tensor
    adjoint: Tensor
    sign: Tensor
    scale: Tensor


@dataclass
class AtomInputs:
    """The atoms (A_s,) of element s; adjoint (n,), sign (n,): PairCoupling.adjoint; scale (n,): Hartree."""

    atoms: Tensor
    adjoint: Tensor
    sign: Tensor
    scale: Tensor


class NodeUpdate(nn.Module):
    """Attention over the incoming edges, each message an SO(2) convolution of [D x_j, D x_i, e]; then feed-forward."""

    def __init__(self, lmax: int, species: int, c: dict, first: bool):
        super().__init__()
        C, H, heads, V, alpha = c["channels"], c["hidden"], c["heads"], c["values"], c["attention"]
        self.lmax, self.heads, self.first, self.hidden = lmax, heads, first, H
        self.norm, self.edge_norm = (None, None) if first else (Norm(lmax, C), Norm(lmax, C))
        # before the first layer all features are scalars: no other weight would get a gradient
        self.radial = RadialNetwork(c["radial"], c["radial"], species, (1 if first else lmax + 1) * 3 * C)
        self.convolution = SO2Convolution(
            lmax, 3 * C, H, lmax * H + heads * alpha, axial=first, zero_in=3 * C if first else None
        )
        self.values = SO2Convolution(lmax, H, heads * V, axial=first)
        self.attention_norm = nn.LayerNorm(alpha)
        self.attention = nn.Parameter(torch.randn(heads, alpha) / alpha**0.5)
        self.out = DegreeLinear(lmax, heads * V, C)
        self.feed_forward = FeedForward(lmax, C, c["feed_forward"])

    def messages(self, x: Tensor, e: list[Tensor], radial: Tensor, env: Tensor, inputs: Inputs, chunk, pair: Tensor) -> Tensor:
        """Sum of the messages into the atoms of a chunk, (atoms, K, heads V), in the global frame."""
        first_edge, last_edge, first_atom, last_atom = chunk
        degrees = inputs.degrees[first_atom:last_atom]
        D = layout(self.lmax).dense(inputs.rotations[first_edge:last_edge], axial=self.first)
        weights = self.radial(radial, pair)
        if self.first:
            x_j, x_i = x[inputs.source[first_edge:last_edge], 0], x[inputs.destination[first_edge:last_edge], 0]
            message = [torch.cat([x_j, x_i, e[0][:, 0, 0]], 1) * weights]
        else:
            message = rotated_message(self.lmax, x, e, D, weights, inputs, chunk)
        y, scalars = self.convolution(message)
        gates, attention = scalars.split([self.lmax * self.hidden, scalars.shape[1] - self.lmax * self.hidden], 1)
        y, _ = self.values(gate(y, gates))
        attention = self.attention_norm(attention.unflatten(1, self.attention.shape))
        logits = (nn.functional.leaky_relu(attention, 0.2) * self.attention).sum(-1)  # (edges, heads)
        alpha = torch.cat([torch.softmax(part, 0) for part in logits.split(degrees)]) * env[:, None]
        y = (
            torch.cat([p.flatten(1, 2) for p in y], 1).unflatten(2, (self.heads, self.values.c_out // self.heads))
            * alpha[:, None, :, None]
        )
        y = y.flatten(2)
        # rotate back and sum over the edges of an atom: one product (K, deg K) (deg K, heads V)
        sums = [d.flatten(0, 1).T @ v.flatten(0, 1) for d, v in zip(D.split(degrees), y.split(degrees))]
        return torch.stack(sums)

    def forward(self, x: Tensor, aggregated: Tensor) -> Tensor:
        return self.feed_forward(x + self.out(aggregated))


class EdgeUpdate(nn.Module):
    """e + linear(gate(SO(2) convolution of [D x_j, D x_i, e])); then feed-forward. All in the edge frame.

    The first one meets edges that hold scalars only, e = [(E, 1, 1, C)], straight from their embedding.
    """

    def __init__(self, lmax: int, species: int, c: dict, first: bool):
        super().__init__()
        C, H = c["channels"], c["hidden"]
        self.lmax, self.hidden, self.channels, self.first = lmax, H, C, first
        self.norm, self.edge_norm = Norm(lmax, C), nn.Identity() if first else Norm(lmax, C)
        # what is scaled and convolved: of each degree [x_j, x_i, e], of the first edges [x_j, x_i] and one e
        weights, c_in = ((2 * lmax + 3) * C, 2 * C) if first else ((lmax + 1) * 3 * C, 3 * C)
        self.radial = RadialNetwork(c["radial"], c["radial"], species, weights)
        self.convolution = SO2Convolution(lmax, c_in, H, lmax * H, zero_in=weights)
        self.out = DegreeLinear(lmax, H, C)
        self.feed_forward = FeedForward(lmax, C, c["feed_forward"])

    def forward(self, x: Tensor, e: list[Tensor], radial: Tensor, inputs: Inputs, chunk, pair: Tensor) -> list[Tensor]:
        D = layout(self.lmax).dense(inputs.rotations[chunk[0] : chunk[1]])
        weights = self.radial(radial, pair)
        if not self.first:
            message = rotated_message(self.lmax, x, self.edge_norm(e), D, weights, inputs, chunk)
            y, gates = self.convolution(message)
            return self.feed_forward([a + b for a, b in zip(e, self.out(gate(y, gates)))])
        weights, edge_weights = weights.split([2 * (self.lmax + 1) * self.channels, self.channels], 1)
        message = rotated_message(self.lmax, x, None, D, weights, inputs, chunk)
        message[0] = torch.cat([message[0].flatten(1), e[0][:, 0, 0] * edge_weights], 1)
        y, gates = self.convolution(message)
        zero, *rest = self.out(gate(y, gates))
        scalar, axial = zero.split([1, self.lmax], 2)
        return self.feed_forward([torch.cat([scalar + e[0], axial], 2), *rest])


def rotated_message(
    lmax: int, x: Tensor, e: list[Tensor] | None, D: Tensor, weights: Tensor, inputs: Inputs, chunk
) -> list[Tensor]:
    """[D x_j, D x_i, e] scaled per degree and channel, as pieces (edges, 1 or 2, N_m, 3C or, without e, 2C). x: (A, K, C), normed."""
    first_edge, last_edge, first_atom, last_atom = chunk
    degrees = inputs.degrees[first_atom:last_atom]
    x_j = torch.bmm(D, x[inputs.source[first_edge:last_edge]])
    # all edges of an atom rotate the same x_i: one product (deg K, K) (K, C) per atom
    x_i = torch.cat([d.flatten(0, 1) @ x_a for d, x_a in zip(D.split(degrees), x[first_atom:last_atom])])
    x_i = x_i.view(len(x_j), *x.shape[1:])
    weights = weights.view(len(weights), 1, lmax + 1, weights.shape[1] // (lmax + 1))
    pieces = [layout(lmax).pieces(x_j), layout(lmax).pieces(x_i)] + ([e] if e else [])
    return [torch.cat(parts, -1) * weights[:, :, m:] for m, parts in enumerate(zip(*pieces))]


class HamiltonianNetwork(nn.Module):
    """Coupled blocks of H less the two-centre reference.

    slots: {(s_i, s_j): {L: slots}} for every pair of elements; L above lmax get no output (they stay at the reference).
    cutoff in Angstrom; c: the fields of config.Network.
    """

    def __init__(self, lmax: int, species: int, cutoff: float, slots: dict, c: dict):
        super().__init__()
        self.lmax, self.species, self.cutoff, self.slots = lmax, species, cutoff, slots
        C = c["channels"]
        self.radial = RadialBasis(c["radial"], cutoff)
        self.atom_embedding = nn.Parameter(torch.randn(species, C))
        self.edge_embedding = RadialNetwork(c["radial"], c["radial"], species, C)
        self.node_updates = nn.ModuleList(NodeUpdate(lmax, species, c, first=k == 0) for k in range(c["layers"]))
        self.edge_updates = nn.ModuleList(EdgeUpdate(lmax, species, c, first=k == 0) for k in range(c["layers"]))
        self.node_norm, self.edge_norm = Norm(lmax, C), Norm(lmax, C)
        self.onsite_readout, self.offsite_readout = nn.ParameterDict(), nn.ParameterDict()
        for (s_i, s_j), degrees in slots.items():
            for L, n in degrees.items():
                if lmax >= L:
                    self.offsite_readout[f"{s_i}-{s_j}-{L}"] = nn.Parameter(torch.randn(C, n) / C**0.5)
                    if s_i == s_j:
                        self.onsite_readout[f"{s_i}-{L}"] = nn.Parameter(torch.randn(C, n) / C**0.5)

    def forward(self, inputs: Inputs, exchange=lambda x: x, recompute: bool = False):
        """Offsite {(s_i, s_j): (G, n)} in edge frames and onsite {s: (A_s, n)}, Hartree.

        Hermitian by construction: a block is the mean of its own read-out and of the adjoint of its partner's, (j, i, -R).
        exchange: brings node features of atoms that other ranks own up to date. recompute: trade time for memory.
        """
        run = (lambda f, *a: checkpoint(f, *a, use_reentrant=False)) if recompute else (lambda f, *a: f(*a))
        pair = inputs.species[inputs.destination] * self.species + inputs.species[inputs.source]
        env = envelope(inputs.distances, self.cutoff)
        spans = [slice(chunk[0], chunk[1]) for chunk in inputs.chunks]
        radials = [self.radial(inputs.distances[s]) for s in spans]
        # scalars only: the element of an atom; the distance and elements of an edge
        scalars = self.atom_embedding[inputs.species]
        x = torch.cat([scalars[:, None], scalars.new_zeros(len(scalars), layout(self.lmax).size - 1, scalars.shape[1])], 1)
        edges = [[self.edge_embedding(radial, pair[span])[:, None, None]] for radial, span in zip(radials, spans)]
        for node_update, edge_update in zip(self.node_updates, self.edge_updates):
            normed = x if node_update.first else node_update.norm(x)
            sums = []
            for chunk, span, radial, e in zip(inputs.chunks, spans, radials, edges):

                def messages(normed, *e, chunk=chunk, span=span, radial=radial, node_update=node_update):
                    e = list(e) if node_update.first else node_update.edge_norm(list(e))
                    return node_update.messages(normed, e, radial, env[span], inputs, chunk, pair[span])

                sums.append(run(messages, normed, *e))
            x = exchange(node_update(x, torch.cat(sums)))
            normed = edge_update.norm(x)
            for k, (chunk, span, radial, e) in enumerate(zip(inputs.chunks, spans, radials, edges)):

                def update(normed, *e, chunk=chunk, span=span, radial=radial, edge_update=edge_update):
                    return edge_update(normed, list(e), radial, inputs, chunk, pair[span])

                edges[k] = run(update, normed, *e)
        return self.read_out(inputs, x, edges)

    def read_out(self, inputs: Inputs, x: Tensor, edges: list[list[Tensor]]):
        x = self.node_norm(x)
        onsite = {}
        for s, a in inputs.atoms_of.items():
            read = self._read(
                x[a.atoms], self.onsite_readout, f"{s}", self.slots[s, s], lambda v, L: v[:, L * L : (L + 1) ** 2]
            )
            onsite[s] = 0.5 * (read + read[:, a.adjoint] * a.sign) * a.scale
        # rows of the m-major order that hold (L, -L..L)
        rows = {L: layout(self.lmax).m_major[L * L : (L + 1) ** 2] for L in range(self.lmax + 1)}
        flat = [torch.cat([p.flatten(1, 2) for p in self.edge_norm(e)], 1) for e in edges]
        raw = {}
        for (s_i, s_j), p in inputs.pairs.items():
            parts = []
            for (first, last, _, _), f in zip(inputs.chunks, flat):
                # edges of a pair are ascending, so those of a chunk are a range
                low, high = torch.searchsorted(p.edges, torch.tensor([first, last], device=p.edges.device)).tolist()
                select = f[p.edges[low:high] - first]
                parts.append(
                    self._read(select, self.offsite_readout, f"{s_i}-{s_j}", self.slots[s_i, s_j], lambda v, L: v[:, rows[L]])
                )
            raw[s_i, s_j] = torch.cat(parts) * p.scale
        offsite = {
            (s_i, s_j): 0.5 * (raw[s_i, s_j] + raw[s_j, s_i][p.reverse][:, p.adjoint] * p.sign)
            for (s_i, s_j), p in inputs.pairs.items()
        }
        return offsite, onsite

    def _read(self, features: Tensor, weights, name: str, slots: dict, rows) -> Tensor:
        parts = []
        for L, n in slots.items():
            if self.lmax >= L:
                parts.append((rows(features, L) @ weights[f"{name}-{L}"]).flatten(1))
            else:
                parts.append(features.new_zeros(len(features), (2 * L + 1) * n))
        return torch.cat(parts, 1)
