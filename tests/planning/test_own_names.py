"""Weights keep the name by which their library finds them, and it loads what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import shardkit
from shardkit.metadata.shard_names import stem_of


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_peft_loads_an_adapter_that_was_converted(safe: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    adapted = get_peft_model(model(), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    if not safe:
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    shardkit.convert(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(model(), str(tmp_path / "out"))
    probe = torch.ones(1, 8)
    assert torch.equal(loaded(probe), adapted(probe))
    shardkit.convert(tmp_path / "adapter", tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("stem", ["adapter_model", "diffusion_pytorch_model"])
def test_shards_keep_the_name_and_are_read_again(stem: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    state = {f"layers.{number}": torch.full((64, 64), float(number)) for number in range(3)}
    save_file(state, tmp_path / "source" / f"{stem}.safetensors")
    shardkit.convert(tmp_path / "source", tmp_path / "out", max_shard="20KB")
    assert (tmp_path / "out" / f"{stem}.safetensors.index.json").is_file()
    assert shardkit.verify(tmp_path / "out", tmp_path / "source").same
    shardkit.convert(tmp_path / "out", tmp_path / "again", max_shard=None)
    assert shardkit.verify(tmp_path / "again" / f"{stem}.safetensors", tmp_path / "source").same


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["pytorch_model.bin"], "model"),
        (["adapter_model.bin", "model.safetensors"], "model"),
        (["adapter_model.fp16.safetensors"], "adapter_model"),
        (["adapter_model_2.safetensors"], "model"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors.zst"], "diffusion_pytorch_model"),
        ([], "model"),
    ],
)
def test_only_files_that_are_all_called_so_keep_their_name(names: list[str], stem: str) -> None:
    assert stem_of(names) == stem
