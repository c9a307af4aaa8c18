"""The owner of the streaming state: blocks are read ahead into a prefetch buffer of bounded size,
and stay there for as long as a forward borrows them.

The state of each block is its `BlockBuffer`. One thread changes it, the owner, which does one
message after the other:

    state     slot  read         borrowers    becomes
    absent    none  none         may wait     reading, when it is borrowed or expected
    reading   yes   under way    may wait     ready or failed, when its last job is done
    ready     yes   succeeded    use it       absent, when another block needs the memory
    failed    yes   failed       get the      reading, when it is borrowed again
                                 error
    stale     yes   succeeded    use it       absent, when the last borrower leaves: its block has
                                              written to it

Threads that run a model post messages (`borrow`, `release`, `prefetch`, `close`) and wait for them
where they must. Ctrl-C is raised in the main thread alone, so that it cannot interrupt the owner,
and nothing has to be repaired after it. What a forward that was interrupted has borrowed, its hooks
release later (see `streaming_hooks`); to release twice does nothing.

**The fast path.** A thread that finds its block ready, or on its way, borrows it without the owner.
It enters itself among the borrowers first, and looks for the read afterwards. The owner does it the
other way round: it takes the read away, looks for borrowers, and puts the read back if there are
any. So either the owner sees the borrower, and does not evict the block, or the borrower sees that
there is no read, and posts a request. A thread that waits for a read under way is woken by the
reader that completes it, not by the owner.

1. Threads that want the same block wait for the same read.
2. Every wait happens holding nothing: for a slot, before anything is borrowed; for a read, which
   needs nothing but its own slot. A thread that has borrowed a block already and needs one more
   gets a slot of its own memory if the prefetch buffer is full.
3. What a thread is likely to need next is what it needed next the last time, at first the following
   block; it is read ahead as far as the prefetch buffer goes. A wrong prediction costs a read,
   never a wrong byte.
4. Nothing is read ahead for what was not expected; it comes first in the queue of the readers (see
   `Priority`).
5. The child of a fork has an owner and readers of its own, from its first use on, and an empty
   prefetch buffer. A forward that was running while the process forked raises one LoadError in the
   child.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch

from shardkit.errors import LoadError, ShardkitError
from shardkit.load.devices.transfers import DeviceTransfer, Done
from shardkit.load.memory.direct_io import Files
from shardkit.load.streaming.counters import Counters, LiveCounters
from shardkit.load.streaming.eviction import EvictionPolicy
from shardkit.load.streaming.pages import BlockBuffer, Habit, Piece
from shardkit.load.streaming.reader_pool import (
    READER_NAME,
    Loaded,
    PendingRead,
    Priority,
    Readers,
    locked,
    ring,
)
from shardkit.load.streaming.ring_buffer import Ring, Slot, room_for
from shardkit.system.fork import begin_again_in_children, never_free
from shardkit.system.threads import Task, Workers

_READERS = 3
_PATIENCE = 1.0  # seconds until a thread that waits asks again whether there is a slot
_R = TypeVar("_R")


class Stream:
    """Blocks on their way to one device. Copies of a model share it."""

    def __init__(
        self,
        blocks: Sequence[Sequence[Piece]],
        lane: DeviceTransfer,
        *,
        ring: int | str = 4,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        """Read nothing yet.

        Args:
            blocks: what streams, in the order in which it is expected to be needed.
            lane: the way to the device.
            ring: how many blocks, of the largest, the prefetch buffer has room for, at least two;
                or how much it may take, as in "500MB".
            verify: called after each read; raises if a source is no longer what it was.

        Raises:
            OverBudget: a block does not fit into the prefetch buffer.
        """
        self.lane = lane
        self._buffers = BlockBuffer.of_each(blocks, apart=lane.apart)
        self.room = room_for((buffer.nbytes for buffer in self._buffers), ring)
        self._all_fit = sum(buffer.nbytes for buffer in self._buffers) <= self.room
        self._verify = verify
        self._counters = LiveCounters()
        self._is_closing = False  # as any thread may say
        self._is_closed = False  # as the owner has done
        self._in_flight_at_fork: set[Hashable] = set()
        self.thread = threading.local()
        self._begin()
        begin_again_in_children(self, Stream._forked)

    def _begin(self) -> None:
        """Begin with nothing read and nothing borrowed."""
        self._inbox: deque[Task] = deque()
        self._owner = Workers(
            1, f"{READER_NAME}-owner", self._next_message, lambda: bool(self._inbox)
        )
        self._readers = Readers(_READERS, self._counters.reading)
        self._files = Files()
        self._buffers = [buffer.absent() for buffer in self._buffers]
        self._ring = Ring(self.lane, self.room)
        self._policy = EvictionPolicy(len(self._buffers))
        self._waiting: list[_Request] = []  # for a slot
        self._ahead: list[int] = []  # what is needed now, and what is expected after it
        # Whether every block is ready and stays so, so that the owner need not hear of borrows.
        self._is_settled = False

    # What any thread may call.

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds on its device now."""
        return self._ask(self._held)

    @property
    def counts(self) -> Counters:
        """What it has done since it was made, by all models and threads that share it."""
        return self._counters.counts

    def borrow(
        self, number: int, borrower: Hashable, *, holding: bool = False
    ) -> tuple[torch.Tensor, ...] | None:
        """The tensors of the block *number*, which stay what they are until *borrower* releases it;
        None if all is closed.

        Args:
            number: which block.
            borrower: who needs it.
            holding: whether this thread has borrowed another block meanwhile.

        Raises:
            ShardkitError: it cannot be read.
        """
        begun = time.perf_counter()
        buffer = self._buffers[number]
        buffer.borrowers.add(borrower)  # before the look at the read: see "The fast path"
        read, is_hit = buffer.read, buffer.is_ready
        if self._is_closing:
            buffer.borrowers.discard(borrower)
            self._post(partial(self._on_release, buffer))
            return None
        if not is_hit or read is None:
            request = _Request(number, borrower, self._habit(), holding=holding)
            if read is None or read.failed or buffer.stale:
                self._post(partial(self._on_request, request))
            else:
                request.wait_for(read)
                self._post(partial(self._on_use, number, request.habit))
            try:
                while not request.bell.acquire(timeout=_PATIENCE):
                    # An interrupt may have kept another thread from telling what it released.
                    self._post(self._serve_waiting)
                read = request.answer()
                loaded = None if read is None else read.result()
            except Exception:
                self.release(number, borrower)
                raise
            if loaded is None:
                self.release(number, borrower)
                return None
        else:
            if not self._is_settled:
                self._post(partial(self._on_use, number, self._habit()))
            loaded = read.result()
        loaded.ticket.precede()
        self._counters.borrowed(waited=time.perf_counter() - begun, hit=is_hit)
        return loaded.tensors

    def release(self, number: int, borrower: Hashable, *, written: bool = False) -> None:
        """End what *borrower* has borrowed of the block *number*, if it has; if the block was
        *written* to, it is read again.

        Raises:
            LoadError: this is the child of a fork, and the process forked while this or another
                block was borrowed in this thread. It is raised once.
        """
        buffer = self._buffers[number]
        if borrower not in buffer.borrowers:
            self._raise_forked(borrower)
            return
        slot = buffer.slot
        if slot is not None and (memory := slot.memory) is not None:
            used = self.lane.issued(memory)
            slot.after[used.line] = used
        if written:
            self._ask(partial(self._on_written, buffer))
        buffer.borrowers.discard(borrower)
        if self._is_closing:
            self._settle(partial(self._on_release, buffer))
        elif not self._is_settled:
            self._post(partial(self._on_release, buffer))

    def prefetch(self, numbers: Iterable[int], priority: Priority = Priority.NEXT) -> None:
        """Read the blocks *numbers* ahead, if there is room for them that nobody else needs."""
        self._post(partial(self._on_prefetch, tuple(numbers), priority))

    def rest(self) -> None:
        """Return when all is over that is being read now."""
        for read in self._ask(self._reads):
            read.wait()

    def close(self) -> None:
        """Give back threads and files, once the reads that were begun are over; and the memory,
        once nothing in it is borrowed.
        """
        self._is_closing = True
        if self._settle(self._on_close):
            self._readers.join()
            self._owner.join()  # which the readers have posted to
        self._files.close()

    def __deepcopy__(self, memo: object) -> Stream:
        return self

    def _habit(self) -> Habit:
        if not hasattr(self.thread, "habit"):
            self.thread.habit = Habit(len(self._buffers))
        habit: Habit = self.thread.habit
        return habit

    def _post(self, message: Task) -> None:
        """Let the owner do *message*, after those that were posted before."""
        self._inbox.append(message)
        try:
            self._owner.wake()
        except RuntimeError as error:
            raise _no_thread() from error

    def _ask(self, message: Callable[[], _R]) -> _R:
        """What *message* gives, which the owner does."""
        answer = _Answer(message)
        self._post(answer.give)
        return answer.wait()

    def _settle(self, message: Callable[[], object]) -> bool:
        """Let the owner do *message*, and wait for that and for its end, unless this is its thread
        or a reader, where the garbage collector may run a finalizer at any time.
        """
        if self._owner.has_current_thread or self._readers.has_current_thread:
            self._post(message)
            return False
        self._ask(message)
        self._owner.join()
        return True

    def _raise_forked(self, borrower: Hashable) -> None:
        if borrower in self._in_flight_at_fork:
            self._in_flight_at_fork = set()
            raise LoadError(
                "this process was forked during a forward of a model that streams its weights, and "
                "that forward cannot go on in the child",
                hint="run the model again, which reads what it needs; or fork between two forwards",
            )

    # What only the owner does.

    def _next_message(self) -> Task | None:
        with suppress(IndexError):
            return self._inbox.popleft()
        return None

    def _on_request(self, request: _Request) -> None:
        if not self._serve(request):
            self._waiting.append(request)

    def _on_use(self, number: int, habit: Habit) -> None:
        self._policy.on_use(number)
        if (read := self._buffers[number].read) is not None:
            self._readers.hurry(read)
        self._read_ahead(number, habit)

    def _on_release(self, buffer: BlockBuffer) -> None:
        self._evict_if_useless(buffer)
        self._serve_waiting()
        self._free_if_closed()

    def _on_written(self, buffer: BlockBuffer) -> None:
        self._is_settled = False
        buffer.stale = True

    def _on_completed(self, buffer: BlockBuffer) -> None:
        self._evict_if_useless(buffer)
        self._is_settled = self._all_fit and all(
            each.is_ready and each.slot is not None and each.slot.in_ring for each in self._buffers
        )
        self._serve_waiting()
        with suppress(ShardkitError):
            self._read_on(self._ahead[1:], Priority.NEXT)

    def _on_prefetch(self, numbers: Sequence[int], priority: Priority) -> None:
        with suppress(ShardkitError):
            self._read_on(numbers, priority)

    def _on_close(self) -> None:
        self._is_settled, self._is_closed = False, True
        for buffer in self._buffers:
            self._evict(buffer, even_begun=True)
        self._serve_waiting()
        self._free_if_closed()

    def _held(self) -> int:
        slots = [buffer.slot for buffer in self._buffers if buffer.slot is not None]
        return self._ring.held + sum(slot.nbytes for slot in slots if not slot.in_ring)

    def _reads(self) -> list[PendingRead]:
        return [buffer.read for buffer in self._buffers if buffer.read is not None]

    def _serve_waiting(self) -> None:
        self._waiting = [request for request in self._waiting if not self._serve(request)]

    def _serve(self, request: _Request) -> bool:
        """See that what *request* wants is read; False if there is no slot for it."""
        buffer = self._buffers[request.number]
        if self._is_closed or request.borrower not in buffer.borrowers:
            request.refuse()
            return True
        try:
            if buffer.read is not None and (buffer.read.failed or self._is_unused(buffer, request)):
                self._evict(buffer, even_borrowed=True)
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

    def _is_unused(self, buffer: BlockBuffer, request: _Request) -> bool:
        """Whether it is stale, and nobody uses it: all its borrowers wait for it to be read."""
        waiting = {request.borrower, *(each.borrower for each in self._waiting)}
        return buffer.stale and buffer.borrowers <= waiting

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
        buffer = self._buffers[number]
        stays: set[Slot] = set()

        def by_policy(slot: Slot) -> bool:
            return slot not in stays and self._policy.may_evict(slot.number, expected)

        def whatever(slot: Slot) -> bool:
            return slot not in stays

        for may_go in (by_policy,) if expected else (by_policy, whatever):
            while found := self._ring.find(number, buffer.layout, may_go):
                slot, leaving = found
                stays.update(
                    each for each in leaving if not self._evict(self._buffers[each.number])
                )
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
        self._is_settled = False  # before the look at the borrowers, who look the other way round
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
        if self._is_closed or buffer.stale or (slot is not None and not slot.in_ring):
            self._evict(buffer)

    def _read(self, slot: Slot, priority: Priority) -> PendingRead:
        """Begin to fill *slot* with its block.

        Raises:
            LoadError: no thread can be started to read it.
        """
        buffer = self._buffers[slot.number]
        assert slot.host is not None
        assert slot.memory is not None
        # The memory is named here, because a close takes it from the slot, and it must outlive the
        # reads.
        finish = partial(self._finish, buffer, slot, slot.host, slot.memory)
        self._policy.on_read(slot.number)
        buffer.slot, buffer.stale = slot, False
        completed = partial(self._post, partial(self._on_completed, buffer))
        if buffer.pinned is not None:  # nothing is read, and to send it takes no time
            buffer.read = PendingRead.over_with(finish())
            completed()
            return buffer.read
        jobs = (partial(slot.fill, job) for job in buffer.jobs(self._files, slot.host))
        buffer.read = PendingRead(jobs, finish, completed, priority)
        try:
            self._readers.take(buffer.read)
        except RuntimeError as error:
            self._evict(buffer, even_borrowed=True)
            raise _no_thread() from error
        return buffer.read

    def _read_ahead(self, number: int, habit: Habit) -> None:
        """Read what is expected after the block *number*, as far as there is room."""
        room = self.room - self._buffers[number].nbytes
        self._ahead = [number, *self._fitting(habit.onward(number), room)]
        for given_up in habit.expected.difference(self._ahead):
            self._policy.on_use(given_up)
        habit.expected = set(self._ahead)
        with suppress(ShardkitError):  # of memory: it is told to those who need it
            self._read_on(self._ahead[1:], Priority.NEXT)

    def _read_on(self, numbers: Iterable[int], priority: Priority) -> None:
        """Read those of *numbers* that are absent, as long as there are slots for them."""
        for number in numbers if not self._is_closed else ():
            if self._buffers[number].read is None:
                slot = self._reserve(number, expected=self._ahead or (number,))
                if slot is None:
                    return
                self._read(slot, priority)

    def _fitting(self, numbers: Iterator[int], room: int) -> Iterator[int]:
        """Those of *numbers* that come before the *room* is full."""
        for number in numbers:
            room -= self._buffers[number].nbytes
            if room < 0:
                return
            yield number

    def _free_if_closed(self) -> None:
        if self._is_closed and not any(buffer.borrowers for buffer in self._buffers):
            self._ring.evict_all()

    # What a reader does.

    def _finish(
        self, buffer: BlockBuffer, slot: Slot, host: torch.Tensor, memory: torch.Tensor
    ) -> Loaded:
        """Bring what was read, or has a pinned host copy, to the device."""
        if slot.memory is None:
            return Loaded((), Done())  # it was evicted, and nobody waits for it
        buffer.settle(host)
        # Pinned memory ends where its block does.
        ticket = self.lane.send(host, memory[: len(host)], tuple(slot.after.values()))
        slot.before, slot.after = [ticket], {}
        self._counters.read(disk=buffer.disk, memory=buffer.memory)
        if buffer.pinned is None:
            self._verify()
        slot.tensors = tuple(buffer.tensors(memory))
        return Loaded(slot.tensors, ticket)

    # The child of a fork.

    def _forked(self) -> None:
        """Begin again. No lock from before is asked for: who had it may not be there."""
        self._in_flight_at_fork.update(*(buffer.borrowers for buffer in self._buffers))
        if self.lane.apart:
            # A device is its parent's, and that alone can let go of what is there.
            never_free((self._ring, self._buffers))
        self._counters = self._counters.inherited()
        self._begin()


