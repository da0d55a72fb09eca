"""Write files so that a crash or a full disk never leaves half of one, and read HDF5 files that state their schema."""

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from . import __version__

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Buffer


@contextmanager
def scratch(path: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`, in which `path` is made; it is removed at the end with all that is left.

    What processes that were killed have left of the same path is removed as well: they no longer hold the lock of the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.part*"):
        if (handle := _lock(left, without_locks=False)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
    handle = None
    while handle is None:  # another process may take a new folder for one that was left, before it is locked
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.part"))
        handle = _lock(folder, without_locks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
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
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists, expected a new or an empty folder. Remove it or give another name.")
    with scratch(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        temporary.replace(path)
        flush(path.parent)


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


class _Sink(io.RawIOBase):
    """File that libhdf5 writes to. It crashes the interpreter if it cannot finish a file, so after the first error it is told
    that all goes well, and the error is kept: `close` raises it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.file, self.finishing = path, open(path, "w+b", buffering=0), False  # noqa: SIM115
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: "Buffer") -> int:
        view = memoryview(buffer).cast("B")
        found = self.file.readinto(view) or 0
        view[found:] = bytes(len(view) - found)  # what was not written for want of space
        return len(view)

    def write(self, data: "Buffer") -> int:
        view = memoryview(data).cast("B")
        rest = view
        with self._kept():
            while len(rest) and not self.error:
                rest = rest[self.file.write(rest) :]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        with self._kept():
            if not self.error:
                self.file.truncate(size)
        return size or 0

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep an error; while the file is not being finished it is raised as well, so that no work is done in vain."""
        try:
            yield
        except OSError as error:
            self.error = error
            if not self.finishing:
                raise

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def new_h5(temporary: Path, path: Path) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing at a temporary place that will be `path`.

    Raises OSError, with the path and the cause, if it cannot be written, e.g. because the disk is full.
    """
    with closing(_Sink(temporary)) as sink:
        try:
            with h5py.File(sink, "w") as file:
                try:
                    yield file
                finally:
                    sink.finishing = True
        except (OSError, RuntimeError):
            if not sink.error:
                raise
        if sink.error:  # what h5py says of it takes many lines
            raise OSError(f"{path}: cannot be written: {sink.error.strerror}. What was there is unchanged.")


@contextmanager
def create_h5(path: str | Path, schema: str, **attributes: object) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing, atomically, and set its attributes: `schema`, provenance and those given.

    Raises OSError as `new_h5` does.
    """
    with atomic(path) as temporary, new_h5(temporary, Path(path)) as file:
        file.attrs["schema"] = schema
        for name, value in (provenance() | attributes).items():
            file.attrs[name] = value
        yield file


def read_h5(path: str | Path) -> h5py.File:
    """Open an HDF5 file for reading, without a lock: files are replaced as a whole, and not every file system has locks."""
    return h5py.File(path, "r", locking=False)


@contextmanager
def open_h5(path: str | Path, schema: str) -> Iterator[h5py.File]:
    """Open an HDF5 file of the given schema for reading.

    Raises ValueError (file, what was found, what was expected) if the file is missing, cut short or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected an HDF5 file of schema {schema}.")
    try:
        file = read_h5(path)
    except OSError as error:
        raise ValueError(
            f"{path}: not a complete HDF5 file ({error}). Expected schema {schema}; was it cut short? Make it again."
        ) from None
    with file:
        found = file.attrs.get("schema", "none")
        if found != schema:
            raise ValueError(f"{path}: schema is {found!r}, expected {schema!r}. Was it written by another version or step?")
        yield file


FINGERPRINT = "sha256"
BYTES_AT_ONCE = 2**24


def store_fingerprint(file: h5py.File) -> None:
    """Write a hash of all names, attributes and values of an HDF5 file, other than its provenance, as an attribute of it."""
    digest = hashlib.sha256()

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        attributes = [(key, np.asarray(value).tolist()) for key, value in item.attrs.items() if key not in provenance()]
        digest.update(json.dumps([name, sorted(attributes)]).encode())
        if isinstance(item, h5py.Dataset):
            digest.update(f"{item.dtype.str} {item.shape}".encode())
            at_once = max(1, BYTES_AT_ONCE // max(1, item.nbytes // max(1, len(item)))) if item.shape else 1
            for first in range(0, len(item) if item.shape else 0, at_once):
                digest.update(np.ascontiguousarray(item[first : first + at_once]).data)

    add("", file)
    file.visititems(add)
    file.attrs[FINGERPRINT] = digest.hexdigest()


def fingerprint(path: str | Path, schema: str) -> str:
    """Return the hash that an HDF5 file carries (`store_fingerprint`), or else that of its bytes, read some at a time.

    Raises ValueError as `open_h5` does.
    """
    with open_h5(path, schema) as file:
        if FINGERPRINT in file.attrs:
            return str(file.attrs[FINGERPRINT])
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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
