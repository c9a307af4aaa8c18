"""Read a box of a strided storage into memory: few large reads, whatever the strides.

A box is a list of axes, each a length and a stride in elements. Its input consists of runs: the
axes with the smallest strides are read as one piece, gaps included. Runs that are close together
are read many at once and picked out; distant ones are read one by one. A cost model chooses which
axes form a run, and how runs are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from itertools import product
from math import inf, prod
from typing import TYPE_CHECKING, Any

from shardkit.alignment import ceil_div
from shardkit.errors import PlanError
from shardkit.payloads.open_files import OpenExtent
from shardkit.payloads.payload import Extent, Payload, fill, unreadable

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[
        Any
    ]  # Any: unsigned words as wide as the elements, which is known when it runs

_STAGING = 32 << 20  # input of one box
_WINDOW = 4 << 20  # read at once where gaps are read too
_SEEK = 16 << 10  # the price of one more read, in bytes that could be read meanwhile

Axis = tuple[int, int]
Read = Callable[[memoryview, int], None]


def count_of(axes: Sequence[Axis]) -> int:
    """Elements of a box."""
    return prod(length for length, _ in axes)


def reach_of(axes: Sequence[Axis]) -> int:
    """Elements of the storage from the first of a box to its last."""
    return 1 + sum((length - 1) * stride for length, stride in axes)


def price_of(box: Sequence[Axis], itemsize: int) -> float:
    """What it costs to read *box*, in bytes; infinite if it needs more memory than there is for
    one.
    """
    return _cheapest(box, itemsize).price


def _require_numpy() -> None:
    """See that there is NumPy, which moves elements in memory.

    Raises:
        PlanError: it is not installed.
    """
    try:
        import numpy  # noqa: F401, ICN001 - only whether it can be
    except ModuleNotFoundError:
        raise PlanError(
            "reading weights that are not contiguous needs NumPy, which is not installed",
            hint="pip install numpy",
        ) from None


def address_of(memory: memoryview) -> int:
    """Where the first byte of *memory* is, which may be read-only."""
    _require_numpy()
    import numpy as np

    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


@contextmanager
def reading(storage: Payload) -> Iterator[Read]:
    """How to fill a buffer from a byte of *storage* on; its file, if it is in one, is opened once.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    if isinstance(storage, OpenExtent):
        yield storage.fill
        return
    if not isinstance(storage, Extent):
        yield partial(_read_any, storage)
        return
    try:
        with open(storage.path, "rb", buffering=0) as file:
            yield partial(_read_file, file, storage)
    except OSError as error:
        raise unreadable(storage.path, error) from None


class Staging:
    """Memory for the input of one box after the other."""

    def __init__(self, itemsize: int, read: Read) -> None:
        """Hold nothing yet."""
        self._itemsize = itemsize
        self._read = read
        self._runs = memory_of(0)
        self._window = memory_of(0)

    def gather(self, start: int, box: Sequence[Axis]) -> Array:
        """The box that begins at element *start* of the storage, as an array of its shape; valid
        until the next.
        """
        way = _cheapest(box, self._itemsize)
        self._fill(start, way, [box[i] for i in way.outer])
        strides = [stride for _, stride in box]
        pitch = way.run
        for i in reversed(way.outer):
            strides[i] = pitch
            pitch *= box[i][0]
        return self._array(self._runs, [length for length, _ in box], strides)

    def _fill(self, start: int, way: _Way, outer: list[Axis]) -> None:
        """Read all runs, one behind the other."""
        self._runs = _at_least(self._runs, count_of(outer) * way.run * self._itemsize)
        read_runs = self._one_by_one if way.together == 1 else self._together
        *far, near = outer or [(1, 1)]
        at = 0
        for steps in product(*(range(0, length * stride, stride) for length, stride in far)):
            read_runs(at, start + sum(steps), near, way)
            at += near[0] * way.run * self._itemsize

    def _one_by_one(self, at: int, start: int, near: Axis, way: _Way) -> None:
        """Read the runs along one axis, the first of them from element *start* to byte *at*."""
        memory, nbytes = self._runs.data, way.run * self._itemsize
        for element in range(start, start + near[0] * near[1], near[1]):
            self._read(memory[at : at + nbytes], element * self._itemsize)
            at += nbytes

    def _together(self, at: int, start: int, near: Axis, way: _Way) -> None:
        """The same, with the gaps between them."""
        length, stride = near
        for first in range(0, length, way.together):
            count = min(way.together, length - first)
            nbytes = reach_of([(count, stride), (way.run, 1)]) * self._itemsize
            self._window = _at_least(self._window, nbytes)
            self._read(self._window.data[:nbytes], (start + first * stride) * self._itemsize)
            runs = self._array(self._runs[at:], [count, way.run], [way.run, 1])
            runs[...] = self._array(self._window, [count, way.run], [stride, 1])
            at += runs.nbytes

    def _array(self, memory: Array, shape: list[int], strides: list[int]) -> Array:
        import numpy as np

        word = "c16" if self._itemsize == 16 else f"u{self._itemsize}"
        return np.ndarray(
            shape, word, memory.data, strides=[stride * self._itemsize for stride in strides]
        )


def memory_of(nbytes: int) -> Array:
    """*nbytes* bytes of memory, aligned for elements of any type and not yet touched."""
    _require_numpy()
    import numpy as np

    return np.empty(nbytes, np.uint8)


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to read a box.

    Attributes:
        price: bytes read, and `_SEEK` for each read; infinite where the memory is too small.
        run: elements of one run.
        outer: numbers of the axes that lead from run to run, the largest stride first.
        together: how many runs along the last of these axes are read at once.
    """

    price: float
    run: int
    outer: tuple[int, ...]
    together: int = 1


def _cheapest(box: Sequence[Axis], itemsize: int) -> _Way:
    """The cheapest way to read *box*."""
    read = [i for i, (length, stride) in enumerate(box) if length > 1 and stride]
    order = tuple(sorted(read, key=lambda i: -box[i][1]))
    ways = (
        way
        for split in range(len(order) + 1)
        for way in _ways(box, order[:split], order[split:], itemsize)
    )
    return min(ways, key=lambda way: way.price)


def _ways(
    box: Sequence[Axis], outer: tuple[int, ...], inner: tuple[int, ...], itemsize: int
) -> Iterator[_Way]:
    """Both ways to read runs that hold all of the *inner* axes."""
    run = reach_of([box[i] for i in inner])
    runs = count_of([box[i] for i in outer])
    if runs * run * itemsize > _STAGING:
        yield _Way(inf, run, outer)
        return
    yield _Way(runs * (_SEEK + run * itemsize), run, outer)
    if outer:
        length, stride = box[outer[-1]]
        together = min(length, 1 + max(0, _WINDOW // itemsize - run) // stride)
        reads = ceil_div(length, together)
        price = reads * _SEEK + (length * stride + run) * itemsize
        yield _Way(runs // length * price, run, outer, together)


def _at_least(memory: Array, nbytes: int) -> Array:
    return memory if memory.nbytes >= nbytes else memory_of(nbytes)


def _read_file(file: RawIOBase, extent: Extent, buffer: memoryview, start: int) -> None:
    file.seek(extent.start + start)
    got = file.readinto(buffer) or 0
    if got < len(buffer):
        fill(buffer[got:], file.readinto, extent)


def _read_any(storage: Payload, buffer: memoryview, start: int) -> None:
    at = 0
    for chunk in storage.narrow(start, len(buffer)).chunks():
        buffer[at : at + len(chunk)] = chunk
        at += len(chunk)
