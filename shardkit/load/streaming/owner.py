"""The owner of the streaming state, which decides what is in the prefetch buffer.

The state of each block is its `BlockBuffer`. One thread at a time changes it, which has the role of
the owner and does one message after the other; it is never a thread that runs a model, but where
all is closed and that thread is not the main one:

    state     slot  read         borrowers    becomes
    absent    none  none         may wait     reading, when it is borrowed or expected
    reading   yes   under way    may wait     ready or failed, when its last job is done
    ready     yes   succeeded    use it       absent, when another block needs the memory
    failed    yes   failed       get the      reading, when it is borrowed again
                                 error
    stale     yes   succeeded    use it       absent, when the last borrower leaves: its block has
                                              written to it

Threads that run a model post messages and wait for them where they must (see `prefetcher`). The
threads that read do the messages (see `reader_pool`). Ctrl-C is raised in the main thread alone, so
that it cannot interrupt the owner, and nothing has to be repaired after it.

1. Threads that want the same block wait for the same read.
2. Every wait happens holding nothing: for a slot, before anything is borrowed; for a read, which
   needs nothing but its own slot. A thread that has borrowed a block already and needs one more
   gets a slot of its own memory if the prefetch buffer is full.
3. What a thread is likely to need next is what it needed next the last time, at first the following
   block; it is read ahead as far as the prefetch buffer goes. A wrong prediction costs a read,
   never a wrong byte. A block that was not expected is read before those that were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from shardkit.errors import ShardkitError
from shardkit.load.devices.transfers import DeviceTransfer, Done
from shardkit.load.memory.direct_io import Files
from shardkit.load.streaming.counters import LiveCounters
from shardkit.load.streaming.eviction import EvictionPolicy
from shardkit.load.streaming.page_layout import READERS
from shardkit.load.streaming.pages import BlockBuffer, Habit
from shardkit.load.streaming.reader_pool import BlockTensors, Loaded, PendingRead, Priority, Readers
from shardkit.load.streaming.requests import Answer, Request
from shardkit.load.streaming.ring_buffer import Ring, Slot
from shardkit.system.threads import Task

_R = TypeVar("_R")


class Owner:
    """The state of the blocks of one stream, and what changes it.

    Attributes:
        buffers: those of the blocks; all threads read them, see `prefetcher`.
        is_settled: whether every block is ready and stays so, so that the owner need not hear of
            borrows.
        is_closed: whether nothing is read any more.
        wants_releases: whether somebody may wait for a slot, so that a release matters at once.
    """

    def __init__(
        self,
        buffers: Sequence[BlockBuffer],
        lane: DeviceTransfer,
        room: int,
        verify: Callable[[], None],
        counters: LiveCounters,
    ) -> None:
        """Read nothing yet, and start no thread.

        Args:
            buffers: those of the blocks, all absent.
            lane: the way to the device.
            room: bytes of the prefetch buffer.
            verify: called after each read; raises if a source is no longer what it was.
            counters: count what is read.
        """
        self.buffers = list(buffers)
        self.is_settled = False
        self.is_closed = False
        self.wants_releases = False
        self._lane = lane
        self._room = room
        self._all_fit = sum(buffer.nbytes for buffer in self.buffers) <= room
        self._verify = verify
        self._counters = counters
        self._readers = Readers(READERS, counters.reading)
        self._files = Files()
        self._ring = Ring(lane, room)
        self._policy = EvictionPolicy(len(self.buffers))
        self._waiting: list[Request] = []  # for a slot
        self._ahead: list[int] = []  # what is needed now, and what is expected after it

    # What other threads call.

    @property
    def has_current_thread(self) -> bool:
        """Whether the calling thread is one of its threads."""
        return self._readers.has_current_thread

    def post(self, message: Task) -> None:
        """Let the owner do *message*, after those that were posted before.

        Raises:
            LoadError: no thread can be started.
        """
        self._readers.post(message)

    def ask(self, message: Callable[[], _R]) -> _R:
        """Return the result of *message*, which the owner does.

        Raises:
            LoadError: no thread can be started.
        """
        answer = Answer(message)
        self.post(answer.give)
        return answer.wait(partial(self.post, self.serve_waiting))

    def settle(self, message: Callable[[], object]) -> None:
        """Let the owner do *message*, and wait for that and for the end of the threads, unless this
        is one of them, in which the garbage collector may run a finalizer at any time.
        """
        if self.has_current_thread:
            self.post(message)
        else:
            self.ask(message)
            self._readers.join()

    def end(self, message: Task) -> None:
        """Let *message* be done when all is closed, and leave no thread behind. Where no Ctrl-C can
        be raised, none is started: whoever closed it may rely on there being none.
        """
        if threading.get_ident() == threading.main_thread().ident:
            self.settle(message)
        else:
            self._readers.do_here(message)

    def close(self) -> None:
        """Evict what nobody borrows, and return when the reads that were begun are over and the
        threads have ended.
        """
        self.settle(self.on_close)
        self._files.close()

    # What it does, one message after the other.

    def on_request(self, request: Request) -> None:
        """Read the block that *request* wants, now or when there is a slot for it."""
        self._waiting.append(request)
        self.serve_waiting()

    def on_use(self, number: int, habit: Habit) -> None:
        """A forward has found the block *number* ready, or on its way."""
        self._policy.on_use(number)
        if (read := self.buffers[number].read) is not None:
            self._readers.hurry(read)
        self._read_ahead(number, habit)

    def on_release(self, buffer: BlockBuffer) -> None:
        """Somebody has released *buffer*."""
        self._evict_if_useless(buffer)
        self.serve_waiting()
        self._free_if_closed()

    def on_written(self, buffer: BlockBuffer) -> None:
        """The block of *buffer* wrote to it, and is about to release it."""
        self.is_settled = False
        buffer.stale = True

    def _on_completed(self, buffer: BlockBuffer) -> None:
        self._evict_if_useless(buffer)
        self.is_settled = self._all_fit and all(
            each.is_ready and each.slot is not None and each.slot.in_ring for each in self.buffers
        )
        self.serve_waiting()
        with suppress(ShardkitError):
            self._read_on(self._ahead[1:], Priority.NEXT)

    def on_prefetch(self, numbers: Sequence[int], priority: Priority) -> None:
        """Read the blocks *numbers* ahead."""
        with suppress(ShardkitError):
            self._read_on(numbers, priority)

    def on_close(self) -> None:
        """Evict what nobody borrows; the rest goes when it is released."""
        self.is_settled, self.is_closed = False, True
        for buffer in self.buffers:
            self._evict(buffer, even_begun=True)
        self.serve_waiting()
        self._free_if_closed()

    def held(self) -> int:
        """Bytes of memory of the device."""
        slots = [buffer.slot for buffer in self.buffers if buffer.slot is not None]
        return self._ring.held + sum(slot.nbytes for slot in slots if not slot.in_ring)

    def reads(self) -> list[PendingRead]:
        """The reads under way, and those that are over and whose blocks are there."""
        return [buffer.read for buffer in self.buffers if buffer.read is not None]

    def serve_waiting(self) -> None:
        """Look again whether there are slots for the requests that wait for one."""
        self.wants_releases = True  # before the look for slots: who releases does it the other way
        for request in list(self._waiting):
            if self._serve(request):
                self._waiting.remove(request)  # at once: from here on it uses its block
        self.wants_releases = bool(self._waiting)

    def _serve(self, request: Request) -> bool:
        """See that what *request* wants is read; False if there is no slot for it."""
        buffer = self.buffers[request.number]
        if self.is_closed or request.borrower not in buffer.borrowers:
            request.refuse()
            return True
        try:
            if (before := buffer.read) is not None and (before.failed or buffer.stale):
                buffer.read = None  # before the look at the borrowers, as in `_evict`
                if before.failed or self._is_unused(buffer, request):
                    self._evict(buffer, even_borrowed=True)
                else:
                    buffer.read = before
            if buffer.read is None:
                slot = self._reserve(request.number)
                if slot is None and request.holding:
                    slot = self._ring.beside(request.number, buffer.layout, buffer.pinned)
                if slot is None:
                    return False
                read = self._read(slot, Priority.NOW)
            else:
                read = buffer.read
                self._readers.hurry(read)
        except Exception as error:  # noqa: BLE001 - raised by who asked
            request.refuse(error)
            return True
        self._policy.on_use(request.number)
        request.wait_for(read)
        self._read_ahead(request.number, request.habit)
        return True

    def _is_unused(self, buffer: BlockBuffer, request: Request) -> bool:
        """Whether nobody uses it: all its borrowers wait for it to be read."""
        waiting = {request.borrower, *(each.borrower for each in self._waiting)}
        return buffer.borrowers <= waiting

    def _reserve(self, number: int, *, expected: Collection[int] = ()) -> Slot | None:
        """A slot for the block *number*, whose memory is taken from blocks that nobody borrows if
        need be; None if there is none.

        Args:
            number: the block.
            expected: None of these is evicted. Where it is given, the block is read ahead, and the
                policy decides what may go; else it is needed now, and anything may go that the
                policy would rather keep.

        Raises:
            LoadError: there is no memory for the prefetch buffer.
        """
        buffer = self.buffers[number]
        stays: set[Slot] = set()

        def by_policy(slot: Slot) -> bool:
            return slot not in stays and self._policy.may_evict(slot.number, expected)

        def whatever(slot: Slot) -> bool:
            return slot not in stays

        for may_go in (by_policy,) if expected else (by_policy, whatever):
            while found := self._ring.find(number, buffer.layout, may_go):
                slot, leaving = found
                stays.update(each for each in leaving if not self._evict(self.buffers[each.number]))
                if stays.isdisjoint(leaving):
                    self._ring.take(slot, buffer.pinned)
                    return slot
        return None

    def _evict(
        self, buffer: BlockBuffer, *, even_borrowed: bool = False, even_begun: bool = False
    ) -> bool:
        """Take its memory from *buffer*; False if somebody borrows it, or a reader is at it.

        Args:
            buffer: the buffer.
            even_borrowed: do it though there are borrowers, all of whom wait.
            even_begun: do it though a reader is at it, which then leaves the memory alone.
        """
        self.is_settled = False  # before the look at the borrowers, who look the other way round
        read, buffer.read = buffer.read, None
        if buffer.borrowers and not even_borrowed:
            buffer.read = read
            return False
        if read is not None and not read.cancel() and not even_begun:
            buffer.read = read
            return False
        slot, buffer.slot, buffer.stale = buffer.slot, None, False
        if slot is not None:
            self._ring.evict(slot)
        return True

    def _evict_if_useless(self, buffer: BlockBuffer) -> None:
        """Evict *buffer*, unless somebody borrows it, if it is of no use for the next borrower."""
        slot = buffer.slot
        if self.is_closed or buffer.stale or (slot is not None and not slot.in_ring):
            self._evict(buffer)

    def _read(self, slot: Slot, priority: Priority) -> PendingRead:
        """Begin to fill *slot* with its block.

        Raises:
            LoadError: no thread can be started to read it, or its device takes no transfer.
        """
        buffer = self.buffers[slot.number]
        assert slot.host is not None
        assert slot.memory is not None
        # The memory is named here, because a close takes it from the slot, and it must outlive the
        # reads.
        finish = partial(self._finish, buffer, slot, slot.host, slot.memory)
        self._policy.on_read(slot.number)
        buffer.slot, buffer.stale = slot, False
        completed = partial(self.post, partial(self._on_completed, buffer))
        try:
            if buffer.pinned is not None:  # nothing is read, and to send it takes no time
                buffer.read = read = PendingRead.over_with(finish())
                completed()
            else:
                jobs = (partial(slot.fill, job) for job in buffer.jobs(self._files, slot.host))
                buffer.read = read = PendingRead(jobs, finish, completed, priority)
                self._readers.take(read)
        except Exception:  # such as that no more threads can be started
            self._evict(buffer, even_borrowed=True)
            raise
        return read

    def _read_ahead(self, number: int, habit: Habit) -> None:
        """Read what is expected after the block *number*, as far as there is room."""
        room = self._room - self.buffers[number].nbytes
        self._ahead = [number, *self._fitting(habit.onward(number), room)]
        for given_up in habit.expected.difference(self._ahead):
            self._policy.on_use(given_up)
        habit.expected = set(self._ahead)
        with suppress(ShardkitError):  # of memory: raised to those who need the block
            self._read_on(self._ahead[1:], Priority.NEXT)

    def _read_on(self, numbers: Iterable[int], priority: Priority) -> None:
        """Read those of *numbers* that are absent, as long as there are slots for them."""
        for number in numbers if not self.is_closed else ():
            if self.buffers[number].read is None:
                expected = () if priority is Priority.NOW else self._ahead or (number,)
                slot = self._reserve(number, expected=expected)
                if slot is None:
                    return
                self._read(slot, priority)

    def _fitting(self, numbers: Iterator[int], room: int) -> Iterator[int]:
        """Those of *numbers* that come before the *room* is full."""
        for number in numbers:
            room -= self.buffers[number].nbytes
            if room < 0:
                return
            yield number

    def _free_if_closed(self) -> None:
        if self.is_closed and not any(buffer.borrowers for buffer in self.buffers):
            self._ring.evict_all()

    # What a reader does.

    def _finish(
        self, buffer: BlockBuffer, slot: Slot, host: torch.Tensor, memory: torch.Tensor
    ) -> Loaded:
        """Bring what was read, or has a pinned host copy, to the device."""
        if slot.memory is None:
            return Loaded(BlockTensors(), Done())  # it was evicted, and nobody waits for it
        buffer.settle(host)
        # Pinned memory ends where its block does.
        ticket = self._lane.send(host, memory[: len(host)], tuple(slot.after.values()))
        slot.before, slot.after = [ticket], {}
        self._counters.read(disk=buffer.disk, memory=buffer.memory)
        if buffer.pinned is None:
            self._verify()
        slot.tensors = tensors = BlockTensors(buffer.tensors(memory))
        return Loaded(tensors, ticket)
