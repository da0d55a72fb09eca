"""Set up the processes of a run, communicate between them, and end all of them if one fails.

A run is started by torchrun (RANK, WORLD_SIZE, MASTER_ADDR ...), by Slurm's srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS ...) or
by mpirun (OMPI_COMM_WORLD_RANK ... of Open MPI, PMI_RANK ... of MPICH and Intel MPI); otherwise it has one process.
"""

import logging
import os
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 600.0  # how long one rank waits for another, unless HAMSCALE_TIMEOUT_SECONDS says otherwise
NAME_SECONDS = 20.0  # how long a rank waits for the name of a host to be known, as of a node that has just been started
BEAT_SECONDS = 1.0
ADVICE = "Were all ranks started, and does no other program use the port?"
GRACE_SECONDS = 60.0  # how long rank 0 keeps the store for others to read why a run ended


class RankLost(RuntimeError):
    """Error of a run in which another rank has ended. The message names that rank and says why it ended."""


class World:
    """All ranks of a run. With one rank every method does nothing and no process group is made.

    with world() as ranks:  # as torchrun, srun or mpirun has started this process
        total = ranks.sum(torch.ones(1))
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", store: dist.Store | None = None) -> None:
        self.rank, self.size, self.device, self._store = rank, size, torch.device(device), store
        self.stop_requested = False

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def store(self) -> dist.Store:
        """Return the store through which ranks tell each other why a run ends; a run of one rank has none."""
        assert self._store is not None, "a run of one rank has no store"
        return self._store

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, computed in place."""
        if self.size > 1:
            with self.talking():
                dist.all_reduce(tensor)
        return tensor

    def same(self, word: str) -> str:
        """Return the word of rank 0 on all ranks."""
        if self.size > 1:
            letters = torch.tensor(list(word.encode()) if self.is_root else [0] * len(word), device=self.device)
            word = bytes(self.sum(letters).tolist()).decode()
        return word

    def barrier(self) -> None:
        self.sum(torch.zeros(1, device=self.device))

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Wrap every operation that waits for another rank, and attribute errors within it to that rank."""
        try:
            yield
        except RuntimeError as error:  # torch's DistBackendError and the errors of gloo are RuntimeErrors
            cause = self._autopsy(error)
            with suppress(RuntimeError):  # rank 0, which holds the store, may be the one that has ended
                self.store.compare_set("lost", "", cause)  # at once: what this rank now removes, others may miss
            raise RankLost(cause) from None

    def _autopsy(self, error: Exception) -> str:
        """Find out which rank ended and why: what another rank has reported already, or whose heartbeat has stopped."""
        try:
            others = [r for r in range(self.size) if r != self.rank]
            before = self._read("beat", others)
            time.sleep(4 * BEAT_SECONDS)
            if lost := self.lost():
                return lost
            after = self._read("beat", others)
        except RuntimeError:
            return f"rank 0 of {self.size} ended: its store does not answer. What this rank saw: {_line(error)}"
        silent = [r for r in others if before.get(r) == after.get(r)]
        if silent:
            return "; ".join(
                f"rank {r} of {self.size} ended without a word (killed, out of memory, or its node is gone)" for r in silent
            )
        return f"all ranks are alive (a beat every {BEAT_SECONDS:g} s), but one did not answer in time: {_line(error)}"

    def lost(self) -> str | None:
        """Return why the run cannot continue, once any rank has found out; else None."""
        return self.store.get("lost").decode() if self.store.check(["lost"]) else None

    def leave(self, cause: str) -> None:
        """End the run and tell the other ranks why.

        The heartbeat threads of the other ranks read the cause, so that a rank that is waiting for this one learns of it
        too. Rank 0 holds the store and stays until all others have left or are silent, GRACE_SECONDS at most.
        """
        with suppress(RuntimeError):  # rank 0, which holds the store, may be the one that has ended
            self.store.compare_set("lost", "", cause)  # the cause that was reported first is kept
            self.store.set(f"left/{self.rank}", "")
            others = [r for r in range(self.size) if r != self.rank]
            beats: dict[int, str] = {}
            deadline = time.monotonic() + (GRACE_SECONDS if self.is_root else 0)
            while time.monotonic() < deadline:
                left, now = self._read("left", others), self._read("beat", others)
                if all(r in left or beats.get(r, "none yet") == now.get(r) for r in others):
                    break
                beats = now
                time.sleep(4 * BEAT_SECONDS)

    def _read(self, kind: str, ranks: Iterable[int]) -> dict[int, str]:
        return {r: self.store.get(f"{kind}/{r}").decode() for r in ranks if self.store.check([f"{kind}/{r}"])}

    def stop_on_signals(self) -> None:
        """Make SIGUSR1, SIGTERM and SIGINT request a stop at the end of a step: they set `stop_requested` on this rank."""

        def ask(*_: object) -> None:
            self.stop_requested = True

        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Provide the World in which this process was started, for as long as the context lasts.

    Raises ValueError if only some of the required environment variables are set.
    """
    rank, size, local = numbers(os.environ)
    if device is None:
        device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    store = _meet(rank, size, device)
    result, ended = World(rank, size, device, store.clone()), threading.Event()
    heart = threading.Thread(target=_beat, args=(World(rank, size, device, store.clone()), ended), daemon=True)
    heart.start()
    try:
        yield result
    except RankLost as error:
        result.leave(str(error))
        raise
    except BaseException as error:
        lost = None
        with suppress(RuntimeError):
            lost = result.lost()
        result.leave(f"rank {rank} of {size} ended: {type(error).__name__}: {_line(error)}")
        if lost and isinstance(error, Exception):  # what follows from the end of another rank is not the cause
            raise RankLost(lost) from None
        raise
    finally:
        ended.set()
        heart.join()
    dist.destroy_process_group()


