"""The rules of codecs, as checks that take a `Codec` and a sample: a compressed file, and its
decompressed content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from shardkit.payloads.codec import HEAD, Codec, Frame
from shardkit.payloads.payload import CHUNK, Extent, Literal
from shardkit.planning.frames import FRAME
from shardkit.system.threads import Pool
from shardkit.testing import foreign
from shardkit.testing.damage import changed, damages, places
from shardkit.testing.payloads import Watched, expect
from shardkit.testing.sources import saying


@dataclass(frozen=True, slots=True)
class CodecSample:
    """A compressed file and its decompressed content.

    Attributes:
        path: the compressed file.
        expanded: the bytes that it must decompress to.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import CodecSample
        >>> _ = Path("small.zst").write_bytes(CODEC.compress(memoryview(b"weights")))
        >>> CodecSample(Path("small.zst"), b"weights")
        CodecSample(path=PosixPath('small.zst'))
    """

    path: Path
    expanded: bytes = field(repr=False)


def check_codec(codec: Codec, samples: Sequence[CodecSample]) -> None:
    """Run every check of `CODING` on every sample.

    Args:
        codec: the record that the plugin exports.
        samples: small compressed files, each with its content; they are truncated at every byte.

    Raises:
        AssertionError: a rule is violated; the message names it and the sample.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import CodecSample, check_codec
        >>> content = bytes(range(100))
        >>> _ = Path("small.zst").write_bytes(CODEC.compress(memoryview(content)))
        >>> check_codec(CODEC, [CodecSample(Path("small.zst"), content)])
    """
    expect(bool(samples), "a codec needs one sample at least")
    for sample in samples:
        for check in CODING:
            with saying(f"{codec.name}, {check.__name__}, {sample.path.name}"):
                check(codec, sample)


def check_recognition(codec: Codec, sample: CodecSample) -> None:
    """Check that the codec claims the sample by its first bytes, and neither foreign content nor
    what it decompresses to.
    """
    expect(
        codec.sniff(sample.path.read_bytes()[:HEAD]) is True,
        "sniff must return True for the first bytes of the sample",
    )
    for name, content in foreign.contents():
        if not name.startswith("a gzip"):
            expect(codec.sniff(content[:HEAD]) is False, f"sniff claims {name}")
    expect(codec.sniff(sample.expanded[:HEAD]) is False, "sniff claims what the sample expands to")


def check_pieces(codec: Codec, sample: CodecSample) -> None:
    """Check that the same bytes come out however the input is cut, at most 8 MiB at a time and on
    demand.
    """
    content = sample.path.read_bytes()
    for size in (1, 7, 4096, len(content)):
        pieces = list(map(bytes, codec.decompress(_pieces(content, size))))
        expect(
            b"".join(pieces) == sample.expanded,
            f"fed {size} bytes at a time, it gave other bytes than the sample holds",
        )
        expect(
            max(map(len, pieces), default=0) <= CHUNK, f"one piece has more than {CHUNK:,} bytes"
        )
    codec.decompress(_never())


def check_early_end(codec: Codec, sample: CodecSample) -> None:
    """Check that a truncated stream raises ValueError; where it is cut between two streams, each of
    them is valid on its own.
    """
    content = sample.path.read_bytes()
    for nbytes in places(len(content)):
        with saying(f"cut off after {nbytes:,} of {len(content):,} bytes"):
            first = _expanded(codec, content[:nbytes])
            if first is not None:
                rest = _expanded(codec, content[nbytes:])
                whole = rest is not None and first + rest == sample.expanded
                expect(whole, "decompress accepted it, and must raise ValueError")


def check_broken_stream(codec: Codec, sample: CodecSample) -> None:
    """Check that bytes changed at random raise ValueError or give other bytes, from decompress and
    frames; no other exception is raised.
    """
    content = sample.path.read_bytes()
    for damage in damages(content):
        with saying(f"with the bytes {damage} (position: value)"):
            damaged = changed(content, damage)
            _expanded(codec, damaged)
            _frames_or_fault(codec, damaged, sample.path)


def check_frames(codec: Codec, sample: CodecSample) -> None:
    """Check that the frames, where there is a table, are in order, cover all data, and each
    decompresses alone.
    """
    whole = Extent(sample.path, 0, sample.path.stat().st_size)
    at, stop = 0, 0
    for frame in codec.frames(whole):
        name = f"the frame at {frame.start}"
        expect(frame.start >= stop, f"{name} begins before the one before it ends")
        stop = frame.start + frame.nbytes
        expanded = b"".join(
            map(bytes, codec.decompress(whole.narrow(frame.start, frame.nbytes).chunks()))
        )
        expect(
            len(expanded) == frame.expanded,
            f"{name} says {frame.expanded} bytes, and expands to {len(expanded)}",
        )
        expect(
            expanded == sample.expanded[at : at + len(expanded)],
            f"{name} expands to other bytes than the whole has there",
        )
        at += len(expanded)
    expect(
        at in (0, len(sample.expanded)),
        f"the frames expand to {at} bytes, and the whole to {len(sample.expanded)}",
    )


def check_compress(codec: Codec, sample: CodecSample) -> None:
    """Check that compressed data decompresses again, frame by frame and as a whole, and is the same
    each time and in any thread.
    """
    if codec.compress is None:
        return
    contents = [sample.expanded[:FRAME], b"", bytes(FRAME), bytes(range(256)) * 40]
    made = [codec.compress(memoryview(content)) for content in contents]
    expect(
        all(map(codec.sniff, (frame[:HEAD] for frame in made))),
        "sniff does not claim what compress gives",
    )
    for frame, content in zip(made, contents, strict=True):
        expect(
            _expanded(codec, frame) == content,
            f"a frame of {len(content):,} bytes expands to others",
        )
    with Pool(4, "shardkit-codec") as pool:
        again = list(pool.map(codec.compress, map(memoryview, contents * 4)))
    expect(again == made * 4, "compress gives other bytes at another time, or in another thread")
    _check_table(codec, contents, made, sample.path)


def _check_table(
    codec: Codec, contents: Sequence[bytes], made: Sequence[bytes], path: Path
) -> None:
    starts = accumulate(map(len, made), initial=0)
    listed = tuple(
        Frame(at, len(frame), len(content))
        for at, frame, content in zip(starts, made, contents, strict=False)
    )
    whole = b"".join(made) + codec.table(listed)
    expect(
        _expanded(codec, whole) == b"".join(contents),
        "frames and their table expand to other bytes than the frames",
    )
    found = codec.frames(Watched(path, Literal(whole)))
    expect(
        found == listed or not (found or codec.table(listed)),
        "frames finds others than table was given",
    )
    expect(_expanded(codec, codec.table(())) == b"", "a table of no frames expands to something")


CodecCheck = Callable[[Codec, CodecSample], None]

CODING: tuple[CodecCheck, ...] = (
    check_recognition,
    check_pieces,
    check_early_end,
    check_broken_stream,
    check_frames,
    check_compress,
)


def _pieces(content: bytes, size: int) -> Iterator[memoryview]:
    view = memoryview(content)
    return (view[at : at + max(size, 1)] for at in range(0, len(view), max(size, 1)))


def _never() -> Iterator[memoryview]:
    expect(False, "decompress read its input before it was asked for a piece")
    yield memoryview(b"")


def _expanded(codec: Codec, content: bytes) -> bytes | None:
    """What *content* expands to; None if the codec refuses it."""
    try:
        return b"".join(map(bytes, codec.decompress(_pieces(content, len(content)))))
    except ValueError as error:
        expect(bool(str(error)), "a ValueError without a sentence came out")
        return None


def _frames_or_fault(codec: Codec, content: bytes, path: Path) -> None:
    try:
        codec.frames(Watched(path, Literal(content)))
    except ValueError as error:
        expect(bool(str(error)), "a ValueError without a sentence came out of frames")
