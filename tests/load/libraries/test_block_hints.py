"""What a model knows about its blocks: its class, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardkit
from libraries import peer
from shardkit.errors import LoadError
from shardkit.load import no_split_pattern, recorded_order

transformers = peer("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_local_experts": 3,
}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def saved(folder: Path, kind: str) -> Path:
    config = getattr(
        transformers, kind.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Config"
    )(**SMALL)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def blocks_of(folder: Path) -> list[str]:
    record = json.loads((folder / "offload.json").read_text())
    return list(dict.fromkeys(block["name"] for block in record["blocks"]))


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"])
def test_the_class_says_what_the_names_say(tmp_path: Path, kind: str) -> None:
    source = saved(tmp_path / "model", kind)
    shardkit.offload_prep(source, tmp_path / "by-names")
    report = shardkit.offload_prep(source, tmp_path / "by-class", blocks=no_split_pattern(source))
    assert blocks_of(tmp_path / "by-class") == blocks_of(tmp_path / "by-names")
    assert not any("pattern" in note for note in report.notes)


def test_the_class_of_a_model_of_diffusers_says_it_as_well(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers", reason="its class is asked here")
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    diffusers.UNet2DConditionModel(
        down_block_types=down, up_block_types=up, **sizes
    ).save_pretrained(tmp_path / "model")
    pattern = no_split_pattern(tmp_path / "model")
    assert pattern.search("down_blocks.1.resnets.0")
    assert not pattern.search("down_blocks.1")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LoadError, match="a pipeline of several models"):
        no_split_pattern(tmp_path)


def test_a_folder_that_names_no_class_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="names no class under 'architectures'"):
        no_split_pattern(tmp_path)


def test_a_class_that_says_nothing_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_no_split_modules", [])
    with pytest.raises(
        LoadError, match="LlamaForCausalLM does not declare _no_split_modules"
    ) as caught:
        no_split_pattern(source)
    assert (
        caught.value.hint
        == "give a pattern with blocks=, or none, and blocks are inferred from tensor names"
    )


class Backwards(nn.Module):
    """Runs its layers from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = layer(layer(x))
        made: torch.Tensor = self.head(x)
        return made


def test_a_run_says_in_which_order_blocks_are_needed(tmp_path: Path) -> None:
    model = Backwards()
    with recorded_order(model) as order:
        model(torch.ones(1, 4))
    model(torch.ones(1, 4))
    assert order == ["layers.2.0", "layers.1.0", "layers.0.0", "head"]
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.save(model.state_dict(), tmp_path / "m.bin")
    shardkit.offload_prep(tmp_path / "m.bin", tmp_path / "out", order=order)
    assert blocks_of(tmp_path / "out") == ["layers.2", "layers.1", "layers.0", "head"]


def test_a_run_that_fails_leaves_no_hook_behind() -> None:
    model = Backwards()
    with pytest.raises(RuntimeError), recorded_order(model) as order:
        model(torch.ones(1, 3))
    assert order == ["layers.2.0"]
    assert not any(module._forward_pre_hooks for module in model.modules())
