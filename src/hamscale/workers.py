"""Work on dense matrices with one thread each, side by side in processes.

BLAS shares a matrix of some hundred orbitals among threads that wait for each other by spinning. Alone they gain little. Beside
another busy process, each waits for a thread that is not running, which costs two to four times the CPU time, and 25 to 35
times on a bad day (docs/results.md, "Threads of BLAS"). Each matrix is therefore worked on by one thread, unless it is
large, and k-points and clusters are shared among processes.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, TypeVar, overload

import numpy as np
import scipy.linalg
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGE = 3000  # number of orbitals from which on several threads pay


@lru_cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def threads_for(n: int) -> Iterator[None]:
    """Limit BLAS to one thread while matrices of n orbitals are worked on.

    If n is LARGE or more, BLAS gets as many threads as there are workers.
    """
    global _limit
    wanted, before = worker_count() if n >= LARGE else 1, _limit
    if wanted == before:
        yield
        return
    _limit = wanted
    try:
        with _threads().limit(limits=wanted, user_api="blas"):
            yield
    finally:
        _limit = before


_limit: int | None = None  # number of BLAS threads inside `threads_for`


@overload
def eigh(H: np.ndarray, S: np.ndarray | None, *, eigvals_only: Literal[True], **options: object) -> np.ndarray: ...
@overload
def eigh(
    H: np.ndarray, S: np.ndarray | None, *, eigvals_only: Literal[False] = False, **options: object
) -> tuple[np.ndarray, np.ndarray]: ...
def eigh(
    H: np.ndarray, S: np.ndarray | None, *, eigvals_only: bool = False, **options: object
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Solve a generalised problem, or an ordinary one if S is None, by scipy.linalg.eigh, on as many threads as pay.

    Raises LinAlgError as it does.
    """
    with threads_for(len(H)):
        return scipy.linalg.eigh(H, S, eigvals_only=eigvals_only, **options)


def worker_count() -> int:
    """Return the number of processes that may work side by side.

    It is OMP_NUM_THREADS, which Snakemake sets to a job's threads, or the number of available processors.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> list[Result]:
    """Apply a function to items and return the results in their order; the items are shared among worker processes.

    With one worker or one item the work is done in this process. The function and the objects it refers to are not copied,
    because a worker is a fork of this process. Exceptions of the function are raised here. Raises ChildProcessError if a worker
    is killed.
    """
    items = list(items)
    workers = min(worker_count() if workers is None else workers, len(items))
    if workers <= 1:
        return [function(item) for item in items]
    global _shared
    _shared = function, items
    try:
        # BLAS is on one thread before the processes begin, so that none has threads to start or to stop
        with threads_for(0), ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_apply, range(len(items))))
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of {workers} worker processes ended without a word: killed, or out of memory. OMP_NUM_THREADS=1 works in one "
            "process."
        ) from None
    finally:
        _shared = None


_shared: tuple[Callable, list] | None = None  # function and items inside `in_processes`


def _apply(k: int) -> Any:
    assert _shared is not None, "a worker is forked inside `in_processes`"
    function, items = _shared
    return function(items[k])
