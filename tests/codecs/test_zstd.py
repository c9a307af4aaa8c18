"""zstd: streams of any frames, tables of frames, and streams that are broken."""

from __future__ import annotations

import builtins
import pickle
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shardkit.codecs.zstd import CODEC, decompress, frames, sniff
from shardkit.errors import LimitExceeded, Malformed, PluginError
from shardkit.limits import Limits
from shardkit.payloads.compressed import Expanded, Framed, expansion
from shardkit.payloads.payload import CHUNK, Concat, Extent, Literal, read_all

TEXT = bytes(Random(0).randbytes(1000)) * 300
SKIPPED = bytes.fromhex("502a4d18") + (5).to_bytes(4, "little") + b"hello"


def frame(
    content: bytes, *, level: int = 3, with_size: bool = True, with_checksum: bool = False
) -> bytes:
    return zstandard.ZstdCompressor(
        level, write_content_size=with_size, write_checksum=with_checksum
    ).compress(content)


def seekable(contents: Sequence[bytes], *, with_checksums: bool = False) -> bytes:
    compressed = [frame(content) for content in contents]
    lines = [
        struct.pack("<II", len(c), len(e)) + b"sum!" * with_checksums
        for c, e in zip(compressed, contents, strict=True)
    ]
    table = b"".join(lines) + struct.pack("<IBI", len(contents), 0x80 * with_checksums, 0x8F92EAB1)
    return (
        b"".join(compressed) + bytes.fromhex("5e2a4d18") + len(table).to_bytes(4, "little") + table
    )


def expanded(content: bytes, *, step: int = 1 << 20) -> bytes:
    pieces = (memoryview(content)[at : at + step] for at in range(0, len(content), step))
    return b"".join(decompress(pieces))


STREAMS = {
    "one frame": (frame(TEXT), TEXT),
    "a frame of nothing": (frame(b""), b""),
    "no size in the frame": (frame(TEXT, with_size=False), TEXT),
    "a checksum": (frame(TEXT, with_checksum=True), TEXT),
    "several frames": (frame(TEXT) + frame(b"") + frame(b"end"), TEXT + b"end"),
    "skippable frames": (SKIPPED + frame(TEXT) + SKIPPED, TEXT),
    "a long run of one byte": (frame(bytes(9_000_000)), bytes(9_000_000)),
    "what cannot be compressed": (
        frame(Random(1).randbytes(300_000)),
        Random(1).randbytes(300_000),
    ),
    "the best level": (frame(TEXT, level=22), TEXT),
    "a table of frames": (seekable([TEXT, b"", b"end"]), TEXT + b"end"),
}


