"""Bring structures to a rank in the order in which a training needs them; which of them are in memory changes no result.

The next ones are read and prepared by a thread while a step computes. A structure stays in memory once it is read, as long
as there is room; the others are read again each time. An epoch needs every structure once, in random order, so that
nothing is gained by giving up one that is there for another.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakValueDictionary

import torch

from ..inputs.tensors import Example

AHEAD = 2  # structures that are prepared before they are needed


class Structures(Iterator[Example]):
    """Structures of a rank, in the order in which they are needed.

    prepare: makes the structure of a number.
    order: numbers, one after another.
    keeps: whether a structure may stay in memory.
    room_bytes: of all structures that stay.

    with Structures(prepare, iter([0, 1, 0]), lambda k: True, 2**30) as structures:
        first = next(structures)
    """

    def __init__(
        self, prepare: Callable[[int], Example], order: Iterable[int], keeps: Callable[[int], bool], room_bytes: float
    ) -> None:
        self.prepare, self.order, self.keeps, self.room = prepare, iter(order), keeps, room_bytes
        self.kept: dict[int, Example] = {}
        self.alive: WeakValueDictionary[int, Example] = WeakValueDictionary()  # those in use too, which need not be read again
        self.coming: deque[tuple[int, Future[Example]]] = deque()
        self.pool = ThreadPoolExecutor(1, "structures", initializer=torch.set_num_threads, initargs=(1,))
        threads = torch.get_num_threads()
        self.pool.submit(int).result()
        torch.set_num_threads(threads)  # the initializer changed the default of the whole process
        self._look_ahead()

    def __enter__(self) -> "Structures":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __next__(self) -> Example:
        """Return the next structure. Raises StopIteration after the last, and what went wrong in reading it."""
        if not self.coming:
            raise StopIteration
        number, future = self.coming.popleft()
        structure = future.result()
        self.alive[number] = structure
        if number not in self.kept and self.keeps(number) and structure.nbytes <= self.room:
            self.kept[number] = structure
            self.room -= structure.nbytes
        self._look_ahead()
        return structure

    def _look_ahead(self) -> None:
        while len(self.coming) < AHEAD and (number := next(self.order, None)) is not None:
            self.coming.append((number, self._request(number)))

    def _request(self, number: int) -> "Future[Example]":
        for other, future in self.coming:
            if other == number:
                return future
        if (structure := self.alive.get(number)) is not None:
            there: Future[Example] = Future()
            there.set_result(structure)
            return there
        return self.pool.submit(self.prepare, number)
