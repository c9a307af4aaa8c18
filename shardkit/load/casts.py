"""Cast numbers on their way into memory: what is read waits in a small buffer that each thread has, and torch does the rest.

Torch is given so little at a time that it finds no work in it for threads of its own. It holds no interpreter lock while it
casts, and so other threads read and cast meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from shardkit.casting import GRAIN, Cast, parts, tensor_over
from shardkit.gathering import reading
from shardkit.payload import Extent

_ROOM = 512 << 10  # bytes of numbers that are read at once; they stay in the processor's second cache


class _Rooms(threading.local):
    """A buffer for each thread."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(_ROOM))


_rooms = _Rooms()


def cast_into(cast: Cast, memory: memoryview) -> None:
    """Fill *memory*, which is as long as *cast*, with its bytes.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    at = 0
    for numbers in _numbers(cast):
        nbytes = len(numbers) * cast.target.itemsize
        for target, source in zip(_grains(memory[at : at + nbytes], cast), parts(numbers, GRAIN), strict=True):
            target.copy_(source)
        at += nbytes


def _grains(memory: memoryview, cast: Cast) -> tuple[torch.Tensor, ...]:
    return tuple(parts(tensor_over(memory, cast.target), GRAIN))


def _numbers(cast: Cast) -> Iterator[torch.Tensor]:
    """The numbers of *cast* as they are stored; each tensor is valid until the next."""
    inner, room = cast.inner, _rooms.memory
    if isinstance(inner, Extent):
        with reading(inner) as read:
            for at in range(0, inner.nbytes, _ROOM):
                piece = room[: inner.nbytes - at]
                read(piece, at)
                yield tensor_over(piece, cast.source)
        return
    for chunk in inner.chunks():
        if not chunk.readonly:
            yield tensor_over(chunk, cast.source)
            continue
        for at in range(0, len(chunk), _ROOM):  # torch warns of memory that it must not write, though it only reads it
            piece = room[: len(chunk) - at]
            piece[:] = chunk[at : at + _ROOM]
            yield tensor_over(piece, cast.source)
