"""What libraries do with a model that streams: adapters go to where they are used, and inputs to
where the model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from shardkit.errors import LoadError
from shardkit.load import close, from_pretrained, infer_auto_device_map, save
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.placement.device_map import device_of, reported

peft: Any = pytest.importorskip(
    "peft", reason="its adapters are loaded here"
)  # Any: as below, half typed
transformers: Any = pytest.importorskip("transformers", reason="its models are adapted here")
pytestmark = [
    pytest.mark.skipif(
        not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
    ),
    pytest.mark.filterwarnings(
        "ignore::FutureWarning"
    ),  # PEFT asks Transformers in words that it will drop one day
    pytest.mark.filterwarnings(
        "ignore:Already found a `peft_config` attribute:UserWarning"
    ),  # where several adapters are wanted
]

LAYERS = 3
IDS = torch.tensor([[5, 9, 33, 7, 1, 60]])
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
REST = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
PLACES: dict[str, dict[str, Any]] = {
    "disk": {"device_map": {"": "disk"}},
    "layers on disk": {"device_map": {"model.layers": "disk", **REST}},
    "one layer on disk": {"device_map": {"": "cpu", f"model.layers.{LAYERS - 1}": "disk"}},
    "chosen": {"device_map": "auto", "max_memory": {"cpu": "120KB"}},
    "cpu": {"device_map": {"": "cpu"}},
}


@pytest.fixture
def resident(tmp_path: Path) -> Any:
    """A model in memory, which is also in the folder base."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "base")
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()


def adapter(model: Any, folder: Path, seed: int = 7) -> Path:
    """Save an adapter of *model* that is as good as trained."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "load_adapter": lambda model, folder: model.load_adapter(folder) and model,
    "load_adapter, lean": lambda model, folder: (
        model.load_adapter(folder, low_cpu_mem_usage=True) and model
    ),
    "PeftModel": lambda model, folder: peft.PeftModel.from_pretrained(model, folder).eval(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_is_loaded_as_into_a_model_in_memory(
    loader: str, place: str, resident: Any, tmp_path: Path
) -> None:
    saved, load = adapter(resident, tmp_path / "adapter"), LOADERS[loader]
    ours = from_pretrained(tmp_path / "base", **PLACES[place])
    streamed = {name for name, each in ours.named_parameters() if isinstance(each, Streamed)}
    assert bool(streamed) == (place != "cpu")
    bare = logits(ours)
    ours, theirs = load(ours, saved), load(resident, saved)
    adapters = {name: each for name, each in theirs.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * LAYERS
    found = dict(ours.named_parameters())
    assert all(
        torch.equal(found[name], each) and not isinstance(found[name], Streamed)
        for name, each in adapters.items()
    )
    assert sum(isinstance(each, Streamed) for each in found.values()) == len(streamed)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), bare)


@pytest.mark.parametrize("place", PLACES)
def test_several_adapters_are_loaded_and_chosen(place: str, resident: Any, tmp_path: Path) -> None:
    folders = {
        name: adapter(resident, tmp_path / name, seed)
        for seed, name in enumerate(("first", "second"))
    }
    ours = from_pretrained(tmp_path / "base", **PLACES[place])
    bare, seen = logits(ours), []
    for model in (ours, resident):
        for name, folder in folders.items():
            model.load_adapter(folder, adapter_name=name)
        torch.manual_seed(
            9
        )  # what follows is the way of add_adapter, which asks for the newest PEFT
        config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, "third")
    for name in (*folders, "third"):
        for model in (ours, resident):
            choose(model, name)
        seen.append(logits(ours))
        assert torch.equal(seen[-1], logits(resident))
    assert len({tuple(each.flatten().tolist()) for each in [*seen, bare]}) == 4
    assert isinstance(ours.get_parameter("lm_head.weight"), Streamed) == (
        place not in ("cpu", "one layer on disk")
    )


def choose(model: Any, name: str) -> None:
    """Let *model* use only the adapter called *name*, as `set_adapter` of Transformers does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")  # 5.0
@pytest.mark.parametrize("place", PLACES)
def test_adapters_are_added_and_saved_by_transformers(
    place: str, resident: Any, tmp_path: Path
) -> None:
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this Transformers wants PEFT {MIN_PEFT_VERSION} for it")
    ours = from_pretrained(tmp_path / "base", **PLACES[place])
    for model in (ours, resident):
        torch.manual_seed(9)
        model.add_adapter(
            peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False),
            adapter_name="own",
        )
        model.set_adapter("own")
    assert torch.equal(logits(ours), logits(resident))
    ours.save_pretrained(tmp_path / "ours")
    resident.save_pretrained(tmp_path / "theirs")
    written = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("place", PLACES)
def test_a_transformers_pipeline_takes_a_loaded_model(
    place: str, resident: Any, tmp_path: Path
) -> None:
    ours = from_pretrained(tmp_path / "base", **PLACES[place])
    answers = [asked(model) for model in (ours, resident)]
    assert answers[0] == answers[1]
    close(ours)


