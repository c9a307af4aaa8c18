"""What transformers and accelerate load is what we load, bit for bit, and where accelerate is wrong
we are right.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerators import TIERS
from shardkit.errors import Mismatch
from shardkit.load.loading.load_checkpoint import load_checkpoint_in_model
from shardkit.load.modules.init_empty import init_empty_weights

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", TINY | {"tie_word_embeddings": True}),
    "llama untied": ("LlamaForCausalLM", "LlamaConfig", TINY | {"tie_word_embeddings": False}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", TINY | {"max_position_embeddings": 32}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 16,
            "d_ff": 32,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What other libraries, and we about names, have to say is not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def config_of(name: str) -> Any:
    _, config, options = MODELS[name]
    return getattr(transformers, config)(**options)


def made(name: str) -> Any:
    torch.manual_seed(3)
    return getattr(transformers, MODELS[name][0])(config_of(name)).eval()


def save(model: Any, form: str, folder: Path) -> Path:
    if form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    if form == "legacy":
        torch.save(model.state_dict(), folder / "old.bin", _use_new_zipfile_serialization=False)
        return folder / "old.bin"
    model.save_pretrained(folder, max_shard_size="20KB" if form == "index" else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (form == "index")
    return folder if form == "index" else folder / "model.safetensors"


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 14).reshape(2, 6)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, **inputs).logits
    return result


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": "disk"}])
@pytest.mark.parametrize("form", ["bin", "legacy", "safetensors", "index"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_the_same_when_loaded_empty(
    name: str, form: str, device_map: Any, tmp_path: Path
) -> None:
    wanted = made(name)
    path = save(wanted, form, tmp_path)
    with init_empty_weights():
        model = getattr(transformers, MODELS[name][0])(config_of(name)).eval()
    model.tie_weights()
    load_checkpoint_in_model(model, path, device_map)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert torch.equal(logits(model), logits(wanted))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("form", ["bin", "safetensors", "index"])
@pytest.mark.parametrize("name", MODELS)
def test_accelerate_loads_the_same_values_and_types(
    name: str, form: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    path = save(made(name), form, tmp_path)
    ours, theirs = (getattr(transformers, MODELS[name][0])(config_of(name)) for _ in range(2))
    load_checkpoint_in_model(ours, path, {"": "cpu"}, dtype=dtype)
    accelerate.load_checkpoint_in_model(theirs, str(path), {"": "cpu"}, dtype=dtype)
    found, needed = ours.state_dict(), theirs.state_dict()
    if form != "bin":  # one name of a tie is in the file, and theirs may be wrong then: see below
        shared = (
            theirs.get_input_embeddings().weight.data_ptr()
            if ours.config.tie_word_embeddings
            else 0
        )
        needed = {key: tensor for key, tensor in needed.items() if tensor.data_ptr() != shared}
    assert [key for key in needed if found[key].dtype != needed[key].dtype] == []
    assert [key for key in needed if not torch.equal(found[key], needed[key])] == []


# Where accelerate 1.15 is wrong. Each test runs both: if theirs is mended one day, the test says
# so.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def random_state(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def theirs(model: nn.Module, path: Path, **options: Any) -> nn.Module:
    accelerate.load_checkpoint_in_model(model, str(path), **options)  # a Path it refuses
    return model


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    with init_empty_weights():
        return make()


def test_a_missing_name_is_an_error_where_all_must_match_and_a_sentence_elsewhere(
    tmp_path: Path,
) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "x.safetensors", {"format": "pt"})
    kept = nn.Linear(2, 2)
    before = kept.bias.clone()
    theirs(kept, tmp_path / "x.safetensors", device_map={"": "cpu"}, strict=True)  # no error
    assert torch.equal(kept.bias, before)
    with pytest.raises(Mismatch, match="missing: 'bias'"):
        load_checkpoint_in_model(
            nn.Linear(2, 2), tmp_path / "x.safetensors", {"": "cpu"}, strict=True
        )
    assert load_checkpoint_in_model(
        nn.Linear(2, 2), tmp_path / "x.safetensors", {"": "cpu"}
    ).missing == ("bias",)


def test_what_would_stay_on_meta_is_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "x.safetensors", {"format": "pt"})
    left = theirs(
        empty(lambda: nn.Linear(2, 2)), tmp_path / "x.safetensors", device_map={"": "cpu"}
    )
    assert left.get_parameter("bias").is_meta
    with pytest.raises(Mismatch, match="with no values in the model to keep: 'bias'"):
        load_checkpoint_in_model(
            empty(lambda: nn.Linear(2, 2)), tmp_path / "x.safetensors", {"": "cpu"}
        )


def test_buffers_on_disk_get_the_values_of_the_checkpoint(tmp_path: Path) -> None:
    state = random_state(Tied())
    torch.save(state, tmp_path / "x.bin")
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    wrong = theirs(Tied(), tmp_path / "x.bin", **options)
    assert torch.equal(wrong.get_buffer("norm.running_mean"), torch.zeros(3))
    model = Tied()
    load_checkpoint_in_model(model, tmp_path / "x.bin", {"": "disk"})
    assert torch.equal(model.get_buffer("norm.running_mean"), state["norm.running_mean"])


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("device", TIERS)
def test_a_file_with_one_name_of_a_tie_is_enough(
    tmp_path: Path, kept: str, device: str | int
) -> None:
    state = random_state(Tied())
    del state[({"embed.weight", "head.weight"} - {kept}).pop()]
    torch.save(state, tmp_path / "x.bin")
    model = empty(Tied)
    load_checkpoint_in_model(model, tmp_path / "x.bin", {"": device}, strict=True)
    assert model.get_parameter("embed.weight") is model.get_parameter("head.weight")
    assert torch.equal(model.get_parameter("embed.weight").cpu(), state[kept])


def test_a_tied_model_in_memory_gets_the_values_of_the_one_name_that_the_file_has(
    tmp_path: Path,
) -> None:
    state = random_state(Tied())
    del state["embed.weight"]
    torch.save(state, tmp_path / "x.bin")
    # They tie again by the first name in the alphabet, and so keep what the model was made with.
    wrong = theirs(Tied(), tmp_path / "x.bin", device_map={"": "cpu"}, strict=True)
    assert not torch.equal(wrong.get_parameter("head.weight"), state["head.weight"])
    model = Tied()
    load_checkpoint_in_model(model, tmp_path / "x.bin", {"": "cpu"}, strict=True)
    assert torch.equal(model.embed.weight, state["head.weight"])


def test_ties_survive_the_empty_model_of_theirs_only_if_tied_again(tmp_path: Path) -> None:
    state = random_state(Tied())
    del state["head.weight"]
    torch.save(state, tmp_path / "x.bin")
    with accelerate.init_empty_weights():
        model = Tied()
    assert model.embed.weight is not model.head.weight
    assert (
        theirs(model, tmp_path / "x.bin", device_map={"": "cpu"})
        .get_parameter("head.weight")
        .is_meta
    )
    assert empty(Tied).get_parameter("embed.weight") is not None


@pytest.mark.parametrize("device", TIERS)
def test_a_parameter_whose_name_holds_scb_is_loaded(tmp_path: Path, device: str | int) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"SCBlock": nn.Linear(2, 2)})

    state = random_state(make())
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    skipped = theirs(make(), tmp_path / "x.safetensors", device_map={"": "cpu"}, strict=True)
    assert not torch.equal(skipped.get_parameter("SCBlock.weight"), state["SCBlock.weight"])
    model = make()
    load_checkpoint_in_model(model, tmp_path / "x.safetensors", {"": device}, strict=True)
    assert torch.equal(model.get_parameter("SCBlock.weight").cpu(), state["SCBlock.weight"])


def test_a_shape_that_differs_is_found_before_anything_is_touched(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, tmp_path / "x.bin")
    touched = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="looks incorrect"):
        theirs(touched, tmp_path / "x.bin", device_map={"": "cpu"})
    assert torch.equal(touched.weight, torch.ones(2, 2))
    theirs(
        nn.Linear(2, 2),
        tmp_path / "x.bin",
        device_map={"": "disk"},
        offload_folder=tmp_path / "offload",
    )  # no error
    for device in ("cpu", "disk"):
        model = nn.Linear(2, 2)
        before = model.weight.clone()
        with pytest.raises(Mismatch, match="shape mismatch: 'bias'"):
            load_checkpoint_in_model(model, tmp_path / "x.bin", {"": device})
        assert torch.equal(model.weight, before)


def test_an_all_disk_map_works_for_safetensors_and_writes_nothing(tmp_path: Path) -> None:
    state = random_state(Tied())
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match="disk is invalid"):
        theirs(
            empty(Tied),
            tmp_path / "x.safetensors",
            device_map={"": "disk"},
            offload_folder=tmp_path / "offload",
        )
    model = empty(Tied)
    load_checkpoint_in_model(model, tmp_path / "x.safetensors", {"": "disk"})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert sorted(path.name for path in tmp_path.rglob("*.dat")) == []


def test_the_file_changing_afterwards_changes_nothing(tmp_path: Path) -> None:
    loaders: list[tuple[Callable[..., object], bool]] = [
        (theirs, True),
        (load_checkpoint_in_model, False),
    ]
    for load, changes in loaders:
        save_file(
            {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
            tmp_path / "x.safetensors",
            {"format": "pt"},
        )
        model = empty(lambda: nn.Linear(2, 2))
        load(model, tmp_path / "x.safetensors", device_map={"": "cpu"})
        with (tmp_path / "x.safetensors").open("r+b") as file:
            file.seek(-16, 2)
            file.write(bytes(16))
        assert torch.equal(model.get_parameter("weight"), torch.ones(2, 2)) != changes


@pytest.mark.parametrize("device", TIERS)
def test_codes_of_8_bits_do_not_become_wide_in_silence(tmp_path: Path, device: str | int) -> None:
    save_file(
        {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn)},
        tmp_path / "x.safetensors",
        {"format": "pt"},
    )

    def make() -> nn.Module:
        return nn.Linear(2, 2, bias=False)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert (
            theirs(make(), tmp_path / "x.safetensors", device_map={"": "cpu"})
            .get_parameter("weight")
            .dtype
            == torch.float32
        )
    assert [str(each.message) for each in said if "8-bit" in str(each.message)] == []
    with pytest.warns(UserWarning, match="'weight' in 8-bit floats"):
        load_checkpoint_in_model(make(), tmp_path / "x.safetensors", {"": device})
    narrow = make().to(torch.float8_e4m3fn)
    load_checkpoint_in_model(narrow, tmp_path / "x.safetensors", {"": device})
    assert narrow.get_parameter("weight").dtype == torch.float8_e4m3fn
    assert torch.equal(narrow.get_parameter("weight").detach().cpu().float(), torch.ones(2, 2))


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_found(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a.safetensors", {"format": "pt"})
    weight_map = {"weight": "a.safetensors", "bias": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    theirs(nn.Linear(2, 2), tmp_path, device_map={"": "cpu"})  # no error
    with pytest.warns(UserWarning, match="'bias'"):
        load_checkpoint_in_model(nn.Linear(2, 2), tmp_path, {"": "cpu"})
    with pytest.raises(Mismatch, match="'bias'"):
        load_checkpoint_in_model(nn.Linear(2, 2), tmp_path, {"": "cpu"}, strict=True)
