"""Exchange data between ranks within a step: features of atoms after every node update, read-out blocks of cut edges once.

x = exchange(x) appends the ghosts to the owned atoms. Gradients of ghosts are sent back the same way and are added to those
of the atoms' owners. A step of M layers makes M such exchanges forward and M backward. `post_edges` adds one exchange
in each direction at the end: the Hermitian read-out averages a block and its adjoint, which may belong to two ranks.

An exchange has two halves, `exchange.post(x)` and the function that it returns, which waits: work that needs no ghosts is
done between them. What travels may be rounded to 16 bits (`shorten`); it is added in the type of the features.
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
    exchange_s: of sending, and of waiting for what other ranks send.
    """

    exchanges: dict = field(default_factory=dict)  # "nodes", "edges", and both with " backward"
    bytes_sent: dict = field(default_factory=dict)
    messages: int = 0
    pack_s: float = 0.0
    exchange_s: float = 0.0
    unpack_s: float = 0.0

    def clear(self) -> None:
        vars(self).update(vars(Statistics()))


@dataclass
class Flight:
    """Rows of tensors on their way to neighbours, and, in a backward pass, the gradients of ghosts on their way back."""

    exchange: "TorchExchange"
    plan: Plan
    kind: str
    shapes: list[torch.Size] = field(default_factory=list)  # of the tensors
    arrival: Callable[[], list[Tensor]] | None = None  # waits, and returns what arrived

    def land(self) -> list[Tensor]:
        """Wait for what comes from the neighbours, and return it, joined over neighbours, one per tensor."""
        arrival, self.arrival = self.arrival, None  # which holds the messages
        assert arrival is not None, "nothing was sent"
        return arrival()


class _FlightContext(Protocol):
    """What `_Post` and `_Wait` keep from their forward for their backward pass."""

    flight: Flight

    def mark_dirty(self, *tensors: Tensor) -> None: ...


