"""Every parser of a stranger's bytes: how a file is made around any bytes at all, and bytes that
are known to lead far into it.

The law of each is the same: what is made of any bytes is read, or refused with a sentence that may
be printed.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

import shardkit
from assembly import FOUR_FLOATS, safetensors, torch_zip
from shardkit.errors import ShardkitError
from shardkit.limits import Limits
from shardkit.metadata import manifest, offload_index

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
LONGEST_SEED = 8 << 10
READ_AT_MOST = 1 << 20
LONGEST_SENTENCE = 1000
LIMITS = Limits(pickle_ops=100_000, expanded_bytes=64 << 20)


@dataclass(frozen=True, slots=True)
class Parser:
    """One of our parsers.

    Attributes:
        seeds: bytes to begin with.
        read: reads what it makes of any bytes, in a folder of its own.
        is_json: whether the bytes are JSON, and are best changed as such.
    """

    seeds: Callable[[], Iterable[bytes]]
    read: Callable[[bytes, Path], None]
    is_json: bool = False


def check(parser: Parser, content: bytes, folder: Path) -> None:
    """Hold *parser* to the law."""
    try:
        parser.read(content, folder)
    except ShardkitError as error:
        sentence = f"{error} {error.hint or ''}"
        if not sentence.isprintable() or len(sentence) > LONGEST_SENTENCE + len(str(folder)):
            raise AssertionError(f"no sentence to print: {sentence!r}") from error


def _as(name: str, wrap: Callable[[bytes], bytes] = bytes) -> Callable[[bytes, Path], None]:
    """Reads a file of the format *name* that *wrap* makes, and the weights in it."""

    def read(content: bytes, folder: Path) -> None:
        path = folder / "model"
        path.write_bytes(wrap(content))
        _read(path, name)

    return read


def _read(path: Path, name: str | None = None) -> None:
    for entry in shardkit.open(path, format=name, limits=LIMITS, scratch=path.parent).tensors:
        if entry.nbytes <= READ_AT_MOST:
            entry.read()


def _compressed(content: bytes, folder: Path) -> None:
    """A file that is sought for frames, and for a table of them, whatever it holds then."""
    path = folder / "model.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + content)
    _read(path)


def _index(content: bytes, folder: Path) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    if not shard.exists():
        shard.write_bytes((FIXTURES / "good" / "safetensors-matrix.safetensors").read_bytes())
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content)
    _read(path)


def _manifest(content: bytes, folder: Path) -> None:
    manifest.parse(folder / manifest.MANIFEST_NAME, content, LIMITS)


def _record(content: bytes, folder: Path) -> None:
    offload_index.parse(folder / offload_index.OFFLOAD_NAME, content, LIMITS)


def _offloaded(content: bytes, folder: Path) -> None:
    """A folder that Accelerate wrote, with *content* for its index."""
    (folder / "weight.dat").write_bytes(FOUR_FLOATS)
    (folder / "index.json").write_bytes(content)
    _read(folder)


def _header(content: bytes) -> bytes:
    """A safetensors file with the header *content*, of whatever length it is."""
    return safetensors(content, FOUR_FLOATS, align=False)


def _fixtures(*prefixes: str) -> Iterator[bytes]:
    for path in sorted(
        path for folder in ("good", "hostile") for path in (FIXTURES / folder).iterdir()
    ):
        if (
            path.name.startswith(prefixes)
            and path.is_file()
            and path.stat().st_size <= LONGEST_SEED
        ):
            yield path.read_bytes()


def _pickles() -> Iterator[bytes]:
    """The pickles in small zip files, as far as they can be had."""
    for content in _fixtures("zip", "pickle", "tensor", "array"):
        with suppress(
            zipfile.BadZipFile,
            RuntimeError,
            NotImplementedError,
            ValueError,
            KeyError,
            OSError,
            EOFError,
            zlib.error,
        ):
            archive = zipfile.ZipFile(io.BytesIO(content))
            yield archive.read(
                next(name for name in archive.namelist() if name.endswith("data.pkl"))
            )
    yield from (
        pickle.dumps({"step": 7, "betas": (0.9, 0.999), "name": "a" * 300}, protocol)
        for protocol in range(6)
    )


def _headers() -> Iterator[bytes]:
    for content in _fixtures("safetensors"):
        length = int.from_bytes(content[:8], "little")
        yield content[8 : 8 + length]


def _indexes() -> Iterator[bytes]:
    for path in sorted(FIXTURES.glob("*/*/*.index.json")):
        yield path.read_bytes()[:LONGEST_SEED]


def _frames() -> Iterator[bytes]:
    """Streams without their first magic number: of one frame, and of frames with a table."""
    yield from (content[4:] for content in _fixtures("compressed"))
    yield from (
        _seekable(content, width)[4:]
        for content in _fixtures("safetensors-tied", "legacy-shared")
        for width in (8, 12)
    )


def _seekable(content: bytes, width: int) -> bytes:
    half = len(content) // 2
    pieces = [content[:half], content[half:]]
    frames = [zstandard.ZstdCompressor().compress(piece) for piece in pieces]
    lines = (
        struct.pack("<II", len(frame), len(piece)).ljust(width, b"\0")
        for frame, piece in zip(frames, pieces, strict=True)
    )
    table = b"".join(lines) + struct.pack("<IBI", len(frames), 0x80 if width > 8 else 0, 0x8F92EAB1)
    return b"".join(frames) + bytes.fromhex("5e2a4d18") + len(table).to_bytes(4, "little") + table


def _arrays() -> Iterator[bytes]:
    for save in (np.savez, np.savez_compressed):
        for arrays in (
            {"a": np.arange(4.0), "b": np.zeros((2, 0), ">i2")},
            {"c": np.asfortranarray(np.eye(2, dtype="c8"))},
        ):
            file = io.BytesIO()
            save(file, **arrays)
            yield file.getvalue()


def _manifests() -> Iterator[bytes]:
    runs = tuple(manifest.Run(name, at, at + 8) for at, name in ((64, "a"), (72, "b")))
    digests = manifest.Digests("00" * 16, {run.name: "11" * 16 for run in runs})
    yield manifest.dump(
        manifest.Manifest("sha256", (manifest.Listed("model.safetensors", 80, runs, digests),))
    )


def _records() -> Iterator[bytes]:
    block = {
        "name": "0",
        "shard": "m.safetensors",
        "start": 64,
        "stop": 80,
        "digest": "1f" * 16,
        "tensors": ["0.w", "0.b"],
    }
    shards = {"m.safetensors": {"nbytes": 80, "header": "2e" * 32}}
    said = {"name": "m.pt", "format": "torch-zip", "files": {"m.pt": 900}}
    document = {
        "version": 1,
        "source": said,
        "dtypes": {"F32": 16},
        "algorithm": "xxh3",
        "shards": shards,
        "blocks": [block],
    }
    yield json.dumps(document).encode()


def _offloads() -> Iterator[bytes]:
    yield json.dumps({"weight": {"dtype": "float32", "shape": [2, 2]}}).encode()


PARSERS: Mapping[str, Parser] = {
    "pickle": Parser(_pickles, _as("torch-zip", torch_zip)),
    "zip": Parser(
        lambda: _fixtures("zip", "document", "exported", "torch-package"), _as("torch-zip")
    ),
    "legacy": Parser(lambda: _fixtures("legacy", "plain-pickle"), _as("torch-legacy")),
    "safetensors": Parser(_headers, _as("safetensors", _header), is_json=True),
    "index": Parser(_indexes, _index, is_json=True),
    "manifest": Parser(_manifests, _manifest, is_json=True),
    "offload": Parser(_records, _record, is_json=True),
    "accelerate": Parser(_offloads, _offloaded, is_json=True),
    "torchscript": Parser(lambda: _fixtures("torchscript"), _as("torchscript")),
    "zstd": Parser(_frames, _compressed),
    "npz": Parser(_arrays, _as("npz")),
}
