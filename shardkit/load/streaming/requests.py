"""What a thread waits for: a block that it asked the owner of the streaming state for, or the
result of another message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shardkit.load.streaming.pages import Habit
from shardkit.load.streaming.reader_pool import PendingRead, locked, ring

_R = TypeVar("_R")

PATIENCE = 1.0  # seconds until a thread that waits for the owner asks again


@dataclass(eq=False, slots=True)
class Request:
    """A block that a thread waits for.

    Attributes:
        number: the block.
        borrower: who needs it.
        habit: that of the thread.
        holding: whether the thread has borrowed another block meanwhile.
        bell: released when the thread can go on.
        read: what it waited for, which is over then; None if all is closed.
        error: why there is none.
    """

    number: int
    borrower: Hashable
    habit: Habit
    holding: bool
    bell: threading.Lock = field(default_factory=locked)
    read: PendingRead | None = None
    error: Exception | None = None

    def wait_for(self, read: PendingRead) -> None:
        """Go on when *read* is over."""
        self.read = read
        read.add_waiter(self.bell)

    def refuse(self, error: Exception | None = None) -> None:
        """Go on without a read."""
        self.error = error
        ring(self.bell)

    def answer(self) -> PendingRead | None:
        """The read, once the bell was rung."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # a frame that holds what was raised in it is a circle
        return self.read


class Answer(Generic[_R]):
    """What the owner gives when it has done a message."""

    def __init__(self, message: Callable[[], _R]) -> None:
        self._message = message
        self._bell = locked()
        self._result: list[_R] = []
        self._error: Exception | None = None

    def give(self) -> None:
        """Do the message, as the owner."""
        try:
            self._result.append(self._message())
        except Exception as error:  # noqa: BLE001 - raised by who asked
            self._error = error
        self._bell.release()

    def wait(self, ask_again: Callable[[], object]) -> _R:
        """What it gave.

        Args:
            ask_again: called when that takes long, because no thread may be there that does
                messages: of several threads that could not start one, only the last finds out. What
                it raises ends the wait.
        """
        while not self._bell.acquire(timeout=PATIENCE):
            ask_again()
        if self._error is not None:
            raise self._error
        return self._result[0]
