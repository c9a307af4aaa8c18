"""Measure the throughput of this machine: reads of files, copies in memory and to a device, matrix
products.

1. A probe ends after a bounded number of bytes or a fraction of a second, and all of them take
   about one second.
2. Files are read as they stream: rows of large adjacent pieces, spread over what streams; past the
   page cache, or dropped from it afterwards. What was not cached before is not cached afterwards.
3. A disk, the memory and a device are measured once in a process, when the result is first needed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from shardkit.alignment import ceil_div, round_down, round_up
from shardkit.load.memory.allocate import Item, memory_of, private
from shardkit.load.memory.direct_io import SECTOR, Files
from shardkit.load.streaming.page_layout import READ, READERS
from shardkit.payloads.payload import Extent, unreadable
from shardkit.sizes import format_size
from shardkit.system.threads import Pool

_READS = 128  # half a gibibyte at most
# reads one behind the other, as of a block: a disk is slower where each is far from the last
_ROW = 16
_MEMORY = 64 << 20  # what is copied, and what the matrices that are multiplied take
_MATRICES = 4096  # of a smaller size than 16 KiB, where it is the calls that take time
_ROWS = 256  # from here on, twice the rows take twice the time
_SECONDS = 0.25  # for each probe
_ROUNDS = 4  # that it is cut into, to see how much what it gives varies
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Rates:
    """The throughput of a machine in bytes per second; None for a resource that does not limit a
    forward.

    Attributes:
        disk: large reads of files.
        copy: copies in main memory.
        link: copies from pinned memory to the device.
        compute: bytes of weights that matrix products on the device process.
        spread: for each measured resource, the lowest and the highest of a few rounds.

    Example:
        >>> from shardkit.load import Rates
        >>> rates = Rates(disk=2.5e9, copy=8e9, compute=4e10)
        >>> print(rates)
        disk 2.50 GB/s, copy 8.00 GB/s, compute 40.0 GB/s
        >>> print(rates.given(disk=5e8))  # the same machine with a slower disk
        disk 500 MB/s, copy 8.00 GB/s, compute 40.0 GB/s
    """

    disk: float | None = None
    copy: float | None = None
    link: float | None = None
    compute: float | None = None
    spread: Mapping[str, tuple[float, float]] = field(
        default_factory=dict, hash=False, kw_only=True
    )

    @classmethod
    def measured(cls, **rates: Rate | None) -> Rates:
        """Build a value from measurements; None for a resource that does not exist.

        Example:
            >>> from shardkit.load import Rates
            >>> from shardkit.load.performance.bandwidth import Rate
            >>> Rates.measured(disk=Rate(2e9, 1.5e9, 2.2e9), link=None).slowest.disk
            1500000000.0
        """
        found = {name: rate for name, rate in rates.items() if rate is not None}
        spread = {name: (rate.low, rate.high) for name, rate in found.items()}
        return cls(**{name: rate.typical for name, rate in found.items()}, spread=spread)

    def given(self, **rates: float | None) -> Rates:
        """Return a copy with *rates*, which are known exactly."""
        return replace(
            self,
            **rates,
            spread={name: both for name, both in self.spread.items() if name not in rates},
        )

    @property
    def slowest(self) -> Rates:
        """The lowest measured values, and those that were given."""
        return self.given(**{name: low for name, (low, _) in self.spread.items()})

    @property
    def fastest(self) -> Rates:
        """The highest measured values, and those that were given."""
        return self.given(**{name: high for name, (_, high) in self.spread.items()})

    def __str__(self) -> str:
        named = {"disk": self.disk, "copy": self.copy, "link": self.link, "compute": self.compute}
        return ", ".join(
            f"{name} {format_size(int(rate))}/s" for name, rate in named.items() if rate is not None
        )


class Rate(NamedTuple):
    """The result of a probe: the median of all, and the lowest and highest of a few rounds."""

    typical: float
    low: float
    high: float

    def times(self, nbytes: float) -> Rate:
        """Return bytes per second, where this is a frequency and each event has *nbytes*."""
        return Rate(self.typical * nbytes, self.low * nbytes, self.high * nbytes)


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix product that stands for the computation of a model.

    Attributes:
        dtype: of the weights.
        shape: outputs and inputs of one matrix.
        rows: vectors that are multiplied at once, such as the tokens of a forward.
    """

    dtype: torch.dtype
    shape: tuple[int, int]
    rows: int = 1


_PRODUCT = Product(torch.bfloat16, (4096, 4096))


def common_product(matrices: Iterable[tuple[torch.dtype, Sequence[int]]]) -> Product:
    """Return the product that covers most bytes of *matrices*; shapes that are not a matrix are
    ignored.
    """
    nbytes: Counter[Product] = Counter()
    for dtype, shape in matrices:
        if len(shape) == 2:
            nbytes[Product(dtype, (shape[0], shape[1]))] += shape[0] * shape[1] * dtype.itemsize
    return max(nbytes, key=nbytes.__getitem__, default=_PRODUCT)


