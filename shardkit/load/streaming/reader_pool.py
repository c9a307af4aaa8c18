"""Reads, and the threads that do them: what is needed now comes first, then what is likely to be
needed next, then what may be.

1. A read is over when all its jobs are. After one job fails, no other job of it begins, and the
   read fails with the same error, or as stopped where that error would end a thread; the reader
   goes on with the next read.
2. The reader that does the last job wakes the threads that wait for the read itself, and posts a
   message to the owner of the state afterwards.
3. A read of which no job has begun can be cancelled or moved to the front. Only the owner does
   so, and only where no thread waits for the read.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import torch

from shardkit.errors import LoadError
from shardkit.load.devices.transfers import Ticket
from shardkit.system.threads import Task, Workers

READER_NAME = "shardkit-stream"  # of the threads

Job = Callable[[], object]


class Priority(IntEnum):
    """How urgent a read is."""

    NOW = 0
    NEXT = 1
    MAYBE = 2


class BlockTensors(tuple[torch.Tensor, ...]):
    """The tensors of a block, as one read has made them.

    Attributes:
        asking: of some of them, by their positions, the same as a parameter that requires a
            gradient. They share its memory and end with it.
    """

    asking: dict[int, torch.Tensor]

    def __new__(cls, tensors: Iterable[torch.Tensor] = ()) -> BlockTensors:
        made = super().__new__(cls, tensors)
        made.asking = {}
        return made


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a read gave.

    Attributes:
        tensors: those of the block.
        ticket: of their transfer to the device, which may not be done yet.
    """

    tensors: BlockTensors
    ticket: Ticket


class PendingRead:
    """A block on its way into memory, and then what came of it."""

    def __init__(
        self,
        jobs: Iterable[Job],
        finish: Callable[[], Loaded],
        completed: Callable[[], object],
        priority: Priority = Priority.NOW,
    ) -> None:
        """Begin nothing yet.

        Args:
            jobs: what is to be done first, side by side.
            finish: what is done after them, by the thread that does the last of them; its result is
                that of the read.
            completed: called when it is over, after those who wait were woken, but for one that was
                cancelled.
            priority: how urgent it is.
        """
        self.priority = priority
        self._jobs = deque(jobs) or deque([_nothing])
        self._left = len(self._jobs)
        self._finish: Callable[[], Loaded] | None = finish
        self._completed = completed
        self._begun = False
        self._loaded: Loaded | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._waiters: deque[threading.Lock] = deque()

    @classmethod
    def over_with(cls, loaded: Loaded) -> PendingRead:
        """One that is over, and gave *loaded*."""
        read = cls((), lambda: loaded, _nothing)
        read._jobs.clear()
        read._begun, read._loaded, read._finish = True, loaded, None
        return read

    @property
    def waiting(self) -> int:
        """How many of its jobs can be begun."""
        return len(self._jobs)

    @property
    def begun(self) -> bool:
        return self._begun

    @property
    def over(self) -> bool:
        return self._finish is None

    @property
    def succeeded(self) -> bool:
        return self._loaded is not None and self._finish is None

    @property
    def failed(self) -> bool:
        """Whether it is over, and nothing came of it."""
        return self._finish is None and self._loaded is None

    @property
    def loaded(self) -> Loaded | None:
        """What it gave; None if it is not over, or failed."""
        return self._loaded if self._finish is None else None

    def result(self) -> Loaded:
        """What it gave; it is over.

        Raises:
            Exception: what went wrong.
        """
        if self._loaded is not None:
            return self._loaded
        try:
            raise self._error or _stopped(None)
        finally:
            del self  # a frame that holds what was raised in it is a circle, and would keep memory

    def add_waiter(self, bell: threading.Lock) -> None:
        """Release *bell*, which is locked, when the read is over: at once if it is.

        The caller wakes nobody but itself, so that no interrupt in it costs another thread its
        bell.
        """
        self._waiters.append(bell)
        if self._finish is None:
            ring(bell)
            with suppress(ValueError):
                self._waiters.remove(bell)

    def wait(self) -> None:
        """Return when it is over, whatever came of it."""
        bell = locked()
        self.add_waiter(bell)
        bell.acquire()

    def cancel(self) -> bool:
        """See to it that no reader works on it; False if one does."""
        with self._lock:
            if not self._begun and self._finish is not None:
                self._jobs.clear()
                self._finish = None
        if self._finish is None:
            self._wake()
        return self._finish is None

    def begin(self) -> Job | None:
        """The next of its jobs, for the caller to `run`; None if there is none. Only the queue
        calls this.
        """
        with self._lock:
            self._begun = self._begun or bool(self._jobs)
            return self._jobs.popleft() if self._jobs else None

    def run(self, job: Job) -> None:
        """Do *job*, and finish the read if it is the last."""
        error = _error_of(job) if self._error is None else None
        del job  # as `_error_of` does
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = not self._left
        if last:
            self._end()

    def _end(self) -> None:
        self._error = self._error or _error_of(self._load)
        if self._error is not None and not isinstance(self._error, Exception):
            self._error = _stopped(self._error)
        self._finish = None
        self._wake()
        self._completed()

    def _load(self) -> None:
        assert self._finish is not None
        self._loaded = self._finish()

    def _wake(self) -> None:
        with suppress(IndexError):
            while True:
                ring(self._waiters.popleft())


