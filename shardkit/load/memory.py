"""Memory for weights: made once at its exact size, backed by huge pages, and filled by large reads side by side.

1. First touch of fresh memory costs more than the copy. Huge pages take most of that cost away, and the reads themselves
   touch the memory, several at a time.
2. Tensors share an arena of `_ARENA` bytes, so that huge pages round up none of the small ones; a larger tensor has one of
   its own. Each tensor is a storage of its own, so that saving one saves no other, and an arena lives as long as one of its
   tensors does.
3. Tensors begin at multiples of 64 bytes: the result of a float32 product can differ in its last bit where they do not.
4. What raises leaves nothing behind: no thread, no open file, no memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shardkit.casting import Cast
from shardkit.load.arenas import HUGE, Arena
from shardkit.payload import Extent, Payload, Swapped, ended_early, fill, unreadable
from shardkit.pools import Pool

WORKERS = 4
Item = tuple[Payload, torch.dtype, Sequence[int]]
OnBytes = Callable[[int], object]

_ALIGNMENT = 64
_ARENA = 64 << 20
_READ = 8 << 20
_BUFFERS = 512  # of one read; half of what Linux takes (IOV_MAX)
_GAP = 16 << 10  # bytes between two tensors that are read along rather than left out by a read of their own
_JUNK = memoryview(bytearray(_GAP))  # where they go; nobody looks at it, so that all threads may write it


def aligned(nbytes: int) -> torch.Tensor:
    """*nbytes* bytes of fresh memory as a tensor that owns them; 64-byte aligned, and huge pages from 2 MiB on.

    Raises:
        LoadError: there is no room for it.
    """
    if nbytes < HUGE:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever the default device
    return Arena.of(nbytes).tensor(0, torch.uint8, (nbytes,))


def private(nbytes: int) -> torch.Tensor:
    """The same, but it begins at a page, and the child of a fork finds zeros in it.

    So a fork copies none of it, and what a disk writes there meanwhile goes to the parent.

    Raises:
        LoadError: there is no room for it.
    """
    arena = Arena.of(max(1, nbytes))
    arena.wipe_in_children()
    return arena.tensor(0, torch.uint8, (nbytes,))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous *tensor* in main memory, and whatever is cut from them, keep the tensor."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(bytearray())
    memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # any name will do: the array, and so the view of it, holds it
    return memoryview(memory).cast("B")


def read_into(payload: Payload, memory: memoryview) -> None:
    """Fill *memory*, which is as long as *payload*, with its bytes.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    if isinstance(payload, Extent):
        _Read(payload.path, payload.start, [memory], payload.nbytes, payload.nbytes).run()
        return
    at = 0
    for chunk in payload.chunks():
        memory[at : at + len(chunk)] = chunk
        at += len(chunk)


def materialise(items: Iterable[Item], *, workers: int = WORKERS, on_bytes: OnBytes = lambda _: None) -> list[torch.Tensor]:
    """Read tensors into memory of their own.

    Args:
        items: for each tensor its bytes, its type and its shape.
        workers: how many reads are in flight.
        on_bytes: called in this thread with the number of bytes after each read.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room for it.
    """
    wanted = list(items)
    order = sorted(range(len(wanted)), key=[_address(payload) for payload, _, _ in wanted].__getitem__)
    tensors: list[torch.Tensor] = [torch.empty(0)] * len(wanted)
    fills: list[_Fill] = []
    for number, (tensor, memory) in zip(order, _rooms([wanted[i] for i in order]), strict=True):
        tensors[number] = tensor
        fills.append((wanted[number][0], memory))
    _carry_out(list(_jobs(fills)), workers, on_bytes)
    return tensors


