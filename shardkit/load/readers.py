"""Reader threads: what is to be filled waits in one queue, and several of them work on what stands first.

1. A filling is done when all its jobs are over. After one that fails no other of it is begun, and the filling fails with the
   same error, or as stopped where that would end a thread; the reader goes on with the next.
2. A filling that no job of was begun can be cancelled, or brought to the front.
3. Readers that have nothing to do hold nothing, and end when nobody has a `Readers` any more.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

from shardkit.errors import LoadError
from shardkit.load.lanes import Ticket

_NAME = "shardkit-stream"  # of the threads

Job = Callable[[], object]


class Filling:
    """A page on its way into memory."""

    def __init__(self, jobs: Iterable[Job], finish: Callable[[], Ticket]) -> None:
        """Begin nothing yet.

        Args:
            jobs: what is to be done first, side by side.
            finish: what is done after them, by the thread that does the last of them; its result is that of the filling.
        """
        self.done: Future[Ticket] = Future()
        self._jobs = deque(jobs) or deque([_nothing])
        self.count = len(self._jobs)
        self._left = self.count
        self._finish = finish
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    @property
    def waits(self) -> bool:
        """Whether a job of it can be begun."""
        return bool(self._jobs)

    def begin(self) -> Job | None:
        """The next of its jobs, for the caller to `run`; None if it was cancelled. Only the queue calls this."""
        if self._left == len(self._jobs) and not self.done.running() and not self.done.set_running_or_notify_cancel():
            self._jobs.clear()
            return None
        return self._jobs.popleft()

    def run(self, job: Job) -> None:
        """Do *job*, and finish the filling if it is the last."""
        try:
            if self._error is None:
                job()
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            self._error = error
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._end()

    def _end(self) -> None:
        error, self._error = self._error, None
        if error is None:
            try:
                self.done.set_result(self._finish())
            except BaseException as raised:  # noqa: BLE001 - likewise
                error = raised
        if error is not None:
            self.done.set_exception(error if isinstance(error, Exception) else _stopped(error))
        del error  # a frame that holds what was raised in it is a circle, and would keep memory


class Readers:
    """A few threads, and what they have to do."""

    def __init__(self, count: int, busy: Callable[[], AbstractContextManager[None]]) -> None:
        """Start no thread yet.

        Args:
            count: how many there may be.
            busy: entered by each as long as it has something to do.
        """
        self._pool = ThreadPoolExecutor(count, _NAME)
        self._beside = weakref.WeakSet[threading.Thread]()
        self._count = count
        self._busy = busy
        self._lock = threading.Lock()
        self._queue: deque[Filling] = deque()
        self._at_work = 0

    def take(self, filling: Filling, *, first: bool) -> None:
        """Do *filling*, *first* or after all others."""
        with self._lock:
            (self._queue.appendleft if first else self._queue.append)(filling)
            more = min(self._count - self._at_work, filling.count)
            self._at_work += more
        for _ in range(more):
            self._start()

    def hurry(self, done: Future[Ticket]) -> None:
        """Bring the filling that ends with *done* to the front, if it was not begun."""
        with self._lock:
            waiting = next((each for each in self._queue if each.done is done), None)
            if waiting is not None and not done.running():
                self._queue.remove(waiting)
                self._queue.appendleft(waiting)

    def close(self) -> None:
        """Let the threads end when they have done what there is to do, and wait for that; but no reader waits for readers."""
        waits = not threading.current_thread().name.startswith(_NAME)
        self._pool.shutdown(wait=waits)
        while waits and (thread := self._one_beside()):
            thread.join()

    def _start(self) -> None:
        try:
            self._pool.submit(self._work)
        except RuntimeError:  # the main thread has ended, and pools take nothing more; but others may go on
            thread = threading.Thread(target=self._work, name=_NAME)
            thread.start()
            with self._lock:
                self._beside.add(thread)

    def _one_beside(self) -> threading.Thread | None:
        """A thread beside the pool that has not ended."""
        with self._lock:
            return next((thread for thread in self._beside if thread.is_alive()), None)

    def _work(self) -> None:
        try:
            with self._busy():
                while found := self._next():
                    filling, job = found
                    filling.run(job)
                    del found, filling, job  # what is done is not kept while the next is waited for
        finally:
            self._leave()

    def _leave(self) -> None:
        """One is not at work any more; if that is not because there is none, another comes."""
        with self._lock:
            more = bool(self._queue)
            self._at_work -= not more
        if more:
            self._start()

    def _next(self) -> tuple[Filling, Job] | None:
        with self._lock:
            while self._queue:
                filling = self._queue[0]
                job = filling.begin() if filling.waits else None
                if not filling.waits:
                    self._queue.popleft()
                if job is not None:
                    return filling, job
            return None


def held_here(lock: threading.Condition) -> bool:
    """Whether this thread has *lock*."""
    try:
        lock.notify(0)
    except RuntimeError:
        return False
    return True


def _nothing() -> None:
    return


def _stopped(error: BaseException) -> LoadError:
    """What tells those who wait that a reader was told to end: nobody told them to."""
    told = LoadError("a thread that reads weights was stopped", hint="run the model again")
    told.__cause__ = error
    return told
