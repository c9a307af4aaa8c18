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

from shardkit.errors import UnknownFormat
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal
from shardkit.sources import registry
from shardkit.sources.foreign.diagnosis import diagnosed
from shardkit.sources.format import Source


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
    return (
        struct.pack("<IH", 6, len(spec) + 1)
        + spec.encode()
        + b"\0"
        + struct.pack("<II", 3, 100)
        + bytes(100)
    )


# flax.serialization.to_bytes({"params": {"Dense_0": {"kernel": jnp.ones((3, 4))}}}), but for the
# values
FLAX = (
    b"\x81\xa6params\x81\xa7Dense_0\x81\xa6kernel\xc7>\x01\x93\x92\x03\x04\xa7float32\xc40"
    + bytes(48)
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4370000000\n"
CASES: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "is empty", "download it again"),
    "a git-lfs pointer": (
        POINTER,
        "is a git-lfs pointer: a line of text that stands for the real file of 4.37 GB",
        "git lfs pull",
    ),
    "an HTML page": (b"\n<!DOCTYPE html><html>Sign in", "is an HTML page", "a token"),
    "an XML error": (
        b'<?xml version="1.0"?>\n<Error>AccessDenied',
        "is an XML error message of a storage server",
        "download it again, with a token",
    ),
    "the text of an OpenVINO model": (
        b'<?xml version="1.0"?>\n<net name="m" version="11">',
        "is the text of an OpenVINO model",
        "made from",
    ),
    "XML": (
        b'<?xml version="1.0" encoding="utf-8"?><a/>',
        "is XML text and holds no",
        "pass the file",
    ),
    "gzip": (
        gzip.compress(b"x" * 99),
        "is compressed with gzip",
        "run `gunzip model.bin`, and convert",
    ),
    "a tar archive in gzip": (
        gzip.compress(tarred(["a.txt", "b/model.pt"])),
        "is a tar archive compressed with gzip; it holds 'b/model.pt'",
        "unpack it: tar xf model.bin; then convert 'b/model.pt'",
    ),
    "a NeMo model": (
        tarred(["./model_config.yaml", "./model_weights.ckpt"]),
        "is a NeMo model (.nemo), a tar archive; it holds './model_weights.ckpt'",
        "unpack it: tar xf model.bin; then convert './model_weights.ckpt'",
    ),
    "a NeMo model in gzip": (
        gzip.compress(tarred(["model_config.yaml"])),
        "is a NeMo model (.nemo), a tar archive compressed with gzip",
        "tar xf model.bin",
    ),
    "bzip2": (b"BZh91AY&SY" + bytes(30), "is compressed with bzip2", "bunzip2"),
    "xz": (b"\xfd7zXZ\0" + bytes(30), "is compressed with xz", "unxz"),
    "zstd within zstd": (
        zstandard.compress(b"x" * 99),
        "is compressed with zstd more than once",
        "zstd -d",
    ),
    "a 7-Zip archive": (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is a 7-Zip archive", "7z x model.bin"),
    "a RAR archive": (b"Rar!\x1a\7\1\0" + bytes(30), "is a RAR archive", "unrar x model.bin"),
    "JSON": (
        json.dumps({"architectures": ["Llama"]}).encode(),
        "is JSON text and holds no weights",
        "pass the file",
    ),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file", "original"),
    "CTranslate2": (ctranslate2("TransformerSpec"), "is a model of CTranslate2", "made from"),
    "CTranslate2 of another kind": (
        ctranslate2("WhisperSpec"),
        "is a model of CTranslate2",
        "made from",
    ),
    "an ordinary zip archive": (
        zipped(["a.txt", "b/c.txt"]),
        "is a zip archive of 2 files that torch did not write",
        "unpack it",
    ),
    "an empty zip archive": (zipped([]), "is a zip archive of 0 files", "unpack it"),
    "a zip archive of one file": (
        zipped(["a"]),
        "is a zip archive of 1 file that torch",
        "unpack it",
    ),
    "a zip archive with a checkpoint in it": (
        zipped(["data", "policy.pth", "version"]),
        "it holds 'policy.pth'",
        "unpack it: unzip model.bin; then convert 'policy.pth'",
    ),
    "a model archive of TorchServe": (
        zipped(["MAR-INF/MANIFEST.json", "handler.py", "model.pt"]),
        "is a model archive of TorchServe (.mar); it holds 'model.pt'",
        "then convert 'model.pt'",
    ),
    "a Keras model": (
        zipped(["metadata.json", "config.json", "model.weights.h5"]),
        "is a Keras model (.keras)",
        "save_file",
    ),
    "an archive of torch.export": (
        zipped(["m/archive_format", "m/data/weights/weight_0"]),
        "torch.export (.pt2)",
        "torch.save",
    ),
    "a torch.package archive": (
        zipped(["m/.data/extern_modules", "m/a.py"]),
        "is a torch.package archive",
        "state_dict",
    ),
    "one that packs a data.pkl": (
        zipped(["m/.data/extern_modules", "m/m/data.pkl"]),
        "is a torch.package archive",
        "state_dict",
    ),
    "npz": (array("npz"), "is an archive of NumPy arrays (.npz)", "pip install shardkit-npz"),
    "npy": (array("npy"), "is a NumPy array (.npy)", "pip install shardkit-npz"),
    "a flatbuffer of PyTorch Mobile": (
        b"<\0\0\0PTMF" + bytes(60),
        "is a flatbuffer of PyTorch Mobile (.ptl)",
        "made from",
    ),
    "TensorFlow Lite": (
        b"\x1c\0\0\0TFL3" + bytes(60),
        "is a program for mobile devices",
        "made from",
    ),
    "MessagePack of Flax": (
        FLAX,
        "is a MessagePack file of Flax",
        "flax.serialization.msgpack_restore",
    ),
    "MessagePack of Flax with a large array": (
        b"\x81\xa6kernel\x83\xd9\x19__msgpack_chunked_array__\xc3",
        "is a MessagePack file of Flax",
        "save_file",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file", "safetensors"),
    "ONNX": (
        b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(60),
        "looks like an ONNX model",
        "made from",
    ),
    "ONNX of no producer": (
        b'\x08\x0e:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n',
        "looks like an ONNX model",
        "made from",
    ),
    "Core ML": (
        b"\x08\x04\x12\n\n\x03\n\x01xR\x03\n\x01y\xa2\x1f\xe1\x0f\n\xde\x0f\n\x01l" + bytes(60),
        "looks like a Core ML model (.mlmodel)",
        "made from",
    ),
    "a TensorFlow SavedModel": (
        b"\x08\x01\x12\x50\n\x4e" + bytes(78),
        "looks like a TensorFlow SavedModel",
        "load its folder with TensorFlow",
    ),
    "a frozen TensorFlow graph": (
        b"\n.\n\x01x\x12\x0bPlaceholder*\x0b\n\x05dtype\x12\x020\x01*\x0f\n\x05shape",
        "looks like a frozen TensorFlow graph (.pb)",
        "TensorFlow",
    ),
    "the index of a TensorFlow checkpoint": (
        bytes(range(1, 90)) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
        "is the index of a TensorFlow checkpoint",
        "tf.train.load_checkpoint",
    ),
    "weights for Paddle Inference": (
        bytes(16) + b"\x08\0\0\0\x08\x05\x10\x20\x10\x40" + bytes(60),
        "looks like weights for Paddle Inference",
        ".pdparams",
    ),
    "what torch.save leaves where it cannot pickle": (
        zipped(["m/version", "m/byteorder", "m/.data/serialization_id"]),
        "was left by a torch.save that failed",
        "save it again",
    ),
    "a tar archive": (tarred(["a.txt"]), "is a tar archive; it holds 'a.txt'", "tar xf model.bin"),
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
    "a pickle of protocol 4": (
        pickle.dumps([1.0] * 99, protocol=4),
        "is a Python pickle that",
        "torch.save",
    ),
    "a pickle of protocol 0": (
        pickle.dumps({"a": [1, 2]}, protocol=0),
        "is a Python pickle that torch.save did not write",
        "torch.save",
    ),
    "a pickle of NumPy arrays": (
        pickle.dumps({"a": np.ones(3)}, protocol=4),
        "is a Python pickle with NumPy arrays",
        "save_file",
    ),
    "a Paddle checkpoint": (
        pickle.dumps(
            {"w": ("linear_0.w_0", np.ones(3)), "StructuredToParameterName@@": {}}, protocol=4
        ),
        "is a Paddle checkpoint (.pdparams)",
        "paddle.load",
    ),
    "the metadata of a distributed checkpoint of Paddle": (
        b"\x80\x04\x95\0\0\0\0\0\0\0\0\x8c+paddle.distributed.flex_checkpoint.metadata\x94",
        "is the metadata of a distributed checkpoint of Paddle",
        "Paddle",
    ),
    "the metadata of a distributed checkpoint": (
        b"\x80\x04\x95#\x04\0\0\0\0\0\0\x8c%torch.distributed.checkpoint.metadata\x94\x8c\x08Metadata",
        "is the metadata of a checkpoint of torch.distributed.checkpoint, and holds no weights",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch . out.pt",
    ),
    "an archive of GPT-SoVITS that is cut off": (
        b"03\3\4" + bytes(60),
        "whose first two bytes GPT-SoVITS has replaced, and is cut off",
        "download it again",
    ),
    "a text": (
        "Größe: 3 — nothing here\n".encode() * 300,
        "is text and holds no weights; it begins with 'Größe",
        "pass the file",
    ),
    "zeros only": (bytes(5000), "begins with zeros only", "download it again"),
    "few bytes": (b"\x01\x02\xff", "has 3 bytes, too few", "download it again"),
    "something else": (
        bytes(range(200, 256)) * 3,
        "has no known format; it begins with c8 c9 ca cb cc cd ce cf",
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
def test_no_format_of_ours_claims_it(
    content: bytes, sentence: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            assert diagnosed(
                Source(Path("x"), Literal(bytes([first]) + rest), limits=Limits())
            ).hint
