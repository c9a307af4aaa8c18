"""Handle the signals that end the program: raise, so that everything that is open gets closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM has come."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, as Python itself raises KeyboardInterrupt on Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
