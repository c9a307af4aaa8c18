"""Files that are read again and again: opened once, and read past the page cache where that is the
shorter way.

1. A direct read (O_DIRECT) spares the copy out of the page cache, and leaves the cache to others.
   It wants its place in the file and in memory to be multiples of `SECTOR`; a file system that has
   none says so at the first read, and is not asked again.
2. What the page cache has already is copied from there, which is faster than any disk. It is asked
   of one page for each read.
3. What was not cached before is not cached afterwards, whichever way it was read; but for views,
   which may need it again soon.
4. Any thread may read. Nothing is closed before the last read is over, and nothing needs to be
   closed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from shardkit.alignment import round_down
from shardkit.payloads.payload import Extent, ended_early, unreadable

SECTOR = 4096
_SMALL = 64 << 10  # bytes, up to which it is not worth to ask about the page cache
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class Files:
    """The files of a stream, each opened when it is first read."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._lock = threading.Lock()
        self._opened: dict[Path, OpenFile] = {}

    def at(self, path: Path) -> OpenFile:
        """The file at *path*.

        Raises:
            FormatError: it cannot be opened.
        """
        with self._lock:
            if path not in self._opened:
                self._opened[path] = OpenFile(path)
            return self._opened[path]

    def read(self, path: Path, memory: memoryview, start: int) -> None:
        """Fill *memory* with the bytes of the file at *path* from *start* on, which may be asked
        for again soon.

        Raises:
            FormatError: it cannot be read, or has become shorter.
        """
        self.at(path).read_cached(memory, start)

    def read_once(self, path: Path, memory: memoryview, start: int) -> None:
        """The same, of what is not asked for again in this forward.

        Raises:
            FormatError: likewise.
        """
        self.at(path).read(memory, start)

    def close(self) -> None:
        """Close what nobody is reading, and the others when they are read."""
        self._opened.clear()


class OpenFile:
    """One file."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            FormatError: it cannot be opened.
        """
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise unreadable(path, error) from None
        self._direct = _opened_directly(path)
        self._cached = _Residency(self._file)
        descriptors = [each for each in (self._file, self._direct) if each is not None]
        weakref.finalize(self, _close, descriptors).atexit = False

    def read(self, memory: memoryview, start: int) -> None:
        """Fill *memory* with the bytes from *start* on.

        Raises:
            FormatError: it cannot be read, or has become shorter.
        """
        cold = len(memory) > _SMALL and not self._cached.at(start + len(memory) // 2)
        self._fill(self._file, memory, start, len(memory))
        if cold:
            self._evict(start, len(memory))

    def read_cached(self, memory: memoryview, start: int) -> None:
        """The same, and what comes into the page cache stays there.

        Raises:
            FormatError: likewise.
        """
        self._fill(self._file, memory, start, len(memory))

    def read_sectors(self, memory: memoryview, start: int, needed: int) -> None:
        """Fill *memory* with the bytes from *start* on, both multiples of `SECTOR`; only the first
        *needed* must be there.

        Raises:
            FormatError: it cannot be read, or has become shorter.
        """
        if self._direct is None or self._cached.at(start + needed // 2):
            self.read(memory[:needed], start)
        elif not self._read_directly(self._direct, memory, start, needed):
            self._direct = None
            self.read(memory[:needed], start)

    def expect(self, start: int, nbytes: int) -> None:
        """Let the system begin to read what will be read soon, if it will go through the page
        cache.
        """
        if self._direct is None and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file, start, nbytes, os.POSIX_FADV_WILLNEED)

    def _read_directly(self, file: int, memory: memoryview, start: int, needed: int) -> bool:
        """Whether it could be read so."""
        try:
            self._fill(file, memory, start, needed)
        except _Refused:
            return False
        return True

    def _fill(self, file: int, memory: memoryview, start: int, needed: int) -> None:
        filled = 0
        while filled < needed:
            count = self._some(file, memory[filled:], start + filled)
            if not count:
                raise ended_early(Extent(self.path, start, needed))
            filled += count

    def _some(self, file: int, memory: memoryview, start: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(file, [memory], start)
            with _SEEKING:  # Windows, which has no read at a place
                os.lseek(file, start, os.SEEK_SET)
                content = os.read(file, len(memory))
            memory[: len(content)] = content
            return len(content)
        except OSError as error:
            if file == self._direct and error.errno in _REFUSALS:
                raise _Refused from None
            raise unreadable(self.path, error) from None

    def _evict(self, start: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file, start, nbytes, os.POSIX_FADV_DONTNEED)


_SEEKING = threading.Lock()


class _Refused(Exception):
    """The file system has no direct reads."""


class _Residency:
    """What of an open file the page cache has."""

    def __init__(self, file: int) -> None:
        """Map the file, of which no page is ever touched."""
        self._address = 0
        self._nbytes = os.fstat(file).st_size
        if self._nbytes and _may_ask(file):
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            with suppress(OSError):  # no room for so many addresses: then nothing counts as cached
                self._mapping = mmap.mmap(
                    file, self._nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
                self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def at(self, place: int) -> bool:
        """Whether the byte at *place* is there; False where the system does not tell."""
        if not self._address or place >= self._nbytes:
            return False
        told = ctypes.c_ubyte()
        page = self._address + round_down(place, mmap.PAGESIZE)
        return _mincore()(
            ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(told)
        ) == 0 and bool(told.value & 1)


def _may_ask(file: int) -> bool:
    """Whether the system tells the truth: to those who may not write a file, Linux says that all of
    it is there.
    """
    return sys.platform == "linux" and os.geteuid() in (0, os.fstat(file).st_uid)


@cache
def _mincore() -> ctypes._NamedFuncPointer:
    return ctypes.PyDLL(
        None
    ).mincore  # which keeps the GIL: to take it back takes ten times as long as the call


def _opened_directly(path: Path) -> int | None:
    """None where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None


def _close(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        os.close(each)
