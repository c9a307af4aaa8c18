"""Deal blocks out between memory and what they stream from (pure: blocks are numbers here, and have sizes).

1. As many bytes stay as there is room for, whatever the rates of the machine: each is one less to read in every forward.
2. A large block that streams makes the ring large, and a deep ring takes room from blocks: both are weighed against what is read.
3. What streams is spread evenly between what stays, so that it is read while that is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest

from shardkit.sizes import parse_size

LEAST = 2  # blocks in a ring: one is computed while one is read
# A forward that waits for a ring of so few blocks takes this many times as long as one with a ring of more.
_STALLS: dict[int | str, float] = {2: 1.08, 3: 1.03}
_LIMITS = 16  # how many of the largest sizes are tried as the largest that streams


@dataclass(frozen=True, slots=True)
class Dealt:
    """Who has which blocks; what nobody has is on disk.

    Attributes:
        kept: those that stay where they are run.
        ring: how many of the others the ring has room for, or how much it may take.
        on_cpu: those that stay in main memory, and stream from there.
    """

    kept: frozenset[int]
    ring: int | str
    on_cpu: frozenset[int] = frozenset()


def deal(sizes: Sequence[int], room: int, ring: int | str, cpu: int = 0) -> Dealt | None:
    """Deal out blocks of *sizes*, in the order in which they are run, so that little is read; None if the ring has no room.

    Args:
        sizes: bytes of each.
        room: bytes that those that stay and the ring may take together.
        ring: how many blocks the ring has room for at most, of which two are needed; or how much it may take, as in "500MB".
        cpu: bytes of main memory, where that is another than the one in which they are run.
    """
    if sum(sizes) <= room:
        return Dealt(frozenset(range(len(sizes))), ring)
    depths = [ring] if isinstance(ring, str) else range(max(LEAST, ring), LEAST - 1, -1)
    ways = [(kept, depth) for depth in depths for kept in _ways(sizes, room, depth)]
    if not ways:
        return None
    kept, depth = min(ways, key=lambda way: (sum(sizes) - _sum(sizes, way[0])) * _STALLS.get(way[1], 1.0))
    return Dealt(kept, depth, _on_cpu(sizes, sorted(set(range(len(sizes))) - kept), cpu))


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Which blocks of *sizes* stay in *room* bytes: as evenly as can be, and no fewer bytes than the first that fit."""
    evenly, first = (_filled(kept, sizes, room) for kept in (_evenly(sizes, room), _first(sizes, room)))
    return evenly if _sum(sizes, evenly) >= _sum(sizes, first) else first


def ring_bytes(sizes: Iterable[int], ring: int | str) -> int:
    """What a ring takes where blocks of *sizes* stream: as many of the largest, or as much, as *ring* says."""
    return sum(nlargest(ring, sizes)) if isinstance(ring, int) else min(sum(sizes), parse_size(ring))


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


def _on_cpu(sizes: Sequence[int], streamed: Sequence[int], room: int) -> frozenset[int]:
    """Which of *streamed* have *room*; what comes from disk passes through main memory too."""
    of_streamed = [sizes[number] for number in streamed]
    if sum(of_streamed) > room:
        room = max(0, room - ring_bytes(of_streamed, LEAST))
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
