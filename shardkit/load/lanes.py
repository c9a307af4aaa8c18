"""The device seam: how weights come to where a block runs, and who must wait for whom.

1. A lane makes the memory of a device and fills it. On the CPU the reader writes into that memory itself. An accelerator gets
   a copy out of pinned memory, on a stream of its own, which the reader does not wait for.
2. A ticket stands for work that was issued and may not be done yet. Whoever needs it done says so on the ticket: either the
   work that this thread issues next comes after it (`precede`), or the thread itself waits (`finish`).
3. Whoever fills memory passes the tickets of all that used it; whoever uses it lets the ticket of its filling precede.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shardkit.load.memory import aligned, memory_of

Write = Callable[[memoryview], None]


class Ticket(Protocol):
    """Work of a device that was issued, and may not be done yet."""

    def precede(self) -> None:
        """Let everything that this thread issues from now on come after it."""
        ...

    def finish(self) -> None:
        """Return when it is done."""
        ...


class Lane(Protocol):
    """The way to the memory of one device; any thread may use it."""

    @property
    def device(self) -> torch.device:
        """The device."""
        ...

    def memory(self, nbytes: int) -> torch.Tensor:
        """Fresh memory there, as bytes; 64-byte aligned.

        Raises:
            LoadError: there is no room for it.
        """
        ...

    def fill(self, memory: torch.Tensor, write: Write, after: Sequence[Ticket]) -> Ticket:
        """Fill *memory* with what *write* writes into main memory of the same length.

        Args:
            memory: what `memory` gave, or the beginning of it.
            write: called in this thread, before this returns.
            after: what must be done before *memory* may change.
        """
        ...

    def issued(self, memory: torch.Tensor) -> Ticket:
        """All that this thread has issued so far, which may use *memory*."""
        ...


def lane_to(device: torch.device) -> Lane:
    """The lane to *device*."""
    return CpuLane() if device.type == "cpu" else AcceleratorLane(device)


@dataclass(frozen=True, slots=True)
class Done:
    """Work that is done when it is issued."""

    def precede(self) -> None:
        return

    def finish(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class CpuLane:
    """To main memory: what is written is there."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def memory(self, nbytes: int) -> torch.Tensor:
        return aligned(nbytes)

    def fill(self, memory: torch.Tensor, write: Write, after: Sequence[Ticket]) -> Ticket:
        write(memory_of(memory))
        return Done()

    def issued(self, memory: torch.Tensor) -> Ticket:
        return Done()


class AcceleratorLane:
    """To the memory of an accelerator, by a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        """Hold no memory yet."""
        self.device = device
        self._stream = torch.Stream(device=device)
        self._reader = threading.local()

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def fill(self, memory: torch.Tensor, write: Write, after: Sequence[Ticket]) -> Ticket:
        pinned = self._pinned(len(memory))
        write(memory_of(pinned))
        for ticket in after:
            assert isinstance(ticket, _Event)
            self._stream.wait_event(ticket.event)
        with self._stream:
            memory.copy_(pinned, non_blocking=True)
        memory.record_stream(self._stream)
        copied = _Event.after(self._stream)
        self._reader.copied = copied
        return copied

    def issued(self, memory: torch.Tensor) -> Ticket:
        stream = torch.accelerator.current_stream(self.device)
        memory.record_stream(stream)  # its allocator must not give the memory away while that work may run
        return _Event.after(stream)

    def _pinned(self, nbytes: int) -> torch.Tensor:
        """This thread's memory to copy from, once the last copy out of it is done."""
        if copied := getattr(self._reader, "copied", None):
            copied.finish()
        if len(getattr(self._reader, "pinned", ())) < nbytes:
            self._reader.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        pinned: torch.Tensor = self._reader.pinned[:nbytes]
        return pinned


@dataclass(frozen=True, slots=True)
class _Event:
    event: torch.Event

    @classmethod
    def after(cls, stream: torch.Stream) -> _Event:
        """All that *stream* was given so far."""
        event = torch.Event(device=stream.device)
        event.record(stream)
        return cls(event)

    def precede(self) -> None:
        torch.accelerator.current_stream(self.event.device).wait_event(self.event)

    def finish(self) -> None:
        self.event.synchronize()
