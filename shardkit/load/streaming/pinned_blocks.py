"""Pinned host copies: weights that stay in main memory and stream from there. Each block is one run
of memory, from which its device copies.

A block is read into its memory once, laid out as in the prefetch buffer, and is copied from there
unchanged: no reader touches it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from shardkit.alignment import ALIGNMENT, round_up
from shardkit.load.devices.transfers import DeviceTransfer
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.memory.parallel_reads import address, fill_all
from shardkit.load.memory.pinned_payload import PinnedBlock, PinnedPayload
from shardkit.load.streaming.page_layout import Layout
from shardkit.payloads.payload import Payload
from shardkit.system.progress import progress


def kept_recipes(
    blocks: Sequence[Sequence[Recipe]], lane: DeviceTransfer
) -> list[tuple[Recipe, ...]]:
    """Those of the same tensors in memory that *lane* sends from, to which they are read.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room.
    """
    laid_out = [[(recipe, *recipe.in_memory) for recipe in block] for block in blocks]
    kept = keep([[payload for _, payload, _ in block] for block in laid_out], lane)
    return [
        tuple(
            Recipe(held, recipe.dtype, recipe.shape, strides)
            for (recipe, _, strides), held in zip(block, there, strict=True)
        )
        for block, there in zip(laid_out, kept, strict=True)
    ]


def keep(blocks: Sequence[Sequence[Payload]], lane: DeviceTransfer) -> list[list[PinnedPayload]]:
    """Bring *blocks* into memory that *lane* sends from; a bar on the terminal shows how far they
    are.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room.
    """
    kept = [_laid_out(payloads, lane) for payloads in blocks]
    pairs = [
        pair
        for payloads, there in zip(blocks, kept, strict=True)
        for pair in zip(payloads, there, strict=True)
    ]
    pairs.sort(key=lambda pair: address(pair[0]))
    with progress("placing weights", sum(payload.nbytes for payload, _ in pairs)) as bar:
        fill_all(
            ((payload, there.memory) for payload, there in pairs if there.nbytes), on_bytes=bar.add
        )
    return kept


def memory_of_page(payloads: Sequence[Payload], layout: Layout) -> torch.Tensor | None:
    """The memory in which *payloads* lie as *layout* wants them, and nothing else lies; None if
    there is none.
    """
    blocks = {payload.block if isinstance(payload, PinnedPayload) else None for payload in payloads}
    block = blocks.pop() if len(blocks) == 1 else None
    starts = tuple(payload.start for payload in payloads if isinstance(payload, PinnedPayload))
    return (
        block.memory
        if block is not None and starts == layout.places and len(block.memory) <= layout.nbytes
        else None
    )


def _laid_out(payloads: Sequence[Payload], lane: DeviceTransfer) -> list[PinnedPayload]:
    """Addresses in fresh memory, in which nothing is yet, for as many bytes as *payloads* have."""
    *starts, nbytes = accumulate(
        (round_up(payload.nbytes, ALIGNMENT) for payload in payloads), initial=0
    )
    block = PinnedBlock(lane.kept(nbytes))
    return [
        PinnedPayload(block, start, payload.nbytes)
        for start, payload in zip(starts, payloads, strict=True)
    ]
