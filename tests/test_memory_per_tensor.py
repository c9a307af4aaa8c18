"""Memory grows with the number of tensors, by little for each: the peaks of whole processes on two
checkpoints of many.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardkit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

FEW, MANY = 5_000, 25_000
INSPECT = (
    "list(shardkit.cli.output.inspect_text.portrait(pathlib.Path(sys.argv[1]), "
    "shardkit.open(sys.argv[1]), everything=False))"
)

PROGRAM = """
import pathlib, sys, shardkit
import shardkit.cli.output.inspect_text
{statement}
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for count in (FEW, MANY):
        state = {
            f"layers.{number}.weight": torch.full((4,), float(number)) for number in range(count)
        }
        torch.save(state, folder / f"{count}.bin")
        shardkit.convert(folder / f"{count}.bin", folder / f"{count}", sync=False)
    return folder


def peak(statement: str, folder: Path, count: int, out: Path) -> int:
    arguments = [str(folder / f"{count}.bin"), str(folder / f"{count}"), str(out / f"{count}")]
    command = [sys.executable, "-c", PROGRAM.format(statement=statement), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("statement", "most"),
    [
        ("shardkit.open(sys.argv[1])", 1000),
        # Of 160,000 these two take less than 1000: then what the C library keeps of freed blocks
        # counts for less.
        (INSPECT, 1200),
        ("shardkit.open(sys.argv[2])", 800),
        ("shardkit.verify(sys.argv[2], sys.argv[1])", 1200),
        # As much again is what the reference reader of safetensors takes, in a process of its own.
        ("shardkit.convert(sys.argv[1], sys.argv[3], sync=False)", 1000),
    ],
    ids=["open", "inspect", "open safetensors", "verify", "convert"],
)
def test_a_tensor_more_takes_little_memory_more(
    statement: str, most: int, folder: Path, tmp_path: Path
) -> None:
    few, many = (peak(statement, folder, count, tmp_path) for count in (FEW, MANY))
    assert (many - few) / (MANY - FEW) < most
