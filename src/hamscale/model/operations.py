"""Count the operations of a pass: what a GPU would launch, the bytes that they touch, and their floating-point operations."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Kinds of operations by name; all others are elementwise, or reductions of a few values each.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}
GATHERS = {"index_select", "index_copy", "index_add", "index", "index_put", "copy", "cat", "clone", "stack"}


@dataclass(frozen=True)
class Operation:
    """One operation: its name without the mark of those in place, the bytes read and written, and the FLOP of products.

    short: whether its result has a type of two bytes.
    """

    name: str
    bytes: int
    flop: int
    short: bool

    @property
    def kind(self) -> str:
        """Return "product", "gather", "segment sum" or "elementwise"."""
        if self.name == "segment_reduce":
            return "segment sum"
        return "product" if self.name in PRODUCTS else "gather" if self.name in GATHERS else "elementwise"


class Operations(TorchDispatchMode):
    """Context in which every operation is counted that is neither a view nor an allocation.

    Operations that one of them runs inside itself, as a copy of a matrix that has no form that BLAS takes, are not seen.
    with Operations() as operations: network(inputs)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[Operation] = []

    def __len__(self) -> int:
        return len(self.counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        returned = [r.alias_info for r in func._schema.returns]
        is_view = name == "_unsafe_view" or any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and name not in ALLOCATIONS:
            name = name.rstrip("_")
            short = any(isinstance(t, Tensor) and t.element_size() == 2 for t in tree_leaves(result))
            self.counted.append(Operation(name, _bytes(name, args, kwargs, result), _flop(name, args, kwargs, result), short))
        return result


def _bytes(name: str, args: tuple, kwargs: dict, result: Any) -> int:
    """Return the bytes that an operation reads and writes, each once; of tensors that it indexes, the rows that it takes."""
    out = {id(t) for t in tree_leaves(kwargs.get("out"))}
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) not in out]
    if name in ("index_select", "index"):
        read = [result, *read[1:]]
    elif name in ("index_copy", "index_add"):
        return _size(read[1:]) + _size(read[-1:]) * (2 if name == "index_add" else 1)
    elif name == "copy":
        read = read[1:]
    elif name in ("zero", "fill"):
        read = []
    return _size(read) + _size(t for t in tree_leaves(result) if isinstance(t, Tensor))


def _size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; what an expanded tensor repeats counts once."""
    return sum(t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride()) if s or n == 0) for t in tensors)


def _flop(name: str, args: tuple, kwargs: dict, result: Any) -> int:
    packet = getattr(torch.ops.aten, name, None)
    if name in ("mv", "addmv"):
        matrix = args[0 if name == "mv" else 1]
        return 2 * matrix.numel()
    return flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
