"""What a stream has done so far, counted where it is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
    """Counts that any thread adds to.

    Under the lock stand additions only, and no call: so no finalizer, which might wait for another
    thread, runs there.
    """

    def __init__(self) -> None:
        """Nothing was done."""
        self._lock = threading.Lock()
        self._disk = self._memory = self._reads = self._borrows = self._hits = 0
        self._reading = self._waited = self._begun = 0.0
        self._under_way = 0

    def inherited(self) -> LiveCounters:
        """The same for the child of a fork, where nothing is under way; who has the lock may not be
        there.
        """
        mine = LiveCounters()
        mine._disk, mine._memory, mine._reads = self._disk, self._memory, self._reads
        mine._borrows, mine._hits = self._borrows, self._hits
        mine._reading, mine._waited = self._reading, self._waited
        return mine

    @property
    def counts(self) -> Counters:
        """What was done up to now; of a read that is under way, its time."""
        now = time.perf_counter()
        with self._lock:
            reading = self._reading + (now - self._begun if self._under_way else 0.0)
            disk, memory, reads = self._disk, self._memory, self._reads
            waited, borrows, hits = self._waited, self._borrows, self._hits
        return Counters(disk, memory, reads, reading, waited, borrows, hits)

    def read(self, *, disk: int = 0, memory: int = 0) -> None:
        """A block was read."""
        with self._lock:
            self._disk += disk
            self._memory += memory
            self._reads += 1

    def borrowed(self, *, waited: float, hit: bool) -> None:
        """A forward has its weights."""
        with self._lock:
            self._waited += waited
            self._borrows += 1
            self._hits += hit

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A read, or one of several parts of it, is under way."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        now = time.perf_counter()
        with self._lock:
            if self._under_way:
                self._reading += now - self._begun
            self._begun = now
            self._under_way += more
