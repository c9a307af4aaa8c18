"""What a file is that no format recognises: the mistakes that people make most often, told by their content.

A table of lookalikes, tried in order. Each is a test of the first bytes, what such a file is, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from shardkit.errors import FormatError, UnknownFormat, shown
from shardkit.format import Source
from shardkit.sizes import format_size

_POINTER_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body|\?xml)", re.IGNORECASE)
_CTRANSLATE2 = re.compile(rb"[\x01-\x20]\0\0\0.\0[A-Z][A-Za-z0-9]{2,60}Spec\0", re.DOTALL)
_OLD_TORCH_TAR = (b"sys_info", b"pickle", b"tensors", b"storages")
_AGAIN = "fetch it again"
_UNPACK = "unpack it, and convert what is inside"
_NPZ = "pip install shardkit-npz"
_WEIGHTS = "give the file or folder with the weights"


@dataclass(frozen=True, slots=True)
class _Lookalike:
    matches: Callable[[bytes], object]
    what: str
    advice: str


def diagnosed(source: Source) -> UnknownFormat:
    """Why *source* is no checkpoint that can be read, as the error to raise."""
    if source.is_folder:
        return UnknownFormat(source.path, "is a folder that no format recognises")
    what, advice = _diagnosis(source)
    return UnknownFormat(source.path, what, hint=advice)


def _diagnosis(source: Source) -> tuple[str, str]:
    head = source.head
    if not head:
        return "is empty: it has no bytes", _AGAIN
    if head.startswith(b"version https://git-lfs"):
        return _pointer(head), "run `git lfs pull` in its repository, or download the file itself"
    if head.startswith(b"PK"):
        return _archive(source)
    for lookalike in _LOOKALIKES:
        if lookalike.matches(head):
            return lookalike.what, lookalike.advice
    return _unknown(head)


def _pointer(head: bytes) -> str:
    size = _POINTER_SIZE.search(head)
    stands_for = f" of {format_size(int(size[1]))}" if size else ""
    return f"is a git-lfs pointer: a line of text that stands for the real file{stands_for}"


def _archive(source: Source) -> tuple[str, str]:
    try:
        names = [member.name for member in source.members]
    except FormatError:
        return "begins like a zip archive, and is none", _AGAIN
    if names and all(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays (.npz), which a plugin reads", _NPZ
    steps = {step for name in names for step in name.split("/")}
    if "extern_modules" in steps:
        return "is a torch.package archive, which holds code beside weights", "load it there and save model.state_dict()"
    if "archive_format" in steps or {"data", "weights"} <= steps:
        return "is an archive of torch.export (.pt2)", "save what it was exported from: torch.save(program.state_dict, …)"
    listed = ", ".join(shown(name) for name in names[:3]) or "nothing"
    return f"is a zip archive of {len(names):,} files that torch did not write; it holds {listed}", _UNPACK


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _is_old_torch_tar(head: bytes) -> bool:
    named = head[:100].rstrip(b"\0").rpartition(b"/")[2] in _OLD_TORCH_TAR
    return (named or b"\0sys_info\0" in head) and (_is_tar(head) or head[100:108].strip(b"\0 ").isdigit())


def _is_onnx(head: bytes) -> bool:
    # ModelProto: field 1 (ir_version) is a small varint; then field 2 (producer_name), a text, or 7 (graph) or 8 (opset).
    return len(head) > 4 and head[0] == 0x08 and 0 < head[1] < 0x20 and head[2] in (0x12, 0x3A, 0x42)


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] in (b"{", b"[") and _is_text(head)


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-4].decode() if len(head) > 4 else head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if len(head) - error.start <= 8 else "\0"
    return bool(text) and all(character.isprintable() or character in "\t\r\n\f" for character in text)


def _begins(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _packed(name: str, command: str) -> tuple[str, str]:
    return f"is compressed with {name}", f"run `{command}` on it, and convert what comes out"


_RESAVE = "load it where it was made and save it with torch.save"
_MOBILE = "is a program for mobile devices (ExecuTorch or TensorFlow Lite)"
_LLAMA = "take the model's original safetensors or .bin files"
_ORIGIN = "take the torch checkpoint that it was made from"
_LOOKALIKES = (
    _Lookalike(
        _PAGE.match, "is an HTML page, as a download saves an error or a login", f"{_AGAIN}, with a token if it needs one"
    ),
    _Lookalike(_begins(b"\x1f\x8b"), *_packed("gzip", "gunzip")),
    _Lookalike(_begins(b"BZh"), *_packed("bzip2", "bunzip2")),
    _Lookalike(_begins(b"\xfd7zXZ\0"), *_packed("xz", "unxz")),
    _Lookalike(_begins(b"\x04\x22\x4d\x18"), *_packed("lz4", "unlz4")),
    _Lookalike(_begins(b"\x28\xb5\x2f\xfd"), *_packed("zstd more than once", "zstd -d")),  # once would have been seen through
    _Lookalike(_begins(b"7z\xbc\xaf\x27\x1c"), "is a 7-Zip archive", _UNPACK),
    _Lookalike(_begins(b"Rar!"), "is a RAR archive", _UNPACK),
    _Lookalike(_is_old_torch_tar, "is a tar archive of torch before 0.1.10", _RESAVE),
    _Lookalike(_is_tar, "is a tar archive", _UNPACK),
    _Lookalike(_begins(b"GGUF"), "is a GGUF file, as llama.cpp uses", _LLAMA),
    _Lookalike(_begins(b"lmgg", b"fmgg", b"tjgg"), "is an old GGML file of llama.cpp", _LLAMA),
    _Lookalike(_CTRANSLATE2.match, "is a model of CTranslate2, which keeps weights in a way of its own", _ORIGIN),
    _Lookalike(_begins(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file, as Keras writes", "load it there and save it as safetensors"),
    _Lookalike(_begins(b"\x93NUMPY"), "is a NumPy array (.npy), which a plugin reads", _NPZ),
    _Lookalike(_begins(b"|TZR|"), "is a file of tensorizer", "load it there and save it as safetensors"),
    _Lookalike(lambda head: head[4:8] in (b"ET12", b"TFL3"), _MOBILE, _ORIGIN),
    _Lookalike(_is_onnx, "looks like an ONNX model (a protocol buffer)", _ORIGIN),
    _Lookalike(_is_pickle, "is a Python pickle that torch.save did not write", _RESAVE),
    _Lookalike(_is_json, "is a JSON text and holds no weights", _WEIGHTS),
    _Lookalike(lambda head: not head.strip(b"\0"), "begins with nothing but zeros, as a download that was never filled", _AGAIN),
)


def _unknown(head: bytes) -> tuple[str, str]:
    if len(head) < 16:
        return f"has {len(head)} byte{'s' if len(head) > 1 else ''}, too few for any format", _AGAIN
    if _is_text(head):
        return f"is a text and holds no weights; it begins with {shown(head[:40].decode('utf-8', 'replace'))}", _WEIGHTS
    return f"is of no known format; it begins with {head[:8].hex(' ')}", "`shardkit formats` lists what can be read"
