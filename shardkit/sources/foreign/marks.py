"""Tests of a file's first and last bytes for forms that no format reads; at most 64 KiB are
expanded, and nothing is run.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

from shardkit.sources.format import Source

Test = Callable[[Source], object]

LFS_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched
_EXPANDED = 64 << 10
_DEEPEST = 32  # maps within each other before the first value
_OLD_TORCH_TAR = (b"sys_info", b"pickle", b"tensors", b"storages")
# By the first byte of an extension in MessagePack: how many bytes lie before its type.
_BEFORE_TYPE = {0xC7: 2, 0xC8: 3, 0xC9: 5, **dict.fromkeys(range(0xD4, 0xD9), 1)}


def begins(*magics: bytes) -> Test:
    """Whether the file begins with one of *magics*."""
    return lambda source: source.head.startswith(magics)


def begins_like(pattern: bytes) -> Test:
    """Whether a regular expression matches at the beginning; case does not matter, and a dot is any
    byte.
    """
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    return lambda source: compiled.match(source.head)


def has_at_four(*magics: bytes) -> Test:
    """Whether one of *magics* stands at byte 4, as the identifier of a flatbuffer does."""
    return lambda source: source.head[4:8] in magics


def is_text(head: bytes) -> bool:
    """Whether *head* begins a readable text."""
    try:
        text = head[:-4].decode() if len(head) > 4 else head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if len(head) - error.start <= 8 else "\0"
    return bool(text) and all(each.isprintable() or each in "\t\r\n\f" for each in text)


def is_json(source: Source) -> bool:
    """Whether it is a text that begins like a JSON document."""
    return source.head.lstrip()[:1] in (b"{", b"[") and is_text(source.head)


def is_blank(source: Source) -> bool:
    """Whether it begins with nothing but zeros."""
    return not source.head.strip(b"\0")


def is_tar(head: bytes) -> bool:
    """Whether *head* begins a tar archive."""
    return head[257:262] == b"ustar"


def is_old_torch_tar(source: Source) -> bool:
    """Whether it is what torch.save wrote before torch 0.1.10."""
    head = source.head
    named = head[:100].rstrip(b"\0").rpartition(b"/")[2] in _OLD_TORCH_TAR
    return (named or b"\0sys_info\0" in head) and (
        is_tar(head) or head[100:108].strip(b"\0 ").isdigit()
    )


def gunzipped(head: bytes) -> bytes:
    """The beginning of what *head* expands to; empty if it is no gzip."""
    if not head.startswith(b"\x1f\x8b"):
        return b""
    try:
        return zlib.decompressobj(31).decompress(head, _EXPANDED)
    except zlib.error:
        return b""


def is_gzip(source: Source) -> bool:
    """Whether it is compressed with gzip, and no tar archive."""
    return source.head.startswith(b"\x1f\x8b") and not is_tar(gunzipped(source.head))


def is_table(source: Source) -> bool:
    """Whether it ends like a table of LevelDB, as the index of a TensorFlow checkpoint does."""
    return source.tail[-8:] == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def is_paddle_inference(source: Source) -> bool:
    """Whether it begins with a tensor as Paddle streams it: two versions and the LoD level, all 0,
    then a protobuf.
    """
    head = source.head
    described = int.from_bytes(head[16:20], "little")
    return not any(head[:16]) and 0 < described < 100 and head[20:21] == b"\x08"


def is_onnx(source: Source) -> bool:
    """Whether it begins like a ModelProto: ir_version, then producer_name, graph or opset_import
    (fields 2, 7 and 8).
    """
    head = source.head
    return (
        len(head) > 4 and head[0] == 0x08 and 0 < head[1] < 0x20 and head[2] in (0x12, 0x3A, 0x42)
    )


def is_saved_model(source: Source) -> bool:
    """Whether field 2 is a message and takes all of the file, as the graph of a TensorFlow
    SavedModel does.
    """
    version, start, nbytes = _second_field(source.head)
    return (
        version == 1 and source.head[start : start + 1] == b"\x0a" and start + nbytes >= source.size
    )


def is_core_ml(source: Source) -> bool:
    """Whether field 2 is a message that begins with an input or output: the description of a Core
    ML model.
    """
    version, start, _ = _second_field(source.head)
    return bool(version) and source.head[start : start + 1] in (b"\x0a", b"\x52")


def _second_field(head: bytes) -> tuple[int, int, int]:
    """Of a protobuf whose field 1 is a small version and field 2 has a length: the version, and
    start and length; or zeros.
    """
    if len(head) < 9 or head[0] != 0x08 or not 0 < head[1] < 0x80 or head[2] != 0x12:
        return 0, 0, 0
    nbytes = 0
    for at in range(3, 8):
        nbytes |= (head[at] & 0x7F) << 7 * (at - 3)
        if head[at] < 0x80:
            return head[1], at + 1, nbytes
    return 0, 0, 0


def is_flax(source: Source) -> bool:
    """Whether it is a MessagePack map whose first leaf is an array as Flax packs it: an extension
    of type 1 to 3.

    An array of more than a gigabyte is a map with a key of its own.
    """
    head, at = source.head, 0
    for _ in range(_DEEPEST):
        found = _first_key(head, at)
        if found is None:
            return False
        key, at = found
        if key == b"__msgpack_chunked_array__":
            return True
        before = _BEFORE_TYPE.get(head[at]) if at < len(head) else None
        if before is not None:
            return head[at + before : at + before + 1] in (b"\1", b"\2", b"\3")
    return False


def _first_key(head: bytes, at: int) -> tuple[bytes, int] | None:
    """The first key of the MessagePack map at byte *at*, and where its value begins; None if there
    is no such thing.
    """
    code = head[at] if at < len(head) else 0
    if not (0x81 <= code <= 0x8F or code in (0xDE, 0xDF)):
        return None
    at += {0xDE: 3, 0xDF: 5}.get(code, 1)
    code = head[at] if at < len(head) else 0
    if 0xA1 <= code <= 0xBF:
        length, at = code & 0x1F, at + 1
    elif code == 0xD9 and at + 1 < len(head):
        length, at = head[at + 1], at + 2
    else:
        return None
    key = head[at : at + length]
    return (key, at + length) if len(key) == length and is_text(key + b"    ") else None
