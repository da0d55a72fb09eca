"""Describe the data that travel between parts, and store which part owns which atom.

A rank derives its own lists, its halo, from the edges into its atoms (`halo_of`). The lists of all ranks together
(`Partition`) are made for their numbers alone: the quality of a partition, and which ranks should share a node. The schema
`partition/3` is described in docs/files.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms

from ..container import create_h5, open_h5
from ..layout import Array, Layout
from ..operators import read_structure, write_structure
from ..operators.files import STRUCTURE
from ..pairs import PairList

PARTITION = Layout(
    "partition/3",
    STRUCTURE | {"owner": Array("i4", ("A",)), "edges": Array("i8", ("parts",))},
    {"parts": int, "cutoff_angstrom": float},
)


@dataclass
class Halo:
    """The share of a structure that belongs to one rank, and the atoms it exchanges.

    owned, ghosts    # atoms of the structure; ghosts by owner, then ascending
    send     # neighbour -> rows of `owned` whose features the neighbour needs
    receive  # neighbour -> slice of `ghosts` that the neighbour owns
    """

    rank: int
    owned: np.ndarray
    ghosts: np.ndarray
    send: dict[int, np.ndarray]
    receive: dict[int, slice]


def halo_of(pairs: PairList, owner: np.ndarray, rank: int) -> Halo:
    """Derive the halo of a rank from the pairs (i, j, R) whose atoms i it owns, and the owners of all atoms, (A,).

    Nothing need be asked of other ranks. Every pair (i, j, R) is accompanied by (j, i, -R), so an atom i with a source j of
    another rank is itself a source for that rank, which needs it. Both sides order the atoms of a message by their numbers.
    """
    owned = np.flatnonzero(owner == rank)
    cut = np.flatnonzero(owner[pairs[:, 1]] != rank)
    i, j = pairs[cut, 0], pairs[cut, 1]
    needed = np.zeros(len(owner), bool)
    needed[j] = True
    ghosts = np.flatnonzero(needed)
    ghosts = ghosts[np.argsort(owner[ghosts], kind="stable")]
    neighbours, first = np.unique(owner[ghosts], return_index=True)
    receiver, atom = np.divmod(np.unique(owner[j] * len(owner) + i), len(owner)) if len(cut) else (neighbours, neighbours)
    ends = np.append(first[1:], len(ghosts))
    return Halo(
        rank,
        owned,
        ghosts,
        {n: np.searchsorted(owned, atom[receiver == n]) for n in neighbours.tolist()},
        {n: slice(*span) for n, *span in zip(neighbours.tolist(), first.tolist(), ends.tolist())},
    )


@dataclass
class Partition:
    """Parts of a structure, and the messages between them.

    owner     # (A,)    | rank of every atom
    ghosts    # (G,)    | atoms, by receiver, sender, atom
    messages  # (M, 4)  | receiver, sender, first, last: ghosts[first:last] travel in one message per exchange
    edges     # (parts,) | number of edges of every rank
    attributes: method, cutoff_angstrom, seconds.

    parts = partition(atoms, Neighbourhood(atoms, 8.0), cutoff_angstrom=8.0, parts=4)
    halo_of(edges_within(atoms, 8.0, np.flatnonzero(parts.owner == 0)), parts.owner, 0)  # what rank 0 exchanges
    """

    owner: np.ndarray
    parts: int
    ghosts: np.ndarray
    messages: np.ndarray
    edges: np.ndarray
    attributes: dict = field(default_factory=dict)

    def per_rank(self) -> dict[str, np.ndarray]:
        """Count the neighbours, sent and received embeddings per exchange, nodes, and edges of every rank, (parts,) each."""
        receiver, sender, first, last = self.messages.T
        count = lambda of, weights=None: np.bincount(of, weights, minlength=self.parts).astype(np.int64)  # noqa: E731
        return {
            "neighbours": count(receiver),
            "sent": count(sender, last - first),
            "received": count(receiver, last - first),
            "nodes": count(self.owner),
            "edges": self.edges,
        }

    def between_nodes(self, ranks_per_node: int) -> int:
        """Count the embeddings of one exchange that leave their node."""
        receiver, sender, first, last = self.messages.T
        return int((last - first)[receiver // ranks_per_node != sender // ranks_per_node].sum())

    def quality(self) -> dict[str, float]:
        """Compute means and maxima over ranks; an imbalance is the maximum divided by the mean."""
        result = {}
        for name, values in self.per_rank().items():
            mean, largest = float(values.mean()), float(values.max())
            if name in ("nodes", "edges"):
                result[f"{name.removesuffix('s')}_imbalance"] = largest / mean if mean else 1.0
            else:
                result |= {f"{name}_mean": mean, f"{name}_max": largest}
        return result


def halo_lists(owner: np.ndarray, parts: int, pieces: Iterable, degrees: np.ndarray) -> Partition:
    """List the data that travel: for every edge (i, j) between parts, atom j goes to the owner of i.

    Each atom is sent once per receiver.
    pieces: (i, j) arrays of edges, so that not all edges need be in memory; both directions of an edge are among them.
    """
    n = len(owner)
    row = np.empty(n, np.int64)  # scratch array: row of each source among the sources of a piece
    found = []
    for i, j in pieces:
        receiver = owner[i]
        cut = receiver != owner[j]
        receiver, source = receiver[cut], j[cut]
        # a table of the receivers and sources that occur marks each combination once, without sorting the edges
        ranks, columns = _occurring(receiver, parts), _occurring(source, n)
        row[columns] = np.arange(len(columns))
        of_rank = np.empty(parts, np.int64)
        of_rank[ranks] = np.arange(len(ranks))
        table = np.zeros((len(ranks), len(columns)), bool)
        table[of_rank[receiver], row[source]] = True
        a, b = np.nonzero(table)
        found.append(ranks[a] * n + columns[b])
    keys = np.unique(np.concatenate([*found, np.empty(0, np.int64)])) if len(found) != 1 else found[0]
    receiver, atom = np.divmod(keys, n) if n else (keys, keys)
    sender = owner[atom]
    order = np.lexsort((atom, sender, receiver))
    receiver, sender, ghosts = receiver[order], sender[order], atom[order]
    first = np.flatnonzero(np.diff(receiver * parts + sender, prepend=-1))
    messages = np.column_stack([receiver[first], sender[first], first, np.append(first[1:], len(ghosts))[: len(first)]])
    edges = np.bincount(owner, degrees, minlength=parts).astype(np.int64)
    return Partition(owner, parts, ghosts, messages, edges)


def _occurring(values: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[values] = True
    return np.flatnonzero(mask)


def group_nodes(partition: Partition, ranks_per_node: int) -> Partition:
    """Renumber the parts so that parts that exchange much become ranks of one node.

    Starting from the lowest part left, a node takes the parts that exchange most with those it already has. If that does
    not reduce the data sent between nodes, the parts are returned unchanged.
    """
    p = partition
    receiver, sender, first, last = p.messages.T
    volume: dict[int, dict[int, int]] = {}
    for a, b, n in zip(receiver.tolist(), sender.tolist(), (last - first).tolist()):
        volume.setdefault(a, {})[b] = volume.setdefault(a, {}).get(b, 0) + n
    number, left = np.empty(p.parts, np.int64), dict.fromkeys(range(p.parts))
    ties: dict[int, int] = {}
    for rank in range(p.parts):
        if rank % ranks_per_node == 0:
            part, ties = next(iter(left)), {}
        else:
            part = max(left, key=lambda q: (ties.get(q, 0), -q)) if len(ties) else next(iter(left))
        del left[part]
        number[part] = rank
        for other, n in volume.get(part, {}).items():
            if other in left:
                ties[other] = ties.get(other, 0) + n
        ties.pop(part, None)
    order = np.lexsort((p.ghosts, np.repeat(number[sender], last - first), np.repeat(number[receiver], last - first)))
    renumbered = np.column_stack([number[receiver], number[sender], first, last])
    renumbered = renumbered[np.lexsort((renumbered[:, 1], renumbered[:, 0]))]
    ends = np.cumsum(renumbered[:, 3] - renumbered[:, 2])
    renumbered[:, 2], renumbered[:, 3] = np.concatenate([[0], ends[:-1]])[: len(ends)], ends
    edges = np.empty_like(p.edges)
    edges[number] = p.edges
    result = Partition(number[p.owner], p.parts, p.ghosts[order], renumbered, edges, dict(p.attributes))
    return min(p, result, key=lambda q: q.between_nodes(ranks_per_node))


def write_partition(path: str | Path, partition: Partition, atoms: Atoms) -> None:
    attributes = partition.attributes | partition.quality()
    with create_h5(path, PARTITION, parts=partition.parts, **attributes) as file:
        write_structure(file, atoms)
        file["owner"] = partition.owner.astype(np.int32)
        file["edges"] = partition.edges


def read_owner(path: str | Path, atoms: Atoms, parts: int, cutoff_angstrom: float) -> np.ndarray:
    """Read the owner of every atom, (A,), from a file of schema `partition/3`.

    Raises ValueError if the file is of another structure, number of parts or cutoff, or names a part that does not exist.
    """
    with open_h5(path, PARTITION) as file:
        for name, found, expected in (
            ("parts", int(file.attrs["parts"]), parts),
            ("cutoff_angstrom", float(file.attrs["cutoff_angstrom"]), float(cutoff_angstrom)),
        ):
            if found != expected:
                raise ValueError(f"{path}: {name} is {found}, expected {expected}. Make it anew with `hamscale partition`.")
        if not _same(read_structure(file), atoms):
            raise ValueError(f"{path}: its structure is another one. Make it anew with `hamscale partition`.")
        owner = file["owner"][:].astype(np.int64)
    if len(owner) != len(atoms) or not ((owner >= 0) & (owner < parts)).all():
        raise ValueError(f"{path}: its owners are not those of {len(atoms)} atoms in {parts} parts. Make it anew.")
    return owner


def _same(a: Atoms, b: Atoms) -> bool:
    """Return whether two structures are equal except for lattice vectors and rounding."""
    if not (np.array_equal(a.numbers, b.numbers) and np.array_equal(a.pbc, b.pbc) and np.allclose(a.cell, b.cell, atol=1e-6)):
        return False
    offset = (a.positions - b.positions) @ np.linalg.inv(a.cell.complete())
    offset -= np.where(a.pbc, np.round(offset), 0)
    return bool((np.abs(offset @ a.cell.complete()) < 1e-6).all())
