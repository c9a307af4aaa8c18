"""Fill memory with weights by few large parallel reads, each of a contiguous range of a file.

1. After an exception nothing is left behind: no thread, no open file.
2. Bytes are read directly into the memory that they are for. Computed values pass through buffers
   that are reused.
3. A disk is read by more threads than there are cores; computation uses one thread for each core.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from shardkit.load.memory.cast_reads import cast_into
from shardkit.load.memory.thread_buffers import pieces_of
from shardkit.payloads.cast import Cast
from shardkit.payloads.coalesce import follows
from shardkit.payloads.compressed import Framed
from shardkit.payloads.payload import (
    Concat,
    Extent,
    Payload,
    Swapped,
    ended_early,
    fill,
    unreadable,
)
from shardkit.payloads.strided import Strided
from shardkit.system.progress import OnBytes
from shardkit.system.threads import Pool

WORKERS = 4
Fill = tuple[Payload, memoryview]
Bring = Callable[[Sequence[memoryview]], object]

_READ = 8 << 20
_BUFFERS = 512  # of one read; half of what Linux takes (IOV_MAX)
_GAP = (
    16 << 10
)  # bytes between two tensors that are read along rather than left out by a read of their own
_JUNK = memoryview(
    bytearray(_GAP)
)  # where they go; nobody looks at it, so that all threads may write it


def fill_all(
    fills: Iterable[Fill],
    *,
    workers: int = WORKERS,
    on_bytes: OnBytes = lambda _: None,
    bring: Bring = lambda buffers: None,
) -> None:
    """Fill pieces of memory, each as long as its payload. They are read in the order given, so let
    it be that of the files.

    Args:
        fills: payloads, and where their bytes go.
        workers: how many reads are in flight.
        on_bytes: called in this thread with the number of bytes after each read.
        bring: called with the pieces of memory that are about to be filled, by the thread that does
            it.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    jobs = list(_jobs(fills))
    computes = any(isinstance(job, _Makings) for job in jobs)
    _carry_out(jobs, min(workers, os.cpu_count() or 1) if computes else workers, on_bytes, bring)


