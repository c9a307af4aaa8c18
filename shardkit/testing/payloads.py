"""Checks of payloads: the rules of `shardkit.payloads.payload`, and contents that record what is
read.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shardkit.payloads.payload import (
    CHUNK,
    PAGE,
    Concat,
    Extent,
    Literal,
    Payload,
    check_range,
    read_all,
)

_ZEROS = bytes(1 << 20)


def expect(condition: bool, sentence: str) -> None:
    """Raise AssertionError with *sentence* unless *condition* holds; unlike `assert`, also under
    ``python -O``.
    """
    if not condition:
        raise AssertionError(sentence)


def check_payload(payload: Payload, *, itemsize: int = 1) -> None:
    """Check that *payload* follows the rules: chunks, repetition, narrowing, equality, pickling,
    sources.

    Args:
        payload: what to check; it is read completely, several times.
        itemsize: bytes of one element; narrowing may cut between elements only.

    Raises:
        AssertionError: a rule is violated; the message names it.

    Example:
        >>> from shardkit.plugin import Literal, Swapped
        >>> from shardkit.testing import check_payload
        >>> check_payload(Swapped(Literal(bytes(range(16))), width=4), itemsize=4)
    """
    content = _read_by_the_rules(payload)
    expect(
        bytes(read_all(payload)) == content, "chunks() gave other bytes when it was called again"
    )
    _check_narrow(payload, content, itemsize)
    _check_value(payload, content)
    for source in payload.sources:
        expect(type(source) is Extent, f"sources must be Extents, found a {type(source).__name__}")


@dataclass(frozen=True, slots=True)
class Watched:
    """The bytes of a file, which record which of them are read.

    Attributes:
        path: the file that they stand for.
        inner: the bytes.
        start: offset in the file.
        log: runs of the file that were read, as (start, stop); shared by all narrowed payloads.

    Example:
        Which bytes does a scan read?

        >>> from pathlib import Path
        >>> from shardkit.plugin import Limits, Literal, Source
        >>> from shardkit.testing import Watched
        >>> path = Path("model.safetensors")
        >>> content = Watched(path, Literal(path.read_bytes()))
        >>> checkpoint = FORMAT.scan(Source(path, content, limits=Limits()))
        >>> content.log[0][0], len(content.log) > 0
        (0, True)
    """

    path: Path
    inner: Payload
    start: int = 0
    log: list[tuple[int, int]] = field(default_factory=list, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def sources(self) -> tuple[Extent, ...]:
        return (Extent(self.path, self.start, self.nbytes),)

    def narrow(self, start: int, nbytes: int) -> Watched:
        return Watched(self.path, self.inner.narrow(start, nbytes), self.start + start, self.log)

    def chunks(self) -> Iterator[memoryview]:
        at = self.start
        for chunk in self.inner.chunks():
            self.log.append((at, at + len(chunk)))
            yield chunk
            at += len(chunk)


@dataclass(frozen=True, slots=True)
class Zeros:
    """Any number of zero bytes, in constant memory."""

    nbytes: int

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Zeros:
        check_range(start, nbytes, self.nbytes)
        return Zeros(nbytes)

    def chunks(self) -> Iterator[memoryview]:
        whole = memoryview(_ZEROS)
        return (
            whole[: min(len(whole), self.nbytes - at)] for at in range(0, self.nbytes, len(whole))
        )


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A payload that must not be read: deciding where bytes go needs no values."""

    nbytes: int

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Unreadable:
        return Unreadable(nbytes)

    def chunks(self) -> Iterator[memoryview]:
        raise AssertionError("weights were read where only their byte ranges are needed")


def grown(content: bytes, nbytes: int) -> Payload:
    """Insert *nbytes* zero bytes into the middle of *content*."""
    middle = len(content) // 2
    return Concat((Literal(content[:middle]), Zeros(nbytes), Literal(content[middle:])))


def overlap(
    runs: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the first piece of *runs* that lies in one of *others* too."""
    within = list(others)
    for start, stop in runs:
        for low, high in within:
            if max(start, low) < min(stop, high):
                return max(start, low), min(stop, high)
    return None


def outside(
    runs: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the first of *runs* with a byte that lies in none of *others*."""
    within = sorted(others)
    for start, stop in runs:
        at = start
        for low, high in within:
            if low <= at:
                at = max(at, high)
        if at < stop:
            return at, stop
    return None


def _read_by_the_rules(payload: Payload) -> bytes:
    content = bytearray()
    short = False
    for chunk in payload.chunks():
        expect(not short, f"a chunk that is not the last must be a multiple of {PAGE} bytes")
        expect(
            0 < len(chunk) <= CHUNK,
            f"a chunk has {len(chunk):,} bytes; it must have at least one, and at most {CHUNK:,}",
        )
        short = len(chunk) % PAGE != 0
        content += chunk
    expect(
        len(content) == payload.nbytes,
        f"nbytes says {payload.nbytes:,}, and the chunks hold {len(content):,}",
    )
    return bytes(content)


def _check_narrow(payload: Payload, content: bytes, itemsize: int) -> None:
    for start, stop in _cuts(payload.nbytes, itemsize):
        narrow = payload.narrow(start, stop - start)
        expect(
            narrow.nbytes == stop - start,
            f"narrow({start}, {stop - start}) says it has {narrow.nbytes:,} bytes",
        )
        same = bytes(read_all(narrow)) == content[start:stop]
        expect(same, f"narrow({start}, {stop - start}) has other bytes than the whole has there")
    for start, nbytes in (
        (0, payload.nbytes + itemsize),
        (-itemsize, itemsize),
        (payload.nbytes, itemsize),
    ):
        expect(
            _refuses(payload, start, nbytes),
            f"narrow({start}, {nbytes}) of {payload.nbytes} bytes must raise ValueError",
        )


def _cuts(nbytes: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges that cut between elements: the ends, around the edges of chunks, and some at
    random.
    """
    count = nbytes // itemsize
    dice = random.Random(nbytes)  # the same cuts each time
    yield 0, nbytes
    yield 0, 0
    yield nbytes, nbytes
    for _ in range(6):
        low, high = sorted((dice.randint(0, count), dice.randint(0, count)))
        yield low * itemsize, high * itemsize
    if nbytes > CHUNK:
        yield CHUNK - itemsize, min(nbytes, CHUNK + itemsize)


def _check_value(payload: Payload, content: bytes) -> None:
    copy = pickle.loads(pickle.dumps(payload))  # our own bytes
    expect(copy == payload, "a payload must equal what pickle makes of it")
    expect(hash(copy) == hash(payload), "equal payloads must have equal hashes")
    expect(
        bytes(read_all(copy)) == content, "what pickle makes of a payload must have the same bytes"
    )


def _refuses(payload: Payload, start: int, nbytes: int) -> bool:
    try:
        payload.narrow(start, nbytes)
    except ValueError:
        return True
    return False
