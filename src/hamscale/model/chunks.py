"""Run an update over chunks of edges as one step of automatic differentiation, in buffers that are reused.

`Update` says what an update is; those of the network are in updates.py. The inputs are kept for the adjoint and, unless
`keep` is off, so is the result of forward_chunk.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

Weights = dict[str, Tensor]  # weights of an update, or gradients of them, by name


class Way(Enum):
    """How the operations on a chunk are arranged; the results are the same.

    CACHED, for a CPU: many operations on parts of the features, and one matrix product for each atom. An operation costs
    little there, and what it touches stays in the cache.
    BATCHED, for a GPU: few operations, each on all edges of a chunk. An operation is a launch there, whose cost does not
    depend on its size. The number of operations does not depend on the number of atoms, and none waits for the device.
    """

    CACHED = "cached"
    BATCHED = "batched"

    @classmethod
    def of(cls, device: torch.device | str) -> "Way":
        """Return the way that suits a device."""
        return cls.BATCHED if torch.device(device).type == "cuda" else cls.CACHED


@dataclass
class Chunk:
    """A run of edges that contains all edges into a run of atoms.

    degrees: number of edges into each of these atoms. offsets (atoms + 1,): the first of them, and the number of all edges.
    destination (E,): rows of node features; ends (2 E,): those of the source and the destination of every edge in turn.
    pair (E,): index of the pair of elements, s_i species + s_j.
    pairs: PairInputs of the whole graph.
    """

    edges: slice
    atoms: slice
    degrees: list[int]
    offsets: Tensor
    destination: Tensor
    ends: Tensor
    pair: Tensor
    distances: Tensor
    rotations: Tensor
    pairs: dict
    way: Way

    def __len__(self) -> int:
        return len(self.destination)

    @cached_property
    def target(self) -> Tensor:
        """Return the atom of the chunk into which each edge points, (E,)."""
        return self.destination - self.atoms.start if self.atoms.start else self.destination


class Buffers:
    """Provider of uninitialised tensors from memory that is reused.

    Tensors made inside `with buffers:` are freed at its end. The memory is kept between calls and is as large as the
    largest chunk required. Fresh memory would cost page faults, and memory that was just used is still in the cache.
    """

    ALIGNMENT = 256  # bytes

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.memory, self.overflow = dtype, torch.empty(0, dtype=torch.uint8, device=device), 0
        self.top = 0
        self.scopes: list[int] = []

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        size = prod(shape) * dtype.itemsize
        first, self.top = self.top, self.top + -(-size // self.ALIGNMENT) * self.ALIGNMENT
        if self.top > len(self.memory):  # allocate this tensor separately; the memory grows when none of it is in use
            self.overflow = max(self.overflow, self.top)
            return torch.empty(shape, dtype=dtype, device=self.memory.device)
        return self.memory[first : first + size].view(dtype).view(shape)

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape and type."""
        return self(*tensor.shape, dtype=tensor.dtype)

    def __enter__(self) -> None:
        self.scopes.append(self.top)

    def __exit__(self, *_: object) -> None:
        self.top = self.scopes.pop()
        if not self.scopes and self.overflow > len(self.memory):
            self.memory = self.memory.new_empty(self.overflow)


@dataclass
class Task:
    """One chunk to which an update is applied, with everything that the update reads.

    number: of the chunk among those of the graph.
    weights: those of the update, and its constants.
    x (A, ...): features of the nodes.
    e: features of the chunk's edges; empty for the update that makes the first ones.
    """

    number: int
    chunk: Chunk
    weights: Weights
    x: Tensor
    e: Tensor
    buffers: Buffers


@dataclass
class Gradients:
    """Gradients to which the adjoints of the chunks of one thread add; None for those that nobody asked for."""

    weights: Weights
    x: Tensor
    distances: Tensor | None
    rotations: Tensor | None


