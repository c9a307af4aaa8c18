"""Format "npz": a zip archive of .npy files, stored or compressed.

1. A zip archive is an .npz if all of its members end in ``.npy``; nothing else does, neither
   torch's archives nor TorchScript's.
2. Only headers are read, also of compressed members; a member is expanded when its weights are.
3. Metadata is kept in the archive's comment, as JSON, which numpy passes over. A tie is written
   under each of its names, since numpy has no way to tie again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardkit.plugin import (
    Checkpoint,
    Concat,
    Format,
    LimitExceeded,
    Literal,
    Malformed,
    Member,
    NameClash,
    Other,
    Part,
    Source,
    TensorEntry,
    Unwritable,
    option,
    shown,
)
from shardkit_npz import header
from shardkit_npz.arrays import tensor
from shardkit_npz.zip_parts import NewMember, archive

_LONGEST_NAME = 0xFFFF
_LONGEST_COMMENT = 0xFFFF
_END_NBYTES = 22


def sniff(source: Source) -> bool:
    """Whether the source is a zip archive of .npy files alone."""
    return bool(source.members) and all(
        member.name.endswith(header.SUFFIX) for member in source.members
    )


def scan(source: Source) -> Checkpoint:
    """The arrays, in the order of the archive."""
    if len(source.members) > source.limits.tensors:
        raise LimitExceeded(
            source.path,
            f"holds {len(source.members):,} arrays",
            limit="tensors",
            actual=len(source.members),
        )
    if not source.members and source.head[:4] != b"PK\5\6":
        raise Malformed(source.path, f"must be a zip archive, found {shown(source.head[:4])}")
    arrays = [_array(source, member) for member in source.members]
    tensors = tuple(array for array in arrays if isinstance(array, TensorEntry))
    return Checkpoint(
        tensors, tuple(array for array in arrays if isinstance(array, Other)), _metadata(source)
    )


def lay_out(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    """The parts of an archive that holds *entries*, none of them compressed.

    Raises:
        Unwritable: numpy has no such type, or zip no room for a name or the metadata.
        NameClash: two entries have one name.
    """
    kept = {entry.name: entry for entry in entries}
    if len(kept) < len(entries):
        raise NameClash(
            "two tensors of an .npz file would have one name",
            hint=("give one another with ", option("rename")),
        )
    ties = {alias: name for alias, name in metadata.items() if name in kept and alias not in kept}
    tied = [replace(kept[name], path=(alias,)) for alias, name in ties.items()]
    comment = _comment(
        {key: text for key, text in metadata.items() if key not in ties and key != "format"}
    )
    return archive([_member(entry) for entry in (*entries, *tied)], comment)


FORMAT = Format(name="npz", suffixes=(".npz",), sniff=sniff, scan=scan, lay_out=lay_out)


def _array(source: Source, member: Member) -> TensorEntry | Other:
    where = f"array {shown(member.name)}"
    found = header.parse(source.path, where, lambda nbytes: source.peek(member, nbytes))
    if found.nbytes > member.nbytes:
        raise Malformed(
            source.path, f"holds {member.nbytes:,} bytes, fewer than its header", where=where
        )
    data = source.member(member).narrow(found.nbytes, member.nbytes - found.nbytes)
    return tensor(source.path, member.name.removesuffix(header.SUFFIX), found, data, where)


def _metadata(source: Source) -> dict[str, str]:
    """The archive's comment, if it is one of ours."""
    span = min(source.size, _END_NBYTES + _LONGEST_COMMENT)
    comment = source.read(source.size - span, span).rpartition(b"PK\5\6")[2][_END_NBYTES - 4 :]
    try:
        found = json.loads(comment) if comment.startswith(b"{") else {}
    except (ValueError, RecursionError):
        return {}
    return {key: text for key, text in found.items() if isinstance(text, str)}


def _comment(metadata: Mapping[str, str]) -> bytes:
    comment = json.dumps(metadata).encode() if metadata else b""
    if len(comment) > _LONGEST_COMMENT:
        raise Unwritable(
            (
                f"the metadata takes {len(comment):,} bytes, and an .npz file has room for "
                f"{_LONGEST_COMMENT:,}"
            ),
            hint="write .safetensors",
        )
    return comment


def _member(entry: TensorEntry) -> NewMember:
    try:
        name = (entry.name + header.SUFFIX).encode()
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name or len(name) > _LONGEST_NAME:
        raise Unwritable(
            f"a zip archive has no room for the name {shown(entry.name)}",
            hint=("give it another with ", option("rename")),
        )
    return NewMember(name, Concat((Literal(header.dump(entry)), entry.payload)))
