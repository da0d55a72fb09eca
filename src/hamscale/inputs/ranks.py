"""Build the part of a structure that belongs to this rank."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..graph.graph import Graph
from ..graph.reference import Reference
from ..graph.states import eigenvalue_directions
from ..model.network import Exchange, NoExchange
from ..operators import Operators
from ..parallel.env import World
from ..parallel.exchange import EXCHANGES
from ..partition import partition
from ..partition.halo import Halo, read_partition
from .tensors import Example, block_plan, count_components, example, flat_directions


@dataclass(frozen=True)
class RankPart:
    """The work of one rank: the edges into its own atoms, and the means to obtain data of other ranks.

    On a single rank it is the whole structure, without halo.
    blocks: the read-out blocks that are exchanged, `tensors.block_plan`.
    """

    graph: Graph
    halo: Halo | None = None
    exchange: Exchange = NoExchange()
    blocks: tuple[dict, dict] | None = None


def rank_part(
    graph: Graph, reference: Reference, world: World, ranks: int, partitions: Path | None = None, exchange: str = "torch"
) -> RankPart:
    """Cut a graph that `ranks` ranks share and return this rank's part.

    These ranks are n k to n k + n - 1 of the world for some k, with n = `ranks`.
    partitions: file of `hamscale partition` for that number of parts. Without it min-nn cuts the graph here, in the same
    way on every rank.
    """
    if ranks == 1:
        return RankPart(graph)
    if partitions is None:
        edges = [(graph.edges[:, 0], graph.edges[:, 1])]
        parts = partition(graph.atoms, edges, graph.cutoff_angstrom, ranks)
    else:
        parts = read_partition(partitions, graph.atoms, ranks, graph.cutoff_angstrom)
    halo = parts.halo(world.rank % ranks)
    part = graph.part(halo.owned)
    first = world.rank // ranks * ranks
    plan = block_plan(part, halo, sorted(reference.basis))
    return RankPart(part, halo, EXCHANGES[exchange](halo, world, first, plan), plan)


def rank_example(
    graph: Graph,
    reference: Reference,
    lmax: int,
    dtype: torch.dtype,
    chunk: int,
    world: World,
    ranks: int,
    partitions: Path | None = None,
    exchange: str = "torch",
    operators: Operators | None = None,
    directions: int = 0,
) -> Example:
    """Build this rank's part of a training example, as described in `rank_part`.

    operators: those of the DFT calculation, from which as many `directions` are computed (graph/states.py).
    """
    part = rank_part(graph, reference, world, ranks, partitions, exchange)
    result = example(part.graph, reference, lmax, dtype, chunk, part.halo)
    result = replace(result, exchange=part.exchange, blocks=part.blocks)
    result = replace(result, counts=count_components(graph), edges=len(graph.edges))
    if operators is not None:
        found = eigenvalue_directions(operators, part.graph, directions)
        result = replace(result, directions=flat_directions(found, result, sorted(reference.basis)))
    return result.to(world.device)