class _Post(torch.autograd.Function):
    """Send rows of tensors: the first half of an exchange, and the second half of its backward pass.

    Returns a token for `_Wait`, through which automatic differentiation knows that the two belong together, and the tensors
    that are rounded in place, whose gradients pass as if they were not.
    """

    @staticmethod
    def forward(ctx: "_FlightContext", flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight, plan, exchange = flight, flight.plan, flight.exchange
        flight.shapes = [t.shape for t in tensors]
        started = exchange.now()
        packed = [[t.index_select(0, rows) for rows in of_tensor] for t, of_tensor in zip(tensors, plan.rows)]
        sizes = [[(n, *t.shape[1:]) for n in counts] for t, counts in zip(tensors, plan.counts)]
        flight.arrival, sent = exchange.post_messages(plan.neighbours, packed, sizes, flight.kind, started)
        token = tensors[0].new_empty(0)
        if not plan.mutual or exchange.wire is None:
            return (token,)
        ctx.mark_dirty(*tensors)
        for t, rows, s in zip(tensors, plan.rows, sent()):
            t.index_copy_(0, torch.cat(rows), s)
        return token, *tensors

    @staticmethod
    def backward(ctx: "_FlightContext", d_token: Tensor, *d_own: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight
        received = flight.land()
        started = flight.exchange.now()
        own = d_own or [d.new_zeros(shape) for d, shape in zip(received, flight.shapes)]
        # the order of neighbours is fixed, so that sums are reproducible
        result = [d.index_add(0, torch.cat(rows), r) if rows else d for d, rows, r in zip(own, flight.plan.rows, received)]
        flight.exchange.statistics.unpack_s += flight.exchange.now() - started
        return None, *result


class _Wait(torch.autograd.Function):
    """Wait for the ghost rows of every tensor, (sum of counts, width) each, of what `_Post` sent.

    Its backward pass sends the gradients of the ghosts. Automatic differentiation begins with what was made last, so that
    the work between `_Post` and `_Wait` is also done while those gradients travel.
    """

    @staticmethod
    def forward(ctx: "_FlightContext", flight: Flight, token: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return tuple(flight.land())

    @staticmethod
    def backward(ctx: "_FlightContext", *d_ghosts: Tensor) -> tuple[Tensor | None, ...]:
        flight, plan, exchange = ctx.flight, ctx.flight.plan, ctx.flight.exchange
        started = exchange.now()
        packed = [d.split(counts) for d, counts in zip(d_ghosts, plan.counts)]
        sizes = [[(len(r), *s[1:]) for r in rows] for s, rows in zip(flight.shapes, plan.rows)]
        flight.arrival, _ = exchange.post_messages(plan.neighbours, packed, sizes, f"{flight.kind} backward", started)
        return None, d_ghosts[0].new_empty(0)


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
        """Return the features of owned atoms (A, R, C), followed by those of ghosts: (A + G, R, C)."""
        return self.post(x)()

    def post(self, x: Tensor) -> Callable[[], Tensor]:
        """Send the features that other ranks need, and return a function that waits for theirs, once.

        It returns the features of owned atoms (A, R, C), followed by those of ghosts: (A + G, R, C).
        """
        if not self.nodes.neighbours:
            return lambda: x
        flight = Flight(self, self.nodes, "nodes")
        (token,) = _Post.apply(flight, x)
        return lambda: torch.cat([x, *_Wait.apply(flight, token)])

    def post_edges(self, blocks: dict) -> Callable[[], dict]:
        """Send the read-out of edges that other ranks need, and return a function that waits for theirs, once.

        blocks: (G, n) of edges between any two elements. The function returns those of the flipped edges of other ranks.
        Rows of 16 bits are rounded in `blocks` too, so that both ranks have the same two.
        """
        if not self.pairs:
            return dict
        assert self.blocks is not None, "pairs follow from blocks"
        flight = Flight(self, self.blocks, "edges")
        token, *_ = _Post.apply(flight, *[blocks[pair] for pair in self.pairs])
        return lambda: dict(zip(self.pairs, _Wait.apply(flight, token)))

    def post_messages(
        self, neighbours: list[int], packed: list, sizes: list, kind: str, started: float
    ) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        """Send packed[t][n] to neighbour n; tensors of sizes[t][n] come back.

        All tensors for a neighbour travel in one message. Returns a function that waits for the tensors that are received,
        and one that gives those sent as their receivers have them; both joined over neighbours, one per t.
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
            wait = self.transfer([self.first_rank + n for n in neighbours], messages, buffers)
        statistics.bytes_sent[kind] = statistics.bytes_sent.get(kind, 0) + sum(m.nbytes for m in messages)
        statistics.messages += len(messages)
        statistics.pack_s += packed_at - started
        statistics.exchange_s += self.now() - packed_at

        def received() -> list[Tensor]:
            wanted_at = self.now()
            with self.world.talking():
                wait()
            received_at = self.now()
            joined = self._joined(buffers, sizes, dtype)
            statistics.exchange_s += received_at - wanted_at
            statistics.unpack_s += self.now() - received_at
            return joined

        return received, lambda: self._joined(messages, [[part.shape for part in parts] for parts in packed], dtype)

    def _joined(self, messages: Sequence[Tensor], sizes: list, dtype: torch.dtype) -> list[Tensor]:
        """Divide the message of every neighbour n into tensors of sizes[t][n], and join those of all neighbours, one per t."""
        if self.wire is not None:
            messages = [lengthen(message, dtype) for message in messages]
        parts = [m.split([prod(size[n]) for size in sizes]) for n, m in enumerate(messages)]
        return [
            torch.cat([of_neighbour[t].view(size[n]) for n, of_neighbour in enumerate(parts)]) for t, size in enumerate(sizes)
        ]

    def transfer(self, ranks: list[int], messages: list[Tensor], buffers: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to send messages and to receive into buffers; the function returned waits for all of them.

        On a GPU the device waits, not this process.
        """
        operations = [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in zip(ranks, buffers)]
        operations += [dist.P2POp(dist.isend, message, rank) for rank, message in zip(ranks, messages)]
        requests = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for request in requests:
                request.wait()

        return wait


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
        self.communicator, self.stream = _communicator(world), torch.cuda.Stream()

    def transfer(self, ranks: list[int], messages: list[Tensor], buffers: Sequence[Tensor]) -> Callable[[], None]:
        from cupy.cuda import nccl

        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)  # messages are complete, and buffers free, when what was asked for before is done
        nccl.groupStart()
        for rank, message, buffer in zip(ranks, messages, buffers):
            self.communicator.send(message.data_ptr(), message.nbytes, nccl.NCCL_UINT8, rank, self.stream.cuda_stream)
            self.communicator.recv(buffer.data_ptr(), buffer.nbytes, nccl.NCCL_UINT8, rank, self.stream.cuda_stream)
        nccl.groupEnd()
        arrival = self.stream.record_event()

        def wait(messages: list[Tensor] = messages) -> None:  # which holds the messages until they are sent
            torch.cuda.current_stream().wait_event(arrival)

        return wait


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
