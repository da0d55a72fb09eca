"""Real processes for tests: functions over gloo ranks, and the command line as torchrun or srun starts it."""

import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm", "helpers"])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"OMP_NUM_THREADS": "1"}


# Ports below 32768, which the kernel does not hand out: one of its own might be taken before rank 0 listens on it. A worker of
# pytest-xdist has 400 to itself, from a place that differs between sessions.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = (18000 + 400 * (WORKER % 35) + number % 400 for number in itertools.count(os.getpid()))


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    return next(filter(_is_free, PORTS))


def _work(environ, pipe, function, arguments):
    os.environ.update(environ)
    import torch

    torch.set_num_threads(1)
    from hamscale.parallel.env import world

    try:
        with world("cpu") as w:
            result = function(w, *arguments)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def on_ranks(size: int, function, *arguments) -> list:
    """function(world, *arguments) on every rank; what each returned. An error on any rank is raised here."""
    port, ends, processes = free_port(), [], []
    for rank in range(size):
        end, other = CONTEXT.Pipe()
        processes.append(CONTEXT.Process(target=_work, args=(environment(rank, size, port), other, function, arguments)))
        processes[-1].start()
        ends.append(end)
    results = [end.recv() for end in ends]
    for p in processes:
        p.join()
    if errors := [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(results) if not good]:
        raise AssertionError("\n".join(errors))
    return [result for _, result in results]


def start_cli(size: int, *arguments, **environ) -> list[subprocess.Popen]:
    """`hamscale ARGUMENTS` on so many ranks."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "hamscale", *map(str, arguments)],
            env=os.environ | environment(rank, size, port) | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
