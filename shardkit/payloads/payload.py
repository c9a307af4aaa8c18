"""Byte strings whose length is known before they are read: where weights are stored, and how they
become bytes.

1. Only `chunks` reads weight bytes. It may be called again, and gives the same bytes as long as the
   file stays as it is.
2. A chunk is at most `CHUNK` bytes; all but the last are a multiple of `PAGE`, so that no element
   of any type is cut. A chunk is valid until the next one is requested: its memory is reused.
3. Payloads are frozen, hashable and picklable. Equal payloads are the same bytes; ties are found by
   that.
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
    r"""A lazy byte string: its length and the file ranges it is made from are known before it is
    read.

    Plugins may define their own; `shardkit.testing.check_payload` checks one.

    Example:
        >>> import shardkit
        >>> payload = shardkit.open("model.safetensors")["0.bias"].payload
        >>> payload.nbytes, len(payload.sources)
        (32, 1)
        >>> first = payload.narrow(0, 8)  # nothing is read yet
        >>> b"".join(bytes(chunk) for chunk in first.chunks())
        b'\x00\x00\x00\x00\x00\x00\x00>'
    """

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        ...

    @property
    def sources(self) -> tuple[Extent, ...]:
        """The runs of files that are read to make it."""
        ...

    def narrow(self, start: int, nbytes: int) -> Payload:
        """Return the part of *nbytes* bytes that begins at offset *start*; nothing is read.

        Raises:
            ValueError: the range lies outside, or would cut an element of a derived payload.
        """
        ...

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in order, by the rules at the top of this module.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
        """
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file. Equal extents are the same bytes.

    Attributes:
        path: the file.
        start: offset of the first byte.
        nbytes: length in bytes.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.plugin import Extent
        >>> header = Extent(Path("model.safetensors"), 8, 256)
        >>> header.narrow(0, 12)
        Extent(path=PosixPath('model.safetensors'), start=8, nbytes=12)
        >>> [bytes(chunk) for chunk in header.narrow(0, 12).chunks()]
        [b'{"0.weight":']
    """

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
    r"""Bytes in memory: a header, an index, padding.

    Attributes:
        content: the bytes.

    Example:
        >>> from shardkit.plugin import Literal
        >>> magic = Literal(b"\x93NUMPY\x01\x00")
        >>> magic.nbytes, magic.sources, magic.narrow(1, 5)
        (8, (), Literal(content=b'NUMPY'))
    """

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
    """Weights that are already in memory; chunks are views, and only pickling copies them.

    Two buffers are equal if they are the same run of the same memory, which a unique name
    identifies. Where tensors share memory, create one buffer and narrow it.

    Attributes:
        memory: C-contiguous, and not written while the buffer exists.
        origin: the unique name of the memory.
        start: offset of the run in that memory.
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
    """Several payloads, one after the other.

    Attributes:
        parts: the payloads, in order.

    Example:
        A tensor whose rows are stored in two files:

        >>> from pathlib import Path
        >>> from shardkit.plugin import Concat, Extent, Literal, read_all
        >>> rows = Concat((Extent(Path("model.safetensors"), 8, 4), Literal(b"....")))
        >>> bytes(read_all(rows)), rows.narrow(4, 2)
        (b'{"0.....', Literal(content=b'..'))
    """

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
    r"""Bytes with every word of *width* bytes reversed: big-endian weights made little-endian.

    Attributes:
        inner: the bytes as they are stored.
        width: bytes of a word: 2, 4 or 8.

    Example:
        >>> from shardkit.plugin import Literal, Swapped, read_all
        >>> big_endian = Literal((1).to_bytes(4, "big") + (2).to_bytes(4, "big"))
        >>> words = Swapped(big_endian, width=4)
        >>> bytes(read_all(words))
        b'\x01\x00\x00\x00\x02\x00\x00\x00'
        >>> int.from_bytes(read_all(words.narrow(4, 4)), "little")
        2
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
        make: called with the CRC-32 of each part before this one in the file, in order.

    Example:
        >>> import zlib
        >>> from shardkit.plugin import Literal, Trailer
        >>> checksum = Trailer(4, lambda crcs: crcs[-1].to_bytes(4, "little"))
        >>> parts = (Literal(b"weights"), checksum)
        >>> checksum.make([zlib.crc32(b"weights")]).hex()
        '5873d21a'
    """

    nbytes: int
    make: Callable[[Sequence[int]], bytes] = field(repr=False)


Part = Payload | Trailer


def read_all(payload: Payload) -> bytearray:
    """Read all of *payload* into memory.

    Args:
        payload: a header or a small tensor; use `Payload.chunks` for large ones.

    Raises:
        FormatError: the file cannot be read.

    Example:
        >>> import shardkit
        >>> from shardkit.plugin import read_all
        >>> content = read_all(shardkit.open("model.safetensors")["0.bias"].payload)
        >>> len(content)
        32
    """
    content = bytearray()
    for chunk in payload.chunks():
        content += chunk
    return content


def rechunked(pieces: Iterable[memoryview | bytes], nbytes: int) -> Iterator[memoryview]:
    """Join *pieces* of any length into chunks of `CHUNK` bytes and a rest.

    For payloads that compute their bytes: it makes their pieces fit the rules of `Payload.chunks`.
    A piece that is a chunk already is not copied.

    Args:
        pieces: byte strings, *nbytes* in total.
        nbytes: their total length.

    Yields:
        Chunks that are valid until the next one is requested.

    Example:
        >>> from shardkit.plugin import rechunked
        >>> [len(chunk) for chunk in rechunked([b"abc", b"defgh"], 8)]
        [8]
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
    """Fill *buffer* from *readinto*, which may return fewer bytes than requested.

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
    "or download it again"
)


def ended_early(extent: Extent) -> Malformed:
    """Report that the file of *extent* ends inside it, though it did not when scanned."""
    stop = extent.start + extent.nbytes
    return Malformed(extent.path, f"the file ends before byte {stop:,}", hint=_SHRANK)


def unreadable(path: Path, error: OSError) -> FormatError:
    """Report the error that the operating system raised for *path*."""
    return FormatError(
        path, f"cannot be read: {error.strerror or error}", hint=after_reading(error)
    )


def check_range(start: int, nbytes: int, whole: int) -> None:
    """Raise ValueError unless [start, start + nbytes) is inside *whole* bytes."""
    if start < 0 or nbytes < 0 or start + nbytes > whole:
        raise ValueError(f"[{start}, {start + nbytes}) lies outside {whole} bytes")
