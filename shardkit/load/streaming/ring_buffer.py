"""The ring: one memory, made once, in which pages of any size get their places one behind the
other, round and round.

1. The next place is sought behind the last one. What lies there was filled the longest ago, so that
   in a cycle of pages each takes the place of the one that is not needed for the longest time. What
   must stay is stepped over.
2. Who takes a place waits for what was issued on the same bytes, and gets the tickets of it with
   the place.
3. A tensor belongs to one filling of one place. When the place goes to another page, that counts as
   a change of it, so that autograd refuses a backward that comes too late.
4. It has no lock: whoever uses it holds one. Whoever is interrupted says afterwards what it is to
   `keep`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import increment_version

from shardkit.errors import OverBudget
from shardkit.load.devices.transfers import DeviceTransfer, Ticket
from shardkit.load.streaming.page_layout import Layout
from shardkit.sizes import format_size, parse_size


@dataclass(eq=False, slots=True)
class Slot:
    """Where one page is.

    Attributes:
        number: of the page.
        start: where in the ring it begins; -1 for a place beside it.
        nbytes: its length.
        memory: it, on the device.
        host: the same in main memory: memory itself where that is main memory, or what its page is
            kept in.
        before: what must be done before the host memory changes: copies out of it.
        after: what must be done before the memory of the device changes: the last that used it of
            each line of work.
        tensors: those of the page that is there.
    """

    number: int
    start: int
    nbytes: int
    memory: torch.Tensor | None = None
    host: torch.Tensor | None = None
    before: list[Ticket] = field(default_factory=list)
    after: dict[Hashable, Ticket] = field(default_factory=dict)
    tensors: tuple[torch.Tensor, ...] = ()

    @property
    def in_ring(self) -> bool:
        return self.start >= 0

    def overlaps(self, other: Slot) -> bool:
        return self.start < other.start + other.nbytes and other.start < self.start + self.nbytes

    def fill(self, job: Callable[[], object]) -> None:
        """Do *job*, which writes to the host memory, unless the place was taken back."""
        for ticket in self.before:
            ticket.finish()
        if self.host is not None:
            job()


def room_for(sizes: Iterable[int], ring: int | str) -> int:
    """The bytes of a ring for pages of these *sizes*: how many of the largest, at least two, or how
    much, as in "500MB".

    Raises:
        OverBudget: one does not fit.
    """
    sizes = list(sizes)
    if isinstance(ring, int):
        return sum(sorted(sizes, reverse=True)[: max(2, ring)])
    most, largest = parse_size(ring), max(sizes, default=0)
    if largest > most:
        raise OverBudget(
            (
                f"the largest block takes {format_size(largest)}, and the blocks that stream may "
                f"take {format_size(most)}"
            ),
            needed=largest,
            available=most,
            hint="allow more memory, or let more classes be split, so that the blocks are smaller",
        )
    return min(sum(sizes), most)


class Ring:
    """Memory of one lane."""

    def __init__(self, lane: DeviceTransfer, nbytes: int) -> None:
        """Make nothing yet."""
        self.nbytes = nbytes
        self._lane = lane
        self._memory: torch.Tensor | None = None
        self._host: torch.Tensor | None = None
        self._places: list[Slot] = []
        self._left: list[Slot] = []
        self._cursor = 0

    @property
    def held(self) -> int:
        """Bytes of the device's memory that it holds now."""
        return 0 if self._memory is None else len(self._memory)

    def find(
        self, number: int, layout: Layout, may_go: Callable[[Slot], bool]
    ) -> tuple[Slot, list[Slot]] | None:
        """A place for the page *number*, and the places that have to go for it; None if too much
        stays.
        """
        stays = sorted(
            (place for place in self._places if not may_go(place)), key=lambda place: place.start
        )
        start = self._start(layout.nbytes, layout.grain, stays)
        if start is None:
            return None
        place = Slot(number, start, layout.nbytes)
        return place, [each for each in self._places if each.overlaps(place)]

    def take(self, place: Slot, kept: torch.Tensor | None = None) -> None:
        """Let *place* be taken; those that had to go for it have left.

        Args:
            place: the place.
            kept: the main memory that its page is kept in, if it is. A ring that takes no others
                has none of its own.

        Raises:
            LoadError: there is no memory for the ring.
        """
        if self._memory is None:
            self._memory = self._made(self.nbytes)
        if self._host is None and kept is None:
            self._host = self._lane.host(self._memory)
        stop = place.start + place.nbytes
        place.memory = self._memory[place.start : stop]
        place.host = (
            kept if self._host is None or kept is not None else self._host[place.start : stop]
        )
        self._places.append(place)
        for old in self._left:
            if old.overlaps(place):
                place.before += old.before
                place.after |= {(id(old), line): ticket for line, ticket in old.after.items()}
        self._left = [
            old
            for old in self._left
            if not (place.start <= old.start and old.start + old.nbytes <= stop)
        ]
        self._cursor = stop

    def leave(self, place: Slot) -> None:
        """Take *place* back."""
        increment_version(place.tensors)
        place.tensors, place.memory, place.host = (), None, None
        if place in self._places:
            self._left.append(place)
            self._places.remove(place)

    def keep(self, places: Collection[Slot]) -> None:
        """Take back all but *places*."""
        for place in list(self._places):
            if place not in places:
                self.leave(place)

    def beside(self, number: int, layout: Layout, kept: torch.Tensor | None = None) -> Slot:
        """A place for a page that has memory of its own, and no place in the ring; *kept* is as for
        `take`.

        Raises:
            LoadError: there is no memory for it.
        """
        memory = self._made(layout.nbytes)
        return Slot(
            number, -1, layout.nbytes, memory, self._lane.host(memory) if kept is None else kept
        )

    def drop(self) -> None:
        """Let go of the memory, which ends with the last tensor in it."""
        self._memory = self._host = None
        self._left.clear()

    def _made(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(
            False
        ):  # what is made in that mode, others than this thread could not write
            return self._lane.memory(nbytes)

    def _start(self, nbytes: int, grain: int, stays: list[Slot]) -> int | None:
        fitting = [gap for gap in self._gaps(stays) if _up(gap[0], grain) + nbytes <= gap[1]]
        behind = (
            max(low, self._cursor)
            for low, high in fitting
            if _up(max(low, self._cursor), grain) + nbytes <= high
        )
        around = (low for low, _ in fitting)
        start = next(behind, None) if fitting else None
        return _up(start if start is not None else next(around), grain) if fitting else None

    def _gaps(self, stays: list[Slot]) -> Iterator[tuple[int, int]]:
        """What is free, or may become so, between those that stay."""
        low = 0
        for place in stays:
            yield low, place.start
            low = max(
                low, place.start + place.nbytes
            )  # one without bytes may stand where another begins
        yield low, self.nbytes


def _up(number: int, grain: int) -> int:
    return -(-number // grain) * grain
