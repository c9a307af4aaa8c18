"""The result of `explain`, as a value that prints: the parts of a model, where they are and why,
and how long a forward takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from shardkit.alignment import ALIGNMENT
from shardkit.brief import brief
from shardkit.load.devices.budgets import Device
from shardkit.load.hooks.forward_timer import Series
from shardkit.load.performance.bandwidth import Rates
from shardkit.load.performance.cost_model import STAGES, Prediction, Step
from shardkit.printable import several
from shardkit.sizes import format_size

_NUMBERED = re.compile(r"(.*?)(\d+)(.*)")
_MANY = 5  # numbers that are written out; of more, the first and the last


@dataclass(frozen=True, slots=True)
class Part:
    """A block that streams, or resident weights that have the same reason.

    Attributes:
        name: of the module, or of the weight where the module holds more; "" for the model.
        place: the device that stores it: "disk", "cpu", the number of an accelerator.
        runs_on: the device that runs it.
        nbytes: its size where it is run.
        why: the reason.
        step: the work that it adds to a forward.
        cast: bytes of it that are cast whenever they are read.
        compressed: bytes of it that are decompressed whenever they are read.
        askew: how many of its weights are not aligned to 64 bytes in their files, and are moved
            when they are read.
    """

    name: str
    place: Device
    runs_on: str
    nbytes: int
    why: str
    step: Step
    cast: int = 0
    compressed: int = 0
    askew: int = 0

    @property
    def streams(self) -> bool:
        """Whether its weights are loaded for each forward."""
        return bool(self.step.room)


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """The result of `explain`: where each part is and why, and how long a forward takes.

    Attributes:
        model: the class of the model.
        parts: in the order of the model.
        ring: size in bytes of the prefetch buffer, which blocks stream through.
        depths: for each device that blocks stream to, how many are prefetched, and why.
        rows: vectors that a forward multiplies, such as tokens.
        rates: the throughput that the prediction uses; None where nothing streams.
        predicted: how long a forward should take; None where nothing streams.
        measured: the forwards that were run with as many rows; None where there were none.

    Example:
        >>> from shardkit.load import explain, init_on_device
        >>> from torch import nn
        >>> with init_on_device("cpu"):
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> explanation = explain(model)
        >>> explanation.held  # bytes of weights on each device
        {'cpu': 304}
        >>> sorted(explanation.as_dict())[:4]
        ['advice', 'bytes', 'depths', 'host_ring']
    """

    model: str
    parts: tuple[Part, ...]
    ring: int = 0
    rows: int = 1
    rates: Rates | None = None
    predicted: Prediction | None = None
    measured: Series | None = None
    depths: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return brief(self)

    @property
    def read(self) -> dict[str, int]:
        """Bytes that each forward reads from files, and from main memory for another device; empty
        if all weights fit the prefetch buffer.
        """
        streamed = [part for part in self.parts if part.streams and not self.stays]
        memory = sum(part.nbytes for part in streamed if part.place != "disk")
        return {"disk": sum(part.step.disk for part in streamed), "memory": memory}

    @property
    def stays(self) -> bool:
        """Whether all streamed blocks fit the prefetch buffer at once, so that only the first
        forward reads them.
        """
        return sum(part.step.room for part in self.parts) <= self.ring

    @property
    def host_ring(self) -> int:
        """Bytes of the host staging buffer, through which blocks on disk are copied to another
        device; as large as the prefetch buffer there.
        """
        passing = any(
            part.streams and part.place == "disk" and part.runs_on != "cpu" for part in self.parts
        )
        return self.ring if passing else 0

    @property
    def held(self) -> dict[Device, int]:
        """Bytes of weights on each device; streamed weights on disk count there only, without the
        prefetch buffer.
        """
        held: dict[Device, int] = {}
        for part in self.parts:
            held[part.place] = held.get(part.place, 0) + part.nbytes
        return held

    @property
    def seconds(self) -> float | None:
        """Seconds of a forward, as measured."""
        return self.measured.seconds / self.measured.forwards if self.measured else None

    @property
    def achieved(self) -> float | None:
        """Bytes per second at which the disk was read, while it was."""
        counts = self.measured.counts if self.measured else None
        return counts.disk / counts.reading if counts and counts.disk and counts.reading else None

    @property
    def hidden(self) -> float | None:
        """Share of the read time that no forward waited for, as measured.

        An accelerator gets its work before the weights are there, so its waiting cannot be
        observed: there, the measured time is compared with the predicted compute time.
        """
        if any(part.streams and part.runs_on != "cpu" for part in self.parts):
            taken = (
                None
                if self.predicted is None or self.seconds is None
                else replace(self.predicted, seconds=self.seconds)
            )
            return taken.hidden if taken else None
        counts = self.measured.counts if self.measured else None
        return max(0.0, 1 - counts.waited / counts.reading) if counts and counts.reading else None

    @property
    def advice(self) -> tuple[str, ...]:
        """Sentences that suggest how to make a forward faster."""
        return tuple(self._advice())

    def as_dict(self) -> dict[str, object]:
        """Return the same as a dict that JSON can store."""
        measured = self.measured
        return {
            "model": self.model,
            "parts": [asdict(part) for part in self.parts],
            "bytes": {str(place): nbytes for place, nbytes in self.held.items()},
            "ring": self.ring,
            "host_ring": self.host_ring,
            "depths": list(self.depths),
            "rows": self.rows,
            "read_per_forward": self.read,
            "rates": asdict(self.rates) if self.rates else None,
            "predicted": self.predicted and self.predicted.as_dict(),
            "measured": measured
            and {
                "seconds": self.seconds,
                "forwards": measured.forwards,
                "disk_rate": self.achieved,
                "hidden": self.hidden,
                "counts": asdict(measured.counts),
            },
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        return "\n".join([*self._heading(), *_table(self._rows()), *self._forward(), *self.advice])

    def _advice(self) -> Iterator[str]:
        cast, compressed = (
            sum(getattr(part, what) for part in self.parts) for what in ("cast", "compressed")
        )
        askew = sum(part.askew for part in self.parts)
        if cast:
            yield (
                f"{format_size(cast)} are cast whenever they are read: `shardkit offload-prep "
                "--dtype …` does it once."
            )
        if compressed:
            yield (
                f"{format_size(compressed)} are decompressed whenever they are read, which is "
                f"faster only on slow disks: "
                "`shardkit offload-prep` writes them uncompressed."
            )
        if askew:
            yield (
                f"{several(askew, 'weight')} not aligned to {ALIGNMENT} bytes, moved whenever they "
                "are read: `shardkit offload-prep` aligns them."
            )

    def _heading(self) -> Iterator[str]:
        streamed = sum(part.nbytes for part in self.parts if part.streams)
        total = sum(part.nbytes for part in self.parts)
        says = f"of which {format_size(streamed)} stream" if streamed else "nothing streams"
        if streamed and not self.ring:
            says = (
                f"of which {format_size(streamed)} are read whenever they are used: the model is "
                "closed; load it again to stream"
            )
        yield f"{self.model}: {format_size(total)} of weights, {says}"

    def _rows(self) -> Iterator[Sequence[str]]:
        groups: dict[tuple[Device, str], list[Part]] = {}
        for part in self.parts:
            groups.setdefault((part.place, part.why), []).append(part)
        for (place, why), parts in groups.items():
            count = f"{len(parts)} parts" if len(parts) > 1 else ""
            yield (
                f"{place}",
                count,
                format_size(sum(part.nbytes for part in parts)),
                why,
                ", ".join(_names(parts)),
            )
        if self.ring:
            runner = next(part.runs_on for part in self.parts if part.streams)
            yield (
                runner,
                "",
                format_size(self.ring),
                "prefetch buffer",
                "; ".join(self.depths),
            )
        if self.host_ring:
            what = "host staging buffer, for blocks on disk"
            yield "cpu", "", format_size(self.host_ring), what, ""

    def _forward(self) -> Iterator[str]:
        if self.predicted is None or self.rates is None:
            return
        rows = f"{self.rows} rows" if self.rows > 1 else "one row"
        sources = [
            f"{format_size(nbytes)} from {where}" for where, nbytes in self.read.items() if nbytes
        ]
        yield (
            f"A forward of {rows} reads "
            f"{' and '.join(sources) or 'nothing: all streamed blocks fit the prefetch buffer'}."
        )
        busy = [
            (name, taken) for name, taken in zip(STAGES, self.predicted.busy, strict=True) if taken
        ]
        stages = ", ".join(f"{name} {taken:.3g} s" for name, taken in busy)
        yield (
            f"predicted  {self.predicted}, the first {self.predicted.first:.3g} s; limit: "
            f"{self.predicted.limit}; "
            f"{self.predicted.hidden:.0%} of reading hidden ({stages})"
        )
        yield f"           with {self.rates}"
        yield f"measured   {self._measured()}"

    def _measured(self) -> str:
        if self.measured is None or self.seconds is None:
            return "nothing yet: run two forwards of this size; the first is not counted"
        many = f"the mean of {self.measured.forwards}" if self.measured.forwards > 1 else "once"
        rate = f"; disk {format_size(int(self.achieved))}/s" if self.achieved else ""
        hidden = f"; {self.hidden:.0%} of reading hidden" if self.hidden is not None else ""
        return f"{self.seconds:.3g} s, {many}{rate}{hidden}"


@dataclass(frozen=True, slots=True, repr=False)
class PipelineExplanation:
    """The explanations of the models of a pipeline, which run one by one and share one prefetch
    buffer.

    Attributes:
        pipeline: the class of the pipeline.
        models: by their names in it.
    """

    pipeline: str
    models: Mapping[str, Explanation]

    def __repr__(self) -> str:
        return brief(self)

    @property
    def ring(self) -> int:
        """Bytes of the prefetch buffer that the blocks of all models share."""
        return max((each.ring for each in self.models.values()), default=0)

    def as_dict(self) -> dict[str, object]:
        """Return the same as a dict that JSON can store."""
        models = {name: each.as_dict() for name, each in self.models.items()}
        return {"pipeline": self.pipeline, "ring": self.ring, "models": models}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        parts = [part for each in self.models.values() for part in each.parts]
        ring = f", through one prefetch buffer of {format_size(self.ring)}" if self.ring else ""
        streamed = format_size(sum(part.nbytes for part in parts if part.streams))
        total = format_size(sum(part.nbytes for part in parts))
        yield (
            f"{self.pipeline}: {several(len(self.models), 'model')}, {total} of weights, "
            f"of which {streamed} stream{ring}"
        )
        for name, each in self.models.items():
            yield f"{name}: {each}"


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    for place, count, size, why, names in rows:
        cells = (
            place.ljust(widths[0]),
            size.rjust(widths[2]),
            count.rjust(widths[1]),
            why.ljust(widths[3]),
            names,
        )
        yield "  " + "  ".join(cells).rstrip()


def _names(parts: Iterable[Part]) -> Iterator[str]:
    """Yield their names; those that differ in a number become one."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for part in parts:
        found = _NUMBERED.fullmatch(part.name)
        before, number, behind = found.groups() if found else (part.name or "all of it", "", "")
        numbers.setdefault((before, behind), []).extend([int(number)] if number else [])
    for (before, behind), each in numbers.items():
        yield f"{before}{_ranges(each)}{behind}" if each else before


def _ranges(numbers: Sequence[int]) -> str:
    """Shorten, as in "0-3, 5" or "0, 2, 4 … 38"."""
    ranges: list[list[int]] = [[numbers[0], numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    told = [f"{first}-{last}" if last > first else f"{first}" for first, last in ranges]
    inside = ", ".join(told) if len(told) <= _MANY else f"{', '.join(told[:3])} … {told[-1]}"
    return f"[{inside}]" if len(told) > 1 else inside
