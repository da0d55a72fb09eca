"""Apply a trained model to a structure in bounded memory, on one rank or on many."""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from ..config import Analysis
from ..graph.codec import BlockCodec, DecodedBlocks
from ..graph.graph import Graph, UnbuiltGraph
from ..graph.overlap import StoredOverlap
from ..graph.reference import Reference
from ..inputs.model_folder import load_model, model_identity
from ..inputs.ranks import RankPart, rank_part
from ..model.network import HamiltonianNetwork
from ..operators import Operators
from ..parallel.env import World
from ..parallel.exchange import TorchExchange
from ..partition.halo import halo_of
from ..structures import longest_period, wrap_as_cp2k
from ..units import hartree_to_mev
from .in_parts import forward_in_parts
from .self_consistent import ChargeLoop

LONGER = 2.0  # warn of a structure that is longer than the longest training cell by more than this factor


@dataclass(frozen=True)
class Residual:
    """The mean contribution of several networks in addition to the reference, Hartree.

    offsite: (z_i, z_j) -> (G, n) in edge frames.
    onsite: z -> (A_z, n) of the owned atoms.
    onsite_spread_mev: how much the networks differ (standard deviation, root mean square over the onsite components of all
    ranks); None for one network.
    """

    offsite: dict
    onsite: dict
    onsite_spread_mev: float | None = None


@dataclass(frozen=True)
class _Gather:
    """Function that puts values of the owned atoms (O, ...) of all ranks together, (A, ...)."""

    graph: Graph
    world: World

    def __call__(self, values: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(self.graph.atoms), *values.shape[1:]))
        whole[self.graph.owned] = values
        return self.world.sum(torch.from_numpy(whole).to(self.world.device)).cpu().numpy()


