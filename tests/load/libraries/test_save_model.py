"""A model is written as it is, from memory and from addresses alike, and the peers' readers read it
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shardkit
from libraries import peer
from shardkit.errors import LoadError, Malformed, OutputError, Unwritable
from shardkit.load import (
    Paged,
    close,
    from_pretrained,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    remove_hooks,
    save,
    tensors,
)
from shardkit.load.devices.device_payload import Remote
from shardkit.payloads.payload import CHUNK
from truth import values

diffusers = peer("diffusers")
transformers = peer("transformers")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    tied = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 11, bias=False)
    )
    tied[3].weight = tied[0].weight
    return tied


def state_of(module: nn.Module) -> dict[str, bytes]:
    return {
        name: values(t.read() if isinstance(t, Paged) else t)
        for name, t in module.state_dict().items()
    }


def paged(source: nn.Module, folder: Path) -> nn.Module:
    """The same model with addresses for weights."""
    torch.save(source.state_dict(), folder / "source.pt")
    target = model()
    target.load_state_dict(tensors(folder / "source.pt"), assign=True)
    return target


@pytest.mark.parametrize("kind", ["in memory", "paged", "mixed", "paged and cast"])
def test_a_model_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    source = model()
    if kind != "in memory":
        source = paged(source, tmp_path)  # type: ignore[assignment]  # it is one
    if kind == "mixed":
        source[1].weight = nn.Parameter(torch.rand(6, 6).t())
    if kind == "paged and cast":
        source.bfloat16()
    report = save(source, tmp_path / "out", max_shard=800)
    assert report.shards > 1
    assert report.aliases == {"3.weight": "0.weight"}
    assert {name: values(t.read()) for name, t in tensors(tmp_path / "out").items()} == state_of(
        source
    )
    stored = {
        name: t
        for shard in (tmp_path / "out").glob("*.safetensors")
        for name, t in load_file(shard).items()
    }
    assert {name: values(t) for name, t in stored.items()} | {
        "3.weight": values(stored["0.weight"])
    } == state_of(source)


def test_torch_saves_what_is_at_an_address_and_refuses_the_hooks_of_a_model_with_a_sentence(
    tmp_path: Path,
) -> None:
    torch.save(model().state_dict(), tmp_path / "source.pt")
    with init_empty_weights():
        target = model().eval()
    load_checkpoint_and_dispatch(target, tmp_path / "source.pt", {"": "cpu", "1": "disk"})
    expected = state_of(target)
    torch.save(target.state_dict(), tmp_path / "state.pt")
    with pytest.raises(LoadError, match="dispatched cannot be pickled") as refused:
        torch.save(target, tmp_path / "model.pt")
    assert "shardkit.load.save" in (refused.value.hint or "")
    close(target)
    remove_hooks(target)
    torch.save(target, tmp_path / "model.pt")
    (tmp_path / "source.pt").unlink()
    assert {name: values(t) for name, t in torch.load(tmp_path / "state.pt").items()} == expected
    loaded = torch.load(
        tmp_path / "model.pt", weights_only=False
    )  # a whole module, written by this test
    assert {type(each) for each in loaded.parameters()} == {nn.Parameter}
    assert state_of(loaded) == expected


def test_weights_that_share_memory_and_are_no_ties_are_all_written(tmp_path: Path) -> None:
    module, memory = nn.Module(), torch.arange(12.0)
    for name, view in {
        "all": memory,
        "rows": memory[4:8],
        "turned": memory.view(3, 4).t(),
        "same": memory[4:8],
    }.items():
        module.register_buffer(name, view)
    report = save(module, tmp_path / "out")
    assert report.aliases == {"same": "rows"}
    assert {name: values(t.read()) for name, t in tensors(tmp_path / "out").items()} == state_of(
        module
    )


def test_a_single_shard_needs_no_index(tmp_path: Path) -> None:
    report = save(model(), tmp_path / "out", max_shard=None)
    assert report.shards == 1
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() | {"3.weight"}
        == model().state_dict().keys()
    )
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**more: Any) -> Any:  # Any, here and below: neither library types its models
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=48, **more)
    )


def qwen_moe() -> Any:
    experts = {
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts))


def unet() -> Any:
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DModel(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **sizes
    )


LIBRARY_MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "experts": qwen_moe,
    "unet": unet,
}


@pytest.mark.parametrize("device_map", [{"": "disk"}, None], ids=["streamed", "in memory"])
@pytest.mark.parametrize("name", LIBRARY_MODELS)
def test_the_library_of_a_model_loads_what_was_written(
    name: str, device_map: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = LIBRARY_MODELS[name]().eval()
    if name != "unet":
        theirs.generation_config.max_new_tokens = 7
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", device_map)
    report = save(ours, tmp_path / "ours", max_shard="40kB")
    assert report.shards > 1
    loaded, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert state_of(loaded) == state_of(theirs)
    if name != "unet":
        assert loaded.generation_config.max_new_tokens == 7
    type(theirs).from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    beside = {
        path.name: path.read_bytes()
        for path in (tmp_path / "again").iterdir()
        if path.suffix == ".json"
    }
    assert {each: (tmp_path / "ours" / each).read_bytes() for each in beside} == beside
    stored = {
        each for shard in (tmp_path / "theirs").glob("*.safetensors") for each in load_file(shard)
    }
    assert {
        each for shard in (tmp_path / "ours").glob("*.safetensors") for each in load_file(shard)
    } == stored
    assert state_of(from_pretrained(tmp_path / "ours", device_map)) == state_of(ours)
    close(ours)


def test_equal_weights_that_the_configuration_does_not_tie_are_written_under_both_names(
    tmp_path: Path,
) -> None:
    tied = llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    shardkit.convert(tmp_path / "tied", tmp_path / "both")
    ours = llama()
    state = dict(tensors(tmp_path / "both"))
    ours.load_state_dict(
        state | {"lm_head.weight": state["model.embed_tokens.weight"]}, assign=True
    )
    assert not save(ours, tmp_path / "out").aliases
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert state_of(loaded) == state_of(tied)


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    save(model(), tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        save(model(), tmp_path / "out")
    save(model().half(), tmp_path / "out", overwrite=True)
    assert tensors(tmp_path / "out")["1.weight"].dtype is torch.float16


def test_a_model_is_not_written_over_the_files_that_it_reads(tmp_path: Path) -> None:
    save(model(), tmp_path / "out")
    lazy = model()
    lazy.load_state_dict(tensors(tmp_path / "out"), assign=True)
    with pytest.raises(OutputError, match="is the input"):
        save(lazy, tmp_path / "out", overwrite=True)
    assert state_of(lazy) == state_of(model())


def test_a_source_that_is_gone_or_shorter_leaves_no_output(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(100, 100)}, tmp_path / "w.safetensors")
    lazy = nn.Linear(100, 100, bias=False)
    lazy.load_state_dict(tensors(tmp_path / "w.safetensors"), assign=True)
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    with pytest.raises(Malformed, match="ends before"):
        save(lazy, tmp_path / "out")
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(shardkit.ShardkitError, match="cannot be read"):
        save(lazy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_no_value_or_no_place_is_told(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"step": 3}

    with pytest.raises(LoadError, match="on the meta device"):
        save(model().to("meta"), tmp_path / "out")
    with pytest.raises(LoadError, match="'_extra_state' is a dict of 1, not a tensor"):
        save(Stateful(2, 2), tmp_path / "out")
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(LoadError, match="only dense ones"):
        save(module, tmp_path / "out")
    module.register_buffer("sparse", torch.eye(3, dtype=torch.complex128))
    with pytest.raises(Unwritable):
        save(module, tmp_path / "out")


def test_a_model_that_streams_from_disk_is_written_without_being_read(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    with init_empty_weights():
        empty = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    streamed = load_checkpoint_and_dispatch(
        empty, tmp_path / "source.pt", device_map={"0": "cpu", "1": "disk"}
    )
    try:
        report = save(streamed, tmp_path / "out")
        assert report.tensors == 4
        assert {
            name: values(t.read()) for name, t in tensors(tmp_path / "out").items()
        } == state_of(source)
        assert torch.equal(streamed(torch.ones(2, 6)), source(torch.ones(2, 6)))
    finally:
        close(streamed)


def test_a_model_may_be_saved_inside_its_own_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    right = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(right, tmp_path / "model.safetensors")
    model = load_checkpoint_and_dispatch(
        model, tmp_path / "model.safetensors", {"": "disk"}, ring=2
    )

    def write(*_: object) -> None:
        save(model, tmp_path / "saved")

    model[1].register_forward_pre_hook(write)
    model(torch.ones(1, 8))
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: values(each) for name, each in written.items()} == {
        name: values(each) for name, each in right.items()
    }


def test_the_memory_of_an_accelerator_is_copied_chunk_by_chunk_and_known_by_its_address() -> None:
    memory = torch.arange(2 * CHUNK + 100).to(torch.uint8)
    whole = Remote(memory, ("cuda:0", 64))
    chunks = [bytes(chunk) for chunk in whole.chunks()]
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 100]
    assert b"".join(chunks) == memory.numpy().tobytes()
    part = whole.narrow(CHUNK - 3, 7).narrow(1, 5)
    assert b"".join(map(bytes, part.chunks())) == memory[CHUNK - 2 : CHUNK + 3].numpy().tobytes()
    assert part == Remote(memory[:5], ("cuda:0", 64), CHUNK - 2)
    assert part != Remote(memory[:5], ("cuda:1", 64), CHUNK - 2)
    with pytest.raises(ValueError, match="lies outside"):
        whole.narrow(CHUNK, CHUNK + 101)
