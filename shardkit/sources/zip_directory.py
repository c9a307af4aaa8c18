"""The directory of a zip archive as a list of members: where each is stored, never its content.

1. The directory at the end of the file is authoritative (APPNOTE 4.3.12); of a local header only
   its lengths are used, because torch leaves sizes and CRC there at zero.
2. Members may not overlap, share a name or reach into the directory: every byte belongs to one
   member at most.
3. Dates are ignored: torch writes the month 0, which other readers reject.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.payloads.codec import Codec
from shardkit.printable import several, shown

STORED = 0
DEFLATED = 8

Read = Callable[[int, int], bytes]


class Member(NamedTuple):
    """One file in a zip archive.

    Attributes:
        name: as the directory has it, with forward slashes.
        header_start: offset of its local header, in bytes.
        compressed: size in the archive, in bytes.
        nbytes: size of its content, in bytes.
        method: `STORED` or `DEFLATED`, or the number of a method that is not supported.
        crc: CRC-32 of its content; 0 where the writer stored none, as torch can be configured to.
        stop: offset of the next member, or of the directory.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.plugin import STORED, Limits, Source
        >>> members = Source.file(Path("training.pt"), Limits()).members
        >>> all(member.method == STORED for member in members)  # torch does not compress
        True
    """

    name: str
    header_start: int
    compressed: int
    nbytes: int
    method: int
    crc: int
    stop: int


def read_members(path: Path, size: int, read: Read, limits: Limits) -> tuple[Member, ...]:
    """The members of the archive *path*, in the order of its directory.

    Args:
        path: for messages.
        size: bytes of the archive.
        read: gives so many bytes from there on, as `Source.read` does.
        limits: `header_bytes` bounds the directory.

    Raises:
        Malformed: the directory is missing or broken, or members overlap.
        LimitExceeded: the directory is too large.
    """
    directory = _directory(path, size, read)
    if directory.nbytes > limits.header_bytes:
        raise LimitExceeded(
            path,
            f"its zip directory takes {directory.nbytes:,} bytes",
            limit="header_bytes",
            actual=directory.nbytes,
        )
    rows = list(_rows(path, directory, read(directory.start, directory.nbytes)))
    if len(rows) != directory.count:
        raise _broken(
            path, f"it lists {several(len(rows), 'member')} and announces {directory.count:,}"
        )
    _check_names(path, rows)
    return tuple(_placed(path, rows, directory.start))


def data_start(path: Path, member: Member, read: Read) -> int:
    """Where the bytes of *member* begin.

    The local header may carry a longer extra field than the directory (torch pads it to align the
    data), so this cannot be had from the directory alone.

    Raises:
        Malformed: the local header is broken, or the member is kept in a way that we cannot read.
    """
    signature, flags, name_length, extra_length = _LOCAL.unpack(
        read(member.header_start, _LOCAL.size)
    )
    start: int = member.header_start + _LOCAL.size + name_length + extra_length
    # Of the first header the first two bytes do not matter: GPT-SoVITS writes a version of its own
    # there.
    if signature[2:] != b"\3\4" or (member.header_start and not signature.startswith(b"PK")):
        raise Malformed(
            path,
            f"no local header at byte {member.header_start:,}",
            where=f"zip member {shown(member.name)}",
        )
    if flags & _ENCRYPTED:
        raise Malformed(
            path,
            "is encrypted",
            where=f"zip member {shown(member.name)}",
            hint="decrypt the archive first",
        )
    if start + member.compressed > member.stop:
        raise Malformed(
            path,
            f"overlaps what begins at byte {member.stop:,}",
            where=f"zip member {shown(member.name)}",
        )
    if member.method not in (STORED, DEFLATED):
        raise Malformed(
            path,
            f"is compressed by method {member.method}, and only DEFLATE (8) is known",
            where=f"zip member {shown(member.name)}",
            hint="write the archive again without compression",
        )
    return start


def inflate(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """What a raw DEFLATE stream expands to, at most 1 MiB at a time.

    Raises:
        ValueError: the stream is broken, or does not end where it should.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    for piece in pieces:
        rest: bytes | memoryview = piece
        while rest and not stream.eof:
            yield _inflated(stream, rest)
            rest = stream.unconsumed_tail
    if not stream.eof:
        raise ValueError("the compressed data ends early")