class ChunkedGraph(Protocol):
    """Graph whose edges are divided into chunks; `network.Inputs` is one."""

    distances: Tensor
    rotations: Tensor
    spans: list[tuple[int, int, int, int]]
    pairs: dict
    way: Way
    whole: bool

    @property
    def atoms(self) -> int:
        """Return the number of atoms into which the edges point."""

    def chunk(self, k: int, distances: Tensor, rotations: Tensor) -> Chunk:
        """Return the edges of span k; distances and rotations are those of all edges."""


class Update(Protocol):
    """Update of node or edge features, whose forward and adjoint run chunk by chunk."""

    def weights(self) -> Weights:
        """Return the weights in the form that the chunks use, differentiable with respect to the parameters."""

    def constants(self) -> Weights:
        """Return further values that the chunks need and that receive no gradient."""

    def short(self, w: Weights, x: Tensor) -> tuple[Weights, Tensor]:
        """Convert weights and node features to the type in which messages are computed."""

    def outputs(self, graph: ChunkedGraph, x: Tensor) -> list[Tensor]:
        """Allocate the outputs of all chunks."""

    def forward_chunk(self, task: Task, outputs: list[Tensor], keep: bool) -> Tensor | None:
        """Write the outputs of a chunk. Returns what the adjoint needs besides the task, or None unless `keep` is true."""

    def adjoint_chunk(self, task: Task, kept: Tensor | None, d_outputs: Sequence[Tensor], g: Gradients) -> Tensor | None:
        """Add the gradients of a chunk to g, and return that of its edge features.

        kept: the result of forward_chunk.
        """


Work = Callable[[int, Chunk, Buffers], None]  # of the chunk with that number


class _OfThread(threading.local):
    """Buffers of each thread, by type and device."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Buffers] = {}


_of_thread = _OfThread()


def buffers_of_thread(dtype: torch.dtype, device: torch.device) -> Buffers:
    """Return the buffers of this thread, whose tensors have the given type unless another is requested."""
    own = _of_thread.buffers
    if (dtype, device) not in own:
        own[dtype, device] = Buffers(dtype, device)
    return own[dtype, device]


class _Update(torch.autograd.Function):
    """One update over all chunks; its tensors are x, distances, rotations, edge features by chunk, and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Update,
        graph: ChunkedGraph,
        keep: bool,
        names: list[str],
        n_edges: int,
        x: Tensor,
        distances: Tensor,
        rotations: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        edges = list(tensors[:n_edges]) or [x.new_empty(0)] * len(graph.spans)
        outputs, kept = _run(update, graph, keep, dict(zip(names, tensors[n_edges:])), x, distances, rotations, edges)
        ctx.save_for_backward(x, distances, rotations, *tensors, *kept)
        ctx.update, ctx.graph, ctx.names, ctx.n_edges = update, graph, names, n_edges
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        update, graph, n_edges = ctx.update, ctx.graph, ctx.n_edges
        x, distances, rotations, *tensors = ctx.saved_tensors
        weights = dict(zip(ctx.names, tensors[n_edges:]))
        edges, kept = tensors[:n_edges] or [x.new_empty(0)] * len(graph.spans), tensors[n_edges + len(weights) :]
        w, short_x = update.short(update.constants() | weights, x)
        d_distances, d_rotations = (
            torch.zeros_like(t) if wanted else None for t, wanted in zip((distances, rotations), ctx.needs_input_grad[6:8])
        )
        d_edges: list[Tensor | None] = [None] * len(graph.spans)
        sums: list[list[Tensor]] = []  # of each thread

        def start() -> Work:
            d_weights = _zeros_like(weights)
            g = Gradients(d_weights, torch.zeros_like(x), d_distances, d_rotations)
            sums.append([g.x, *g.weights.values()])

            def work(k: int, chunk: Chunk, buffers: Buffers) -> None:
                d_edges[k] = update.adjoint_chunk(Task(k, chunk, w, short_x, edges[k], buffers), kept[k], d_outputs, g)

            return work

        _over_chunks(graph, distances, rotations, start)
        d_x, *g = [sum(rest, first) for first, *rest in zip(*sums)]
        return None, None, None, None, None, d_x, d_distances, d_rotations, *d_edges[:n_edges], *g