def rates_for(weights: Iterable[Item], device: torch.device) -> Rates:
    """Measure the throughput at which *weights* are read, and at which *device* receives and uses
    them, one vector at a time.

    Raises:
        FormatError: a file cannot be read.
    """
    weights = list(weights)
    extents = (source for payload, _, _ in weights for source in payload.sources)
    return measure(extents, device, common_product((dtype, shape) for _, dtype, shape in weights))


def measure(extents: Iterable[Extent], device: torch.device, product: Product) -> Rates:
    """Measure the throughput at which *extents* are read, and at which *device* receives and uses
    them.

    Of several disks, the slowest is reported.

    Raises:
        FormatError: a file cannot be read.
    """
    disks: dict[int, list[Extent]] = {}
    for extent in extents:
        disks.setdefault(_disk_of(extent.path), []).append(extent)
    return Rates.measured(
        disk=min(
            (_read_rate(_Disk(number, tuple(each))) for number, each in disks.items()), default=None
        ),
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
    """A file system, and what is read from it; equal whatever is read."""

    number: int
    extents: tuple[Extent, ...] = field(compare=False)


@cache
def _read_rate(disk: _Disk) -> Rate:
    """By as many threads as a stream has, from what of the places there is time for."""
    files, rest = Files(), iter(list(_places(disk.extents)))
    buffers = [
        memory_of(private(READ).fill_(0)) for _ in range(READERS)
    ]  # touched, since fresh memory comes slowly
    try:
        with Pool(READERS, "shardkit-rate") as pool:
            rounds: list[tuple[int, float]] = []
            while len(rounds) < _ROUNDS:
                begun = time.perf_counter()
                nbytes = sum(pool.map(partial(_read_for_a_while, files, rest), buffers))
                if rounds and not nbytes:  # all is read
                    break
                rounds.append((nbytes, time.perf_counter() - begun))
            speeds = [nbytes / seconds for nbytes, seconds in rounds]
            return Rate(
                sum(nbytes for nbytes, _ in rounds) / sum(seconds for _, seconds in rounds),
                min(speeds),
                max(speeds),
            )
    finally:
        files.close()


def _read_for_a_while(files: Files, rest: Iterator[Extent], memory: memoryview) -> int:
    end = time.perf_counter() + _SECONDS / _ROUNDS
    nbytes = 0
    for place in rest:
        files.at(place.path).read_sectors(
            memory[: round_up(place.nbytes, SECTOR)], place.start, place.nbytes
        )
        nbytes += place.nbytes
        if time.perf_counter() > end:
            break
    return nbytes


def _places(extents: Sequence[Extent]) -> Iterator[Extent]:
    """Places to read at, in rows that are spread evenly over *extents*, each from the begin of a
    sector on.
    """
    starts = [(extent, at) for extent in extents for at in range(0, extent.nbytes, READ)]
    for first in range(0, len(starts), max(_ROW, ceil_div(len(starts) * _ROW, _READS))):
        for extent, at in starts[first : first + _ROW]:
            start = round_down(extent.start + at, SECTOR)
            yield Extent(extent.path, start, min(READ, extent.start + extent.nbytes - start))


@cache
def _copy_rate() -> Rate:
    source, target = (private(_MEMORY).fill_(0) for _ in range(2))
    return _per_second(lambda: target.copy_(source)).times(_MEMORY)


@cache
def _link_rate(device: torch.device) -> Rate:
    pinned = torch.empty(
        _MEMORY, dtype=torch.uint8, device="cpu", pin_memory=True
    )  # whatever the default device
    target = torch.empty(_MEMORY, dtype=torch.uint8, device=device)
    return _per_second(lambda: target.copy_(pinned, non_blocking=True), device).times(_MEMORY)


@cache
def _compute_rate(device: torch.device, product: Product) -> Rate:
    """Over several matrices in turn, so that their weights come from memory, as those of a model
    do.
    """
    dtype = product.dtype if product.dtype in _FLOATS else torch.bfloat16
    outputs, inputs = product.shape
    outputs = max(1, min(outputs, _MEMORY // (2 * inputs * dtype.itemsize)))
    count = min(max(2, _MEMORY // (outputs * inputs * dtype.itemsize)), _MATRICES)
    rows = min(product.rows, _ROWS)
    with torch.no_grad():
        weights = [torch.ones(outputs, inputs, dtype=dtype, device=device) for _ in range(count)]
        vectors = torch.ones(rows, inputs, dtype=dtype, device=device)
        passes = _per_second(lambda: [linear(vectors, weight) for weight in weights], device)
    return passes.times(count * outputs * inputs * dtype.itemsize * rows / product.rows)


def _per_second(work: Callable[[], object], device: torch.device | None = None) -> Rate:
    """How often *work* is done in a second, by *device*, if that is none that is waited for anyway.

    The first time is left out, and the median of the others taken: what else the machine does
    slows some of them considerably.
    """

    def finish() -> None:
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)

    work()
    finish()
    times: list[float] = []
    while sum(times) < _SECONDS:
        begun = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - begun)
    length = ceil_div(len(times), _ROUNDS)
    medians = [median(times[start : start + length]) for start in range(0, len(times), length)]
    return Rate(1 / median(times), 1 / max(medians), 1 / min(medians))
