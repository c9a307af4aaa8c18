"""What a stream has done so far, counted where it is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Counters:
    """What a stream did since it was made. Take two, before and after what is to be measured, and
    `since` tells the rest.

    Attributes:
        disk: bytes of files that were read for weights, as they are stored: compressed, or before a
            cast.
        memory: bytes of weights that came out of main memory.
        reads: pages that were read, of either kind.
        reading: seconds in which at least one read was under way; what several do side by side
            counts once.
        waited: seconds that forwards waited for weights, those of all threads together.
        claims: forwards of blocks.
        hits: those of them that found their weights there.
    """

    disk: int = 0
    memory: int = 0
    reads: int = 0
    reading: float = 0.0
    waited: float = 0.0
    claims: int = 0
    hits: int = 0

    def since(self, earlier: Counters) -> Counters:
        """What was done after *earlier*."""
        return Counters(
            *(getattr(self, name) - getattr(earlier, name) for name in Counters.__slots__)
        )


class LiveCounters:
    """Counts that any thread adds to; each method holds a lock for no longer than an addition
    takes.
    """

    def __init__(self) -> None:
        """Nothing was done."""
        self._lock = threading.Lock()
        self._counts = Counters()
        self._under_way = 0
        self._begun = 0.0

    def inherited(self) -> LiveCounters:
        """The same for the child of a fork, where nothing is under way; who has the lock may not be
        there.
        """
        tally = LiveCounters()
        tally._counts = self._counts
        return tally

    @property
    def counts(self) -> Counters:
        """What was done up to now; of a read that is under way, its time."""
        with self._lock:
            return replace(self._counts, reading=self._counts.reading + self._elapsed())

    def read(self, *, disk: int = 0, memory: int = 0) -> None:
        """A page was read."""
        with self._lock:
            now = self._counts
            self._counts = replace(
                now, disk=now.disk + disk, memory=now.memory + memory, reads=now.reads + 1
            )

    def claimed(self, *, waited: float, hit: bool) -> None:
        """A forward has its weights."""
        with self._lock:
            now = self._counts
            self._counts = replace(
                now, waited=now.waited + waited, claims=now.claims + 1, hits=now.hits + hit
            )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A read, or one of several parts of it, is under way."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            self._counts = replace(self._counts, reading=self._counts.reading + self._elapsed())
            self._begun = time.perf_counter()
            self._under_way += more

    def _elapsed(self) -> float:
        return time.perf_counter() - self._begun if self._under_way else 0.0
