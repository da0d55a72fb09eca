"""Build the part of a structure that belongs to this rank."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..graph.graph import Graph, GraphSource
from ..graph.reference import Reference
from ..graph.states import eigenvalue_directions
from ..model.network import Exchange, NoExchange
from ..operators import Operators
from ..parallel.env import World
from ..parallel.exchange import EXCHANGES
from ..partition import assign
from ..partition.halo import Halo, halo_of, read_owner
from .tensors import Example, block_plan, example, flat_directions

MOST_EDGES = 1.1  # a rank holds no more edges than this, times those into its own atoms


@dataclass(frozen=True)
class RankPart:
    """The work of one rank: the edges into its own atoms, and the means to obtain data of other ranks.

    On a single rank it is the whole structure, without halo.
    blocks: the read-out blocks that are exchanged, `tensors.block_plan`.
    owner (A,): the rank that owns each atom of the structure; None on a single rank.
    """

    graph: Graph
    halo: Halo | None = None
    exchange: Exchange = NoExchange()
    blocks: tuple[dict, dict] | None = None
    owner: np.ndarray | None = None


def rank_part(
    source: GraphSource,
    reference: Reference,
    world: World,
    ranks: int,
    partitions: Path | None = None,
    exchange: str = "torch",
) -> RankPart:
    """Take this rank's part of a graph that `ranks` ranks share: the edges into its atoms, and its halo.

    These ranks are n k to n k + n - 1 of the world for some k, with n = `ranks`. What every rank has of the whole structure
    are positions, elements, degrees and owners of its atoms. No rank has edges of others, and none asks others for anything.
    partitions: file of `hamscale partition` for that number of parts. Without it min-nn cuts the structure here, in the same
    way on every rank.
    """
    if ranks == 1:
        return RankPart(source.part())
    rank, first = world.rank % ranks, world.rank // ranks * ranks
    if partitions is None:
        degrees = source.degrees()
        owner = assign(source.atoms, degrees, source.cutoff_angstrom, ranks)
    else:
        owner = read_owner(partitions, source.atoms, ranks, source.cutoff_angstrom)
    part = source.part(np.flatnonzero(owner == rank))
    if __debug__ and partitions is None:
        most = MOST_EDGES * degrees[part.owned].sum()
        assert len(part.edges) <= most, f"{len(part.edges)} edges in memory, expected at most {most:.0f}"
    halo = halo_of(part.edges, owner, rank)
    plan = block_plan(part, halo, sorted(reference.basis))
    return RankPart(part, halo, EXCHANGES[exchange](halo, world, first, plan), plan, owner)


def rank_example(
    source: GraphSource,
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
    part = rank_part(source, reference, world, ranks, partitions, exchange)
    result = example(part.graph, reference, lmax, dtype, chunk, part.halo)
    edges = len(part.graph.edges) if ranks == 1 else int(source.degrees().sum())
    result = replace(result, exchange=part.exchange, blocks=part.blocks, counts=source.components, edges=edges)
    if operators is not None:
        found = eigenvalue_directions(operators, part.graph, directions)
        result = replace(result, directions=flat_directions(found, result, sorted(reference.basis)))
    return result.to(world.device)
