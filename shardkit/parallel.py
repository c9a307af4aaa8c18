"""The same done to many things, several at a time: the first that fails stops the others, and so does an interrupt."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from shardkit.copying import OnBytes
from shardkit.pools import Pool

Item = TypeVar("Item")
Result = TypeVar("Result")

_TOGETHER = 8  # more than this do not help one disk


def each(function: Callable[[Item, OnBytes], Result], items: Iterable[Item], on_bytes: OnBytes) -> list[Result]:
    """What *function* gives of each of *items*, in their order.

    Args:
        function: called, from any thread, with an item and with what it has to report the bytes it has read to.
        items: they are all taken at once.
        on_bytes: called, from any thread, with those numbers.
    """
    stop = threading.Event()

    def report(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        on_bytes(count)

    with Pool(min(_TOGETHER, os.cpu_count() or 1), "shardkit-read") as pool:
        try:
            return list(pool.map(lambda item: function(item, report), items))
        finally:
            stop.set()


class _Stopped(BaseException):
    """Another item failed, or the run was interrupted."""
