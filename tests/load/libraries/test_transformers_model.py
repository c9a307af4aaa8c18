"""Transformers loads a model from addresses: its own renaming, fusing, casting and tying, and not a
byte of a weight is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aligned import aligned
from shardkit.load import Paged, tensors
from small_models import MODELS, llama, logits
from truth import values

transformers: Any = pytest.importorskip("transformers", reason="its models are loaded here")

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="transformers before 5 loads by other means than conversions",
)


def state_of(model: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    state = model.state_dict()
    return {
        name: (t.dtype, values(t.read() if isinstance(t, Paged) else t))
        for name, t in state.items()
    }


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_a_model_loads_without_reading_and_is_the_one_the_library_loads(
    model: Any, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    theirs = aligned(type(model).from_pretrained(tmp_path, dtype=dtype)).eval()
    found = tensors(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "aside")  # who reads now, fails
    ours, report = type(model).from_pretrained(
        None, config=model.config, state_dict=found, dtype=dtype, output_loading_info=True
    )
    assert {type(each) for each in ours.parameters()} == {Paged}
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    (tmp_path / "aside").rename(tmp_path / "model.safetensors")
    assert not any(report.values())
    assert state_of(ours) == state_of(theirs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(logits(ours), logits(theirs))


def test_a_pickle_of_shards_does_as_well(tmp_path: Path) -> None:
    model = llama().eval()
    state = list(model.state_dict().items())
    shards = {"a.bin": dict(state[:9]), "b.bin": dict(state[9:])}
    for name, shard in shards.items():
        torch.save(shard, tmp_path / name)
    index = {
        "metadata": {},
        "weight_map": {key: name for name, shard in shards.items() for key in shard},
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = transformers.LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=tensors(tmp_path)
    )
    assert state_of(ours) == state_of(model)


def test_generation_gives_the_same_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained(tmp_path)
    ours: Any = transformers.LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=tensors(tmp_path)
    )
    given = {
        "input_ids": torch.arange(5)[None],
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(ours.generate(**given), model.generate(**given))
