"""Libraries that write to the weights of a model that streams: adapters that are merged, and models
that rescale themselves.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from libraries import as_of
from shardkit.errors import OverBudget
from shardkit.load import close, from_pretrained, save, tensors
from shardkit.load.lazy import backing
from shardkit.load.lazy.paged import is_address

transformers: Any = pytest.importorskip("transformers", reason="its models are changed here")
IDS = torch.tensor([[5, 9, 33, 7, 1, 60]])
DISK: dict[str, str] = {"": "disk"}
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
MAPS = pytest.mark.parametrize("device_map", [DISK, MIXED], ids=["disk", "mixed"])

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning")
]


def llama(folder: Path) -> Any:  # Any: a model of transformers, here and below
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def adapted(model: Any, **options: Any) -> Any:
    peft: Any = pytest.importorskip("peft", reason="its adapters are merged here")
    torch.manual_seed(7)
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    )
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return made.eval()


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits.detach()
    return found


@MAPS
@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe_merge"])
def test_adapters_are_merged_into_weights_that_stream(
    device_map: dict[str, str], safe: bool, tmp_path: Path
) -> None:
    same, model = (
        adapted(llama(tmp_path / "model")),
        adapted(from_pretrained(tmp_path / "model", device_map=device_map)),
    )
    same, model = (each.merge_and_unload(safe_merge=safe) for each in (same, model))
    assert torch.equal(logits(model), logits(same))
    written = {
        name for name, each in model.named_parameters() if "q_proj" in name or "down_proj" in name
    }
    assert {
        name for name, each in model.named_parameters() if "layers" in name and not is_address(each)
    } == written
    save(model, tmp_path / "merged")
    stored = tensors(tmp_path / "merged")
    assert all(torch.equal(stored[name], each) for name, each in same.state_dict().items())
    close(model)
    assert torch.equal(logits(model), logits(same))


@MAPS
def test_adapters_are_merged_and_taken_out_again(
    device_map: dict[str, str], tmp_path: Path
) -> None:
    same, model = (
        adapted(llama(tmp_path / "model")),
        adapted(from_pretrained(tmp_path / "model", device_map=device_map)),
    )
    for each in (same, model):
        each.merge_adapter()
    assert torch.equal(logits(model), logits(same))
    for each in (same, model):
        each.unmerge_adapter()
    assert torch.equal(logits(model), logits(same))


@MAPS
def test_a_merge_for_which_there_is_no_memory_leaves_the_model_as_it_was(
    device_map: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same, model = (
        adapted(llama(tmp_path / "model")),
        adapted(from_pretrained(tmp_path / "model", device_map=device_map)),
    )
    with monkeypatch.context() as patched:
        patched.setattr(backing, "free_memory", lambda device: 0)
        with pytest.raises(
            OverBudget, match=r"q_proj\.\S*weight' streams, and needs .* of memory to be written"
        ):
            model.merge_and_unload()
    assert torch.equal(logits(model), logits(same))


@MAPS
@as_of("peft", "0.21")  # 0.18 asks streamed weights for gradients where it disables an adapter
def test_a_module_that_an_adapter_saves_is_trained_as_in_memory(
    device_map: dict[str, str], tmp_path: Path
) -> None:
    options = {"modules_to_save": ["lm_head"], "layers_to_transform": [2]}
    same, model = adapted(llama(tmp_path / "model"), **options), None
    model = adapted(from_pretrained(tmp_path / "model", device_map=device_map), **options)
    for each in (same, model):
        head = [
            weight for name, weight in each.named_parameters() if "lm_head.modules_to_save" in name
        ]
        assert all(weight.requires_grad for weight in head)
        optimizer = torch.optim.SGD(head, lr=0.1)
        hidden = each.base_model.model.model(IDS).last_hidden_state.detach()
        torch.autograd.backward(each.base_model.model.lm_head(hidden).square().mean())
        optimizer.step()
    assert torch.equal(logits(model), logits(same))
    with model.disable_adapter(), same.disable_adapter():
        assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rwkv_rescales_its_weights_while_they_stream(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4}
    config = transformers.RwkvConfig(**sizes, rescale_every=2, tie_word_embeddings=False)
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    same = transformers.RwkvForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    model = from_pretrained(tmp_path, device_map={"": "disk"}, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS).logits, same(IDS).logits)
        written = {
            name
            for name, each in model.named_parameters()
            if "blocks" in name and not is_address(each)
        }
        rescaled = ("attention.output", "feed_forward.value")
        assert written == {
            f"rwkv.blocks.{number}.{part}.weight" for number in range(4) for part in rescaled
        }
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IDS).logits, same(IDS).logits)


def test_an_adapter_of_diffusers_is_fused_and_taken_out_again(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers", reason="its adapters are fused here")
    peft: Any = pytest.importorskip("peft", reason="its adapters are fused here")
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    diffusers.UNet2DConditionModel(
        **sizes, **kinds, cross_attention_dim=8, attention_head_dim=4
    ).save_pretrained(tmp_path)
    same = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    model = from_pretrained(tmp_path, device_map={"": "disk"})
    given = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 2, 8)
    outputs: list[list[torch.Tensor]] = []
    for each in (same, model):
        torch.manual_seed(1)
        each.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        found = []
        for step in (each.disable_adapters, each.enable_adapters, each.fuse_lora, each.unfuse_lora):
            step()
            with torch.no_grad():
                found.append(each(*given).sample)
        outputs.append(found)
    for expected, output in zip(*outputs, strict=True):
        torch.testing.assert_close(
            output, expected
        )  # the weights that Diffusers loads are aligned as they are in its file
    assert not torch.equal(outputs[1][0], outputs[1][1])


@MAPS
def test_a_model_is_cast_after_adapters_were_merged(
    device_map: dict[str, str], tmp_path: Path
) -> None:
    same, model = (
        adapted(llama(tmp_path / "model")),
        adapted(from_pretrained(tmp_path / "model", device_map=device_map)),
    )
    same, model = (each.merge_and_unload().half() for each in (same, model))
    assert {each.dtype for each in model.parameters()} == {torch.float16}
    assert torch.equal(logits(model), logits(same))
