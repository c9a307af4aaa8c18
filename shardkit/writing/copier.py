"""Copy the bytes of a part into an open file, by the fastest means that the two file systems share.

    clone            FICLONERANGE: no bytes move and no space is taken (Btrfs, XFS); needs complete
                     pages at congruent offsets
    copy_file_range  inside the kernel, without passing through this process
    sendfile         the same, on older kernels and between file systems
    read and write   anywhere

Each is tried in this order, and one that fails for a pair of files is not tried for it again. A
part that is not a plain run of a file is computed by its payload, chunk by chunk, and written.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shardkit.alignment import round_down, round_up
from shardkit.payloads.payload import (
    CHUNK,
    PAGE,
    Extent,
    Literal,
    Part,
    Payload,
    Trailer,
    ended_early,
    unreadable,
)
from shardkit.system.progress import OnBytes
from shardkit.system.rate_limit import RateLimit

See = Callable[[memoryview], None]

_STEP = 64 << 20  # so that progress moves and an interrupt is heard while a large part is copied
_BACK = 1 << 20  # read back at a time: so little stays in the processor's cache
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), linux/fs.h


class Engine(StrEnum):
    """How bytes came into an output file."""

    CLONED = "cloned"
    COPIED = "copied in the kernel"
    SENT = "sent in the kernel"
    READ = "read and written"
    TRANSFORMED = "transformed"
    WRITTEN = "headers"
    COMPRESSED = "compressed"


def engine_of(part: Part) -> Engine:
    """The engine that moves *part*, where nothing better than a copy is to be had."""
    match part:
        case Extent():
            return Engine.COPIED
        case Literal() | Trailer():
            return Engine.WRITTEN
    return Engine.TRANSFORMED


def can_clone(source: Path, folder: Path) -> bool:
    """Whether the file system lets files in *folder* share the pages of *source*; tries it on a
    file without a name.
    """
    if sys.platform != "linux":
        return False
    try:
        with open(source, "rb") as origin, tempfile.TemporaryFile(dir=folder) as probe:
            return (
                os.fstat(origin.fileno()).st_size >= PAGE
                and _clone(origin.fileno(), 0, probe.fileno(), 0, PAGE) == PAGE
            )
    except OSError:
        return False


def clonable(extent: Extent, at: int) -> int:
    """How many bytes of *extent* are whole pages that lie at the same place of a page when written
    at offset *at*.
    """
    if (extent.start - at) % PAGE:
        return 0
    first = round_up(extent.start, PAGE)
    last = round_down(extent.start + extent.nbytes, PAGE)
    return max(0, last - first)


def reserve(file: int, nbytes: int) -> None:
    """Allocate *nbytes* bytes for the open *file*, where the file system can; one that cannot is
    left alone.

    This is fallocate(2) and not posix_fallocate(3), which the C library emulates by writing zeros.

    Raises:
        OSError: the disk is full.
    """
    if sys.platform != "linux" or not nbytes:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
        and ctypes.get_errno() == errno.ENOSPC
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Copier:
    """Writes parts into one open output file, and counts by which engine. A context: it owns the
    sources that it opens.
    """

    def __init__(
        self,
        output: int,
        *,
        clones: Callable[[Path], bool],
        on_bytes: OnBytes,
        limit: RateLimit | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Write to the file descriptor *output*.

        Args:
            output: open for writing, and for reading too where bytes are to be seen.
            clones: whether a source may be cloned from.
            on_bytes: called with the number of bytes after each step.
            limit: how many bytes may be moved in a second; what is cloned moves none.
            stop: ends a wait for the limit.
        """
        self.counts: Counter[Engine] = Counter()
        self._output = output
        self._clones = clones
        self._on_bytes = on_bytes
        self._limit = limit
        self._stop = stop
        self._step_bytes = min(_STEP, limit.step) if limit else _STEP
        self._open = ExitStack()
        self._back = memoryview(bytearray(_BACK))
        self._source_now: _Opened | None = None

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def write(self, payload: Payload, at: int, *see: See) -> None:
        """Write *payload* at offset *at* of the output, and call each of *see* with its bytes in
        their order.

        What the kernel copies is read back from the output: that is faster than to let it pass
        through this process.

        Raises:
            FormatError: a source cannot be read.
            OSError: the output cannot be written.
        """
        if isinstance(payload, Extent):
            for start, count in self._copied(payload, at):
                if see:
                    self._show(start, count, see)
            return
        engine = engine_of(payload)
        for chunk in payload.chunks():
            for each in see:
                each(chunk)
            write_at(self._output, chunk, at)
            at += len(chunk)
            self._done(engine, len(chunk))

    def _show(self, start: int, count: int, see: Iterable[See]) -> None:
        stop = start + count
        while start < stop:
            chunk = self._back[: min(len(self._back), stop - start)]
            chunk = chunk[: read_at(self._output, chunk, start)]
            for each in see:
                each(chunk)
            start += len(chunk)

    def _copied(self, extent: Extent, at: int) -> Iterator[tuple[int, int]]:
        """Copy *extent*, and say in order which runs of the output, by start and length, have been
        written.
        """
        source = self._source(extent.path)
        pages = clonable(extent, at) if self._clones(extent.path) else 0
        edge = -extent.start % PAGE
        if not pages or not _tried(
            _clone, source.file, extent.start + edge, self._output, at + edge, pages
        ):
            yield from self._carried(source, extent, at)
            return
        yield from self._carried(source, extent.narrow(0, edge), at)
        self._done(Engine.CLONED, pages)
        yield at + edge, pages
        rest = edge + pages
        yield from self._carried(source, extent.narrow(rest, extent.nbytes - rest), at + rest)

    def _carried(self, source: _Opened, extent: Extent, at: int) -> Iterator[tuple[int, int]]:
        start, stop = extent.start, extent.start + extent.nbytes
        while start < stop:
            engine, count = self._step(source, start, at, min(stop - start, self._step_bytes))
            if not count:
                raise ended_early(extent)
            self._done(engine, count)
            yield at, count
            start += count
            at += count

    def _step(self, source: _Opened, start: int, at: int, nbytes: int) -> tuple[Engine, int]:
        """One move by the first engine that can make it; an engine that turns out unable is
        forgotten for this source.
        """
        while source.moves:
            engine, move = source.moves[0]
            if count := _tried(move, source.file, start, self._output, at, nbytes):
                return engine, count
            del source.moves[0]
        return Engine.READ, self._read_write(source, start, at, min(nbytes, CHUNK))

    def _read_write(self, source: _Opened, start: int, at: int, nbytes: int) -> int:
        os.lseek(source.file, start, os.SEEK_SET)
        try:
            data = os.read(source.file, nbytes)
        except OSError as error:
            raise unreadable(source.path, error) from None
        write_at(self._output, data, at)
        return len(data)

    def _source(self, path: Path) -> _Opened:
        """The source, opened; one at a time, since parts of one file stand together and descriptors
        are few.
        """
        if self._source_now is None or self._source_now.path != path:
            self._open.close()
            try:
                file = self._open.enter_context(path.open("rb", buffering=0))
            except OSError as error:
                raise unreadable(path, error) from None
            self._source_now = _Opened(path, file.fileno(), list(_moves()))
        return self._source_now

    def _done(self, engine: Engine, count: int) -> None:
        self.counts[engine] += count
        self._on_bytes(count)
        if self._limit is not None and engine is not Engine.CLONED:
            self._limit.wait(count, self._stop)


