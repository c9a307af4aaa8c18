"""Every built-in format and codec passes the conformance kit, and a wrong one fails each check with
the reason.
"""

from __future__ import annotations

import itertools
import json
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from repository import GOOD
from shardkit import testing
from shardkit.checkpoint.entries import Checkpoint, Other, OtherKind, TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.errors import Malformed, NameClash, Unwritable
from shardkit.payloads.codec import Codec, Frame
from shardkit.payloads.payload import (
    CHUNK,
    Concat,
    Extent,
    Literal,
    Part,
    Payload,
    Swapped,
    Trailer,
    check_range,
    read_all,
)
from shardkit.sources import registry
from shardkit.sources.format import Format, Source
from shardkit.testing import (
    CODING,
    READING,
    WRITING,
    CodecSample,
    check_codec,
    check_format,
    check_payload,
)

SMALL = 40_000
PREFIXES = {
    "safetensors": "safetensors",
    "legacy": "torch-legacy",
    "torchscript": "torchscript",
    "zip": "torch-zip",
}
PREFIXES |= {"pickle": "torch-zip"}
FORMAT_OF = {
    path: PREFIXES.get(path.name.partition("-")[0])
    for path in sorted(GOOD.iterdir())
    if path.is_file()
}
FORMAT_OF |= {GOOD / "folder-accelerate-dat": "accelerate-dat"}
SAMPLES = [path for path, name in FORMAT_OF.items() if name and path.stat().st_size <= SMALL]
COMPRESSED = sorted(GOOD.glob("*.zst"))


def test_there_are_samples_of_every_built_in_format() -> None:
    assert {FORMAT_OF[path] for path in SAMPLES} == set(registry._BUILT_IN[registry.FORMATS])


@pytest.mark.parametrize("check", READING, ids=lambda check: check.__name__)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_a_built_in_format_keeps_the_rules_of_reading(
    sample: Path, check: Callable[[Format, Path], None]
) -> None:
    check(registry.format_named(str(FORMAT_OF[sample])), sample)


@pytest.mark.parametrize("check", WRITING, ids=lambda check: check.__name__)
def test_safetensors_keeps_the_rules_of_writing(check: Callable[[Format, str], None]) -> None:
    check(registry.format_named("safetensors"), "weight")


@pytest.mark.parametrize("name", registry._BUILT_IN[registry.FORMATS])
def test_a_built_in_format_claims_no_other(name: str) -> None:
    testing.check_foreign(
        registry.format_named(name), [path for path, other in FORMAT_OF.items() if other != name]
    )


@pytest.mark.parametrize("path", COMPRESSED, ids=lambda path: path.name)
def test_zstd_keeps_the_rules_of_codecs(path: Path) -> None:
    (zstd,) = (each.record for each in registry.codecs() if each.name == "zstd")
    assert zstd
    expanded = (
        zstandard.ZstdDecompressor()
        .stream_reader(path.read_bytes(), read_across_frames=True)
        .read()
    )
    check_codec(zstd, [CodecSample(path, expanded)])


# A format as simple as can be, that keeps every rule: magic, length, JSON, data.

MAGIC = b"TOY1"


def sniff(source: Source) -> bool:
    return source.head.startswith(MAGIC)


