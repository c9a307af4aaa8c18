"""The safetensors header: bytes ↔ entries, without any I/O.

A file is 8 bytes (little-endian length n), n bytes of JSON that may end in spaces, and the data of
all tensors without holes (https://github.com/huggingface/safetensors#format). Files that the
reference reader refuses are refused here, each fault with a sentence that names the tensor. A
duplicate key is refused too, though that reader takes the last.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from shardkit.alignment import ALIGNMENT
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE, DType
from shardkit.errors import LimitExceeded, Malformed, NameClash, Unwritable
from shardkit.hints import excluding, option, renaming
from shardkit.limits import Limits
from shardkit.metadata.strict_json import parse_json
from shardkit.payloads.payload import PAGE, Payload
from shardkit.printable import listed, several, shown

LENGTH_NBYTES = 8
MAX_JSON_NBYTES = 100_000_000
METADATA = "__metadata__"

_U64 = 2**64
_WHERE = "header"
_FETCH = "the file is truncated: copy or download it again"
_OFFSET_DIGITS = 19  # no file is longer than 2⁶³ bytes
_WRITABLE = {code: dtype for code, dtype in BY_CODE.items() if dtype.writable}
_quoted = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says: the tensors in the order of their data, and the free text of
    `__metadata__`.
    """

    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def places(content: bytes) -> list[tuple[str, int, int]]:
    """Name, start and stop of each tensor in a file that begins with *content*, a header that we
    dumped, in their order.
    """
    start = LENGTH_NBYTES + int.from_bytes(content[:LENGTH_NBYTES], "little")
    fields: dict[str, dict[str, tuple[int, int]]] = json.loads(content[LENGTH_NBYTES:start])
    offsets = ((name, field["data_offsets"]) for name, field in fields.items() if name != METADATA)
    return sorted(
        ((name, start + low, start + high) for name, (low, high) in offsets),
        key=lambda place: place[1:],
    )


def json_nbytes(path: Path, first: bytes, file_nbytes: int, limits: Limits) -> int:
    """The length of the JSON, from the *first* 8 bytes of a file of *file_nbytes*.

    Raises:
        Malformed: the file is too short, or the format allows no such length.
        LimitExceeded: it is longer than `header_bytes`.
    """
    if len(first) < LENGTH_NBYTES:
        message = (
            f"the file has {several(file_nbytes, 'byte')}, and the length of the header alone "
            f"takes 8"
        )
        raise Malformed(path, message, where=_WHERE, hint=_FETCH)
    nbytes = int.from_bytes(first[:LENGTH_NBYTES], "little")
    if nbytes > MAX_JSON_NBYTES:
        raise Malformed(
            path,
            f"claims to take {nbytes:,} bytes, and the format allows {MAX_JSON_NBYTES:,}",
            where=_WHERE,
        )
    if nbytes > limits.header_bytes:
        raise LimitExceeded(
            path, f"the header takes {nbytes:,} bytes", limit="header_bytes", actual=nbytes
        )
    if nbytes > file_nbytes - LENGTH_NBYTES:
        message = (
            f"takes {nbytes:,} bytes, and the file ends after "
            f"{file_nbytes - LENGTH_NBYTES:,} of them"
        )
        raise Malformed(path, message, where=_WHERE, hint=_FETCH)
    return nbytes


def parse(path: Path, content: bytes, data: Payload, limits: Limits) -> Header:
    """The header whose JSON is *content*, of a file where *data* follows it.

    Raises:
        Malformed: it breaks a rule of the format.
        LimitExceeded: it is nested too deeply, or holds too many tensors.
    """
    if not content.startswith(b"{"):
        raise Malformed(path, f"must begin with '{{', found {shown(content[:8])}", where=_WHERE)
    document = parse_json(path, content, limits, where=_WHERE, made=_told)
    if not isinstance(document, dict):  # though it begins with a brace
        raise Malformed(path, "must hold tensors by name, found the fields of one", where=_WHERE)
    metadata = _metadata(path, document.pop(METADATA, None))
    if len(document) > limits.tensors:
        raise LimitExceeded(
            path, f"holds {several(len(document), 'tensor')}", limit="tensors", actual=len(document)
        )
    # Memory is given back as it goes: popped from the document here, and from the lines below.
    lines = sorted(_line(path, name, document.pop(name)) for name in list(document))
    _check_cover(path, lines, data.nbytes)
    lines.reverse()
    return Header(tuple(lines.pop().entry(data) for _ in range(len(lines))), metadata)


