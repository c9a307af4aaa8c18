"""Cast numbers while they are read into memory: the stored bytes are read into a buffer of each
thread, and torch casts from there.

Torch gets so little at a time that it starts no threads of its own. It releases the interpreter
lock while it casts, so that other threads read and cast meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shardkit.alignment import round_up
from shardkit.load.memory.direct_io import SECTOR, Files
from shardkit.load.memory.thread_buffers import PIECE, ROOM, pieces_of, room
from shardkit.payloads.cast import GRAIN, Cast, parts, tensor_over
from shardkit.payloads.payload import Extent


def cast_into(cast: Cast, memory: memoryview, files: Files | None = None) -> None:
    """Fill *memory*, which is as long as *cast*, with its bytes.

    Args:
        cast: what is read.
        memory: where it goes.
        files: reads what lies in a file, at a multiple of its element; None to read it as any
            extent is read.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    at = 0
    for numbers in _numbers(cast, files):
        nbytes = len(numbers) * cast.target.itemsize
        targets = parts(tensor_over(memory[at : at + nbytes], cast.target), GRAIN)
        for target, source in zip(targets, parts(numbers, GRAIN), strict=True):
            target.copy_(source)
        at += nbytes


def _numbers(cast: Cast, files: Files | None) -> Iterator[torch.Tensor]:
    """The numbers of *cast* as they are stored; each tensor is valid until the next."""
    inner = cast.inner
    if not isinstance(inner, Extent):
        pieces = _writable(inner.chunks())
    elif files is None:
        pieces = pieces_of(inner)
    else:
        pieces = _read_directly(inner, files)
    return (tensor_over(piece, cast.source) for piece in pieces)


def _read_directly(extent: Extent, files: Files) -> Iterator[memoryview]:
    """The same by reads of complete sectors."""
    file = files.at(extent.path)
    stop = extent.start + extent.nbytes
    for at in range(extent.start, stop, ROOM):
        before, nbytes = at % SECTOR, min(ROOM, stop - at)
        whole = round_up(before + nbytes, SECTOR)
        file.read_sectors(room()[:whole], at - before, before + nbytes)
        yield room()[before : before + nbytes]


def _writable(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """*chunks*, copied where they must not be written: torch warns of such memory, though it only
    reads it.
    """
    for chunk in chunks:
        if not chunk.readonly:
            yield chunk
            continue
        for at in range(0, len(chunk), PIECE):
            piece = room()[: min(PIECE, len(chunk) - at)]
            piece[:] = chunk[at : at + PIECE]
            yield piece