def scan(source: Source) -> Checkpoint:
    try:
        return parsed(
            source, json.loads(source.read(8, int.from_bytes(source.read(4, 4), "little")))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(source.path, f"broken header: {type(error).__name__}") from None


def parsed(source: Source, document: Any) -> Checkpoint:
    at = 8 + int.from_bytes(source.read(4, 4), "little")
    tensors: dict[str, TensorEntry] = {}
    for name, (code, shape) in document["tensors"].items():
        nbytes = BY_CODE[code].nbytes(shape)
        tensors[name] = TensorEntry(
            (name,), BY_CODE[code], tuple(shape), source.payload(at, nbytes)
        )
        at += nbytes
    if at != source.size:
        raise Malformed(source.path, f"{at} bytes are needed, and there are {source.size}")
    metadata = {str(key): str(text) for key, text in document["metadata"].items()}
    tied = [
        replace(tensors[kept], path=(alias,))
        for alias, kept in metadata.items()
        if kept in tensors and alias not in tensors
    ]
    return Checkpoint(
        (*tensors.values(), *tied), metadata={k: v for k, v in metadata.items() if v not in tensors}
    )


def lay_out(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    tensors = {entry.name: (entry.dtype.code, entry.shape) for entry in entries}
    if len(tensors) < len(entries):
        raise NameClash("two tensors have one name")
    text = json.dumps({"tensors": tensors, "metadata": dict(metadata)}).encode()
    return (
        Literal(MAGIC + len(text).to_bytes(4, "little") + text),
        *(entry.payload for entry in entries),
    )


TOY = Format("toy", (".toy",), sniff, scan, lay_out)


def written(path: Path, entries: Sequence[TensorEntry], form: Format = TOY) -> Path:
    assert form.lay_out
    path.write_bytes(
        b"".join(
            bytes(read_all(part))
            for part in form.lay_out(entries, {})
            if not isinstance(part, Trailer)
        )
    )
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A file of the toy format with a tensor that is larger than what may be read at the ends of a
    file.
    """
    large = TensorEntry(
        ("large",), BY_CODE["F32"], (50_000,), Literal(bytes(range(256)) * 781 + bytes(64))
    )
    return written(
        tmp_path / "sample.toy",
        [
            replace(large, path=("a",)),
            TensorEntry(("b",), BY_CODE["I16"], (3,), Literal(b"abcdef")),
        ],
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(
        tmp_path / "small.toy",
        [TensorEntry(("w",), BY_CODE["F32"], (2, 3), Literal(bytes(range(24))))],
    )


def test_the_right_format_passes(sample: Path, small: Path) -> None:
    check_format(TOY, [small, sample], foreign=SAMPLES)
    check_format(replace(TOY, lay_out=None), [small])


# And the same format with one rule broken.


def wrong(value: object) -> Any:
    """A value of another type than the contract says."""
    return value


def entries_as(change: Callable[[TensorEntry], TensorEntry]) -> Format:
    return replace(
        TOY,
        scan=lambda source: with_tensors(
            source, tuple(change(entry) for entry in scan(source).tensors)
        ),
    )


def with_tensors(source: Source, tensors: tuple[TensorEntry, ...]) -> Checkpoint:
    return replace(scan(source), tensors=tensors)


def reading_weights(source: Source) -> Checkpoint:
    checkpoint = scan(source)
    for entry in checkpoint.tensors:
        entry.read()
    return checkpoint


def summing_the_tail(source: Source) -> Checkpoint:
    return replace(scan(source), tensors=scan(source).tensors[: 2 - source.tail[-1] % 2])


def opening_the_path(source: Source) -> Checkpoint:
    scan(source)
    whole = source.path.read_bytes()
    at = 8 + int.from_bytes(whole[4:8], "little")
    return with_tensors(
        source,
        (
            TensorEntry(
                ("w",), BY_CODE["U8"], (len(whole) - at,), Extent(source.path, at, len(whole) - at)
            ),
        ),
    )


def guessing(source: Source) -> Checkpoint:
    try:
        return scan(source)
    except Malformed:
        return Checkpoint(())


def unguarded(source: Source) -> Checkpoint:
    return parsed(source, json.loads(source.read(8, int.from_bytes(source.read(4, 4), "little"))))


def fragile(source: Source) -> Checkpoint:
    if source.head[4:8] != source.read(4, 4) or source.head[:4] != MAGIC:
        raise KeyError("magic")
    return scan(source)


counting = itertools.count()


@dataclass(frozen=True)
class Faulty:
    """A payload with a fault to choose."""

    inner: Payload
    fault: str = ""

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + (self.fault == "promises more")

    @property
    def sources(self) -> tuple[Extent, ...]:
        return () if self.fault == "hides its sources" else self.inner.sources

    def narrow(self, start: int, nbytes: int) -> Payload:
        if self.fault == "narrows anywhere":
            nbytes = min(nbytes, self.nbytes - max(0, start))
            return Literal(
                bytes(read_all(self.inner))[max(0, start) :][:nbytes] + bytes(max(0, -nbytes))
            )
        check_range(start, nbytes, self.nbytes)
        return (
            Literal(bytes(nbytes))
            if self.fault == "narrows to zeros"
            else self.inner.narrow(start, nbytes)
        )

    def chunks(self) -> Iterator[memoryview]:
        content = memoryview(bytes(read_all(self.inner)))
        size = {"gives crumbs": 7, "gives too much": len(content)}.get(self.fault, CHUNK)
        if self.fault == "changes":
            content = memoryview(bytes([next(counting) % 256]) + bytes(content[1:]))
        return (content[at : at + size] for at in range(0, len(content), size))

    def __eq__(self, other: object) -> bool:
        return (
            self is other
            if self.fault == "equals itself only"
            else isinstance(other, Faulty) and self.inner == other.inner
        )

    def __hash__(self) -> int:
        return hash(self.inner)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.fault == "cannot be pickled":
            raise TypeError("cannot pickle a lock")
        return Faulty, (self.inner, self.fault)


def faulty(fault: str) -> Format:
    return entries_as(lambda entry: replace(entry, payload=Faulty(entry.payload, fault)))


READING_WRONG: dict[str, tuple[str, Format, str]] = {
    "claims nothing": (
        "check_sniff",
        replace(TOY, sniff=lambda source: False),
        "sniff must return True for small.toy",
    ),
    "says 1 for True": (
        "check_sniff",
        replace(TOY, sniff=wrong(lambda source: 1)),
        "sniff must return True",
    ),
    "sniffs all of it": (
        "check_sniff",
        replace(TOY, sniff=lambda source: bool(source.read(0, source.size)) and sniff(source)),
        "of a large file, and may read its ends and directory only",
    ),
    "returns tensors": (
        "check_scan",
        replace(TOY, scan=wrong(lambda source: scan(source).tensors)),
        "must return a Checkpoint, found a tuple",
    ),
    "says a tensor twice": (
        "check_scan",
        replace(TOY, scan=lambda s: with_tensors(s, scan(s).tensors * 2)),
        "two tensors have one path",
    ),
    "has lists for shapes": (
        "check_scan",
        entries_as(lambda e: replace(e, shape=wrong(list(e.shape)))),
        "shape must be a tuple, found a list",
    ),
    "has text for a path": (
        "check_scan",
        entries_as(lambda e: replace(e, path=wrong("ab"))),
        "path must be a tuple of str",
    ),
    "leaves out for no reason": (
        "check_scan",
        replace(
            TOY, scan=lambda s: replace(scan(s), others=(Other(("x",), OtherKind.OBJECT, 0, ""),))
        ),
        "others must be Other values that say why",
    ),
    "has numbers in metadata": (
        "check_scan",
        replace(TOY, scan=lambda s: replace(scan(s), metadata=wrong({"a": 1}))),
        "metadata and notes must be text",
    ),
    "gives new payloads": (
        "check_scan",
        faulty("equals itself only"),
        "equal bytes need equal payloads",
    ),
    "gives crumbs": (
        "check_payloads",
        faulty("gives crumbs"),
        "tensor 'w': a chunk that is not the last must be a multiple of 4096",
    ),
    "changes": ("check_payloads", faulty("changes"), "other bytes when it was called again"),
    "narrows to zeros": (
        "check_payloads",
        faulty("narrows to zeros"),
        "has other bytes than the whole has there",
    ),
    "cannot be pickled": (
        "check_payloads",
        faulty("cannot be pickled"),
        "TypeError came out: cannot pickle a lock",
    ),
    "hides its sources": (
        "check_payloads",
        faulty("hides its sources"),
        "which its sources do not name",
    ),
    "reads the weights": (
        "check_headers_only",
        replace(TOY, scan=reading_weights),
        "which are weights",
    ),
    "looks at the weights": (
        "check_headers_only",
        replace(TOY, scan=summing_the_tail),
        "with other weights in the file it found other tensors",
    ),
    "opens the path": (
        "check_unusual_content",
        replace(TOY, scan=opening_the_path),
        "it looks at the source, and never opens its path",
    ),
    "takes all for whole": (
        "check_truncation",
        replace(TOY, scan=guessing),
        "cut off after 0 of .* bytes: scan accepted it",
    ),
    "lets errors out": (
        "check_truncation",
        replace(TOY, scan=unguarded),
        "JSONDecodeError came out|KeyError came out|ValueError came out",
    ),
    "is fragile": ("check_damage", replace(TOY, scan=fragile), "KeyError came out"),
}


@pytest.mark.parametrize("fault", READING_WRONG)
def test_a_format_that_reads_wrongly_fails_with_the_reason(
    fault: str, sample: Path, small: Path
) -> None:
    name, form, sentence = READING_WRONG[fault]
    path = sample if name == "check_headers_only" else small
    with pytest.raises(AssertionError, match=sentence):
        getattr(testing, name)(form, path)
    getattr(testing, name)(TOY, path)


def raising(source: Source) -> bool:
    raise KeyError("magic")


def complaining(source: Source) -> bool:
    raise Malformed(source.path, "is not mine")


FOREIGN_WRONG: dict[str, tuple[Callable[[Source], bool], str]] = {
    "zip": (
        lambda source: source.head.startswith(b"PK"),
        "sniff claims the first bytes of a zip archive",
    ),
    "all": (lambda source: True, "sniff claims an empty file"),
    "folders": (lambda source: source.is_folder, r"sniff claims a folder that holds \[\]"),
    "sample": (
        lambda source: source.head.startswith(b"TOY"),
        "sniff claims small.toy, which another format reads",
    ),
    "raises": (raising, "sniff raised KeyError for an empty file, and must return True or False"),
    "complains": (
        complaining,
        "sniff raised a FormatError for an empty file, and must return False",
    ),
    "none": (wrong(lambda source: None), "must return True or False, found a NoneType"),
}


@pytest.mark.parametrize("fault", FOREIGN_WRONG)
def test_a_format_that_claims_too_much_fails_with_the_reason(fault: str, small: Path) -> None:
    claim, sentence = FOREIGN_WRONG[fault]
    with pytest.raises(AssertionError, match=sentence):
        testing.check_foreign(replace(TOY, sniff=claim), [small])


LayOut = Callable[[Sequence[TensorEntry], Mapping[str, str]], tuple[Part, ...]]


def laying(change: Callable[[list[TensorEntry], dict[str, str]], tuple[Part, ...]]) -> Format:
    return replace(TOY, lay_out=lambda entries, metadata: change(list(entries), dict(metadata)))


def refusing(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    raise Unwritable("no", hint="none")


def mute(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    raise Unwritable("no")


def strict(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return refusing(entries, metadata) if metadata else lay_out(entries, metadata)


def merged(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return lay_out(list({entry.name: entry for entry in entries}.values()), metadata)


def stripped(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return lay_out([replace(entry, path=(entry.name.strip(),)) for entry in entries], metadata)


def flat(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return lay_out([replace(entry, shape=entry.shape or (1,)) for entry in entries], metadata)


def unsigned(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    twins = {BY_CODE["I8"]: BY_CODE["U8"]}
    return lay_out(
        [replace(entry, dtype=twins.get(entry.dtype, entry.dtype)) for entry in entries], metadata
    )


def swapped(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return lay_out(
        [
            replace(e, payload=Swapped(e.payload, 8)) if e.dtype.code == "F64" else e
            for e in entries
        ],
        metadata,
    )


def eager(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return lay_out(
        [replace(entry, payload=Literal(bytes(entry.read()))) for entry in entries], metadata
    )


def numbered(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[Part, ...]:
    return lay_out(entries, {**metadata, "number": str(next(counting))})


def with_a_trailer(make: Callable[[Sequence[int]], bytes]) -> Format:
    return laying(lambda entries, metadata: (*lay_out(entries, metadata), Trailer(4, make)))


WRITING_WRONG: dict[str, tuple[str, Format, str]] = {
    "refuses all": ("check_dtypes", laying(refusing), "lay_out refuses every type"),
    "refuses mutely": ("check_dtypes", laying(mute), "an Unwritable without a hint came out"),
    "changes types": (
        "check_dtypes",
        laying(unsigned),
        "type I8: 'weight' was I8 and came back as U8",
    ),
    "changes bytes": (
        "check_dtypes",
        laying(swapped),
        "type F64: 'weight' came back with other bytes",
    ),
    "has no scalars": (
        "check_shapes",
        laying(flat),
        r"shape \[\]: 'weight' was \[\] and came back as \[1\]",
    ),
    "strips names": ("check_names", laying(stripped), "name '.*': laid out .*, scanned"),
    "lets names clash": (
        "check_names",
        laying(merged),
        "two tensors of one name must raise NameClash",
    ),
    "drops metadata": (
        "check_metadata",
        laying(lambda e, m: lay_out(e, {})),
        "lay_out took the metadata .*, and scan does not find it",
    ),
    "refuses the format": (
        "check_metadata",
        laying(strict),
        "must not stand in the way of writing",
    ),
    "drops ties": (
        "check_ties",
        laying(lambda e, m: lay_out(e, {})),
        r"a tie: laid out \['weight', 'tied.weight'\], scanned \['weight'\]",
    ),
    "reads weights": (
        "check_layout",
        laying(eager),
        "lay_out: weights were read where only their byte ranges are needed",
    ),
    "is never the same": (
        "check_layout",
        laying(numbered),
        "lay_out gave another file the second time",
    ),
    "reads to scan": (
        "check_large_tensor",
        replace(TOY, scan=reading_weights),
        "scan read 33,5.* bytes of a file with one tensor",
    ),
    "breaks its promise": (
        "check_layout",
        with_a_trailer(lambda crcs: b"12345"),
        "a trailer of 4 bytes was promised, and 5 were made",
    ),
    "cannot read its own": (
        "check_dtypes",
        with_a_trailer(lambda crcs: b"1234"),
        "scan refuses a file that the format wrote itself",
    ),
    "does not know its own": (
        "check_dtypes",
        replace(TOY, sniff=lambda s: False),
        "sniff does not claim a file that the format wrote",
    ),
    "does not write": (
        "check_dtypes",
        replace(TOY, lay_out=None),
        "toy has no lay_out: it can only be read",
    ),
}


@pytest.mark.parametrize("fault", WRITING_WRONG)
def test_a_format_that_writes_wrongly_fails_with_the_reason(fault: str) -> None:
    name, form, sentence = WRITING_WRONG[fault]
    with pytest.raises(AssertionError, match=sentence):
        getattr(testing, name)(form, "weight")
    getattr(testing, name)(TOY, "weight")


def test_a_trailer_gets_the_crc_of_every_part_before_it() -> None:
    seen: list[list[int]] = []

    def make(crcs: Sequence[int]) -> bytes:
        seen.append(list(crcs))
        return b"1234"

    parts = (Literal(b"header"), Literal(b""), Trailer(4, make), Literal(b"data"), Trailer(4, make))
    assert testing.assembled(parts) == b"header1234data1234"
    before = [zlib.crc32(b"header"), 0]
    assert seen == [before, [*before, zlib.crc32(b"1234"), zlib.crc32(b"data")]]


def test_the_first_failure_names_format_check_and_sample(small: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"^toy, check_truncation, small.toy: small.toy cut off after 0"
    ):
        check_format(replace(TOY, scan=guessing), [small])
    with pytest.raises(AssertionError, match="a format needs one sample at least"):
        check_format(TOY, [])


BIG = Literal(bytes(range(251)) * ((CHUNK + 9000) // 251))


@pytest.mark.parametrize(
    "payload",
    [
        Literal(b""),
        Literal(b"abcdefgh"),
        BIG,
        Swapped(Literal(b"abcdefgh" * 2000), 8),
        Concat((BIG, BIG)),
    ],
)
def test_the_payloads_of_shardkit_keep_the_rules(payload: Payload) -> None:
    check_payload(payload, itemsize=8 if isinstance(payload, Swapped) else 1)


def test_an_extent_keeps_the_rules(sample: Path) -> None:
    check_payload(Extent(sample, 3, 150_001))


PAYLOADS_WRONG = {
    "promises more": "nbytes says .*, and the chunks hold",
    "gives too much": r"a chunk has .* bytes; it must have at least one, and at most 8,388,608",
    "narrows anywhere": r"narrow\(.*\) of .* bytes must raise ValueError",
}


@pytest.mark.parametrize("fault", PAYLOADS_WRONG)
def test_a_payload_that_breaks_a_rule_fails_with_the_reason(fault: str) -> None:
    with pytest.raises(AssertionError, match=PAYLOADS_WRONG[fault]):
        check_payload(Faulty(BIG, fault))


# A codec as simple as can be: frames of a magic, a length and as many bytes, and a table of none.

FRAME = b"TZ"


def expand(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    content = bytearray()
    for piece in pieces:
        content += piece
    at = 0
    while at < len(content):
        nbytes = int.from_bytes(content[at + 2 : at + 6], "little")
        if content[at : at + 2] != FRAME or at + 6 + nbytes > len(content):
            raise ValueError("a frame is broken")
        yield bytes(content[at + 6 : at + 6 + nbytes])
        at += 6 + nbytes


def frames(payload: Payload) -> tuple[Frame, ...]:
    content = bytes(read_all(payload))
    found, at = [], 0
    while at < len(content):
        nbytes = int.from_bytes(content[at + 2 : at + 6], "little")
        if at + 6 + nbytes > len(content):
            raise ValueError("a frame is broken")
        found.append(Frame(at, 6 + nbytes, nbytes))
        at += 6 + nbytes
    return tuple(found)


def pack(content: memoryview) -> bytes:
    return FRAME + len(content).to_bytes(4, "little") + content


def pack_in_a_mood(content: memoryview) -> bytes:
    return pack(content) + pack(memoryview(b"")) * (
        threading.current_thread() is threading.main_thread()
    )


TOY_CODEC = Codec(
    "toy", ".tz", sniff=lambda head: head.startswith(FRAME), decompress=expand, frames=frames
)


@pytest.fixture
def compressed(tmp_path: Path) -> CodecSample:
    pieces = [b"hello", b"", bytes(range(200))]
    (tmp_path / "sample.tz").write_bytes(
        b"".join(FRAME + len(piece).to_bytes(4, "little") + piece for piece in pieces)
    )
    return CodecSample(tmp_path / "sample.tz", b"".join(pieces))


def test_the_right_codec_passes(compressed: CodecSample) -> None:
    check_codec(TOY_CODEC, [compressed])
    check_codec(replace(TOY_CODEC, frames=lambda payload: ()), [compressed])
    check_codec(replace(TOY_CODEC, compress=pack), [compressed])


def at_once(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    return iter([b"".join(expand(pieces))])


def by_piece(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    return (bytes(each) for piece in pieces for each in expand([piece]))


def trusting(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    try:
        yield from expand(pieces)
    except ValueError:
        return


def crashing(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    try:
        yield from expand(pieces)
    except ValueError:
        raise KeyError("frame") from None


def shifted(payload: Payload) -> tuple[Frame, ...]:
    return tuple(replace(frame, expanded=frame.expanded + 1) for frame in frames(payload))


def unguarded_table(payload: Payload) -> tuple[Frame, ...]:
    if bytes(read_all(payload.narrow(0, 2))) != FRAME:
        raise KeyError("frame")
    return ()


CODECS_WRONG: dict[str, tuple[Codec, str]] = {
    "claims nothing": (
        replace(TOY_CODEC, sniff=lambda head: False),
        "check_recognition.*sniff must return True",
    ),
    "claims all": (
        replace(TOY_CODEC, sniff=lambda head: True),
        "check_recognition.*sniff claims an empty file",
    ),
    "expands at once": (
        replace(TOY_CODEC, decompress=at_once),
        "check_pieces.*before it was asked for a piece",
    ),
    "wants whole pieces": (
        replace(TOY_CODEC, decompress=by_piece),
        "check_pieces.*ValueError came out: a frame is broken",
    ),
    "trusts": (
        replace(TOY_CODEC, decompress=trusting),
        "check_early_end.*accepted it, and must raise ValueError",
    ),
    "crashes": (replace(TOY_CODEC, decompress=crashing), "check_early_end.*KeyError came out"),
    "has a fragile table": (
        replace(TOY_CODEC, frames=unguarded_table),
        "check_broken_stream.*KeyError came out",
    ),
    "has a wrong table": (
        replace(TOY_CODEC, frames=shifted),
        "check_frames.*the frame at 0 says 6 bytes, and expands to 5",
    ),
    "has half a table": (
        replace(TOY_CODEC, frames=lambda p: frames(p)[:1]),
        "check_frames.*the frames expand to 5 bytes, and the whole to 205",
    ),
    "compresses into nothing it knows": (
        replace(TOY_CODEC, compress=bytes),
        "check_compress.*sniff does not claim",
    ),
    "compresses half": (
        replace(TOY_CODEC, compress=lambda c: pack(c[:100])),
        "check_compress.*a frame of 205 bytes expands to",
    ),
    "compresses as it likes": (
        replace(TOY_CODEC, compress=pack_in_a_mood),
        "check_compress.*gives other bytes at another time",
    ),
    "writes a table that shows": (
        replace(TOY_CODEC, compress=pack, table=lambda frames: pack(memoryview(b"table"))),
        "check_compress.*frames and their table expand to other bytes",
    ),
    "does not find its table": (
        replace(TOY_CODEC, compress=pack, table=lambda frames: pack(memoryview(b""))),
        "check_compress.*frames finds others than table was given",
    ),
    "has a table in disorder": (
        replace(TOY_CODEC, frames=lambda p: frames(p)[:1] * 2),
        "check_frames.*begins before the one before it ends",
    ),
}


@pytest.mark.parametrize("fault", CODECS_WRONG)
def test_a_codec_that_breaks_a_rule_fails_with_the_reason(
    fault: str, compressed: CodecSample
) -> None:
    codec, sentence = CODECS_WRONG[fault]
    with pytest.raises(AssertionError, match=sentence):
        check_codec(codec, [compressed])


def test_every_check_of_the_kit_can_fail() -> None:
    shown = {name for name, *_ in (*READING_WRONG.values(), *WRITING_WRONG.values())}
    assert shown == {check.__name__ for check in (*READING, *WRITING)}
    assert {sentence.partition(".*")[0] for _, sentence in CODECS_WRONG.values()} == {
        check.__name__ for check in CODING
    }
