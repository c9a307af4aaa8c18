"""A file that is being downloaded, which no kill makes forget what it has.

Beside the file, which has its full length from the start and holes where nothing has come yet, is a
record of how many bytes of each range are there:

    <digest>.shardkit.incomplete    the bytes
    <digest>.shardkit.ranges        a line of JSON, and 8 bytes (little-endian) for each range

The record is mapped into memory, and a number is raised after the bytes that it counts are written:
both are with the system then, and outlive the process. After a power failure the record may claim
bytes that never reached the disk. The digest of the whole file tells, and it is downloaded again.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

RANGE = 32 * 2**20  # bytes of a request
_COUNT = struct.Struct("<Q")
_HEAD = 256  # bytes of the line, padded
_VERSION = 1


class PartialFile:
    """The parts of one file that have come so far; each range is written by one thread."""

    def __init__(self, destination: Path, nbytes: int, span: int = RANGE) -> None:
        """Go on with what an earlier process has left, or begin.

        Args:
            destination: where `finish` puts the file.
            nbytes: its size.
            span: bytes of each range.

        Raises:
            OSError: the files cannot be created.
        """
        self._at(destination, nbytes, span)
        self._open(anew=not self._can_go_on())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def present(self) -> int:
        """How many bytes are there."""
        return sum(self.count(number) for number in range(len(self.ranges)))

    def count(self, number: int) -> int:
        """How many bytes of the range with that *number* are there, from its start."""
        start, stop = self.ranges[number]
        found: int = _COUNT.unpack_from(self._counts, _HEAD + number * _COUNT.size)[0]
        return min(found, stop - start)

    def open(self) -> BinaryIO:
        """A handle to write with, for one thread."""
        return open(self.path, "rb+", buffering=0)

    def add(self, number: int, handle: BinaryIO, chunk: bytes) -> None:
        """Write the next bytes of a range, and record them.

        Args:
            number: of the range.
            handle: that of the thread.
            chunk: no longer than what the range lacks.

        Raises:
            OSError: the disk refuses them.
        """
        count = self.count(number)
        handle.seek(self.ranges[number][0] + count)
        left = memoryview(chunk)
        while left:
            left = left[handle.write(left) :]
        place = _HEAD + number * _COUNT.size
        _COUNT.pack_into(self._counts, place, count + len(chunk))

    def pieces(self, number: int, buffer: memoryview) -> Iterator[memoryview]:
        """What a range has, in pieces that are in *buffer* until the next is asked for."""
        start, stop = self.ranges[number]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                count = file.readinto(buffer[: stop - start])
                if not count:  # somebody has cut the file
                    return
                yield buffer[:count]
                start += count

    def forget(self) -> None:
        """Begin anew: what is there is not what it should be."""
        self.close()
        self._open(anew=True)

    @classmethod
    def recorded(cls, destination: Path, nbytes: int, span: int = RANGE) -> int:
        """How many bytes of a file of *nbytes* an earlier process has left; nothing is opened for
        writing.
        """
        part = cls.__new__(cls)
        part._at(destination, nbytes, span)
        if not part._can_go_on():
            return 0
        counts = part._record.read_bytes()[_HEAD:]
        return sum(
            min(count, end - start)
            for (count,), (start, end) in zip(_COUNT.iter_unpack(counts), part.ranges, strict=True)
        )

    def finish(self) -> None:
        """Make the file last, and put it in its place.

        Raises:
            OSError: the disk refuses.
        """
        self.close()
        with open(self.path, "rb+", buffering=0) as file:
            os.fsync(file.fileno())
        os.replace(self.path, self._destination)
        self._record.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files, which stay."""
        self._counts.close()

    def _at(self, destination: Path, nbytes: int, span: int) -> None:
        self.path = destination.with_name(f"{destination.name}.shardkit.incomplete")
        self._record = destination.with_name(f"{destination.name}.shardkit.ranges")
        self._destination = destination
        self.nbytes = nbytes
        head = json.dumps({"version": _VERSION, "nbytes": nbytes, "range": span}).encode()
        self._head = head.ljust(_HEAD)
        self.ranges = [(start, min(start + span, nbytes)) for start in range(0, nbytes, span)]

    def _can_go_on(self) -> bool:
        if self.path.is_symlink():  # which nobody here makes
            return False
        try:
            with open(self._record, "rb") as file:
                head = file.read(_HEAD)
            sizes = self.path.stat().st_size, self._record.stat().st_size
        except OSError:
            return False
        return head == self._head and sizes == (self.nbytes, self._record_nbytes)

    @property
    def _record_nbytes(self) -> int:
        return _HEAD + _COUNT.size * len(self.ranges)

    def _open(self, *, anew: bool) -> None:
        if anew:
            self._record.unlink(missing_ok=True)  # first: it speaks of the bytes
            self.path.unlink(missing_ok=True)  # and not through what may be a link
            with open(self.path, "xb") as file:
                file.truncate(self.nbytes)
            with open(self._record, "wb") as file:
                file.write(self._head.ljust(self._record_nbytes, b"\0"))
        with open(self._record, "rb+") as file:
            self._counts = mmap.mmap(file.fileno(), self._record_nbytes)
