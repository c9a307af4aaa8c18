"""Deal blocks out between memory and what they stream from (pure: blocks are numbers here, and have sizes).

1. As many bytes stay as there is room for, whatever the rates of the machine: each is one less to read in every forward.
2. A large block that streams makes the ring large, and a deep ring takes room from blocks: both are weighed by what a forward
   would take.
3. What streams is spread evenly between what stays, so that it is read while that is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest

from shardkit.load.performance.bandwidth import Rates
from shardkit.load.performance.cost_model import Depth, Ring, Step, chosen, depths_of, ring_bytes, seconds_with
from shardkit.sizes import parse_size

UNMEASURED = Rates(disk=1.0)  # all time goes into reading
_LIMITS = 16  # how many of the largest sizes are tried as the largest that streams


@dataclass(frozen=True, slots=True)
class ResidentSet:
    """Who has which blocks; what nobody has is on disk.

    Attributes:
        kept: those that stay where they are run.
        ring: how many of the others the ring has room for, or how much it may take.
        on_cpu: those that stay in main memory, and stream from there.
    """

    kept: frozenset[int]
    ring: Ring
    on_cpu: frozenset[int] = frozenset()


def deal(sizes: Sequence[int], room: int, ring: Ring, cpu: int | None = None, *, rates: Rates = UNMEASURED) -> ResidentSet | None:
    """Deal out blocks of *sizes*, in the order in which they are run, so that a forward is short; None if the ring has no room.

    Args:
        sizes: bytes of each.
        room: bytes that those that stay and the ring may take together.
        ring: how many blocks the ring has room for at most, of which two are needed; or how much it may take, as in "500MB";
            None for as many as pay.
        cpu: bytes of main memory, through which what is on disk passes; None where they are run there.
        rates: those of this machine.
    """
    if sum(sizes) <= room:
        return ResidentSet(frozenset(range(len(sizes))), ring)
    if isinstance(ring, str):
        fullest = _fullest(sizes, room, ring, cpu)
        return None if fullest is None else ResidentSet(fullest, ring, _on_cpu(sizes, fullest, ring, cpu or 0))
    ways = {depth: kept for depth in depths_of(ring) if (kept := _fullest(sizes, room, depth, cpu)) is not None}
    if not ways:
        return None
    seconds = {depth: seconds_with(depth, _steps(sizes, kept, linked=cpu is not None), rates) for depth, kept in ways.items()}
    depth = chosen(seconds) if ring is None else min(seconds, key=seconds.__getitem__)
    kept = ways[depth.blocks if isinstance(depth, Depth) else depth]
    return ResidentSet(kept, depth, _on_cpu(sizes, kept, depth, cpu or 0))


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Which blocks of *sizes* stay in *room* bytes: as evenly as can be, and no fewer bytes than the first that fit."""
    evenly, first = (_filled(kept, sizes, room) for kept in (_evenly(sizes, room), _first(sizes, room)))
    return evenly if _sum(sizes, evenly) >= _sum(sizes, first) else first


def _steps(sizes: Sequence[int], kept: Container[int], *, linked: bool) -> list[Step]:
    """What a forward asks for if *kept* stay. It is not known yet what of the others will be on disk: as if all were."""
    return [
        Step(compute=nbytes) if number in kept else Step(disk=nbytes, link=nbytes if linked else 0, compute=nbytes, room=nbytes)
        for number, nbytes in enumerate(sizes)
    ]


def _fullest(sizes: Sequence[int], room: int, ring: int | str, cpu: int | None) -> frozenset[int] | None:
    """The most that can stay beside the ring, of which main memory has room for a twin; None if there is no way."""
    ways = (kept for kept in _ways(sizes, room, ring) if cpu is None or _passes(sizes, kept, ring, cpu))
    return max(ways, key=lambda kept: _sum(sizes, kept), default=None)


def _passes(sizes: Sequence[int], kept: Container[int], ring: int | str, cpu: int) -> bool:
    """Whether main memory has room for all that is not *kept*, or else for the ring that it comes from disk through."""
    streamed = [nbytes for number, nbytes in enumerate(sizes) if number not in kept]
    return min(sum(streamed), ring_bytes(streamed, ring)) <= cpu


def _ways(sizes: Sequence[int], room: int, ring: int | str) -> Iterator[frozenset[int]]:
    """For each of the largest sizes, what stays if nothing larger streams."""
    most = parse_size(ring) if isinstance(ring, str) else max(sizes)
    for limit in nlargest(_LIMITS, set(sizes)):
        small = [number for number, nbytes in enumerate(sizes) if nbytes <= limit]
        large = frozenset(range(len(sizes))).difference(small)
        of_small = [sizes[number] for number in small]
        left = room - _sum(sizes, large) - ring_bytes(of_small, ring)
        if left >= 0 and limit <= most:
            yield large.union(small[at] for at in spread(of_small, left))


def _on_cpu(sizes: Sequence[int], kept: Container[int], ring: Ring, room: int) -> frozenset[int]:
    """Which of those that are not *kept* have *room* in main memory; what comes from disk passes through a ring there too."""
    streamed = [number for number in range(len(sizes)) if number not in kept]
    of_streamed = [sizes[number] for number in streamed]
    if sum(of_streamed) > room:
        room = max(0, room - ring_bytes(of_streamed, ring))
    return frozenset(streamed[at] for at in spread(of_streamed, room))


def _evenly(sizes: Sequence[int], room: int) -> set[int]:
    """Of all runs from the start, the share that *room* is of the whole."""
    kept: set[int] = set()
    passed, taken, total = 0, 0, sum(sizes)
    for number, nbytes in enumerate(sizes):
        passed += nbytes
        if (taken + nbytes) * total <= passed * room:
            kept.add(number)
            taken += nbytes
    return kept


def _first(sizes: Sequence[int], room: int) -> set[int]:
    kept: set[int] = set()
    for number, nbytes in enumerate(sizes):
        room -= nbytes
        if room < 0:
            break
        kept.add(number)
    return kept


def _filled(kept: Collection[int], sizes: Sequence[int], room: int) -> frozenset[int]:
    """*kept*, and what else there is room for, the largest first."""
    room -= _sum(sizes, kept)
    more: set[int] = set()
    for number in sorted(set(range(len(sizes))) - set(kept), key=lambda number: (-sizes[number], number)):
        if sizes[number] <= room:
            more.add(number)
            room -= sizes[number]
    return frozenset(kept) | more


def _sum(sizes: Sequence[int], numbers: Iterable[int]) -> int:
    return sum(sizes[number] for number in numbers)
