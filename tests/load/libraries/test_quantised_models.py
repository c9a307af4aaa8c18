"""Quantised checkpoints are what Transformers makes of them; what cannot stream is in memory, and a
warning says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardkit.load import close, from_pretrained, save
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.quantised import expands_itself, is_packed, method_of, packed_names
from shardkit.sizes import format_size

transformers: Any = pytest.importorskip(
    "transformers", reason="it loads them"
)  # Any: it leaves its models half typed
pytestmark = [
    pytest.mark.skipif(
        not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
    ),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]

IDS = torch.tensor([[5, 9, 33, 7, 1, 60]])
SIZES: dict[
    str, Any
] = {  # a row is at least one block of bitsandbytes, whose kernels for CPUs fail on less
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, scales quantised too": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
DISK: dict[str, Any] = {"": "disk"}
MAPS: dict[str, Any] = {
    "none": None,
    "cpu": {"": "cpu"},
    "auto": "auto",
    "disk": DISK,
    "mixed": {"": "cpu", "model.layers.1": "disk", "lm_head": "disk"},
}
QUANTISED = 2 * 7


def llama(folder: Path) -> Any:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return transformers.LlamaForCausalLM


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that Transformers has quantised with bitsandbytes."""
    pytest.importorskip("bitsandbytes", reason="it makes the weights")
    made = tmp_path_factory.mktemp("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**KINDS[request.param])
    kind = llama(made / "plain")
    model = kind.from_pretrained(made / "plain", quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(made / "quantised")
    return made / "quantised"


def by_compressed_tensors(tmp_path: Path) -> Path:
    """A checkpoint of 8-bit integers with a scale for each row, as compressed-tensors has it."""
    pytest.importorskip("compressed_tensors", reason="it makes the weights")
    llama(tmp_path / "plain")
    made: dict[str, torch.Tensor] = {}
    for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items():
        scale = weight.abs().amax(-1, keepdim=True) / 127
        made |= (
            {name: (weight / scale).round().char(), f"{name}_scale": scale}
            if "proj" in name
            else {name: weight}
        )
    (tmp_path / "quantised").mkdir()
    save_file(made, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    numbers = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "format": "int-quantized", "weights": numbers}
    said = {"format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {"one": group},
        **said,
    }
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(fields))
    return tmp_path / "quantised"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.filterwarnings("ignore:in memory, and not streamed:UserWarning")
@pytest.mark.parametrize("place", MAPS)
def test_what_bitsandbytes_quantised_is_what_transformers_makes_of_it(
    place: str, folder: Path
) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ours = from_pretrained(folder, MAPS[place])
    kinds = [
        {name: type(each) for name, each in model.named_parameters() if is_packed(each)}
        for model in (ours, theirs)
    ]
    assert len(kinds[0]) == QUANTISED
    assert kinds[0] == kinds[1]
    assert any(isinstance(each, Streamed) for each in ours.parameters()) == (
        place in ("disk", "mixed")
    )
    states = [model.state_dict() for model in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(each + 0, states[1][name] + 0) for name, each in states[0].items())
    for _ in range(2):  # it repacks weights in the first forward
        assert torch.equal(logits(ours), logits(theirs))
    close(ours)


def test_a_warning_says_what_of_it_cannot_stream_and_how_much_that_is(folder: Path) -> None:
    with pytest.warns(UserWarning, match="which bitsandbytes turns into objects") as told:
        ours = from_pretrained(folder, DISK)
    held = sum(each.nbytes for each in ours.parameters() if is_packed(each))
    [sentence] = [str(each.message) for each in told]
    assert sentence.startswith(f"in memory, and not streamed: {format_size(held)} of weights, ")
    assert "'model.layers.0.self_attn.q_proj.weight'" in sentence
    streamed = {name for name, each in ours.named_parameters() if isinstance(each, Streamed)}
    assert {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
    } <= streamed
    close(ours)


@pytest.mark.filterwarnings("ignore:in memory, and not streamed:UserWarning")
def test_it_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    ours = from_pretrained(folder, DISK)
    save(ours, tmp_path / "out")
    stored = [load_file(each / "model.safetensors") for each in (folder, tmp_path / "out")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(each, stored[1][name]) for name, each in stored[0].items())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(ours))
    close(ours)


@pytest.mark.parametrize("place", MAPS)
def test_what_compressed_tensors_expands_is_what_transformers_makes_of_it(
    place: str, tmp_path: Path
) -> None:
    folder = by_compressed_tensors(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    if place in ("disk", "mixed"):
        with pytest.warns(
            UserWarning,
            match=r"not streamed: .*B of weights, and more .* compressed-tensors decompresses",
        ):
            ours = from_pretrained(folder, MAPS[place])
    else:
        ours = from_pretrained(folder, MAPS[place])
    assert expands_itself(ours)
    assert not any(isinstance(each, Streamed) for each in ours.parameters())
    states = [model.state_dict() for model in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(each + 0, states[1][name] + 0) for name, each in states[0].items())
    for _ in range(2):
        torch.testing.assert_close(
            logits(ours), logits(theirs)
        )  # expanded weights lie where they lie


METHODS: dict[str, tuple[dict[str, object], str | None]] = {
    "none": ({}, None),
    "its name": ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "an older one of bitsandbytes": (
        {"quantization_config": {"load_in_8bit": True}},
        "bitsandbytes",
    ),
    "nothing that is known": ({"quantization_config": {"quant_method": 3}}, None),
    "no object": ({"quantization_config": "int4"}, None),
}


@pytest.mark.parametrize("name", METHODS)
def test_config_json_says_which_library_quantised(name: str) -> None:
    fields, method = METHODS[name]
    assert method_of(fields) == method


def test_layers_that_are_quantised_are_told_from_others_by_the_tensors_beside_their_weights() -> (
    None
):
    packed = {
        "a.q.weight",
        "a.q.weight.absmax",
        "a.q.weight.quant_state.bitsandbytes__nf4",
        "b.k.weight",
        "b.k.SCB",
    }
    others = {
        "a.q.bias",
        "a.norm.weight",
        "embed.weight",
        "b.k.bias",
        "SCB.weight",
        "b.norm.running_mean",
    }
    assert packed_names(packed | others) == packed


def test_a_plain_weight_is_not_packed() -> None:
    assert not is_packed(nn.Parameter(torch.ones(2)))
    assert not expands_itself(nn.Linear(2, 2))
