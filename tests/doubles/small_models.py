"""Small models of Transformers, one of each make, what they are given, and maps that take them
apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers: Any = pytest.importorskip(
    "transformers", reason="its models are made here"
)  # it leaves them untyped

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
EAGER: dict[str, Any] = {
    "attn_implementation": "eager"
}  # the same operations, whatever the device has of its own
IDS = torch.arange(14).reshape(2, 7)
TOKENS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=2, **SIZES, **options)
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64)
    )


def t5() -> Any:
    config: Any = transformers.T5Config
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
        "decoder_start_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(config(**sizes))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZES)
    )


def vit() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "mixtral": mixtral,
    "vit": vit,
}


def layers(model: nn.Module) -> list[str]:
    """The names of its layers, without those inside others."""
    found = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Layer", "Block"))
    ]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def half(model: nn.Module) -> dict[str, str]:
    """Every second layer on disk."""
    return {"": "cpu"} | dict.fromkeys(layers(model)[::2], "disk")


def by_turns(model: nn.Module) -> dict[str, int | str]:
    """The layers on the accelerator, in main memory and on disk, by turns."""
    places: list[int | str] = [0, "cpu", "disk"]
    return {"": 0} | {name: places[number % 3] for number, name in enumerate(layers(model))}


def logits(model: Any, device: str = "cpu") -> torch.Tensor:
    """What *model* makes of the same input each time, which comes from *device*."""
    given = {"input_ids": IDS}
    if model.main_input_name == "pixel_values":
        given = {
            "pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=model.dtype).reshape(
                2, 3, 32, 32
            )
        }
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS[:, :3]
    with torch.no_grad():
        found: torch.Tensor = model(
            **{name: each.to(device) for name, each in given.items()}
        ).logits
    return found
