"""A buffer for each thread, for data that is read and not kept: fresh memory costs more than the
read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from shardkit.load.memory.arenas import Arena
from shardkit.load.memory.direct_io import SECTOR
from shardkit.payloads.gather import reading
from shardkit.payloads.payload import Extent

ROOM = 2 << 20  # bytes, and a sector more, so that whole sectors around as many fit
PIECE = 512 << 10  # bytes that stay in the processor's second cache


class _Rooms(threading.local):
    """The buffers. Each begins at a page, and the child of a fork finds zeros in it: disks write to
    it.
    """

    def __init__(self) -> None:
        arena = Arena.untouched(ROOM + SECTOR)
        arena.wipe_in_children()
        self.memory = arena.memory(0, ROOM + SECTOR)


_rooms = _Rooms()


def room() -> memoryview:
    """The buffer of this thread; whoever uses it next writes over it."""
    return _rooms.memory


def pieces_of(extent: Extent) -> Iterator[memoryview]:
    """The bytes of *extent*, a few at a time, in the buffer of this thread; each piece is valid
    until the next.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    with reading(extent) as read:
        for at in range(0, extent.nbytes, PIECE):
            piece = room()[: min(PIECE, extent.nbytes - at)]
            read(piece, at)
            yield piece
