"""A structure over several ranks: the part of this one, and the sums over all that make P ranks give what one gives."""

from pathlib import Path

import torch

from ..graph.dataset import Graph
from ..graph.reference import Reference
from ..graph.states import eigenvalue_directions
from ..operators import Operators
from ..parallel.env import World
from ..parallel.exchange import EXCHANGES, NoExchange, TorchExchange
from ..partition import partition
from ..partition.halo import Halo, read_partition
from .tensors import Example, block_plan, example, flat_directions


def my_part(
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
    """This rank's part of a graph that `ranks` ranks share, the world's ranks n k to n k + n - 1 for some k.

    partitions: file of `hamscale partition` for that number of parts; else min-nn cuts it here, the same on every rank. operators:
    DFT's, for so many directions.
    """
    whole, part, halo, swap = example_counts(graph), graph, None, NoExchange()
    if ranks > 1:
        part, halo, swap = rank_part(graph, reference, world, ranks, partitions, exchange)
    result = example(part, reference, lmax, dtype, chunk, halo)
    result.exchange, result.counts = swap, whole
    if operators is not None:
        found = eigenvalue_directions(operators, part, directions)
        result.directions = flat_directions(found, result, sorted(reference.basis))
    return result.to(world.device)


def rank_part(
    graph: Graph, reference: Reference, world: World, ranks: int, partitions: Path | None = None, exchange: str = "torch"
) -> tuple[Graph, Halo, TorchExchange]:
    """Edges into this rank's atoms, what it needs of others, and how it gets that."""
    if partitions is None:
        edges = [(graph.edges[:, 0], graph.edges[:, 1])]
        parts = partition(graph.atoms, edges, graph.cutoff_angstrom, ranks)
    else:
        parts = read_partition(partitions, graph.atoms, ranks, graph.cutoff_angstrom)
    halo = parts.halo(world.rank % ranks)
    part = graph.part(halo.owned)
    first = world.rank // ranks * ranks
    return part, halo, EXCHANGES[exchange](halo, world, first, block_plan(part, halo, sorted(reference.basis)))


def example_counts(graph: Graph) -> tuple[int, int]:
    """Numbers of offsite and onsite components of a whole graph."""
    return tuple(sum(t.size for t in part.values()) for part in (graph.offsite, graph.onsite))


def sum_gradients(model, world: World, *more: float) -> list[float]:
    """Gradients of all weights summed over ranks, in place, and some numbers with them; one message. Gives the numbers."""
    if world.size == 1:
        return list(more)
    weights = list(model.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    extra = torch.tensor(more, dtype=grads[0].dtype, device=grads[0].device)
    flat = world.sum(torch.cat([*(g.flatten() for g in grads), extra]))
    for p, g in zip(weights, flat.split([p.numel() for p in weights] + [len(more)])):
        p.grad = g.view_as(p)
    return flat[len(flat) - len(more) :].tolist()
