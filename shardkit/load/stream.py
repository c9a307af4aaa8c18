"""The ring: blocks are read ahead into a bounded number of slots, and held for as long as a forward needs them.

1. A page is what one block streams. It lies in a slot of the ring or nowhere, and is held by visits: one for each forward of
   its block that runs. A page that is held, or is just being read, keeps its slot; any other may lose it to one that is needed.
2. All reads of a page are one: threads that want the same page wait for the same read.
3. Every wait happens holding nothing: for a slot, before anything is held; for a read, which needs nothing but its own slot.
   A thread that holds a page already and needs one more gets a slot beside the ring if the ring is full.
4. What a thread is likely to need next is what it needed next the last time, at first the block behind; it is read ahead as
   far as the ring goes. A prediction that fails costs a read, never a wrong byte.
5. A tensor belongs to one page and one slot, and each filling of its slot counts as a change of it, so that autograd refuses a
   backward that comes too late.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.autograd.graph import increment_version

from shardkit.load.lanes import Lane, Ticket
from shardkit.load.memory import read_into
from shardkit.payload import Payload

_READERS = 2
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


class Stream:
    """Pages on their way to one device. Copies of a model share it."""

    def __init__(
        self, pages: Sequence[Sequence[Piece]], lane: Lane, *, ring: int, verify: Callable[[], None] = lambda: None
    ) -> None:
        """Read nothing yet.

        Args:
            pages: what streams, in the order in which it is expected to be needed.
            lane: the way to the device.
            ring: how many pages, of the largest, the ring has room for; at least two.
            verify: called after each read; raises if a source is no longer what it was.
        """
        self.lane = lane
        self._pages = [_Page(tuple(pieces)) for pieces in pages]
        self._ring = max(2, ring)
        self._verify = verify
        self._begin()
        _STREAMS.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds on its device now."""
        with self.lock:
            slots = {id(slot): slot for slot in [*self._free, *(page.slot for page in self._pages)] if slot is not None}
            return sum(slot.nbytes for slot in slots.values() if slot.memory is not None)

    @property
    def room(self) -> int:
        """Bytes that the ring may take."""
        return sum(sorted((page.nbytes for page in self._pages), reverse=True)[: self._ring])

    def claim(self, number: int, visit: Hashable, *, holding: bool = False) -> tuple[torch.Tensor, ...] | None:
        """The tensors of the page *number*, which stay what they are until *visit* releases it; None if all is closed.

        Args:
            number: which page.
            visit: who needs it.
            holding: whether this thread holds another page meanwhile.

        Raises:
            ShardkitError: it cannot be read.
        """
        try:
            with self._changed:
                while not self._closed and not self._hold(number, visit, holding=holding):
                    self._changed.wait()
                if self._closed:
                    return None
                self._read_ahead(number)
                page = self._pages[number]
                reading, slot = page.reading, page.slot
            assert reading is not None
            assert slot is not None
            reading.result().precede()
            return slot.tensors[number]
        except BaseException:
            self.release(number, visit)
            raise

    def release(self, number: int, visit: Hashable) -> None:
        """End the hold of *visit* on the page, if it has one."""
        with self._changed:
            page = self._pages[number]
            if visit not in page.holders:
                return
            page.holders.discard(visit)
            if page.slot is not None and page.slot.memory is not None:
                page.slot.after.append(self.lane.issued(page.slot.memory))
            if not page.holders and (self._closed or page.failed or (page.slot and not page.slot.in_ring)):
                self._vacate(page)
            self._changed.notify_all()

    def close(self) -> None:
        """Give back memory and threads; what is held is given back when it is released."""
        with self._changed:
            self._closed = True
            for page in self._pages:
                if page.idle:
                    self._vacate(page)
            self._free.clear()
            self._changed.notify_all()
        self._readers.shutdown(wait=False)

    def __deepcopy__(self, memo: object) -> Stream:
        return self

    def _begin(self) -> None:
        """With nothing read and nothing held; in the child of a fork too, where there are no threads but this."""
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._readers = ThreadPoolExecutor(_READERS, "shardkit-stream")
        self._pages = [_Page(page.pieces) for page in self._pages]
        self._free: list[_Slot] = []
        self._taken = 0
        self._clock = 0
        self._closed = False
        self.thread = threading.local()

    def _hold(self, number: int, visit: Hashable, *, holding: bool) -> bool:
        """Hold the page, and see that it is read; False if it has no slot and there is none."""
        page = self._pages[number]
        if page.failed and not page.holders:
            self._vacate(page)
        if page.reading is None:
            slot = self._slot(page.nbytes)
            if slot is None and holding:
                slot = _Slot(page.nbytes, in_ring=False)
            if slot is None:
                return False
            self._read(number, slot)
        page.holders.add(visit)
        page.used = True
        return True

    def _read_ahead(self, number: int) -> None:
        path = self._path()
        chain = [number, *islice(path.onward(number), self._ring - 1)]
        for given_up in path.expected.difference(chain):
            self._pages[given_up].used = True
        path.expected = set(chain)
        for following in chain[1:]:
            page = self._pages[following]
            if page.reading is None:
                slot = self._slot(page.nbytes, keep=chain)
                if slot is None:
                    return
                self._read(following, slot)

    def _path(self) -> _Path:
        if not hasattr(self.thread, "path"):
            self.thread.path = _Path(len(self._pages))
        path: _Path = self.thread.path
        return path

    def _slot(self, nbytes: int, *, keep: Collection[int] = ()) -> _Slot | None:
        """A slot of at least *nbytes*, taken from a page that nobody holds if need be, but not from those to *keep*."""
        while True:
            fitting = [slot for slot in self._free if slot.nbytes >= nbytes]
            if fitting:
                slot = min(fitting, key=lambda slot: slot.nbytes)
                self._free.remove(slot)
                return slot
            if self._taken + nbytes <= self.room:
                self._taken += nbytes
                return _Slot(nbytes)
            if self._free:
                self._taken -= self._free.pop().nbytes
                continue
            page = self._victim(keep)
            if page is None:
                return None
            self._vacate(page)

    def _victim(self, keep: Collection[int]) -> _Page | None:
        """A page that may lose its slot: one that was used, the longest ago; else one that was read ahead."""
        idle = [page for number, page in enumerate(self._pages) if page.idle and number not in keep]
        if keep:  # what was read ahead is not given up for more of the same, unless nobody came for it for long
            idle = [page for page in idle if page.used or self._clock - page.asked > 4 * self._ring]
        for page in sorted(idle, key=lambda page: (not page.used, page.asked)):
            assert page.reading is not None
            if page.reading.done() or page.reading.cancel():
                return page
        return None

    def _vacate(self, page: _Page) -> None:
        if page.reading is not None:
            page.reading.cancel()
        if page.slot is not None and page.slot.in_ring:
            if self._closed:
                self._taken -= page.slot.nbytes
            else:
                self._free.append(page.slot)
        page.slot, page.reading, page.used = None, None, False

    def _read(self, number: int, slot: _Slot) -> None:
        page = self._pages[number]
        self._clock += 1
        page.slot, page.used, page.asked = slot, False, self._clock
        page.reading = self._readers.submit(self._fill, number, slot)
        page.reading.add_done_callback(self._landed)

    def _landed(self, reading: Future[Ticket]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _fill(self, number: int, slot: _Slot) -> Ticket:
        """Fill *slot* with the page; in a reader's thread, which holds nothing else."""
        page = self._pages[number]
        if slot.memory is None:
            slot.memory = self.lane.memory(slot.nbytes)
        increment_version(slot.memory)
        ticket = self.lane.fill(slot.memory[: page.nbytes], page.write, tuple(slot.after))
        slot.after.clear()
        self._verify()
        if number not in slot.tensors:
            slot.tensors[number] = tuple(page.tensors(slot.memory))
        return ticket


@dataclass(eq=False, slots=True)
class _Slot:
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
class _Page:
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
    slot: _Slot | None = None
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


class _Path:
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


_STREAMS: weakref.WeakSet[Stream] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child there are no readers, and locks may be held by threads that are not there."""
    for stream in list(_STREAMS):
        stream._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
