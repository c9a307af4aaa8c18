"""How fast this machine does what a forward is made of: reads of files, copies in memory and to a device, products.

1. A probe ends after a bounded number of bytes or a fraction of a second, and all of them take about one second.
2. Files are read as they stream: by large reads side by side, at places spread over what streams. Their pages are dropped before
   a buffered read, so that it is the disk that answers, and after it, so that nothing is cached for a probe.
3. A disk, the memory and a device are measured once in a process, and not before somebody asks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from shardkit.load.memory import aligned, memory_of
from shardkit.payload import Extent, unreadable
from shardkit.sizes import format_size

_READERS = 2
_READ = 4 << 20
_READS = 96  # of each kind: 384 MiB at most
_MEMORY = 64 << 20  # what is copied, and what the matrices that are multiplied take
_ROWS = 256  # from here on, twice the rows take twice the time
_SECONDS = 0.15  # for each probe
_PAGE = 4096
_DIRECT: int | None = getattr(os, "O_DIRECT", None)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second; None of what is not there, and so limits nothing.

    Attributes:
        direct: large reads past the page cache.
        buffered: large reads through the page cache, of what it does not hold.
        copy: copies in main memory.
        link: copies from pinned memory to the device.
        compute: weights that products on the device get through.
    """

    direct: float | None = None
    buffered: float | None = None
    copy: float | None = None
    link: float | None = None
    compute: float | None = None

    @property
    def disk(self) -> float | None:
        """Those of the faster kind of read."""
        return max((rate for rate in (self.direct, self.buffered) if rate is not None), default=None)

    def __str__(self) -> str:
        named = {"disk": self.disk, "host copy": self.copy, "link": self.link, "compute": self.compute}
        return ", ".join(f"{name} {format_size(int(rate))}/s" for name, rate in named.items() if rate is not None)


@dataclass(frozen=True, slots=True)
class Product:
    """What stands for the computing of a model: a matrix of weights times some vectors.

    Attributes:
        dtype: of the weights.
        shape: outputs and inputs of one matrix.
        rows: vectors that are multiplied at once, such as the tokens of a forward.
    """

    dtype: torch.dtype
    shape: tuple[int, int]
    rows: int = 1


def measure(extents: Iterable[Extent], device: torch.device, product: Product) -> Rates:
    """The rates at which *extents* are read, and at which *device* gets and uses what is in them.

    Of several disks the slowest is given.

    Raises:
        FormatError: a file cannot be read.
    """
    disks: dict[int, list[Extent]] = {}
    for extent in extents:
        disks.setdefault(_disk_of(extent.path), []).append(extent)
    read = [_read_rates(_Disk(number, tuple(each))) for number, each in disks.items()]
    direct = [rate for rate, _ in read if rate is not None]
    return Rates(
        direct=min(direct) if direct and len(direct) == len(read) else None,
        buffered=min((rate for _, rate in read), default=None),
        copy=_copy_rate(),
        link=None if device.type == "cpu" else _link_rate(device),
        compute=_compute_rate(device, product),
    )


def _disk_of(path: Path) -> int:
    try:
        return os.stat(path).st_dev
    except OSError as error:
        raise unreadable(path, error) from None


@dataclass(frozen=True, slots=True)
class _Disk:
    """A file system, and what is read from it; the same whatever is read."""

    number: int
    extents: tuple[Extent, ...] = field(compare=False)


@cache
def _read_rates(disk: _Disk) -> tuple[float | None, float]:
    """Direct and buffered: each reads every other place, so that neither finds what the other has brought closer."""
    places = list(_places(disk.extents))
    return _direct_rate(places[::2]), _read_rate(places[1::2] or places, _read_buffered)