def mapped(items: Iterable[Item]) -> list[torch.Tensor | None]:
    """Tensors that share the page cache with their files: nothing is read before it is used, and what is written stays private.

    They change when the file does, and a file that becomes shorter ends the process with a bus error. None stands for what
    cannot be had so: whatever is no plain run of a file, or does not begin at a multiple of its element.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    wanted = list(items)
    extents: dict[Path, list[Extent]] = {}
    for payload, dtype, _ in wanted:
        if isinstance(payload, Extent) and _is_mappable(payload, dtype):
            extents.setdefault(payload.path, []).append(payload)
    arenas = {path: Arena.over(path, each) for path, each in extents.items()}
    return [
        arenas[payload.path].tensor(payload.start, dtype, shape)
        if isinstance(payload, Extent) and _is_mappable(payload, dtype)
        else None
        for payload, dtype, shape in wanted
    ]


def _is_mappable(extent: Extent, dtype: torch.dtype) -> bool:
    return bool(extent.nbytes) and extent.start % dtype.itemsize == 0


def _address(payload: Payload) -> tuple[str, int]:
    """Where *payload* is read first, so that what lies together is read together."""
    first = payload if isinstance(payload, Extent) else next(iter(payload.sources), None)
    return (str(first.path), first.start) if first else ("", 0)


def _rooms(items: Iterable[Item]) -> Iterator[tuple[torch.Tensor, memoryview]]:
    """For each of *items* a fresh tensor and its memory."""
    for group in _grouped(items):
        sizes = [_padded(payload.nbytes) for payload, _, _ in group]
        arena = Arena.of(max(1, sum(sizes)))
        at = 0
        for (payload, dtype, shape), size in zip(group, sizes, strict=True):
            yield arena.tensor(at, dtype, shape), arena.memory(at, payload.nbytes)
            at += size


def _grouped(items: Iterable[Item]) -> Iterator[list[Item]]:
    """*items* as they share arenas."""
    group: list[Item] = []
    room = _ARENA
    for item in items:
        size = _padded(item[0].nbytes)
        if group and size > room:
            yield group
            group, room = [], _ARENA
        group.append(item)
        room -= size
    if group:
        yield group


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


_Fill = tuple[Payload, memoryview]


@dataclass(slots=True)
class _Read:
    """One read of one run of a file into several pieces of memory.

    Attributes:
        path: the file.
        start: first byte of the run.
        buffers: what is filled, in order; `_JUNK` between tensors that do not touch in the file.
        length: bytes of the run.
        nbytes: bytes of it that are weights.
    """

    path: Path
    start: int
    buffers: list[memoryview] = field(default_factory=list)
    length: int = 0
    nbytes: int = 0

    def takes(self, extent: Extent) -> bool:
        """Whether *extent* is worth reading along."""
        gap = extent.start - self.start - self.length
        small = self.length + extent.nbytes <= _READ and len(self.buffers) < _BUFFERS - 1
        return small and 0 <= gap <= _GAP and (extent.path is self.path or extent.path == self.path)

    def add(self, extent: Extent, memory: memoryview) -> None:
        if gap := extent.start - self.start - self.length:
            self.buffers.append(_JUNK[:gap])
        self.buffers.append(memory)
        self.length += gap + extent.nbytes
        self.nbytes += extent.nbytes

    def run(self) -> int:
        """Fill the memory, and give the number of bytes of weights.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
        """
        whole = Extent(self.path, self.start, self.length)
        try:
            with open(self.path, "rb", buffering=0) as file:
                if hasattr(os, "preadv"):
                    _scatter(file.fileno(), self.buffers, whole)
                else:  # Windows
                    file.seek(self.start)
                    for buffer in self.buffers:
                        fill(buffer, file.readinto, whole)
        except OSError as error:
            raise unreadable(self.path, error) from None
        return self.nbytes


@dataclass(frozen=True, slots=True)
class _Derivation:
    """The same for what is made from bytes of files."""

    payload: Payload
    memory: memoryview

    def run(self) -> int:
        read_into(self.payload, self.memory)
        return self.payload.nbytes


def _jobs(fills: Iterable[_Fill]) -> Iterator[_Read | _Derivation]:
    """What is to be done for *fills*, in pieces that may be done side by side."""
    read: _Read | None = None
    for payload, memory in _cut(fills):
        if not isinstance(payload, Extent):
            yield _Derivation(payload, memory)
            continue
        if read is None or not read.takes(payload):
            if read is not None:
                yield read
            read = _Read(payload.path, payload.start)
        read.add(payload, memory)
    if read is not None:
        yield read


def _cut(fills: Iterable[_Fill]) -> Iterator[_Fill]:
    """*fills* in pieces of one read, where a piece costs no more than its share."""
    for each in fills:
        if each[0].nbytes <= _READ:
            yield each
        else:
            yield from _pieces(*each)


def _pieces(payload: Payload, memory: memoryview) -> Iterator[_Fill]:
    divisible = isinstance(payload, Extent) or (isinstance(payload, Cast | Swapped) and isinstance(payload.inner, Extent))
    step = _READ if divisible else max(1, len(memory))
    for at in range(0, len(memory), step):
        piece = memory[at : at + step]
        yield payload.narrow(at, len(piece)) if len(piece) < len(memory) else payload, piece


def _carry_out(jobs: Sequence[_Read | _Derivation], workers: int, on_bytes: OnBytes) -> None:
    """Run all *jobs*; after the first that fails no other is begun, and what was begun has ended."""
    pool = Pool(workers, "shardkit-read")
    try:
        futures = [pool.submit(job.run) for job in reversed(jobs)]
        while futures:
            on_bytes(futures.pop().result())  # not kept: a frame that holds what raised is a circle, and would keep the memory
    finally:
        pool.shutdown(cancel_futures=True)


def _scatter(file: int, buffers: Sequence[memoryview], extent: Extent) -> None:
    """Fill *buffers*, one behind the other, with *extent* of the open *file*."""
    rest, at = [buffer for buffer in buffers if buffer], extent.start
    while rest:
        count = os.preadv(file, rest, at)
        if not count:
            raise ended_early(extent)
        at += count
        rest = list(_behind(rest, count)) if at < extent.start + extent.nbytes else []


def _behind(buffers: Iterable[memoryview], nbytes: int) -> Iterator[memoryview]:
    """What of *buffers* comes after the first *nbytes* bytes."""
    for buffer in buffers:
        if nbytes < len(buffer):
            yield buffer[nbytes:]
        nbytes = max(0, nbytes - len(buffer))
