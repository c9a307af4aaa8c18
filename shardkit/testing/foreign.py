"""Contents that are not checkpoints, each with its name: no format of weights may claim them."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterator

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4370000000\n"
)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\6\0\0\0\x1f\x15\xc4\x89"


def contents() -> Iterator[tuple[str, bytes]]:
    """Yield names and contents."""
    yield "an empty file", b""
    yield "one byte", b"\0"
    yield "zeros", bytes(8192)
    yield "ones", b"\xff" * 8192
    yield "spaces", b" " * 512
    yield "text", b"The quick brown fox jumps over the lazy dog.\n" * 9
    yield (
        "an HTML page",
        b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n",
    )
    yield "a git-lfs pointer", LFS_POINTER
    yield "a JSON document", b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}\n'
    yield "a PNG image", PNG
    yield "a PDF", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"
    yield "a Linux program", b"\x7fELF\2\1\1" + bytes(57)
    yield "a gzip of zeros", gzip.compress(bytes(64), mtime=0)
    yield "a pickle of numbers, protocol 2", b"\x80\x02]q\x00(K\x01K\x02K\x03e."
    yield (
        "a pickle of numbers, protocol 4",
        b"\x80\x04\x95\x0b\0\0\0\0\0\0\0]\x94(K\x01K\x02K\x03e.",
    )
    yield "the first bytes of a zip archive", b"PK\3\4" + bytes(26)
    yield "a zip archive without members", _zip({})
    yield "a zip archive with a text", _zip({"readme.txt": b"hello"})
    yield (
        "a zip archive like a wheel",
        _zip({"package/__init__.py": b"", "package-1.dist-info/METADATA": b"Name: package\n"}),
    )


def _zip(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, held in members.items():
            archive.writestr(zipfile.ZipInfo(name), held)
    return content.getvalue()
