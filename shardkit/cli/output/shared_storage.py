"""Which tensors share bytes: ties, and views that overlap in their storage."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from shardkit.checkpoint.entries import TensorEntry
from shardkit.payloads.compressed import Expanded, Framed
from shardkit.payloads.payload import Concat, Extent, Payload, Swapped
from shardkit.payloads.strided import Strided


def ties(tensors: Sequence[TensorEntry]) -> dict[int, int]:
    """For each tensor that has the very bytes, type and shape of an earlier one: its number to the
    number of that one.
    """
    first: dict[tuple[object, str, tuple[int, ...]], int] = {}
    tied: dict[int, int] = {}
    for number, entry in enumerate(tensors):
        if entry.nbytes:
            kept = first.setdefault((entry.payload, entry.dtype.code, entry.shape), number)
            if kept != number:
                tied[number] = kept
    return tied


def overlaps(tensors: Sequence[TensorEntry], tied: Container[int]) -> dict[int, int]:
    """For each tensor, ties aside, that lies over one that begins before it: the number of that
    one.
    """
    found: dict[int, int] = {}
    reach = (-1, 0, -1)  # file, end and tensor of what reaches furthest
    for file, start, below, number in sorted(_runs(tensors, tied)):
        stop = -below
        if file == reach[0] and start < reach[1] and number != reach[2]:
            found.setdefault(number, reach[2])
        if file != reach[0] or stop > reach[1]:
            reach = (file, stop, number)
    return found


def _runs(
    tensors: Sequence[TensorEntry], tied: Container[int]
) -> Iterator[tuple[int, int, int, int]]:
    """File, start, end and tensor of all that is read; ends are negative: of what starts together
    the longest sorts first.
    """
    files: dict[object, int] = {}
    for number, entry in enumerate(tensors):
        if number not in tied:
            for file, start, nbytes in _reads(entry.payload):
                yield files.setdefault(file, len(files)), start, -start - nbytes, number


def _reads(payload: Payload) -> Iterator[tuple[object, int, int]]:
    """What *payload* reads: of which stream of bytes, from where on, and how many."""
    match payload:
        case Extent():
            yield payload.path, payload.start, payload.nbytes
        case Expanded():
            yield payload.spool, payload.start, payload.nbytes
        case Framed():
            yield payload.frame, payload.start, payload.nbytes
        case Concat():
            for part in payload.parts:
                yield from _reads(part)
        case Strided():
            yield from _reads(payload.storage)
        case Swapped():
            yield from _reads(payload.inner)
