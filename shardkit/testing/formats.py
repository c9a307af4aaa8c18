"""The rules of formats that read, as checks that take a `Format` and the path of a sample.

Each raises AssertionError with a sentence. A sample is a file that the format must read, preferably
of a few kilobytes; a sample of a format for folders is a folder, for which checks of the bytes of a
file are skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from shardkit.checkpoint.entries import Checkpoint, Other, TensorEntry
from shardkit.errors import FormatError
from shardkit.limits import Limits
from shardkit.payloads.codec import Codec
from shardkit.payloads.compressed import Expanded, Framed, Spool
from shardkit.payloads.payload import Concat, Extent, Literal, read_all
from shardkit.sources.format import Format, Source
from shardkit.testing import foreign
from shardkit.testing.payloads import Watched, check_payload, expect, grown, outside, overlap
from shardkit.testing.sources import Exact, claims, saying, source_of, watched

_EDGE = (
    66 << 10
    # of the file's ends may be read whatever lies there: `head`, `tail`, and what may follow a zip
    # directory
)
_SNIFFED = 1 << 20
_MIDDLE = 64 << 20


def check_sniff(candidate: Format, sample: Path) -> None:
    """Check that the format claims the sample, and reads little of it, however large the file is.

    Args:
        candidate: the record that the plugin exports.
        sample: a file or folder of the format.

    Raises:
        AssertionError: sniff does not return True, or reads more than 1 MiB.

    Example:
        >>> from dataclasses import replace
        >>> from pathlib import Path
        >>> from shardkit.testing import check_sniff
        >>> check_sniff(FORMAT, Path("model.safetensors"))
        >>> try:
        ...     check_sniff(replace(FORMAT, sniff=lambda source: False), Path("model.safetensors"))
        ... except AssertionError as error:
        ...     print(error)
        sniff must return True for model.safetensors, which is a sample of safetensors
    """
    expect(
        candidate.sniff(source_of(sample)) is True,
        f"sniff must return True for {sample.name}, which is a sample of {candidate.name}",
    )
    if sample.is_dir():
        return
    content = Watched(sample, grown(sample.read_bytes(), _MIDDLE))
    with suppress(FormatError):  # a zip archive that was torn apart
        candidate.sniff(Exact(sample, content, limits=Limits()))
    read = sum(stop - start for start, stop in content.log)
    expect(
        read <= _SNIFFED,
        f"sniff read {read:,} bytes of a large file, and may read its ends and directory only",
    )


def check_foreign(candidate: Format, others: Iterable[Path] = ()) -> None:
    """Check that the format claims no foreign content: no text, image or other archive, none of
    *others*.

    Args:
        candidate: the record that the plugin exports.
        others: files of other formats.

    Raises:
        AssertionError: sniff claims one of them; the message names it.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_foreign
        >>> check_foreign(FORMAT, [Path("training.pt")])
    """
    for name, content in foreign.contents():
        claimed = claims(
            candidate,
            Exact(Path("foreign"), Watched(Path("foreign"), Literal(content)), limits=Limits()),
            name,
        )
        expect(not claimed, f"sniff claims {name}")
    for names in ((), ("config.json",), ("readme.txt", "weights")):
        source = Source(Path("folder"), Literal(b""), names=names, limits=Limits())
        expect(
            not claims(candidate, source, "a folder"),
            f"sniff claims a folder that holds {list(names)}",
        )
    for other in others:
        expect(
            not claims(candidate, source_of(other), other.name),
            f"sniff claims {other.name}, which another format reads",
        )


def check_scan(candidate: Format, sample: Path) -> None:
    """Check that scan returns a valid checkpoint, and an equal one each time.

    Args:
        candidate: the record that the plugin exports.
        sample: a file or folder of the format.

    Raises:
        AssertionError: a value has the wrong type, or the second scan differs from the first.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_scan
        >>> check_scan(FORMAT, Path("model.safetensors"))
    """
    checkpoint = candidate.scan(source_of(sample))
    expect(
        type(checkpoint) is Checkpoint,
        f"scan must return a Checkpoint, found a {type(checkpoint).__name__}",
    )
    expect(
        all(type(t) is TensorEntry for t in checkpoint.tensors),
        "tensors must be TensorEntry values",
    )
    for entry in checkpoint.tensors:
        _check_entry(entry)
    paths = [entry.path for entry in checkpoint.tensors]
    expect(len(set(paths)) == len(paths), "two tensors have one path")
    expect(
        all(type(other) is Other and other.reason for other in checkpoint.others),
        "others must be Other values that say why",
    )
    texts = [text for item in checkpoint.metadata.items() for text in item]
    expect(
        all(type(text) is str for text in (*texts, *checkpoint.notes)),
        "metadata and notes must be text",
    )
    again = candidate.scan(source_of(sample))
    expect(
        again.tensors == checkpoint.tensors,
        "a second scan of the same file gave other tensors; equal bytes need equal payloads",
    )
    expect(again.others == checkpoint.others, "a second scan of the same file gave other Others")


def check_payloads(candidate: Format, sample: Path) -> None:
    """Check every payload (`check_payload`), and that it reads only the bytes that its sources
    name.

    Args:
        candidate: the record that the plugin exports.
        sample: a file or folder of the format.

    Raises:
        AssertionError: a payload violates a rule; the message names the tensor.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_payloads
        >>> check_payloads(FORMAT, Path("model.safetensors"))
    """
    checkpoint = candidate.scan(source_of(sample))
    for entry in {entry.payload: entry for entry in checkpoint.tensors}.values():
        with saying(f"tensor {entry.name!r}"):
            check_payload(entry.payload, itemsize=entry.dtype.itemsize)
    if sample.is_dir():
        return
    content = watched(sample)
    for entry in candidate.scan(Exact(sample, content, limits=Limits())).tensors:
        content.log.clear()
        read_all(entry.payload)
        stray = outside(
            content.log,
            [(s.start, s.start + s.nbytes) for s in entry.payload.sources if s.path == sample],
        )
        expect(
            stray is None,
            f"tensor {entry.name!r} reads bytes {stray} of the file, which its sources do not name",
        )


def check_headers_only(candidate: Format, sample: Path) -> None:
    """Check that scan reads headers only, and that its result does not depend on the weights.

    Args:
        candidate: the record that the plugin exports.
        sample: a file of the format; a folder is skipped.

    Raises:
        AssertionError: scan read weights; the message names the bytes.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_headers_only
        >>> check_headers_only(FORMAT, Path("model.safetensors"))
    """
    if sample.is_dir():
        return
    content = watched(sample)
    tensors = candidate.scan(Exact(sample, content, limits=Limits())).tensors
    plain = [entry.payload for entry in tensors if not _is_compressed(entry.payload)]
    weights = [
        (source.start, source.start + source.nbytes)
        for payload in plain
        for source in payload.sources
    ]
    inner = (min(_EDGE, content.nbytes), max(0, content.nbytes - _EDGE))
    middle = [(max(start, inner[0]), min(stop, inner[1])) for start, stop in content.log]
    touched = overlap(middle, weights)
    expect(touched is None, f"scan read bytes {touched}, which are weights")
    poisoned = Watched(sample, Literal(_poisoned(sample.read_bytes(), weights)))
    try:
        found = _described(candidate.scan(Exact(sample, poisoned, limits=Limits())).tensors)
    except FormatError as error:
        raise AssertionError(
            f"scan looks at weights: with other weights in the file it raised: {error}"
        ) from error
    expect(
        found == _described(tensors),
        "scan looks at weights: with other weights in the file it found other tensors",
    )


def check_unusual_content(candidate: Format, sample: Path) -> None:
    """Check that the file is also read where its content is in pieces, or decompressed.

    Args:
        candidate: the record that the plugin exports.
        sample: a file of the format; a folder is skipped.

    Raises:
        AssertionError: the format opened the path, or found other tensors.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_unusual_content
        >>> check_unusual_content(FORMAT, Path("model.safetensors"))
    """
    if sample.is_dir():
        return
    plain = _values(candidate.scan(source_of(sample)))
    whole = Extent(sample, 0, sample.stat().st_size)
    third = whole.nbytes // 3
    pieces = Concat(
        (
            whole.narrow(0, third),
            whole.narrow(third, 1),
            whole.narrow(third + 1, whole.nbytes - third - 1),
        )
    )
    expanded = Expanded(Spool(whole, _PLAIN, Limits()), 0, whole.nbytes)
    with TemporaryDirectory() as folder:
        decoy = Path(folder, sample.name)
        decoy.write_bytes(bytes(whole.nbytes))
        for name, content in (("in pieces", pieces), ("expanded", expanded)):
            source = Source(decoy, content, limits=Limits())
            with saying(f"from a file that is {name}"):
                expect(
                    candidate.sniff(source) is True,
                    "sniff must claim it; it looks at the source, and never opens its path",
                )
                same = _values(candidate.scan(source)) == plain
                expect(
                    same,
                    "scan must find the same tensors; it looks at the source, and never opens "
                    "its path",
                )


def _described(tensors: Iterable[TensorEntry]) -> list[object]:
    """All of *tensors* but their values."""
    return [(entry.path, entry.dtype, entry.shape, entry.payload.sources) for entry in tensors]


_PLAIN = Codec(
    "plain",
    "",
    sniff=lambda head: False,
    decompress=lambda pieces: (bytes(piece) for piece in pieces),
)


def _check_entry(entry: TensorEntry) -> None:
    name = repr(entry.path)
    names = type(entry.path) is tuple and all(type(part) is str for part in entry.path)
    expect(names, f"tensor {name}: path must be a tuple of str")
    expect(
        type(entry.shape) is tuple,
        f"tensor {name}: shape must be a tuple, found a {type(entry.shape).__name__}",
    )
    expect(
        all(type(n) is int and n >= 0 for n in entry.shape),
        f"tensor {name}: shape {entry.shape} must hold whole numbers",
    )


def _values(checkpoint: Checkpoint) -> tuple[object, ...]:
    tensors = [
        (entry.path, entry.dtype, entry.shape, bytes(entry.read())) for entry in checkpoint.tensors
    ]
    return tensors, checkpoint.others, dict(checkpoint.metadata)


def _is_compressed(value: object) -> bool:
    """Whether a payload is, or is made of, something that has to be expanded first."""
    if isinstance(value, Expanded | Framed):
        return True
    if isinstance(value, tuple):
        return any(_is_compressed(each) for each in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, Extent | Watched):
        return False
    return any(_is_compressed(getattr(value, field.name)) for field in dataclasses.fields(value))


def _poisoned(content: bytes, weights: Sequence[tuple[int, int]]) -> bytes:
    """*content* with every bit of the *weights* turned."""
    poisoned = bytearray(content)
    for start, stop in set(weights):
        poisoned[start:stop] = bytes(byte ^ 0xFF for byte in content[start:stop])
    return bytes(poisoned)
