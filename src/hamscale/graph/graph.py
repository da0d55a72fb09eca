"""Hold the graph of a structure: its edges sorted by destination, and the learning targets of atoms and edges.

Targets are coupled blocks of H - mu S less the reference, in Hartree. The targets of edges are given in the edge frame, so
that nothing has to be rotated back during training (codec.py). The layout of a coupled vector is described in coupling.py,
the schema `graph/2` in docs/files.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from ase import Atoms

from ..basis import Basis
from ..files import create_h5, open_h5, store_fingerprint
from ..operators import read_basis, read_structure, write_basis, write_structure
from ..pairs import ByElement, ByPair, PairList, place_in_element
from .neighbours import edges_within

SCHEMA = "graph/2"


@dataclass
class Graph:
    """Atoms and directed edges of one structure, or a rank's part: all atoms, and the edges into the atoms that it owns.

    edges    # PairList, sorted: i destination and row, j source and column
    owned    # (O,)   | atoms of the part, ascending; all atoms for a whole structure
    elements # pairs of elements with edges between them in the whole structure
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

    def part(self, owned: np.ndarray) -> "Graph":
        """Return the part of the graph that belongs to a rank which owns the given atoms."""
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


def structure_graph(atoms: Atoms, basis: Basis, cutoff_angstrom: float) -> Graph:
    """Build the graph of a structure, without targets and crystal field."""
    for z in np.unique(atoms.numbers):
        basis[int(z)]  # raises an error that names the known elements if this one is missing
    edges = edges_within(atoms, cutoff_angstrom)
    return Graph(atoms, basis, float(cutoff_angstrom), edges, np.arange(len(atoms)), edges.elements)


def elements_of(name: str) -> tuple[int, int]:
    """Return (z_i, z_j) of the name "Z_I-Z_J" that a file gives to data of a pair of elements."""
    z_i, z_j = name.split("-")
    return int(z_i), int(z_j)


def write_graph(path: str | Path, graph: Graph) -> None:
    """Write a graph to a file of schema `graph/2`, atomically, with a fingerprint by which a training knows it again."""
    with create_h5(path, SCHEMA, cutoff_angstrom=graph.cutoff_angstrom, **graph.attributes) as file:
        write_structure(file, graph.atoms)
        write_basis(file, graph.basis)
        file["edges"] = np.asarray(graph.edges, np.int32)
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


def read_graph(path: str | Path) -> Graph:
    """Read a graph from a file of schema `graph/2`.

    Raises ValueError (path, found, expected) if the file is missing, cut short or of another schema.
    """
    with open_h5(path, SCHEMA) as file:
        atoms = read_structure(file)
        edges = PairList(atoms, file["edges"][:])
        onsite, crystal_field = (
            {int(name): data[:] for name, data in file[group].items()} for group in ("onsite", "crystal_field")
        )
        return Graph(
            atoms,
            read_basis(file),
            float(file.attrs["cutoff_angstrom"]),
            edges,
            np.arange(len(atoms)),
            edges.elements,
            {elements_of(name): data[:] for name, data in file.get("offsite", {}).items()},
            onsite,
            crystal_field,
            {name: file.attrs[name].item() for name in ("gauge_hartree", "outside_fraction", "baseline_mae_hartree")},
        )
