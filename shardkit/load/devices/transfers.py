"""Transfers to the device that runs a block, and the order between copies and computation.

1. A lane allocates the memory of a device, and the main memory that is copied to it: buffers that
   are filled repeatedly, and pinned host copies, which are filled once. On the CPU the first is the
   memory of the device, and nothing is copied. An accelerator copies from pinned memory, on a
   stream of its own, for which only the work that needs the data waits.
2. A ticket stands for work that was issued and may not be done yet. Code that needs it done says so
   on the ticket: either the work that this thread issues next comes after it (`precede`), or the
   thread itself waits (`finish`).
3. A moment records when such work is done, to be read later: no thread waits for a timer.
4. A thread that fills main memory finishes the tickets of the copies from it. A thread that copies
   to device memory passes the tickets of all work that used that memory; work that uses the copy
   lets the ticket of the copy precede.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from shardkit.errors import LoadError
from shardkit.load.devices.pinned import kept_memory, ring_memory
from shardkit.load.memory.allocate import aligned, private
from shardkit.sizes import format_size


class Ticket(Protocol):
    """Work of a device that was issued, and may not be done yet."""

    @property
    def line(self) -> Hashable:
        """Where it was issued: of the tickets of one line, a later one is never done before an
        earlier one.
        """
        ...

    def precede(self) -> None:
        """Let everything that this thread issues from now on come after it."""
        ...

    def finish(self) -> None:
        """Return when it is done."""
        ...


class Timestamp(Protocol):
    """When a device has done all that one thread had issued."""

    @property
    def passed(self) -> bool:
        """Whether it has."""
        ...

    def seconds_since(self, earlier: Timestamp) -> float:
        """The time from *earlier*, which is of the same device, to here; returns when this has
        passed.
        """
        ...


class DeviceTransfer(Protocol):
    """The way to the memory of one device; any thread may use it."""

    @property
    def device(self) -> torch.device:
        """The device."""
        ...

    @property
    def apart(self) -> bool:
        """Whether its memory is other than main memory, and gets copies of what is kept there."""
        ...

    def memory(self, nbytes: int) -> torch.Tensor:
        """Fresh memory there, as bytes; it begins at a page.

        Raises:
            LoadError: there is no room for it.
        """
        ...

    def host(self, memory: torch.Tensor) -> torch.Tensor:
        """Main memory of the length of *memory*, for `send`; it begins at a page. It is *memory*
        itself where that will do.

        Raises:
            LoadError: there is no room for it.
        """
        ...

    def kept(self, nbytes: int) -> torch.Tensor:
        """Main memory that is filled once, for `send`, as bytes: exactly so many.

        Raises:
            LoadError: there is no room for it.
        """
        ...

    def send(self, host: torch.Tensor, memory: torch.Tensor, after: Sequence[Ticket]) -> Ticket:
        """Copy *host* to *memory*, unless they are the same; in the order in which they are sent,
        and on one line.

        Args:
            host: what `host` or `kept` gave, or a part of it.
            memory: what `memory` gave, or a part of it.
            after: what must be done before *memory* may change.
        """
        ...

    def issued(self, memory: torch.Tensor) -> Ticket:
        """All that this thread has issued so far, which may use *memory*."""
        ...

    def moment(self) -> Timestamp:
        """When all is done that this thread has issued so far."""
        ...


def lane_to(device: torch.device) -> DeviceTransfer:
    """The lane to *device*.

    Raises:
        LoadError: there can be none.
    """
    return CpuTransfer() if device.type == "cpu" else AcceleratorTransfer(device)


@dataclass(frozen=True, slots=True)
class Done:
    """Work that is done when it is issued."""

    line: Hashable = None

    def precede(self) -> None:
        return

    def finish(self) -> None:
        return


_DONE = Done()


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment of this processor, *at* so many seconds: it has passed when it is there."""

    at: float

    @property
    def passed(self) -> bool:
        return True

    def seconds_since(self, earlier: Timestamp) -> float:
        assert isinstance(earlier, Instant)
        return self.at - earlier.at