def asked(model: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0"
    )
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe.device == model.device == torch.device("cpu")
    return pipe(["w5 w9 w33 w7", "w4"], max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("place", PLACES)
def test_a_trainer_evaluates_it(place: str, resident: Any, tmp_path: Path) -> None:
    ours = from_pretrained(tmp_path / "base", **PLACES[place])
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 3
    options = transformers.TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True
    )
    losses = [
        transformers.Trainer(model, options, eval_dataset=rows).evaluate()["eval_loss"]
        for model in (ours, resident)
    ]
    assert losses[0] == losses[1]
    close(ours)


@pytest.mark.parametrize("place", PLACES)
def test_the_map_that_is_reported_can_be_asked_for_again(
    place: str, resident: Any, tmp_path: Path
) -> None:
    ours = from_pretrained(tmp_path / "base", **PLACES[place])
    again = from_pretrained(tmp_path / "base", device_map=ours.hf_device_map)
    kinds = [
        {name: type(each) for name, each in model.named_parameters()} for model in (ours, again)
    ]
    assert kinds[0] == kinds[1]
    assert again.hf_device_map == ours.hf_device_map
    close(ours)
    close(again)


REPORTED: dict[str, tuple[dict[str, Any], Any, list[str], dict[str, Any]]] = {
    "nothing streams": ({"": 0}, 0, [], {"": 0}),
    "all on disk": ({"": "disk"}, "cpu", ["a.w"], {"": "cpu", "a.w": "disk"}),
    "on disk, run there": (
        {"a": "disk", "b": 1},
        1,
        ["a.w", "a.b"],
        {"a": 1, "a.w": "disk", "a.b": "disk", "b": 1},
    ),
    "in main memory, run there": ({"a": 0, "b": "cpu"}, 0, ["b.w"], {"a": 0, "b": 0, "b.w": "cpu"}),
    "in main memory, run here": (
        {"a": "cpu", "b": "disk"},
        "cpu",
        ["b.w"],
        {"a": "cpu", "b": "cpu", "b.w": "disk"},
    ),
    "a weight first": (
        {"w": "disk", "a": "cpu"},
        "cpu",
        ["w"],
        {"": "cpu", "w": "disk", "a": "cpu"},
    ),
    "a part inside": (
        {"a": "disk", "a.c": "cpu"},
        "cpu",
        ["a.w"],
        {"a": "cpu", "a.w": "disk", "a.c": "cpu"},
    ),
    "a device": ({"": torch.device("cpu")}, "cpu", [], {"": torch.device("cpu")}),
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_part_is_reported_where_it_runs_and_its_weights_where_they_stream_from(name: str) -> None:
    asked_for, main, streamed, expected = REPORTED[name]
    found = reported(asked_for, main, streamed)
    assert list(found.items()) == list(expected.items())
    keys: Any = found
    assert {weight: device_of(weight, keys) for weight in streamed} == {
        w: device_of(w, asked_for) for w in streamed
    }
    assert next(iter(found.values())) != "disk"


def test_a_map_of_ours_is_not_changed_by_what_is_reported(resident: Any) -> None:
    given = infer_auto_device_map(resident, {"cpu": "60KB"})
    before = dict(given)
    reported(
        given,
        "cpu",
        [name for name, _ in resident.named_parameters() if device_of(name, given) == "disk"],
    )
    assert given == before


ADAPTED: dict[str, Callable[[Any], Any]] = {
    "PeftModel": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["v_proj"])
    ),
    "its base": lambda model: (
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"])).base_model.model
    ),
    "injected": lambda model: peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["v_proj"]), model
    ),
    "of an embedding": lambda model: peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["embed_tokens"]), model
    ),
    "whole layers": lambda model: peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]), model
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft 0.18
@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("name", ADAPTED)
def test_a_model_is_not_saved_under_the_names_that_adapters_give_its_weights(
    name: str, place: str, resident: Any, tmp_path: Path
) -> None:
    model = ADAPTED[name](from_pretrained(tmp_path / "base", **PLACES[place]))
    with pytest.raises(LoadError, match=r"adapters of PEFT \(.?default.?\)") as refused:
        save(model, tmp_path / "out")
    assert "merge_and_unload()" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()
    if name == "PeftModel":
        merged = model.merge_and_unload()
        save(merged, tmp_path / "out")
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(logits(loaded), logits(resident))


def test_a_model_is_not_saved_with_an_adapter_that_it_loaded(resident: Any, tmp_path: Path) -> None:
    folder = adapter(resident, tmp_path / "adapter")
    model = from_pretrained(tmp_path / "base", device_map={"": "disk"})
    model.load_adapter(str(folder), adapter_name="own")
    with pytest.raises(LoadError, match=r"adapters of PEFT \(.?own.?\)"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
