"""What only files from before torch 1.6 can be: views of views, bytes behind the end, and lists of
storages that lie.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardkit.checkpoint.entries import Checkpoint
from shardkit.errors import Malformed
from shardkit.formats.torch_legacy import FORMAT
from shardkit.limits import Limits
from shardkit.sources.format import Source

MAGIC = 0x1950A86A20F9469CFC6C


class Pid:
    """Pickled as a persistent id."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts


class Rebuilt:
    """Pickled as a call of torch's oldest rebuild function."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return torch._utils._rebuild_tensor, self.args


class Pickler(pickle.Pickler):
    """Writes `Pid` as torch writes storages."""

    def persistent_id(self, obj: object) -> Any:  # Any: as pickle has it
        return obj.parts if isinstance(obj, Pid) else None


def legacy(
    value: object,
    keys: object,
    storages: bytes,
    *,
    magic: int = MAGIC,
    protocol: int = 1001,
    little: bool = True,
) -> bytes:
    """A file made by hand."""
    file = io.BytesIO()
    for part in (magic, protocol, {"little_endian": little}):
        pickle.dump(part, file, 2)
    Pickler(file, 2).dump(value)
    pickle.dump(keys, file, 2)
    return file.getvalue() + storages


def storage(*values: float) -> bytes:
    return struct.pack(f"<q{len(values)}f", len(values), *values)


def pid(key: str, count: int, view: object = None) -> Pid:
    return Pid("storage", torch.FloatStorage, key, "cpu", count, view)


def tensor(key: str, count: int, view: object = None) -> Rebuilt:
    length = view[2] if isinstance(view, tuple) else count
    return Rebuilt(pid(key, count, view), 0, (length,), (1,))


def scanned(content: bytes, folder: Path) -> Checkpoint:
    path = folder / "m.pth"
    path.write_bytes(content)
    source = Source.file(path, Limits())
    assert FORMAT.sniff(source)
    return FORMAT.scan(source)


def assert_same(found: Checkpoint, folder: Path) -> None:
    expected = torch.load(folder / "m.pth", weights_only=False)
    assert {e.name: bytes(e.read()) for e in found.tensors} == {
        name: t.contiguous().numpy().tobytes() for name, t in expected.items()
    }


GOOD = {
    "two": legacy(
        {"a": tensor("1", 2), "b": tensor("0", 3)}, ["0", "1"], storage(1, 2, 3) + storage(4, 5)
    ),
    "view of a storage": legacy(
        {"a": tensor("0", 4, ("9", 1, 2)), "b": tensor("0", 4)}, ["0"], storage(1, 2, 3, 4)
    ),
    "from a big-endian machine": legacy({"a": tensor("0", 2)}, ["0"], storage(1, 2), little=False),
    "bytes behind": legacy({"a": tensor("0", 2)}, ["0"], storage(1, 2) + b"more"),
    "a class with its source": legacy({"a": tensor("0", 2)}, ["0"], storage(1, 2)),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_torch_reads_is_read(name: str, tmp_path: Path) -> None:
    assert_same(scanned(GOOD[name], tmp_path), tmp_path)


def test_what_follows_the_checkpoint_is_said(tmp_path: Path) -> None:
    assert scanned(GOOD["bytes behind"], tmp_path).notes == (
        "4 B follow the checkpoint and were not read",
    )
    assert scanned(GOOD["two"], tmp_path).notes == ()


def test_a_class_saved_with_its_source_is_that_class(tmp_path: Path) -> None:
    content = legacy(
        {"a": tensor("0", 1), "c": Pid("module", torch.nn.Linear, "file.py", "class …")},
        ["0"],
        storage(1),
    )
    found = scanned(content, tmp_path)
    assert [(other.name, other.reason) for other in found.others] == [
        ("c", "torch.nn.modules.linear.Linear")
    ]


A = {"a": tensor("0", 2)}
BAD = {
    "magic": (
        legacy(A, ["0"], storage(1, 2)).replace(b"\x80\x02\x8a\x0a", b"\x80\x02C\x0a", 1),
        "needs the magic number",
    ),
    "protocol": (legacy(A, ["0"], storage(1, 2), protocol=1002), "begins with 1002"),
    "no list": (legacy(A, {"0": 1}, storage(1, 2)), "its list of storages is a Dict of 1"),
    "list of numbers": (legacy(A, [0], storage(1, 2)), "lists the storage 0,"),
    "unknown key": (
        legacy(A, ["0", "7"], storage(1, 2) * 2),
        "lists the storage '7', which no tensor",
    ),
    "key twice": (legacy(A, ["0", "0"], storage(1, 2) * 2), "lists the storage '0' twice"),
    "not in the list": (
        legacy(A, [], storage(1, 2)),
        "tensor 'a': its storage '0' is not in the list",
    ),
    "count differs": (
        legacy(A, ["0"], storage(1, 2, 3)),
        "it has 3 elements here, and 2 in the pickle",
    ),
    "cut": (legacy(A, ["0"], storage(1, 2))[:-1], "ends 1 B before it does: a truncated download"),
    "count absurd": (
        legacy({"a": tensor("0", 1 << 61)}, ["0"], storage(1)),
        "a truncated download",
    ),
    "count negative": (legacy({"a": tensor("0", -1)}, ["0"], storage(1)), "-1 elements"),
    "view outside": (
        legacy({"a": tensor("0", 2, ("9", 1, 2))}, ["0"], storage(1, 2)),
        "exceeds its 2 elements",
    ),
    "class unknown": (
        legacy(
            {"a": Rebuilt(Pid("storage", Path, "0", "cpu", 2, None), 0, (2,), (1,))}, ["0"], b""
        ),
        "pathlib.Path",
    ),
    "pid of nothing": (legacy({"a": Pid("x")}, ["0"], b""), "a tuple of 1 does not name a storage"),
    "shape of texts": (
        legacy({"a": Rebuilt(pid("0", 2), 0, ("2",), (1,))}, ["0"], storage(1, 2)),
        "not all whole numbers",
    ),
    "arguments missing": (
        legacy({"a": Rebuilt(pid("0", 2), 0)}, ["0"], storage(1, 2)),
        "_rebuild_tensor is called with",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_lies_is_refused_with_a_sentence(fault: str, tmp_path: Path) -> None:
    content, sentence = BAD[fault]
    with pytest.raises(Malformed, match=sentence) as caught:
        scanned(content, tmp_path)
    assert str(tmp_path / "m.pth") in str(caught.value)


def test_an_ordinary_pickle_is_not_claimed(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert not FORMAT.sniff(Source.file(path, Limits()))
