"""Measure the forwards of a model that streams, and the reads during them.

1. Forwards of one size are a series. The first of a series is not counted: the prefetch buffer
   still has the blocks of another size.
2. A forward is measured from when its device starts it until the device has finished it, which may
   be long after it was issued.
3. A timer costs a few microseconds for each forward, and nothing for each block.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardkit.load.devices.budgets import Device
from shardkit.load.devices.transfers import CpuTransfer, Timestamp
from shardkit.load.hooks.streaming_hooks import refuse_pickling
from shardkit.load.modules.torch_modes import eager
from shardkit.load.streaming.counters import Counters
from shardkit.system.fork import begin_again_in_children, never_free
from shardkit.system.threads import Exclusive

if TYPE_CHECKING:
    from shardkit.load.streaming.prefetcher import Stream


@dataclass(frozen=True, slots=True)
class Series:
    """Forwards of one size, one behind the other.

    Attributes:
        rows: vectors that each of them multiplies, such as tokens.
        forwards: how many were counted.
        seconds: what they took.
        counts: what the streams of the model did meanwhile, for whomever.
    """

    rows: int
    forwards: int = 0
    seconds: float = 0.0
    counts: Counters = field(default_factory=Counters)


class Clock:
    """The hooks of a model whose forwards are timed."""

    def __init__(
        self,
        streams: Iterable[Stream],
        *,
        chosen: bool,
        depths: Sequence[str] = (),
        device_map: Mapping[str, Device] = MappingProxyType({}),
    ) -> None:
        """Count nothing yet.

        Args:
            streams: those that the model uses.
            chosen: whether it was chosen for it what streams.
            depths: of each stream, how deep its ring is, and why.
            device_map: where the parts of the model were to go.
        """
        self.chosen = chosen
        self.depths = tuple(depths)
        self.device_map = device_map
        self._streams = tuple(streams)
        self._lanes = [stream.lane for stream in self._streams] or [CpuTransfer()]
        self._thread = threading.local()
        self._series = Series(0)
        self._before = Counters()
        self._begin()
        begin_again_in_children(self, Clock._forked)

    @property
    def series(self) -> Series:
        """The forwards since the last one of another size."""
        return self._exclusive.call(self._counted)

    def attach(self, model: nn.Module) -> None:
        """Time the forwards of *model*."""
        model.register_forward_pre_hook(self.start, prepend=True, with_kwargs=True)
        model.register_forward_hook(self.stop, always_call=True)

    @eager
    def start(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],  # Any: whatever a model takes
    ) -> None:
        """The hook before a forward."""
        self._thread.begun = self._moments(), _rows((args, kwargs)) or 1

    @eager
    def stop(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """The hook behind it; one that raised is counted like any other."""
        begun, self._thread.begun = getattr(self._thread, "begun", None), None
        if begun is None:
            return
        moments, rows = begun
        self._exclusive.call(self._add, moments, rows, self._moments())

    __reduce__ = refuse_pickling

    def __deepcopy__(self, memo: dict[int, object]) -> Clock:
        return Clock(
            deepcopy(self._streams, memo),
            chosen=self.chosen,
            depths=self.depths,
            device_map=self.device_map,
        )

    def _begin(self) -> None:
        self._exclusive = Exclusive()
        self._issued: deque[tuple[list[Timestamp], list[Timestamp]]] = deque()

    def _forked(self) -> None:
        if self._issued:
            never_free(self._issued)  # they refer to the device of the parent
        self._begin()

    def _moments(self) -> list[Timestamp]:
        """Those of now, for each device that something streams to."""
        return [lane.moment() for lane in self._lanes]

    # What one thread at a time does.

    def _add(self, moments: list[Timestamp], rows: int, ended: list[Timestamp]) -> None:
        if rows != self._series.rows:
            self._series, self._before = Series(rows), self._now()
            self._issued.clear()
        else:
            self._issued.append((moments, ended))
        self._count(lambda moment: moment.passed)

    def _counted(self) -> Series:
        self._count(lambda _: True)
        return replace(self._series, counts=self._now().since(self._before))

    def _count(self, may: Callable[[Timestamp], bool]) -> None:
        """Add the forwards that were issued to the series, as long as one *may* be looked at."""
        while self._issued and all(map(may, self._issued[0][1])):
            begun, ended = self._issued.popleft()
            seconds = max(end.seconds_since(begin) for begin, end in zip(begun, ended, strict=True))
            self._series = Series(
                self._series.rows, self._series.forwards + 1, self._series.seconds + seconds
            )

    def _now(self) -> Counters:
        counts = [stream.counts for stream in self._streams]
        return Counters(
            *(sum(getattr(each, name) for each in counts) for name in Counters.__slots__)
        )


def _rows(value: object) -> int | None:
    """How many vectors the first tensor in *value* is: an index stands for one, and of floats the
    last axis is one.
    """
    match value:
        case torch.Tensor():
            return value.numel() // max(
                1, value.shape[-1] if value.is_floating_point() and value.ndim else 1
            )
        case tuple() | list():
            parts: Iterable[object] = value
        case Mapping():
            parts = value.values()
        case _:
            return None
    return next((rows for part in parts if (rows := _rows(part)) is not None), None)