def write_at(output: int, data: memoryview | bytes, at: int) -> None:
    """All of *data* at offset *at* of the file descriptor *output*."""
    rest = memoryview(data)
    while rest:
        if hasattr(os, "pwrite"):
            count = os.pwrite(output, rest, at)
        else:  # Windows
            os.lseek(output, at, os.SEEK_SET)
            count = os.write(output, rest)
        rest = rest[count:]
        at += count


def read_at(output: int, buffer: memoryview, at: int) -> int:
    """Read from offset *at* of the file descriptor *output* into *buffer*, and give how many bytes;
    none is an OSError.
    """
    if hasattr(os, "preadv"):
        count = os.preadv(output, [buffer], at)
    else:  # Windows
        os.lseek(output, at, os.SEEK_SET)
        data = os.read(output, len(buffer))
        buffer[: (count := len(data))] = data
    if not count:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return count


_Move = Callable[[int, int, int, int, int], int]


@dataclass(slots=True)
class _Opened:
    path: Path
    file: int
    moves: list[tuple[Engine, _Move]]


def _moves() -> Iterator[tuple[Engine, _Move]]:
    if hasattr(os, "copy_file_range"):
        yield Engine.COPIED, _copy_file_range
    if sys.platform == "linux":  # elsewhere sendfile writes to sockets only
        yield Engine.SENT, _sendfile


def _tried(move: _Move, source: int, start: int, output: int, at: int, count: int) -> int:
    """Bytes moved; 0 where this means does not work for these files.

    An error may be that of the means, of the source or of the output: which, a plain read and a
    plain write will tell.
    """
    try:
        return move(source, start, output, at, count)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return 0


def _clone(source: int, start: int, output: int, at: int, count: int) -> int:
    import fcntl

    fcntl.ioctl(output, _FICLONERANGE, struct.pack("=qQQQ", source, start, count, at))
    return count


def _copy_file_range(source: int, start: int, output: int, at: int, count: int) -> int:
    return os.copy_file_range(source, output, count, start, at)


def _sendfile(source: int, start: int, output: int, at: int, count: int) -> int:
    os.lseek(output, at, os.SEEK_SET)
    return os.sendfile(output, source, start, count)
