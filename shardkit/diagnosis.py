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
        return "is a torch.package archive, which holds code beside weights", "load it where it belongs and save model.state_dict()"
    if "archive_format" in steps or {"data", "weights"} <= steps:
        return "is an archive of torch.export (.pt2)", "save the state_dict of the exported program: torch.save(program.state_dict, …)"
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


_LOOKALIKES = (
    _Lookalike(_PAGE.match, "is an HTML page, most likely an error or a login that was saved under this name", f"{_AGAIN}, with a token if the model is gated"),
    _Lookalike(lambda head: head.startswith(b"\x1f\x8b"), "is compressed with gzip", "run `gunzip` on it (and `tar -x` if it is a .tar.gz), and convert what comes out"),
    _Lookalike(lambda head: head.startswith(b"BZh"), "is compressed with bzip2", "run `bunzip2` on it, and convert what comes out"),
    _Lookalike(lambda head: head.startswith(b"\xfd7zXZ\0"), "is compressed with xz", "run `unxz` on it, and convert what comes out"),
    _Lookalike(lambda head: head.startswith(b"\x04\x22\x4d\x18"), "is compressed with lz4", "run `unlz4` on it, and convert what comes out"),
    _Lookalike(lambda head: head.startswith(b"7z\xbc\xaf\x27\x1c"), "is a 7-Zip archive", _UNPACK),
    _Lookalike(lambda head: head.startswith(b"Rar!"), "is a RAR archive", _UNPACK),
    _Lookalike(_is_old_torch_tar, "is a tar archive of torch before 0.1.10 (2017)", "load it with torch.load and save it again with torch.save"),
    _Lookalike(_is_tar, "is a tar archive", _UNPACK),
    _Lookalike(lambda head: head.startswith(b"GGUF"), "is a GGUF file, as llama.cpp uses", "take the model's original safetensors or .bin files"),
    _Lookalike(lambda head: head[:4] in (b"lmgg", b"fmgg", b"tjgg"), "is an old GGML file of llama.cpp", "take the model's original safetensors or .bin files"),
    _Lookalike(_CTRANSLATE2.match, "is a model of CTranslate2, which stores weights its own way", "take the model it was converted from"),
    _Lookalike(lambda head: head.startswith(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file, as Keras and h5py write", "load it there and save it with safetensors.numpy.save_file"),
    _Lookalike(lambda head: head.startswith(b"\x93NUMPY"), "is a NumPy array (.npy), which a plugin reads", _NPZ),
    _Lookalike(lambda head: head.startswith(b"|TZR|"), "is a file of tensorizer", "load it there and save it with safetensors.torch.save_file"),
    _Lookalike(lambda head: head[4:8] in (b"ET12", b"TFL3"), "is a program for mobile devices (ExecuTorch or TensorFlow Lite)", "take the model it was exported from"),
    _Lookalike(_is_onnx, "looks like an ONNX model (a protocol buffer)", "take the torch checkpoint it was exported from"),
    _Lookalike(_is_pickle, "is a Python pickle that torch.save did not write", "load it where it was made and save its tensors with torch.save"),
    _Lookalike(lambda head: b'"weight_map"' in head and _is_json(head), "is an index whose name does not end in .index.json", "give it back its name, as in model.safetensors.index.json"),
    _Lookalike(_is_json, "is a JSON text and holds no weights", "give the file or folder with the weights"),
    _Lookalike(lambda head: not head.strip(b"\0"), "begins with nothing but zeros, as a download that made room and never filled it", _AGAIN),
)


def _unknown(head: bytes) -> tuple[str, str]:
    if len(head) < 16:
        return f"has {len(head)} bytes, too few for any format", _AGAIN
    if _is_text(head):
        return f"is a text, beginning {shown(head[:40].decode('utf-8', 'replace'))}, and holds no weights", "give the file or folder with the weights"
    return f"is of no known format; it begins with {head[:8].hex(' ')}", "`shardkit formats` lists what can be read"
