"""The time of a forward, and the number of blocks to prefetch: the work of the blocks, and
throughput → seconds (pure).

1. A forward is a row of steps. The weights of a step go through stages: they are read, copied in
   main memory, copied to the device, multiplied; those in memory are only multiplied. A stage does
   one thing at a time, in the order of the steps.
2. A streamed step occupies the prefetch buffer from when it is read until it was multiplied. While
   the buffer is full, nothing is read.
3. Forwards follow one another, and the reading for the next begins during the last. The prediction
   is for one of a long row. If all streamed steps fit the buffer at once, only the first forward
   reads them.
4. If the user does not choose a depth, the buffer has as many blocks as make a forward faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest

from shardkit.alignment import ALIGNMENT, round_up
from shardkit.load.memory.pinned_payload import PinnedPayload
from shardkit.load.performance.bandwidth import Rates
from shardkit.payloads.payload import Extent, Payload
from shardkit.sizes import parse_size

STAGES = ("disk", "copy", "link", "compute")
_FORWARDS = 6  # after which each takes as long as the one before


@dataclass(frozen=True, slots=True)
class Step:
    """What one block, or what is in memory, asks of a forward, in bytes.

    Attributes:
        disk: read from files.
        copied: copied, cast or decompressed in main memory on the way.
        link: copied to the device.
        compute: weights that are multiplied.
        room: taken in the ring; nothing for what stays in memory.
    """

    disk: int = 0
    copied: int = 0
    link: int = 0
    compute: int = 0
    room: int = 0

    def seconds(self, rates: Rates) -> tuple[float, ...]:
        """In each stage."""
        work = (
            (self.disk, rates.disk),
            (self.copied, rates.copy),
            (self.link, rates.link),
            (self.compute, rates.compute),
        )
        return tuple(nbytes / rate if rate else 0.0 for nbytes, rate in work)


def step_of(streamed: Sequence[Payload], *, compute: int, linked: bool) -> Step:
    """What a block asks of a forward.

    Args:
        streamed: its weights that stream.
        compute: bytes of its weights that are multiplied, whether they stream or not.
        linked: whether what streams is copied to a device.
    """
    return Step(
        disk=sum(source.nbytes for payload in streamed for source in payload.sources),
        copied=sum(
            payload.nbytes
            for payload in streamed
            if not isinstance(payload, Extent | PinnedPayload)
        ),
        link=sum(payload.nbytes for payload in streamed) if linked else 0,
        compute=compute,
        room=sum(round_up(payload.nbytes, ALIGNMENT) for payload in streamed),
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a forward takes.

    Attributes:
        seconds: one of many forwards.
        first: the first, for which nothing was read before it began.
        busy: seconds in each of `STAGES`.
        spread: seconds at the fastest and at the slowest rates that were measured; None where all
            are known exactly.
    """

    seconds: float
    first: float
    busy: tuple[float, ...]
    spread: tuple[float, float] | None = None

    @property
    def limit(self) -> str:
        """The stage that takes longest, and so what to make faster first."""
        return max(zip(self.busy, STAGES, strict=True))[1]

    @property
    def reading(self) -> float:
        """Seconds that getting the weights takes."""
        return max(self.busy[:-1])

    @property
    def hidden(self) -> float:
        """Share of the read time during which the model computes; 1 if nothing is read."""
        waited = self.seconds - self.busy[-1]
        return min(1.0, max(0.0, 1 - waited / self.reading)) if self.reading else 1.0

    def __str__(self) -> str:
        if self.spread is None:
            return f"{self.seconds:.3g} s"
        return f"{self.seconds:.3g} s ({self.spread[0]:.3g} to {self.spread[1]:.3g})"

    def as_dict(self) -> dict[str, object]:
        """The same for JSON."""
        return {
            "seconds": self.seconds,
            "spread": self.spread,
            "first": self.first,
            "busy": dict(zip(STAGES, self.busy, strict=True)),
            "limit": self.limit,
            "hidden": self.hidden,
        }


def predict(steps: Sequence[Step], rates: Rates, ring: int) -> Prediction:
    """What a forward of *steps* takes, one behind the other.

    Args:
        steps: in the order in which they are computed.
        rates: of this machine.
        ring: bytes that have room in the ring.
    """
    found = _predicted(steps, rates, ring)
    if not rates.spread:
        return found
    extremes = [_predicted(steps, each, ring).seconds for each in (rates.fastest, rates.slowest)]
    return replace(found, spread=(min(*extremes, found.seconds), max(*extremes, found.seconds)))


