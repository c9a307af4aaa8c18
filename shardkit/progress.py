"""A progress bar in bytes, on a terminal only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """What has been done of a whole; any thread may add to it."""

    def __init__(self, bar: tqdm[Never] | None) -> None:
        """Show it on *bar*; None to show nothing."""
        self._bar = bar
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """Say how many bytes there are in all."""
        if self._bar is not None:
            self._bar.reset(nbytes)

    def add(self, nbytes: int) -> None:
        """Say that so many more bytes are done."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(nbytes)


@contextmanager
def progress(label: str, nbytes: int | None = None, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar that is gone when the work is done; none if *quiet*, where stderr is no terminal, or without tqdm.

    Args:
        label: what is being done.
        nbytes: how many bytes there are in all, where that is known.
        quiet: show nothing.
    """
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield Progress(None)
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield Progress(None)
        return
    with tqdm(
        desc=label, total=nbytes, unit="B", unit_scale=True, leave=False, delay=0.3, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        yield Progress(bar)
