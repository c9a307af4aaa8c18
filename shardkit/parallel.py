"""The same done to many things, several at a time: the first that fails stops the others, and so does an interrupt."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

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
    wanted = list(items)
    results: list[Result | None] = [None] * len(wanted)
    failures: dict[int, BaseException] = {}
    stop = threading.Event()
    numbers = iter(range(len(wanted)))  # of which each thread takes the next: a step that no other thread can interrupt

    def report(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        on_bytes(count)

    def work() -> None:
        for number in numbers:
            if stop.is_set():
                return
            try:
                results[number] = function(wanted[number], report)
            except _Stopped:
                return
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures[number] = error
                stop.set()

    together = min(_TOGETHER, os.cpu_count() or 1, len(wanted))
    with Pool(max(1, together), "shardkit-read") as pool:
        try:
            for future in [pool.submit(work) for _ in range(together)]:
                future.result()
        finally:
            stop.set()
    try:
        if failures:
            raise failures[min(failures)]
    finally:
        failures.clear()  # a frame that holds what raised is a circle, and would keep memory
    return cast(list[Result], results)


class _Stopped(BaseException):
    """Another item failed, or the run was interrupted."""
