"""Byte strings whose length is known before they are read: a weight is an address, and here are the
kinds of address.

1. Only `chunks` touches weight bytes. It may be called again, and gives the same bytes as long as
   the file stays as it is.
2. A chunk is at most `CHUNK` bytes; all but the last are a multiple of `PAGE`, so that no element
   of any type is cut. A chunk is valid until the next one is asked for: its memory is used again.
3. Payloads are frozen, hashable and picklable. Equal payloads are the same bytes, and that is how
   ties are found.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol, runtime_checkable
from uuid import uuid4

from shardkit.errors import FormatError, Malformed
from shardkit.hints import after_reading

CHUNK = 8 << 20
PAGE = 4096


@runtime_checkable
class Payload(Protocol):
    """A byte string that knows its length, and from which bytes of which files it is made."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        ...

    @property
    def sources(self) -> tuple[Extent, ...]:
        """The runs of files that are read to make it."""
        ...

    def narrow(self, start: int, nbytes: int) -> Payload:
        """The *nbytes* bytes from *start* on.

        Raises:
            ValueError: they lie outside, or an element of a derived payload would be cut.
        """
        ...

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order, by the rules at the top of this module.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
        """
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file. Equal extents are the same bytes."""

    path: Path
    start: int
    nbytes: int

    @property
    def sources(self) -> tuple[Extent, ...]:
        return (self,)

    def narrow(self, start: int, nbytes: int) -> Extent:
        check_range(start, nbytes, self.nbytes)
        return Extent(self.path, self.start + start, nbytes)

    def chunks(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK, self.nbytes)))
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                left = self.nbytes
                while left:
                    chunk = buffer[: min(CHUNK, left)]
                    fill(chunk, file.readinto, self)
                    yield chunk
                    left -= len(chunk)
        except OSError as error:
            raise unreadable(self.path, error) from None


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are held: a header, an index, padding."""

    content: bytes

    @property
    def nbytes(self) -> int:
        return len(self.content)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Literal:
        check_range(start, nbytes, self.nbytes)
        return Literal(self.content[start : start + nbytes])

    def chunks(self) -> Iterator[memoryview]:
        whole = memoryview(self.content)
        return (whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK))


@dataclass(frozen=True, slots=True)
class Buffer:
    """Weights that are in memory already; chunks are views of it, and nothing is copied but to
    pickle.

    Equal are the same runs of one memory: which memory it is, is told by a name that it is given
    when it is first held. Where tensors share memory, hold it once and narrow.

    Attributes:
        memory: C-contiguous, and not written while it is held.
        origin: the name.
        start: where in that memory the run begins.
    """

    memory: bytes | bytearray | memoryview = field(compare=False, repr=False)
    origin: str = field(default_factory=lambda: uuid4().hex)
    start: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        memory = memoryview(self.memory)
        object.__setattr__(self, "memory", memory.cast("B") if memory.nbytes else memoryview(b""))
        object.__setattr__(self, "nbytes", memory.nbytes)

    def __reduce__(self) -> tuple[type[Buffer], tuple[bytes, str, int]]:
        return Buffer, (bytes(self.memory), self.origin, self.start)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Buffer:
        check_range(start, nbytes, self.nbytes)
        return Buffer(self.memory[start : start + nbytes], self.origin, self.start + start)

    def chunks(self) -> Iterator[memoryview]:
        whole = memoryview(self.memory)
        return (whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK))


@dataclass(frozen=True)
class Concat:
    """Payloads one after the other."""

    parts: tuple[Payload, ...]

    @property
    def nbytes(self) -> int:
        return self._stops[-1] if self._stops else 0

    @property
    def sources(self) -> tuple[Extent, ...]:
        return tuple(source for part in self.parts for source in part.sources)

    def narrow(self, start: int, nbytes: int) -> Payload:
        check_range(start, nbytes, self.nbytes)
        inside = tuple(self._overlapping(start, start + nbytes))
        return inside[0] if len(inside) == 1 else Concat(inside)

    def chunks(self) -> Iterator[memoryview]:
        return rechunked((chunk for part in self.parts for chunk in part.chunks()), self.nbytes)

    @cached_property
    def _stops(self) -> list[int]:
        return list(accumulate(part.nbytes for part in self.parts))

    def _overlapping(self, start: int, stop: int) -> Iterator[Payload]:
        for position in range(bisect_right(self._stops, start), len(self.parts)):
            part, end = self.parts[position], self._stops[position]
            begin = end - part.nbytes
            low, high = max(start, begin), min(stop, end)
            if begin >= stop:
                return
            if low < high:
                yield part.narrow(low - begin, high - low)


@dataclass(frozen=True, slots=True)
class Swapped:
    """The inner bytes with every word of *width* bytes (2, 4 or 8) reversed: big-endian weights
    made little-endian.
    """

    inner: Payload
    width: int

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def sources(self) -> tuple[Extent, ...]:
        return self.inner.sources

    def narrow(self, start: int, nbytes: int) -> Swapped:
        if start % self.width or nbytes % self.width:
            raise ValueError(f"[{start}, {start + nbytes}) cuts a word of {self.width} bytes")
        return Swapped(self.inner.narrow(start, nbytes), self.width)

    def chunks(self) -> Iterator[memoryview]:
        for chunk in self.inner.chunks():
            words = array({2: "H", 4: "I", 8: "Q"}[self.width], bytes(chunk))
            words.byteswap()
            yield memoryview(words).cast("B")


@dataclass(frozen=True, slots=True)
class Trailer:
    """A part of an output file that is computed while the file is written: zip directories, seek
    tables.

    Attributes:
        nbytes: length of what *make* returns.
        make: takes the CRC-32 of each part that stands before this one in the file, in order.
    """

    nbytes: int
    make: Callable[[Sequence[int]], bytes] = field(repr=False)


Part = Payload | Trailer


def read_all(payload: Payload) -> bytearray:
    """The whole of *payload* in memory."""
    content = bytearray()
    for chunk in payload.chunks():
        content += chunk
    return content


def rechunked(pieces: Iterable[memoryview | bytes], nbytes: int) -> Iterator[memoryview]:
    """*pieces* of any length, *nbytes* together, as chunks of `CHUNK` bytes and a rest; a piece
    that is one is not copied.
    """
    buffer = memoryview(b"")
    filled = 0
    left = nbytes
    for piece in pieces:
        rest = memoryview(piece)
        while rest and left:
            size = min(CHUNK, left)
            if not filled and len(rest) == size:
                yield rest
                left -= size
                break
            buffer = buffer or memoryview(bytearray(size))
            taken = rest[: size - filled]
            buffer[filled : filled + len(taken)] = taken
            filled += len(taken)
            rest = rest[len(taken) :]
            if filled == size:
                yield buffer[:size]
                left -= size
                filled = 0


def fill(buffer: memoryview, readinto: Callable[[memoryview], int | None], extent: Extent) -> None:
    """Fill *buffer* from *readinto*, which may give less than it was asked for.

    Raises:
        Malformed: the file of *extent* ended first.
    """
    filled = 0
    while filled < len(buffer):
        count = readinto(buffer[filled:])
        if not count:
            raise ended_early(extent)
        filled += count


_SHRANK = (
    "it became shorter while it was read: run the command again when nothing writes to it, "
    "or fetch it again"
)


def ended_early(extent: Extent) -> Malformed:
    """The file of *extent* ends inside it, though it did not when it was scanned."""
    stop = extent.start + extent.nbytes
    return Malformed(extent.path, f"the file ends before byte {stop:,}", hint=_SHRANK)


def unreadable(path: Path, error: OSError) -> FormatError:
    """What the operating system said of *path*, as a sentence."""
    return FormatError(
        path, f"cannot be read: {error.strerror or error}", hint=after_reading(error)
    )


def check_range(start: int, nbytes: int, whole: int) -> None:
    """Raise ValueError unless [start, start + nbytes) lies inside *whole* bytes."""
    if start < 0 or nbytes < 0 or start + nbytes > whole:
        raise ValueError(f"[{start}, {start + nbytes}) lies outside {whole} bytes")
