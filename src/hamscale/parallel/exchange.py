"""Exchange data between ranks within a step: features of atoms after every node update, read-out blocks of cut edges once.

x = exchange(x) appends the ghosts to the owned atoms. Gradients of ghosts are sent back the same way and are added to those
of the atoms' owners. A step of M layers makes M such exchanges forward and M backward. `exchange.edges` adds one exchange
in each direction at the end: the Hermitian read-out averages a block and its adjoint, which may belong to two ranks.

What travels may be rounded to 16 bits (`shorten`); it is added in the type of the features.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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

__all__ = ["CupyExchange", "NoExchange", "Statistics", "TorchExchange", "lengthen", "shorten"]

TOP = 15  # shortened values lie below 2^15: the largest float16 is 65,504, the smallest normal one 2^-14
SMALLEST_EXPONENT = -100  # of the largest value of a message; below, powers of two would overflow float32


def shorten(message: Tensor, wire: torch.dtype) -> Tensor:
    """Round a message (n,) to a type of 16 bits: the exponent e of its largest value, then its values times 2^(15 - e).

    Features and gradients may have any size, and gradients of a mean over millions of components are far below the smallest
    float16. So scaled, values down to 2^-29 of the largest keep the 11 digits of float16, or the 8 of bfloat16. Values that
    are not finite stay so.
    """
    exponent = torch.frexp(message.abs().amax()).exponent.clamp(min=SMALLEST_EXPONENT)
    return torch.cat([exponent[None].to(wire), torch.ldexp(message, TOP - exponent).to(wire)])


def lengthen(short: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values (n,) of a message that `shorten` made, (n + 1,), in another type."""
    return torch.ldexp(short[1:].to(dtype), short[0].to(torch.int32) - TOP)


@dataclass
class Plan:
    """The rows that are exchanged with each neighbour, in the order of neighbours.

    rows[t][n]: rows of tensor t that neighbour n receives.
    counts[t][n]: number of rows of tensor t that neighbour n sends.
    mutual: whether rows that are sent are replaced, in place, by what their receivers have. Two ranks that compute the same
    from rows of both, as the Hermitian read-out does, then agree to the last digit, however rows are rounded on the way.
    """

    neighbours: list[int]
    rows: list[list[Tensor]]
    counts: list[list[int]]
    mutual: bool = False


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

    def mark_dirty(self, *tensors: Tensor) -> None: ...


