"""Reader threads: what is to be filled waits in one queue, and several of them work on what stands
first.

1. A filling is over when all its jobs are. After one that fails no other of it is begun, and the
   filling fails with the same error, or as stopped where that would end a thread; the reader goes
   on with the next.
2. A filling that no job of was begun can be given up, or brought to the front.
3. Readers that have nothing to do hold nothing, and end soon. So nobody has to end them before the
   process can, and there are none left over from what is forgotten.
4. What a thread that gives them work was interrupted in, the next that does completes. Whoever
   waits for them does so by a plain lock, which Python takes and guards in one step; an interrupt
   could leave that of a `Future` or an `Event` behind.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from shardkit.errors import LoadError
from shardkit.load.devices.transfers import Ticket

_NAME = "shardkit-stream"  # of the threads
# seconds for which one that has nothing to do is kept: to start one costs little, but more than to
# wake it
_LONG = 0.05

Job = Callable[[], object]


class PendingRead:
    """A page on its way into memory."""

    def __init__(
        self, jobs: Iterable[Job], finish: Callable[[], Ticket], landed: Callable[[], None]
    ) -> None:
        """Begin nothing yet.

        Args:
            jobs: what is to be done first, side by side.
            finish: what is done after them, by the thread that does the last of them; its result is
                that of the filling.
            landed: called when it is over, but for one that was given up.
        """
        self._jobs = deque(jobs) or deque([_nothing])
        self._left = len(self._jobs)
        self._finish: Callable[[], Ticket] | None = finish
        self._landed = landed
        self._begun = False
        self._ticket: Ticket | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._flying = threading.Lock()
        self._flying.acquire()

    @classmethod
    def over_with(cls, ticket: Ticket) -> PendingRead:
        """One that is over, and gave *ticket*."""
        filling = cls((), lambda: ticket, _nothing)
        filling._jobs.clear()
        filling._begun, filling._ticket, filling._finish = True, ticket, None
        filling._flying.release()
        return filling

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
    def failed(self) -> bool:
        """Whether it is over, and nothing came of it."""
        return self.over and self._ticket is None

    def result(self) -> Ticket:
        """What finishing it gave, once it is over.

        Raises:
            Exception: what went wrong.
        """
        self.wait()
        if self._ticket is not None:
            return self._ticket
        try:
            raise self._error or _stopped(None)
        finally:
            del self  # a frame that holds what was raised in it is a circle, and would keep memory

    def wait(self) -> None:
        """Return when it is over, whatever came of it."""
        with self._flying:
            pass

    def give_up(self) -> bool:
        """See to it that no reader works on it; False if one does."""
        with self._lock:
            if not self._begun and self._finish is not None:
                self._jobs.clear()
                self._finish = None
                self._flying.release()
            return self.over

    def begin(self) -> Job | None:
        """The next of its jobs, for the caller to `run`; None if there is none. Only the queue
        calls this.
        """
        with self._lock:
            self._begun = self._begun or bool(self._jobs)
            return self._jobs.popleft() if self._jobs else None

    def run(self, job: Job) -> None:
        """Do *job*, and finish the filling if it is the last."""
        error = _error_of(job) if self._error is None else None
        del job  # as `_error_of` does
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = not self._left
        if last:
            self._land()

    def _land(self) -> None:
        self._error = self._error or _error_of(self._bring)
        if self._error is not None and not isinstance(self._error, Exception):
            self._error = _stopped(self._error)
        self._finish = None
        self._flying.release()
        self._landed()

    def _bring(self) -> None:
        assert self._finish is not None
        self._ticket = self._finish()


class Readers:
    """A few threads, and what they have to do."""

    def __init__(self, count: int, busy: Callable[[], AbstractContextManager[None]]) -> None:
        """Start no thread yet.

        Args:
            count: how many there may be.
            busy: entered by each as long as it has something to do.
        """
        self._count = count
        self._busy = busy
        self._lock = (
            threading.RLock()
        )  # the collector may run a finalizer, which closes, in the middle of anything
        self._queue: deque[PendingRead] = deque()
        self._threads: set[threading.Thread] = set()
        self._at_work: set[threading.Thread] = set()
        self._idle: list[threading.Lock] = []
        self._closed = False

    def take(self, filling: PendingRead, *, first: bool) -> None:
        """Do *filling*, *first* or after all others."""
        with self._lock:
            (self._queue.appendleft if first else self._queue.append)(filling)
            self._staff()

    def complete(self) -> None:
        """See that there are readers for what is to be done; see rule 4."""
        with self._lock:
            self._staff()

    def hurry(self, filling: PendingRead) -> None:
        """Bring *filling* to the front, if it was not begun."""
        with self._lock:
            if not filling.begun:
                self._queue = deque(sorted(self._queue, key=lambda each: each is not filling))

    def close(self) -> None:
        """Let the threads end when they have done what there is to do, and wait for that; but no
        reader waits for readers.
        """
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().release()
            threads = set(self._threads)
        for thread in threads if not threading.current_thread().name.startswith(_NAME) else ():
            thread.join()

    def _staff(self) -> None:
        """Let as many threads work as there is work for; under the lock."""
        wanted = min(
            self._count, len(self._at_work) + sum(filling.waiting for filling in self._queue)
        )
        while len(self._threads) - len(self._idle) < wanted:
            if self._idle:
                self._idle.pop().release()
            else:
                thread = threading.Thread(target=self._work, name=_NAME)
                thread.start()
                self._threads.add(thread)

    def _work(self) -> None:
        bell = threading.Lock()
        bell.acquire()
        try:
            while True:
                with self._busy():
                    while found := self._next():
                        filling, job = found
                        filling.run(job)
                        del (
                            found,
                            filling,
                            job,
                        )  # what is done is not kept while the next is waited for
                if not self._rest(bell):
                    return
        finally:
            self._leave()

    def _next(self) -> tuple[PendingRead, Job] | None:
        """What this thread is at from now on."""
        with self._lock:
            self._at_work.discard(threading.current_thread())
            while self._queue:
                filling = self._queue[0]
                job = filling.begin()
                if not filling.waiting:
                    self._queue.popleft()
                if job is not None:
                    self._at_work.add(threading.current_thread())
                    return filling, job
            return None

    def _rest(self, bell: threading.Lock) -> bool:
        """Wait for something to do, which somebody rings the *bell* for; False if that takes long,
        or everything is closed.
        """
        with self._lock:
            if self._queue:
                return True
            if self._closed:
                return False
            self._idle.append(bell)
        if bell.acquire(timeout=_LONG):
            return True
        with self._lock:
            if bell not in self._idle:  # it has just been rung
                bell.acquire(blocking=False)
                return True
            self._idle.remove(bell)
            self._threads.discard(threading.current_thread())
            return False

    def _leave(self) -> None:
        """One is not at work any more; if there is still something to do, another comes."""
        with self._lock:
            self._threads.discard(threading.current_thread())
            self._at_work.discard(threading.current_thread())
            self._staff()


def held_here(lock: threading.Condition) -> bool:
    """Whether this thread has *lock*."""
    try:
        lock.notify(0)
    except RuntimeError:
        return False
    return True


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
    """What tells those who wait that a reader was told to end: nobody told them to."""
    told = LoadError("a thread that reads weights was stopped", hint="run the model again")
    told.__cause__ = error
    return told
