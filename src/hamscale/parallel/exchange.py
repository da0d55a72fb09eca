"""Exchange data between ranks within a step: features of atoms after every node update, read-out blocks of cut edges once.

x = exchange(x) appends the ghosts to the owned atoms. Gradients of ghosts are sent back the same way and are added to those
of the atoms' owners. A step of M layers makes M such exchanges forward and M backward. `exchange.edges` adds one exchange
in each direction at the end: the Hermitian read-out averages a block and its adjoint, which may belong to two ranks.
"""

import time
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.network import NoExchange
from ..partition.halo import Halo
from .env import World

if TYPE_CHECKING:
    from cupy.cuda.nccl import NcclCommunicator

__all__ = ["CupyExchange", "NoExchange", "Statistics", "TorchExchange"]


@dataclass
class Plan:
    """The rows that are exchanged with each neighbour, in the order of neighbours.

    rows[t][n]: rows of tensor t that neighbour n receives.
    counts[t][n]: number of rows of tensor t that neighbour n sends.
    """

    neighbours: list[int]
    rows: list[list[Tensor]]
    counts: list[list[int]]


@dataclass
class Statistics:
    """Record of the data sent since the start or the last `clear`.

    It counts the forward exchanges of features and of edges, the bytes by direction, and the seconds.
    """

    exchanges: dict = field(default_factory=dict)  # "nodes", "edges", and both with " backward"
    bytes_sent: dict = field(default_factory=dict)
    messages: int = 0
    pack_s: float = 0.0
    exchange_s: float = 0.0
    unpack_s: float = 0.0

    def clear(self) -> None:
        vars(self).update(vars(Statistics()))


class _SwapContext(Protocol):
    """What `_Swap` keeps from its forward for its backward pass."""

    exchange: "TorchExchange"
    plan: Plan
    kind: str
    shapes: list[torch.Size]


