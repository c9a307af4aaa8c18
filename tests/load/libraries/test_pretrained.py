"""A model from its folder, in one line: what Transformers itself computes with aligned weights, bit
for bit.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerators import KIND, RUNNERS, needs_one
from aligned import aligned
from libraries import as_of
from shardkit.errors import (
    BadDType,
    FormatError,
    LoadError,
    Mismatch,
    NotTrained,
    OverBudget,
    ReadOnly,
)
from shardkit.load import close, from_pretrained, tensors
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.libraries.transformers_model import _made
from small_models import EAGER, IDS, MODELS, TOKENS, by_turns, half, llama, logits, mixtral

transformers: Any = pytest.importorskip("transformers", reason="its models are loaded here")
huggingface_hub: Any = pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
)

DEVICE_MAPS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda model: None,
    "cpu": lambda model: "cpu",
    "half": half,
    "disk": lambda model: {"": "disk"},
}


def saved(folder: Path, model: Any = None) -> Any:
    """A model that is saved in *folder*."""
    torch.manual_seed(0)
    model = llama() if model is None else model
    model.save_pretrained(folder)
    return model.eval()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return type(saved(tmp_path, MODELS[request.param]()))


@pytest.mark.parametrize("dtype", ["auto", torch.float16], ids=str)
@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_logits_and_tokens_are_those_of_the_model_that_transformers_loads(
    kind: Any, device_map: str, dtype: str | torch.dtype, tmp_path: Path
) -> None:
    theirs = aligned(kind.from_pretrained(tmp_path, dtype=dtype))
    ours: Any = from_pretrained(tmp_path, DEVICE_MAPS[device_map](theirs), dtype, ring=2)
    assert type(ours) is kind
    assert not ours.training
    assert any(isinstance(weight, Streamed) for weight in ours.parameters()) == (
        device_map in ("half", "disk")
    )
    assert {name: each.dtype for name, each in ours.state_dict().items()} == {
        n: e.dtype for n, e in theirs.state_dict().items()
    }
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    for _ in range(2):
        assert torch.equal(logits(ours), logits(theirs))
    if ours.can_generate():
        assert torch.equal(ours.generate(IDS, **TOKENS), theirs.generate(IDS, **TOKENS))
    close(ours)


def test_a_model_that_stays_in_memory_is_as_transformers_leaves_it(tmp_path: Path) -> None:
    saved(tmp_path)
    ours, theirs = (
        from_pretrained(tmp_path),
        transformers.LlamaForCausalLM.from_pretrained(tmp_path),
    )
    assert {type(each) for each in ours.parameters()} == {nn.Parameter}
    assert all(each.requires_grad for each in ours.parameters())
    assert ours.name_or_path == theirs.name_or_path
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert not hasattr(ours, "hf_device_map")
    assert from_pretrained(tmp_path, torch.device("cpu")).hf_device_map == {"": "cpu"}


@pytest.mark.filterwarnings("ignore:in memory, and not streamed.*word_embeddings")
@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_what_transformers_writes_to_while_it_loads_is_what_it_makes_of_it(
    device_map: str, tmp_path: Path
) -> None:
    config = transformers.ChineseCLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=3,
    )
    kind = type(saved(tmp_path, transformers.ChineseCLIPTextModel(config)))
    theirs = aligned(kind.from_pretrained(tmp_path))  # which makes a row of its embedding zero
    ours = from_pretrained(tmp_path, DEVICE_MAPS[device_map](theirs), ring=2)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name] + 0, weight), name
    with torch.no_grad():
        assert torch.equal(ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state)


def test_weights_that_are_written_to_are_read_if_they_are_few(tmp_path: Path) -> None:
    torch.save({f"weight{number}": torch.ones(4) for number in range(20)}, tmp_path / "model.pt")
    weights = tensors(tmp_path / "model.pt")

    def load(_: None, *, state_dict: Mapping[str, torch.Tensor]) -> Any:
        for weight in state_dict.values():
            weight.zero_()
        return state_dict, {}

    few: Any = {name: weights[name] for name in list(weights)[:3]}
    made: Any = _made(load, few, {})[0]
    assert [weight.tolist() for weight in made.values()] == [[0.0] * 4] * 3
    with pytest.raises(ReadOnly, match="zero_ would write to a Paged"):
        _made(load, weights, {})


def test_no_weight_is_read_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, mixtral())

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a weight is read")

    for module in ("lazy.paged", "lazy.lazy_ops", "memory.parallel_reads"):
        monkeypatch.setattr(f"shardkit.load.{module}.read_into", fail)
    model: Any = from_pretrained(tmp_path, "disk", "bfloat16")
    assert {type(each) for each in model.parameters()} == {Streamed}
    with pytest.raises(AssertionError, match="a weight is read"):
        model.lm_head.weight.read()


@pytest.mark.parametrize("own", [True, False], ids=["own file", "config.json"])
def test_the_generation_config_is_the_one_that_transformers_finds(
    own: bool, tmp_path: Path
) -> None:
    saved(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    where = "generation_config.json" if own else "config.json"
    (tmp_path / where).touch()
    (tmp_path / where).write_text(
        json.dumps(
            json.loads((tmp_path / where).read_text() or "{}") | {"top_k": 7, "max_length": 33}
        )
    )
    ours, theirs = (
        from_pretrained(tmp_path),
        transformers.LlamaForCausalLM.from_pretrained(tmp_path),
    )
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.generation_config.top_k == 7


def test_attention_is_what_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    model = from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    theirs = aligned(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    )
    assert torch.equal(logits(model), logits(theirs))


def test_auto_fills_what_may_be_filled_and_the_rest_streams(tmp_path: Path) -> None:
    saved(tmp_path)
    model: Any = from_pretrained(tmp_path, "auto", max_memory={"cpu": 80_000})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(
        logits(model), logits(aligned(transformers.LlamaForCausalLM.from_pretrained(tmp_path)))
    )
    with pytest.raises(OverBudget, match="would be offloaded to disk"):
        from_pretrained(tmp_path, "auto", max_memory={"cpu": 80_000}, offload="never")


@pytest.mark.parametrize("device", RUNNERS)
def test_what_is_missing_and_unexpected_is_told_as_transformers_tells_it(
    device: str, tmp_path: Path
) -> None:
    state = saved(tmp_path).state_dict()
    del state["lm_head.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state | {"extra.weight": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    library: Any = transformers.LlamaForCausalLM
    _, theirs = library.from_pretrained(tmp_path, output_loading_info=True)
    model, ours = from_pretrained(tmp_path, device, output_loading_info=True)
    assert ours == theirs
    assert {weight.device for weight in model.parameters()} == {torch.device(device)}
    assert (ours["missing_keys"], ours["unexpected_keys"]) == ({"lm_head.weight"}, {"extra.weight"})
    assert not any(weight.is_meta for weight in model.parameters())
    with pytest.warns(UserWarning, match=r"in memory, and not streamed.*'lm_head.weight'"):
        streamed = from_pretrained(tmp_path, {"": "disk", "model.norm": device})
    assert {weight.device for weight in streamed.parameters()} == {torch.device(device)}
    assert logits(streamed).shape == logits(model, device).shape


def test_shards_of_pickles_are_read_as_well(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = list(model.state_dict().items())
    shards = {"a.bin": dict(state[:9]), "b.bin": dict(state[9:])}
    for name, shard in shards.items():
        torch.save(shard, tmp_path / name)
    index = {
        "metadata": {},
        "weight_map": {key: name for name, shard in shards.items() for key in shard},
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for device_map in (None, "disk"):
        assert torch.equal(logits(from_pretrained(tmp_path, device_map)), logits(model))


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
def test_a_variant_in_a_subfolder_is_found_by_its_name(size: str, tmp_path: Path) -> None:
    saved(tmp_path / "part")
    model = llama().eval()
    model.save_pretrained(tmp_path / "part", variant="fp16", max_shard_size=size)
    assert torch.equal(
        logits(from_pretrained(tmp_path, subfolder="part", variant="fp16")), logits(model)
    )
    assert not torch.equal(logits(from_pretrained(tmp_path, subfolder="part")), logits(model))
    with pytest.raises(LoadError, match=r"no weights under .*'model.int8.safetensors'"):
        from_pretrained(tmp_path, subfolder="part", variant="int8")


def test_weights_are_taken_from_safetensors_or_from_what_torch_saved_as_is_asked_for(
    tmp_path: Path,
) -> None:
    first = saved(tmp_path)
    with pytest.raises(LoadError, match=r"no weights under .*'pytorch_model.bin'"):
        from_pretrained(tmp_path, use_safetensors=False)
    other = llama()
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    for use_safetensors, model in ((None, first), (True, first), (False, other.eval())):
        assert torch.equal(
            logits(from_pretrained(tmp_path, use_safetensors=use_safetensors)), logits(model)
        )
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"no weights under .*'model.safetensors'"):
        from_pretrained(tmp_path, use_safetensors=True)


def test_a_type_goes_by_either_of_its_names_and_not_by_both(tmp_path: Path) -> None:
    saved(tmp_path)
    assert from_pretrained(tmp_path, "disk", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert from_pretrained(tmp_path, torch_dtype="auto").dtype == torch.float32
    with pytest.raises(LoadError, match="two names of one argument"):
        from_pretrained(tmp_path, dtype="bf16", torch_dtype="bf16")


@pytest.mark.parametrize("name", ["offload_folder", "offload_state_dict", "low_cpu_mem_usage"])
def test_an_argument_that_has_no_meaning_here_is_told(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    idle: dict[str, Any] = {name: "offload" if name == "offload_folder" else True}
    with pytest.warns(UserWarning, match=f"{name} is ignored"):
        from_pretrained(tmp_path / "model", "disk", **idle)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_argument_that_there_is_not_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(LoadError, match="'tokken' is not an argument"):
        from_pretrained(tmp_path, tokken="secret")


def test_a_stale_index_beside_one_file_is_passed_over_as_by_transformers(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def unreachable(*args: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    return tmp_path / "hub"


def cached(folder: Path, cache: Path, commit: str, branch: str) -> None:
    """Move what is in *folder* to the *cache* of the Hub, as a *commit* of someone/tiny."""
    repository = cache / "models--someone--tiny"
    for file in folder.iterdir():
        link = repository / "snapshots" / commit / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        (repository / "blobs").mkdir(exist_ok=True)
        shutil.move(file, repository / "blobs" / f"{commit}-{file.stem}")
        link.symlink_to(Path("../../blobs") / f"{commit}-{file.stem}")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)


def test_a_model_in_the_cache_of_the_hub_is_found_by_its_name(cache: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "plain")
    cached(tmp_path / "plain", cache, "f" * 40, "main")
    assert torch.equal(logits(from_pretrained("someone/tiny", "disk")), logits(model))
    with pytest.raises(
        LoadError,
        match=r"there is no folder someone/other, .*HF_HUB_OFFLINE is set; .* it has no file of it",
    ):
        from_pretrained("someone/other")


def test_a_revision_is_found_in_whichever_cache_is_meant(cache: Path, tmp_path: Path) -> None:
    first, second = (saved(tmp_path / name, llama()) for name in ("first", "second"))
    cached(tmp_path / "first", tmp_path / "own", "a" * 40, "main")
    cached(tmp_path / "second", tmp_path / "own", "b" * 40, "tuned")
    for revision, model in ((None, first), ("tuned", second), ("a" * 40, first)):
        ours = from_pretrained(
            "someone/tiny", "disk", revision=revision, cache_dir=tmp_path / "own"
        )
        assert torch.equal(logits(ours), logits(model))
    with pytest.raises(
        LoadError, match=r"the cache in .*own does not have it: revision 'other' is not complete"
    ):
        from_pretrained("someone/tiny", revision="other", cache_dir=tmp_path / "own")
    with pytest.raises(
        LoadError, match=r"the cache in .*hub does not have it: it has no file of it"
    ):
        from_pretrained("someone/tiny", local_files_only=True)


on_accelerator = partial(pytest.param, f"{KIND}:0", marks=needs_one)
BASES = [
    ("cpu", "cpu"),
    ("cpu", "half"),
    ("cpu", "disk"),
    *map(on_accelerator, [0, "by turns", "disk"]),
]


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT 0.18
@pytest.mark.parametrize(("device", "base"), BASES)
def test_an_adapter_of_peft_stands_on_top_and_can_be_trained(
    device: str, base: str | int, tmp_path: Path
) -> None:
    peft: Any = pytest.importorskip("peft", reason="its adapters are put on models here")
    model = saved(tmp_path / "base", llama(**EAGER)).to(device)
    maps: dict[str | int, Any] = {
        "half": half(model),
        "by turns": by_turns(model),
        "disk": {"": "disk", "model.norm": device},
    }
    low_rank = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, low_rank)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = from_pretrained(tmp_path / "base", maps.get(base, base), ring=2, **EAGER)
    there = {"": device}  # or PEFT would have Accelerate deal the model out anew
    ours = peft.PeftModel.from_pretrained(
        ours, tmp_path / "adapter", is_trainable=True, device_map=there
    ).eval()
    ids = IDS.to(device)
    assert torch.equal(logits(ours, device), logits(theirs, device))
    assert torch.equal(
        ours.generate(input_ids=ids, **TOKENS), theirs.generate(input_ids=ids, **TOKENS)
    )
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours, device), logits(theirs, device))
    if base == "disk":  # each block has been refilled when its turn to go backward comes
        with pytest.raises(
            NotTrained,
            match=r"backward needs 'model\.layers\.2\.self_attn\.q_proj\.weight' and 8 more",
        ):
            ours(input_ids=ids, labels=ids).loss.backward()
        assert torch.equal(
            logits(ours.merge_and_unload(), device), logits(theirs.merge_and_unload(), device)
        )
        return
    for each in (ours, theirs):
        each(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: each.grad for name, each in theirs.named_parameters() if each.requires_grad}
    assert len(gradients) == 2 * 2 * 3
    for name, each in ours.named_parameters():
        assert (
            each.grad is None if name not in gradients else torch.equal(each.grad, gradients[name])
        )


def test_a_map_may_leave_out_the_rotary_embedding(tmp_path: Path) -> None:
    saved(tmp_path)
    parts = [
        f"model.layers.{number}"
        for number in range(transformers.AutoConfig.from_pretrained(tmp_path).num_hidden_layers)
    ]
    named = ["model.embed_tokens", *parts, "model.norm", "lm_head"]
    device_map = {name: "disk" if name.endswith("0") else "cpu" for name in named}
    theirs = aligned(transformers.LlamaForCausalLM.from_pretrained(tmp_path))
    model = from_pretrained(tmp_path, device_map)
    assert torch.equal(logits(model), logits(theirs))
    assert device_map.keys() <= model.hf_device_map.keys()
    assert model.hf_device_map["model.layers.0.mlp.down_proj.weight"] == "disk"


MODELING = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class TwiceConfig(LlamaConfig):
    model_type = "twice"

class Twice(LlamaForCausalLM):
    config_class = TwiceConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found
"""


