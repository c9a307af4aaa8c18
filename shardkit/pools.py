"""A pool of threads that, unlike the standard library's, can be used after the main thread has ended: other threads may go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

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
            self._threads.append(thread)  # first: an interrupt while it starts must not hide it from shutdown
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end, after all that was submitted; or, with *cancel_futures*, after what they are at."""
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
