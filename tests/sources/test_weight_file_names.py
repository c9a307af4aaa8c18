"""What the names of files say of the weights in them."""

from __future__ import annotations

import pytest

from shardkit.sources.weight_file_names import (
    foreign,
    is_adapter,
    is_index,
    is_parallel,
    likeliness,
    shard_sets,
    training_state,
    variant_of,
)


@pytest.mark.parametrize(
    ("names", "pattern", "missing"),
    [
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "model-*-of-00002.safetensors",
            [],
        ),
        (["pytorch_model-00002-of-00003.bin"], "pytorch_model-*-of-00003.bin", [1, 3]),
        (["m-00000-of-00002.pt", "m-00001-of-00002.pt"], "m-*-of-00002.pt", []),
        (["m-00000-of-00002.pt", "m-00002-of-00002.pt"], "m-*-of-00002.pt", [1]),
        (["m-1-of-2.safetensors.zst", "m-2-of-2.safetensors.zst"], "m-*-of-2.safetensors.zst", []),
        (["u-00001-of-00002.fp16.bin", "u-00002-of-00002.fp16.bin"], "u-*-of-00002.fp16.bin", []),
    ],
)
def test_numbered_files_are_one_set(names: list[str], pattern: str, missing: list[int]) -> None:
    (found,) = shard_sets(["config.json", *names])
    assert (found.pattern, found.missing, found.is_complete) == (pattern, missing, not missing)
    assert set(names) == set(found.names.values())
    assert all(found.name(number) == name for number, name in found.names.items())


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.bin",
        "data-00001-of-00002.arrow",
        "model-00003-of-00002.bin",
        "a-1-of-999999.bin",
        "model_1.bin",
    ],
)
def test_other_names_are_in_no_set(name: str) -> None:
    assert shard_sets([name]) == []


def test_sets_of_other_stems_totals_and_endings_are_apart() -> None:
    names = ["a-1-of-2.bin", "b-1-of-2.bin", "a-1-of-3.bin", "a-1-of-2.safetensors", "a-2-of-2.bin"]
    assert [each.pattern for each in shard_sets(names)] == [
        "a-*-of-2.bin",
        "b-*-of-2.bin",
        "a-*-of-3.bin",
        "a-*-of-2.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("pytorch_model.bf16.bin", "bf16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.safetensors.index.json", None),
        ("model-00001-of-00002.safetensors", None),
        ("llama.v2.safetensors", None),
    ],
)
def test_a_variant_is_told_from_the_default(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt", "optimizer.bin", "optimizer_0.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "scheduler.pt", "scheduler.bin", "rng_state.pth", "rng_state_3.pth", "random_states_0.pkl", "scaler.pt",
        "sampler.bin", "dl_state_dict.bin", "custom_checkpoint_0.pkl", "training_args.bin",
    ],
)  # fmt: skip
def test_what_trainers_save_beside_a_model_is_no_model(name: str) -> None:
    assert training_state(name)


@pytest.mark.parametrize(
    "name", ["model.pt", "pytorch_model.bin", "my_optimizer_net.pt", "mp_rank_00_model_states.pt"]
)
def test_a_model_is_no_state_of_a_trainer(name: str) -> None:
    assert training_state(name) is None


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("consolidated.00.pth", True),
        ("mp_rank_01_model_states.pt", True),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", True),
        ("layer_01-model_00-model_states.pt", True),
        ("consolidated.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
    ],
)
def test_the_part_of_a_rank_is_told_from_a_shard(name: str, parallel: bool) -> None:
    assert is_parallel(name) is parallel


@pytest.mark.parametrize(
    ("name", "is_foreign"),
    [
        ("a.gguf", True), ("tf_model.h5", True), ("flax_model.msgpack", True), ("model.onnx", True), ("__0_0.distcp", True),
        ("model.ckpt.index", True), ("model.ckpt.data-00000-of-00001", True), ("x.npz", True), ("X.GGUF", True),
        ("model.safetensors", False), ("config.json", False), (".gguf", False), ("model.safetensors.index.json", False),
    ],
)  # fmt: skip
def test_weights_of_other_formats_are_told_by_their_endings(name: str, is_foreign: bool) -> None:
    assert (foreign(name) is not None) is is_foreign


def test_adapters_and_indexes_are_known_by_name() -> None:
    assert is_adapter("adapter_model.safetensors")
    assert is_adapter("pytorch_lora_weights.safetensors")
    assert not is_adapter("model.safetensors")
    assert is_index("model.safetensors.index.fp16.json")
    assert not is_index("index.json")


@pytest.mark.parametrize(
    "names",
    [
        ["unet", "text_encoder", "optimizer_0"],
        ["pytorch_model_fsdp_0", "optimizer_0"],
        ["checkpoint-1000", "checkpoint-500", "checkpoint-20"],
        ["model.safetensors", "model.fp16.safetensors"],
        ["pytorch_model.bin", "optimizer.bin"],
        ["v1-5.safetensors", "v1-5-ema.safetensors"],
        ["x.safetensors", "a.ckpt"],
    ],
)
def test_the_likeliest_comes_first(names: list[str]) -> None:
    assert min(reversed(names), key=likeliness) == names[0]
