"""What a file is that is no checkpoint, and what to do about it."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from shardkit import registry
from shardkit.diagnosis import diagnosed
from shardkit.errors import UnknownFormat
from shardkit.format import Source
from shardkit.limits import Limits
from shardkit.payload import Literal


def zipped(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def tarred(names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def array(name: str) -> bytes:
    file = io.BytesIO()
    if name == "npz":
        np.savez(file, a=np.zeros(3))
    else:
        np.save(file, np.zeros(3))
    return file.getvalue()


def ctranslate2(spec: str) -> bytes:
    return struct.pack("<IH", 6, len(spec) + 1) + spec.encode() + b"\0" + struct.pack("<II", 3, 100) + bytes(100)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4370000000\n"
CASES: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "is empty", "fetch it again"),
    "a git-lfs pointer": (
        POINTER,
        "is a git-lfs pointer: a line of text that stands for the real file of 4.37 GB",
        "git lfs pull",
    ),
    "an HTML page": (b"\n<!DOCTYPE html><html>Sign in", "is an HTML page", "a token"),
    "an XML error": (b'<?xml version="1.0"?><Error>AccessDenied', "is an HTML page", "fetch it again"),
    "gzip": (gzip.compress(b"x" * 99), "is compressed with gzip", "gunzip"),
    "bzip2": (b"BZh91AY&SY" + bytes(30), "is compressed with bzip2", "bunzip2"),
    "xz": (b"\xfd7zXZ\0" + bytes(30), "is compressed with xz", "unxz"),
    "zstd within zstd": (zstandard.compress(b"x" * 99), "is compressed with zstd more than once", "zstd -d"),
    "a 7-Zip archive": (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is a 7-Zip archive", "unpack it"),
    "JSON": (json.dumps({"architectures": ["Llama"]}).encode(), "is a JSON text and holds no weights", "give the file"),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file", "original"),
    "CTranslate2": (ctranslate2("TransformerSpec"), "is a model of CTranslate2", "made from"),
    "CTranslate2 of another kind": (ctranslate2("WhisperSpec"), "is a model of CTranslate2", "made from"),
    "an ordinary zip archive": (
        zipped(["a.txt", "b/c.txt"]),
        "is a zip archive of 2 files that torch did not write",
        "unpack it",
    ),
    "an empty zip archive": (zipped([]), "is a zip archive of 0 files", "unpack it"),
    "an archive of torch.export": (zipped(["m/archive_format", "m/data/weights/weight_0"]), "torch.export (.pt2)", "torch.save"),
    "a torch.package archive": (zipped(["m/.data/extern_modules", "m/a.py"]), "is a torch.package archive", "state_dict"),
    "one that packs a data.pkl": (zipped(["m/.data/extern_modules", "m/m/data.pkl"]), "is a torch.package archive", "state_dict"),
    "npz": (array("npz"), "is an archive of NumPy arrays (.npz)", "pip install shardkit-npz"),
    "npy": (array("npy"), "is a NumPy array (.npy)", "pip install shardkit-npz"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file", "safetensors"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(60), "looks like an ONNX model", "made from"),
    "a tar archive": (tarred(["a.txt"]), "is a tar archive", "unpack it"),
    "a tar archive of the oldest torch": (
        tarred(["sys_info", "pickle", "tensors", "storages"]),
        "torch before 0.1.10",
        "torch.save",
    ),
    "a pickle": (
        pickle.dumps({"a": list(range(99))}, protocol=2),
        "is a Python pickle that torch.save did not write",
        "torch.save",
    ),
    "a pickle of protocol 4": (pickle.dumps([1.0] * 99, protocol=4), "is a Python pickle that", "torch.save"),
    "a text": (
        "Größe: 3 — nothing here\n".encode() * 300,
        "is a text and holds no weights; it begins with 'Größe",
        "give the file",
    ),
    "nothing but zeros": (bytes(5000), "begins with nothing but zeros", "fetch it again"),
    "few bytes": (b"\x01\x02\xff", "has 3 bytes, too few", "fetch it again"),
    "something else": (
        bytes(range(200, 256)) * 3,
        "is of no known format; it begins with c8 c9 ca cb cc cd ce cf",
        "shardkit formats",
    ),
}


@pytest.mark.parametrize(("content", "sentence", "advice"), CASES.values(), ids=CASES)
def test_a_file_that_is_no_checkpoint_is_named(content: bytes, sentence: str, advice: str) -> None:
    error = diagnosed(Source(Path("model.bin"), Literal(content), limits=Limits()))
    assert str(error).startswith("model.bin: ")
    assert sentence in str(error)
    assert error.hint is not None
    assert advice in error.hint


@pytest.mark.parametrize(("content", "sentence", "advice"), CASES.values(), ids=CASES)
def test_no_format_of_ours_claims_it(content: bytes, sentence: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert advice
    own = tuple(each for each in registry.formats() if each.is_own)
    monkeypatch.setattr(registry, "formats", lambda: own)  # a plugin may well claim one
    with pytest.raises(UnknownFormat) as caught:
        registry.recognise(Source(Path("model.bin"), Literal(content), limits=Limits()))
    assert sentence in str(caught.value)
    assert not caught.value.claimed


def test_every_first_byte_gives_a_sentence() -> None:
    for first in range(256):
        for rest in (b"", b"\0", b"\x08\x12:B{<PK", bytes(4096), b"a" * 300):
            assert diagnosed(Source(Path("x"), Literal(bytes([first]) + rest), limits=Limits())).hint
