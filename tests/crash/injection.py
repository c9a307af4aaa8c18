"""The system calls of the writer below one folder: recorded, and one of them made to fail, or to be
the last of the process.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from unittest.mock import patch

import shardkit.system.folders
import shardkit.writing.writer

# What each call acts on: the number of the argument that is a path or a descriptor.
Watched = tuple[tuple[object, str, int], ...]
WRITES: Watched = (
    *(
        (os, name, 0)
        for name in (
            "open",
            "write",
            "pwrite",
            "fsync",
            "ftruncate",
            "mkdir",
            "rmdir",
            "unlink",
            "remove",
        )
    ),
    *(
        (os, name, 0)
        for name in (
            "rename",
            "replace",
            "scandir",
            "listdir",
            "read",
            "preadv",
            "lseek",
            "sendfile",
        )
    ),
    (os, "copy_file_range", 1),
    (builtins, "open", 0),
    (io, "open", 0),  # pathlib's
    (fcntl, "flock", 0),
    (fcntl, "ioctl", 0),
    (shardkit.writing.writer, "reserve", 0),  # fallocate
    (shardkit.system.folders, "exchange", 0),  # renameat2
)
READS: Watched = (
    *((os, name, 0) for name in ("stat", "read", "copy_file_range")),
    (os, "sendfile", 1),
    (builtins, "open", 0),
    (io, "open", 0),
)
LOADS: Watched = (
    *((os, name, 0) for name in ("open", "read", "pread", "preadv")),
    (builtins, "open", 0),
    (io, "open", 0),
)


@dataclass(frozen=True, slots=True)
class Call:
    """A system call, and what it acts on, as a path below the folder that is watched."""

    name: str
    path: str


Strike = Callable[[Call, Callable[[], object], tuple[object, ...]], None]


@dataclass
class Layer:
    """The calls that were made, and at which of them *strike* comes instead.

    Attributes:
        folder: what lies below it is watched.
        at: number of the call to strike; None for none.
        strike: raises or kills; None to record only.
        syncs: whether fsync reaches the disk. What a killed process wrote stays in the page cache
            anyway.
        watched: the calls that count.
        numbers: of the calls, in the order in which they are made.
        lasting: whether every later call is struck too, as where a sector of the disk is broken.
    """

    folder: Path
    at: int | None = None
    strike: Strike | None = None
    syncs: bool = False
    watched: Watched = WRITES
    lasting: bool = False
    calls: list[Call] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)
    struck: Call | None = None

    @contextmanager
    def installed(self) -> Iterator[Layer]:
        with ExitStack() as stack:
            for room, name, number in self.watched:
                stack.enter_context(
                    patch.object(room, name, self._watching(getattr(room, name), name, number))
                )
            yield self

    def _watching(
        self, real: Callable[..., object], name: str, number: int
    ) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            path = self._below(args[number] if len(args) > number else None, options.get("dir_fd"))
            if path is None:
                return real(*args, **options)
            made = Call(name, path)
            self.calls.append(made)
            number_of_call = next(self.numbers)  # several threads may call at once
            behind = number_of_call - self.at if self.at is not None else -1
            if self.strike is not None and (behind == 0 or (self.lasting and behind > 0)):
                self.struck = self.struck or made
                self.strike(made, lambda: real(*args, **options), args)
            if name == "fsync" and not self.syncs:
                return None
            return real(*args, **options)

        return call

    def _below(self, target: object, folder: object) -> str | None:
        place = _place(target)
        if place is not None and isinstance(folder, int):
            place = os.path.join(_place(folder) or "", place)
        if place is None or not f"{os.path.abspath(place)}/".startswith(f"{self.folder}/"):
            return None
        return os.path.relpath(place, self.folder)


def failing(number: int) -> Strike:
    """The system says errno *number* instead of doing it."""

    def strike(call: Call, real: Callable[[], object], args: tuple[object, ...]) -> None:
        raise OSError(number, os.strerror(number), call.path)

    return strike


def killing(call: Call, real: Callable[[], object], args: tuple[object, ...]) -> None:
    """The process is gone; of what it was writing, half is written."""
    match call.name, args:
        case "write", (int(file), (bytes() | memoryview()) as data):
            os.writev(file, [memoryview(data)[: len(data) // 2]])
        case "pwrite", (int(file), (bytes() | memoryview()) as data, int(at)):
            os.pwritev(file, [memoryview(data)[: len(data) // 2]], at)
    os.kill(os.getpid(), signal.SIGKILL)


FULL = failing(errno.ENOSPC)
BROKEN = failing(errno.EIO)


def _place(target: object) -> str | None:
    match target:
        case int():
            try:
                return os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return None
        case str() | Path():
            return os.fspath(target)
    return None