def dump(
    entries: Sequence[TensorEntry],
    metadata: Mapping[str, str],
    *,
    residue: int = 0,
    modulus: int = ALIGNMENT,
) -> bytes:
    """The first bytes of a file that holds *entries* one after the other: length, JSON, and spaces
    up to the data.

    Args:
        entries: in the order of their data.
        metadata: for `__metadata__`, as it is.
        residue: the data starts at an offset that is *residue* modulo *modulus*.
        modulus: a power of two.

    Raises:
        Unwritable: the format has no way to hold one of them, or as many.
        NameClash: two have one name.
    """
    _check_names(entries)
    _check_types(entries)
    fields = [_metadata_line(metadata)] if metadata else []
    fields += _lines(entries)
    text = _encoded(f"{{{','.join(fields)}}}", entries)
    padding = b" " * ((residue - LENGTH_NBYTES - len(text)) % modulus)
    nbytes = len(text) + len(padding)
    if nbytes > MAX_JSON_NBYTES:
        raise Unwritable(
            (
                f"the header of {len(entries):,} tensors takes {nbytes:,} bytes, and the format "
                f"allows {MAX_JSON_NBYTES:,}"
            ),
            hint=("write more, smaller shards: lower ", option("max_shard")),
        )
    return b"".join((nbytes.to_bytes(LENGTH_NBYTES, "little"), text, padding))


def room(entry: TensorEntry) -> int:
    """At least the bytes that the line of *entry* takes in a header, wherever its data lies."""
    digits = sum(len(str(length)) + 1 for length in entry.shape)
    return (
        len(_quoted(entry.name).encode("utf-8", "surrogatepass"))
        + len(entry.dtype.code)
        + digits
        + _LINE_ROOM
    )


