"""What streams: pages, the slots that they lie in, and the order in which a thread needs them. No lock and no thread is here."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from shardkit.load.lanes import Ticket
from shardkit.load.memory import read_into
from shardkit.payload import Payload

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a page.

    Attributes:
        payload: its bytes, in the order in which they are in memory.
        dtype: its type.
        shape: its shape.
        strides: elements from one index to the next, on each axis.
        is_buffer: whether it is a buffer, and not a parameter.
    """

    payload: Payload
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_buffer: bool = False


@dataclass(eq=False, slots=True)
class Slot:
    """Memory on the device, for one page at a time.

    Attributes:
        nbytes: its length.
        in_ring: whether it counts, or stands beside the ring.
        memory: the memory, made when it is first filled.
        after: work that uses what is in it, and must be done before it is filled again.
        tensors: for each page that has been in it, the tensors of that page.
    """

    nbytes: int
    in_ring: bool = True
    memory: torch.Tensor | None = None
    after: list[Ticket] = field(default_factory=list)
    tensors: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Page:
    """What one block streams.

    Attributes:
        pieces: its tensors.
        slot: where it is, or will be once it is read.
        reading: the read; None while the page is nowhere.
        holders: the visits that need it.
        used: whether anybody has held it since it was read, or will not after all.
        asked: when it was asked for, on the clock that counts reads.
        nbytes: the memory that it needs.
    """

    pieces: tuple[Piece, ...]
    slot: Slot | None = None
    reading: Future[Ticket] | None = None
    holders: set[Hashable] = field(default_factory=set)
    used: bool = False
    asked: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(_padded(piece.payload.nbytes) for piece in self.pieces)

    @property
    def failed(self) -> bool:
        reading = self.reading
        return reading is not None and reading.done() and (reading.cancelled() or reading.exception() is not None)

    @property
    def idle(self) -> bool:
        return self.reading is not None and not self.holders

    @property
    def disk(self) -> int:
        """Bytes of files that are read for it."""
        return sum(source.nbytes for piece in self.pieces for source in piece.payload.sources)

    @property
    def memory(self) -> int:
        """Bytes of it that are in main memory already."""
        return sum(piece.payload.nbytes for piece in self.pieces if not piece.payload.sources)

    def write(self, memory: memoryview) -> None:
        """Read all of it into *memory*."""
        at = 0
        for piece in self.pieces:
            nbytes = piece.payload.nbytes
            read_into(piece.payload, memory[at : at + nbytes])
            at += _padded(nbytes)

    def tensors(self, memory: torch.Tensor) -> Iterator[torch.Tensor]:
        """Its tensors as views of *memory*."""
        at = 0
        for piece in self.pieces:
            nbytes = piece.payload.nbytes
            elements = memory[at : at + nbytes].view(piece.dtype)
            tensor = elements.as_strided(piece.shape, piece.strides)
            yield tensor if piece.is_buffer else torch.nn.Parameter(tensor, requires_grad=False)
            at += _padded(nbytes)


class Habit:
    """Which page one thread needed after which, and what it is expected to need."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._next: dict[int, int] = {}
        self._last: int | None = None
        self.expected: set[int] = set()

    def onward(self, number: int) -> Iterator[int]:
        """The pages that are expected after *number*, which is needed now, until they would repeat."""
        if self._last is not None and self._last != number:
            self._next[self._last] = number
        self._last = number
        seen = {number}
        while (number := self._next.get(number, (number + 1) % self._count)) not in seen:
            seen.add(number)
            yield number


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