def _never(head: bytes) -> bool:
    return False  # raw DEFLATE has nothing to know it by


DEFLATE = Codec("deflate", "", sniff=_never, decompress=inflate)

_LOCAL = Struct("<4s2xH18xHH")
_ENTRY = Struct("<4s4xHH4xIIIHHH8xI")
_END = Struct("<4sHHHHIIH")
_LOCATOR = Struct("<4sIQI")
_END64 = Struct("<4sQHHIIQQQQ")
_ENCRYPTED = 1
_UTF8 = 0x800
_IN_ZIP64 = 0xFFFFFFFF
_LONGEST_COMMENT = 0xFFFF
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class _Directory:
    """The position of the directory, and the number of members that it announces."""

    start: int
    nbytes: int
    count: int


_Row = tuple[str, int, int, int, int, int]
"""The fields of a Member but for the last."""


def _inflated(stream: zlib._Decompress, compressed: bytes | memoryview) -> bytes:
    try:
        return stream.decompress(compressed, _STEP)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _directory(path: Path, size: int, read: Read) -> _Directory:
    end = _end(path, size, read)
    _, disk, _, _, count, nbytes, start, _ = _END.unpack(read(end, _END.size))
    if end >= _LOCATOR.size and read(end - _LOCATOR.size, 4) == b"PK\6\7":
        end, disk, count, nbytes, start = _end64(path, end - _LOCATOR.size, read)
    if disk:
        raise Malformed(
            path,
            "is one piece of a zip archive that was split over several files",
            hint="join the pieces into one archive: `zip -s 0 ARCHIVE.zip --out whole.zip`",
        )
    if start + nbytes != end:
        _refuse_second(path, read, end - start - nbytes)
        raise _broken(path, f"it should be at [{start:,}, {start + nbytes:,}) and ends at {end:,}")
    return _Directory(start, nbytes, count)


def _refuse_second(path: Path, read: Read, shift: int) -> None:
    """Raise Malformed if an archive that knows nothing of the *shift* bytes before it begins
    there.
    """
    if shift > 0 and read(shift, 4) == b"PK\3\4":
        raise Malformed(
            path,
            f"contains several zip archives in a row; the last begins at byte {shift:,}",
            hint="torch.distributed.checkpoint writes such files, called .distcp: give their "
            "folder to "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER out.pt, and "
            "convert out.pt",
        )


def _end(path: Path, size: int, read: Read) -> int:
    """Where the end-of-directory record begins, which an archive's comment may follow."""
    span = min(size, _END.size + _LONGEST_COMMENT)
    tail = read(size - span, span)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if (
            at + _END.size <= span
            and at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") <= span
        ):
            return size - span + at
        at = tail.rfind(b"PK\5\6", 0, at)
    raise Malformed(
        path,
        "the zip archive has no directory at its end: the program that wrote it was interrupted, "
        "or the download is incomplete",
        where="zip directory",
        hint="download the file again, and compare its size with the original's; if it was saved "
        "here, save it again or use an earlier checkpoint, since torch.save writes the directory "
        "last",
    )


def _end64(path: Path, locator: int, read: Read) -> tuple[int, int, int, int, int]:
    _, _, end, _ = _LOCATOR.unpack(read(locator, _LOCATOR.size))
    if end + _END64.size > locator:
        raise _broken(path, f"its zip64 record should be at {end:,}, after its own locator")
    signature, _, _, _, disk, _, _, count, nbytes, start = _END64.unpack(read(end, _END64.size))
    if signature != b"PK\6\6":
        if read(locator - _END64.size, 4) == b"PK\6\6":
            _refuse_second(path, read, locator - _END64.size - end)
        raise _broken(path, f"no zip64 record at {end:,}")
    return end, disk, count, nbytes, start


