"""Threads: `Exclusive`, which lets one thread at a time call a function; `Workers`, which start on
demand and end when they are idle; `Pool`, an executor of them that still accepts work after the
main thread has ended; and `each`, which maps a function over items.

The standard library's pool refuses work from then on, although other threads may still run. In
`each`, the first failure or an interrupt stops the other items.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from shardkit.system.progress import OnBytes

_P = ParamSpec("_P")
_R = TypeVar("_R")

Task = Callable[[], object]

_IDLE = 0.05  # seconds for which an idle thread is kept: to start one takes longer than to wake it


class Exclusive:
    """Lets one thread at a time call a function, and no interrupt leaves it locked.

    A plain `with lock` does not promise the latter: since Python 3.14, Ctrl-C can be raised after
    the lock was taken and before the body begins. Here the lock is taken inside the `try`, and the
    lock itself knows whether that happened:

    1. Python raises KeyboardInterrupt when a function begins, after a call, and at the turn of a
       loop, never between. So nothing is raised between `try` and the call of `acquire`, nor
       between the begin of `finally` and the call of `release`, however often Ctrl-C is pressed.
    2. `acquire` either takes the lock, or raises while it waits and does not take it. In the first
       case `release` gives the lock back, also where the interrupt comes as `acquire` returns.
    3. In the second case `release` refuses, because an RLock belongs to one thread. A thread that
       owns the lock already, as when a finalizer runs in the middle of a call, never waits, so its
       outer call keeps the lock.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def call(self, act: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """What *act* returns. The same thread may call it again from inside *act*."""
        lock = self._lock
        try:
            lock.acquire()
            return act(*args, **kwargs)
        finally:
            try:  # noqa: SIM105 - a call before `release` would let an interrupt in
                lock.release()
            except RuntimeError:  # an interrupt ended the wait for it
                pass


class Workers:
    """A few threads that do the tasks of one queue.

    They start on demand and end soon after there is nothing to do, so that nobody has to stop them
    before the process can end.

    Any thread may call `wake`, and may be interrupted in it by Ctrl-C: a worker that was taken from
    the idle ones and not woken looks for tasks when its time is over, and a thread that the main
    thread wants is started by another (see `_start_aside`).
    """

    def __init__(
        self,
        count: int,
        name: str,
        next_task: Callable[[], Task | None],
        has_task: Callable[[], bool],
    ) -> None:
        """Start no thread.

        Args:
            count: the largest number of threads.
            name: of each thread, before a number.
            next_task: takes a task from the queue, which must not raise; None if there is none.
            has_task: whether there is one.
        """
        self._name = name
        self._next_task = next_task
        self._has_task = has_task
        self._places = deque(range(count))
        self._threads: set[threading.Thread] = set()
        self._idle: list[threading.Lock] = []
        self._lingers = True

    @property
    def has_current_thread(self) -> bool:
        """Whether the calling thread is one of them."""
        return threading.current_thread() in self._threads

    def wake(self) -> None:
        """Call this after a task was put into the queue."""
        with suppress(IndexError):
            self._idle.pop().release()
            return
        if self._places:
            thread = threading.Thread(target=self._work, name=self._name)
            is_main = threading.current_thread() is threading.main_thread()
            try:
                _start_aside(partial(self._start, thread)) if is_main else self._start(thread)
            except RuntimeError:  # the system allows no more
                if not self._threads:
                    raise

    def join(self) -> None:
        """Return when all tasks are done and the threads have ended; from now on they end at once
        when there is nothing to do.
        """
        self._lingers = False
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().release()
        for thread in self._threads - {threading.current_thread()}:
            while thread in self._threads:
                try:
                    thread.join()
                    break
                except RuntimeError:  # it is just being started
                    time.sleep(0.001)

    def _start(self, thread: threading.Thread) -> None:
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            raise

    def _work(self) -> None:
        try:
            place = self._places.pop()
        except IndexError:  # another thread was faster
            self._threads.discard(threading.current_thread())
            return
        threading.current_thread().name = f"{self._name}_{place}"
        try:
            while True:
                while (task := self._next_task()) is not None:
                    task()
                    del task  # what is done is not kept while the next is waited for
                if not self._rest():
                    return
        finally:
            self._places.append(place)
            self._threads.discard(threading.current_thread())
            if self._has_task():  # it came after this thread had looked
                self.wake()

    def _rest(self) -> bool:
        """Wait to be woken; False if that takes long."""
        bell = threading.Lock()
        bell.acquire()
        self._idle.append(bell)
        wanted = self._has_task() or (self._lingers and bell.acquire(timeout=_IDLE))
        try:
            self._idle.remove(bell)
        except ValueError:  # somebody wakes this thread just now
            return True
        return wanted


def _start_aside(start: Callable[[], object]) -> None:
    """Call *start*, which starts a thread, in a thread of its own, and wait for it.

    Ctrl-C in `Thread.start` may leave locks held without which no thread can begin or end. It is
    raised in the main thread alone, which here only creates a bare thread and waits for a lock.

    Raises:
        RuntimeError: the system allows no more threads.
    """
    done = threading.Lock()
    done.acquire()
    errors: list[RuntimeError] = []

    def call() -> None:
        try:
            start()
        except RuntimeError as error:
            errors.append(error)
        finally:
            done.release()

    _thread.start_new_thread(call, ())
    done.acquire()
    if errors:
        raise errors.pop()


class Pool(Executor):
    """Threads that end when it is shut down, as a `with` does."""

    def __init__(self, count: int, name: str) -> None:
        """Start none yet.

        Args:
            count: how many there may be.
            name: theirs, before a number.
        """
        self._tasks: deque[tuple[Future[Any], Task]] = deque()  # Any: each has a type of its own
        self._workers = Workers(count, name, self._next, lambda: bool(self._tasks))

    def submit(self, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        """Let a thread call *fn*, after what was submitted before."""
        future: Future[_R] = Future()
        self._tasks.append((future, partial(fn, *args, **kwargs)))
        self._workers.wake()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end, after all that was submitted; or, with *cancel_futures*, after what
        they are at.
        """
        with suppress(IndexError):
            while cancel_futures:
                self._tasks.popleft()[0].cancel()
        if wait:
            self._workers.join()

    def _next(self) -> Task | None:
        with suppress(IndexError):
            return partial(_do, *self._tasks.popleft())
        return None


def _do(future: Future[Any], act: Callable[[], object]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = act()
    except BaseException as error:  # noqa: BLE001 - raised again by who waits
        future.set_exception(error)
        del future  # a frame that holds what was raised in it is a circle, and would keep memory
    else:
        future.set_result(result)


Item = TypeVar("Item")
Result = TypeVar("Result")

TOGETHER = 8  # files read side by side: more do not help one disk


def each(
    function: Callable[[Item, OnBytes], Result], items: Iterable[Item], on_bytes: OnBytes
) -> list[Result]:
    """What *function* gives of each of *items*, in their order.

    Args:
        function: called, from any thread, with an item and with what it has to report the bytes it
            has read to.
        items: they are all taken at once.
        on_bytes: called, from any thread, with those numbers.
    """
    wanted = list(items)
    results: list[Result | None] = [None] * len(wanted)
    failures: dict[int, BaseException] = {}
    stop = threading.Event()
    numbers = iter(
        range(len(wanted))
    )  # of which each thread takes the next: a step that no other thread can interrupt

    def report(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        on_bytes(count)

    def work() -> None:
        for number in numbers:
            if stop.is_set():
                return
            try:
                results[number] = function(wanted[number], report)
            except _Stopped:
                return
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures[number] = error
                stop.set()

    together = min(TOGETHER, os.cpu_count() or 1, len(wanted))
    with Pool(max(1, together), "shardkit-read") as pool:
        try:
            for future in [pool.submit(work) for _ in range(together)]:
                future.result()
        finally:
            stop.set()
    try:
        if failures:
            raise failures[min(failures)]
    finally:
        failures.clear()  # a frame that holds what raised is a circle, and would keep memory
    return cast(list[Result], results)


class _Stopped(BaseException):
    """Another item failed, or the run was interrupted."""
