"""Write and read HDF5 files that are protected against damage.

A protected file is an HDF5 file with a user block and a trailer, which libhdf5 leaves alone, so that any program reads it:

    user block, 512 bytes | text: schema, number of bytes up to the trailer, and a digest of this text and the trailer
    HDF5                  | as libhdf5 writes it
    trailer               | digests of the bytes between, one for every part of PART bytes

libhdf5, which crashes on many a damaged file, is handed no byte that has not been compared with its digest. Parts are
compared as they are read, so that a rank that reads a few rows of a large file reads no more than those. The digest is
XXH3 of 128 bits (https://xxhash.com): it tells damage and mixed-up files, not forgery. What a file may hold is declared in
layout.py.
"""

import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import xxhash

from .files import atomic, provenance
from .layout import Layout, plain
from .sandbox import probe

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 512  # bytes of the user block
PART = 1 << 19  # bytes that have a digest in common; they fit into the cache of a core
DIGEST = 16  # bytes of a digest
BYTES_AT_ONCE = 2**24
FINGERPRINT = "xxh3_128"
MADE_OF = "made_of"  # attribute: identities of the files that a file was made of, by what they are, as JSON
HEAD = re.compile(rb"hamscale container 1\nschema (\S{1,64})\nbytes ([0-9]{1,18})\n")


