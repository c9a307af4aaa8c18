"""Threads: a pool that still accepts work after the main thread has ended, and `each`, which maps a
function over items.

The standard library's pool refuses work from then on, although other threads may still run. In
`each`, the first failure or an interrupt stops the other items.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast

from shardkit.system.progress import OnBytes

_P = ParamSpec("_P")
_R = TypeVar("_R")

_Task = tuple[Future[Any], Callable[[], object]]  # Any: each has a type of its own


class Pool(Executor):
    """Threads that end when it is shut down, as a `with` does."""

    def __init__(self, count: int, name: str) -> None:
        """Start none yet.

        Args:
            count: how many there may be.
            name: theirs, before a number.
        """
        self._count = count
        self._name = name
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        """Let a thread call *fn*, after what was submitted before."""
        future: Future[_R] = Future()
        self._tasks.put((future, partial(fn, *args, **kwargs)))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}")
            self._threads.append(
                thread
            )  # first: an interrupt while it starts must not hide it from shutdown
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end, after all that was submitted; or, with *cancel_futures*, after what
        they are at.
        """
        while cancel_futures and (task := self._waiting()):
            task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            if thread.ident is not None:  # else an interrupt came before it was started
                thread.join()

    def _waiting(self) -> _Task | None:
        with suppress(Empty):
            return self._tasks.get_nowait()
        return None

    def _work(self) -> None:
        while task := self._tasks.get():
            _do(*task)
            del task  # what is done is not kept while the next is waited for


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
