"""Processes that share work, and how many threads BLAS has in them."""

import os
import signal

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info

from hamscale import workers
from hamscale.analysis.spectra import eigenvalues, k_grid


def blas_threads() -> set[int]:
    """Threads of the BLAS of numpy and of scipy; other packages bring one of their own, which we do not call."""
    ours = [library for library in threadpool_info() if library["user_api"] == "blas" and "py.libs" in library["filepath"]]
    return {library["num_threads"] for library in ours if "pyscf" not in library["filepath"]}


def test_results_come_in_the_order_of_the_items_from_other_processes():
    here, offset = os.getpid(), 100  # the function needs no name and may refer to what is around it
    found = workers.in_processes(lambda k: (k + offset, os.getpid(), blas_threads()), range(7), 2)
    assert [k for k, *_ in found] == list(range(100, 107))
    assert here not in {pid for _, pid, _ in found}
    assert all(threads == {1} for *_, threads in found)


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_worker_raises_is_raised_here(count):
    def odd(k):
        if k == 3:
            raise ValueError(f"{k} is odd")
        return k

    with pytest.raises(ValueError, match="3 is odd"):
        workers.in_processes(odd, range(5), count)


def test_a_killed_worker_is_told_and_not_waited_for():
    with pytest.raises(ChildProcessError, match="one of 2 worker processes ended without a word"):
        workers.in_processes(lambda k: os.kill(os.getpid(), signal.SIGKILL) if k == 1 else k, range(4), 2)


def test_one_item_or_one_worker_needs_no_process():
    assert workers.in_processes(lambda _: os.getpid(), [0], 4) == [os.getpid()]
    assert workers.in_processes(lambda _: os.getpid(), [0, 1], 1) == [os.getpid()] * 2


def test_workers_are_as_many_as_a_job_has_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert workers.worker_count() == 3
    for value in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert workers.worker_count() == len(os.sched_getaffinity(0))


def test_a_small_matrix_has_one_thread_and_a_large_one_all(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = blas_threads()
    with workers.threads_for(workers.LARGE - 1):
        assert blas_threads() == {1}
        with workers.threads_for(workers.LARGE):
            assert blas_threads() == {2}
        assert blas_threads() == {1}
    assert blas_threads() == before
    rng = np.random.default_rng(0)
    H, S = (X + X.T for X in rng.normal(size=(2, 40, 40)))
    S = S @ S + np.eye(40)
    np.testing.assert_array_equal(workers.eigh(H, S, eigvals_only=True), scipy.linalg.eigh(H, S, eigvals_only=True))


def test_kpoints_shared_among_processes_have_the_same_eigenvalues(dft, monkeypatch):
    kpoints, _ = k_grid((3, 2, 1))
    monkeypatch.setattr("hamscale.analysis.spectra.SMALL", 1)
    found = {}
    for count in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        found[count] = eigenvalues(dft, kpoints)
    np.testing.assert_array_equal(found["1"], found["2"])