def _places(extents: Sequence[Extent]) -> Iterator[Extent]:
    """Places to read at, spread evenly over *extents*."""
    starts = [(extent, at) for extent in extents for at in range(0, extent.nbytes, _READ)]
    step = max(1, len(starts) // (2 * _READS))
    for extent, at in starts[::step][: 2 * _READS]:
        start = (extent.start + at) // _PAGE * _PAGE
        yield Extent(extent.path, start, min(_READ, extent.start + extent.nbytes - start))


def _direct_rate(places: Sequence[Extent]) -> float | None:
    """None where the system or the file system has no such reads."""
    if _DIRECT is None:
        return None
    try:
        return _read_rate(places, _read_direct)
    except OSError:
        return None


_ReadPlace = Callable[[Extent, memoryview], int]


def _read_rate(places: Sequence[Extent], read: _ReadPlace) -> float:
    """Bytes per second of *read*, by as many threads as a stream has, from what of *places* there is time for."""
    buffers = [aligned(_READ + _PAGE).fill_(0) for _ in range(_READERS)]  # touched, since fresh memory comes slowly
    rest = iter(places)
    with ThreadPoolExecutor(_READERS) as pool:
        begun = time.perf_counter()
        nbytes = sum(pool.map(partial(_read_for_a_while, rest, read), map(_whole_pages, buffers)))
        return nbytes / (time.perf_counter() - begun)


def _read_for_a_while(rest: Iterator[Extent], read: _ReadPlace, memory: memoryview) -> int:
    end = time.perf_counter() + _SECONDS
    nbytes = 0
    for place in rest:
        nbytes += read(place, memory)
        if time.perf_counter() > end:
            break
    return nbytes


def _whole_pages(buffer: torch.Tensor) -> memoryview:
    """What of *buffer* begins at a page, as direct reads need it."""
    return memory_of(buffer)[-buffer.data_ptr() % _PAGE :][:_READ]


def _read_direct(place: Extent, memory: memoryview) -> int:
    descriptor = os.open(place.path, os.O_RDONLY | (_DIRECT or 0))
    with open(descriptor, "rb", buffering=0) as file:
        file.seek(place.start)
        return file.readinto(memory[: -(-place.nbytes // _PAGE) * _PAGE]) or 0


def _read_buffered(place: Extent, memory: memoryview) -> int:
    try:
        with open(place.path, "rb", buffering=0) as file:
            _drop(file.fileno(), place)
            file.seek(place.start)
            nbytes = file.readinto(memory[: place.nbytes]) or 0
            _drop(file.fileno(), place)
            return nbytes
    except OSError as error:
        raise unreadable(place.path, error) from None


def _drop(file: int, place: Extent) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, place.start, place.nbytes, os.POSIX_FADV_DONTNEED)


@cache
def _copy_rate() -> float:
    source, target = (aligned(_MEMORY).fill_(0) for _ in range(2))
    return _MEMORY * _per_second(lambda: target.copy_(source))


@cache
def _link_rate(device: torch.device) -> float:
    pinned = torch.empty(_MEMORY, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_MEMORY, dtype=torch.uint8, device=device)
    return _MEMORY * _per_second(lambda: target.copy_(pinned, non_blocking=True), device)


@cache
def _compute_rate(device: torch.device, product: Product) -> float:
    """Over several matrices in turn, so that their weights come from memory, as those of a model do."""
    dtype = product.dtype if product.dtype in _FLOATS else torch.bfloat16
    outputs, inputs = product.shape
    outputs = max(1, min(outputs, _MEMORY // (2 * inputs * dtype.itemsize)))
    count = max(2, _MEMORY // (outputs * inputs * dtype.itemsize))
    rows = min(product.rows, _ROWS)
    with torch.no_grad():
        weights = [torch.ones(outputs, inputs, dtype=dtype, device=device) for _ in range(count)]
        vectors = torch.ones(rows, inputs, dtype=dtype, device=device)
        passes = _per_second(lambda: [linear(vectors, weight) for weight in weights], device)
    return passes * count * outputs * inputs * dtype.itemsize * rows / product.rows


def _per_second(work: Callable[[], object], device: torch.device | None = None) -> float:
    """How often *work* is done in a second, the first time left out; by *device*, if that is none that is waited for anyway."""

    def finish() -> None:
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)

    work()
    finish()
    begun = time.perf_counter()
    count, seconds = 0, 0.0
    while seconds < _SECONDS:
        work()
        finish()
        count, seconds = count + 1, time.perf_counter() - begun
    return count / seconds
