"""Transform blocks of H into the quantities that the network learns, and back.

`encode` subtracts mu S (the energy gauge) and the reference from the blocks of a DFT calculation, couples their angular
momenta and rotates the blocks of bonds into the edge frames. `decode` undoes these steps in the opposite order, for any
residual:

    encode   r = D(edge) C^T (H - mu S - reference)        decode   H = reference + C D(edge)^T r

C are the coupling coefficients (coupling.py) and D the Wigner matrices of the edge frame; onsite blocks have no edge frame,
so they are not rotated. Hence decode(encode(H)) = H - mu S on all pairs within the cutoff. Beyond the cutoff a decoded
block is the block of the reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..angular import edge_rotations
from ..operators import Operators, Piece, group_by_species
from ..pairs import ByElement, ByPair, PairList, block_offsets
from .coupling import coupled_groups
from .crystal_field import onsite_blocks, shifted
from .graph import Graph, structure_graph
from .overlap import OverlapTable, StoredOverlap, overlap_table, two_centre_blocks
from .reference import Reference, charges_of, outside_sums

VALUES_AT_ONCE = 1 << 22  # number of values of H, and of S, that are decoded at a time


@dataclass(frozen=True)
class BlockCodec:
    """Encoder of operators into a graph with targets, and decoder of residuals into operators, for one reference.

    overlap: S of the structure that is decoded, where the basis has no radial functions.

    codec = BlockCodec(read_reference("reference.h5"))
    graph = codec.encode(read_operators("train-000.h5"))
    codec.decode(graph, graph.offsite, graph.onsite).operators()  # H - mu S of train-000 within the cutoff
    """

    reference: Reference
    overlap: StoredOverlap | None = None

    @property
    def of_overlap(self) -> OverlapTable | StoredOverlap:
        """Return what S of a structure is taken from: `overlap`, if it is given, or the integrals of the basis."""
        return self.overlap or overlap_table(self.reference.basis)

    def encode(self, operators: Operators) -> Graph:
        """Build the graph of a structure with the targets of its DFT blocks.

        An edge without a block in the operators is treated as H = 0.
        The graph's attributes are: gauge_hartree; outside_fraction, the share of sum |H| on pairs beyond the cutoff; and
        baseline_mae_hartree, the mean absolute error of the reference alone over all matrix elements within the cutoff,
        with the blocks of edges in their frames.
        Raises ValueError if the basis or the number of spins differs from that of the reference.
        """
        reference = self.reference
        if operators.spins != reference.spins:
            raise ValueError(
                f"operators of {operators.spins} spins, the reference was fitted to {reference.spins}. Fit it to runs with the "
                "same dft.spin."
            )
        if difference := reference.basis.difference(operators.basis):
            raise ValueError(f"basis of these operators differs from that of the reference: {difference}.")
        graph = structure_graph(operators.atoms, reference.basis, reference.cutoff_angstrom)
        coupling, crystal_field = reference.coupling, reference.crystal_field
        u = np.zeros(len(operators.atoms))
        if potential := crystal_field.potential:
            u = potential.kernel.of(operators.atoms)(charges_of(operators))
            operators = operators.with_potential(-u)
        of_atoms = onsite_blocks(operators, coupling, graph, crystal_field.near_angstrom, crystal_field.charges)
        remainder = reference.remainder(operators, of_atoms)
        rows = graph.edges.find_in_elements(operators.pairs)
        atom_rows = graph.atom_rows()
        offsite, onsite_reference, onsite = {}, {}, {}
        for z_i, z_j in graph.elements:
            pair, distances = coupling[z_i, z_j], graph.edges.distances[graph.edges.between(z_i, z_j)]
            offsite[z_i, z_j] = np.zeros((len(distances), pair.size))
            offsite[z_i, z_j][:, pair.zero_order] = -reference.offsite(z_i, z_j, distances)
        for z in np.unique(graph.atoms.numbers).tolist():
            onsite_reference[z] = crystal_field.of_atoms(z, of_atoms.features[z])
            onsite[z] = np.zeros_like(onsite_reference[z])
            if crystal_field.potential:
                onsite[z][:, -1] = u[graph.atoms_of(z)] - onsite_reference[z][:, -1]
        for z_i, z_j, blocks, is_onsite, coupled, vectors in coupled_groups(*remainder):
            pair = coupling[z_i, z_j]
            if is_onsite:
                row = atom_rows[operators.pairs[blocks, 0]]
                onsite[z_i][row, : pair.size] = coupled - onsite_reference[z_i][row, : pair.size]
            else:
                near = rows[blocks] >= 0
                rotations = edge_rotations(vectors[near], max(pair.slots))
                offsite[z_i, z_j][rows[blocks[near]]] += pair.rotate(coupled[near], rotations)
        outside, total = outside_sums(operators, reference.cutoff_angstrom)
        attributes = {
            "gauge_hartree": remainder[2],
            "outside_fraction": outside / total,
            "baseline_mae_hartree": self._mean_of_blocks(offsite, onsite),
        }
        return replace(graph, offsite=offsite, onsite=onsite, crystal_field=onsite_reference, attributes=attributes)

    def _mean_of_blocks(self, offsite: ByPair, onsite: ByElement) -> float:
        """Compute the mean |x| over the matrix elements of blocks, which differs from the mean over coupled components."""
        coupling, field = self.reference.coupling, self.reference.crystal_field
        targets = offsite | {(z, z, "onsite"): field.together(z, target) for z, target in onsite.items()}
        sums = [
            np.abs(some @ coupling[key[:2]].transform.T).sum()
            for key, target in targets.items()
            for some in np.array_split(target, len(target) // 512 + 1)
        ]
        return float(sum(sums) / sum(target.size for target in targets.values()))

    def pairs(self, graph: Graph) -> PairList:
        """Find the pairs of the owned atoms of a graph that overlap by more than 1e-8 or lie within the cutoff, sorted."""
        return self.of_overlap.pairs(graph.atoms, graph.cutoff_angstrom, graph.owned)

    def decode(
        self,
        graph: Graph,
        offsite: ByPair,
        onsite: ByElement,
        pairs: PairList | None = None,
        others: tuple[np.ndarray, ByElement] | None = None,
    ) -> "DecodedBlocks":
        """Combine the reference and a residual into blocks, which are computed only when they are requested.

        offsite: (z_i, z_j) -> (G, n) in edge frames, and onsite: z -> (A_z, n), in Hartree. A pair of elements, or an
        element, that is missing there has no residual.
        pairs: the result of `pairs`, if it has been computed already.
        others: the atoms j of these pairs that other ranks own, (N,), and z -> (N_z, n), their reference blocks. They are
        needed when graph is only a rank's part of the structure: bonds reach such atoms, also beyond the cutoff.
        """
        reference = self.reference
        (own, blocks, potential), numbers = self.of_atoms(graph, onsite), graph.atoms.numbers
        beyond, of_beyond = others or (np.empty(0, np.int64), {})
        places, shifts = np.full(len(numbers), -1), {}
        for z in own.keys() | of_beyond.keys():
            atoms = np.concatenate([graph.atoms_of(z), beyond[numbers[beyond] == z]])
            places[atoms] = np.arange(len(atoms))
            known = np.concatenate([of_atoms[z] for of_atoms in (own, of_beyond) if z in of_atoms])
            shifts[z] = reference.crystal_field.shifts(z, known)
        pairs = self.pairs(graph) if pairs is None else pairs
        return DecodedBlocks(graph, reference, self.of_overlap, pairs, offsite, blocks, places, shifts, potential)

    def of_atoms(self, graph: Graph, onsite: ByElement) -> tuple[ByElement, ByElement, np.ndarray]:
        """Return the reference of the onsite blocks of a graph's atoms, z -> (A_z, n), the blocks, and their u (O,), Hartree.

        onsite: as of `decode`. The potential u of each atom is in both blocks; zero where the reference has none.
        """
        field, u = self.reference.crystal_field, np.zeros(len(graph.atoms))
        own: ByElement = {}
        blocks: ByElement = {}
        for z, known in field.known_of(graph).items():
            whole = known + onsite[z] if z in onsite else known
            u[graph.atoms_of(z)] = potential = field.apart(z, whole)[1]
            own[z] = field.apart(z, known)[0] + np.outer(potential, field.overlap[z]) if field.potential else known
            blocks[z] = field.together(z, whole)
        return own, blocks, u[graph.owned]


@dataclass
class DecodedBlocks:
    """H and S of a structure, or of a rank's rows of it, computed a portion at a time by `pieces`.

    overlap: what S is taken from.
    pairs: all pairs that overlap or lie within the cutoff.
    offsite: coupled residuals in edge frames.
    onsite: coupled blocks.
    places (A,): place of every atom that the pairs reach among those of its element.
    shifts: z -> (N_z, n, n) of these atoms (CrystalField.shifts).
    potential (O,): the potentials u of charges of the owned atoms, which H has in one pass (charges.py), Hartree.
    """

    graph: Graph
    reference: Reference
    overlap: OverlapTable | StoredOverlap
    pairs: PairList
    offsite: ByPair
    onsite: ByElement
    places: np.ndarray
    shifts: ByElement
    potential: np.ndarray

    def operators(self) -> Operators:
        """Compute all of H and S in memory."""
        atoms, basis = self.graph.atoms, self.reference.basis
        n = int(block_offsets(self.pairs, basis.n_orbitals(atoms.numbers))[-1])
        H, S = self._empty(n), np.empty(n)
        for span, hamiltonian, overlap in self.pieces():
            H[..., span], S[span] = hamiltonian, overlap
        return Operators(atoms, basis, self.pairs, H, S)

    def _empty(self, n: int) -> np.ndarray:
        """Return room for n values of H, (n,) or (2, n)."""
        spins = self.reference.spins
        return np.empty(n if spins == 1 else (spins, n))

    def pieces(self) -> Iterator[Piece]:
        """Yield (slice of the values, H in Hartree, S) in the order of the pairs; no block is divided between pieces.

        A block and its transpose are both made from the lesser of the two pairs, so that both matrices are Hermitian to the
        last bit. A pair that is missing in offsite, and every pair beyond the cutoff, has the block of the reference.
        """
        graph, basis = self.graph, self.reference.basis
        orbitals = basis.n_orbitals(graph.atoms.numbers)
        offsets = block_offsets(self.pairs, orbitals)
        # rows holds the edge of each pair as given, which is the flipped edge where canonical() turns the pair
        rows, atom_rows = graph.edges.find_in_elements(self.pairs), graph.atom_rows()
        bounds = np.unique(
            np.searchsorted(offsets, np.arange(0, offsets[-1] + VALUES_AT_ONCE, VALUES_AT_ONCE)).clip(max=len(self.pairs))
        )
        for first, last in pairwise(bounds):
            within = offsets[first : last + 1] - offsets[first]
            H, S = self._empty(within[-1]), np.empty(within[-1])
            matrices = [*np.atleast_2d(H), S]
            lesser, turned = self.pairs.take(slice(first, last)).canonical()
            for z_i, z_j, blocks, places in group_by_species(graph.atoms.numbers, orbitals, lesser, within):
                of = first + blocks
                h, s = self._blocks(z_i, z_j, lesser.take(blocks), turned[blocks], rows[of], atom_rows)
                shape = (-1, basis[z_i].n_orbitals, basis[z_j].n_orbitals)
                for values, block in zip(matrices, [*np.split(h, self.reference.spins, 1), s]):
                    transposed = block.reshape(shape).transpose(0, 2, 1).reshape(places.shape)
                    places.put(values, np.where(turned[blocks, None], transposed, block))
            yield slice(int(offsets[first]), int(offsets[last])), H, S

    def _blocks(
        self, z_i: int, z_j: int, pairs: PairList, turned: np.ndarray, rows: np.ndarray, atom_rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute H and S of pairs of two elements, (G, spins * n_i * n_j) and (G, n_i * n_j).

        rows (G,): position in offsite of the edge of each pair, or of the flipped pair if `turned` is true; -1 beyond the
        cutoff.
        """
        reference = self.reference
        coupling = reference.coupling[z_i, z_j]
        S = self.overlap.of_pairs(z_i, z_j, pairs)
        H, own = np.empty((len(S), coupling.size)), pairs.onsite
        if own.any():
            H[own] = coupling.blocks(self.onsite[z_i][atom_rows[pairs[own, 0]]])
            n = reference.basis[z_i].n_orbitals
            for values in (H, S):
                square = values[own].reshape(-1, n, n)
                values[own] = ((square + square.transpose(0, 2, 1)) / 2).reshape(-1, values.shape[1])
        bonds = ~own
        if bonds.any():
            i, j = self.places[pairs[bonds, :2]].T
            H[bonds] = two_centre_blocks(coupling, reference.offsite(z_i, z_j, pairs.distances[bonds]), pairs.vectors[bonds])
            H[bonds] += shifted(S[bonds], self.shifts[z_i][i], self.shifts[z_j][j])
        near = bonds & (rows >= 0)
        if (z_i, z_j) in self.offsite and near.any():
            framed = np.empty((near.sum(), coupling.size))
            straight, (index, sign) = ~turned[near], coupling.edge_adjoint
            framed[straight] = self.offsite[z_i, z_j][rows[near][straight]]
            framed[~straight] = self.offsite[z_j, z_i][rows[near][~straight]][:, index] * sign
            rotations = edge_rotations(pairs.vectors[near], max(coupling.slots))
            H[near] += coupling.blocks(coupling.rotate(framed, rotations, inverse=True))
        return H, S
