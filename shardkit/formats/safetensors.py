"""safetensors: read and written.

1. Entries come in the order of their data. A record of a tie in `__metadata__` (``alias: kept``,
   see `shardkit.checkpoint.tie_records`) becomes an entry again, with the payload of the tensor
   that was kept, and is removed from the metadata.
2. Tensors are written in the order given, unless one would then be misaligned to its type; then
   wide types go first.
3. A file that is one aligned run of one source file starts its data at the source's offset modulo a
   page, so that file systems with shared blocks share them; any other at a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from shardkit.alignment import ALIGNMENT
from shardkit.checkpoint import tie_records
from shardkit.metadata import safetensors_header
from shardkit.plugin import (
    PAGE,
    Checkpoint,
    Extent,
    Format,
    Literal,
    Part,
    Payload,
    Source,
    TensorEntry,
    coalesced,
)


def sniff(source: Source) -> bool:
    """Whether the file begins with a length and a header; one that lies about its length counts
    too.
    """
    head = source.head
    length = int.from_bytes(head[: safetensors_header.LENGTH_NBYTES], "little")
    rest = head[safetensors_header.LENGTH_NBYTES :]
    if length <= safetensors_header.MAX_JSON_NBYTES:
        return rest.startswith(b"{") or b'"data_offsets"' in rest
    return (
        rest.startswith(b"{")
        and b'"data_offsets"' in rest
        and not head[: safetensors_header.LENGTH_NBYTES].isascii()
    )


def scan(source: Source) -> Checkpoint:
    """The tensors of the file, read from its header alone."""
    first = source.read(0, min(safetensors_header.LENGTH_NBYTES, source.size))
    nbytes = safetensors_header.json_nbytes(source.path, first, source.size, source.limits)
    start = safetensors_header.LENGTH_NBYTES + nbytes
    content = source.read(safetensors_header.LENGTH_NBYTES, nbytes)
    data = source.payload(start, source.size - start)
    parsed = safetensors_header.parse(source.path, content, data, source.limits)
    if parsed.metadata.keys() <= {"format"}:
        return Checkpoint(parsed.tensors, metadata=parsed.metadata)
    return _with_ties(parsed)


def lay_out(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    """The parts of a file that holds *entries*.

    Raises:
        Unwritable: a type without a code, a name that the format keeps for itself, or too many
            tensors for one header.
        NameClash: two entries have one name.
    """
    metadata = safetensors_header.as_readers_need(metadata)
    residue = _residue_of_source(entries)
    if residue is not None:
        return (
            Literal(safetensors_header.dump(entries, metadata, residue=residue, modulus=PAGE)),
            *_data(entries),
        )
    if not _is_aligned(entries, at=0):
        entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    return (
        Literal(safetensors_header.dump(entries, metadata, modulus=ALIGNMENT)),
        *_data(entries),
    )


FORMAT = Format(
    name="safetensors", suffixes=(".safetensors",), sniff=sniff, scan=scan, lay_out=lay_out
)


def _with_ties(parsed: safetensors_header.Header) -> Checkpoint:
    """What *parsed* says, and what its metadata say of tied tensors."""
    stored = {entry.name: entry for entry in parsed.tensors}
    ties = tie_records.ties(parsed.metadata, stored.keys())
    tied = (replace(stored[kept], path=(alias,)) for alias, kept in ties.items())
    metadata = tie_records.without_ties(parsed.metadata, ties.keys())
    return Checkpoint((*parsed.tensors, *tied), metadata=metadata)


def _residue_of_source(entries: Sequence[TensorEntry]) -> int | None:
    """The offset modulo a page of the one aligned run of a file that *entries* are; None where they
    are none.
    """
    match list(_data(entries)):
        case [Extent(_, start, _)] if _is_aligned(entries, at=start):
            return start % PAGE
    return None


def _is_aligned(entries: Sequence[TensorEntry], *, at: int) -> bool:
    starts = accumulate((entry.nbytes for entry in entries), initial=at)
    return not any(
        start % entry.dtype.itemsize for entry, start in zip(entries, starts, strict=False)
    )


def _data(entries: Sequence[TensorEntry]) -> Iterator[Payload]:
    return coalesced(entry.payload for entry in entries)