def _rows(path: Path, directory: _Directory, content: bytes) -> Iterator[_Row]:
    """The rows of the directory; one pass, since there may be a million."""
    at = 0
    while at + _ENTRY.size <= len(content):
        signature, flags, method, crc, compressed, nbytes, names, extras, comments, header = (
            _ENTRY.unpack_from(content, at)
        )
        if signature != b"PK\1\2":
            raise _broken(path, f"no entry at byte {directory.start + at:,}")
        name_stop = at + _ENTRY.size + names
        name = _decoded(content[at + _ENTRY.size : name_stop], flags)
        if nbytes == _IN_ZIP64 or compressed == _IN_ZIP64 or header == _IN_ZIP64:
            nbytes, compressed, header = _wide(
                path, name, (nbytes, compressed, header), content[name_stop : name_stop + extras]
            )
        yield name, header, compressed, nbytes, method, crc
        at = name_stop + extras + comments
    if at != len(content):
        raise _broken(path, "its last entry is cut short")


def _decoded(name: bytes, flags: int) -> str:
    return (
        name.decode("utf-8", "backslashreplace")
        if flags & _UTF8 or name.isascii()
        else name.decode("cp437")
    )


def _wide(path: Path, name: str, narrow: tuple[int, int, int], extra: bytes) -> Iterator[int]:
    """The numbers that did not fit into 32 bits, in the order that the zip64 extra field has them
    (APPNOTE 4.5.3).
    """
    words = _zip64_words(extra)
    for number in narrow:
        value = next(words, None) if number == _IN_ZIP64 else number
        if value is None:
            raise _broken(path, f"the zip64 field of {shown(name)} is missing or cut short")
        yield value


def _zip64_words(extra: bytes) -> Iterator[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = (
            int.from_bytes(extra[at : at + 2], "little"),
            int.from_bytes(extra[at + 2 : at + 4], "little"),
        )
        at += 4
        if kind == 1:
            stop = min(at + length, len(extra))
            yield from (
                int.from_bytes(extra[word : word + 8], "little") for word in range(at, stop - 7, 8)
            )
            return
        at += length


def _check_names(path: Path, rows: list[_Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        name = row[0]
        if name in seen:
            raise _broken(path, f"two members are called {shown(name)}")
        seen.add(name)


def _placed(path: Path, rows: list[_Row], end: int) -> Iterator[Member]:
    """The rows as members that know where the next one begins, in the order of *rows*."""
    for (name, start, compressed, nbytes, method, crc), stop in zip(
        rows, _stops(path, rows, end), strict=True
    ):
        if start + _LOCAL.size + compressed > stop:
            raise _broken(path, f"member {shown(name)} overlaps what begins at byte {stop:,}")
        if method == STORED and compressed != nbytes:
            raise _broken(
                path,
                (
                    f"member {shown(name)} holds {several(nbytes, 'byte')} in {compressed:,} and "
                    "is "
                    "not compressed"
                ),
            )
        yield Member(name, start, compressed, nbytes, method, crc, stop)


def _stops(path: Path, rows: list[_Row], end: int) -> Iterator[int]:
    """Where, for each of *rows*, the next member begins."""
    if all(
        row[1] < behind[1] for row, behind in pairwise(rows)
    ):  # as they are nearly always, and need no table
        if rows:
            yield from (row[1] for row in islice(rows, 1, None))
            yield end
        return
    starts = sorted(row[1] for row in rows)
    following = dict(zip(starts, [*starts, end][1:], strict=True))
    if len(following) != len(rows):
        raise _broken(path, "two members begin at one byte")
    yield from (following[row[1]] for row in rows)


def _broken(path: Path, fault: str) -> Malformed:
    return Malformed(
        path, fault, where="zip directory", hint="the file is corrupt: download it again"
    )