def _zeros_like(weights: Weights) -> Weights:
    """Return zeros of the shapes of weights, all in one piece of memory, which one operation fills."""
    memory = next(iter(weights.values())).new_zeros(sum(weight.numel() for weight in weights.values()))
    parts = memory.split([weight.numel() for weight in weights.values()])
    result = {}
    for (name, weight), part in zip(weights.items(), parts):
        transposed = weight.dim() == 2 and not weight.is_contiguous()  # so is the gradient, or it would be copied later
        result[name] = part.view(weight.T.shape).T if transposed else part.view(weight.shape)
    return result


def _run(
    update: Update,
    graph: ChunkedGraph,
    keep: bool,
    weights: Weights,
    x: Tensor,
    distances: Tensor,
    rotations: Tensor,
    edges: list,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Compute the outputs of an update, and the tensors of each chunk that are kept for the adjoint.

    The items of `edges` are released one by one.
    """
    outputs = update.outputs(graph, x)
    kept: list[Tensor | None] = [None] * len(graph.spans)
    w, x = update.short(update.constants() | weights, x)

    def work(k: int, chunk: Chunk, buffers: Buffers) -> None:
        kept[k] = update.forward_chunk(Task(k, chunk, w, x, edges[k], buffers), outputs, keep)
        edges[k] = None

    _over_chunks(graph, distances, rotations, lambda: work)
    return outputs, kept


def _over_chunks(graph: ChunkedGraph, distances: Tensor, rotations: Tensor, start: Callable[[], Work]) -> None:
    """Call work(k, chunk, buffers) for all chunks that have edges; `start` returns the work function of one thread.

    On a CPU each of torch's threads takes every n-th chunk, because the operations on a chunk are too small to be divided.
    The assignment of chunks to threads is fixed, and with it the order of summation.
    """
    numbers = [k for k, (first, last, _, _) in enumerate(graph.spans) if last > first]
    threads = torch.get_num_threads() if distances.device.type == "cpu" else 1
    n = min(threads, len(numbers))
    inference = torch.is_inference_mode_enabled()

    def run(share: list[int], work: Work) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            buffers = buffers_of_thread(distances.dtype, distances.device)
            for k in share:
                with buffers:
                    work(k, graph.chunk(k, distances, rotations), buffers)

    if n < 2:
        run(numbers, start())
        return
    works = [start() for _ in range(n)]
    for future in [_workers(n).submit(run, numbers[t::n], work) for t, work in enumerate(works)]:
        future.result()


@lru_cache(1)
def _workers(n: int) -> ThreadPoolExecutor:
    """Start n threads, each of which uses one of torch's threads."""
    threads, started = torch.get_num_threads(), threading.Barrier(n)
    pool = ThreadPoolExecutor(n, "chunks", initializer=torch.set_num_threads, initargs=(1,))
    for future in [pool.submit(started.wait) for _ in range(n)]:
        future.result()
    torch.set_num_threads(threads)  # the initializers changed the default of the whole process
    return pool


def apply(
    update: Update, graph: ChunkedGraph, x: Tensor, edges: list[Tensor], keep: bool = True, last_use: bool = False
) -> list[Tensor]:
    """Run `update` over all chunks of a graph and return its outputs.

    edges: features by chunk, or empty. Without gradients, edges that are used for the last time are released chunk by
    chunk.
    """
    w = update.weights()
    if graph.way is Way.CACHED:  # products of many chunks use them; for one product a copy would not pay
        w = {name: weight.contiguous() for name, weight in w.items()}
    if torch.is_grad_enabled():
        tensors = x, graph.distances, graph.rotations, *edges, *w.values()
        return list(_Update.apply(update, graph, keep, list(w), len(edges), *tensors))
    given_up = edges if last_use else list(edges)
    given_up = given_up or [x.new_empty(0)] * len(graph.spans)
    return _run(update, graph, False, w, x, graph.distances, graph.rotations, given_up)[0]