def _meet(rank: int, size: int, device: str) -> Any:
    """Make the process group, and return the store through which its ranks meet.

    Raises RankLost, with what to look at, if the others are not met within the timeout.
    """
    from torch.distributed.rendezvous import rendezvous

    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    seconds = float(os.environ.get("HAMSCALE_TIMEOUT_SECONDS", TIMEOUT_SECONDS))
    _wait_for_name(host, min(seconds, NAME_SECONDS), rank, size)
    timeout, backend = timedelta(seconds=seconds), "nccl" if device.startswith("cuda") else "gloo"
    alone = f"rank {rank} of {size} did not meet the others at MASTER_ADDR {host}, MASTER_PORT {port}"

    def end() -> None:
        log.error(f"{alone} within {seconds:g} s. {ADVICE}")
        os._exit(1)  # torch waits for ever for a program that answers in its place, and for twice the time if none does

    late = threading.Timer(seconds, end)
    late.daemon = True
    late.start()
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=2 * timeout))
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        taken = "the port is taken by another program: choose another"
        raise RankLost(f"{alone}: {taken if 'EADDRINUSE' in str(error) else f'{_line(error)} {ADVICE}'}") from None
    finally:
        late.cancel()
    return store


def _wait_for_name(host: str, seconds: float, rank: int, size: int) -> None:
    """Wait until the name of a host is known. Raises RankLost if it is not within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RankLost(
                    f"rank {rank} of {size}: MASTER_ADDR {host}, where the ranks meet, is no known host: {error.strerror}. Set "
                    "it to the host of rank 0."
                ) from None
        time.sleep(BEAT_SECONDS)


def _beat(world: World, ended: threading.Event) -> None:
    """Report every second that this rank is alive, and end it if the run is lost.

    The process has to be ended from this thread if its main thread is waiting in vain for a rank.
    """
    count = 0
    while not ended.wait(BEAT_SECONDS if count else 0):
        count += 1
        try:
            world.store.set(f"beat/{world.rank}", str(count))
            lost = world.lost()
            if lost and not ended.wait(8 * BEAT_SECONDS):  # time for the main thread to notice and to end in order
                world.leave(lost)
        except RuntimeError:  # the store is gone: the next communication reports it
            return
        if lost and not ended.is_set():
            log.error(lost)
            os._exit(1)  # an exception cannot reach a main thread that waits in C++


def first_host(hosts: str) -> str:
    """Return the first host of a list in Slurm's notation, e.g. "nid[001-004,007],login1" -> "nid001".

    `scontrol show hostnames` is not used because it is not available inside a container.
    Raises ValueError for an empty list.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    if not first:
        raise ValueError(
            "srun started more than one task, but neither SLURM_STEP_NODELIST nor MASTER_ADDR is set. Set MASTER_ADDR to the "
            "host of rank 0."
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def numbers(env: MutableMapping[str, str]) -> tuple[int, int, int]:
    """Return the rank, the number of ranks, and the rank on this host, as the environment of a process tells them.

    MASTER_ADDR and MASTER_PORT, which torch's rendezvous reads, are set in it where the launcher does not set them.
    Raises ValueError if variables are missing, or nothing tells where the ranks meet.
    """
    if "RANK" in env:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(f"RANK is set but {', '.join(missing)} not. Start with torchrun, srun or mpirun, or unset RANK.")
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # only srun sets the number of tasks of a step; the shell of a batch script itself is not a rank
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    for names in MPI_VARIABLES:
        # in a job of Slurm, mpirun may start its own helpers by srun, one for each node: the ranks are mpirun's
        size = int(env.get(names.size, 1))
        if names.rank in env and size > 1 and (names.sure or size != tasks):
            return _of_mpirun(env, names)
    if tasks == 1:
        return 0, 1, 0
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
    # each step of a job, and each job of a node, needs a port of its own
    step = int(env.get("SLURM_JOB_ID", 0)) * 16 + int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(20000 + step % 20000))
    return int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", 0))


class _Variables(NamedTuple):
    """Environment variables of an mpirun.

    sure: no other launcher sets them; srun may set those of PMI too.
    """

    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]
    sure: bool


MPI_VARIABLES = (
    _Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE"),
        True,
    ),
    _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID",), False),
)


def _of_mpirun(env: MutableMapping[str, str], names: _Variables) -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this host as mpirun tells them, and find where the ranks meet.

    On one host they meet there, at a port that follows from the name of mpirun's job, or from their parent process. On
    several they meet at the first host of a job of Slurm. Raises ValueError where nothing tells the host or the port.
    """
    rank, size, local = (int(env.get(name, 0)) for name in (names.rank, names.size, names.local_rank))
    alone = int(env.get(names.local_size, 0)) == size
    job = next((env[name] for name in (*names.job, "SLURM_JOB_ID") if name in env), str(os.getppid()) if alone else "")
    if "MASTER_ADDR" not in env:
        hosts = env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
        if not alone and not hosts:
            raise ValueError(
                "mpirun started ranks on several hosts and does not tell which has rank 0. Set MASTER_ADDR to that host for "
                "all ranks, e.g. mpirun -x MASTER_ADDR=node1 of Open MPI, -genv MASTER_ADDR node1 of others."
            )
        env["MASTER_ADDR"] = "127.0.0.1" if alone else first_host(hosts)
    if "MASTER_PORT" not in env:
        if not job:
            raise ValueError(
                "mpirun started ranks on several hosts and has no name for its job. Set MASTER_PORT to a free port of "
                f"{env['MASTER_ADDR']} for all ranks."
            )
        # below 32768, from where on the kernel hands out ports
        env["MASTER_PORT"] = str(20000 + zlib.crc32(job.encode()) % 12000)
    return rank, size, local
