"""The device that a benchmark runs on: whether it is there, its name in tables, a clock, and the ranks that use it."""

import argparse
import sys
import time
from contextlib import AbstractContextManager

import torch

from hamscale.files import machine
from hamscale.parallel.env import World, world


def check(device: str, ranks: int = 1):
    """End the program, in one line, if a GPU is asked for and this machine has none, or fewer than ranks that it starts."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU on this machine. Start it where there is one, or give --device cpu.")
    if device == "cuda" and ranks > torch.cuda.device_count():
        sys.exit(f"--ranks {ranks}: this machine has {torch.cuda.device_count()} GPUs. Give fewer, or start it with srun.")


def name(device: str, cores: str) -> str:
    """Return the name of the GPU, or the processor followed by how many of its cores are used."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{machine()['processor']}, {cores}"


def ranks(device: str) -> AbstractContextManager[World]:
    """Open the world that torchrun or srun made, of one process otherwise; on GPUs each rank of a node has its own."""
    check(device)
    torch.set_num_threads(1)
    return world(None if device == "cuda" else device)


def chunk(o: argparse.Namespace, messages: int) -> int:
    """Return how many messages are worked on together: --chunk, else 768 on a CPU and all of them on a GPU."""
    return o.chunk or (768 if o.device == "cpu" else max(1, messages))


def finish(device: str):
    """Wait for the work that was given to a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Return seconds after the work that was given to a GPU is done; on a CPU those in which this thread was running."""
    finish(device)
    return time.perf_counter() if device == "cuda" else time.thread_time()
