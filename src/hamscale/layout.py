"""Declare what a kind of HDF5 file may hold, and hold files against it.

Anything else, and storage outside of the file, is refused before memory is taken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import h5py
import numpy as np


@dataclass(frozen=True)
class Array:
    """Dataset of a layout: the type of its numbers, as numpy names it ("f8"), and its shape.

    Dimensions are numbers, or names, which mean the same number in the whole file; "*" may be any number, and "E+1" is one
    more than E. leading: lengths of a dimension that may precede those of the shape, such as that of two spins.
    """

    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False
    leading: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Contents of a kind of file, which `create_h5` and `open_h5` hold against what is there.

    schema: its name and version. arrays: path of a dataset -> Array; "*" in a path stands for any one name.
    attributes: the attributes of the file that must be there, with their types. Others may be there.
    earlier: schema of files with these contents that an earlier version wrote without protection; they are read too.
    """

    schema: str
    arrays: dict[str, Array]
    attributes: Mapping[str, type] = field(default_factory=dict)
    earlier: str | None = None

    def check(self, file: h5py.File) -> None:
        """Compare an open file with the layout, without reading a dataset.

        Raises ValueError (found, expected) if a dataset is missing, not declared, of another type or shape, larger than the
        file, or stored elsewhere, or if an attribute is missing or of another type.
        """
        for name, kind in self.attributes.items():
            if not isinstance(value := plain(file.attrs.get(name)), kind):
                raise ValueError(f"attribute {name} is {value!r}, expected a value of type {kind.__name__}.")
        sizes: dict[str, int] = {}
        found = set()
        for path, dataset in _datasets(file, max(name.count("/") for name in self.arrays)):
            pattern = next((name for name in self.arrays if _matches(name, path)), None)
            if pattern is None:
                raise ValueError(f"/{path} is no part of schema {self.schema}.")
            found.add(pattern)
            _check_array(path, dataset, self.arrays[pattern], sizes)
        for name, array in self.arrays.items():
            if name not in found and not array.optional and "*" not in name:
                raise ValueError(f"/{name} is missing.")


def plain(value: object) -> object:
    """Return a scalar of numpy, as attributes are read, as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _matches(pattern: str, path: str) -> bool:
    names, given = pattern.split("/"), path.split("/")
    return len(names) == len(given) and all(name in ("*", part) for name, part in zip(names, given))


def _datasets(group: h5py.Group, depth: int) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield (path, dataset) of all datasets of a group, `depth` groups deep at most."""
    for name in group:
        path = f"{group.name}/{name}".lstrip("/")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"/{path} is a link to somewhere else. Files of hamscale hold their data themselves.")
        item = group[name]
        if isinstance(item, h5py.Dataset):
            yield path, item
        elif isinstance(item, h5py.Group) and depth:
            yield from _datasets(item, depth - 1)
        else:
            raise ValueError(f"/{path} is no part of the schema.")


def _check_array(path: str, dataset: h5py.Dataset, array: Array, sizes: dict[str, int]) -> None:
    storage = dataset.id.get_create_plist()
    if dataset.is_virtual or storage.get_external_count() or storage.get_nfilters() or dataset.chunks:
        raise ValueError(f"/{path} is virtual, compressed or stored elsewhere. Files of hamscale hold their data plainly.")
    if dataset.dtype.newbyteorder("=") != np.dtype(array.dtype) or dataset.dtype.byteorder == ">":
        raise ValueError(f"/{path} has type {dataset.dtype.str}, expected {array.dtype}.")
    shape: tuple[int, ...] = dataset.shape or ()
    if len(shape) == len(array.shape) + 1 and shape[:1] in [(n,) for n in array.leading]:
        shape = shape[1:]
    expected = tuple(_length(name, found, sizes) for name, found in zip(array.shape, shape))
    if len(shape) != len(array.shape) or shape != expected:
        lengths = ", ".join(f"{name}, here {n}" if name != n else str(n) for name, n in zip(array.shape, expected))
        raise ValueError(f"/{path} has shape {dataset.shape}, expected ({lengths}).")
    if dataset.id.get_storage_size() != dataset.nbytes:
        raise ValueError(f"/{path} is said to have {dataset.nbytes} bytes and has {dataset.id.get_storage_size()}.")


def _length(name: int | str, found: int, sizes: dict[str, int]) -> int:
    """Return the length that a dimension must have; the first one of a name gives that of all."""
    if isinstance(name, int):
        return name
    if name.startswith("*"):
        return found
    more = int(name.endswith("+1"))
    return sizes.setdefault(name.removesuffix("+1"), found - more) + more