@dataclass(frozen=True)
class TrainedModel:
    """Networks whose mean is the prediction, and the reference that they were trained with.

    overlap: S of the structure that is predicted, which a model needs whose basis has no radial functions (`with_overlap`).

    model = TrainedModel.load("resources/models/hfo2")
    part = model.part(atoms)
    residual = model.residual(part)
    model.decode(part, residual).operators()
    """

    name: str
    identity: str
    networks: list[HamiltonianNetwork]
    reference: Reference
    overlap: StoredOverlap | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "TrainedModel":
        """Read a model folder. Raises ValueError as `load_model` does."""
        return cls(Path(directory).name, model_identity(directory), *load_model(directory))

    def with_overlap(self, overlap: Operators | None) -> "TrainedModel":
        """Return the model for the structure of some operators, whose S is taken if the model cannot compute it.

        Raises ValueError if it cannot and there are no operators, or if their basis is another one.
        """
        basis = self.reference.basis
        lacking = [element.element for element in basis.values() if not element.has_functions]
        if overlap is None and lacking:
            raise ValueError(
                f"{self.name}: the basis of {', '.join(lacking)} has shells but no radial functions, so that S of a structure "
                "cannot be computed. Give it: --overlap with H and S, or S alone, of this structure from the code of the data."
            )
        if overlap is None or not lacking:
            return self
        if difference := basis.difference(overlap.basis):
            raise ValueError(f"{self.name}: S is of another basis than the model: {difference}.")
        return replace(self, overlap=StoredOverlap(overlap))

    @property
    def knows_charges(self) -> bool:
        """Tell whether the model was trained for charges that are self-consistent."""
        return self.reference.crystal_field.potential is not None

    @cached_property
    def codec(self) -> BlockCodec:
        """Return the transformation between blocks and the quantities that the networks learn."""
        return BlockCodec(self.reference, self.overlap)

    def part(self, atoms: Atoms, world: World = World(), exchange: str = "torch") -> RankPart:  # noqa: B008
        """Build the graph of a structure with its crystal field, or this rank's part of it if there are several ranks.

        Raises ValueError if the structure has an element, or a kind of periodicity, on which the model was not trained.
        Warns if the structure is more than twice as long as the longest training cell.
        """
        self._check(atoms)
        if world.is_root:
            self._warn_of_length(atoms)
        source = UnbuiltGraph(wrap_as_cp2k(atoms), self.reference.basis, self.reference.cutoff_angstrom)
        part = rank_part(source, self.reference, world, world.size, exchange=exchange)
        gather = None if world.size == 1 else _Gather(part.graph, world)
        crystal_field = self.reference.crystal_field.of_graph(part.graph, gather)
        return replace(part, graph=replace(part.graph, crystal_field=crystal_field))

    def residual(self, part: RankPart, dtype: torch.dtype = torch.float32, world: World = World()) -> Residual:  # noqa: B008
        """Compute the mean of the networks, some atoms at a time, with exchanges between layers if there are several ranks."""
        networks = [network.to(world.device, dtype) for network in self.networks]
        offsite, of_networks = forward_in_parts(
            networks, part.graph, self.reference, dtype, halo=part.halo, exchange=part.exchange
        )
        onsite = {z: values.mean(0) for z, values in of_networks.items()}
        if len(networks) == 1:
            return Residual(offsite, onsite)
        variances = [np.var(values, axis=0, ddof=1, dtype=np.float64) for values in of_networks.values()]
        sums = [sum(v.sum() for v in variances), sum(v.size for v in variances)]
        total, count = world.sum(torch.tensor(sums, dtype=torch.float64, device=world.device)).tolist()
        return Residual(offsite, onsite, hartree_to_mev((total / count) ** 0.5))

    def decode(self, part: RankPart, residual: Residual, world: World = World()) -> DecodedBlocks:  # noqa: B008
        """Combine the reference and a residual into H and S of a structure, or of this rank's rows.

        Pairs that overlap reach farther than the edges of the graph. The reference blocks of the atoms that they reach, and
        no others, are fetched from the ranks that own them.
        """
        graph, pairs = part.graph, self.codec.pairs(part.graph)
        if part.owner is None:
            return self.codec.decode(graph, residual.offsite, residual.onsite, pairs)
        halo = halo_of(pairs, part.owner, world.rank)
        (own, _, _), numbers = self.codec.of_atoms(graph, residual.onsite), graph.atoms.numbers
        sizes = {z: self.reference.coupling[z, z].size for z in np.unique(numbers).tolist()}
        blocks = np.zeros((len(graph.owned), max(sizes.values())))  # blocks of all elements in rows of one length
        for z, of_z in own.items():
            blocks[numbers[graph.owned] == z, : sizes[z]] = of_z
        known = TorchExchange(halo, world)(torch.from_numpy(blocks).to(world.device)).cpu().numpy()
        ghosts, received = halo.ghosts, known[len(blocks) :]
        others = {z: received[numbers[ghosts] == z, :size] for z, size in sizes.items() if (numbers[ghosts] == z).any()}
        return self.codec.decode(graph, residual.offsite, residual.onsite, pairs, (ghosts, others))

    def charge_loop(
        self,
        part: RankPart,
        potential: np.ndarray,
        analysis: Analysis,
        world: World = World(),  # noqa: B008
    ) -> ChargeLoop:
        """Return what makes charges self-consistent, from the potentials (O,) that this rank's atoms have in one pass."""
        field = self.reference.crystal_field.potential
        assert field is not None, "a model that knows charges"
        return ChargeLoop(field.kernel, _Gather(part.graph, world)(potential), analysis)

    def _check(self, atoms: Atoms) -> None:
        unknown = sorted(set(atoms.numbers.tolist()) - set(self.reference.basis))
        if unknown:
            raise ValueError(
                f"{self.name}: the structure holds {', '.join(chemical_symbols[z] for z in unknown)}, but the model was "
                f"trained on {', '.join(e.element for e in self.reference.basis.values())} only. Train a model on a material "
                "with these elements."
            )
        if bool(atoms.pbc.any()) != self.reference.periodic:
            raise ValueError(
                f"{self.name}: the structure is {'' if atoms.pbc.any() else 'not '}periodic, the model was trained on "
                f"structures that {'are' if self.reference.periodic else 'are not'}: their energies have different zeros."
            )

    def _warn_of_length(self, atoms: Atoms) -> None:
        longest, trained = longest_period(atoms), self.reference.longest_cell_angstrom
        if longest > LONGER * trained:
            warnings.warn(
                f"the structure is {longest:.1f} A long, the longest training cell {trained:.1f} A: no training cell held "
                "potentials of so long a wave. Compare the slabs of a long structure with DFT (`hamscale evaluate`), or train "
                "on longer cells.",
                stacklevel=4,
            )
