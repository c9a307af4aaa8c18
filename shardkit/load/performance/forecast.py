"""Predict the time of a forward of a checkpoint, if its blocks were placed as planned: from sizes,
names and throughput alone.

1. Blocks on disk or, for an accelerator, on the CPU are transferred in each forward, through a
   prefetch buffer in the memory that is left.
2. Matrices are multiplied, but for those that are named like lookup tables. The throughput is that
   of a product of their type and shape, on a device of this machine. Without it there is only a
   lower bound: the time to transfer the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from shardkit.brief import brief
from shardkit.checkpoint.blocks import BlockEntries
from shardkit.load.devices.budgets import accelerator
from shardkit.load.modules.weights import torch_type
from shardkit.load.performance.bandwidth import Rates, common_product, measure
from shardkit.load.performance.cost_model import (
    STAGES,
    Depth,
    Prediction,
    Step,
    depth_for,
    predict,
    ring_bytes,
    step_of,
)

_TABLE = re.compile(r"emb|wte|wpe")


@dataclass(frozen=True, slots=True, repr=False)
class Forecast:
    """A forward.

    Attributes:
        rates: those that were given or measured.
        least: seconds that bringing the weights takes, whatever is computed meanwhile; None if no
            rate of it is known.
        ring: bytes of the memory that blocks stream through.
        depth: how many they are, and why.
        lacking: bytes that it is larger than the room that is left for it.
        predicted: what it takes; None where no rate of computing is known.
        idle: names of the rates that a forward does not depend on, as nothing is read, copied, sent
            or multiplied.
    """

    rates: Rates
    least: float | None
    ring: int
    depth: Depth
    lacking: int
    predicted: Prediction | None
    idle: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return brief(self)

    def as_dict(self) -> dict[str, object]:
        """The same for JSON."""
        return {
            "rates": asdict(self.rates),
            "least": self.least,
            "ring": {"nbytes": self.ring, "lacking": self.lacking, **asdict(self.depth)},
            "predicted": self.predicted and self.predicted.as_dict(),
            "idle": self.idle,
        }


def forecast(
    blocks: Sequence[BlockEntries], homes: Mapping[str, str], room: int, rates: Rates, runner: str
) -> Forecast:
    """What a forward takes.

    Args:
        blocks: in the order in which they are run.
        homes: the device of each, by its name.
        room: bytes that *runner* has left for the ring.
        rates: of this or another machine.
        runner: the device that runs what is on "cpu" and "disk".
    """
    steps = [_step(block, homes[block.name], runner) for block in blocks]
    sizes = [step.room for step in steps if step.room]
    depth = depth_for(steps, rates, room)
    ring = ring_bytes(sizes, depth)
    found = predict(steps, rates, ring)
    known = [
        stage
        for stage, rate in zip(STAGES[:-1], (rates.disk, rates.copy, rates.link), strict=True)
        if rate
    ]
    least = max((found.busy[STAGES.index(stage)] for stage in known), default=None)
    lacking = max(0, ring - room)
    work = {
        "disk": sum(step.disk for step in steps),
        "copy": sum(step.copied for step in steps),
        "link": sum(step.link for step in steps),
        "compute": sum(step.compute for step in steps),
    }
    idle = tuple(name for name, nbytes in work.items() if not nbytes)
    return Forecast(
        rates, least if sizes else 0.0, ring, depth, lacking, found if rates.compute else None, idle
    )


def rates_here(
    blocks: Sequence[BlockEntries], homes: Mapping[str, str], rows: int, runner: str
) -> Rates:
    """The rates of this machine for what `forecast` is asked of; those of an accelerator that is
    not here are None.

    Raises:
        FormatError: a file cannot be read.
    """
    device = torch.device("cpu") if runner == "cpu" else accelerator()
    entries = [entry for block in blocks for entry in block.entries]
    types = (
        (torch_type(entry.dtype), entry.shape) for entry in entries if not _TABLE.search(entry.name)
    )
    product = common_product((dtype, shape) for dtype, shape in types if dtype)
    extents = [
        source
        for block in blocks
        if homes[block.name] == "disk"
        for entry in block.entries
        for source in entry.payload.sources
    ]
    found = measure(extents, device or torch.device("cpu"), replace(product, rows=rows))
    return found if device is not None else found.given(compute=None)


def _step(block: BlockEntries, home: str, runner: str) -> Step:
    compute = sum(
        entry.nbytes
        for entry in block.entries
        if len(entry.shape) > 1 and not _TABLE.search(entry.name)
    )
    streams = home == "disk" or (home == "cpu" and runner != "cpu")
    if not streams:
        return Step(compute=compute)
    step = step_of(
        [entry.payload for entry in block.entries], compute=compute, linked=runner != "cpu"
    )
    return step if home == "disk" else replace(step, disk=0, copied=0)