@dataclass(frozen=True, slots=True)
class CpuTransfer:
    """To main memory: what is written is there."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def apart(self) -> bool:
        return False

    def memory(self, nbytes: int) -> torch.Tensor:
        return private(nbytes)

    def host(self, memory: torch.Tensor) -> torch.Tensor:
        return memory

    def kept(self, nbytes: int) -> torch.Tensor:
        return aligned(nbytes)

    def send(self, host: torch.Tensor, memory: torch.Tensor, after: Sequence[Ticket]) -> Ticket:
        return _DONE

    def issued(self, memory: torch.Tensor) -> Ticket:
        return _DONE

    def moment(self) -> Timestamp:
        return Instant(time.perf_counter())


class AcceleratorTransfer:
    """To the memory of an accelerator, by a stream of its own."""

    apart = True

    def __init__(self, device: torch.device) -> None:
        """Hold no memory yet.

        Raises:
            LoadError: torch can do but one thing at a time there, as with Metal: then a copy would
                hold up what is computed.
        """
        self.device = device
        try:
            self._stream = torch.Stream(device=device)
        except RuntimeError as error:
            hint = 'keep all weights on that device, or run the model on "cpu"'
            raise LoadError(
                f"weights cannot stream to {device}, which has no streams: {error}", hint=hint
            ) from None

    def memory(self, nbytes: int) -> torch.Tensor:
        # Its allocator thinks of the stream that asks: for that one alone all is over that used
        # this memory before, and only of what that one does it knows when the memory is let go.
        memory = self._fresh(nbytes)
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        memory.record_stream(self._stream)
        return memory

    def host(self, memory: torch.Tensor) -> torch.Tensor:
        return ring_memory(len(memory), self.device)

    def kept(self, nbytes: int) -> torch.Tensor:
        return kept_memory(nbytes, self.device)

    def send(self, host: torch.Tensor, memory: torch.Tensor, after: Sequence[Ticket]) -> Ticket:
        # Other threads may send in between: then this copy waits for more than it must, and so does
        # who needs it.
        for ticket in after:
            assert isinstance(ticket, _Event)
            self._stream.wait_event(ticket.event)
        with _issuing_on(self._stream):
            memory.copy_(host, non_blocking=True)
        return _Event.after(self._stream)

    def issued(self, memory: torch.Tensor) -> Ticket:
        stream = torch.accelerator.current_stream(self.device)
        memory.record_stream(
            stream
        )  # its allocator must not give the memory away while that work may run
        return _Event.after(stream)

    def moment(self) -> Timestamp:
        if (
            self.device.type != "cuda"
        ):  # others may have no clock, and then the time is that of issuing
            return Instant(time.perf_counter())
        event = torch.Event(device=self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return _Mark(event)

    def _fresh(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            hint = "keep fewer weights on that device, or reduce ring="
            raise LoadError(
                f"no memory on {self.device} for {format_size(nbytes)} of weights", hint=hint
            ) from error


def _issuing_on(stream: torch.Stream) -> AbstractContextManager[object]:
    """The context in which what this thread issues goes to *stream*."""
    if not hasattr(stream, "__enter__"):  # before torch 2.7
        context: AbstractContextManager[object] = torch.get_device_module(stream.device).stream(
            stream
        )
        return context
    # A second object, because each remembers the stream to return to: it is a context of one thread
    # at a time.
    return torch.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


@dataclass(frozen=True, slots=True)
class _Event:
    event: torch.Event
    line: Hashable

    @classmethod
    def after(cls, stream: torch.Stream) -> _Event:
        """All that *stream* was given so far."""
        event = torch.Event(device=stream.device)
        event.record(stream)
        return cls(event, (stream.device_type, stream.device_index, stream.stream_id))

    def precede(self) -> None:
        torch.accelerator.current_stream(self.event.device).wait_event(self.event)

    def finish(self) -> None:
        self.event.synchronize()


@dataclass(frozen=True, slots=True)
class _Mark:
    event: torch.Event

    @property
    def passed(self) -> bool:
        return self.event.query()

    def seconds_since(self, earlier: Timestamp) -> float:
        assert isinstance(earlier, _Mark)
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000
