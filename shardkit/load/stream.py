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
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch.autograd.graph import increment_version

from shardkit.load.counts import Counts, Tally
from shardkit.load.lanes import Lane, Ticket
from shardkit.load.pages import Habit, Page, Piece, Slot

_READERS = 2


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
        self._pages = [Page(tuple(pieces)) for pieces in pages]
        self._ring = max(2, ring)
        self._verify = verify
        self._tally = Tally()
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

    @property
    def counts(self) -> Counts:
        """What it has done since it was made, by all models and threads that share it."""
        return self._tally.counts

    def claim(self, number: int, visit: Hashable, *, holding: bool = False) -> tuple[torch.Tensor, ...] | None:
        """The tensors of the page *number*, which stay what they are until *visit* releases it; None if all is closed.

        Args:
            number: which page.
            visit: who needs it.
            holding: whether this thread holds another page meanwhile.

        Raises:
            ShardkitError: it cannot be read.
        """
        begun = time.perf_counter()
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
            hit = reading.done()
            reading.result().precede()
            self._tally.claimed(waited=time.perf_counter() - begun, hit=hit)
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
        self._pages = [Page(page.pieces) for page in self._pages]
        self._free: list[Slot] = []
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
                slot = Slot(page.nbytes, in_ring=False)
            if slot is None:
                return False
            self._read(number, slot)
        page.holders.add(visit)
        page.used = True
        return True

    def _read_ahead(self, number: int) -> None:
        habit = self._habit()
        chain = [number, *islice(habit.onward(number), self._ring - 1)]
        for given_up in habit.expected.difference(chain):
            self._pages[given_up].used = True
        habit.expected = set(chain)
        for following in chain[1:]:
            page = self._pages[following]
            if page.reading is None:
                slot = self._slot(page.nbytes, keep=chain)
                if slot is None:
                    return
                self._read(following, slot)

    def _habit(self) -> Habit:
        if not hasattr(self.thread, "habit"):
            self.thread.habit = Habit(len(self._pages))
        habit: Habit = self.thread.habit
        return habit

    def _slot(self, nbytes: int, *, keep: Collection[int] = ()) -> Slot | None:
        """A slot of at least *nbytes*, taken from a page that nobody holds if need be, but not from those to *keep*."""
        while True:
            fitting = [slot for slot in self._free if slot.nbytes >= nbytes]
            if fitting:
                slot = min(fitting, key=lambda slot: slot.nbytes)
                self._free.remove(slot)
                return slot
            if self._taken + nbytes <= self.room:
                self._taken += nbytes
                return Slot(nbytes)
            if self._free:
                self._taken -= self._free.pop().nbytes
                continue
            page = self._victim(keep)
            if page is None:
                return None
            self._vacate(page)

    def _victim(self, keep: Collection[int]) -> Page | None:
        """A page that may lose its slot: one that was used, the longest ago; else one that was read ahead."""
        idle = [page for number, page in enumerate(self._pages) if page.idle and number not in keep]
        if keep:  # what was read ahead is not given up for more of the same, unless nobody came for it for long
            idle = [page for page in idle if page.used or self._clock - page.asked > 4 * self._ring]
        for page in sorted(idle, key=lambda page: (not page.used, page.asked)):
            assert page.reading is not None
            if page.reading.done() or page.reading.cancel():
                return page
        return None

    def _vacate(self, page: Page) -> None:
        if page.reading is not None:
            page.reading.cancel()
        if page.slot is not None and page.slot.in_ring:
            if self._closed:
                self._taken -= page.slot.nbytes
            else:
                self._free.append(page.slot)
        page.slot, page.reading, page.used = None, None, False

    def _read(self, number: int, slot: Slot) -> None:
        page = self._pages[number]
        self._clock += 1
        page.slot, page.used, page.asked = slot, False, self._clock
        page.reading = self._readers.submit(self._fill, number, slot)
        page.reading.add_done_callback(self._landed)

    def _landed(self, reading: Future[Ticket]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _fill(self, number: int, slot: Slot) -> Ticket:
        """Fill *slot* with the page; in a reader's thread, which holds nothing else."""
        page = self._pages[number]
        if slot.memory is None:
            slot.memory = self.lane.memory(slot.nbytes)
        increment_version(slot.memory)
        with self._tally.reading():
            ticket = self.lane.fill(slot.memory[: page.nbytes], page.write, tuple(slot.after))
        self._tally.read(disk=page.disk, memory=page.memory)
        slot.after.clear()
        self._verify()
        if number not in slot.tensors:
            slot.tensors[number] = tuple(page.tensors(slot.memory))
        return ticket


_STREAMS: weakref.WeakSet[Stream] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child there are no readers, and locks may be held by threads that are not there."""
    for stream in list(_STREAMS):
        stream._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
