"""Memory for weights: allocated once at its exact size, and filled by large parallel reads.

1. The first touch of fresh memory costs more than the copy. `FirstTouch` makes it cheaper, and is
   shared by the threads that read.
2. Tensors share an arena of `_ARENA` bytes, so that huge pages waste no memory for small ones; a
   larger tensor has one of its own. Each tensor is a storage of its own, so that saving one saves
   no other, and an arena lives as long as one of its tensors does.
3. Tensors begin at multiples of `ALIGNMENT` bytes: the result of a float32 product can differ in
   its last bit where they do not.
4. After an exception nothing is left behind: no thread, no open file, no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from shardkit.alignment import ALIGNMENT, round_up
from shardkit.load.memory.arenas import HUGE, Arena
from shardkit.load.memory.first_touch import FirstTouch
from shardkit.load.memory.parallel_reads import WORKERS, Fill, address, fill_all
from shardkit.payloads.payload import Extent, Payload
from shardkit.system.progress import OnBytes

Item = tuple[Payload, torch.dtype, Sequence[int]]

_ARENA = 64 << 20


def aligned(nbytes: int) -> torch.Tensor:
    """*nbytes* bytes of fresh memory as a tensor that owns them; 64-byte aligned, and huge pages
    from 2 MiB on.

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
    """The bytes of a contiguous *tensor* in main memory, and whatever is cut from them, keep the
    tensor.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(bytearray())
    memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # any name will do: the array, and so the view of it, holds it
    return memoryview(memory).cast("B")


def materialise(
    items: Iterable[Item], *, workers: int = WORKERS, on_bytes: OnBytes = lambda _: None
) -> list[torch.Tensor]:
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
    order = sorted(
        range(len(wanted)), key=[address(payload) for payload, _, _ in wanted].__getitem__
    )
    tensors: list[torch.Tensor] = [torch.empty(0)] * len(wanted)
    fills: list[Fill] = []
    pages = FirstTouch()
    for number, (tensor, memory) in zip(
        order, _rooms([wanted[i] for i in order], pages), strict=True
    ):
        tensors[number] = tensor
        fills.append((wanted[number][0], memory))
    fill_all(fills, workers=workers, on_bytes=on_bytes, bring=pages.bring)
    return tensors


def mapped(items: Iterable[Item]) -> list[torch.Tensor | None]:
    """Tensors that share the page cache with their files: nothing is read before it is used, and
    what is written stays private.

    They change when the file does, and a file that becomes shorter ends the process with a bus
    error. None stands for what cannot be had so: whatever is no plain run of a file, or does not
    begin at a multiple of its element.

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


def _rooms(items: Iterable[Item], pages: FirstTouch) -> Iterator[tuple[torch.Tensor, memoryview]]:
    """For each of *items* a fresh tensor and its memory, whose *pages* can be asked for."""
    for group, nbytes in _grouped(items):
        arena = Arena.untouched(max(1, nbytes))
        pages.add(arena, nbytes)
        memory = arena.memory(0, nbytes)
        for at, (payload, dtype, shape) in group:
            yield arena.tensor(at, dtype, shape), memory[at : at + payload.nbytes]


def _grouped(items: Iterable[Item]) -> Iterator[tuple[list[tuple[int, Item]], int]]:
    """*items* as they share arenas: each with the byte at which it begins, and how many the arena
    has.
    """
    group: list[tuple[int, Item]] = []
    at = 0
    for item in items:
        size = round_up(item[0].nbytes, ALIGNMENT)
        if group and at + size > _ARENA:
            yield group, at
            group, at = [], 0
        group.append((at, item))
        at += size
    if group:
        yield group, at
