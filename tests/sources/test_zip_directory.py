"""The directory of a zip archive says where its members lie, and a broken one is refused."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkit.errors import FormatError, LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.payloads.payload import read_all
from shardkit.sources.format import Source
from shardkit.sources.zip_directory import inflate

CONTENTS = {"a/data.pkl": b"pickle" * 10, "a/data/0": bytes(1000), "empty": b"", "é.txt": b"text"}


def archive(method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as writer:
        for name, content in CONTENTS.items():
            writer.writestr(name, content)
        writer.comment = comment
    return file.getvalue()


def wide_archive(name: bytes = b"data/0", content: bytes = b"weights") -> bytes:
    """An archive in which every number that can be is in a zip64 field, as for more than 4 GiB."""
    none = 0xFFFFFFFF
    crc = zlib.crc32(content)
    local = (
        struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 0, crc, none, none, len(name), 20 + 7)
        + name
    )
    local += struct.pack("<HHQQ", 1, 16, len(content), len(content)) + b"FB\3\0pad"
    start = len(local) + len(content)
    extra = b"\x99\x99\1\0x" + struct.pack("<HHQQQ", 1, 24, len(content), len(content), 0)
    entry = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        b"PK\1\2",
        45,
        45,
        0,
        0,
        0,
        0,
        crc,
        none,
        none,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        none,
    )
    directory = entry + name + extra
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, none, none, 0)
    return local + content + directory + end64 + locator + end


def opened(content: bytes, folder: Path, limits: Limits | None = None) -> Source:
    path = folder / "x.zip"
    path.write_bytes(content)
    return Source.file(path, limits or Limits())


def contents(source: Source) -> dict[str, bytes]:
    return {member.name: bytes(read_all(source.member(member))) for member in source.members}


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"]
)
@pytest.mark.parametrize(
    "comment",
    [b"", b"a comment", b"PK\5\6" * 100, b"x" * 65535],
    ids=["none", "short", "hostile", "longest"],
)
def test_members_hold_what_zipfile_finds_in_them(
    method: int, comment: bytes, tmp_path: Path
) -> None:
    assert contents(opened(archive(method, comment), tmp_path)) == CONTENTS


def test_numbers_beyond_32_bits_are_taken_from_the_zip64_field(tmp_path: Path) -> None:
    assert contents(opened(wide_archive(), tmp_path)) == {"data/0": b"weights"}
    assert zipfile.ZipFile(tmp_path / "x.zip").read("data/0") == b"weights"


def test_a_thousand_kilobytes_are_inflated_in_bounded_pieces() -> None:
    whole = bytes(5_000_000)
    compressed = zlib.compress(whole, wbits=-15)
    pieces = list(
        inflate(memoryview(compressed)[at : at + 1000] for at in range(0, len(compressed), 1000))
    )
    assert b"".join(pieces) == whole
    assert max(map(len, pieces)) <= 1 << 20


@pytest.mark.parametrize(
    "compressed",
    [zlib.compress(b"x" * 100, wbits=-15)[:-2], b"\xff\xff\xff", b""],
    ids=["cut", "broken", "empty"],
)
def test_a_broken_stream_is_a_sentence(compressed: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        list(inflate([memoryview(compressed)]))


def patched(content: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """*content* with *value* written *offset* bytes into the first record with this *signature*."""
    at = content.index(signature) + offset
    return content[:at] + value + content[at + len(value) :]


BROKEN = {
    "no directory": (archive()[:-30], "or the download is incomplete"),
    "cut in a member": (archive()[:500], "or the download is incomplete"),
    "several disks": (patched(archive(), b"PK\5\6", 4, b"\1"), "split over several files"),
    "wrong place": (patched(archive(), b"PK\5\6", 16, b"\1\0\0\0"), "should be at"),
    "wrong count": (patched(archive(), b"PK\5\6", 10, b"\x09"), "announces 9"),
    "no entry": (patched(archive(), b"PK\1\2", 0, b"XX"), "no entry at byte"),
    "name too long": (patched(archive(), b"PK\1\2", 28, b"\xff\xff"), "cut short"),
    "member too long": (patched(archive(), b"PK\1\2", 20, b"\xff\xff\0\0" * 2), "overlaps"),
    "sizes differ": (patched(archive(), b"PK\1\2", 24, b"\1\0"), "is not compressed"),
    "shared start": (
        patched(archive(), b"PK\1\2", 42, struct.pack("<I", archive().index(b"PK\3\4", 4))),
        "begin at one byte",
    ),
    "no zip64 record": (wide_archive().replace(b"PK\6\6", b"PK\6\0"), "no zip64 record"),
    "zip64 field cut": (
        wide_archive().replace(b"\1\0\x18\0", b"\1\0\x10\0"),
        "is missing or cut short",
    ),
    "zip64 far away": (
        wide_archive()[:-34] + b"\xff" + wide_archive()[-33:],
        "after its own locator",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_directory_is_refused_with_a_sentence(fault: str, tmp_path: Path) -> None:
    content, sentence = BROKEN[fault]
    with pytest.raises(Malformed, match=sentence) as caught:
        contents(opened(content, tmp_path))
    assert str(tmp_path) in str(caught.value)


BROKEN_MEMBERS = {
    "no local header": (patched(archive(), b"PK\3\4", 3, b"\5"), "no local header"),
    "encrypted": (patched(archive(), b"PK\3\4", 6, b"\1"), "is encrypted"),
    "extra over the next": (patched(archive(), b"PK\3\4", 28, b"\xff"), "overlaps"),
    "unknown method": (
        patched(patched(archive(), b"PK\1\2", 10, b"\x0c"), b"PK\3\4", 8, b"\x0c"),
        "method 12",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_MEMBERS)
def test_a_broken_member_is_named(fault: str, tmp_path: Path) -> None:
    content, sentence = BROKEN_MEMBERS[fault]
    source = opened(content, tmp_path)
    with pytest.raises(Malformed, match=f"'a/data.pkl'.*{sentence}"):
        source.member(source.members[0])


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("data/0", b"1")
        writer.writestr("data/1", b"2")
    with pytest.raises(Malformed, match="two members are called 'data/0'"):
        contents(opened(file.getvalue().replace(b"data/1", b"data/0"), tmp_path))


def test_a_directory_larger_than_allowed_names_the_limit(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded) as caught:
        contents(opened(archive(), tmp_path, Limits(header_bytes=100)))
    assert caught.value.limit == "header_bytes"


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    wide=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_no_flipped_byte_brings_anything_but_our_errors(
    wide: bool, edits: list[tuple[int, int]], tmp_path: Path
) -> None:
    content = bytearray(wide_archive() if wide else archive(zipfile.ZIP_DEFLATED))
    for at, byte in edits:
        content[at % len(content)] = byte
    try:
        contents(opened(bytes(content), tmp_path, Limits(expanded_bytes=1_000_000)))
    except FormatError:
        return
