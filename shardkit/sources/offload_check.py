"""Check that the offload.json in a folder belongs to the shards beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata import safetensors_header
from shardkit.metadata.offload_index import OFFLOAD_NAME, OffloadRecord, Shard, parse
from shardkit.payloads.payload import Extent, read_all
from shardkit.printable import several, shown
from shardkit.sources.format import Source


def record_in(folder: Path, limits: Limits) -> OffloadRecord | None:
    """The record in *folder*; None where there is none.

    Raises:
        Malformed: it breaks the rules.
        LimitExceeded: it is too long.
    """
    path = folder / OFFLOAD_NAME
    if not path.is_file():
        return None
    nbytes = path.stat().st_size
    if nbytes > limits.header_bytes:
        raise LimitExceeded(path, f"takes {nbytes:,} bytes", limit="header_bytes", actual=nbytes)
    return parse(path, bytes(read_all(Extent(path, 0, nbytes))), limits)


def refuse_stale(folder: Path, record: OffloadRecord, shards: Mapping[str, Source]) -> None:
    """Raise Malformed unless *record* was made with *shards*, which are those of the checkpoint in
    *folder* by their names.
    """
    known = {shard.name: shard for shard in record.shards}
    differing = known.keys() ^ shards.keys()
    if differing:
        where = "not there" if min(differing) in known else "not in it"
        raise _stale(folder, record, f"{shown(min(differing))} is {where}")
    for name, source in shards.items():
        refuse_stale_shard(folder, record, known[name], source)


def refuse_stale_shard(folder: Path, record: OffloadRecord, shard: Shard, source: Source) -> None:
    """Raise Malformed unless *source* is as long as *shard* of *record*, and has its header."""
    if source.size != shard.nbytes:
        raise _stale(
            folder,
            record,
            (
                f"{shown(shard.name)} has {several(source.size, 'byte')}, and {shard.nbytes:,} "
                "were "
                "written"
            ),
        )
    first = source.read(0, min(safetensors_header.LENGTH_NBYTES, source.size))
    stop = len(first) + int.from_bytes(first, "little")
    if stop > source.size or hashlib.sha256(source.read(0, stop)).hexdigest() != shard.header:
        raise _stale(folder, record, f"the header of {shown(shard.name)} differs")


def _stale(folder: Path, record: OffloadRecord, what: str) -> Malformed:
    return Malformed(
        folder / OFFLOAD_NAME,
        f"was made with other shards, from {shown(record.origin.name)}: {what}",
        hint="run offload-prep again; or, if the shards are what you want, remove this file",
    )
