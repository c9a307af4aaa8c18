"""How many blocks a ring has room for, where nobody says: as many as pay at the rates of the machine (pure).

1. A ring of two is enough for all to be read behind what is computed, if reading takes as long each time. It does not, and a
   shallow ring passes each delay on: what is read through it is read so many times slower as `_STALLS` says.
2. Where computing takes longer than reading, it hides that too, and two blocks are enough. Where the reading is the limit, more
   than a few buy nothing. Where much is computed between blocks that stream, a deep ring is filled meanwhile.
3. No more are taken than there is room for, nor all that streams: then it would be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from shardkit.load.cost import Step, predict
from shardkit.load.rates import Rates

LEAST = 2  # blocks in a ring: one is computed while one is read
USUAL = 4  # where little streams, and nothing is measured for it
LITTLE = 64 << 20  # bytes
SMALL = "little streams, and nothing is measured for it"
_MOST = 8
_STALLS = {2: 1.08, 3: 1.03}  # as measured
_ENOUGH = 1.005  # as fast, but for what no one can measure


@dataclass(frozen=True, slots=True)
class Depth:
    """How many *blocks* a ring has room for, and *why*."""

    blocks: int
    why: str

    def __str__(self) -> str:
        return f"{self.blocks} blocks: {self.why}"


Ring = int | str | Depth | None  # how many blocks, or how much it may take, as in "500MB"; None for as many as pay


def depth_for(steps: Sequence[Step], rates: Rates, room: int) -> Depth:
    """The depth that pays for forwards of *steps*, within *room* bytes, of which two blocks are taken in any case."""
    sizes = [step.room for step in steps if step.room]
    deeper = [blocks for blocks in range(LEAST + 1, _MOST + 1) if sum(nlargest(blocks, sizes)) <= min(room, sum(sizes) - 1)]
    return chosen({blocks: seconds_with(blocks, steps, rates) for blocks in (LEAST, *deeper)})


def seconds_with(blocks: int, steps: Sequence[Step], rates: Rates) -> float:
    """What a forward takes with a ring of so many *blocks*."""
    stalls = _STALLS.get(blocks, 1.0)
    slowed = replace(rates, disk=rates.disk and rates.disk / stalls, link=rates.link and rates.link / stalls)
    return predict(steps, slowed, sum(nlargest(blocks, (step.room for step in steps)))).seconds


def chosen(seconds: Mapping[int, float]) -> Depth:
    """The least depth that is as fast as any, of those that have *seconds*."""
    blocks = next(blocks for blocks in sorted(seconds) if seconds[blocks] <= min(seconds.values()) * _ENOUGH)
    if blocks - 1 in seconds:
        return Depth(blocks, f"with {blocks - 1} a forward would take {seconds[blocks - 1] / seconds[blocks] - 1:.0%} longer")
    return Depth(blocks, "more would be no faster" if len(seconds) > 1 else "more have no room, or would be all that streams")


def depths_of(ring: int | Depth | None) -> Sequence[int]:
    """The depths that may be tried for *ring*; what is preferred where all are as good comes first."""
    if ring is None:
        return range(LEAST, _MOST + 1)
    return [ring.blocks] if isinstance(ring, Depth) else range(max(LEAST, ring), LEAST - 1, -1)