@pytest.mark.parametrize(("compressed", "content"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_stream_is_expanded_however_it_is_cut(
    compressed: bytes, content: bytes, step: int
) -> None:
    assert sniff(compressed[:4096])
    assert expanded(compressed, step=step) == content


@given(st.lists(st.binary(max_size=2000), max_size=4), st.integers(1, 50))
def test_any_frames_are_expanded(contents: list[bytes], step: int) -> None:
    assert expanded(b"".join(map(frame, contents)), step=step) == b"".join(contents)


def test_a_bomb_is_expanded_in_small_pieces() -> None:
    bomb = frame(bytes(200_000_000))
    assert len(bomb) < 30_000
    sizes = [len(piece) for piece in decompress([memoryview(bomb)])]
    assert sum(sizes) == 200_000_000
    assert max(sizes) <= 4 << 20


@pytest.mark.parametrize(
    "whole",
    [frame(b"x" * 300 + TEXT[:500], with_checksum=True), frame(b"a") + SKIPPED + frame(b"b")],
)
def test_a_stream_cut_anywhere_is_an_error(whole: bytes) -> None:
    ends_of_frames = {0, len(frame(b"a")), len(frame(b"a") + SKIPPED)}
    for length in range(len(whole)):
        if length in ends_of_frames and whole.startswith(frame(b"a")):
            continue
        if length:
            with pytest.raises(ValueError, match="ends at byte"):
                expanded(whole[:length])


BROKEN = {
    "garbage after the frame": (frame(TEXT) + b"garbage!", "is not the start of a frame"),
    "zeros after the frame": (frame(TEXT) + bytes(64), "is not the start of a frame"),
    "a wrong checksum": (frame(TEXT, with_checksum=True)[:-1] + b"\x99", "checksum"),
    "a window of 2 GiB": (bytes.fromhex("28b52ffd") + b"\0\xa8" + b"\1\0\0", "memory"),
    "a dictionary": (bytes.fromhex("28b52ffd") + b"\x01\x50\x07" + b"\1\0\0", "(?i)dictionary"),
}


@pytest.mark.parametrize(("content", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_stream_is_an_error(content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        expanded(content)


@given(st.data())
def test_a_flipped_byte_is_an_error_or_other_bytes(data: st.DataObject) -> None:
    content = bytearray(seekable([b"some content" * 9, b"and more" * 5]))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for run in (lambda: expanded(bytes(content)), lambda: frames(Literal(bytes(content)))):
        with suppress(ValueError):
            run()


@pytest.mark.parametrize("with_checksums", [False, True])
def test_a_table_lists_its_frames(with_checksums: bool) -> None:
    contents = [TEXT, b"", b"end"]
    listed = frames(Literal(seekable(contents, with_checksums=with_checksums)))
    assert [each.expanded for each in listed] == [len(TEXT), 0, 3]
    assert [each.nbytes for each in listed] == [len(frame(content)) for content in contents]
    assert [each.start for each in listed] == [
        0,
        listed[0].nbytes,
        listed[0].nbytes + listed[1].nbytes,
    ]


@pytest.mark.parametrize("content", [frame(TEXT), b"", b"short", SKIPPED])
def test_a_file_without_a_table_has_no_frames(content: bytes) -> None:
    assert frames(Literal(content)) == ()


def table_of(count: int, *, flags: int = 0, lines: bytes = b"", size: int | None = None) -> bytes:
    footer = struct.pack("<IBI", count, flags, 0x8F92EAB1)
    whole = len(lines) + len(footer) if size is None else size
    return frame(TEXT) + bytes.fromhex("5e2a4d18") + whole.to_bytes(4, "little") + lines + footer


LYING = {
    "more frames than bytes": (table_of(1000), "takes 8,017 bytes, and the file has"),
    "frames longer than the file": (
        table_of(1, lines=struct.pack("<II", 10**6, 5)),
        "lists frames of 1,000,000 bytes",
    ),
    "frames shorter than the file": (
        table_of(1, lines=struct.pack("<II", 7, 5)),
        "lists frames of 7 bytes",
    ),
    "a reserved flag": (table_of(1, flags=4, lines=bytes(8)), "reserved flag"),
    "a size that does not fit": (
        table_of(1, lines=bytes(8), size=40),
        "does not begin where it should",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), LYING.values(), ids=LYING)
def test_a_table_that_lies_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "m.zst").write_bytes(content)
    with pytest.raises(Malformed, match=rf"m\.zst: broken zstd data: .*{sentence}"):
        expansion(Extent(tmp_path / "m.zst", 0, len(content)), CODEC, Limits())


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_table_that_lies_about_what_a_frame_holds_is_found_when_it_is_read(
    tmp_path: Path, off_by: int
) -> None:
    content = bytearray(seekable([TEXT]))
    content[-13:-9] = struct.pack("<I", len(TEXT) + off_by)
    (tmp_path / "m.zst").write_bytes(content)
    payload = expansion(Extent(tmp_path / "m.zst", 0, len(content)), CODEC, Limits())
    with pytest.raises(
        Malformed,
        match=r"its table gives (299,999|300,001) bytes for a frame that has another length",
    ):
        read_all(payload)


@pytest.fixture
def framed(tmp_path: Path) -> tuple[Path, bytes]:
    contents = [Random(i).randbytes(size) for i, size in enumerate((5000, 1, 0, CHUNK + 4097, 300))]
    (tmp_path / "m.zst").write_bytes(seekable(contents))
    return tmp_path / "m.zst", b"".join(contents)


def test_a_file_with_a_table_is_read_in_place(
    framed: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = framed
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    payload = expansion(Extent(path, 0, path.stat().st_size), CODEC, Limits())
    assert isinstance(payload, Concat)
    assert all(isinstance(part, Framed) for part in payload.parts)
    assert read_all(payload) == content
    for start, nbytes in [
        (0, 0),
        (0, 1),
        (4999, 3),
        (5000, 1),
        (4990, CHUNK + 100),
        (len(content) - 1, 1),
        (10, len(content) - 20),
    ]:
        assert read_all(payload.narrow(start, nbytes)) == content[start : start + nbytes]
        assert [len(c) for c in payload.narrow(start, nbytes).chunks()][:-1] == [CHUNK] * (
            (nbytes - 1) // CHUNK if nbytes else 0
        )


def test_equal_runs_of_a_frame_are_equal_and_travel_by_pickle(framed: tuple[Path, bytes]) -> None:
    path, _ = framed
    whole = Extent(path, 0, path.stat().st_size)
    ours, theirs = (expansion(whole, CODEC, Limits()).narrow(10, 20) for _ in range(2))
    assert ours == theirs
    assert hash(ours) == hash(theirs)
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert [source.path for source in ours.sources] == [path]


def test_a_file_without_a_table_is_expanded_once(tmp_path: Path) -> None:
    (tmp_path / "m.zst").write_bytes(frame(TEXT))
    payload = expansion(Extent(tmp_path / "m.zst", 0, len(frame(TEXT))), CODEC, Limits(), tmp_path)
    assert isinstance(payload, Expanded)
    assert read_all(payload) == TEXT
    assert [path.name for path in tmp_path.iterdir()] == ["m.zst"]


@pytest.mark.parametrize(
    ("limits", "limit"),
    [(Limits(expanded_bytes=1000), "expanded_bytes"), (Limits(ratio=10), "ratio")],
    ids=["size", "ratio"],
)
@pytest.mark.parametrize(
    "make", [frame, lambda content: seekable([content])], ids=["stream", "table"]
)
def test_what_expands_too_far_is_refused(
    tmp_path: Path, limits: Limits, limit: str, make: object
) -> None:
    assert callable(make)
    content = make(bytes(70_000_000))
    (tmp_path / "m.zst").write_bytes(content)
    with pytest.raises(LimitExceeded) as caught:
        expansion(Extent(tmp_path / "m.zst", 0, len(content)), CODEC, limits)
    assert caught.value.limit == limit


def test_without_the_package_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def refusing(name: str, *rest: object) -> object:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(PluginError, match="needs the package zstandard") as caught:
        list(decompress([]))
    assert caught.value.hint == "pip install zstandard"
