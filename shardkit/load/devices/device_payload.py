"""Weights in the memory of an accelerator, as payloads that are copied to main memory when they are
read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from shardkit.payloads.payload import CHUNK, Extent, check_range


@dataclass(frozen=True, slots=True)
class Remote:
    """The memory of an accelerator, of which each chunk is copied to main memory when it is asked
    for.

    Equal are the same runs of one storage, which all of them keep; so its address tells it from
    others.

    Attributes:
        memory: uint8, of one axis.
        origin: device and address of the storage.
        start: where in the storage the run begins.
    """

    memory: torch.Tensor = field(compare=False, repr=False)
    origin: tuple[str, int]
    start: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", len(self.memory))

    @classmethod
    def of(cls, memory: torch.Tensor, origin: tuple[str, int]) -> Remote:
        """All of *memory*, once what was issued to write it is done: other threads copy it, and on
        streams of their own.
        """
        torch.accelerator.synchronize(memory.device)
        return cls(memory, origin)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Remote:
        check_range(start, nbytes, self.nbytes)
        return Remote(self.memory[start : start + nbytes], self.origin, self.start + start)

    def chunks(self) -> Iterator[memoryview]:
        return (
            self.memory[at : at + CHUNK].cpu().numpy().data for at in range(0, self.nbytes, CHUNK)
        )
