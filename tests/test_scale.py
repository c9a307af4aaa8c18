"""Size is shown and not feared: 200 GB of holes on the disk are looked at and planned in the memory
of a small file.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import shardkit
from shardkit.errors import LimitExceeded
from shardkit.limits import Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

BOUND = 200_000_000
COUNT = 200
NBYTES = 1 << 30  # of each tensor; 215 GB in all

PROGRAM = """
import sys
from shardkit.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(code, int(status.split("VmHWM:")[1].split()[0]) * 1024, file=sys.stderr)
"""


def sparse_safetensors(path: Path) -> None:
    header = {
        f"layers.{n}.weight": {
            "dtype": "BF16",
            "shape": [NBYTES // 2],
            "data_offsets": [n * NBYTES, (n + 1) * NBYTES],
        }
        for n in range(COUNT)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + COUNT * NBYTES)


def sparse_zip(path: Path) -> None:
    """As torch.save writes it, with zip64 records, no CRCs and holes for the weights."""
    directory: list[bytes] = []
    with open(path, "wb") as file:
        for name, content in [
            ("data.pkl", pickled()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ]:
            directory.append(member(file, name, len(content)))
            file.write(content)
        for number in range(COUNT):
            directory.append(member(file, f"data/{number}", NBYTES))
            file.seek(NBYTES, io.SEEK_CUR)
        start = file.tell()
        file.write(b"".join(directory))
        end = file.tell()
        nbytes = end - start
        file.write(
            struct.pack(
                "<4sQHHIIQQQQ",
                b"PK\6\6",
                44,
                45,
                45,
                0,
                0,
                len(directory),
                len(directory),
                nbytes,
                start,
            )
        )
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(
            struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        )


def member(file: io.BufferedWriter, name: str, nbytes: int) -> bytes:
    """Write the local header of a member, and give its entry in the directory."""
    at, title = file.tell(), f"sparse/{name}".encode()
    file.write(struct.pack("<4s2xHH8xIIHH", b"PK\3\4", 0, 0, 0, 0, len(title), 0) + title)
    wide = struct.pack("<HHQQQ", 1, 24, nbytes, nbytes, at)
    sizes = (0xFFFFFFFF, 0xFFFFFFFF, len(title), len(wide), 0)
    return struct.pack("<4s4xHH4xIIIHHH8xI", b"PK\1\2", 0, 0, 0, *sizes, 0xFFFFFFFF) + title + wide


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return (
            ("storage", torch.BFloat16Storage, str(obj.number), "cpu", NBYTES // 2)
            if isinstance(obj, _Storage)
            else None
        )


def _rebuilt(tensor: _Tensor) -> tuple[Callable[..., object], tuple[object, ...]]:
    arguments = (
        _Storage(tensor.number),
        0,
        (NBYTES // 2,),
        (1,),
        False,
        OrderedDict[str, object](),
    )
    return torch._utils._rebuild_tensor_v2, arguments


@dataclass(frozen=True)
class _Storage:
    number: int


@dataclass(frozen=True)
class _Tensor:
    number: int


def pickled() -> bytes:
    stream = io.BytesIO()
    pickler = _Pickler(stream, 2)
    pickler.dispatch_table = {_Tensor: _rebuilt}
    pickler.dump({f"layers.{number}.weight": _Tensor(number) for number in range(COUNT)})
    return stream.getvalue()


def run(*arguments: object) -> tuple[int, int, str]:
    """Exit code, peak memory and stdout of a command line in its own process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True
    )
    code, peak = done.stderr.split()[-2:]
    return int(code), int(peak), done.stdout


@pytest.mark.timeout(120)  # to read them would take longer
@pytest.mark.parametrize("make", [sparse_safetensors, sparse_zip], ids=["safetensors", "zip"])
def test_200_gb_are_inspected_planned_and_placed_in_little_memory(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "sparse"
    make(path)
    assert path.stat().st_size > 200_000_000_000
    assert path.stat().st_blocks * 512 < 10_000_000, "the weights are holes"
    code, peak, said = run("inspect", path)
    assert (code, peak < BOUND) == (0, True), peak
    assert "200" in said
    # The disk is too small for it, which is said after the plan.
    code, peak, said = run(
        "convert", path, "-o", tmp_path / "out", "--max-shard", "2GB", "--dry-run"
    )
    assert peak < BOUND, peak
    assert "200 shards, 200 tensors, 215 GB" in said
    assert not (tmp_path / "out").exists()
    code, peak, said = run("place", path, "--max-memory", "0=80GB,cpu=100GB", "--dtype", "fp16")
    assert (code, peak < BOUND) == (0, True), peak
    assert re.search(r"^  disk .* 3\d blocks", said, re.MULTILINE), said


def test_more_tensors_than_the_limit_are_refused_with_a_sentence_that_names_it(
    tmp_path: Path,
) -> None:
    header = ",".join(
        f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(1001)
    )
    text = f"{{{header}}}".encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert len(shardkit.open(path)) == 1001
    with pytest.raises(LimitExceeded, match="1,001 tensors") as caught:
        shardkit.open(path, limits=Limits(tensors=1000))
    assert caught.value.limit == "tensors"
    assert "limits=Limits(tensors=1001)" in str(caught.value.hint)
    assert Limits().tensors == 1_000_000
