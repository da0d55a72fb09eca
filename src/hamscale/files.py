"""Write files so that a crash or a full disk never leaves half of one, and say where they come from."""

import errno
import fcntl
import glob
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    import pandas as pd


TOKEN = 8  # characters at the end of the name of a scratch folder, which differ


@contextmanager
def scratch(path: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`, in which `path` is made; it is removed at the end with all that is left.

    What processes that were killed have left of the same path is removed as well: they no longer hold the lock of the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    handle = None
    while handle is None:  # another process may take a new folder for one that was left, before it is locked
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.part"))
        handle = _lock(folder, without_locks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep(path: str | Path) -> None:
    """Remove what processes that were killed have left of a path: they no longer hold the lock of its folder (`scratch`)."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.part*"):
        if (handle := _lock(left, without_locks=False)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)


def _lock(folder: Path, without_locks: bool) -> int | None:
    """Lock a folder, which shows others that its process lives, and return the handle that holds the lock.

    None if another process holds it or has removed it; on a file system without locks only if that is not allowed.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = folder.exists()
    except BlockingIOError:
        held = False
    except OSError:
        held = without_locks
    if held:
        return handle
    os.close(handle)
    return None


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, with the name of `path`; on success it is flushed to disk and renamed to `path`, else removed."""
    path = Path(path)
    with scratch(path) as folder:
        temporary = folder / path.name
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; on success its files are flushed and it is renamed to `path`, else removed.

    Raises ValueError if `path` exists and is not an empty folder, because what it holds may be anything.
    """
    path = Path(path)
    exists = f"{path}: exists, expected a new or an empty folder. Remove it or give another name."
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        sweep(path)  # who wrote it may have been killed before all was cleared away
        raise ValueError(exists)
    with scratch(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        try:
            temporary.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process has written it meanwhile
                raise ValueError(exists) from None
            raise
        flush(path.parent)


@contextmanager
def together(directory: str | Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder; on success its files are flushed and take their places in `directory`, else they are removed.

    last: the file without which the others are nothing. What is there of it goes before the others come, so that files of two
    calls are never taken for those of one, and the new one comes after them.
    """
    directory = Path(directory)
    with scratch(directory / last) as folder:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:
            flush(file)
        (directory / last).unlink(missing_ok=True)
        for file in files:
            file.replace(directory / file.name)
        flush(directory)


def move_folder(new: Path, path: Path) -> None:
    """Put a folder, whose files are flushed, in the place of another, which is there as a whole or not at all."""
    with scratch(path) as aside:
        while True:  # another process may have put one there
            with suppress(FileNotFoundError):
                path.rename(Path(tempfile.mkdtemp(dir=aside)) / path.name)
            try:
                new.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                break
        flush(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and wait until no other process is in this context with it; without locks of the file system, do not."""
    handle = None
    while handle is None:  # who was in it may have removed it
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if not (folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())):
            os.close(handle)
            handle = None
    try:
        yield
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that they outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not flush folders
            raise
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_table(path: str | Path, table: "pd.DataFrame", digits: int = 6, **facts: object) -> None:
    """Write a csv whose first line, `# {...}`, says how it was made.

    The line has provenance, processor, versions, and the facts given.
    """
    about = provenance() | machine() | facts
    write_text(path, f"# {json.dumps(about)}\n{table.to_csv(index=False, float_format=f'%.{digits}g')}")


def read_table(path: str | Path) -> "pd.DataFrame":
    """Read a csv, with or without the first line of `write_table`."""
    import pandas as pd  # takes a third of a second, and most commands read no table

    with open(path) as file:
        return pd.read_csv(path, skiprows=int(file.readline().startswith("#")))


def facts(path: str | Path) -> dict:
    """Return what the first line of a table says; empty if there is no such line."""
    with open(path) as file:
        line = file.readline()
    return json.loads(line[1:]) if line.startswith("#") else {}


@lru_cache
def provenance() -> dict[str, str]:
    """Return the origin of a file: version of hamscale, git commit of its source, time.

    The commit is empty outside a checkout or without git.
    """
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # git is not installed, which is no reason to lose the results
        commit = ""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "hamscale_version": __version__,
    }


@lru_cache
def machine() -> dict:
    """Return kind and number of processors and versions of the machine that writes a file; no names of machines or people."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    name = found.group(1).strip() if found else platform.machine()
    packages = ", ".join(f"{package} {version(package)}" for package in ("numpy", "torch"))
    return {"processor": name, "cores": os.cpu_count(), "versions": f"python {platform.python_version()}, {packages}"}
