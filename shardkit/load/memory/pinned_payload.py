"""Payloads of weights that stay in host memory, from which a device copies them.

`PinnedPayload` is a range of the memory of its block. It keeps that memory alive, and does not
change when a file does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shardkit.load.memory.allocate import memory_of
from shardkit.payloads.payload import CHUNK, Buffer, Extent, check_range


@dataclass(frozen=True, eq=False, slots=True)
class PinnedBlock:
    """The *memory* of one block, as bytes."""

    memory: torch.Tensor


@dataclass(frozen=True, slots=True)
class PinnedPayload:
    """Weights in the memory of their block.

    Attributes:
        block: it.
        start: where in it they begin.
        nbytes: how many bytes they are.
    """

    block: PinnedBlock
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

    def narrow(self, start: int, nbytes: int) -> PinnedPayload:
        check_range(start, nbytes, self.nbytes)
        return PinnedPayload(self.block, self.start + start, nbytes)

    def chunks(self) -> Iterator[memoryview]:
        whole = self.memory
        return (whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK))
