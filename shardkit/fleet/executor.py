"""Who does the units of work: the protocol, and threads as its first implementation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cache, partial
from typing import Protocol

from shardkit.events import Event, OnEvent
from shardkit.system.progress import OnBytes
from shardkit.system.rate_limit import RateLimit
from shardkit.system.threads import TOGETHER, Pool
from shardkit.writing import reference_check
from shardkit.writing.copier import can_clone
from shardkit.writing.writer import Done, Means, Work, write_one


class Executor(Protocol):
    """Does units of work, in any order and anywhere, with `write_one`.

    What it raises ends the run: the other units are not begun, or end early, and what is complete
    stays on record.
    """

    def __call__(self, work: Sequence[Work], on_event: OnEvent) -> Iterator[Done]:
        """Do all of *work*, and yield what came of each as it ends.

        Args:
            work: the largest first.
            on_event: called, from any thread, when a unit is started, has written bytes, and is
                finished.

        Raises:
            FormatError: a source cannot be read.
            OutputError: a file cannot be written.
        """
        ...


class Threads:
    """Threads of this process."""

    def __init__(self, jobs: int | None = None, limit: RateLimit | None = None) -> None:
        """Start none yet.

        Args:
            jobs: units done at a time; None to choose by the number of processors.
            limit: how many bytes may be moved in a second; None for as many as there can be.
        """
        self._jobs = jobs
        self._limit = limit

    def __call__(self, work: Sequence[Work], on_event: OnEvent) -> Iterator[Done]:
        if not work:
            return
        together = self._jobs or _at_a_time(work)
        folder, stop, exclusive = work[0].folder, threading.Event(), threading.Lock()
        clones = cache(lambda path: can_clone(path, folder))

        def tell(event: Event) -> None:
            with exclusive:
                on_event(event)

        with (
            Pool(together, "shardkit-compress") as frames,
            Pool(together, "shardkit-write") as pool,
        ):

            def do(unit: Work) -> Done:
                file = unit.file
                tell(Event("started", file.name, file.nbytes))
                on_bytes = _written(file.name, tell, stop)
                means = Means(clones, frames, together + 1, on_bytes, self._limit, stop)
                done = write_one(unit, means)
                tell(Event("finished", file.name, file.nbytes))
                return done

            futures = [pool.submit(partial(do, unit)) for unit in work]
            if any(unit.is_safetensors and unit.file.codec is None for unit in work):
                frames.submit(reference_check.fetch)  # these threads have little to do here
            # Where one fails, or the run is interrupted, the others stop too.
            try:
                yield from _as_they_end(futures)
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
                _raise_first_failure(futures)


def _written(name: str, tell: Callable[[Event], None], stop: threading.Event) -> OnBytes:
    def on_bytes(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        tell(Event("written", name, count))

    return on_bytes


def _at_a_time(work: Iterable[Work]) -> int:
    """As many units as keep all processors at work.

    Shards are seldom as many as the processors, or a multiple: with one file more, the system evens
    out what is left of them. But one that is compressed takes all processors by itself, and memory.
    """
    processors = os.cpu_count() or 1
    is_compressed = any(unit.file.codec for unit in work)
    return min(TOGETHER, processors if is_compressed else processors + 1)


def _as_they_end(futures: Iterable[Future[Done]]) -> Iterator[Done]:
    """What each gave, until one fails."""
    left = set(futures)
    while left:
        ended, left = wait(left, return_when=FIRST_COMPLETED)
        for future in ended:
            if future.exception() is not None:
                return
            yield future.result()


def _raise_first_failure(futures: Iterable[Future[Done]]) -> None:
    """Raise what went wrong first; that others then stopped is no news."""
    for future in futures:
        if future.done() and not future.cancelled():
            error = future.exception()
            if error is not None and not isinstance(error, _Stopped):
                raise error


class _Stopped(BaseException):
    """Another unit failed, or the run was interrupted."""
