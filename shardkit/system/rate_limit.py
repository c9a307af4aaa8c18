"""A limit on the bytes that are moved in a second, shared by all threads of a run."""

from __future__ import annotations

import threading
import time

_STEPS = 8  # in a second: so that a transfer is even


class RateLimit:
    """Tells how long to wait so that on average no more than so many bytes are moved."""

    def __init__(self, bytes_per_second: int) -> None:
        """Begin now.

        Args:
            bytes_per_second: at least 1.
        """
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._paid = time.monotonic()

    @property
    def step(self) -> int:
        """How many bytes to move at a time, so that they come evenly."""
        return max(1, self._rate // _STEPS)

    def wait(self, nbytes: int, stop: threading.Event | None = None) -> None:
        """Wait for as long as the *nbytes* bytes that were moved are ahead of the limit, or until
        *stop*.
        """
        with self._lock:
            now = time.monotonic()
            self._paid = max(self._paid, now) + nbytes / self._rate
            ahead = self._paid - now
        if stop is not None:
            stop.wait(ahead)
        else:
            time.sleep(ahead)
