"""Chunks of edges, the buffers they are worked on in, and an update of all of them as one step of automatic differentiation.

An update is a module with weights() and constants() by name, short() (the type of its messages), outputs(), and forward_chunk()
and adjoint_chunk() for one chunk (updates.py). Kept for the adjoint are what goes in and, unless `keep` is off, what
forward_chunk returns.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass
class Chunk:
    """A run of whole destinations: the edges into atoms first_atom..last_atom.

    source (E,): rows of node features. target (E,): atom of the chunk. pair (E,): of elements, s_i species + s_j.
    pairs: PairInputs of the whole graph.
    """

    edges: slice
    atoms: slice
    degrees: list[int]
    source: Tensor
    target: Tensor
    pair: Tensor
    distances: Tensor
    rotations: Tensor
    pairs: dict

    def __len__(self):
        return len(self.source)


class Buffers:
    """Uninitialised tensors from memory that is used again: those made within `with buffers:` are free to others after it.

    The memory is kept between calls, as large as the largest chunk needed it: fresh memory costs page faults, and what was just
    used is still in the cache.
    """

    ALIGNMENT = 256  # bytes

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.memory, self.overflow = dtype, torch.empty(0, dtype=torch.uint8, device=device), 0
        self.top, self.scopes = 0, []

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        size = prod(shape) * dtype.itemsize
        first, self.top = self.top, self.top + -(-size // self.ALIGNMENT) * self.ALIGNMENT
        if self.top > len(self.memory):  # this once on its own; the memory grows when nothing is in use
            self.overflow = max(self.overflow, self.top)
            return torch.empty(shape, dtype=dtype, device=self.memory.device)
        return self.memory[first : first + size].view(dtype).view(shape)

    def like(self, tensor: Tensor) -> Tensor:
        return self(*tensor.shape, dtype=tensor.dtype)

    def __enter__(self):
        self.scopes.append(self.top)

    def __exit__(self, *_):
        self.top = self.scopes.pop()
        if not self.scopes and self.overflow > len(self.memory):
            self.memory = self.memory.new_empty(self.overflow)


_threads = threading.local()


def buffers_of_thread(dtype: torch.dtype, device: torch.device) -> Buffers:
    """This thread's buffers, of numbers of this type unless another is asked for."""
    own = _threads.__dict__  # of this thread
    if (dtype, device) not in own:
        own[dtype, device] = Buffers(dtype, device)
    return own[dtype, device]


class _Update(torch.autograd.Function):
    """One update over all chunks. Tensors: x, distances, rotations, edge features by chunk, weights."""

    @staticmethod
    def forward(ctx, update, graph, keep, names, n_edges, x, distances, rotations, *tensors):
        edges = list(tensors[:n_edges]) or [None] * len(graph.spans)
        outputs, kept = _run(update, graph, keep, dict(zip(names, tensors[n_edges:])), x, distances, rotations, edges)
        ctx.save_for_backward(x, distances, rotations, *tensors, *kept)
        ctx.update, ctx.graph, ctx.names, ctx.n_edges = update, graph, names, n_edges
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *d_outputs):
        update, graph, n_edges = ctx.update, ctx.graph, ctx.n_edges
        x, distances, rotations, *tensors = ctx.saved_tensors
        weights = dict(zip(ctx.names, tensors[n_edges:]))
        edges, kept = tensors[:n_edges] or [None] * len(graph.spans), tensors[n_edges + len(weights) :]
        w, short_x = update.short(update.constants() | weights, x)
        d_distances, d_rotations = (
            torch.zeros_like(t) if wanted else None for t, wanted in zip((distances, rotations), ctx.needs_input_grad[6:8])
        )
        d_edges, sums = [None] * len(graph.spans), []

        def start():
            d_x, g = torch.zeros_like(x), {name: torch.zeros_like(weight) for name, weight in weights.items()}
            sums.append([d_x, *g.values()])

            def work(k, chunk, buffers):
                d_edges[k] = update.adjoint_chunk(
                    k, chunk, w, g, short_x, edges[k], kept[k], d_outputs, d_x, d_distances, d_rotations, buffers
                )

            return work

        _over_chunks(graph, distances, rotations, start)
        d_x, *g = [sum(rest, first) for first, *rest in zip(*sums)]
        return None, None, None, None, None, d_x, d_distances, d_rotations, *d_edges[:n_edges], *g


def _run(update, graph, keep, weights, x, distances, rotations, edges: list):
    """The outputs of an update, and what is kept of each chunk. The items of edges are given up one by one."""
    outputs, kept = update.outputs(graph, x), [None] * len(graph.spans)
    w, x = update.short(update.constants() | weights, x)

    def work(k, chunk, buffers):
        kept[k] = update.forward_chunk(k, chunk, w, x, edges[k], outputs, buffers, keep)
        edges[k] = None

    _over_chunks(graph, distances, rotations, lambda: work)
    return outputs, kept


def _over_chunks(graph, distances: Tensor, rotations: Tensor, start):
    """work(k, chunk, buffers) for all chunks that have edges; `start` gives the work of one thread.

    On a CPU each of torch's threads takes every n-th chunk: operations on a chunk are too small to be worth dividing. Which
    thread takes which chunk is fixed, and so is the order of sums.
    """
    numbers = [k for k, (first, last, _, _) in enumerate(graph.spans) if last > first]
    threads = torch.get_num_threads() if distances.device.type == "cpu" else 1
    n = min(threads, len(numbers))
    inference = torch.is_inference_mode_enabled()

    def run(share, work):
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
    """n threads that each have one of torch's."""
    threads, started = torch.get_num_threads(), threading.Barrier(n)
    pool = ThreadPoolExecutor(n, "chunks", initializer=torch.set_num_threads, initargs=(1,))
    for future in [pool.submit(started.wait) for _ in range(n)]:
        future.result()
    torch.set_num_threads(threads)  # theirs became the process's default
    return pool


def apply(update, graph, x: Tensor, edges: list[Tensor], keep: bool = True, last_use: bool = False):
    """`update` over all chunks of a graph; edges: features by chunk, or empty. Gives the update's outputs.

    Without gradients, edges that are used for the last time are given up chunk by chunk.
    """
    w = {name: weight.contiguous() for name, weight in update.weights().items()}
    if torch.is_grad_enabled():
        return _Update.apply(update, graph, keep, list(w), len(edges), x, graph.distances, graph.rotations, *edges, *w.values())
    given_up = edges if last_use else list(edges)
    return _run(update, graph, False, w, x, graph.distances, graph.rotations, given_up or [None] * len(graph.spans))[0]
