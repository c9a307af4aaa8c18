"""Transformers loads a model from addresses: its own renaming, fusing, casting and tying, and not a byte of a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shardkit.load import Paged, tensors
from truth import values

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="transformers before 5 loads by other means than conversions"
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SIZES, **options))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config: Any = transformers.T5Config
    return transformers.T5ForConditionalGeneration(config(**sizes))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZES))


def vit() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "mixtral": mixtral,
    "vit": vit,
}


def logits(model: Any) -> bytes:
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=model.dtype).reshape(2, 3, 32, 32)}
    else:
        given = {"input_ids": torch.arange(14).reshape(2, 7)}
    decoder = {"decoder_input_ids": torch.arange(6).reshape(2, 3)} if model.config.is_encoder_decoder else {}
    return values(model(**given, **decoder).logits)


def state_of(model: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    state = model.state_dict()
    return {name: (t.dtype, values(t.read() if isinstance(t, Paged) else t)) for name, t in state.items()}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_a_model_loads_without_reading_and_is_the_one_the_library_loads(
    model: Any, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    theirs = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    found = tensors(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "aside")  # who reads now, fails
    ours, report = type(model).from_pretrained(None, config=model.config, state_dict=found, dtype=dtype, output_loading_info=True)
    assert {type(each) for each in ours.parameters()} == {Paged}
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    (tmp_path / "aside").rename(tmp_path / "model.safetensors")
    assert not any(report.values())
    assert state_of(ours) == state_of(theirs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert logits(ours) == logits(theirs)


def test_a_pickle_of_shards_does_as_well(tmp_path: Path) -> None:
    model = llama().eval()
    state = list(model.state_dict().items())
    shards = {"a.bin": dict(state[:9]), "b.bin": dict(state[9:])}
    for name, shard in shards.items():
        torch.save(shard, tmp_path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = transformers.LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=tensors(tmp_path))
    assert state_of(ours) == state_of(model)


def test_generation_gives_the_same_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained(tmp_path)
    ours: Any = transformers.LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=tensors(tmp_path))
    given = {"input_ids": torch.arange(5)[None], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**given), model.generate(**given))
