"""The ring at work: blocks are read ahead into bounded memory, and held for as long as a forward
needs them.

1. A page is what one block streams. It has a place in the ring or is nowhere, and is held by
   visits: one for each forward of its block that runs. A page that is held, or is just being read,
   keeps its place; any other may lose it to one that is needed.
2. All reads of a page are one: threads that want the same page wait for the same read.
3. Every wait happens holding nothing: for a place, before anything is held; for a read, which needs
   nothing but its own place. A thread that holds a page already and needs one more gets a place
   beside the ring if the ring is full.
4. What a thread is likely to need next is what it needed next the last time, at first the block
   behind; it is read ahead as far as the ring goes. A prediction that fails costs a read, never a
   wrong byte.
5. In the child of a fork there are no readers, and the ring is empty but for what was held: that is
   read again.
6. An interrupt may come between any two calls. What changes the pages is an act; one that did not
   come to its end is mended at once, or by the next if that was interrupted too. The lock is taken
   as itself: a `Condition` could leave it behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from shardkit.load.devices.transfers import DeviceTransfer, Done, Ticket
from shardkit.load.memory.direct_io import Files
from shardkit.load.modules.torch_modes import unseen
from shardkit.load.streaming.counters import Counters, LiveCounters
from shardkit.load.streaming.eviction import SlotTable
from shardkit.load.streaming.pages import Habit, Inherited, Page, Piece
from shardkit.load.streaming.reader_pool import PendingRead, Readers, held_here
from shardkit.load.streaming.ring_buffer import Ring, Slot, room_for
from shardkit.system.fork import begin_again_in_children, never_free

_READERS = 3
_R = TypeVar("_R")


class Stream:
    """Pages on their way to one device. Copies of a model share it."""

    def __init__(
        self,
        pages: Sequence[Sequence[Piece]],
        lane: DeviceTransfer,
        *,
        ring: int | str = 4,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        """Read nothing yet.

        Args:
            pages: what streams, in the order in which it is expected to be needed.
            lane: the way to the device.
            ring: how many pages, of the largest, the ring has room for, at least two; or how much
                it may take, as in "500MB".
            verify: called after each read; raises if a source is no longer what it was.

        Raises:
            OverBudget: a page does not fit into the ring.
        """
        self.lane = lane
        self._pages = Page.of_each(pages, apart=lane.apart)
        self.room = room_for((page.nbytes for page in self._pages), ring)
        self._verify = verify
        self._tally = LiveCounters()
        self._closed = False
        self._begin()
        begin_again_in_children(self, Stream._forked)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds on its device now."""
        with self.lock:
            return self._places.nbytes

    @property
    def counts(self) -> Counters:
        """What it has done since it was made, by all models and threads that share it."""
        return self._tally.counts

    @unseen
    def claim(
        self, number: int, visit: Hashable, *, holding: bool = False
    ) -> tuple[torch.Tensor, ...] | None:
        """The tensors of the page *number*, which stay what they are until *visit* releases it;
        None if all is closed.

        Args:
            number: which page.
            visit: who needs it.
            holding: whether this thread holds another page meanwhile.

        Raises:
            ShardkitError: it cannot be read.
        """
        begun = time.perf_counter()
        try:
            with self.lock:
                hit = self._pages[number].there
                while not self._closed and not self._act(
                    lambda: self._hold(number, visit, holding=holding)
                ):
                    self._changed.wait()
                if self._closed:
                    return None
                self._act(lambda: self._read_ahead(number))
                reading, place = self._pages[number].reading, self._pages[number].place
            assert reading is not None
            assert place is not None
            reading.result().precede()
            self._tally.claimed(waited=time.perf_counter() - begun, hit=hit)
            return place.tensors
        except BaseException:
            self.release(number, visit)
            raise

    def release(self, number: int, visit: Hashable, *, written: bool = False) -> None:
        """End the hold of *visit* on the page, if it has one; if it was *written* to, it is read
        again.

        Raises:
            ShardkitError: it was held while the process forked, this is the child, and here it
                could not be read again.
        """
        with self.lock:
            self._act(lambda: self._end_hold(number, visit, written=written))
            inherited = self._inherited.pop(visit, None)
        if inherited is not None and inherited.error is not None:
            raise inherited.error

    def rest(self) -> None:
        """Return when all is over that is being read now."""
        with self.lock:
            readings = [page.reading for page in self._pages if page.reading is not None]
        for reading in readings:
            reading.wait()

    def close(self) -> None:
        """Give back threads and files, once the reads that were begun are over; and the memory,
        once nothing in it is held.
        """
        with self.lock:
            self._closed = True
            self._act(self._let_go)
        if not held_here(
            self._changed
        ):  # as by who runs a finalizer in the middle of something; then they end with the stream
            self._readers.close()
        self._files.close()

    def __deepcopy__(self, memo: object) -> Stream:
        return self

    def _begin(self) -> None:
        """With nothing read and nothing held."""
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._readers = Readers(_READERS, self._tally.reading)
        self._files = Files()
        self._pages = [page.nowhere() for page in self._pages]
        self._places = SlotTable(self._pages, Ring(self.lane, self.room))
        self._acting = self._torn = False
        self._inherited: dict[Hashable, Inherited] = {}
        self._chain: list[int] = []
        self.thread = threading.local()

    def _act(self, act: Callable[[], _R]) -> _R:
        """Do *act*, under the lock, so that the pages are whole afterwards, whatever ends it; see
        rule 6.
        """
        if self._torn and not self._acting:
            self._mend()
        outer, self._acting = self._acting, True
        try:
            return act()
        except BaseException:
            self._torn = True
            if not outer:
                self._mend()
            raise
        finally:
            self._acting = outer

    def _mend(self) -> None:
        """Let what is half done be undone."""
        self._places.mend()
        self._readers.complete()
        self._drop_if_over()
        self._changed.notify_all()
        self._torn = False

    def _let_go(self) -> None:
        self._places.vacate_idle()
        self._drop_if_over()
        self._changed.notify_all()

    def _hold(self, number: int, visit: Hashable, *, holding: bool) -> bool:
        """Hold the page, and see that it is read; False if it has no place and there is none."""
        page = self._pages[number]
        if page.failed and not page.holders:
            self._places.vacate(page)
        if page.reading is None:
            place = self._places.find(number)
            if place is None and holding:
                place = self._places.beside(number)
            if place is None:
                return False
            self._read(place, first=True)
        else:
            self._readers.hurry(page.reading)
        page.holders.add(visit)
        page.used = True
        return True

    def _end_hold(self, number: int, visit: Hashable, *, written: bool) -> None:
        (page := self._pages[number]).written |= written
        if visit not in page.holders:
            return
        if page.place is not None and page.place.memory is not None:
            used = self.lane.issued(page.place.memory)
            page.place.after[used.line] = used
        page.holders.discard(visit)
        if not page.holders and (
            self._closed or page.failed or (page.place and not page.place.in_ring)
        ):
            self._places.vacate(page)
        self._drop_if_over()
        self._changed.notify_all()

    def _read_ahead(self, number: int) -> None:
        habit = self._habit()
        chain = [
            number,
            *self._fitting(habit.onward(number), self.room - self._pages[number].nbytes),
        ]
        for given_up in habit.expected.difference(chain):
            self._pages[given_up].used = True
        habit.expected = set(chain)
        self._chain = chain
        self._read_on()

    def _read_on(self) -> None:
        """Read as much as there are places for of what was expected last."""
        for following in self._chain[1:]:
            if self._pages[following].reading is None:
                place = self._places.find(following, keep=self._chain)
                if place is None:
                    return
                self._read(place, first=False)

    def _fitting(self, numbers: Iterator[int], room: int) -> Iterator[int]:
        """Those of *numbers* that come before the *room* is full."""
        for number in numbers:
            room -= self._pages[number].nbytes
            if room < 0:
                return
            yield number

    def _habit(self) -> Habit:
        if not hasattr(self.thread, "habit"):
            self.thread.habit = Habit(len(self._pages))
        habit: Habit = self.thread.habit
        return habit

    def _read(self, place: Slot, *, first: bool) -> None:
        page = self._pages[place.number]
        assert place.host is not None
        assert place.memory is not None
        # The memory is named here, because a close takes it from the place, and it must outlive the
        # reads.
        finish = partial(self._finish, page, place, place.host, place.memory)
        if (
            page.kept is not None
        ):  # nothing is read, and to wake a reader takes longer than to send it
            with torch.inference_mode(False):  # as in a reader
                self._places.occupy(place, PendingRead.over_with(finish()))
            return
        jobs = (partial(place.fill, job) for job in page.jobs(self._files, place.host))
        filling = PendingRead(jobs, finish, self._landed)
        self._places.occupy(place, filling)
        self._readers.take(filling, first=first)

    def _drop_if_over(self) -> None:
        if self._closed and not any(page.holders for page in self._pages):
            self._places.drop()

    def _landed(self) -> None:
        with self.lock:
            if not self._closed:
                self._act(
                    self._read_on
                )  # the place of what was read for naught was not to be had before
            self._changed.notify_all()

    def _finish(self, page: Page, place: Slot, host: torch.Tensor, memory: torch.Tensor) -> Ticket:
        """Bring what was read, or is kept, to the device; what was read in a reader's thread, which
        holds nothing.
        """
        if place.memory is None:
            return Done()  # it was taken back, and nobody waits for it
        page.settle(host)
        sent = self.lane.send(
            host, memory[: len(host)], tuple(place.after.values())
        )  # kept memory ends where its page does
        place.before, place.after = [sent], {}
        self._tally.read(disk=page.disk, memory=page.memory)
        if page.kept is None:
            self._verify()
        place.tensors = tuple(page.tensors(memory))
        return sent

    def _forked(self) -> None:
        """Begin again in the child of a fork; see rule 5. No lock from before is asked for: who had
        it may not be there.
        """
        held = self._inherited | {
            visit: Inherited(page, page.place)
            for page in self._pages
            if page.place is not None and page.place.tensors
            for visit in page.holders
        }
        if self.lane.apart:
            never_free(
                self._places
            )  # a device is its parent's, and that alone can let go of what is there
        thread = self.thread  # which has what this thread holds, and no more what the others did
        self._tally = self._tally.inherited()
        self._begin()
        self.thread, self._inherited = thread, held
        for each in held.values():
            each.read(self._files)
