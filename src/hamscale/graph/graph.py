"""Hold the graph of a structure: its edges sorted by destination, and the learning targets of atoms and edges.

Targets are coupled blocks of H - mu S less the reference, in Hartree. The targets of edges are given in the edge frame, so
that nothing has to be rotated back during training (codec.py). The layout of a coupled vector is described in coupling.py,
the schema `graph/3` in docs/files.md.
A rank that shares a structure has the edges into its own atoms alone. It takes them from one of three sources: the positions
(`UnbuiltGraph`), a file (`GraphFile`), or a graph in memory (`Graph`). In a file, edges are sorted by destination and targets
follow the edges, so that the rows of an atom lie together; where they begin follows from the number of edges into every atom.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
from ase import Atoms

from ..basis import Basis
from ..container import create_h5, open_h5, store_fingerprint
from ..layout import Array, Layout
from ..operators import check_finite, read_basis, read_structure, write_basis, write_structure
from ..operators.files import BASIS, STRUCTURE
from ..pairs import ByElement, ByPair, PairList, place_in_element
from .neighbours import Neighbourhood, edges_within

ATTRIBUTES = ("gauge_hartree", "outside_fraction", "baseline_mae_hartree")
GRAPH = Layout(
    "graph/3",
    STRUCTURE
    | BASIS
    | {
        "edges": Array("i4", ("E", 5)),
        "degrees": Array("i4", ("A", "*")),
        "offsite/*": Array("f8", ("*", "*")),
        "onsite/*": Array("f8", ("*", "*")),
        "crystal_field/*": Array("f8", ("*", "*")),
    },
    {"cutoff_angstrom": float} | dict.fromkeys(ATTRIBUTES, float),
)


class GraphSource(Protocol):
    """A graph that is in memory, in a file or not built yet, from which a rank takes its part."""

    @property
    def atoms(self) -> Atoms: ...

    @property
    def cutoff_angstrom(self) -> float: ...

    @property
    def components(self) -> tuple[int, int]:
        """Return the numbers of offsite and of onsite components of the targets of the whole structure."""

    def degrees(self) -> np.ndarray:
        """Count the edges into every atom, (A,)."""

    def part(self, owned: np.ndarray | None = None) -> "Graph":
        """Return the graph of the edges into some atoms, ascending; of the whole structure by default."""


@dataclass
class Graph:
    """Atoms and directed edges of one structure, or a rank's part: all atoms, and the edges into the atoms that it owns.

    edges    # PairList, sorted: i destination and row, j source and column
    owned    # (O,)   | atoms of the part, ascending; all atoms for a whole structure
    elements # pairs of elements with edges between them in the whole structure, or, of a part that is made from positions,
             # those of its edges and of their flipped edges
    offsite  # (z_i, z_j) -> (G, n) | targets in the edge frame, Hartree, for the edges `edges.between(z_i, z_j)`
    onsite   # z -> (A_z, n)        | targets, Hartree, for the owned atoms of that element
    crystal_field  # z -> (A_z, n)  | reference blocks of those atoms, Hartree (CrystalField.of_graph)

    A graph for prediction has no targets. crystal_field is None if it has not been computed.

    graph = structure_graph(atoms, reference.basis, reference.cutoff_angstrom)
    graph.offsite[72, 8]  # of a graph that BlockCodec.encode has made
    """

    atoms: Atoms
    basis: Basis
    cutoff_angstrom: float
    edges: PairList
    owned: np.ndarray
    elements: list[tuple[int, int]]
    offsite: ByPair = field(default_factory=dict)
    onsite: ByElement = field(default_factory=dict)
    crystal_field: ByElement | None = None
    attributes: dict = field(default_factory=dict)

    @property
    def components(self) -> tuple[int, int]:
        """Return the numbers of offsite and of onsite components of the targets."""
        return sum(t.size for t in self.offsite.values()), sum(t.size for t in self.onsite.values())

    def degrees(self) -> np.ndarray:
        """Count the edges into every atom, (A,)."""
        return np.bincount(self.edges[:, 0], minlength=len(self.atoms))

    def part(self, owned: np.ndarray | None = None) -> "Graph":
        """Return the part of the graph that belongs to a rank which owns the given atoms; all of it by default."""
        if owned is None:
            return self
        mine = np.zeros(len(self.atoms), bool)
        mine[owned] = True
        keep = mine[self.edges[:, 0]]
        of_atoms = lambda blocks: {z: b[mine[self.atoms_of(z)]] for z, b in blocks.items()}  # noqa: E731
        return replace(
            self,
            edges=self.edges.take(keep),
            offsite={pair: target[keep[self.edges.between(*pair)]] for pair, target in self.offsite.items()},
            onsite=of_atoms(self.onsite),
            crystal_field=None if self.crystal_field is None else of_atoms(self.crystal_field),
            owned=np.asarray(owned),
        )

    def atom_rows(self) -> np.ndarray:
        """Return the row of every owned atom among the owned atoms of its element, -1 for other atoms, (A,)."""
        row = np.full(len(self.atoms), -1)
        row[self.owned] = place_in_element(self.atoms.numbers[self.owned])
        return row

    def atoms_of(self, z: int) -> np.ndarray:
        """Return the owned atoms of an element."""
        return self.owned[self.atoms.numbers[self.owned] == z]


@dataclass(frozen=True)
class UnbuiltGraph:
    """The graph of a structure, without targets and crystal field, whose edges are sought when a part is asked for.

    A part costs the memory and the time of its own edges, and a few numbers per atom of the structure.
    Raises ValueError for an element that the basis lacks.
    """

    atoms: Atoms
    basis: Basis
    cutoff_angstrom: float
    components: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for z in np.unique(self.atoms.numbers):
            self.basis[int(z)]  # raises an error that names the known elements if this one is missing

    def degrees(self) -> np.ndarray:
        """Count the edges into every atom, (A,), without listing them."""
        return Neighbourhood(self.atoms, self.cutoff_angstrom).degrees()

    def part(self, owned: np.ndarray | None = None) -> Graph:
        """Build the graph of the edges into some atoms, ascending; of the whole structure by default."""
        edges = edges_within(self.atoms, self.cutoff_angstrom, owned)
        owned = np.arange(len(self.atoms)) if owned is None else np.asarray(owned)
        # of the flipped edges another rank may have all
        elements = sorted({pair for z_i, z_j in edges.elements for pair in ((z_i, z_j), (z_j, z_i))})
        return Graph(self.atoms, self.basis, float(self.cutoff_angstrom), edges, owned, elements)


def structure_graph(atoms: Atoms, basis: Basis, cutoff_angstrom: float) -> Graph:
    """Build the graph of a structure, without targets and crystal field."""
    return UnbuiltGraph(atoms, basis, cutoff_angstrom).part()


def elements_of(name: str) -> tuple[int, int]:
    """Return (z_i, z_j) of the name "Z_I-Z_J" that a file gives to data of a pair of elements."""
    z_i, z_j = name.split("-")
    return int(z_i), int(z_j)


def write_graph(path: str | Path, graph: Graph, made_of: dict[str, list[str]] | None = None) -> None:
    """Write a graph to a file of schema `graph/3`, atomically, with a fingerprint by which a training knows it again.

    made_of: identities of its operators and its reference (container.identity).
    """
    with create_h5(path, GRAPH, made_of, cutoff_angstrom=graph.cutoff_angstrom, **graph.attributes) as file:
        write_structure(file, graph.atoms)
        write_basis(file, graph.basis)
        file["edges"] = np.asarray(graph.edges, np.int32)
        file["degrees"] = _count(graph.atoms.numbers, [graph.edges.table]).astype(np.int32)
        for (z_i, z_j), target in graph.offsite.items():
            file[f"offsite/{z_i}-{z_j}"] = target
            file[f"offsite/{z_i}-{z_j}"].attrs["unit"] = "Hartree"
        for z, target in graph.onsite.items():
            assert graph.crystal_field is not None, "targets are relative to the crystal field"
            file[f"onsite/{z}"] = target
            file[f"onsite/{z}"].attrs["unit"] = "Hartree"
            file[f"crystal_field/{z}"] = graph.crystal_field[z]
            file[f"crystal_field/{z}"].attrs["unit"] = "Hartree"
        store_fingerprint(file)


class GraphFile:
    """A graph in a file of schema `graph/3`, from which a rank reads the rows of its atoms and nothing else.

    Raises ValueError (path, found, expected) if the file is missing, cut short or of another schema.

    source = GraphFile("train-000.h5")
    source.part(np.arange(100))  # the graph of the edges into the first hundred atoms
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with open_h5(path, GRAPH) as file:
            self.atoms, self.basis = read_structure(file), read_basis(file)
            self.cutoff_angstrom = float(file.attrs["cutoff_angstrom"])
            offsite, onsite = (sum(int(d.size) for d in file.get(group, {}).values()) for group in ("offsite", "onsite"))
            self.components = offsite, onsite
            self.attributes = {name: file.attrs[name].item() for name in ATTRIBUTES}

    @cached_property
    def _counts(self) -> np.ndarray:
        """Return the number of edges into every atom from each element of the structure, (A, elements)."""
        with open_h5(self.path, GRAPH) as file:
            counts = file["degrees"][:].astype(np.int64)
            if counts.shape[1] != len(np.unique(self.atoms.numbers)) or counts.min() < 0 or counts.sum() != len(file["edges"]):
                raise ValueError(f"{self.path}: /degrees are not those of its {len(file['edges'])} edges. Make it again.")
            return counts

    def degrees(self) -> np.ndarray:
        """Count the edges into every atom, (A,)."""
        return self._counts.sum(1)

    def part(self, owned: np.ndarray | None = None) -> Graph:
        """Read the graph of the edges into some atoms, ascending; of the whole structure by default."""
        owned = np.arange(len(self.atoms)) if owned is None else np.asarray(owned)
        numbers, counts = self.atoms.numbers, self._counts
        places = place_in_element(numbers)
        own = {z: places[owned[numbers[owned] == z]] for z in np.unique(numbers).tolist()}
        one = {z: np.ones((numbers == z).sum(), np.int64) for z in own}
        with open_h5(self.path, GRAPH) as file:
            edges = PairList(self.atoms, _rows(file["edges"], counts.sum(1), owned))
            pairs, offsite = [], {}
            for z_i, (kind, z_j) in product(own, enumerate(own)):
                of_pair = counts[numbers == z_i, kind]
                if of_pair.any():
                    pairs.append((z_i, z_j))
                if (name := f"offsite/{z_i}-{z_j}") in file:
                    if len(file[name]) != of_pair.sum():
                        raise ValueError(f"{self.path}: /{name} has {len(file[name])} targets, expected {of_pair.sum()}.")
                    offsite[z_i, z_j] = _rows(file[name], of_pair, own[z_i])
            onsite, crystal_field = (
                {int(z): _rows(data, one[int(z)], own[int(z)]) for z, data in file[group].items()}
                for group in ("onsite", "crystal_field")
            )
        for values in (*offsite.values(), *onsite.values(), *crystal_field.values()):
            check_finite(f"{self.path}: a target", values)
        targets = offsite, onsite, crystal_field, dict(self.attributes)
        return Graph(self.atoms, self.basis, self.cutoff_angstrom, edges, owned, pairs, *targets)


def read_graph(path: str | Path) -> Graph:
    """Read a whole graph from a file of schema `graph/3`. Raises ValueError as `GraphFile` does."""
    return GraphFile(path).part()


def _count(numbers: np.ndarray, tables: Iterable[np.ndarray]) -> np.ndarray:
    """Count the edges into every atom from each element of the structure, ascending, (A, elements)."""
    elements = np.unique(numbers)
    kind, counts = np.searchsorted(elements, numbers), np.zeros(len(numbers) * len(elements), np.int64)
    for edges in tables:
        counts += np.bincount(edges[:, 0].astype(np.int64) * len(elements) + kind[edges[:, 1]], minlength=len(counts))
    return counts.reshape(len(numbers), len(elements))


def _rows(data: h5py.Dataset, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Read the rows of some atoms, ascending, of a dataset that has counts[k] rows for its atom k, one atom after another."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    result = np.empty((int(counts[chosen].sum()), *data.shape[1:]), data.dtype)
    done = 0
    for run in np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1) if len(result) else ():
        first, last = int(starts[run[0]]), int(starts[run[-1] + 1])  # atoms that follow one another are read at once
        if last > first:
            data.read_direct(result, np.s_[first:last], np.s_[done : done + last - first])
            done += last - first
    return result
