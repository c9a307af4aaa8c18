"""Allocate the pages of fresh memory before it is filled: huge pages where they are faster than
small ones, which is measured.

1. Memory that a read touches first costs a page fault for each page. One call allocates many pages
   at half that cost, and other threads run meanwhile.
2. A huge page costs a quarter of the 512 small ones that it replaces, if its memory is available.
   It costs up to five times as much in a virtual machine whose host reclaims free memory, because
   the host reclaims large blocks only. So both kinds are timed by processor time, the cheaper kind
   is used, and the other one is tried again now and then.
3. Selecting the kind takes a lock of the process, for which the calls that allocate pages must end:
   two threads that select it each time would allocate one after the other. So it is selected once,
   for an entire arena.
4. All of this is advice. Where the system refuses it, the read that follows allocates the pages.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from shardkit.alignment import round_down
from shardkit.load.memory.arenas import HUGE, Arena

Advise = Callable[[int, int, int], bool]

_MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE = (
    14,
    15,
    23,
)  # of Linux; Python has no name for the last
_AGAIN = 16  # requests, after which the dearer kind of page is tried once


@dataclass(slots=True)
class _Range:
    """The addresses of an arena, and the kind of its pages, but for trials: huge, small, or as the
    system has it (None).
    """

    start: int
    stop: int
    huge: bool | None = None


class FirstTouch:
    """The pages of one load; any thread may ask for some."""

    def __init__(
        self, advise: Advise | None = None, clock: Callable[[], int] = time.thread_time_ns
    ) -> None:
        """Measure nothing yet.

        Args:
            advise: passes advice about memory (address, bytes, kind) to the system, and returns
                whether it was taken.
            clock: the processor time of the calling thread, in nanoseconds.
        """
        self._advise = advise or _madvise
        self._clock = clock
        self._arenas: dict[int, _Range] = {}  # by their mappings
        self._costs: dict[
            bool, float
        ] = {}  # what a byte took last, in huge pages (True) and in small ones
        self._requests = 0
        self._populates = advise is not None or sys.platform == "linux"

    def add(self, arena: Arena, nbytes: int) -> None:
        """Let memory of *arena*, which has *nbytes* bytes, be asked for."""
        if nbytes:
            start = address_of(arena.memory(0, nbytes))
            self._arenas[id(arena.mapping)] = _Range(start, start + nbytes)

    def bring(self, buffers: Sequence[memoryview]) -> None:
        """Allocate the pages of *buffers*, those of one arena in order; a huge page is allocated
        with its first byte.
        """
        known = [buffer for buffer in buffers if id(buffer.obj) in self._arenas and buffer]
        for mapping, of_one in groupby(known, key=lambda buffer: id(buffer.obj)):
            pieces = list(of_one)
            stop = address_of(pieces[-1]) + len(pieces[-1])
            self._bring_all(self._arenas[mapping], address_of(pieces[0]), stop)

    def _bring_all(self, arena: _Range, start: int, stop: int) -> None:
        small = (
            arena.stop - (arena.stop - arena.start) % HUGE
        )  # too short for a huge page from here on
        at = min(start + -(start - arena.start) % HUGE, small)
        end = min(stop + -(stop - arena.start) % HUGE, small)
        while at < end and self._populates:
            huge, pages, is_trial = self._next((end - at) // HUGE)
            if huge is not arena.huge:
                first, nbytes = (at, HUGE) if is_trial else (arena.start, small - arena.start)
                self._advise(first, nbytes, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
                arena.huge = arena.huge if is_trial else huge
            begun = self._clock()
            self._populate(at, at + pages * HUGE)
            self._costs[huge] = (self._clock() - begun) / (pages * HUGE)
            at += pages * HUGE
        if at < end:
            self._advise(at, end - at, _MADV_HUGEPAGE)
        if stop > small:
            self._populate(max(start, small), stop)

    def _next(self, left: int) -> tuple[bool, int, bool]:
        """Whether the next pages are huge, how many times `HUGE` bytes they are, out of *left*, and
        whether they are a trial.
        """
        self._requests += 1
        if len(self._costs) < 2:
            return True not in self._costs, 1, True
        huge = self._costs[True] <= self._costs[False]
        return (huge, left, False) if self._requests % _AGAIN else (not huge, 1, True)

    def _populate(self, start: int, stop: int) -> None:
        start = round_down(start, mmap.PAGESIZE)
        self._populates = self._populates and self._advise(
            start, stop - start, _MADV_POPULATE_WRITE
        )


def address_of(memory: memoryview) -> int:
    """Where *memory*, which may be written and is not empty, begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _madvise(start: int, nbytes: int, advice: int) -> bool:
    return bool(_libc_madvise()(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice) == 0)


@cache
def _libc_madvise() -> ctypes._NamedFuncPointer:
    return ctypes.CDLL(None).madvise  # which, unlike mmap.madvise, lets other threads run
