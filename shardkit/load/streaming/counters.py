"""What a stream has done so far, counted where it is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident


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


@dataclass(frozen=True, slots=True)
class _Reads:
    """What was read, and since when *under_way* reads are."""

    disk: int = 0
    memory: int = 0
    reads: int = 0
    reading: float = 0.0
    since: float = 0.0
    under_way: int = 0


@dataclass(slots=True)
class _Borrows:
    """What the forwards of one thread borrowed."""

    waited: float = 0.0
    count: int = 0
    hits: int = 0


class LiveCounters:
    """Counts that any thread adds to.

    Only threads that read take the lock, because an interrupt may leave a lock held in a thread
    that runs a model. Such a thread counts what it borrows by itself, and between its additions
    stands no call, so that no interrupt comes between them.
    """

    def __init__(self) -> None:
        """Nothing was done."""
        self._lock = threading.Lock()
        self._reads = _Reads()
        # By the thread's number, which the system gives to another after its end.
        self._borrows: dict[int, _Borrows] = {}

    def inherited(self) -> LiveCounters:
        """The same for the child of a fork, where nothing is under way; who has the lock may not be
        there.
        """
        mine = LiveCounters()
        mine._reads = replace(self._reads, under_way=0)
        mine._borrows = self._borrows
        return mine

    @property
    def counts(self) -> Counters:
        """What was done up to now; of a read that is under way, its time."""
        now, reads, borrows = time.perf_counter(), self._reads, list(self._borrows.values())
        return Counters(
            disk=reads.disk,
            memory=reads.memory,
            reads=reads.reads,
            reading=reads.reading + (max(0.0, now - reads.since) if reads.under_way else 0.0),
            waited=sum(each.waited for each in borrows),
            claims=sum(each.count for each in borrows),
            hits=sum(each.hits for each in borrows),
        )

    def read(self, *, disk: int = 0, memory: int = 0) -> None:
        """A block was read, by a thread that runs no model."""
        with self._lock:
            done = self._reads
            self._reads = replace(
                done, disk=done.disk + disk, memory=done.memory + memory, reads=done.reads + 1
            )

    def borrowed(self, *, waited: float = 0.0, hit: bool = False) -> None:
        """A forward has its weights."""
        thread = get_ident()
        mine = self._borrows.get(thread) or self._borrows.setdefault(thread, _Borrows())
        mine.waited += waited
        mine.count += 1
        mine.hits += hit

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A read, or one of several parts of it, is under way, in a thread that runs no model."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        now = time.perf_counter()
        with self._lock:
            done = self._reads
            passed = now - done.since if done.under_way else 0.0
            self._reads = replace(
                done,
                reading=done.reading + passed,
                since=now,
                under_way=done.under_way + more,
            )