class _Swap(torch.autograd.Function):
    """Exchange that returns the ghost rows of every tensor, (sum of counts, width) each."""

    @staticmethod
    def forward(ctx: "_SwapContext", exchange: "TorchExchange", plan: Plan, kind: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.plan, ctx.kind = exchange, plan, kind
        ctx.shapes = [t.shape for t in tensors]
        started = time.perf_counter()
        packed = [[t.index_select(0, rows) for rows in of_tensor] for t, of_tensor in zip(tensors, plan.rows)]
        sizes = [[(n, *t.shape[1:]) for n in counts] for t, counts in zip(tensors, plan.counts)]
        return tuple(exchange.swap(plan.neighbours, packed, sizes, kind, started))

    @staticmethod
    def backward(ctx: "_SwapContext", *d_ghosts: Tensor) -> tuple[Tensor | None, ...]:
        plan, exchange = ctx.plan, ctx.exchange
        started = time.perf_counter()
        packed = [d.split(counts) for d, counts in zip(d_ghosts, plan.counts)]
        sizes = [[(len(r), *s[1:]) for r in rows] for s, rows in zip(ctx.shapes, plan.rows)]
        received = exchange.swap(plan.neighbours, packed, sizes, f"{ctx.kind} backward", started)
        started = time.perf_counter()
        # the order of neighbours is fixed, so that sums are reproducible
        result = [
            d.new_zeros(shape).index_add_(0, torch.cat(rows), d) if rows else d.new_zeros(shape)
            for d, shape, rows in zip(received, ctx.shapes, plan.rows)
        ]
        exchange.statistics.unpack_s += time.perf_counter() - started
        return None, None, None, *result


class TorchExchange:
    """Exchange by torch.distributed: gloo on CPUs, NCCL on GPUs; one message per neighbour and exchange.

    first_rank: the rank of the world that owns part 0. The ranks of structures that are processed at the same time follow
    one another.
    edges: (send, receive), {neighbour: {pair: rows}} and {neighbour: {pair: number}}, of read-out blocks, as made by
    inputs.tensors.
    """

    def __init__(self, halo: Halo, world: World, first_rank: int = 0, edges: tuple[dict, dict] | None = None) -> None:
        self.world, self.first_rank, self.statistics = world, first_rank, Statistics()
        neighbours = sorted(halo.send)
        on_device = lambda rows: torch.as_tensor(rows, device=world.device)  # noqa: E731
        self.nodes = Plan(
            neighbours,
            [[on_device(halo.send[n]) for n in neighbours]],
            [[halo.receive[n].stop - halo.receive[n].start for n in neighbours]],
        )
        self.pairs: list[tuple[int, int]] = []
        self.blocks: Plan | None = None
        if edges is not None:
            send, receive = edges
            self.pairs = sorted({pair for part in (*send.values(), *receive.values()) for pair in part})
            self.blocks = Plan(
                neighbours,
                [[on_device(send[n][pair]) for n in neighbours] for pair in self.pairs],
                [[receive[n][pair] for n in neighbours] for pair in self.pairs],
            )

    @staticmethod
    def connect(world: World) -> None:
        """Set up what all ranks of the world set up together, before the first exchange is made."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of owned atoms (A, K, C), followed by those of ghosts: (A + G, K, C)."""
        if not self.nodes.neighbours:
            return x
        (ghosts,) = _Swap.apply(self, self.nodes, "nodes", x)
        return torch.cat([x, ghosts])

    def edges(self, blocks: dict) -> dict:
        """Return the read-out (G, n) of edges between any two elements, followed by that of reversed edges of other ranks."""
        return blocks | {pair: torch.cat([blocks[pair], ghosts]) for pair, ghosts in self.partners(blocks).items()}

    def partners(self, blocks: dict) -> dict:
        """Return the read-out of reversed edges of other ranks alone."""
        if not self.pairs:
            return {}
        return dict(zip(self.pairs, _Swap.apply(self, self.blocks, "edges", *[blocks[pair] for pair in self.pairs])))

    def swap(self, neighbours: list[int], packed: list, sizes: list, kind: str, started: float) -> list[Tensor]:
        """Send packed[t][n] to neighbour n, and receive tensors of sizes[t][n].

        All tensors for a neighbour travel in one message. Returns the received tensors, joined over neighbours, one per t.
        """
        statistics = self.statistics
        statistics.exchanges[kind] = statistics.exchanges.get(kind, 0) + 1
        messages = [torch.cat([part[n].reshape(-1) for part in packed]) for n in range(len(neighbours))]
        lengths = [[prod(size[n]) for size in sizes] for n in range(len(neighbours))]
        buffers = messages[0].new_empty(sum(map(sum, lengths))).split([sum(parts) for parts in lengths])
        packed_at = time.perf_counter()
        with self.world.talking():
            self.transfer([self.first_rank + n for n in neighbours], messages, buffers)
        received_at = time.perf_counter()
        by_neighbour = [
            [part.view(size[n]) for part, size in zip(buffer.split(parts), sizes)]
            for n, (buffer, parts) in enumerate(zip(buffers, lengths))
        ]
        joined = [torch.cat(parts) for parts in zip(*by_neighbour)]
        statistics.bytes_sent[kind] = statistics.bytes_sent.get(kind, 0) + sum(m.nbytes for m in messages)
        statistics.messages += len(messages)
        statistics.pack_s += packed_at - started
        statistics.exchange_s += received_at - packed_at
        statistics.unpack_s += time.perf_counter() - received_at
        return joined

    def transfer(self, ranks: list[int], messages: list[Tensor], buffers: list[Tensor]) -> None:
        operations = [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in zip(ranks, buffers)]
        operations += [dist.P2POp(dist.isend, message, rank) for rank, message in zip(ranks, messages)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


class CupyExchange(TorchExchange):
    """Exchange by CuPy's NCCL on tensors shared through DLPack.

    All sends and receives of an exchange are in one group. Raises ValueError without CuPy or without a GPU.
    """

    def __init__(self, halo: Halo, world: World, first_rank: int = 0, edges: tuple[dict, dict] | None = None) -> None:
        super().__init__(halo, world, first_rank, edges)
        self.communicator = _communicator(world)

    @staticmethod
    def connect(world: World) -> None:
        """Make NCCL's communicator."""
        _communicator(world)

    def transfer(self, ranks: list[int], messages: list[Tensor], buffers: list[Tensor]) -> None:
        import cupy
        from cupy.cuda import nccl

        types = {torch.float32: nccl.NCCL_FLOAT32, torch.float64: nccl.NCCL_FLOAT64}
        stream = torch.cuda.current_stream()
        nccl.groupStart()
        for rank, message, buffer in zip(ranks, messages, buffers):
            sent, received = cupy.from_dlpack(message.detach()), cupy.from_dlpack(buffer.detach())
            kind = types[message.dtype]
            self.communicator.send(sent.data.ptr, sent.size, kind, rank, stream.cuda_stream)
            self.communicator.recv(received.data.ptr, received.size, kind, rank, stream.cuda_stream)
        nccl.groupEnd()
        stream.synchronize()


_communicators: dict[int, "NcclCommunicator"] = {}


def _communicator(world: World) -> "NcclCommunicator":
    """Return CuPy's NCCL communicator of all ranks, which is made once."""
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        raise ValueError(
            f"exchange 'cupy': CuPy cannot be imported ({error}). Install hamscale[gpu] on a machine with CUDA, or use 'torch'."
        ) from None
    if world.device.type != "cuda":
        raise ValueError(f"exchange 'cupy': the device is {world.device}, expected a CUDA GPU. Use 'torch' on CPUs.")
    if id(world) not in _communicators:
        cupy.cuda.Device(world.device.index).use()
        if world.is_root:
            world.store.set("nccl", bytes(nccl.get_unique_id()[k] & 0xFF for k in range(nccl.NCCL_UNIQUE_ID_BYTES)).hex())
        identifier = bytes.fromhex(world.store.get("nccl").decode())
        signed = tuple(b - 256 if b > 127 else b for b in identifier)
        _communicators[id(world)] = nccl.NcclCommunicator(world.size, signed, world.rank)
    return _communicators[id(world)]


EXCHANGES = {"torch": TorchExchange, "cupy": CupyExchange}
