"""The header of a .npy file: bytes ↔ what it says, without any I/O.

Six bytes of magic, two of version, the length of the header (2 bytes in version 1, else 4), and a
Python dictionary of three keys, padded with spaces so that the data is aligned to 64
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardkit.plugin import (
    BY_CODE,
    DType,
    Malformed,
    OtherKind,
    TensorEntry,
    Unwritable,
    option,
    shown,
)
from shardkit_npz.literals import Literal, parse_dict

MAGIC = b"\x93NUMPY"
SUFFIX = ".npy"

_LONGEST = 1 << 20
_MOST_AXES = 32  # numpy 1 knows no more
_ELSEWHERE = ("leave it out with ", option("exclude"), ", or write .safetensors")
_ALIGNMENT = 64
_FIXED = {1: 10, 2: 12, 3: 12}  # magic, version and length
_DESCRS = {
    "b1": "BOOL",
    "i1": "I8",
    "u1": "U8",
    "i2": "I16",
    "u2": "U16",
    "i4": "I32",
    "u4": "U32",
    "i8": "I64",
    "u8": "U64",
}
_DESCRS |= {"f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128"}
_DTYPES = {descr: BY_CODE[code] for descr, code in _DESCRS.items()}
_DESCR_OF = {dtype: descr for descr, dtype in _DTYPES.items()}

Peek = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A type of numpy that no tensor has: what it is, and why."""

    kind: OtherKind
    reason: str


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says.

    Attributes:
        nbytes: bytes before the data.
        dtype: type of the elements.
        shape: lengths of the axes.
        is_fortran: whether the first axis varies fastest.
        is_big_endian: whether words have their most significant byte first.
    """

    nbytes: int
    dtype: DType | Foreign
    shape: tuple[int, ...]
    is_fortran: bool
    is_big_endian: bool


def parse(path: Path, where: str, peek: Peek) -> Header:
    """The header of the array *where* in the file *path*; *peek* gives so many of its first bytes,
    or fewer if there are no more.

    Raises:
        Malformed: it breaks a rule of the format.
    """
    start = peek(12)
    if start[:6] != MAGIC:
        raise Malformed(
            path, f"must begin with {shown(MAGIC)}, found {shown(start[:6])}", where=where
        )
    fixed = _FIXED.get(start[6] if len(start) == 12 else 0)
    if fixed is None:
        message = (
            f"is of version {start[6]}, and 1 to 3 are known"
            if len(start) == 12
            else "ends within the header"
        )
        raise Malformed(path, message, where=where)
    nbytes = fixed + int.from_bytes(start[8:fixed], "little")
    if nbytes > _LONGEST:
        raise Malformed(
            path,
            f"the header takes {nbytes:,} bytes, and no array needs more than {_LONGEST:,}",
            where=where,
        )
    content = peek(nbytes)
    if len(content) < nbytes:
        raise Malformed(
            path,
            f"the header takes {nbytes:,} bytes, and the file ends after {len(content):,}",
            where=where,
        )
    try:
        fields = parse_dict(content[fixed:].decode("utf-8" if start[6] == 3 else "latin-1"))
        return _header(nbytes, fields)
    except ValueError as error:  # UnicodeDecodeError is one
        raise Malformed(path, f"broken header: {error}", where=where) from None


def dump(entry: TensorEntry) -> bytes:
    """The header of a file that holds *entry*.

    Raises:
        Unwritable: numpy has no such type, or not so many axes.
    """
    descr = _DESCR_OF.get(entry.dtype)
    if descr is None:
        hint = (
            ("cast it, as in ", option("dtype", "fp32"))
            if entry.dtype.kind == "float"
            else _ELSEWHERE
        )
        raise Unwritable(
            f"tensor {shown(entry.name)} is {entry.dtype.code}, and numpy has no such type",
            hint=hint,
        )
    if len(entry.shape) > _MOST_AXES:
        message = (
            f"tensor {shown(entry.name)} has {len(entry.shape)} axes, and numpy knows "
            f"{_MOST_AXES} at most"
        )
        raise Unwritable(message, hint=_ELSEWHERE)
    order = "|" if entry.dtype.itemsize == 1 else "<"
    text = (
        f"{{'descr': '{order}{descr}', 'fortran_order': False, 'shape': {entry.shape}, }}".encode()
    )
    text += b" " * (-(_FIXED[1] + len(text) + 1) % _ALIGNMENT) + b"\n"
    return MAGIC + b"\1\0" + len(text).to_bytes(2, "little") + text


def _header(nbytes: int, fields: dict[str, Literal]) -> Header:
    match fields:
        case {"descr": descr, "fortran_order": bool(is_fortran), "shape": list(shape)} if (
            len(fields) == 3
        ):
            lengths = tuple(_length(length) for length in shape)
            return Header(
                nbytes,
                _dtype(descr),
                lengths,
                is_fortran,
                isinstance(descr, str) and descr.startswith(">"),
            )
    raise ValueError(
        "it must say descr, fortran_order and shape, found "
        f"{', '.join(map(shown, fields)) or 'nothing'}"
    )


def _length(length: Literal) -> int:
    if type(length) is not int or length < 0:
        raise ValueError(f"the shape holds {shown(length)}, which is not a length")
    return length


def _dtype(descr: Literal) -> DType | Foreign:
    """The type that *descr* says; see numpy's "array interface" for the letters."""
    if isinstance(descr, list):
        return Foreign(OtherKind.UNKNOWN_TENSOR, "structured array: records of several fields")
    if not isinstance(descr, str) or len(descr) < 2 or descr[0] not in "<>|=":
        raise ValueError(f"descr is {shown(descr)}, which is not a NumPy type")
    return _DTYPES.get(descr[1:]) or _foreign(descr)


def _foreign(descr: str) -> Foreign:
    match descr[1]:
        case "O":
            return Foreign(OtherKind.OBJECT, "object array: a Python pickle, which is never run")
        case "U" | "S" | "a":
            return Foreign(OtherKind.OBJECT, "array of texts")
        case "M" | "m":
            return Foreign(OtherKind.OBJECT, "array of dates or times")
        case "V":
            return Foreign(
                OtherKind.UNKNOWN_TENSOR,
                (
                    f"untyped elements of {shown(descr[2:])} bytes (so ml_dtypes leaves bfloat16 "
                    "and "
                    "fp8)"
                ),
            )
    return Foreign(OtherKind.UNKNOWN_TENSOR, f"numpy type {shown(descr)}")
