"""The graph of a structure: edges sorted by destination, and what the network is to learn on each atom and edge.

Targets are coupled blocks of H - mu S less the reference, in Hartree; those of edges stand in the edge frame, so
that training rotates nothing back. Layout of a coupled vector: graph/coupling.py. Schema `graph/2`: docs/files.md.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from ase import Atoms

from ..angular import edge_rotations
from ..basis import Basis
from ..files import create_h5, open_h5
from ..operators import (
    Operators,
    match_pairs,
    pair_vectors,
    read_basis,
    read_structure,
    rows_of_elements,
    write_basis,
    write_structure,
)
from .coupling import Coupling, coupled_groups
from .crystal_field import onsite_blocks
from .neighbours import edges_within
from .reference import Reference, outside_sums

SCHEMA = "graph/2"


@dataclass
class Graph:
    """Atoms and directed edges of one structure, with or without targets; or the part of a rank, which has all atoms, the edges
    into those it owns, and the targets of both.

    edges    # (E, 5) | i, j, Rx, Ry, Rz, sorted: i destination and row, j source and column
    vectors  # (E, 3) | from i to j, Angstrom
    owned    # (O,)   | atoms of the part, ascending; all of a whole structure
    kinds    # pairs of elements with edges between them in the whole structure
    offsite  # (z_i, z_j) -> (G, n) | targets in the edge frame, Hartree, for the edges `edges_of(z_i, z_j)`
    onsite   # z -> (A_z, n)        | targets, Hartree, for the atoms of that element
    crystal_field  # z -> (A_z, n)  | their reference blocks, Hartree (CrystalField.of_graph)
    """

    atoms: Atoms
    basis: Basis
    cutoff_angstrom: float
    edges: np.ndarray
    offsite: dict = field(default_factory=dict)
    onsite: dict = field(default_factory=dict)
    crystal_field: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    owned: np.ndarray | None = None
    kinds: list[tuple[int, int]] | None = None

    def __post_init__(self):
        self.vectors = pair_vectors(self.atoms, self.edges)
        self.distances = np.linalg.norm(self.vectors, axis=1)
        if self.owned is None:
            self.owned = np.arange(len(self.atoms))
        if self.kinds is None:
            numbers = self.atoms.numbers
            self.kinds = [tuple(map(int, p)) for p in np.unique(numbers[self.edges[:, :2]].reshape(-1, 2), axis=0)]

    def part(self, owned: np.ndarray) -> "Graph":
        """The part of a rank that owns some atoms."""
        mine = np.zeros(len(self.atoms), bool)
        mine[owned] = True
        keep = mine[self.edges[:, 0]]
        offsite = {pair: target[keep[self.edges_of(*pair)]] for pair, target in self.offsite.items()}
        of_atoms = lambda blocks: {z: b[mine[self.atoms_of(z)]] for z, b in blocks.items()}  # noqa: E731
        return replace(
            self,
            edges=self.edges[keep],
            offsite=offsite,
            onsite=of_atoms(self.onsite),
            crystal_field=of_atoms(self.crystal_field),
            owned=np.asarray(owned),
        )

    def edges_of(self, z_i: int, z_j: int) -> np.ndarray:
        """Indices of the edges between two elements, ascending."""
        numbers = self.atoms.numbers
        return np.flatnonzero((numbers[self.edges[:, 0]] == z_i) & (numbers[self.edges[:, 1]] == z_j))

    def rows(self, edges: np.ndarray) -> np.ndarray:
        """Row of some edges among those of their pair of elements, `edges_of`; -1 stays -1."""
        row = np.empty(len(self.edges) + 1, np.int64)
        for pair in self.kinds:
            of_pair = self.edges_of(*pair)
            row[of_pair] = np.arange(len(of_pair))
        row[-1] = -1
        return row[edges]

    def atom_rows(self) -> np.ndarray:
        """Row of every owned atom among those of its element, -1 for others, (A,)."""
        row = np.full(len(self.atoms), -1)
        row[self.owned] = rows_of_elements(self.atoms.numbers[self.owned])
        return row

    def atoms_of(self, z: int) -> np.ndarray:
        """Owned atoms of an element."""
        return self.owned[self.atoms.numbers[self.owned] == z]


def structure_graph(atoms: Atoms, basis: Basis, cutoff_angstrom: float) -> Graph:
    """The graph of a structure without targets: what prediction starts from."""
    for z in np.unique(atoms.numbers):
        basis[int(z)]  # says which elements are known
    return Graph(atoms, basis, float(cutoff_angstrom), edges_within(atoms, cutoff_angstrom))


def training_graph(operators: Operators, reference: Reference) -> Graph:
    """Graph and targets of a structure with DFT blocks. An edge without a block has H = 0.

    attributes: gauge_hartree; outside_fraction, the share of sum |H| on pairs beyond the cutoff; baseline_mae_hartree, the mean
    error of the reference alone over all elements within the cutoff, blocks of edges in their frames.
    Raises ValueError if the basis differs from the reference's.
    """
    if difference := reference.basis.difference(operators.basis):
        raise ValueError(f"basis of these operators differs from that of the reference: {difference}.")
    graph = structure_graph(operators.atoms, reference.basis, reference.cutoff_angstrom)
    coupling = Coupling(reference.basis)
    field = reference.crystal_field
    of_atoms = onsite_blocks(operators, coupling, graph, field.near_angstrom, field.charges)
    remainder = reference.remainder(operators, of_atoms)
    rows = graph.rows(match_pairs(operators.pairs, graph.edges))
    atom_rows = graph.atom_rows()
    for z_i, z_j in graph.kinds:
        pair, distances = coupling[z_i, z_j], graph.distances[graph.edges_of(z_i, z_j)]
        target = graph.offsite[z_i, z_j] = np.zeros((len(distances), pair.size))
        target[:, pair.zero_order] = -reference.offsite(z_i, z_j, distances)
    for z in np.unique(graph.atoms.numbers).tolist():
        graph.crystal_field[z] = field.onsite(z, of_atoms.features[z])
        graph.onsite[z] = np.zeros_like(graph.crystal_field[z])
    for z_i, z_j, blocks, onsite, coupled, vectors in coupled_groups(*remainder):
        pair = coupling[z_i, z_j]
        if onsite:
            row = atom_rows[operators.pairs[blocks, 0]]
            graph.onsite[z_i][row] = coupled - graph.crystal_field[z_i][row]
        else:
            near = rows[blocks] >= 0
            rotations = edge_rotations(vectors[near], max(pair.slots))
            graph.offsite[z_i, z_j][rows[blocks[near]]] += pair.rotate(coupled[near], rotations)
    targets = graph.offsite | {(z, z, "onsite"): t for z, t in graph.onsite.items()}
    # the mean is over elements of blocks: coupled components have another
    sums = [
        np.abs(some @ coupling[key[:2]].transform.T).sum()
        for key, t in targets.items()
        for some in np.array_split(t, len(t) // 512 + 1)
    ]
    baseline = sum(sums) / sum(t.size for t in targets.values())
    outside, total = outside_sums(operators, reference.cutoff_angstrom)
    graph.attributes = {
        "gauge_hartree": remainder[2],
        "outside_fraction": outside / total,
        "baseline_mae_hartree": float(baseline),
    }
    return graph


def write_graph(path, graph: Graph):
    with create_h5(path, SCHEMA, cutoff_angstrom=graph.cutoff_angstrom, **graph.attributes) as file:
        write_structure(file, graph.atoms)
        write_basis(file, graph.basis)
        file["edges"] = graph.edges.astype(np.int32)
        for (z_i, z_j), target in graph.offsite.items():
            file[f"offsite/{z_i}-{z_j}"] = target
            file[f"offsite/{z_i}-{z_j}"].attrs["unit"] = "Hartree"
        for z, target in graph.onsite.items():
            file[f"onsite/{z}"] = target
            file[f"onsite/{z}"].attrs["unit"] = "Hartree"
            file[f"crystal_field/{z}"] = graph.crystal_field[z]
            file[f"crystal_field/{z}"].attrs["unit"] = "Hartree"


def read_graph(path) -> Graph:
    """Raises ValueError (path, found, expected) if the file is missing, cut short or of another schema."""
    with open_h5(path, SCHEMA) as file:
        return Graph(
            read_structure(file),
            read_basis(file),
            float(file.attrs["cutoff_angstrom"]),
            file["edges"][:].astype(np.int64),
            {tuple(int(z) for z in name.split("-")): data[:] for name, data in file.get("offsite", {}).items()},
            *({int(name): data[:] for name, data in file[group].items()} for group in ("onsite", "crystal_field")),
            {name: file.attrs[name].item() for name in ("gauge_hartree", "outside_fraction", "baseline_mae_hartree")},
        )
