"""Write files so that a crash or a full disk never leaves half of one, and read HDF5 files that state their schema."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are flushed and it is renamed to `path`, else removed.

    Raises ValueError if `path` exists and is not an empty folder, because what it holds may be anything.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists, expected a new or an empty folder. Remove it or give another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


@contextmanager
def create_h5(path: str | Path, schema: str, **attributes: object) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing, atomically, and set its attributes: `schema`, provenance and those given."""
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["schema"] = schema
        for name, value in (provenance() | attributes).items():
            file.attrs[name] = value
        yield file


@contextmanager
def open_h5(path: str | Path, schema: str) -> Iterator[h5py.File]:
    """Open an HDF5 file of the given schema for reading.

    Raises ValueError (file, what was found, what was expected) if the file is missing, cut short or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected an HDF5 file of schema {schema}.")
    try:
        file = h5py.File(path, "r")
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
