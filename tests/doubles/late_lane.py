"""A device for tests: memory of its own, and copies that come as late as they may."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from shardkit.load.devices.transfers import Instant, Ticket, Timestamp
from shardkit.load.memory.allocate import aligned, private


class LateTicket:
    """A copy that happens when somebody cannot go on without it."""

    line = "late"

    def __init__(self, lane: LateLane, number: int) -> None:
        self.lane = lane
        self.number = number

    def precede(self) -> None:
        self.lane.run_until(self.number)

    def finish(self) -> None:
        self.lane.run_until(self.number)


class LateLane:
    """A device with memory of its own. Until a copy is run, its target holds NaNs; what is copied
    is what the host holds then.

    Attributes:
        bytes: memory of the device that was asked for.
        host_bytes: main memory that was asked for to be filled again and again.
        kept_bytes: main memory that was asked for to be filled once.
        sent: address and length of all that was sent, in order.
    """

    apart = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.lock = threading.RLock()
        self.queue: list[tuple[int, Callable[[], None]]] = []
        self.count = 0
        self.bytes = 0
        self.host_bytes = 0
        self.kept_bytes = 0
        self.sent: list[tuple[int, int]] = []

    def memory(self, nbytes: int) -> torch.Tensor:
        self.bytes += nbytes
        return torch.full(
            (nbytes,), 0xFF, dtype=torch.uint8, device="cpu"
        )  # whatever the default device

    def host(self, memory: torch.Tensor) -> torch.Tensor:
        self.host_bytes += len(memory)
        return private(len(memory))

    def kept(self, nbytes: int) -> torch.Tensor:
        self.kept_bytes += nbytes
        return aligned(nbytes)

    def send(self, host: torch.Tensor, memory: torch.Tensor, after: Sequence[Ticket]) -> Ticket:
        def copy() -> None:
            for ticket in after:
                ticket.finish()
            memory.copy_(host)

        with self.lock:
            self.count += 1
            self.sent.append((host.data_ptr(), len(host)))
            self.queue.append((self.count, copy))
            memory.fill_(0xFF)
            return LateTicket(self, self.count)

    def issued(self, memory: torch.Tensor) -> Ticket:
        return LateTicket(self, 0)

    def moment(self) -> Timestamp:
        return Instant(time.perf_counter())

    def run_until(self, number: int) -> None:
        with self.lock:
            while self.queue and self.queue[0][0] <= number:
                self.queue.pop(0)[1]()
