"""What is run as one, told from names: real models, wrappers, experts, orders."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libraries import as_of, peer
from shardkit.checkpoint.blocks import named_blocks, runs_of_names
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import U8
from shardkit.payloads.payload import Extent

transformers = peer("transformers")

STEPS = st.sampled_from(["a", "b", "weight", "layers", "experts", "0", "1", "2", "10", ""])
NAMES = st.lists(st.lists(STEPS, min_size=1, max_size=5).map(".".join), max_size=40, unique=True)


def entries(sizes: Mapping[str, int] | Iterable[str]) -> list[TensorEntry]:
    sized = dict(sizes) if isinstance(sizes, Mapping) else dict.fromkeys(sizes, 4)
    return [
        TensorEntry((name,), U8, (size,), Extent(Path("x"), 0, size))
        for name, size in sized.items()
    ]


def blocks(
    sizes: Mapping[str, int] | Iterable[str], no_split: str | None = None
) -> dict[str, list[str]]:
    """The blocks by name, each with what its tensors are called from there on."""
    found = named_blocks(entries(sizes), re.compile(no_split) if no_split else None)
    return {
        block.name: [
            entry.name.removeprefix(block.name).removeprefix(".") for entry in block.entries
        ]
        for block in found
    }


@given(NAMES, st.sampled_from([None, "a", r"layers\.\d+", "^$"]))
def test_every_tensor_is_in_one_block_that_its_name_begins_with(
    names: list[str], no_split: str | None
) -> None:
    found = named_blocks(entries(names), re.compile(no_split) if no_split else None)
    assert sorted(entry.name for block in found for entry in block.entries) == sorted(names)
    assert len({block.name for block in found}) == len(found)
    for block in found:
        assert all(f"{entry.name}.".startswith(f"{block.name}.") for entry in block.entries)


@given(NAMES)
def test_blocks_do_not_depend_on_the_order_of_the_file(names: list[str]) -> None:
    shuffled = random.Random(0).sample(names, len(names))
    assert {name: set(each) for name, each in blocks(names).items()} == {
        n: set(each) for n, each in blocks(shuffled).items()
    }


def test_layers_are_numbered_and_the_rest_are_modules() -> None:
    names = [
        "model.embed.weight",
        "model.layers.0.q.weight",
        "model.layers.0.q.bias",
        "model.layers.1.q.weight",
        "head.weight",
    ]
    assert blocks(names) == {
        "model.embed": ["weight"],
        "model.layers.0": ["q.weight", "q.bias"],
        "model.layers.1": ["q.weight"],
        "head": ["weight"],
    }


def test_experts_lie_inside_their_layer() -> None:
    names = [
        f"layers.{layer}.mlp.experts.{expert}.w{at}.weight"
        for layer in range(3)
        for expert in range(8)
        for at in (1, 2)
    ]
    assert list(blocks(names)) == ["layers.0", "layers.1", "layers.2"]


def test_a_number_that_wraps_nearly_all_is_no_block() -> None:
    sizes = {f"0.auto_model.encoder.layer.{layer}.weight": 10 for layer in range(6)}
    sizes |= {"0.auto_model.embeddings.weight": 20, "2.linear.weight": 3}
    assert list(blocks(dict(sorted(sizes.items())))) == [
        "0.auto_model.embeddings",
        *(f"0.auto_model.encoder.layer.{layer}" for layer in range(6)),
        "2",
    ]


def test_a_layer_that_is_most_of_a_model_stays_whole_where_nothing_in_it_is_numbered() -> None:
    assert blocks({"layers.0.q.weight": 90, "layers.0.k.weight": 1, "norm.weight": 1}) == {
        "layers.0": ["q.weight", "k.weight"],
        "norm": ["weight"],
    }


def test_a_module_with_tensors_of_its_own_takes_along_what_lies_below() -> None:
    names = [
        "vit.embeddings.cls_token",
        "vit.embeddings.patch.weight",
        "vit.layer.0.w",
        "vit.scale",
        "gain",
    ]
    assert blocks(names) == {
        "vit.embeddings": ["cls_token", "patch.weight"],
        "vit.layer.0": ["w"],
        "vit.scale": [""],
        "gain": [""],
    }


def test_the_user_says_what_stays_whole() -> None:
    names = ["down.0.res.0.w", "down.0.attn.1.w", "down.1.res.0.w", "mid.w"]
    assert sorted(blocks(names, r"(res|attn)\.\d+$")) == [
        "down.0.attn.1",
        "down.0.res.0",
        "down.1.res.0",
        "mid",
    ]
    assert list(blocks(names, "^down$")) == ["down", "mid"]
    assert list(blocks([f"layers.{at}.w" for at in (1, 10)], r"layers\.1$")) == [
        "layers.1",
        "layers.10",
    ]


def test_numbers_count_where_names_are_sorted() -> None:
    assert list(blocks(sorted(f"h.{at}.w" for at in range(12)))) == [f"h.{at}" for at in range(12)]


def test_the_order_of_a_file_that_is_not_sorted_is_kept() -> None:
    assert list(blocks(["head.w", "layers.1.w", "layers.0.w", "embed.w"])) == [
        "head",
        "layers.0",
        "layers.1",
        "embed",
    ]


SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
SMALL |= {"num_hidden_layers": 12, "num_attention_heads": 2}
KINDS: list[tuple[str, str, list[str]]] = [
    (
        "Llama",
        "LlamaForCausalLM",
        ["model.embed_tokens", *(f"model.layers.{n}" for n in range(12)), "model.norm", "lm_head"],
    ),
    (
        "Mixtral",
        "MixtralForCausalLM",
        ["model.embed_tokens", *(f"model.layers.{n}" for n in range(12)), "model.norm", "lm_head"],
    ),
    ("GPT2", "GPT2Model", ["wte", "wpe", *(f"h.{n}" for n in range(12)), "ln_f"]),
    (
        "T5",
        "T5EncoderModel",
        ["shared", *(f"encoder.block.{n}" for n in range(12)), "encoder.final_layer_norm"],
    ),
    (
        "ViT",
        "ViTModel",
        ["embeddings", *(f"layers.{n}" for n in range(12)), "layernorm", "pooler.dense"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "architecture", "expected"),
    [
        # The layers of ViT have other names in transformers 5.0.
        pytest.param(*case, marks=[as_of("transformers", "5.23")] if case[0] == "ViT" else [])
        for case in KINDS
    ],
    ids=[kind for kind, _, _ in KINDS],
)
def test_real_models_come_in_the_order_in_which_they_run(
    kind: str, architecture: str, expected: list[str]
) -> None:
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    make = getattr(transformers, architecture)  # imported first: not all of it is for this device
    with torch.device("meta"):
        model = make(config)
    tied = {"encoder.embed_tokens.weight"}
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters() if name not in tied}
    assert list(blocks(sizes)) == expected
    by_name = list(blocks(dict(sorted(sizes.items()))))
    assert by_name == (
        expected if kind != "GPT2" else ["wpe", "wte", *expected[2:]]
    )  # of two inputs, no word tells the first


def test_encoders_come_before_decoders_and_inputs_before_outputs() -> None:
    names = [
        "conv_in.w",
        "time_embedding.w",
        "down_blocks.0.w",
        "mid_block.w",
        "up_blocks.0.w",
        "conv_norm_out.w",
        "conv_out.w",
    ]
    assert list(blocks(sorted(names))) == [name.removesuffix(".w") for name in names]
    bart = [
        "shared.w",
        "encoder.embed_positions.w",
        "encoder.layers.0.w",
        "encoder.norm.w",
        "decoder.embed_positions.w",
    ]
    bart += ["decoder.layers.0.w", "decoder.norm.w", "lm_head.w"]
    assert list(blocks(sorted(bart))) == [name.removesuffix(".w") for name in bart]


def test_a_name_as_deep_as_a_mine_is_a_block() -> None:
    deep = ".".join("a" * 1_000_000)
    assert list(blocks([f"{deep}.weight", "b.weight"], "^c$"))[1:] == ["b"]


def test_names_that_are_numbered_one_after_the_other_are_one_run() -> None:
    names = ["embed", "h.0", "h.1", "h.2", "h.4", "g.5", "g.6", "7", "8"]
    assert list(runs_of_names(names)) == [
        ["embed"],
        ["h.0", "h.1", "h.2"],
        ["h.4"],
        ["g.5", "g.6"],
        ["7", "8"],
    ]
    assert list(runs_of_names([])) == []
