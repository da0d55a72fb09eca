"""A few hundred mutants of files from elsewhere: each is refused in a line, or is taken and passes all checks.

`make fuzz` reads many more. A fault that it finds becomes a test of the reader.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutate import mutants

READERS = Path(__file__).with_name("readers.py")


def test_no_mutant_is_a_fault():
    """In a process of its own, which forks: one for each reader, with limits of time and memory."""
    done = subprocess.run([sys.executable, READERS], capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 14, done.stderr
    assert [fault for result in results for fault in result["faults"]] == []
    assert done.returncode == 0, done.stderr
    for result in results:
        assert sum(result["outcomes"].values()) == result["mutants"]
        assert result["outcomes"]["refused"] > 0, result["reader"]


@pytest.mark.parametrize("data", [b"a", b"\0", b"\n", b"2\nH 0 0 0\nH 0 0 1.0e0\n", bytes(range(256)) * 40])
def test_mutants_differ_from_the_file_and_are_the_same_for_a_seed(data):
    some = list(mutants(data, 300, 1))
    assert data not in some
    assert list(mutants(data, 20, 1)) == some[:20]
    assert list(mutants(data, 300, 2)) != some
    assert len(data) < 5 or len(set(some)) > 200
    with pytest.raises(ValueError, match="without a byte"):
        next(mutants(b"", 1, 0))
