"""What streams: the buffers of blocks, how they are filled and what is in them, and the order in
which a thread needs them. No thread is here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from shardkit.load.memory.allocate import memory_of
from shardkit.load.memory.cast_reads import cast_into
from shardkit.load.memory.direct_io import Files
from shardkit.load.memory.parallel_reads import copy, read_into
from shardkit.load.memory.pinned_payload import PinnedPayload
from shardkit.load.streaming.page_layout import READ, DerivedRead, Layout, Read, evened, grounds
from shardkit.load.streaming.pinned_blocks import memory_of_page
from shardkit.load.streaming.reader_pool import Job, PendingRead
from shardkit.load.streaming.ring_buffer import Slot
from shardkit.payloads.cast import Cast
from shardkit.payloads.open_files import opened
from shardkit.payloads.payload import Buffer, Extent, Payload


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a block.

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
class BlockBuffer:
    """What one block streams, and where it is now.

    Attributes:
        pieces: its tensors.
        layout: how they lie in memory, and how they come there.
        pinned: the pinned host copy that it is sent from; None if it must be read.
        slot: where it is, or will be once it is read.
        read: the read that fills it; None while it is absent.
        borrowers: who needs it: one for each forward of the block that runs. Any thread enters and
            leaves here by itself.
        stale: whether its block wrote to it, so that it must be read again.
    """

    pieces: tuple[Piece, ...]
    layout: Layout
    pinned: torch.Tensor | None = None
    slot: Slot | None = None
    read: PendingRead | None = None
    borrowers: set[Hashable] = field(default_factory=set)
    stale: bool = False

    @classmethod
    def of_each(
        cls, blocks: Sequence[Sequence[Piece]], *, apart: bool = False
    ) -> list[BlockBuffer]:
        """Those of the *blocks* of one prefetch buffer, all absent; *apart* is whether that is in
        other than main memory.
        """
        payloads = [[piece.payload for piece in pieces] for pieces in blocks]
        layouts = evened([Layout.of(each) for each in payloads])
        pinned = [
            memory_of_page(each, layout) if apart else None
            for each, layout in zip(payloads, layouts, strict=True)
        ]
        return [
            cls(tuple(pieces), layout, there)
            for pieces, layout, there in zip(blocks, layouts, pinned, strict=True)
        ]

    def absent(self) -> BlockBuffer:
        """The same, as it is before it is read."""
        return BlockBuffer(self.pieces, self.layout, self.pinned)

    @property
    def nbytes(self) -> int:
        """The memory that it needs."""
        return self.layout.nbytes

    @property
    def is_ready(self) -> bool:
        """Whether a forward can use it now."""
        return self.read is not None and self.read.succeeded and not self.stale

    @property
    def disk(self) -> int:
        """Bytes of files that are read for it."""
        return sum(source.nbytes for piece in self.pieces for source in piece.payload.sources)

    @property
    def memory(self) -> int:
        """Bytes of it that are in main memory already."""
        return sum(piece.payload.nbytes for piece in self.pieces if not piece.payload.sources)

    def jobs(self, files: Files, host: torch.Tensor) -> Iterator[Job]:
        """What reads all of it into *host*, but for `settle`."""
        if self.pinned is not None:
            return
        memory = memory_of(host)
        if self.layout.reads:
            yield partial(_expect, files, self.layout.reads)
        for read in self.layout.reads:
            yield partial(_read, files, read, memory[read.at : read.at + read.nbytes])
        for makings in _grouped(self.layout.makings):
            yield partial(_make_all, files, makings, memory)

    def settle(self, host: torch.Tensor) -> None:
        """Move what was read to where it begins as it should."""
        start = host.data_ptr()
        for move in self.layout.moves:
            ctypes.memmove(start + move.target, start + move.source, move.nbytes)

    def tensors(self, memory: torch.Tensor) -> Iterator[torch.Tensor]:
        """Its tensors, in *memory*, each with a version of its own."""
        storage, start = memory.untyped_storage(), int(memory.storage_offset())
        for piece, at in zip(self.pieces, self.layout.places, strict=True):
            empty = torch.empty(0, dtype=piece.dtype, device=memory.device)
            tensor = empty.set_(
                storage, (start + at) // piece.dtype.itemsize, piece.shape, piece.strides
            )
            yield tensor if piece.is_buffer else torch.nn.Parameter(tensor, requires_grad=False)


def _expect(files: Files, reads: Iterable[Read]) -> None:
    for read in reads:
        files.at(read.path).expect(read.start, read.needed)


def _read(files: Files, read: Read, memory: memoryview) -> None:
    files.at(read.path).read_sectors(memory, read.start, read.needed)


def _grouped(makings: Iterable[DerivedRead]) -> Iterator[list[DerivedRead]]:
    """*makings* in groups that are worth a job."""
    group: list[DerivedRead] = []
    room = READ
    for making in makings:
        if group and making.payload.nbytes > room:
            yield group
            group, room = [], READ
        group.append(making)
        room -= making.payload.nbytes
    if group:
        yield group


def _make_all(files: Files, makings: Iterable[DerivedRead], memory: memoryview) -> None:
    for making in makings:
        _make(files, making.payload, memory[making.at : making.at + making.payload.nbytes])


def _make(files: Files, payload: Payload, memory: memoryview) -> None:
    """Fill *memory* with *payload*, out of files that are open."""
    if isinstance(payload, Extent):
        files.at(payload.path).read(memory, payload.start)
    elif isinstance(payload, Buffer | PinnedPayload):
        copy(memoryview(payload.memory), memory)
    elif (
        isinstance(payload, Cast)
        and isinstance(payload.inner, Extent)
        and not payload.inner.start % payload.source.itemsize
    ):
        cast_into(payload, memory, files)
    else:
        read = files.read_once if isinstance(grounds(payload), Extent) else files.read
        read_into(opened(payload, read), memory)


class Habit:
    """Which block one thread needed after which, and what it is expected to need."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._next: dict[int, int] = {}
        self._last: int | None = None
        self.expected: set[int] = set()

    def onward(self, number: int) -> Iterator[int]:
        """The blocks that are expected after *number*, which is needed now, until they would
        repeat.
        """
        if self._last is not None and self._last != number:
            self._next[self._last] = number
        self._last = number
        seen = {number}
        while (number := self._next.get(number, (number + 1) % self._count)) not in seen:
            seen.add(number)
            yield number
