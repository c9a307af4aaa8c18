"""What the peers' own readers make of an output folder, as it lies: safetensors, huggingface_hub,
transformers, accelerate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import shardkit
from aligned import aligned
from libraries import as_of, peer
from truth import values

accelerate = peer("accelerate")
huggingface_hub = peer("huggingface_hub")
transformers = peer("transformers")

SHARD = "30kB"  # several for each of the models below


def llama(*, tied: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def t5(*, tied: bool) -> Any:
    """A T5; since version 1.1 the released ones have a head of their own beside embeddings that are
    shared.
    """
    model: Any = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 32))
        model.config.tie_word_embeddings = False
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: llama(tied=True),
    "llama-untied": lambda: llama(tied=False),
    "t5-tied": lambda: t5(tied=True),
    "t5-untied": lambda: t5(tied=False),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def pickled(model: Any, folder: Path) -> Path:
    """The model as a folder with pytorch_model.bin and config.json."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def saved(model: Any, folder: Path) -> Path:
    """The model as transformers saves it itself."""
    model.save_pretrained(folder, max_shard_size="50kB")
    return folder


def logits(model: Any) -> bytes:
    ids = torch.arange(10).reshape(2, 5)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return values(model(input_ids=ids, **decoder).logits)


def empty(model: Any) -> Any:
    """A model of the same shape without any weights."""
    with accelerate.init_empty_weights():
        return type(model)(model.config).eval()


def state_of(model: Any) -> dict[str, bytes]:
    return {name: values(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("source", [pickled, saved])
@pytest.mark.parametrize("ties", ["keep-first", "copy"])
def test_transformers_loads_the_same_model(
    model: Any, source: Callable[[Any, Path], Path], ties: Any, tmp_path: Path
) -> None:
    report = shardkit.convert(
        source(model, tmp_path / "source"), tmp_path / "out", max_shard=SHARD, ties=ties
    )
    assert report.shards > 2
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert state_of(loaded) == state_of(model)
    assert logits(aligned(loaded).eval()) == logits(model)


@as_of("huggingface_hub", "2.4")  # 1.3 asks each shard for all weights
def test_huggingface_hub_loads_it_strictly_where_ties_are_copied(
    model: Any, tmp_path: Path
) -> None:
    shardkit.convert(
        pickled(model, tmp_path / "source"), tmp_path / "out", max_shard=SHARD, ties="copy"
    )
    fresh = type(model)(model.config).eval()
    huggingface_hub.load_torch_model(fresh, tmp_path / "out", strict=True)
    assert state_of(fresh) == state_of(model)


def test_huggingface_hub_loads_it_where_ties_are_folded(model: Any, tmp_path: Path) -> None:
    report = shardkit.convert(
        pickled(model, tmp_path / "source"), tmp_path / "out", max_shard=SHARD
    )
    fresh = type(model)(model.config).eval()
    result: Any = huggingface_hub.load_torch_model(fresh, tmp_path / "out", strict=False)
    assert set(result.missing_keys) == set(report.aliases)
    assert not result.unexpected_keys
    assert state_of(fresh) == state_of(model)


def test_huggingface_hub_loads_a_single_file(model: Any, tmp_path: Path) -> None:
    shardkit.convert(pickled(model, tmp_path / "source"), tmp_path / "one.safetensors", ties="copy")
    fresh = type(model)(model.config).eval()
    huggingface_hub.load_torch_model(fresh, tmp_path / "one.safetensors", strict=True)
    assert logits(aligned(fresh)) == logits(model)


def test_accelerate_dispatches_it(model: Any, tmp_path: Path) -> None:
    shardkit.convert(pickled(model, tmp_path / "source"), tmp_path / "out", max_shard=SHARD)
    fresh = empty(model)
    fresh.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(
        fresh, tmp_path / "out", device_map={"": "cpu"}
    )
    assert logits(aligned(loaded)) == logits(model)


def test_accelerate_offloads_it_to_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tied=False).eval()
    shardkit.convert(pickled(model, tmp_path / "source"), tmp_path / "out", max_shard=SHARD)
    here = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {"model.layers": "disk"} | dict.fromkeys(here, "cpu")
    fresh = empty(model)
    loaded = accelerate.load_checkpoint_and_dispatch(
        fresh, tmp_path / "out", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    offloaded = accelerate.utils.modeling.get_state_dict_offloaded_model(loaded)
    assert {name: values(tensor) for name, tensor in offloaded.items()} == state_of(model)
    ids = torch.arange(10).reshape(2, 5)
    # Not bit by bit: it computes with weights where they lie in the file.
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_safetensors_opens_every_shard_and_reads_every_tensor(tmp_path: Path) -> None:
    state = {
        f"{number}.{dtype}": torch.arange(50).to(dtype)
        for number in range(9)
        for dtype in (torch.int64, torch.float16)
    }
    torch.save(state, tmp_path / "big.bin")
    shardkit.convert(tmp_path / "big.bin", tmp_path / "out", max_shard="6kB")
    found: dict[str, bytes] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: values(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        assert set(load_file(shard)) <= set(state)
    assert found == {name: values(tensor) for name, tensor in state.items()}
