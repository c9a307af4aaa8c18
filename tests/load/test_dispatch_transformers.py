"""Models of Transformers over CPU and disk: logits and generated tokens are those of the resident model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch
from shardkit.load.pager import Streamed

IDS = torch.arange(10).reshape(1, 10)


def llama(**options: Any) -> Any:  # Any, here and below: Transformers leaves its models untyped
    config: Any = transformers.LlamaConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 64}
    return transformers.LlamaForCausalLM(config(num_key_value_heads=2, **sizes, **options))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, n_positions=64))


def t5() -> Any:
    config: Any = transformers.T5Config
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(config(**sizes))


def mixtral() -> Any:
    config: Any = transformers.MixtralConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    return transformers.MixtralForCausalLM(config(num_key_value_heads=2, num_local_experts=4, **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "mixtral": mixtral,
}


def half(model: nn.Module) -> dict[str, str]:
    """Every second layer on disk."""
    layers = [name for name, module in model.named_modules() if type(module).__name__.endswith(("Layer", "Block"))]
    outermost = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    return {"": "cpu"} | dict.fromkeys(outermost[::2], "disk")


DEVICE_MAPS: dict[str, Callable[[nn.Module], dict[str, str]]] = {
    "cpu": lambda model: {"": "cpu"},
    "half": half,
    "disk": lambda model: {"": "disk"},
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_tokens_are_those_of_the_resident_model(kind: str, device_map: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    resident = MODELS[kind]().eval()
    torch.save(resident.state_dict(), tmp_path / "model.bin")
    with init_empty_weights():
        model = MODELS[kind]().eval()
    chosen = DEVICE_MAPS[device_map](model)
    load_checkpoint_and_dispatch(model, tmp_path / "model.bin", chosen, ring=2)
    assert any(isinstance(weight, Streamed) for weight in model.parameters()) == ("disk" in chosen.values())
    options: dict[str, Any] = {"decoder_input_ids": IDS} if kind == "t5" else {}
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS, **options).logits, resident(IDS, **options).logits)
    tokens: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **tokens), resident.generate(IDS, **tokens))
    twin = copy.deepcopy(model)
    close(model)
    assert torch.equal(twin.generate(IDS, **tokens), resident.generate(IDS, **tokens))
