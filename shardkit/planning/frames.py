"""Cut a compressed shard into frames: at tensors and blocks, so that each can be read without its
neighbours. Pure.

1. A frame holds at most 2 MiB. The header has frames of its own.
2. A larger tensor begins a frame and is cut; smaller ones that follow each other in one block share
   a frame.
3. The index, and a record of blocks, name a shard without the suffix of the codec: `zstd -d` of
   every shard gives the folder that would have been written without compression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from shardkit.errors import PlanError
from shardkit.hints import option
from shardkit.metadata import safetensors_header
from shardkit.payloads.codec import Codec
from shardkit.payloads.payload import Literal
from shardkit.planning.plan import OutputFile, Plan

FRAME = 2 << 20


def compressed(plan: Plan, codec: Codec) -> Plan:
    """*plan* with its shards compressed by *codec*.

    Raises:
        PlanError: they are of a format whose tensors are not told apart here.
    """
    if plan.format != "safetensors":
        raise PlanError(
            f"only safetensors can be compressed, but this output is {plan.format}",
            hint=("leave out ", option("compress"), ", or write safetensors"),
        )
    shards = {file.name: _framed(plan, file, codec) for file in plan.shards}
    files = tuple(shards.get(file.name, file) for file in plan.files)
    return replace(
        plan,
        files=files,
        weight_map={name: shards[shard].name for name, shard in plan.weight_map.items()},
    )


def cut(stops: Iterable[int], fences: frozenset[int] = frozenset()) -> Iterator[int]:
    """Lengths of frames over pieces that end at *stops*, in order, the first beginning at 0.

    Args:
        stops: a piece that fits is not cut.
        fences: stops that no frame goes across.
    """
    begun = at = 0
    for stop in stops:
        if at > begun and (stop - begun > FRAME or at in fences):
            yield at - begun
            begun = at
        while stop - begun > FRAME:
            yield FRAME
            begun += FRAME
        at = stop
    if at > begun:
        yield at - begun


def _framed(plan: Plan, file: OutputFile, codec: Codec) -> OutputFile:
    head = file.parts[0]
    assert isinstance(head, Literal)
    runs = plan.record.runs_in(file.name) if plan.record else ()
    fences = frozenset({head.nbytes, *(run.stop for run in runs)})
    stops = (head.nbytes, *(stop for _, _, stop in safetensors_header.places(head.content)))
    return OutputFile(file.name + codec.suffix, file.parts, codec, tuple(cut(stops, fences)))
