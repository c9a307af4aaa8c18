"""A progress bar in bytes, drawn by tqdm, on a terminal only.

1. Nothing is drawn in the first moments: a short run shows no bar.
2. The bar is shorter than the terminal is wide by what Ctrl-C echoes, so that the terminal never
   breaks its line.
3. When the work ends, however it ends, the line is blank again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

OnBytes = Callable[[int], object]
"""Called with the number of bytes that were done since the last call."""

_DELAY = 0.3  # seconds before the bar appears
_ECHO = 5  # columns that stay free: "^C" twice, and the cursor
_SIZE = (80, 24)  # where the terminal does not tell its own


class Progress:
    """The work done of a total; any thread may add to it."""

    def __init__(self, bar: tqdm[Never] | None) -> None:
        """Show it on *bar*; None to show nothing."""
        self._bar = bar
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """Say how many bytes there are in all."""
        if self._bar is not None:
            with self._lock:
                self._bar.total = nbytes  # `reset` would draw at once, whatever the delay

    def add(self, nbytes: int) -> None:
        """Say that so many more bytes are done."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(nbytes)


@contextmanager
def progress(label: str, nbytes: int | None = None, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar that is gone when the work is done.

    There is none if *quiet*, where stderr is no terminal, where lines of a log come to it, and
    without tqdm.

    Args:
        label: what is being done.
        nbytes: how many bytes there are in all, where that is known.
        quiet: show nothing.
    """
    logged = logging.getLogger("shardkit").handlers
    if quiet or logged or sys.stderr is None or not sys.stderr.isatty():
        yield Progress(None)
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield Progress(None)
        return
    stream = _Watched(sys.stderr)
    with tqdm(
        desc=label, total=nbytes, unit="B", unit_scale=True, leave=False, delay=_DELAY, file=stream
    ) as bar:
        # A terminal may be made wider or narrower meanwhile. The stubs know the argument only,
        # which is a bool.
        bar.dynamic_ncols = _room  # type: ignore[assignment]
        try:
            yield Progress(bar)
        finally:
            bar.close()
            if stream.is_written:  # which tqdm does not know if Ctrl-C came while it drew
                _blank(sys.stderr)


def announce(sentence: str) -> None:
    """Say what is about to happen: on a terminal where a bar would be drawn, else in the log."""
    log = logging.getLogger("shardkit")
    if log.handlers or sys.stderr is None or not sys.stderr.isatty():
        log.info("%s", sentence)
    else:
        sys.stderr.write(f"{sentence}\n")


class _Watched:
    """A stream that knows whether anything was written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_written = False

    def write(self, text: str) -> int:
        self.is_written = True
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


def _room(stream: TextIO) -> tuple[int, int]:
    """Columns and lines that the bar may take."""
    columns, lines = _SIZE
    with contextlib.suppress(OSError, ValueError, AttributeError):
        size = os.get_terminal_size(stream.fileno())
        columns, lines = size.columns or columns, size.lines or lines
    return max(1, columns - _ECHO), lines


def _blank(stream: TextIO) -> None:
    """Leave nothing on the line, an echo of Ctrl-C behind the bar neither."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone stops no work
        stream.write(f"\r{' ' * (_room(stream)[0] + _ECHO - 1)}\r")
        stream.flush()
