"""Read many small adjacent items of files: a window at a time, and each file opened once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from shardkit.payloads.payload import Extent, Payload, fill, unreadable

SMALL = 32 << 10  # bytes up to which a window is worth its copy
_WINDOW = 256 << 10
_OPEN = 4  # files at a time


class SmallReads(threading.local):
    """What each thread reads through; its files are closed when it, or the thread, is gone."""

    def __init__(self) -> None:
        self._windows: dict[Path, _Window] = {}

    def read(self, extent: Extent) -> memoryview:
        """The bytes of *extent*; valid until the next read.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
        """
        window = self._windows.get(extent.path)
        if window is None:
            if len(self._windows) == _OPEN:
                self._windows.pop(next(iter(self._windows)))
            window = self._windows[extent.path] = _Window(extent.path)
        return window.read(extent)


def chunks_of(payload: Payload, reads: SmallReads) -> Iterable[memoryview]:
    """The bytes of *payload*, by *reads* where it is small.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    if type(payload) is Extent and payload.nbytes <= SMALL:
        return (reads.read(payload),)
    return payload.chunks()


class _Window:
    """Some bytes of a file that is open as long as this lives."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = FileIO(path)
        except OSError as error:
            raise unreadable(path, error) from None
        self._memory = memoryview(bytearray(_WINDOW))
        self._start = self._stop = 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, extent: Extent) -> memoryview:
        if not self._start <= extent.start <= extent.start + extent.nbytes <= self._stop:
            self._move(extent)
        at = extent.start - self._start
        return self._memory[at : at + extent.nbytes]

    def _move(self, extent: Extent) -> None:
        try:
            self._file.seek(extent.start)
            got = self._file.readinto(self._memory) or 0
            if got < extent.nbytes:
                fill(self._memory[got : extent.nbytes], self._file.readinto, extent)
                got = extent.nbytes
        except OSError as error:
            raise unreadable(extent.path, error) from None
        self._start, self._stop = extent.start, extent.start + got
