"""A progress bar in bytes, on a terminal only.

1. Nothing is drawn in the first moments: a short run shows no bar.
2. The bar is one line, shorter than the terminal is wide by what Ctrl-C echoes, so that the terminal never breaks it.
3. When the work ends, however it ends, the line is blank again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from shardkit.sizes import format_size

_DELAY = 0.3  # seconds before the bar appears
_INTERVAL = 0.1  # seconds between two drawings
_ECHO = 5  # columns that stay free: "^C" twice, and the cursor
_LEAST_BAR, _MOST_BAR = 5, 30
_COLUMNS = 80  # where the terminal does not tell


class Progress:
    """What has been done of a whole; any thread may add to it."""

    def __init__(self, bar: Bar | None) -> None:
        """Show it on *bar*; None to show nothing."""
        self._bar = bar

    def expect(self, nbytes: int) -> None:
        """Say how many bytes there are in all."""
        if self._bar is not None:
            self._bar.expect(nbytes)

    def add(self, nbytes: int) -> None:
        """Say that so many more bytes are done."""
        if self._bar is not None:
            self._bar.add(nbytes)


class Bar:
    """The line on the terminal; any thread may use it."""

    def __init__(self, stream: TextIO, label: str, total: int | None) -> None:
        self._stream = stream
        self._label = label
        self._total = total
        self._done = 0
        self._begun = time.monotonic()
        self._drawn = self._begun + _DELAY - _INTERVAL
        self._width = 0  # columns of what stands on the line now
        self._ended = False
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """Begin anew, with so many bytes to do."""
        with self._lock:
            self._total, self._done = nbytes, 0

    def add(self, nbytes: int) -> None:
        """Count so many more bytes, and draw the line if it is time."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._drawn >= _INTERVAL and not self._ended:
                self._drawn = now
                self._show(line(self._label, self._done, self._total, now - self._begun, self._room()))

    def end(self) -> None:
        """Leave a blank line, and draw no more."""
        with self._lock:
            self._ended = True
            if self._width:
                self._write(f"\r{' ' * (self._width + _ECHO - 1)}\r")

    def _show(self, text: str) -> None:
        blanks = " " * (self._width - len(text))
        self._width = len(text)
        self._write(f"\r{text}{blanks}")

    def _write(self, text: str) -> None:
        # A terminal that is gone, or whose character set lacks the bar, stops no work.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()

    def _room(self) -> int:
        """Columns that the line may take."""
        columns = 0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            columns = os.get_terminal_size(self._stream.fileno()).columns
        return max(1, (columns or _COLUMNS) - _ECHO)


def line(label: str, done: int, total: int | None, seconds: float, room: int) -> str:
    """How far the work called *label* is, after so many *seconds*, in at most *room* columns.

    >>> line("writing", 500, 2000, 1.0, 60)
    'writing:  25% [######                    ] 500 B/s, 3 s left'
    """
    speed = done / seconds if seconds > 0 else 0.0
    rate = f"{format_size(int(speed))}/s"
    if not total:
        return f"{label}: {format_size(done)}, {rate}"[:room]
    left = f", {_duration((total - done) / speed)} left" if speed else ""
    head, tail = f"{label}: {min(1.0, done / total):4.0%}", f"{rate}{left}"
    width = min(_MOST_BAR, room - len(head) - len(tail) - 4)
    if width < _LEAST_BAR:
        return f"{head} {tail}"[:room]
    filled = min(width, width * done // total)
    return f"{head} [{'#' * filled}{' ' * (width - filled)}] {tail}"


@contextmanager
def progress(label: str, nbytes: int | None = None, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar that is gone when the work is done; none if *quiet*, where stderr is no terminal, or lines of a log come to it.

    Args:
        label: what is being done.
        nbytes: how many bytes there are in all, where that is known.
        quiet: show nothing.
    """
    logged = logging.getLogger("shardkit").handlers
    if quiet or logged or sys.stderr is None or not sys.stderr.isatty():
        yield Progress(None)
        return
    bar = Bar(sys.stderr, label, nbytes)
    try:
        yield Progress(bar)
    finally:
        bar.end()


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
