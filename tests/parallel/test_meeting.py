"""Ranks that do not meet: each ends with one line within the timeout."""

import socket

import pytest

from faults import disturbed
from ranks import free_port

SECONDS = 6
PREDICT = ["predict", "nowhere", "nowhere.extxyz", "--out", "a.h5"]  # the ranks meet before a file is read


def ends(ranks: list[int], size: int, port: int, host: str = "127.0.0.1") -> list[str]:
    """The lines of some of the ranks of a run."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": host, "MASTER_PORT": str(port), "HAMSCALE_TIMEOUT_SECONDS": str(SECONDS)}
    found = disturbed(PREDICT, environs=[common | {"RANK": str(rank)} for rank in ranks])
    lines = [did.errors.splitlines() for did in found]
    assert [did.code for did in found] == [1] * len(ranks), lines
    assert [len(of) for of in lines] == [1] * len(ranks), lines
    return [of[0].removeprefix("hamscale: error: ") for of in lines]


@pytest.mark.parametrize(("there", "size"), [([0], 2), ([1], 2), ([0, 1], 3)], ids=["1", "0", "2"])
def test_a_partner_never_comes(there, size):
    port = free_port()
    for rank, line in zip(there, ends(there, size, port)):
        # within the timeout, or as soon as rank 0 has ended, which waits no longer than the others
        assert line.startswith(f"rank {rank} of {size} did not meet the others at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}")
        assert rank or f" within {SECONDS} s." in line
        assert line.endswith(" Were all ranks started, and does no other program use the port?")


def test_the_port_is_taken_by_a_program_that_does_not_answer():
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        first, second = ends([0, 1], 2, other.getsockname()[1])
    assert first.endswith(": the port is taken by another program: choose another")
    assert "rank 1 of 2 did not meet the others" in second


def test_the_host_of_rank_0_is_unknown():
    for rank, line in enumerate(ends([0, 1], 2, free_port(), "nowhere.invalid")):
        assert line.startswith(f"rank {rank} of 2: MASTER_ADDR nowhere.invalid, where the ranks meet, is no known host: ")