def read_into(payload: Payload, memory: memoryview) -> None:
    """Fill *memory*, which is as long as *payload*, with its bytes.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    if isinstance(payload, Extent):
        _Read(payload, [memory], payload.nbytes).run()
        return
    if isinstance(payload, Cast):
        cast_into(payload, memory)
        return
    at = 0
    for piece in _pieces_of(payload):
        copy(piece, memory[at : at + len(piece)])
        at += len(piece)


def _pieces_of(payload: Payload) -> Iterator[memoryview]:
    """The bytes of *payload* as they come, where nobody needs them in chunks."""
    if isinstance(payload, Strided):
        return payload.pieces()
    if (
        isinstance(payload, Framed) and payload.nbytes == payload.whole
    ):  # of which nothing is worth keeping
        return payload.pieces(
            pieces_of(payload.frame) if isinstance(payload.frame, Extent) else None
        )
    return payload.chunks()


def copy(source: memoryview, target: memoryview) -> None:
    """As by assignment; but where ctypes can, other threads run meanwhile."""
    if source.readonly or not source.nbytes:
        target[:] = source
    else:
        start, to = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (source, target))
        ctypes.memmove(to, start, source.nbytes)


def address(payload: Payload) -> tuple[str, int]:
    """Return the position that *payload* is read from first, so that adjacent ranges are read
    together.
    """
    first = payload if isinstance(payload, Extent) else next(iter(payload.sources), None)
    return (str(first.path), first.start) if first else ("", 0)


@dataclass(slots=True)
class _Read:
    """One read of one run of a file into several pieces of memory.

    Attributes:
        extent: the run.
        buffers: what is filled, in order; `_JUNK` between tensors that do not touch in the file.
        nbytes: bytes of the run that are weights.
    """

    extent: Extent
    buffers: list[memoryview]
    nbytes: int

    def takes(self, extent: Extent) -> bool:
        """Whether *extent* is worth reading along."""
        is_small = self.extent.nbytes + extent.nbytes <= _READ
        has_room = len(self.buffers) < _BUFFERS - 1
        return is_small and has_room and follows(self.extent, extent, gap=_GAP)

    def add(self, extent: Extent, memory: memoryview) -> None:
        start = self.extent.start
        if gap := extent.start - start - self.extent.nbytes:
            self.buffers.append(_JUNK[:gap])
        self.buffers.append(memory)
        self.extent = Extent(self.extent.path, start, extent.start + extent.nbytes - start)
        self.nbytes += extent.nbytes

    def run(self) -> int:
        """Fill the memory, and give the number of bytes of weights.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
        """
        path = self.extent.path
        try:
            with open(path, "rb", buffering=0) as file:
                if hasattr(os, "preadv"):
                    _scatter(file.fileno(), self.buffers, self.extent)
                else:  # Windows
                    file.seek(self.extent.start)
                    for buffer in self.buffers:
                        fill(buffer, file.readinto, self.extent)
        except OSError as error:
            raise unreadable(path, error) from None
        return self.nbytes


@dataclass(slots=True)
class _Makings:
    """The same for payloads that are made from bytes of files: one large one, or several small
    ones.
    """

    payloads: list[Payload] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    nbytes: int = 0

    def takes(self, payload: Payload) -> bool:
        return self.nbytes + payload.nbytes <= _READ

    def add(self, payload: Payload, memory: memoryview) -> None:
        self.payloads.append(payload)
        self.buffers.append(memory)
        self.nbytes += payload.nbytes

    def run(self) -> int:
        for payload, memory in zip(self.payloads, self.buffers, strict=True):
            read_into(payload, memory)
        return self.nbytes


_Job = _Read | _Makings


def _jobs(fills: Iterable[Fill]) -> Iterator[_Job]:
    """What is to be done for *fills*, in pieces that may be done side by side."""
    read: _Read | None = None
    makings = _Makings()
    for payload, memory in _cut(fills):
        if isinstance(payload, Extent):
            if read is not None and read.takes(payload):
                read.add(payload, memory)
                continue
            if read is not None:
                yield read
            read = _Read(payload, [memory], payload.nbytes)
        else:
            if makings.payloads and not makings.takes(payload):
                yield makings
                makings = _Makings()
            makings.add(payload, memory)
    if read is not None:
        yield read
    if makings.payloads:
        yield makings


def _cut(fills: Iterable[Fill]) -> Iterator[Fill]:
    """*fills* in pieces of one read, where a piece costs no more than its share."""
    for each in fills:
        if each[0].nbytes <= _READ:
            yield each
        else:
            yield from _pieces(*each)


def _pieces(payload: Payload, memory: memoryview) -> Iterator[Fill]:
    if isinstance(payload, Concat):  # of frames, which are expanded one by one
        at = 0
        for part in payload.parts:
            yield part, memory[at : at + part.nbytes]
            at += part.nbytes
        return
    divisible = isinstance(payload, Extent) or (
        isinstance(payload, Cast | Swapped) and isinstance(payload.inner, Extent)
    )
    step = _READ if divisible else max(1, len(memory))
    for at in range(0, len(memory), step):
        piece = memory[at : at + step]
        yield payload.narrow(at, len(piece)) if len(piece) < len(memory) else payload, piece


def _carry_out(jobs: Sequence[_Job], workers: int, on_bytes: OnBytes, bring: Bring) -> None:
    """Run all *jobs*; after the first that fails no other is begun, and what was begun has
    ended.
    """

    def run(job: _Job) -> int:
        bring(job.buffers)
        return job.run()

    pool = Pool(workers, "shardkit-read")
    try:
        futures = [pool.submit(run, job) for job in jobs]
        futures.reverse()
        while futures:
            on_bytes(
                futures.pop().result()
            )  # not kept: a frame that holds what raised is a circle, and would keep the memory
    finally:
        pool.shutdown(cancel_futures=True)


def _scatter(file: int, buffers: Sequence[memoryview], extent: Extent) -> None:
    """Fill *buffers*, one behind the other, with *extent* of the open *file*."""
    rest, at = [buffer for buffer in buffers if buffer], extent.start
    while rest:
        count = os.preadv(file, rest, at)
        if not count:
            raise ended_early(extent)
        at += count
        rest = list(_behind(rest, count)) if at < extent.start + extent.nbytes else []


def _behind(buffers: Iterable[memoryview], nbytes: int) -> Iterator[memoryview]:
    """What of *buffers* comes after the first *nbytes* bytes."""
    for buffer in buffers:
        if nbytes < len(buffer):
            yield buffer[nbytes:]
        nbytes = max(0, nbytes - len(buffer))