class _Swap(torch.autograd.Function):
    """Exchange that returns the ghost rows of every tensor, (sum of counts, width) each.

    Tensors that are rounded in place are returned too; their gradients pass as if they were not.
    """

    @staticmethod
    def forward(ctx: "_SwapContext", exchange: "TorchExchange", plan: Plan, kind: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.plan, ctx.kind = exchange, plan, kind
        ctx.shapes = [t.shape for t in tensors]
        started = exchange.now()
        packed = [[t.index_select(0, rows) for rows in of_tensor] for t, of_tensor in zip(tensors, plan.rows)]
        sizes = [[(n, *t.shape[1:]) for n in counts] for t, counts in zip(tensors, plan.counts)]
        ghosts, sent = exchange.swap(plan.neighbours, packed, sizes, kind, started)
        if not plan.mutual or exchange.wire is None:
            return tuple(ghosts)
        ctx.mark_dirty(*tensors)
        for t, rows, s in zip(tensors, plan.rows, sent):
            t.index_copy_(0, torch.cat(rows), s)
        return *ghosts, *tensors

    @staticmethod
    def backward(ctx: "_SwapContext", *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        plan, exchange = ctx.plan, ctx.exchange
        started = exchange.now()
        d_ghosts, d_own = d_outputs[: len(ctx.shapes)], d_outputs[len(ctx.shapes) :]
        packed = [d.split(counts) for d, counts in zip(d_ghosts, plan.counts)]
        sizes = [[(len(r), *s[1:]) for r in rows] for s, rows in zip(ctx.shapes, plan.rows)]
        received, _ = exchange.swap(plan.neighbours, packed, sizes, f"{ctx.kind} backward", started)
        started = exchange.now()
        own = d_own or [d.new_zeros(shape) for d, shape in zip(received, ctx.shapes)]
        # the order of neighbours is fixed, so that sums are reproducible
        result = [d.index_add(0, torch.cat(rows), r) if rows else d for d, rows, r in zip(own, plan.rows, received)]
        exchange.statistics.unpack_s += exchange.now() - started
        return None, None, None, *result


class TorchExchange:
    """Exchange by torch.distributed: gloo on CPUs, NCCL on GPUs; one message per neighbour and exchange.

    first_rank: the rank of the world that owns part 0. The ranks of structures that are processed at the same time follow
    one another.
    edges: (send, receive), {neighbour: {pair: rows}} and {neighbour: {pair: number}}, of read-out blocks, as made by
    inputs.tensors.
    wire: type of 16 bits in which data travel; None: the type that they have.

    exact: whether the seconds of `statistics` are those of the device, which then waits at each of them, for measurements; on
    a GPU they otherwise are those that it took to give it its work.
    """

    exact = False

    def __init__(
        self,
        halo: Halo,
        world: World,
        first_rank: int = 0,
        edges: tuple[dict, dict] | None = None,
        wire: torch.dtype | None = None,
    ) -> None:
        self.world, self.first_rank, self.wire, self.statistics = world, first_rank, wire, Statistics()
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
                mutual=True,
            )

    def now(self) -> float:
        """Return seconds by a clock of this process."""
        if self.exact and self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of owned atoms (A, K, C), followed by those of ghosts: (A + G, K, C)."""
        if not self.nodes.neighbours:
            return x
        (ghosts,) = _Swap.apply(self, self.nodes, "nodes", x)
        return torch.cat([x, ghosts])

    def edges(self, blocks: dict) -> dict:
        """Return the read-out (G, n) of edges between any two elements, followed by that of reversed edges of other ranks.

        Rows of 16 bits are rounded in `blocks` too, so that both ranks have the same two.
        """
        return blocks | {pair: torch.cat([blocks[pair], ghosts]) for pair, ghosts in self.partners(blocks).items()}

    def partners(self, blocks: dict) -> dict:
        """Return the read-out of reversed edges of other ranks alone. Rows of 16 bits are rounded in `blocks` too."""
        if not self.pairs:
            return {}
        return dict(zip(self.pairs, _Swap.apply(self, self.blocks, "edges", *[blocks[pair] for pair in self.pairs])))

    def swap(
        self, neighbours: list[int], packed: list, sizes: list, kind: str, started: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Send packed[t][n] to neighbour n, and receive tensors of sizes[t][n].

        All tensors for a neighbour travel in one message. Returns the tensors received, and those sent as their receivers
        have them, joined over neighbours, one per t.
        """
        statistics = self.statistics
        statistics.exchanges[kind] = statistics.exchanges.get(kind, 0) + 1
        messages = [torch.cat([part[n].reshape(-1) for part in packed]) for n in range(len(neighbours))]
        dtype = messages[0].dtype
        if self.wire is not None:
            messages = [shorten(message, self.wire) for message in messages]
        header = int(self.wire is not None)
        lengths = [header + sum(prod(size[n]) for size in sizes) for n in range(len(neighbours))]
        buffers = messages[0].new_empty(sum(lengths)).split(lengths)
        packed_at = self.now()
        with self.world.talking():
            self.transfer([self.first_rank + n for n in neighbours], messages, buffers)
        received_at = self.now()
        received = self._joined(buffers, sizes, dtype)
        sent = self._joined(messages, [[part.shape for part in parts] for parts in packed], dtype)
        statistics.bytes_sent[kind] = statistics.bytes_sent.get(kind, 0) + sum(m.nbytes for m in messages)
        statistics.messages += len(messages)
        statistics.pack_s += packed_at - started
        statistics.exchange_s += received_at - packed_at
        statistics.unpack_s += self.now() - received_at
        return received, sent

    def _joined(self, messages: Sequence[Tensor], sizes: list, dtype: torch.dtype) -> list[Tensor]:
        """Divide the message of every neighbour n into tensors of sizes[t][n], and join those of all neighbours, one per t."""
        if self.wire is not None:
            messages = [lengthen(message, dtype) for message in messages]
        parts = [m.split([prod(size[n]) for size in sizes]) for n, m in enumerate(messages)]
        return [
            torch.cat([of_neighbour[t].view(size[n]) for n, of_neighbour in enumerate(parts)]) for t, size in enumerate(sizes)
        ]

    def transfer(self, ranks: list[int], messages: list[Tensor], buffers: list[Tensor]) -> None:
        operations = [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in zip(ranks, buffers)]
        operations += [dist.P2POp(dist.isend, message, rank) for rank, message in zip(ranks, messages)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


class CupyExchange(TorchExchange):
    """Exchange by CuPy's NCCL, which reads and writes the memory of torch's tensors.

    All sends and receives of an exchange are in one group. Nothing is added on the way, so that messages of any type travel
    as bytes. Raises ValueError without CuPy or without a GPU.
    """

    def __init__(
        self,
        halo: Halo,
        world: World,
        first_rank: int = 0,
        edges: tuple[dict, dict] | None = None,
        wire: torch.dtype | None = None,
    ) -> None:
        super().__init__(halo, world, first_rank, edges, wire)
        self.communicator = _communicator(world)

    def transfer(self, ranks: list[int], messages: list[Tensor], buffers: list[Tensor]) -> None:
        from cupy.cuda import nccl

        stream = torch.cuda.current_stream()
        nccl.groupStart()
        for rank, message, buffer in zip(ranks, messages, buffers):
            self.communicator.send(message.data_ptr(), message.nbytes, nccl.NCCL_UINT8, rank, stream.cuda_stream)
            self.communicator.recv(buffer.data_ptr(), buffer.nbytes, nccl.NCCL_UINT8, rank, stream.cuda_stream)
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
            world.store.set("nccl", nccl.get_unique_id().hex())
        identifier = bytes.fromhex(world.store.get("nccl").decode())
        _communicators[id(world)] = nccl.NcclCommunicator(world.size, identifier, world.rank)
    return _communicators[id(world)]


EXCHANGES: dict[str, Callable[..., TorchExchange]] = {
    f"{name}{'-' if wire else ''}{wire}": partial(exchange, wire=getattr(torch, wire) if wire else None)
    for name, exchange in {"torch": TorchExchange, "cupy": CupyExchange}.items()
    for wire in ("", "float16", "bfloat16")
}


def connect(exchange: str, world: World) -> None:
    """Set up what all ranks of the world set up together, before the first exchange is made."""
    if exchange.startswith("cupy"):
        _communicator(world)
