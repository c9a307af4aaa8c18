"""The checkpoints that the benchmarks run on, made once and kept: ``python
benchmarks/checkpoints.py NAME FOLDER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from llama import NARROW, WIDE
from safetensors.torch import save_file


def save_zip(path: Path) -> None:
    """As torch saves today."""
    torch.save(WIDE.state(), path)


def save_legacy(path: Path) -> None:
    """As torch saved before 1.6."""
    torch.save(WIDE.state(), path, _use_new_zipfile_serialization=False)


def save_safetensors(path: Path) -> None:
    """As its own package saves."""
    save_file(WIDE.state(), path)


def save_fp32(path: Path) -> None:
    """Twice the bytes."""
    torch.save(WIDE.state(torch.float32), path)


def save_narrow(path: Path) -> None:
    """As many bytes as the first, in fp32."""
    torch.save(NARROW.state(), path)


def save_tiny(path: Path) -> None:
    """50,000 tensors of 64 bytes."""
    torch.save(
        {f"layers.{number}.weight": torch.full((16,), float(number)) for number in range(50_000)},
        path,
    )


def save_many(path: Path) -> None:
    """160,000 tensors of 64 bytes."""
    torch.save(
        {f"layers.{number}.weight": torch.full((16,), float(number)) for number in range(160_000)},
        path,
    )


def save_index(path: Path) -> None:
    """100,000 experts in 40 shards, and their index."""
    path.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(40):
        name = f"model-{shard + 1:05d}-of-00040.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.experts.{number}.weight": torch.zeros(4)
            for number in range(2500)
        }
        save_file(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1_600_000}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


SAVERS = {
    WIDE.plain: save_zip,
    NARROW.plain: save_narrow,
    "legacy.bin": save_legacy,
    "big.safetensors": save_safetensors,
    "big-fp32.bin": save_fp32,
    "tiny.pt": save_tiny,
    "many.bin": save_many,
    "experts": save_index,
}


if __name__ == "__main__":
    SAVERS[sys.argv[1]](Path(sys.argv[2]) / sys.argv[1])
