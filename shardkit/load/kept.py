"""Weights that stay in main memory and stream from there: each block is one run of memory, which its device copies out of.

1. A block is read into its memory once, laid out as in the ring, and is sent from there as it lies: no reader touches it again.
2. `Kept` is the address of weights in such memory. It holds the memory, and does not change when a file does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from shardkit.load.filling import address, fill_all
from shardkit.load.lanes import Lane
from shardkit.load.layouts import ALIGNMENT, Layout
from shardkit.load.memory import memory_of
from shardkit.load.recipe import Recipe
from shardkit.payload import CHUNK, Buffer, Extent, Payload, check_range
from shardkit.progress import progress


@dataclass(frozen=True, eq=False, slots=True)
class KeptBlock:
    """The *memory* of one block, as bytes."""

    memory: torch.Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights in the memory of their block.

    Attributes:
        block: it.
        start: where in it they begin.
        nbytes: how many bytes they are.
    """

    block: KeptBlock
    start: int
    nbytes: int

    def __reduce__(self) -> tuple[type[Buffer], tuple[bytes]]:
        return Buffer, (bytes(self.memory),)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    @property
    def memory(self) -> memoryview:
        """The bytes."""
        return memory_of(self.block.memory)[self.start : self.start + self.nbytes]

    def narrow(self, start: int, nbytes: int) -> Kept:
        check_range(start, nbytes, self.nbytes)
        return Kept(self.block, self.start + start, nbytes)

    def chunks(self) -> Iterator[memoryview]:
        whole = self.memory
        return (whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK))


def kept_recipes(blocks: Sequence[Sequence[Recipe]], lane: Lane) -> list[tuple[Recipe, ...]]:
    """Those of the same tensors in memory that *lane* sends from, to which they are read.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room.
    """
    laid_out = [[(recipe, *recipe.in_memory) for recipe in block] for block in blocks]
    kept = keep([[payload for _, payload, _ in block] for block in laid_out], lane)
    return [
        tuple(Recipe(held, recipe.dtype, recipe.shape, strides) for (recipe, _, strides), held in zip(block, there, strict=True))
        for block, there in zip(laid_out, kept, strict=True)
    ]


def keep(blocks: Sequence[Sequence[Payload]], lane: Lane) -> list[list[Kept]]:
    """Bring *blocks* into memory that *lane* sends from; a bar on the terminal shows how far they are.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room.
    """
    kept = [_laid_out(payloads, lane) for payloads in blocks]
    pairs = [pair for payloads, there in zip(blocks, kept, strict=True) for pair in zip(payloads, there, strict=True)]
    pairs.sort(key=lambda pair: address(pair[0]))
    with progress("placing weights", sum(payload.nbytes for payload, _ in pairs)) as bar:
        fill_all(((payload, there.memory) for payload, there in pairs if there.nbytes), on_bytes=bar.add)
    return kept


def memory_of_page(payloads: Sequence[Payload], layout: Layout) -> torch.Tensor | None:
    """The memory in which *payloads* lie as *layout* wants them, and nothing else lies; None if there is none."""
    blocks = {payload.block if isinstance(payload, Kept) else None for payload in payloads}
    block = blocks.pop() if len(blocks) == 1 else None
    starts = tuple(payload.start for payload in payloads if isinstance(payload, Kept))
    return block.memory if block is not None and starts == layout.places and len(block.memory) <= layout.nbytes else None


def _laid_out(payloads: Sequence[Payload], lane: Lane) -> list[Kept]:
    """Addresses in fresh memory, in which nothing is yet, for as many bytes as *payloads* have."""
    *starts, nbytes = accumulate((-(-payload.nbytes // ALIGNMENT) * ALIGNMENT for payload in payloads), initial=0)
    block = KeptBlock(lane.kept(nbytes))
    return [Kept(block, start, payload.nbytes) for start, payload in zip(starts, payloads, strict=True)]
