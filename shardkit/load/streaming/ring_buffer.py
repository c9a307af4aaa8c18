"""The prefetch buffer: one memory, made once, in which blocks of any size get their slots one
behind the other, round and round.

1. The next slot is sought behind the last one. What lies there was filled the longest ago, so that
   in a cycle of blocks each takes the slot of the one that is not needed for the longest time. What
   must stay is stepped over.
2. Whoever takes a slot waits for what was issued on the same bytes, and gets the tickets of it with
   the slot.
3. A tensor belongs to one filling of one slot. When the slot goes to another block, that counts as
   a change of the tensor, so that autograd refuses a backward that comes too late.
4. It has no lock: one thread uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import increment_version

from shardkit.alignment import round_up
from shardkit.errors import OverBudget
from shardkit.load.devices.transfers import DeviceTransfer, Ticket
from shardkit.load.streaming.page_layout import Layout
from shardkit.sizes import format_size, parse_size


@dataclass(eq=False, slots=True)
class Slot:
    """Where one block is.

    Attributes:
        number: of the block.
        start: where in the prefetch buffer it begins; -1 for a slot that has memory of its own.
        nbytes: its length.
        memory: it, on the device; None once it was evicted.
        host: the same in main memory: memory itself where that is main memory, or the pinned host
            copy of its block.
        before: what must be done before the host memory changes: copies out of it.
        after: what must be done before the memory of the device changes: of each line of work the
            last that used it.
        tensors: those of the block that is there.
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
        """Do *job*, which writes to the host memory, unless the slot was evicted."""
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
    """Memory of one device."""

    def __init__(self, lane: DeviceTransfer, nbytes: int) -> None:
        """Make nothing yet."""
        self.nbytes = nbytes
        self._lane = lane
        self._memory: torch.Tensor | None = None
        self._host: torch.Tensor | None = None
        self._slots: list[Slot] = []
        self._evicted: list[Slot] = []
        self._cursor = 0

    @property
    def held(self) -> int:
        """Bytes of the device's memory that it holds now."""
        return 0 if self._memory is None else len(self._memory)

    def find(
        self, number: int, layout: Layout, may_go: Callable[[Slot], bool]
    ) -> tuple[Slot, list[Slot]] | None:
        """A slot for the block *number*, and the slots that have to go for it; None if too much
        stays.
        """
        stays = sorted(
            (slot for slot in self._slots if not may_go(slot)), key=lambda slot: slot.start
        )
        start = self._start(layout.nbytes, layout.grain, stays)
        if start is None:
            return None
        slot = Slot(number, start, layout.nbytes)
        return slot, [each for each in self._slots if each.overlaps(slot)]

    def take(self, slot: Slot, pinned: torch.Tensor | None = None) -> None:
        """Let *slot* be taken; those that had to go for it were evicted.

        Args:
            slot: the slot.
            pinned: the pinned host copy of its block, if there is one. A prefetch buffer that takes
                no others has no main memory of its own.

        Raises:
            LoadError: there is no memory for the prefetch buffer.
        """
        if self._memory is None:
            self._memory = self._lane.memory(self.nbytes)
        if self._host is None and pinned is None:
            self._host = self._lane.host(self._memory)
        stop = slot.start + slot.nbytes
        slot.memory = self._memory[slot.start : stop]
        slot.host = (
            pinned if self._host is None or pinned is not None else self._host[slot.start : stop]
        )
        for old in self._evicted:
            if old.overlaps(slot):
                slot.before += old.before
                slot.after |= {(id(old), line): ticket for line, ticket in old.after.items()}
        self._evicted = [
            old
            for old in self._evicted
            if not (slot.start <= old.start and old.start + old.nbytes <= stop)
        ]
        self._slots.append(slot)
        self._cursor = stop

    def beside(self, number: int, layout: Layout, pinned: torch.Tensor | None = None) -> Slot:
        """A slot for a block that has memory of its own; *pinned* is as for `take`.

        Raises:
            LoadError: there is no memory for it.
        """
        memory = self._lane.memory(layout.nbytes)
        return Slot(
            number, -1, layout.nbytes, memory, self._lane.host(memory) if pinned is None else pinned
        )

    def evict(self, slot: Slot) -> None:
        """Take *slot* back."""
        increment_version(slot.tensors)
        slot.tensors, slot.memory, slot.host = (), None, None
        if slot.in_ring:
            self._slots.remove(slot)
            self._evicted.append(slot)

    def evict_all(self) -> None:
        """Let go of the memory, which ends with the last tensor in it."""
        self._memory = self._host = None
        self._evicted.clear()

    def _start(self, nbytes: int, grain: int, stays: list[Slot]) -> int | None:
        fitting = [gap for gap in self._gaps(stays) if round_up(gap[0], grain) + nbytes <= gap[1]]
        behind = (
            max(low, self._cursor)
            for low, high in fitting
            if round_up(max(low, self._cursor), grain) + nbytes <= high
        )
        around = (low for low, _ in fitting)
        start = next(behind, None) if fitting else None
        return round_up(start if start is not None else next(around), grain) if fitting else None

    def _gaps(self, stays: list[Slot]) -> Iterator[tuple[int, int]]:
        """What is free, or may become so, between those that stay."""
        low = 0
        for slot in stays:
            yield low, slot.start
            # One without bytes may stand where another begins.
            low = max(low, slot.start + slot.nbytes)
        yield low, self.nbytes
