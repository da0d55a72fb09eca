"""Apply a trained model to a structure, on one rank in bounded memory, or on many ranks."""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from ..graph.codec import BlockCodec
from ..graph.graph import structure_graph
from ..graph.reference import Reference
from ..inputs.model_folder import load_model
from ..inputs.ranks import RankPart, rank_part
from ..inputs.tensors import graph_inputs
from ..model.network import HamiltonianNetwork
from ..pairs import ByElement
from ..parallel.env import World
from ..structures import longest_period, wrap_as_cp2k
from ..units import hartree_to_mev
from .in_parts import forward_in_parts

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
class TrainedModel:
    """Networks whose mean is the prediction, and the reference that they were trained with.

    model = TrainedModel.load("resources/models/hfo2")
    part = model.part(atoms)
    residual = model.residual(part)
    model.codec.decode(part.graph, residual.offsite, residual.onsite).operators()
    """

    name: str
    networks: list[HamiltonianNetwork]
    reference: Reference

    @classmethod
    def load(cls, directory: str | Path) -> "TrainedModel":
        """Read a model folder. Raises ValueError as `load_model` does."""
        return cls(Path(directory).name, *load_model(directory))

    @cached_property
    def codec(self) -> BlockCodec:
        """Return the transformation between blocks and the quantities that the networks learn."""
        return BlockCodec(self.reference)

    def part(self, atoms: Atoms, world: World = World(), exchange: str = "torch") -> RankPart:  # noqa: B008
        """Build the graph of a structure with its crystal field, or this rank's part of it if there are several ranks.

        Raises ValueError if the structure has an element, or a kind of periodicity, on which the model was not trained.
        Warns if the structure is more than twice as long as the longest training cell.
        """
        self._check(atoms)
        if world.is_root:
            self._warn_of_length(atoms)
        graph = structure_graph(wrap_as_cp2k(atoms), self.reference.basis, self.reference.cutoff_angstrom)
        part = rank_part(graph, self.reference, world, world.size, exchange=exchange)
        return replace(part, graph=replace(part.graph, crystal_field=self.reference.crystal_field.of_graph(part.graph)))

    def residual(self, part: RankPart, dtype: torch.dtype = torch.float32, world: World = World()) -> Residual:  # noqa: B008
        """Compute the mean of the networks: some atoms at a time on one rank, with exchanges on several ranks."""
        networks = [network.to(world.device, dtype) for network in self.networks]
        if world.size == 1:
            offsite, of_networks = forward_in_parts(networks, part.graph, self.reference, dtype)
        else:
            offsite, of_networks = self._on_ranks(networks, part, dtype)
        onsite = {z: values.mean(0) for z, values in of_networks.items()}
        if len(networks) == 1:
            return Residual(offsite, onsite)
        variances = [np.var(values, axis=0, ddof=1, dtype=np.float64) for values in of_networks.values()]
        sums = [sum(v.sum() for v in variances), sum(v.size for v in variances)]
        total, count = world.sum(torch.tensor(sums, dtype=torch.float64, device=world.device)).tolist()
        return Residual(offsite, onsite, hartree_to_mev((total / count) ** 0.5))

    @torch.inference_mode()
    def _on_ranks(self, networks: list[HamiltonianNetwork], part: RankPart, dtype: torch.dtype) -> tuple[dict, dict]:
        """Compute the result of `forward_in_parts` for a rank's part, with exchanges between layers."""
        device, elements = next(networks[0].parameters()).device, sorted(self.reference.basis)
        inputs = graph_inputs(part.graph, self.reference, networks[0].lmax, dtype, halo=part.halo).to(device)
        means: dict[tuple[int, int], torch.Tensor] = {}
        onsite: dict[int, list[np.ndarray]] = {}
        for network in networks:
            offsite, of_network = network(inputs, part.exchange)
            for pair, values in offsite.items():
                values /= len(networks)
                means[pair] = means[pair].add_(values) if pair in means else values
            for s, values in of_network.items():
                onsite.setdefault(elements[s], []).append(values.cpu().numpy())
        offsite = {(elements[i], elements[j]): v.cpu().numpy() for (i, j), v in means.items()}
        return offsite, {z: np.stack(of_networks) for z, of_networks in onsite.items()}

    def crystal_field(self, part: RankPart, world: World = World()) -> ByElement:  # noqa: B008
        """Return the coupled reference blocks z -> (A_z, n) of all atoms of a structure, gathered from all ranks, Hartree."""
        graph, result = part.graph, {}
        crystal_field = self.reference.crystal_field.known_of(graph)
        if world.size == 1:
            return crystal_field
        for z in np.unique(graph.atoms.numbers).tolist():
            atoms, here = np.flatnonzero(graph.atoms.numbers == z), graph.atoms_of(z)
            whole = torch.zeros(len(atoms), self.reference.coupling[z, z].size, dtype=torch.float64, device=world.device)
            if len(here):
                own = torch.from_numpy(crystal_field[z]).to(world.device)
                whole[torch.from_numpy(np.searchsorted(atoms, here))] = own
            result[z] = world.sum(whole).cpu().numpy()
        return result

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
