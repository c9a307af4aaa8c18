"""Summarise what a conversion did, or would do."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from shardkit.cli.output.printing import Role, listed, named, painted, parts_left_out, remarked
from shardkit.printable import printable, several
from shardkit.sizes import format_size
from shardkit.writing.copier import Engine

if TYPE_CHECKING:
    from shardkit.checkpoint.entries import LeftOut
    from shardkit.operations.convert import Report

_MOST = 10
_WORTH_A_RATE = 10_000_000  # with fewer bytes, the rate is that of starting up


def summary(report: Report) -> Iterator[str]:
    """The lines that end a run."""
    made = amounts(report.shards, report.blocks, report.tensors, report.nbytes)
    part = f", part {report.part}" if report.part else ""
    yield painted(
        f"{named(report.source)} → {named(report.out)}{part}: {made} in {_duration(report)}",
        Role.HEADING,
    )
    resumed = (
        [("resumed", f"{several(report.resumed, 'file')} written before this run")]
        if report.resumed
        else []
    )
    rows = [
        *resumed,
        ("bytes", ways(report.engines)),
        *_saved(report),
        *remarks(
            aliases=report.aliases,
            cast=report.cast,
            left_out=report.left_out,
            objects=report.objects,
            calls=report.calls,
            notes=report.notes,
        ),
    ]
    if report.part:
        out = shlex.quote(str(report.out))
        rows.append(("next", f"when all parts are written: shardkit commit {out}"))
    yield from remarked(rows)


def _saved(report: Report) -> Iterator[tuple[str, str]]:
    saved = max(0, report.nbytes - report.stored)
    if saved or Engine.COMPRESSED in report.engines:
        share = (
            f"{100 * saved / max(1, report.nbytes):.0f} % less than {format_size(report.nbytes)}"
        )
        yield "stored", f"{format_size(report.stored)}, {share}"


def amounts(shards: int, blocks: int, tensors: int, nbytes: int) -> str:
    """How much an output is."""
    counts = ((shards, "shard"), (blocks, "block"), (tensors, "tensor"))
    return ", ".join(
        [*(several(count, noun) for count, noun in counts if count), format_size(nbytes)]
    )


def ways(engines: Mapping[str, int]) -> str:
    """How many bytes came, or would come, into the output in which way, the most first."""
    by_size = sorted(engines.items(), key=lambda item: -item[1])
    return (
        ", ".join(f"{format_size(count)} {engine}" for engine, count in by_size if count) or "none"
    )


def remarks(
    *,
    aliases: Mapping[str, str],
    cast: int,
    left_out: Iterable[LeftOut],
    objects: tuple[str, ...],
    calls: tuple[str, ...],
    notes: Iterable[str],
) -> Iterator[tuple[str, str]]:
    """What there is to know about an output besides its size, each with a word before it."""
    if cast:
        yield "cast", several(cast, "tensor")
    if aliases:
        yield (
            "tied",
            (
                f"{several(len(aliases), 'name')} recorded instead of written twice; --ties copy "
                "writes both"
            ),
        )
        yield from (
            ("", f"{printable(alias)} = {printable(kept)}")
            for alias, kept in list(aliases.items())[:_MOST]
        )
        if len(aliases) > _MOST:
            yield "", f"and {len(aliases) - _MOST:,} more"
    yield from parts_left_out(left_out)
    if objects:
        names = [name or "the file itself" for name in objects]
        yield "no tensors", f"{several(len(objects), 'object')}: {listed(names, most=_MOST)}"
    if calls:
        yield "never run", listed(calls, most=_MOST)
    yield from (("note", printable(note)) for note in notes)


def _duration(report: Report) -> str:
    """The seconds, and where the whole output was written in them, how many bytes in each."""
    seconds, nbytes = f"{report.seconds:.2f} s", sum(report.engines.values())
    if report.resumed or nbytes < _WORTH_A_RATE:
        return seconds
    return f"{seconds}, {format_size(int(nbytes / report.seconds))}/s"