def _predicted(steps: Sequence[Step], rates: Rates, ring: int) -> Prediction:
    line, ends = _Line(ring), [0.0]
    again = (
        [Step(compute=step.compute) for step in steps]
        if sum(step.room for step in steps) <= ring
        else steps
    )
    for number in range(_FORWARDS):
        for step in again if number else steps:
            line.run(step, step.seconds(rates))
        ends.append(line.free[-1])
    work = [step.seconds(rates) for step in again]
    busy = tuple(sum(seconds[stage] for seconds in work) for stage in range(len(STAGES)))
    return Prediction(max(ends[-1] - ends[-2], *busy), ends[1], busy)


@dataclass(slots=True)
class _Line:
    """The stages, one behind the other.

    Attributes:
        ring: bytes of room.
        free: when each stage has done all that it was given.
        held: what has room, in order: bytes, and when they are let go.
        used: bytes of it.
    """

    ring: int
    free: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))
    held: deque[tuple[int, float]] = field(default_factory=deque)
    used: int = 0

    def run(self, step: Step, seconds: Sequence[float]) -> None:
        ready = self._room(step.room)
        for stage, taken in enumerate(seconds[:-1]):
            if taken:
                ready = self.free[stage] = max(ready, self.free[stage]) + taken
        self.free[-1] = max(ready, self.free[-1]) + seconds[-1]
        if step.room:
            self.used += step.room
            self.held.append((step.room, self.free[-1]))

    def _room(self, nbytes: int) -> float:
        """When there is room for *nbytes*; a step that is larger than the ring has all of it."""
        when = 0.0
        while nbytes and self.held and self.used + nbytes > self.ring:
            room, when = self.held.popleft()
            self.used -= room
        return when


LEAST = 2  # blocks in a ring: one is computed while one is read
USUAL = 4  # where too little streams to be worth measuring
LITTLE = 64 << 20  # bytes
SMALL = "too little streams to be worth measuring"
MOST = 8
_STALLS = {2: 1.08, 3: 1.03}  # as measured
_ENOUGH = 1.005  # as fast, but for what no one can measure


@dataclass(frozen=True, slots=True)
class Depth:
    """How many *blocks* a ring has room for, and *why*."""

    blocks: int
    why: str

    def __str__(self) -> str:
        return f"{self.blocks} blocks: {self.why}"


Ring = (
    int | str | Depth | None
)  # how many blocks, or bytes, as in "500MB"; None to choose automatically


def depth_for(steps: Sequence[Step], rates: Rates, room: int) -> Depth:
    """The depth that pays for forwards of *steps*, within *room* bytes, of which two blocks are
    taken in any case.
    """
    sizes = [step.room for step in steps if step.room]
    deeper = [
        blocks
        for blocks in range(LEAST + 1, MOST + 1)
        if sum(nlargest(blocks, sizes)) <= min(room, sum(sizes) - 1)
    ]
    return chosen({blocks: seconds_with(blocks, steps, rates) for blocks in (LEAST, *deeper)})


def seconds_with(blocks: int, steps: Sequence[Step], rates: Rates) -> float:
    """What a forward takes with a ring of so many *blocks*."""
    stalls = _STALLS.get(blocks, 1.0)
    slowed = replace(
        rates, disk=rates.disk and rates.disk / stalls, link=rates.link and rates.link / stalls
    )
    return predict(steps, slowed, sum(nlargest(blocks, (step.room for step in steps)))).seconds


def chosen(seconds: Mapping[int, float]) -> Depth:
    """The least depth that is as fast as any, of those that have *seconds*."""
    blocks = next(
        blocks for blocks in sorted(seconds) if seconds[blocks] <= min(seconds.values()) * _ENOUGH
    )
    if blocks - 1 in seconds:
        return Depth(
            blocks,
            (
                f"with {blocks - 1} a forward would take "
                f"{seconds[blocks - 1] / seconds[blocks] - 1:.0%} longer"
            ),
        )
    return Depth(
        blocks,
        "more would be no faster"
        if len(seconds) > 1
        else "more do not fit, or would be all streamed blocks",
    )


def ring_bytes(sizes: Iterable[int], ring: Ring) -> int:
    """What a ring takes where blocks of *sizes* stream: as many of the largest, or as much, as
    *ring* says.
    """
    match ring:
        case str():
            return min(sum(sizes), parse_size(ring))
        case Depth(blocks):
            return sum(nlargest(blocks, sizes))
        case _:
            return sum(nlargest(ring or USUAL, sizes))
