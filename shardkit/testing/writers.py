"""The rules of formats that write, as checks that take a `Format` and the name of a tensor that it
can store.

The law behind them: what is laid out is scanned unchanged, or else lay_out raises Unwritable;
nothing is lost silently.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, TensorEntry
from shardkit.dtypes import BY_CODE, DTYPES, DType
from shardkit.errors import FormatError, NameClash, Unwritable
from shardkit.limits import Limits
from shardkit.payloads.payload import Concat, Literal, Part, Payload, Trailer, read_all
from shardkit.sources.format import Format
from shardkit.testing.payloads import Unreadable, Watched, Zeros, expect
from shardkit.testing.sources import Exact, saying, source_of

_SHAPES = ((), (1,), (0,), (7,), (3, 5), (2, 0, 3), (3, 1, 2, 2))
_NAMES = (
    *(
        "weight",
        "layers.0.attn.q_proj.weight",
        "a/b",
        "../up",
        "C:\\drive",
        "größe",
        "重み",
        " spaces ",
        "",
        ".",
        "dot.",
    ),
    *(
        "x.npy",
        "'quoted' \"twice\"",
        "line\nbreak",
        "nul\0byte",
        "__metadata__",
        "format",
        "x" * 300,
        "lone \ud800 surrogate",
    ),
)
_LARGE = 32 << 20
_SLACK = 256 << 10


def check_dtypes(candidate: Format, name: str = "weight") -> None:
    """Check that every element type is read back bit for bit or refused, and at least one is
    accepted.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: a type changes, or none is accepted.

    Example:
        >>> from shardkit.testing import check_dtypes
        >>> check_dtypes(FORMAT, "layers.0.weight")
    """
    taken = [
        dtype.code
        for dtype in DTYPES
        if _comes_back(candidate, [_entry(name, dtype, (2, 4))], {}, f"type {dtype.code}")
    ]
    expect(
        bool(taken), "lay_out refuses every type; leave it out of a format that can only be read"
    )


def check_shapes(candidate: Format, name: str = "weight") -> None:
    """Check that scalars, empty tensors and any number of axes are read back unchanged or refused.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: a shape changes, or none is accepted.

    Example:
        >>> from shardkit.testing import check_shapes
        >>> check_shapes(FORMAT, "layers.0.weight")
    """
    taken = [
        s
        for s in _SHAPES
        if _comes_back(
            candidate, [_entry(name, _plain(candidate, name), s)], {}, f"shape {list(s)}"
        )
    ]
    expect(bool(taken), "lay_out refuses every shape")


def check_names(candidate: Format, name: str = "weight") -> None:
    """Check that any name is read back unchanged or refused, and that two tensors cannot share one.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: a name changes, or a duplicate is accepted.

    Example:
        >>> from shardkit.testing import check_names
        >>> check_names(FORMAT, "layers.0.weight")
    """
    dtype = _plain(candidate, name)
    for each in _NAMES:
        _comes_back(candidate, [_entry(each, dtype, (3,))], {}, f"name {each!r}")
    several = [_entry(f"{name}.{number}", dtype, (number,)) for number in range(1, 5)]
    _comes_back(candidate, several, {}, "several tensors")
    clashing = [_entry(name, dtype, (1,)), _entry(name, dtype, (2,))]
    expect(
        _is_refused(candidate, clashing),
        "two tensors of one name must raise NameClash (or Unwritable)",
    )


def check_metadata(candidate: Format, name: str = "weight") -> None:
    """Check that metadata is read back unchanged or refused.

    Only "format", which marks the origin of a safetensors file, may be dropped or added.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: metadata is lost.

    Example:
        >>> from shardkit.testing import check_metadata
        >>> check_metadata(FORMAT, "layers.0.weight")
    """
    entries = [_entry(name, _plain(candidate, name), (3,))]
    _comes_back(
        candidate, entries, {"author": "someone", "größe": "\U0001f600", "empty": ""}, "metadata"
    )
    taken = _comes_back(candidate, entries, {"format": "pt"}, "metadata {'format': 'pt'}")
    expect(taken, "metadata that says the format only must not stand in the way of writing")


def check_ties(candidate: Format, name: str = "weight") -> None:
    """Check that a tie recorded in the metadata (``alias: kept``) is read back as a tensor, or
    refused.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: the tied tensor is missing or differs.

    Example:
        >>> from shardkit.testing import check_ties
        >>> check_ties(FORMAT, "layers.0.weight")
    """
    entry = _entry(name, _plain(candidate, name), (3,))
    alias = replace(entry, path=(f"tied.{name}",))
    found = _round_trip(candidate, [entry], {alias.name: name})
    if found is not None:
        _compare([entry, alias], found, "a tie")


def check_layout(candidate: Format, name: str = "weight") -> None:
    """Check that lay_out reads no weights, states the length of each part, and is deterministic.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: weights are read, a length is wrong, or two results differ.

    Example:
        >>> from shardkit.testing import check_layout
        >>> check_layout(FORMAT, "layers.0.weight")
    """
    dtype = _plain(candidate, name)
    entry = TensorEntry((name,), dtype, (1 << 20,), Unreadable(dtype.nbytes((1 << 20,))))
    with saying("lay_out"):
        parts = _lay_out(candidate, [entry], {})
        expect(
            sum(part.nbytes for part in parts) >= entry.nbytes,
            "the parts are shorter than the tensor",
        )
    small = [_entry(name, dtype, (5,))]
    expect(
        assembled(_lay_out(candidate, small, {})) == assembled(_lay_out(candidate, small, {})),
        "lay_out gave another file the second time",
    )


def check_large_tensor(candidate: Format, name: str = "weight") -> None:
    """Check that a tensor of 32 MiB that the format wrote is scanned without being read.

    Args:
        candidate: the record that the plugin exports.
        name: a tensor name that the format can store.

    Raises:
        AssertionError: scan reads more than 256 KiB.

    Example:
        >>> from shardkit.testing import check_large_tensor
        >>> check_large_tensor(FORMAT, "layers.0.weight")
    """
    dtype = _plain(candidate, name)
    shape = (_LARGE // dtype.itemsize,)
    parts = _lay_out(candidate, [TensorEntry((name,), dtype, shape, Zeros(_LARGE))], {})
    path = Path("large")
    content = Watched(path, Concat(tuple(_payloads(parts))))
    found = candidate.scan(Exact(path, content, limits=Limits())).tensors
    expect(
        [entry.shape for entry in found] == [shape],
        f"a tensor of {_LARGE:,} bytes came back as {[entry.shape for entry in found]}",
    )
    read = sum(stop - start for start, stop in content.log)
    expect(read <= _SLACK, f"scan read {read:,} bytes of a file with one tensor of {_LARGE:,}")


def assembled(parts: Sequence[Part]) -> bytes:
    """Join *parts* into the content of a file, as shardkit writes it.

    Args:
        parts: what lay_out returned; trailers are computed.

    Returns:
        The complete file, in memory.

    Example:
        >>> import shardkit
        >>> from pathlib import Path
        >>> from shardkit.testing import assembled
        >>> entries = shardkit.open("model.safetensors").tensors
        >>> _ = Path("copy.safetensors").write_bytes(assembled(FORMAT.lay_out(entries, {})))
        >>> shardkit.diff("model.safetensors", "copy.safetensors").same
        True
    """
    return b"".join(bytes(read_all(payload)) for payload in _payloads(parts))


WritingCheck = Callable[[Format, str], None]

WRITING: tuple[WritingCheck, ...] = (
    check_dtypes,
    check_shapes,
    check_names,
    check_metadata,
    check_ties,
    check_layout,
    check_large_tensor,
)


def _comes_back(
    candidate: Format, entries: Sequence[TensorEntry], metadata: Mapping[str, str], what: str
) -> bool:
    """Whether *entries* are taken; if so they must come back."""
    found = _round_trip(candidate, entries, metadata)
    if found is None:
        return False
    _compare(entries, found, what)
    missing = {
        key: text
        for key, text in metadata.items()
        if found.metadata.get(key) != text and key != "format"
    }
    expect(not missing, f"{what}: lay_out took the metadata {missing}, and scan does not find it")
    return True


def _round_trip(
    candidate: Format, entries: Sequence[TensorEntry], metadata: Mapping[str, str]
) -> Checkpoint | None:
    """What scan finds in the file that *entries* make, its values held in memory; None if lay_out
    refuses them.
    """
    try:
        content = assembled(_lay_out(candidate, entries, metadata))
    except Unwritable as error:
        expect(bool(error.hint), f"an Unwritable without a hint came out: {error}")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"written{next(iter(candidate.suffixes), '')}")
        path.write_bytes(content)
        return _scanned(candidate, path)


def _scanned(candidate: Format, path: Path) -> Checkpoint:
    names = "a file that the format wrote itself"
    expect(candidate.sniff(source_of(path)) is True, f"sniff does not claim {names}")
    try:
        found = candidate.scan(source_of(path))
    except FormatError as error:
        raise AssertionError(f"scan refuses {names}: {error}") from error
    return replace(
        found,
        tensors=tuple(
            replace(entry, payload=Literal(bytes(entry.read()))) for entry in found.tensors
        ),
    )


def _compare(entries: Sequence[TensorEntry], found: Checkpoint, what: str) -> None:
    there = {entry.name: entry for entry in found.tensors}
    expect(
        set(there) == {entry.name for entry in entries},
        f"{what}: laid out {[e.name for e in entries]}, scanned {list(there)}",
    )
    for entry in entries:
        back = there[entry.name]
        expect(
            back.dtype == entry.dtype,
            f"{what}: {entry.name!r} was {entry.dtype.code} and came back as {back.dtype.code}",
        )
        expect(
            back.shape == entry.shape,
            f"{what}: {entry.name!r} was {list(entry.shape)} and came back as {list(back.shape)}",
        )
        expect(back.read() == entry.read(), f"{what}: {entry.name!r} came back with other bytes")


def _is_refused(candidate: Format, entries: Sequence[TensorEntry]) -> bool:
    try:
        _lay_out(candidate, entries, {})
    except (NameClash, Unwritable):
        return True
    return False


def _lay_out(
    candidate: Format, entries: Sequence[TensorEntry], metadata: Mapping[str, str]
) -> tuple[Part, ...]:
    if candidate.lay_out is None:
        raise AssertionError(f"{candidate.name} has no lay_out: it can only be read")
    return tuple(candidate.lay_out(entries, metadata))


def _payloads(parts: Sequence[Part]) -> Sequence[Payload]:
    """*parts* with every trailer made."""
    crcs: list[int] = []
    payloads: list[Payload] = []
    for part in parts:
        payload = Literal(part.make(crcs)) if isinstance(part, Trailer) else part
        expect(
            payload.nbytes == part.nbytes,
            f"a trailer of {part.nbytes} bytes was promised, and {payload.nbytes} were made",
        )
        crcs.append(_crc(payload))
        payloads.append(payload)
    return payloads


def _crc(payload: Payload) -> int:
    crc = 0
    for chunk in payload.chunks():
        crc = zlib.crc32(chunk, crc)
    return crc


def _plain(candidate: Format, name: str) -> DType:
    """A type that the format can hold, F32 where it can."""
    for dtype in (BY_CODE["F32"], *DTYPES):
        try:
            _lay_out(candidate, [TensorEntry((name,), dtype, (8,), Zeros(dtype.nbytes((8,))))], {})
        except Unwritable:
            continue
        return dtype
    raise AssertionError(
        "lay_out refuses every type; leave it out of a format that can only be read"
    )


def _entry(name: str, dtype: DType, shape: tuple[int, ...]) -> TensorEntry:
    """A tensor of random bits, NaNs of all kinds among them; of truth values only those that there
    are.
    """
    dice = random.Random(prod(shape))  # the same values each time
    values = dice.randbytes(dtype.nbytes(shape))
    if dtype.kind == "bool":
        values = bytes(byte & 1 for byte in values)
    return TensorEntry((name,), dtype, shape, Literal(values))