class Sink(io.RawIOBase):
    """File that libhdf5 writes to, or whose copy it changes, with the digests of its parts.

    It crashes the interpreter if it cannot finish a file, or a dataset in chunks, so after the first error, and while it is
    finishing, it is told that all goes well, and the error is kept for `new_h5` to raise.
    """

    def __init__(self, path: Path, mode: str, digests: dict[int, bytes] | None) -> None:
        super().__init__()
        self.file, self.finishing = io.FileIO(path, mode), False
        self.error: OSError | None = None
        self.digests = digests  # of parts that were written in one piece; None: of a file that is not protected

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
        start, rest = self.file.tell() - BLOCK, view
        with self._kept():
            while len(rest) and not self.error:
                rest = rest[self.file.write(rest) :]  # in one piece: in parts it takes a third more
        if (digests := self.digests) is not None:
            for part in range(start // PART, (start + len(view) - 1) // PART + 1):
                content = view[max(0, part * PART - start) : (part + 1) * PART - start]
                if len(content) == PART:
                    digests[part] = xxhash.xxh3_128_digest(content)
                else:
                    digests.pop(part, None)
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

    def protect(self, schema: str) -> None:
        """Write the trailer and the user block of a file that libhdf5 has finished."""
        assert self.digests is not None, "a file that is not protected has no digests"
        with self._kept():
            size = os.fstat(self.file.fileno()).st_size
            self.digests.pop(_parts(size) - 1, None)  # which may be shorter than it was
            trailer = b"".join(
                self.digests.get(part) or xxhash.xxh3_128_digest(os.pread(self.file.fileno(), PART, BLOCK + part * PART))
                for part in range(_parts(size))
            )
            os.pwrite(self.file.fileno(), trailer, size)
            os.pwrite(self.file.fileno(), _user_block(schema, size, trailer), 0)

    def close(self) -> None:
        self.file.close()
        super().close()


def _parts(size: int) -> int:
    return -(-(size - BLOCK) // PART)


def _user_block(schema: str, size: int, trailer: bytes) -> bytes:
    head = f"hamscale container 1\nschema {schema}\nbytes {size}\n".encode()
    return (head + f"xxh3_128 {xxhash.xxh3_128_hexdigest(head + trailer)}\n".encode()).ljust(BLOCK, b"\0")


class Source(io.RawIOBase):
    """Protected file that libhdf5 reads from: each part is compared with its digest before any of it is handed over.

    Reads at given places, so processes that share an open file do not disturb each other.
    Raises ValueError if the user block or the trailer is damaged or cut short; damage of a part is kept in `error`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.position, self.error = path, 0, ""
        self.file = io.FileIO(path)
        try:
            self.block = os.pread(self.file.fileno(), BLOCK, 0)
            self.schema, self.size, self.trailer = self._protection()
        except BaseException:
            self.file.close()
            raise
        self.compared = bytearray(_parts(self.size))

    def _protection(self) -> tuple[str, int, bytes]:
        total = os.fstat(self.file.fileno()).st_size
        if head := HEAD.match(self.block):
            schema, size = head[1].decode("ascii", "replace"), int(head[2])
            if BLOCK < size <= total and total - size == DIGEST * _parts(size):
                trailer = os.pread(self.file.fileno(), total - size, size)
                if _user_block(schema, size, trailer) == self.block:
                    return schema, size, trailer
        raise ValueError(f"{self.path}: damaged or cut short: its beginning and its end do not belong together. Make it again.")

    @property
    def identity(self) -> str:
        """Return the digest of the digests, which no other content has."""
        return self.block.rstrip(b"\0\n").rsplit(b" ", 1)[1].decode()

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: "Buffer") -> int:
        view = memoryview(buffer).cast("B")
        start, end = self.position, min(self.position + len(view), self.size)
        if start < BLOCK:  # libhdf5 looks for its signature here
            found = self.block[start:end]
            view[: len(found)] = found
            start += len(found)
        done = start - self.position
        if start < end:
            self._read(view[done : done + end - start], start - BLOCK)
        view[max(done, end - self.position) :] = bytes(len(view) - max(done, end - self.position))
        self.position += len(view)
        return len(view)

    def _read(self, view: memoryview, start: int) -> None:
        """Read bytes that begin at `start` behind the user block."""
        first, last = start // PART, (start + len(view) - 1) // PART
        for part in range(first, last + 1):
            begin, end = part * PART, min((part + 1) * PART, self.size - BLOCK)
            here = view[max(0, begin - start) : end - start]
            whole = begin >= start and len(here) == end - begin
            content = here if whole or self.compared[part] else memoryview(bytearray(end - begin))
            place = begin if whole or content is not here else max(begin, start)
            if os.preadv(self.file.fileno(), [content], BLOCK + place) != len(content):
                raise OSError(self._damaged(part))
            if not self.compared[part]:
                if xxhash.xxh3_128_digest(content) != self.trailer[part * DIGEST : (part + 1) * DIGEST]:
                    raise OSError(self._damaged(part))
                self.compared[part] = 1
            if content is not here:
                here[:] = content[max(0, start - begin) :][: len(here)]

    def _damaged(self, part: int) -> str:
        first = BLOCK + part * PART
        self.error = (
            f"{self.path}: damaged: bytes {first} to {min(first + PART, self.size)} are not those that were written. "
            "Copy the file again from where it came, or make it again."
        )
        return self.error

    def compare_all(self) -> None:
        """Compare all parts. Raises ValueError if one is damaged."""
        buffer = memoryview(bytearray(PART))
        try:
            for part in range(_parts(self.size)):
                begin = part * PART
                self._read(buffer[: min(PART, self.size - BLOCK - begin)], begin)
        except OSError as error:
            raise ValueError(self.error or str(error)) from None

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def new_h5(temporary: Path, path: Path, schema: str | None = None, source: Source | None = None) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing at a temporary place that will be `path`; protect it if it has a schema.

    source: the protected file that the temporary one is a copy of, which is then changed instead.
    Raises OSError, with the path and the cause, if it cannot be written, e.g. because the disk is full.
    """
    before = {k: source.trailer[k * DIGEST : (k + 1) * DIGEST] for k in range(_parts(source.size))} if source else {}
    with closing(Sink(temporary, "r+" if source else "w+", before if schema else None)) as sink:
        sink.finishing = schema is None  # such files have datasets in chunks, which are finished at any time
        try:
            options = {} if source or not schema else {"userblock_size": BLOCK}
            with h5py.File(sink, "r+" if source else "w", **options) as file:
                try:
                    yield file
                finally:
                    sink.finishing = True
        except (OSError, RuntimeError):
            if not sink.error:
                raise
        if schema and not sink.error:
            sink.protect(schema)
        if sink.error:  # what h5py says of it takes many lines
            raise OSError(f"{path}: cannot be written: {sink.error.strerror}. What was there is unchanged.")


@contextmanager
def create_h5(
    path: str | Path, layout: Layout, made_of: Mapping[str, list[str]] | None = None, **attributes: object
) -> Iterator[h5py.File]:
    """Open a new protected file for writing, atomically, and set its attributes: `schema`, provenance and those given.

    made_of: identities of the files that it is made of, by what they are.
    Raises OSError as `new_h5` does, and ValueError if what was written is not as the layout says.
    """
    with atomic(path) as temporary, new_h5(temporary, Path(path), layout.schema) as file:
        file.attrs["schema"] = layout.schema
        origin = provenance() | ({MADE_OF: json.dumps(made_of)} if made_of else {})
        for name, value in (origin | attributes).items():
            file.attrs[name] = value
        yield file
        layout.check(file)


@contextmanager
def edit_h5(path: str | Path, layout: Layout) -> Iterator[h5py.File]:
    """Open a copy of a protected file for changes, which takes its place at the end.

    Raises OSError as `new_h5` does, and ValueError if the file is damaged or of an earlier version.
    """
    path = Path(path)
    with closing(Source(path)) as source, atomic(path) as temporary:
        source.compare_all()
        shutil.copyfile(path, temporary)
        os.truncate(temporary, source.size)
        with new_h5(temporary, path, source.schema, source) as file:
            yield file
            layout.check(file)


@contextmanager
def open_h5(path: str | Path, layout: Layout) -> Iterator[h5py.File]:
    """Open a file of a layout for reading, and compare what is in it with the layout.

    No lock is taken: files are replaced as a whole, and not every file system has locks. What is read is compared with its
    digest. A file of the earlier schema has none: it is first opened in another process (sandbox.probe), with a warning.
    Raises ValueError (file, what was found, what was expected) if the file is missing, cut short, damaged, of another
    schema, or not as the layout says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected an HDF5 file of schema {layout.schema}.")
    with _opened(path, layout) as (file, expected):
        found = plain(file.attrs.get("schema", "none"))
        if found != expected:
            raise ValueError(f"{path}: schema is {found!r}, expected {expected!r}. Was it written by another version or step?")
        try:
            layout.check(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        yield file


@contextmanager
def _opened(path: Path, layout: Layout) -> Iterator[tuple[h5py.File, str]]:
    """Open a file, protected or of the earlier schema, and say which schema it must have."""
    if not is_protected(path):
        with open_foreign(path) as file:
            if layout.earlier and plain(file.attrs.get("schema")) == layout.earlier:
                warnings.warn(f"{path}: written by an earlier version (schema {layout.earlier}), not protected.", stacklevel=6)
                yield file, layout.earlier
            else:
                yield file, layout.schema
                raise ValueError(f"{path}: not protected, as files of {layout.schema} are. Was it changed? Make it again.")
        return
    with closing(Source(path)) as source:
        try:
            with h5py.File(source, "r") as file:
                yield file, layout.schema
        except Exception:
            if source.error:  # what libhdf5 says of it takes many lines
                raise ValueError(source.error) from None
            raise


@contextmanager
def open_foreign(path: str | Path) -> Iterator[h5py.File]:
    """Open an HDF5 file that nothing protects for reading, after another process has read all of it (`sandbox.probe`).

    Raises ValueError if the file is damaged, cut short, or holds data elsewhere.
    """
    probe(Path(path))
    with h5py.File(path, "r", locking=False) as file:
        yield file


def is_protected(path: str | Path) -> bool:
    """Return whether a file claims to be protected, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(8) == b"hamscale"


def schema_of(path: str | Path) -> str:
    """Return the schema of a protected file. Raises ValueError if it is damaged or not protected."""
    with closing(Source(Path(path))) as source:
        return source.schema


def identity(path: str | Path) -> str:
    """Return the digest that names the content of a file: that of a protected file, which is not read for it, or of all bytes.

    Raises ValueError if the file is damaged.
    """
    if is_protected(path):
        with closing(Source(Path(path))) as source:
            return source.identity
    digest = xxhash.xxh3_128()
    with open(path, "rb") as content:
        while piece := content.read(PART):
            digest.update(piece)
    return digest.hexdigest()


def store_fingerprint(file: h5py.File) -> None:
    """Write a hash of all names, attributes and values of an HDF5 file, other than its origin, as an attribute of it."""
    digest = xxhash.xxh3_128()

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        origin = {MADE_OF, *provenance()}
        attributes = [(key, np.asarray(value).tolist()) for key, value in item.attrs.items() if key not in origin]
        digest.update(json.dumps([name, sorted(attributes)]).encode())
        if isinstance(item, h5py.Dataset):
            digest.update(f"{item.dtype.str} {item.shape}".encode())
            at_once = max(1, BYTES_AT_ONCE // max(1, item.nbytes // max(1, len(item)))) if item.shape else 1
            for first in range(0, len(item) if item.shape else 0, at_once):
                digest.update(np.ascontiguousarray(item[first : first + at_once]).data)

    add("", file)
    file.visititems(add)
    file.attrs[FINGERPRINT] = digest.hexdigest()


def fingerprint(path: str | Path, layout: Layout) -> str:
    """Return the hash that an HDF5 file carries (`store_fingerprint`), or else its identity, 32 hexadecimal digits.

    Raises ValueError as `open_h5` does.
    """
    with open_h5(path, layout) as file:
        if FINGERPRINT in file.attrs:
            return str(file.attrs[FINGERPRINT])
    return identity(path)