def as_readers_need(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """*metadata* with the format ``pt``: huggingface_hub, accelerate and transformers refuse, or
    read otherwise, any other.
    """
    if metadata.get("format") == "pt":
        return metadata
    return {"format": "pt", **{key: text for key, text in metadata.items() if key != "format"}}


def fixed_room(metadata: Mapping[str, str]) -> int:
    """At least the bytes of a header that are no tensor's: length, braces, *metadata*, and padding
    up to a page.
    """
    line = _metadata_line(as_readers_need(metadata))
    return LENGTH_NBYTES + len(line.encode("utf-8", "surrogatepass")) + len("{,}") + PAGE


def _metadata(path: Path, document: object) -> dict[str, str]:
    match document:
        case None:
            return {}
        case dict():
            for key, value in document.items():
                if not isinstance(value, str):
                    message = (
                        f"{METADATA}: the value of {shown(key)} must be text, found {shown(value)}"
                    )
                    raise Malformed(path, message, where=_WHERE)
            return document
    raise Malformed(
        path, f"{METADATA} must hold texts by name, found {shown(document)}", where=_WHERE
    )


class _Line(NamedTuple):
    """What the header says of one tensor; *start* and *stop* count from the first byte of the data,
    and lines sort by them.
    """

    start: int
    stop: int
    name: str
    dtype: DType
    shape: tuple[int, ...]

    def entry(self, data: Payload) -> TensorEntry:
        return TensorEntry(
            (self.name,), self.dtype, self.shape, data.narrow(self.start, self.stop - self.start)
        )


class _Fields(NamedTuple):
    """The same without the name: what stands for the object of a tensor, of which it takes a
    third.
    """

    start: int
    stop: int
    dtype: DType
    shape: tuple[int, ...]


def _told(fields: dict[str, object]) -> object:
    """What stands for an object of the header: the fields of a tensor, where it has these and no
    others.
    """
    return (_fields(fields) if len(fields) == 3 else None) or fields


def _fields(values: dict[str, object]) -> _Fields | None:
    code, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    dtype = _WRITABLE.get(code) if isinstance(code, str) else None
    if (
        dtype is None
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
    ):
        return None
    if not _are_sizes((*offsets, *shape)):
        return None
    start, stop = offsets
    return _Fields(start, stop, dtype, _shared(tuple(shape)))


@lru_cache(4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """*shape*, as one object for all tensors that have it."""
    return shape


def _line(path: Path, name: str, told: object) -> _Line:
    fields = _fields(told) if isinstance(told, dict) else told
    if not isinstance(fields, _Fields):
        raise Malformed(path, _fault(told), where=_tensor(name))
    start, stop, dtype, shape = fields
    _check_nbytes(path, name, dtype, shape, start, stop)
    return _Line(start, stop, name, dtype, shape)


def _are_sizes(values: Iterable[object]) -> bool:
    for value in values:  # noqa: SIM110 - `all` takes twice as long, and this runs for every tensor
        if type(value) is not int or not 0 <= value < _U64:
            return False
    return True


def _fault(fields: object) -> str:
    if not isinstance(fields, dict):
        return f"must have dtype, shape and data_offsets, found {shown(fields)}"
    for field in ("dtype", "shape", "data_offsets"):
        if field not in fields:
            return f"has no {field}"
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in _WRITABLE:
        return f"dtype {shown(dtype)} is not a type of the format: {', '.join(_WRITABLE)}"
    shape = fields["shape"]
    field, count = (
        ("data_offsets", "two")
        if isinstance(shape, list) and _are_sizes(shape)
        else ("shape", "a list of")
    )
    return (
        f"{field} must be {count} whole numbers from 0 to 2⁶⁴ - 1, found "
        f"{_shown_list(fields[field])}"
    )


def _check_nbytes(
    path: Path, name: str, dtype: DType, shape: Sequence[int], start: int, stop: int
) -> None:
    bits = dtype.bits
    for length in shape:
        bits *= length
        if bits >= _U64:
            raise Malformed(
                path,
                f"{dtype.code} {_shown_list(shape)} is larger than any memory",
                where=_tensor(name),
            )
    if stop < start:
        raise Malformed(
            path, f"its data ends at {stop:,}, before it starts at {start:,}", where=_tensor(name)
        )
    if bits % 8:
        message = (
            f"{dtype.code} {_shown_list(shape)} is {bits:,} bits, which is not a whole number of "
            f"bytes"
        )
        raise Malformed(path, message, where=_tensor(name))
    if bits // 8 != stop - start:
        message = (
            f"{dtype.code} {_shown_list(shape)} needs {several(bits // 8, 'byte')}, has "
            f"{stop - start:,}"
        )
        raise Malformed(path, message, where=_tensor(name))


def _check_cover(path: Path, lines: Sequence[_Line], data_nbytes: int) -> None:
    at = 0
    for line, before in zip(lines, (None, *lines), strict=False):
        if line.start != at:
            raise Malformed(path, _gap(line, before), where=_tensor(line.name))
        at = line.stop
    if at > data_nbytes:
        first = next(line for line in lines if line.stop > data_nbytes)
        need = f"the tensors need {several(at, 'byte')}, and {data_nbytes:,} are there"
        message = f"{need}; the first incomplete one is {shown(first.name)}"
        raise Malformed(path, message, hint=_FETCH)
    if at < data_nbytes:
        raise Malformed(
            path,
            f"after the last tensor, {several(data_nbytes - at, 'byte')} belonging to no tensor",
        )


def _gap(line: _Line, before: _Line | None) -> str:
    at = before.stop if before else 0
    if before is None or line.start > at:
        return (
            f"its data starts at {line.start:,}, after {several(line.start - at, 'byte')} "
            "belonging to no tensor"
        )
    return (
        f"its data [{line.start:,}, {line.stop:,}) overlaps that of tensor "
        f"{shown(before.name)}, which ends at {at:,}"
    )


def _tensor(name: str) -> str:
    return f"tensor {shown(name)}"


def _shown_list(value: object) -> str:
    if not isinstance(value, list | tuple) or len(value) > 8:
        return shown(value)
    return "[" + ", ".join(shown(item) for item in value) + "]"


def _check_names(entries: Sequence[TensorEntry]) -> None:
    names = {entry.name for entry in entries}
    if METADATA in names:
        hint = ("give it another name: ", renaming(f"^{METADATA}$", "metadata"))
        raise Unwritable(f"no tensor of a safetensors file can be called {METADATA}", hint=hint)
    if len(names) < len(entries):
        twice = next(
            name for name, count in Counter(entry.name for entry in entries).items() if count > 1
        )
        raise NameClash(
            f"two tensors would be called {shown(twice)}",
            hint=("give one another name with ", option("rename")),
        )


def _check_types(entries: Sequence[TensorEntry]) -> None:
    others = [entry for entry in entries if not entry.dtype.writable]
    if others:
        found = listed([f"{shown(entry.name)} ({entry.dtype.code})" for entry in others])
        hint = ("leave them out: ", excluding([entry.name for entry in others]))
        raise Unwritable(
            f"safetensors does not have the types of these tensors: {found}", hint=hint
        )


def _metadata_line(metadata: Mapping[str, str]) -> str:
    pairs = ",".join(f"{_quoted(key)}:{_quoted(value)}" for key, value in metadata.items())
    return f'"{METADATA}":{{{pairs}}}'


def _lines(entries: Sequence[TensorEntry]) -> Iterator[str]:
    stops = accumulate(entry.nbytes for entry in entries)
    for entry, stop in zip(entries, stops, strict=True):
        shape = ",".join(map(str, entry.shape))
        start = stop - entry.nbytes
        dtype = entry.dtype.code
        place = f'"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{stop}]'
        yield f"{_quoted(entry.name)}:{{{place}}}"


_LINE_ROOM = len(':{"dtype":"","shape":[],"data_offsets":[,]},') + 2 * _OFFSET_DIGITS


def _encoded(text: str, entries: Sequence[TensorEntry]) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        culprit = next((entry.name for entry in entries if _is_no_text(entry.name)), "the metadata")
        message = f"{shown(culprit)} contains an unpaired surrogate, which UTF-8 cannot encode"
        raise Unwritable(message, hint=("give it another name with ", option("rename"))) from None


def _is_no_text(name: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in name)