@dataclass(eq=False, slots=True)
class _Request:
    """A block that a thread waits for.

    Attributes:
        number: the block.
        borrower: who needs it.
        habit: that of the thread.
        holding: whether the thread has borrowed another block meanwhile.
        bell: released when the thread can go on.
        read: what it waited for, which is over then; None if all is closed.
        error: why there is none.
    """

    number: int
    borrower: Hashable
    habit: Habit
    holding: bool
    bell: threading.Lock = field(default_factory=locked)
    read: PendingRead | None = None
    error: Exception | None = None

    def wait_for(self, read: PendingRead) -> None:
        """Go on when *read* is over."""
        self.read = read
        read.add_waiter(self.bell)

    def refuse(self, error: Exception | None = None) -> None:
        """Go on without a read."""
        self.error = error
        ring(self.bell)

    def answer(self) -> PendingRead | None:
        """The read, once the bell was rung."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # a frame that holds what was raised in it is a circle
        return self.read


class _Answer(Generic[_R]):
    """What the owner gives when it has done a message."""

    def __init__(self, message: Callable[[], _R]) -> None:
        self._message = message
        self._bell = locked()
        self._result: list[_R] = []
        self._error: Exception | None = None

    def give(self) -> None:
        """Do the message, as the owner."""
        try:
            self._result.append(self._message())
        except Exception as error:  # noqa: BLE001 - raised by who asked
            self._error = error
        self._bell.release()

    def wait(self) -> _R:
        """What it gave."""
        self._bell.acquire()
        if self._error is not None:
            raise self._error
        return self._result[0]


def _no_thread() -> LoadError:
    return LoadError(
        "no thread could be started to read weights",
        hint="raise the limit of processes and threads (ulimit -u), or free some memory",
    )
