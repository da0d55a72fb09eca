"""Open files of unknown origin first in a process of their own, so that a crash of a library is an error like any other.

python -m hamscale.sandbox FILE...     reads HDF5 files whole, within limits of memory and time
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py

MEMORY_PER_BYTE = 8  # of a file, beside FIXED_MEMORY
FIXED_MEMORY = 2**28
SECONDS = 10  # beside those for BYTES_PER_SECOND
BYTES_PER_SECOND = 10**7
AT_ONCE = 2**20  # values that are read at a time
DEEPEST = 8  # groups within groups
COMPRESSED = 1000  # a dataset may be so many times larger than its file
# set in the process itself, because a process with threads must not run Python between fork and exec
LIMITED = """import os, resource, sys
for kind, limit in (resource.RLIMIT_DATA, int(sys.argv[1])), (resource.RLIMIT_CPU, int(sys.argv[2])), (resource.RLIMIT_CORE, 0):
    resource.setrlimit(kind, (limit, limit))
os.execv(sys.argv[3], sys.argv[3:])
"""


def probe(*paths: Path) -> None:
    """Read HDF5 files whole in another process, with limits of memory and time.

    Raises ValueError if one is damaged or cut short, holds links, virtual datasets or data stored in other files, or takes
    more memory or time than its size allows.
    """
    if not paths:
        return
    run_limited([sys.executable, "-m", "hamscale.sandbox", *map(str, paths)], paths)


def run_limited(command: Sequence[str], paths: Sequence[Path], memory: int = FIXED_MEMORY) -> str:
    """Run a command that reads files, with limits that follow from their sizes, and return what it prints.

    memory: bytes that it may take beside those for the files.
    Raises ValueError, with the last line of what it says on standard error, if it fails, crashes or exceeds a limit.
    """
    size = sum(path.stat().st_size for path in paths)
    seconds = SECONDS + size // BYTES_PER_SECOND
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"

    limits = [sys.executable, "-c", LIMITED, str(memory + MEMORY_PER_BYTE * size), str(seconds)]
    one_thread = dict(os.environ) | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each takes memory of its own
    try:
        done = subprocess.run(
            [*limits, *command], capture_output=True, text=True, errors="replace", timeout=60 * seconds, env=one_thread
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name}: reading it takes longer than its size allows. It is damaged, or made to do harm.") from None
    if done.returncode < 0:
        raise ValueError(
            f"{name}: the process that read it was ended by signal {-done.returncode}: it is damaged, or made to do harm. "
            "Get it again from where it came."
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{name}: not readable"]
        raise ValueError(lines[-1].removeprefix("hamscale: error: "))
    return done.stdout


class _Refused(Exception):
    """What a file holds is not taken."""


def _read_all(group: h5py.Group, depth: int, size: int) -> None:
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise _Refused(f"{group.name.rstrip('/')}/{name} is a link, expected what it leads to in this file")
        item = group[name]
        if isinstance(item, h5py.Group):
            if not depth:
                raise _Refused(f"{item.name} lies within more than {DEEPEST} groups")
            _read_all(item, depth - 1, size)
        elif isinstance(item, h5py.Dataset):
            _read_dataset(item, size)
        else:
            raise _Refused(f"{item.name} is neither a group nor a dataset")


def _read_dataset(dataset: h5py.Dataset, size: int) -> None:
    if dataset.is_virtual or dataset.id.get_create_plist().get_external_count():
        raise _Refused(f"{dataset.name} is virtual or lies in another file, expected what it stands for in this file")
    if dataset.nbytes > COMPRESSED * size:
        raise _Refused(f"{dataset.name} declares {dataset.nbytes} bytes in a file of {size}")
    for _ in dataset.attrs.items():
        pass
    if not dataset.shape:
        dataset[()]
        return
    rows = max(1, AT_ONCE // max(1, dataset.size // max(1, len(dataset))))
    for first in range(0, len(dataset), rows):
        dataset[first : first + rows]


def main(paths: Sequence[str]) -> int:
    """Read HDF5 files whole; print one line about the first that cannot be read, and return 1."""
    for path in paths:
        try:
            with h5py.File(path, "r", locking=False) as file:
                for _ in file.attrs.items():
                    pass
                _read_all(file, DEEPEST, os.path.getsize(path))
        except _Refused as error:
            print(f"{path}: {error}.", file=sys.stderr)
            return 1
        except MemoryError:
            print(f"{path}: reading it takes more memory than its size allows", file=sys.stderr)
            return 1
        except Exception as error:  # noqa: BLE001  whatever a library raises of a damaged file
            reason = " ".join(str(error).split())
            print(f"{path}: not a complete HDF5 file ({reason}). Was it cut short? Make it again.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
