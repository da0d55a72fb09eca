"""Unite structures of a batch: they become one graph without edges between them, which fills a processor as one does not.

A union of structures is computed as one structure is, in chunks that reach over its members. Each member keeps its targets
and its loss, so that the result is that of one member after another, but for rounding.
On ranks that share every member, each rank unites its parts, in the same order as the others: an exchange then has one
message per neighbour for all members.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.network import AtomInputs, Exchange, Inputs, PairInputs
from ..parallel.exchange import TorchExchange
from ..partition.halo import Halo
from .tensors import Example

Pair = tuple[int, int]


@dataclass(frozen=True)
class Union:
    """Members of a batch as one graph.

    inputs: those of all members: owned atoms of one member after another, then ghosts by owner; edges likewise.
    """

    inputs: Inputs
    exchange: Exchange
    members: list[Example]

    def split(self, predicted: tuple[dict, dict]) -> Iterator[tuple[Example, tuple[dict, dict]]]:
        """Yield each member with its part of what the network predicts for the union."""
        offsite, onsite = predicted
        first: dict[Any, int] = dict.fromkeys([*offsite, *onsite], 0)
        for member in self.members:
            parts: list[dict] = []
            for blocks, of_member in (
                (offsite, {pair: len(p.flipped) for pair, p in member.inputs.pairs.items()}),
                (onsite, {s: len(a.atoms) for s, a in member.inputs.atoms_of.items()}),
            ):
                parts.append({key: blocks[key][first[key] : first[key] + n] for key, n in of_member.items()})
                for key, n in of_member.items():
                    first[key] += n
            yield member, (parts[0], parts[1])


def unions(structures: Iterable[Example], edges: int, chunk: int) -> Iterator[Union]:
    """Unite structures that follow one another, until one more would give a union more than so many edges.

    edges: of the whole structures, whatever part of them a rank has, so that all ranks unite the same ones.
    chunk: number of edges that are processed together.
    """
    members: list[Example] = []
    for structure in structures:
        if members and sum(member.edges for member in members) + structure.edges > edges:
            yield unite(members, chunk)
            members = []
        members.append(structure)
    if members:
        yield unite(members, chunk)


def unite(members: list[Example], chunk: int) -> Union:
    """Unite structures, or this rank's parts of them."""
    if len(members) == 1:
        return Union(members[0].inputs, members[0].exchange, members)
    inputs = [member.inputs for member in members]
    first_atom = _starts([i.atoms for i in inputs])
    owned = sum(i.atoms for i in inputs)
    received = [{n: s.stop - s.start for n, s in m.halo.receive.items()} if m.halo else {} for m in members]
    device = inputs[0].source.device
    rows = [  # of the union, of the owned atoms and ghosts of every member
        torch.cat([torch.arange(i.atoms, device=device) + first, torch.from_numpy(ghosts).to(device)])
        for i, first, ghosts in zip(inputs, first_atom, _arrivals(received, owned))
    ]
    species = inputs[0].species.new_empty(sum(map(len, rows)))
    for i, places in zip(inputs, rows):
        species[places] = i.species
    united, *from_ghosts = [_part(list(part), species, rows, first_atom, chunk) for part in zip(*(i.parts for i in inputs))]
    united.atoms_of = _atoms(inputs, first_atom)
    united.from_ghosts = from_ghosts[0] if from_ghosts else None
    of_pair = {pair: [len(i.pairs[pair].flipped) if pair in i.pairs else 0 for i in inputs] for pair in united.pairs}
    united.pairs = {pair: _paired(members, united, pair, of_pair) for pair in of_pair}
    return Union(united, _exchange(members, of_pair, received, first_atom), members)


def _part(inputs: list[Inputs], species: Tensor, rows: list[Tensor], first_atom: list[int], chunk: int) -> Inputs:
    """Unite edges of all members, without pairing blocks and adjoints.

    rows: of the union, of the owned atoms and ghosts of every member.
    """
    first_edge = _starts([len(i.source) for i in inputs])
    spans = [
        (e + first, last_e + first, a + atom, last_a + atom)
        for i, first, atom in zip(inputs, first_edge, first_atom)
        for e, last_e, a, last_a in i.spans
    ]
    runs = _runs([last - first for first, last, *_ in spans], chunk)
    source = torch.cat([places[i.source] for i, places in zip(inputs, rows)])
    destination = torch.cat([i.destination + first for i, first in zip(inputs, first_atom)])
    return Inputs(
        species,
        source,
        destination,
        torch.stack([source, destination], 1).flatten(),
        torch.cat([i.pair for i in inputs]),
        torch.cat([i.distances for i in inputs]),
        torch.cat([i.rotations for i in inputs]),
        [degree for i in inputs for degree in i.degrees],
        torch.cat([inputs[0].offsets[:1], *(i.offsets[1:] + first for i, first in zip(inputs, first_edge))]),
        [(spans[a][0], spans[b - 1][1], spans[a][2], spans[b - 1][3]) for a, b in runs],
        {pair: _pair(inputs, pair, first_edge, runs) for pair in sorted({pair for i in inputs for pair in i.pairs})},
        way=inputs[0].way,
        whole=inputs[0].whole,
    )


def _starts(sizes: list[int]) -> list[int]:
    """Return the place of the first item of every member."""
    return [0, *np.cumsum(sizes)[:-1].tolist()]


def _runs(sizes: list[int], chunk: int) -> list[tuple[int, int]]:
    """Join spans of so many edges that follow one another into chunks of at most `chunk` edges: (first span, last)."""
    ends = [0]
    total = 0
    for k, size in enumerate(sizes):
        if total and total + size > chunk:
            ends.append(k)
            total = 0
        total += size
    return list(zip(ends, [*ends[1:], len(sizes)]))


