"""Payloads of tensors joined along any axis: a cat or a stack, made in bounded memory.

1. Joined along the first axis, or along any after axes of length one, tensors follow one another.
2. Otherwise rows of the parts alternate. Many short rows are read at once, and placed in memory;
   long ones are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from shardkit.payloads.gather import memory_of, reading
from shardkit.payloads.payload import Concat, Extent, Payload, check_range, rechunked

_SLAB = 4 << 20  # output put together at once


def joined(parts: Sequence[Payload], shapes: Sequence[Sequence[int]], dim: int) -> Payload:
    """The C-contiguous bytes of tensors of one type, joined along the axis *dim*.

    Args:
        parts: the C-contiguous bytes of each.
        shapes: their shapes, which differ in the length of *dim* alone. A stack is a join of shapes
            that have one index there.
        dim: number of the axis.

    Raises:
        ValueError: the shapes cannot be joined.
    """
    _check_shapes(parts, shapes, dim)
    rows = prod(shapes[0][:dim])
    filled = tuple(part for part in parts if part.nbytes)
    if len(filled) == 1:
        return filled[0]
    return Joined(filled, rows) if rows > 1 and filled else Concat(filled)


@dataclass(frozen=True, slots=True)
class Joined:
    """The first row of every part, then the second of every part, and so on.

    Attributes:
        parts: rows one behind the other; those of one part are as long as each other.
        rows: how many each part has.
    """

    parts: tuple[Payload, ...]
    rows: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return tuple(source for part in self.parts for source in part.sources)

    def narrow(self, start: int, nbytes: int) -> Payload:
        check_range(start, nbytes, self.nbytes)
        width = self.nbytes // self.rows
        first, before = divmod(start, width)
        last, behind = divmod(start + nbytes, width)
        if first == last:
            return self._row(first).narrow(before, nbytes) if nbytes else Concat(())
        head = (self._row(first).narrow(before, width - before),) if before else ()
        middle = self._rows(first + bool(before), last)
        tail = (self._row(last).narrow(0, behind),) if behind else ()
        return Concat((*head, *middle, *tail)) if head or tail else middle[0]

    def chunks(self) -> Iterator[memoryview]:
        at_once = _SLAB * self.rows // self.nbytes
        return rechunked(self._slabs(at_once) if at_once > 1 else self._one_by_one(), self.nbytes)

    def _row(self, number: int) -> Concat:
        widths = [part.nbytes // self.rows for part in self.parts]
        return Concat(
            tuple(
                part.narrow(number * width, width)
                for part, width in zip(self.parts, widths, strict=True)
            )
        )

    def _rows(self, first: int, stop: int) -> tuple[Payload, ...]:
        if stop - first < 2:
            return tuple(self._row(number) for number in range(first, stop))
        widths = [part.nbytes // self.rows for part in self.parts]
        narrow = (
            part.narrow(first * width, (stop - first) * width)
            for part, width in zip(self.parts, widths, strict=True)
        )
        return (Joined(tuple(narrow), stop - first),)

    def _one_by_one(self) -> Iterator[memoryview]:
        for number in range(self.rows):
            yield from self._row(number).chunks()

    def _slabs(self, at_once: int) -> Iterator[memoryview]:
        """The rows, *at_once* at a time."""
        at_once = min(at_once, self.rows)
        slab = memory_of(at_once * self.nbytes // self.rows)
        staging = memory_of(at_once * max(part.nbytes for part in self.parts) // self.rows)
        for first in range(0, self.rows, at_once):
            count = min(at_once, self.rows - first)
            rows = slab.reshape(at_once, -1)[:count]
            at = 0
            for part in self.parts:
                width = part.nbytes // self.rows
                taken = staging[: count * width]
                with reading(part) as read:
                    read(taken.data, first * width)
                rows[:, at : at + width] = taken.reshape(count, width)
                at += width
            yield slab[: rows.nbytes].data


def _check_shapes(parts: Sequence[Payload], shapes: Sequence[Sequence[int]], dim: int) -> None:
    if not parts or len(parts) != len(shapes):
        raise ValueError(f"{len(parts)} tensors of {len(shapes)} shapes cannot be joined")
    around = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(around) > 1 or not all(0 <= dim < len(shape) for shape in shapes):
        raise ValueError(
            f"tensors of the shapes {[list(shape) for shape in shapes[:4]]} cannot be joined "
            f"along axis {dim}"
        )