class Readers:
    """The threads of one stream: some read, and one at a time does the messages of the owner.

    A thread that has done messages goes on with the read that they asked for, and one that has
    completed a read goes on with the message of it: to wake another thread takes longer than most
    reads.
    """

    def __init__(self, count: int, busy: Callable[[], AbstractContextManager[None]]) -> None:
        """Start no thread yet.

        Args:
            count: how many reads there may be side by side.
            busy: entered around each job.
        """
        self._count = count
        self._busy = busy
        self._lock = threading.Lock()
        self._running = 0
        self._queues: tuple[deque[PendingRead], ...] = tuple(deque() for _ in Priority)
        self._messages: deque[Task] = deque()
        self._role = threading.Lock()  # of the owner; who does messages has it
        # One more than read, so that messages wait for no read.
        self._workers = Workers(count + 1, READER_NAME, self._next, self._has_task)

    @property
    def has_current_thread(self) -> bool:
        """Whether the calling thread is one of them."""
        return self._workers.has_current_thread

    def post(self, message: Task) -> None:
        """Do *message* after those that were posted before, while no other is done.

        Raises:
            LoadError: there is no thread, and none can be started.
        """
        self._messages.append(message)
        # Who has the role looks again when it has given it back, and so does a thread of this pool.
        if not self._role.locked() and not self.has_current_thread:
            self._wake()

    def do_here(self, message: Task) -> None:
        """Do *message* in this thread, in which no Ctrl-C can be raised; or let it be done by the
        thread that does messages now.

        Raises:
            LoadError: likewise.
        """
        self._messages.append(message)
        if self._role.acquire(blocking=False):
            self._do_messages()
        if self._has_task():
            self._wake()

    def take(self, read: PendingRead) -> None:
        """Do *read*, after those that are as urgent.

        Raises:
            LoadError: there is no thread, and none can be started.
        """
        with self._lock:
            self._queues[read.priority].append(read)
        if not self.has_current_thread:  # else this thread begins with a job when it is done here
            self._wake()

    def hurry(self, read: PendingRead) -> None:
        """Do *read*, which was taken, before all others, if no job of it was begun."""
        with self._lock:
            if read.begun:
                return
            with suppress(ValueError):
                self._queues[read.priority].remove(read)
                read.priority = Priority.NOW
                self._queues[Priority.NOW].append(read)

    def join(self) -> None:
        """Return when the threads have done what there is to do, and have ended."""
        self._workers.join()

    def _wake(self) -> None:
        try:
            self._workers.wake()
        except RuntimeError as error:
            raise LoadError(
                "no thread could be started to read weights",
                hint="raise the limit of processes and threads (ulimit -u), or free some memory",
            ) from error

    def _has_task(self) -> bool:
        has_message = bool(self._messages) and not self._role.locked()
        return has_message or (self._running < self._count and any(self._queues))

    def _next(self) -> Task | None:
        if self._messages and self._role.acquire(blocking=False):
            return self._do_messages
        with self._lock:
            task = self._begin() if self._running < self._count else None
        if task is not None and self._has_task():  # each thread that begins a job wakes the next
            self._wake()
        return task

    def _begin(self) -> Task | None:
        """Take the next job, with the lock."""
        for queue in self._queues:
            while queue:
                read = queue[0]
                job = read.begin()
                if not read.waiting:
                    queue.popleft()
                if job is not None:
                    self._running += 1
                    return partial(self._run, read, job)
        return None

    def _do_messages(self) -> None:
        """Do all messages, having the role of the owner, and give it back."""
        try:
            while self._messages:
                self._messages.popleft()()
        finally:
            self._role.release()  # this thread looks for messages again, and so loses none

    def _run(self, read: PendingRead, job: Job) -> None:
        try:
            with self._busy():
                read.run(job)
                del job  # as `_error_of` does: an error keeps this frame
        finally:
            with self._lock:
                self._running -= 1


def locked() -> threading.Lock:
    """A lock to wait for: the first `acquire` returns when another thread has released it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def ring(bell: threading.Lock) -> None:
    """Let the thread go on that waits for *bell*, if nobody has done so yet."""
    with suppress(RuntimeError):
        bell.release()


def _nothing() -> None:
    return


def _error_of(act: Callable[[], object]) -> BaseException | None:
    """What *act* raises; who keeps that keeps its frames and those that called them, but no memory
    that they knew.
    """
    try:
        act()
    except BaseException as error:  # noqa: BLE001 - raised again by who waits
        for each in _chained(error):
            traceback.clear_frames(each.__traceback__)
        return error
    finally:
        del act
    return None


def _chained(error: BaseException) -> list[BaseException]:
    """*error* and those behind it."""
    found = [error]
    while (
        behind := found[-1].__cause__ or found[-1].__context__
    ) is not None and behind not in found:
        found.append(behind)
    return found


def _stopped(error: BaseException | None) -> LoadError:
    """What those who wait get if a reader was told to end: nobody told them to."""
    stopped = LoadError("a weight-loading thread was terminated", hint="run the model again")
    stopped.__cause__ = error
    return stopped