def test_code_of_the_folder_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "twice"
    model = saved(folder)
    (folder / "modeling_twice.py").write_text(MODELING)
    places = {
        "AutoConfig": "modeling_twice.TwiceConfig",
        "AutoModelForCausalLM": "modeling_twice.Twice",
    }
    edit(folder / "config.json", model_type="twice", architectures=["Twice"], auto_map=places)
    with pytest.raises(LoadError, match="'Twice', which Transformers") as refused:
        from_pretrained(folder)
    assert refused.value.hint is not None
    assert "trust_remote_code=True" in refused.value.hint
    assert not (tmp_path / "modules").exists()
    assert torch.equal(
        logits(from_pretrained(folder, "disk", trust_remote_code=True)), logits(model) * 2
    )


SCALED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class ScaledConfig(LlamaConfig):
    model_type = "scaled"

class Scaled(LlamaForCausalLM):
    config_class = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.arange(config.vocab_size) + 0.5, persistent=False)
        self.register_buffer("steps", torch.arange(config.vocab_size), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            module.steps.copy_(torch.arange(len(module.steps)))
            SET
"""


@as_of("transformers", "5.23")  # there is no such warning with 5.0
@pytest.mark.parametrize("is_set", [False, True])
def test_a_buffer_that_the_code_of_the_folder_never_sets_is_named(
    is_set: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / f"scaled_{is_set}"
    saved(folder)
    set_now = (
        "module.scale.copy_(torch.arange(len(module.scale)) + 0.5)"
        if is_set
        else "module.scale.fill_(-3)"
    )
    (folder / "modeling_scaled.py").write_text(SCALED.replace("SET", set_now))
    places = {
        "AutoConfig": "modeling_scaled.ScaledConfig",
        "AutoModelForCausalLM": "modeling_scaled.Scaled",
    }
    edit(folder / "config.json", model_type="scaled", architectures=["Scaled"], auto_map=places)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model = from_pretrained(folder, "disk", trust_remote_code=True)
    said = [str(each.message) for each in raised if "no values for" in str(each.message)]
    assert len(said) == (not is_set)
    assert is_set or (
        "'scale'" in said[0] and "Scaled computes" in said[0] and "steps" not in said[0]
    )
    assert model.steps.tolist() == list(range(len(model.steps)))


def test_a_type_that_quantises_on_load_is_refused_by_name(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}
    }
    with pytest.raises(LoadError, match="quantization_config: weights are not quantised"):
        from_pretrained(tmp_path, **options)


@as_of("transformers", "5.23")  # 5.0 does not load this checkpoint
def test_a_checkpoint_in_fp8_is_what_transformers_makes_of_it_and_a_warning_says_what_does_not_stream(
    tmp_path: Path,
) -> None:
    state = saved(tmp_path, llama()).state_dict()
    scales = {f"{name}_scale_inv": torch.full((1, 1), 0.5) for name in state if "proj" in name}
    narrow = {
        name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor
        for name, tensor in state.items()
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(narrow | scales, tmp_path / "pytorch_model.bin")
    edit(
        tmp_path / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    theirs = aligned(transformers.LlamaForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(theirs))
    with pytest.warns(UserWarning, match=r"in memory, and not streamed.*q_proj\.weight"):
        assert torch.equal(logits(from_pretrained(tmp_path, "disk")), logits(theirs))


def test_a_checkpoint_of_a_library_that_is_not_there_is_told_by_transformers(
    tmp_path: Path,
) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "hqq"})
    with pytest.raises(LoadError, match=r"Transformers .* makes no model of it: .*hqq"):
        from_pretrained(tmp_path)


def test_another_shape_is_a_mismatch_that_says_which(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", vocab_size=65)
    with pytest.raises(
        Mismatch,
        match=r"'lm_head.weight' would be \[65, 32\], and is \[64, 32\], and so with 1 more",
    ) as found:
        from_pretrained(tmp_path)
    assert found.value.wrong_shape["model.embed_tokens.weight"] == ((64, 32), (65, 32))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter": (adapter, "holds an adapter"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "no class": (
        lambda folder: edit(folder / "config.json", architectures=None),
        "names no class under 'architectures'",
    ),
    "no model": (
        lambda folder: edit(folder / "config.json", architectures=["AutoConfig"]),
        "'AutoConfig', which Transformers",
    ),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json is not JSON",
    ),
    "no object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json must hold an object",
    ),
    "wrong config": (
        lambda folder: edit(folder / "config.json", hidden_size="wide"),
        "makes no model of it",
    ),
    "elsewhere": (
        lambda folder: edit(folder / "config.json", transformers_weights="../x.bin"),
        "places its weights elsewhere",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"),
        r"model\.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_holds_no_such_model_is_refused_with_a_sentence(
    fault: str, tmp_path: Path
) -> None:
    spoil, sentence = FAULTS[fault]
    saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises((LoadError, FormatError), match=sentence):
        from_pretrained(tmp_path)


def test_what_cannot_be_meant_is_refused_before_the_folder_is_looked_at(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(LoadError, match="automatic"):
        from_pretrained(nowhere, "automatic")
    with pytest.raises(BadDType, match="half-ish"):
        from_pretrained(nowhere, dtype="half-ish")
    with pytest.raises(LoadError, match="nowhere is neither a folder"):
        from_pretrained(nowhere)
    (tmp_path / "file").touch()
    with pytest.raises(LoadError, match="file is a file; a folder"):
        from_pretrained(tmp_path / "file")


def test_without_transformers_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["transformers"], "__version__", "4.57.1"
        )  # it puts another module in its place
        with pytest.raises(
            LoadError, match=r"needs transformers>=5\.0,<6, and 4\.57\.1 is installed"
        ):
            from_pretrained(tmp_path)
    monkeypatch.setattr("shardkit.load.libraries.model_folder.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="needs Transformers, which is not installed") as missing:
        from_pretrained(tmp_path)
    assert missing.value.hint == 'pip install "transformers>=5.0,<6"'
