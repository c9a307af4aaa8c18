"""Blocks that stream to one device: the threads of a model borrow them from here.

The state belongs to the `owner`. A thread that needs a block posts a request to it, and waits. What
a forward that was interrupted by Ctrl-C has borrowed, its hooks release later (see
`streaming_hooks`); to release twice does nothing.

**The fast path.** A thread that finds its block ready, or on its way, borrows it without the owner.
It enters itself among the borrowers first, and looks for the read afterwards. The owner does it the
other way round: it takes the read away, looks for borrowers, and puts the read back if there are
any. So either the owner sees the borrower, and does not evict the block, or the borrower sees that
there is no read, and posts a request. A thread that waits for a read under way is woken by the
reader that completes it, not by the owner.

The child of a fork has an owner and readers of its own, from its first use on, and an empty
prefetch buffer. A forward that was running while the process forked raises one LoadError in the
child.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

from shardkit.errors import LoadError
from shardkit.load.devices.transfers import DeviceTransfer
from shardkit.load.streaming.counters import Counters, LiveCounters
from shardkit.load.streaming.owner import Owner
from shardkit.load.streaming.pages import BlockBuffer, Habit, Piece
from shardkit.load.streaming.reader_pool import BlockTensors, Priority
from shardkit.load.streaming.requests import PATIENCE, Request
from shardkit.load.streaming.ring_buffer import room_for
from shardkit.system.fork import begin_again_in_children, never_free


class Stream:
    """Blocks on their way to one device. Copies of a model share it.

    Attributes:
        lane: the way to the device.
        room: bytes of the prefetch buffer.
        thread: what belongs to the calling thread.
    """

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
        buffers = BlockBuffer.of_each(blocks, apart=lane.apart)
        self.lane = lane
        self.room = room_for((buffer.nbytes for buffer in buffers), ring)
        self.thread = threading.local()
        self._verify = verify
        self._counters = LiveCounters()
        self._owner = Owner(buffers, lane, self.room, verify, self._counters)
        self._is_closing = False
        self._in_flight_at_fork: set[Hashable] = set()
        begin_again_in_children(self, Stream._forked)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds on its device now."""
        return self._owner.ask(self._owner.held)

    @property
    def counts(self) -> Counters:
        """What it has done since it was made, by all models and threads that share it."""
        return self._counters.counts

    def borrow(
        self, number: int, borrower: Hashable, *, holding: bool = False
    ) -> BlockTensors | None:
        """The tensors of the block *number*, which stay what they are until *borrower* releases it;
        None if all is closed.

        Args:
            number: which block.
            borrower: who needs it.
            holding: whether this thread has borrowed another block meanwhile.

        Raises:
            ShardkitError: it cannot be read.
        """
        owner = self._owner
        buffer = owner.buffers[number]
        buffer.borrowers.add(borrower)  # before the look at the read: see "The fast path"
        read = buffer.read
        loaded = None if read is None or buffer.stale else read.loaded
        if loaded is None or self._is_closing:
            return self._borrow_later(buffer, Request(number, borrower, self._habit(), holding))
        if not owner.is_settled:
            owner.post(partial(owner.on_use, number, self._habit()))
        loaded.ticket.precede()
        self._counters.borrowed(hit=True)
        return loaded.tensors

    def release(self, number: int, borrower: Hashable, *, written: bool = False) -> None:
        """End what *borrower* has borrowed of the block *number*, if it has; if the block was
        *written* to, it is read again.

        Raises:
            LoadError: this is the child of a fork, and the process forked while this or another
                block was borrowed in this thread. It is raised once.
        """
        owner = self._owner
        buffer = owner.buffers[number]
        if borrower not in buffer.borrowers:
            self._raise_forked(borrower)
            return
        slot = buffer.slot
        if slot is not None and (memory := slot.memory) is not None:
            used = self.lane.issued(memory)
            slot.after[used.line] = used
        if written:
            owner.ask(partial(owner.on_written, buffer))
        buffer.borrowers.discard(borrower)
        if self._is_closing:
            owner.end(partial(owner.on_release, buffer))
        elif owner.wants_releases or buffer.stale or (slot is not None and not slot.in_ring):
            owner.post(partial(owner.on_release, buffer))

    def prefetch(self, numbers: Iterable[int], priority: Priority = Priority.NEXT) -> None:
        """Read the blocks *numbers* ahead, which need not be what was expected.

        Args:
            numbers: the blocks, the most urgent first.
            priority: with `NOW`, they take the memory of any block that nobody borrows; else only
                of those that are not expected to be needed.
        """
        self._owner.post(partial(self._owner.on_prefetch, tuple(numbers), priority))

    def rest(self) -> None:
        """Return when all is over that is being read now."""
        for read in self._owner.ask(self._owner.reads):
            read.wait()

    def close(self) -> None:
        """Give back threads and files, once the reads that were begun are over; and the memory,
        once nothing in it is borrowed.
        """
        self._is_closing = True
        self._owner.close()

    def __deepcopy__(self, memo: object) -> Stream:
        return self

    def _borrow_later(self, buffer: BlockBuffer, request: Request) -> BlockTensors | None:
        """The same for a block that was not ready when the look at *buffer* was taken."""
        begun = time.perf_counter()
        owner, number, borrower = self._owner, request.number, request.borrower
        read = buffer.read
        if self._is_closing:
            buffer.borrowers.discard(borrower)
            owner.post(partial(owner.on_release, buffer))
            return None
        if read is None or read.failed or buffer.stale:
            owner.post(partial(owner.on_request, request))
        else:
            request.wait_for(read)
            owner.post(partial(owner.on_use, number, request.habit))
        try:
            while not request.bell.acquire(timeout=PATIENCE):
                # An interrupt may have kept another thread from posting what it released.
                owner.post(owner.serve_waiting)
            read = request.answer()
            loaded = None if read is None else read.result()
        except Exception:
            self.release(number, borrower)
            raise
        if loaded is None:
            self.release(number, borrower)
            return None
        loaded.ticket.precede()
        self._counters.borrowed(waited=time.perf_counter() - begun)
        return loaded.tensors

    def _habit(self) -> Habit:
        if not hasattr(self.thread, "habit"):
            self.thread.habit = Habit(len(self._owner.buffers))
        habit: Habit = self.thread.habit
        return habit

    def _raise_forked(self, borrower: Hashable) -> None:
        if borrower in self._in_flight_at_fork:
            self._in_flight_at_fork = set()
            raise LoadError(
                "this process was forked during a forward of a model that streams its weights, and "
                "that forward cannot go on in the child",
                hint="run the model again, which reads what it needs; or fork between two forwards",
            )

    def _forked(self) -> None:
        """Begin again in the child of a fork. No lock from before is asked for: who had it may not
        be there.
        """
        before = self._owner
        self._in_flight_at_fork.update(*(buffer.borrowers for buffer in before.buffers))
        if self.lane.apart:
            # A device is its parent's, and that alone can let go of what is there.
            never_free(before)
        self._counters = self._counters.inherited()
        buffers = [buffer.absent() for buffer in before.buffers]
        self._owner = Owner(buffers, self.lane, self.room, self._verify, self._counters)
        self._owner.is_closed = before.is_closed
