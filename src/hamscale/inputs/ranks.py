"""A structure over several ranks: the part of this one."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..graph.graph import Graph
from ..graph.reference import Reference
from ..graph.states import eigenvalue_directions
from ..operators import Operators
from ..parallel.env import World
from ..parallel.exchange import EXCHANGES, NoExchange
from ..partition import partition
from ..partition.halo import Halo, read_partition
from .tensors import Example, block_plan, example, flat_directions


@dataclass(frozen=True)
class RankPart:
    """What one rank works on: edges into its own atoms, what it needs of others, and how it gets that; all of a structure on one rank."""

    graph: Graph
    halo: Halo | None = None
    exchange: NoExchange = NoExchange()


def rank_part(
    graph: Graph, reference: Reference, world: World, ranks: int, partitions: Path | None = None, exchange: str = "torch"
) -> RankPart:
    """Cut a graph that `ranks` ranks share, the world's ranks n k to n k + n - 1 for some k, and return this rank's part.

    partitions: file of `hamscale partition` for that number of parts; else min-nn cuts it here, the same on every rank.
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
    return RankPart(part, halo, EXCHANGES[exchange](halo, world, first, plan))


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
    """Build this rank's part of a training example: see `rank_part`.

    operators: DFT's, for so many directions (graph/states.py).
    """
    part = rank_part(graph, reference, world, ranks, partitions, exchange)
    counts = tuple(sum(t.size for t in targets.values()) for targets in (graph.offsite, graph.onsite))
    result = example(part.graph, reference, lmax, dtype, chunk, part.halo)
    result = replace(result, exchange=part.exchange, counts=counts)
    if operators is not None:
        found = eigenvalue_directions(operators, part.graph, directions)
        result = replace(result, directions=flat_directions(found, result, sorted(reference.basis)))
    return result.to(world.device)
