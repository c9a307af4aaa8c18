"""A zip archive as parts: what is known before its members are read, and trailers for the CRCs that
are not.

The CRC-32 of a member stands behind it, in a data descriptor, and in the directory at the end
(APPNOTE 4.3.9, 4.3.12). A member that is 4 GiB or longer, and whatever begins beyond them, has its
numbers in zip64 fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from struct import Struct

from shardkit.plugin import Literal, Part, Payload, Trailer

_LOCAL = Struct("<4sHHHHHIIIHH")
_ENTRY = Struct("<4sHHHHHHIIIHHHHHII")
_END = Struct("<4sHHHHIIH")
_END64 = Struct("<4sQHHIIQQQQ")
_LOCATOR = Struct("<4sIQI")
_DESCRIPTOR = Struct("<4sIII")
_DESCRIPTOR64 = Struct("<4sIQQ")
_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF
_DATE = 0x21  # 1980-01-01, the first day that a zip archive knows: same input, same bytes
_CRC_FOLLOWS = 0x8
_UTF8 = 0x800
_PLAIN, _ZIP64 = 20, 45  # version needed to extract
_PARTS = 3  # of each member: local header, content, descriptor


@dataclass(frozen=True, slots=True)
class NewMember:
    """A member to be written: its name as bytes of UTF-8, and its content."""

    name: bytes
    content: Payload

    @property
    def is_large(self) -> bool:
        """Whether its length needs more than 32 bits."""
        return self.content.nbytes >= _MAX32

    @property
    def flags(self) -> int:
        return _CRC_FOLLOWS | (0 if self.name.isascii() else _UTF8)

    @property
    def nbytes(self) -> int:
        """All that it takes in the archive."""
        extra = 20 if self.is_large else 0
        descriptor = _DESCRIPTOR64 if self.is_large else _DESCRIPTOR
        return _LOCAL.size + len(self.name) + extra + self.content.nbytes + descriptor.size


def archive(members: Sequence[NewMember], comment: bytes = b"") -> tuple[Part, ...]:
    """The parts of an archive that holds *members*, stored as they are."""
    parts = [part for member in members for part in _parts(member)]
    directory = _Directory(tuple(members), comment)
    return (*parts, Trailer(directory.nbytes, directory))


def _parts(member: NewMember) -> tuple[Part, ...]:
    descriptor = _Descriptor(member.content.nbytes, member.is_large)
    size = _DESCRIPTOR64.size if member.is_large else _DESCRIPTOR.size
    return Literal(_local_header(member)), member.content, Trailer(size, descriptor)


def _local_header(member: NewMember) -> bytes:
    """Lengths and CRC are zero here, and stand in the descriptor; a zip64 field says that it has
    8-byte lengths.
    """
    extra = Struct("<HHQQ").pack(1, 16, 0, 0) if member.is_large else b""
    nbytes = _MAX32 if member.is_large else 0
    version = _ZIP64 if member.is_large else _PLAIN
    fixed = _LOCAL.pack(
        b"PK\3\4",
        version,
        member.flags,
        0,
        0,
        _DATE,
        0,
        nbytes,
        nbytes,
        len(member.name),
        len(extra),
    )
    return fixed + member.name + extra


@dataclass(frozen=True, slots=True)
class _Descriptor:
    """Makes what follows a member: the CRC of the part before, and the length."""

    nbytes: int
    is_large: bool

    def __call__(self, crcs: Sequence[int]) -> bytes:
        layout = _DESCRIPTOR64 if self.is_large else _DESCRIPTOR
        return layout.pack(b"PK\7\x08", crcs[-1], self.nbytes, self.nbytes)


@dataclass(frozen=True, slots=True)
class _Directory:
    """Makes the directory and the records that end the archive."""

    members: tuple[NewMember, ...]
    comment: bytes

    @property
    def nbytes(self) -> int:
        return len(self([0] * (_PARTS * len(self.members))))

    def __call__(self, crcs: Sequence[int]) -> bytes:
        starts = list(accumulate((member.nbytes for member in self.members), initial=0))
        rows = zip(self.members, starts, crcs[1::_PARTS], strict=False)
        entries = b"".join(_entry(member, start, crc) for member, start, crc in rows)
        return entries + _ending(len(self.members), len(entries), starts[-1], self.comment)


def _entry(member: NewMember, start: int, crc: int) -> bytes:
    nbytes = member.content.nbytes
    wide = ([nbytes, nbytes] if member.is_large else []) + ([start] if start >= _MAX32 else [])
    extra = Struct(f"<HH{len(wide)}Q").pack(1, 8 * len(wide), *wide) if wide else b""
    version = _ZIP64 if wide else _PLAIN
    size = min(nbytes, _MAX32)
    fixed = (
        b"PK\1\2",
        version,
        version,
        member.flags,
        0,
        0,
        _DATE,
        crc,
        size,
        size,
        len(member.name),
        len(extra),
        0,
        0,
        0,
        0,
    )
    return _ENTRY.pack(*fixed, min(start, _MAX32)) + member.name + extra


def _ending(count: int, nbytes: int, start: int, comment: bytes) -> bytes:
    wide = b""
    if count >= _MAX16 or nbytes >= _MAX32 or start >= _MAX32:
        wide = _END64.pack(
            b"PK\6\6", _END64.size - 12, _ZIP64, _ZIP64, 0, 0, count, count, nbytes, start
        )
        wide += _LOCATOR.pack(b"PK\6\7", 0, start + nbytes, 1)
    few = min(count, _MAX16)
    return (
        wide
        + _END.pack(
            b"PK\5\6", 0, 0, few, few, min(nbytes, _MAX32), min(start, _MAX32), len(comment)
        )
        + comment
    )
