"""The layout of a block buffer: where its tensors are in memory, and which reads fill it (pure).

1. Adjacent ranges of a file are read together, with gaps of up to `_GAP`. Such a run begins at a
   multiple of `SECTOR` in memory as in the file, so that it can be read directly; the sectors at
   its edges are read completely.
2. Tensors begin at multiples of `ALIGNMENT`. One that would not is moved down to the next when its
   run is there, or, if another occupies that place, to a range of its own after the runs.
3. A tensor that is not a plain run of a file, or too small for a direct read, has a range of its
   own.
4. Equal blocks can differ by a sector, as their runs begin. Their lengths are made equal: in the
   ring buffer, each must fit exactly where another one was, or nothing is prefetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardkit.alignment import ALIGNMENT, round_down, round_up
from shardkit.load.memory.direct_io import SECTOR
from shardkit.payloads.cast import Cast
from shardkit.payloads.coalesce import follows
from shardkit.payloads.payload import Concat, Extent, Payload, Swapped

READ = 4 << 20  # bytes of one read
READERS = 3  # threads that read side by side for one stream
DIRECT = 256 << 10  # bytes of a run from which on direct reads pay
_GAP = 64 << 10
_ALIKE = 100  # lengths are, that differ by less than one part in so many


@dataclass(frozen=True, slots=True)
class Read:
    """One read of complete sectors.

    Attributes:
        path: the file.
        start: the first byte.
        nbytes: the memory that it fills.
        needed: how much of it must be there.
        at: where it goes.
    """

    path: Path
    start: int
    nbytes: int
    needed: int
    at: int


@dataclass(frozen=True, slots=True)
class DerivedRead:
    """One *payload*, that is read by itself and goes *at* a place."""

    payload: Payload
    at: int


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes that go to their place when everything is read."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A page in memory.

    Attributes:
        nbytes: the memory that it takes.
        grain: what its place must be a multiple of.
        places: where each of its payloads begins in the end.
        reads: the reads of sectors.
        makings: whatever else is to be read.
        moves: what is done when all is read, in this order.
    """

    nbytes: int
    grain: int
    places: tuple[int, ...]
    reads: tuple[Read, ...]
    makings: tuple[DerivedRead, ...]
    moves: tuple[Move, ...]

    @classmethod
    def of(cls, payloads: Sequence[Payload]) -> Layout:
        """The layout of *payloads*, whatever their order in their files."""
        plan = _Plan([0] * len(payloads))
        alone = dict(enumerate(payloads))
        for run in _runs(payloads):
            if run.nbytes >= DIRECT:
                plan.add_run(run)
                for number, _ in run.extents:
                    del alone[number]
        plan.settle()
        for number, payload in alone.items():
            plan.places[number] = plan.room(payload.nbytes)
            plan.makings += [
                DerivedRead(part, plan.places[number] + at) for at, part in _parts(payload)
            ]
        grain = SECTOR if plan.reads else ALIGNMENT
        return cls(
            plan.nbytes,
            grain,
            tuple(plan.places),
            tuple(plan.reads),
            tuple(plan.makings),
            tuple(plan.moves),
        )


def evened(layouts: Sequence[Layout]) -> list[Layout]:
    """*layouts*, of which those that are almost as long as a longer one are as long as that."""
    lengths: dict[int, int] = {}
    length = 0
    for nbytes in sorted({layout.nbytes for layout in layouts}, reverse=True):
        if not length or length - nbytes >= length // _ALIKE:
            length = nbytes
        lengths[nbytes] = length
    return [replace(layout, nbytes=lengths[layout.nbytes]) for layout in layouts]


@dataclass(slots=True)
class _Run:
    """Extents of one file that are read together, with their numbers."""

    extents: list[tuple[int, Extent]]

    @property
    def start(self) -> int:
        return self.extents[0][1].start

    @property
    def stop(self) -> int:
        return self.extents[-1][1].start + self.extents[-1][1].nbytes

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def _runs(payloads: Iterable[Payload]) -> Iterator[_Run]:
    extents = [
        (number, each)
        for number, each in enumerate(payloads)
        if isinstance(each, Extent) and each.nbytes
    ]
    run: list[tuple[int, Extent]] = []
    for number, extent in sorted(extents, key=lambda each: (str(each[1].path), each[1].start)):
        if run and not follows(run[-1][1], extent, gap=_GAP):
            yield _Run(run)
            run = []
        run.append((number, extent))
    if run:
        yield _Run(run)


@dataclass(slots=True)
class _Plan:
    """A layout in the making."""

    places: list[int]
    nbytes: int = 0
    reads: list[Read] = field(default_factory=list)
    makings: list[DerivedRead] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    _evicted: list[tuple[int, int, int]] = field(default_factory=list)
    _free: int = 0

    def room(self, nbytes: int) -> int:
        """Where *nbytes* more go."""
        at, self.nbytes = self.nbytes, self.nbytes + round_up(nbytes, ALIGNMENT)
        return at

    def add_run(self, run: _Run) -> None:
        """Only while there are none but runs."""
        first = round_down(run.start, SECTOR)
        room = round_up(run.stop - first, SECTOR)
        path, base = run.extents[0][1].path, self.nbytes
        for at in range(0, room, READ):
            nbytes = min(READ, room - at)
            self.reads.append(
                Read(path, first + at, nbytes, min(nbytes, run.stop - first - at), base + at)
            )
        for number, extent in run.extents:
            self._place(number, base + extent.start - first, extent.nbytes)
        self.nbytes += room

    def settle(self) -> None:
        """Give those that are in each other's way rooms of their own; they leave before the others
        move.
        """
        leaving = []
        for number, source, nbytes in self._evicted:
            self.places[number] = self.room(nbytes)
            leaving.append(Move(source, self.places[number], nbytes))
        self.moves[:0] = leaving

    def _place(self, number: int, source: int, nbytes: int) -> None:
        target = round_down(source, ALIGNMENT)
        if target < self._free:
            self._evicted.append((number, source, nbytes))
            return
        if target < source:
            self.moves.append(Move(source, target, nbytes))
        self.places[number], self._free = target, target + nbytes


def _parts(payload: Payload) -> Iterator[tuple[int, Payload]]:
    """*payload* in parts that may be read side by side, and where in it they begin."""
    if isinstance(payload, Concat):
        at = 0
        for part in payload.parts:
            yield at, part
            at += part.nbytes
        return
    if not payload.nbytes:
        return
    if payload.nbytes <= READ or not isinstance(grounds(payload), Extent):
        yield 0, payload
        return
    for at in range(0, payload.nbytes, READ):
        yield at, payload.narrow(at, min(READ, payload.nbytes - at))


def grounds(payload: Payload) -> Payload:
    """What *payload* is made of, in the end, where it is made element by element."""
    while isinstance(payload, Swapped | Cast):
        payload = payload.inner
    return payload