def _arrivals(counts: list[dict[int, int]], first: int) -> list[np.ndarray]:
    """Return the places of what members receive: a neighbour's message holds the rows of one member after another.

    counts: of every member, how many rows come from each neighbour. first: place of the first row received.
    """
    places: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in counts]
    for neighbour in sorted({n for of_member in counts for n in of_member}):
        for of_member, places_of in zip(counts, places):
            n = of_member.get(neighbour, 0)
            places_of.append(np.arange(first, first + n))
            first += n
    return [np.concatenate(places_of) for places_of in places]


def _pair(inputs: list[Inputs], pair: Pair, first_edge: list[int], runs: list[tuple[int, int]]) -> PairInputs:
    """Unite the edges between two elements, without pairing blocks and adjoints."""
    spans: list[slice] = []
    begin = 0
    for i in inputs:
        of_member = i.pairs[pair].spans if pair in i.pairs else [slice(0, 0)] * len(i.spans)
        spans += [slice(begin + s.start, begin + s.stop) for s in of_member]
        begin = spans[-1].stop
    found = [(i.pairs[pair], first) for i, first in zip(inputs, first_edge) if pair in i.pairs]
    edges, like = torch.cat([p.edges + first for p, first in found]), found[0][0]
    joined = [slice(spans[a].start, spans[b - 1].stop) for a, b in runs]
    scale = torch.cat([p.scale for p, _ in found])
    return PairInputs(edges, joined, torch.full_like(edges, -1), like.adjoint, like.sign, scale)


def _paired(members: list[Example], united: Inputs, pair: Pair, of_pair: dict[Pair, list[int]]) -> PairInputs:
    """Pair blocks between two elements with their adjoints, and order the edges of all parts as the graphs of members do."""
    back = pair[1], pair[0]
    received = [{n: of.get(back, 0) for n, of in m.blocks[1].items()} if m.blocks else {} for m in members]
    arrivals = _arrivals(received, sum(of_pair[back]))
    flipped: list[Tensor] = []
    rows: list[Tensor] = []
    first = [0, *(len(part.pairs[pair].edges) for part in united.parts[:-1])]  # row of the next member, in each part
    for k, member in enumerate(members):
        if pair not in member.inputs.pairs:
            continue
        p = member.inputs.pairs[pair]
        own, start = of_pair[back][k], sum(of_pair[back][:k])
        # own edges first, then what arrives
        places = torch.cat([torch.arange(start, start + own), torch.from_numpy(arrivals[k])]).to(p.flipped.device)
        flipped.append(places[p.flipped])
        if p.rows is not None:
            ends = [begin + len(part.pairs[pair].edges) for begin, part in zip(first, member.inputs.parts)]
            places = torch.cat([torch.arange(*run) for run in zip(first, ends)]).to(p.rows.device)
            rows.append(places[p.rows])
            first = ends
    return replace(united.pairs[pair], flipped=torch.cat(flipped), rows=torch.cat(rows) if rows else None)


def _atoms(inputs: list[Inputs], first_atom: list[int]) -> dict[int, AtomInputs]:
    """Unite the atoms of each element."""
    result = {}
    for s in sorted({s for i in inputs for s in i.atoms_of}):
        parts = [(i.atoms_of[s], first) for i, first in zip(inputs, first_atom) if s in i.atoms_of]
        like = parts[0][0]
        result[s] = AtomInputs(
            torch.cat([a.atoms + first for a, first in parts]),
            like.adjoint,
            like.sign,
            like.scale,
            torch.cat([a.crystal_field for a, _ in parts]),
        )
    return result


def _exchange(
    members: list[Example], of_pair: dict[Pair, list[int]], received: list[dict[int, int]], first_atom: list[int]
) -> Exchange:
    """Make the exchange of all members: to a neighbour, the rows of one member after another in one message."""
    first = members[0].exchange
    halos = [member.halo for member in members if member.halo]
    if not isinstance(first, TorchExchange):
        return first
    sent = [(halo.send, start) for halo, start in zip(halos, first_atom)]
    send = {n: _joined((of[n] + start for of, start in sent if n in of)) for n in _keys(of for of, _ in sent)}
    ends, receive = 0, {}
    for n in sorted(send):
        begin, ends = ends, ends + sum(of.get(n, 0) for of in received)
        receive[n] = slice(begin, ends)
    atoms, ghosts = sum(len(halo.owned) for halo in halos), sum(len(halo.ghosts) for halo in halos)
    halo = Halo(halos[0].rank, np.arange(atoms), np.arange(atoms, atoms + ghosts), send, receive)
    blocks = [member.blocks for member in members if member.blocks]
    starts = {pair: _starts(counts) for pair, counts in of_pair.items()}
    rows: dict[int, dict] = {n: {} for n in send}
    counts: dict[int, dict] = {n: {} for n in send}
    for n in send:
        for pair in of_pair:
            of_members = [(of.get(n, {}), start) for (of, _), start in zip(blocks, starts[pair])]
            rows[n][pair] = _joined(of[pair] + start for of, start in of_members if pair in of)
            counts[n][pair] = sum(of.get(n, {}).get(pair, 0) for _, of in blocks)
    return type(first)(halo, first.world, first.first_rank, (rows, counts), first.wire)


def _keys(dictionaries: Iterable[Mapping[int, Any]]) -> list[int]:
    return sorted({key for of in dictionaries for key in of})


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])
