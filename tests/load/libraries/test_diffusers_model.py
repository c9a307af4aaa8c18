"""A model of Diffusers from its folder, in one line: what Diffusers itself computes with aligned
weights, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from accelerators import needs_one
from aligned import aligned
from shardkit.errors import LoadError, Mismatch
from shardkit.load import close, from_pretrained
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.libraries import diffusers_model
from shardkit.load.libraries.model_folder import ModelFolder, Request

diffusers = pytest.importorskip("diffusers", reason="its models are loaded here")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore::FutureWarning:diffusers"
    ),  # it warns of what it will drop one day
]

Given = dict[str, Any]  # Any, here and below: Diffusers leaves its models half typed
BLOCKS: Given = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def unet() -> Any:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=8, down_block_types=down, up_block_types=up, attention_head_dim=8, **BLOCKS
    )


def conditioned() -> Any:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes: Given = {"sample_size": 8, "cross_attention_dim": 24, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(
        down_block_types=down, up_block_types=up, **sizes, **BLOCKS
    )


def vae() -> Any:
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **BLOCKS)


def wan() -> Any:
    """One that keeps some of its modules in float32."""
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=8,
    )


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Given]]] = {
    "unet": (unet, lambda: {"sample": noise(2, 3, 8, 8), "timestep": 3}),
    "conditioned": (
        conditioned,
        lambda: {
            "sample": noise(2, 4, 8, 8),
            "timestep": 3,
            "encoder_hidden_states": noise(2, 5, 24),
        },
    ),
    "vae": (vae, lambda: {"sample": noise(2, 3, 16, 16)}),
    "wan": (
        wan,
        lambda: {
            "hidden_states": noise(1, 4, 2, 4, 4),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": noise(1, 5, 16),
        },
    ),
    "dit": (
        dit,
        lambda: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": torch.tensor([3, 4]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
}


def half(model: nn.Module) -> dict[str, str]:
    """Every second of its outermost parts on disk."""
    return {"": "cpu"} | dict.fromkeys([name for name, _ in model.named_children()][::2], "disk")


def by_turns(model: nn.Module) -> dict[str, int | str]:
    """Its outermost parts on the accelerator, in main memory and on disk, by turns."""
    places: list[int | str] = [0, "cpu", "disk"]
    return {"": 0} | {
        name: places[number % 3] for number, (name, _) in enumerate(model.named_children())
    }


DEVICE_MAPS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda model: None,
    "cpu": lambda model: "cpu",
    "half": half,
    "disk": lambda model: {"": "disk"},
}
WITH_ACCELERATOR: dict[str, Callable[[nn.Module], Any]] = {
    "all there": lambda model: 0,
    "by turns": by_turns,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def output(model: Any, given: Given | None = None) -> torch.Tensor:
    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)

    with torch.no_grad():
        found: torch.Tensor = model(
            **{key: there(value) for key, value in (given or MODELS["unet"][1]()).items()}
        ).sample
    return found.cpu()


def saved(folder: Path, model: Any = None, **options: Any) -> Any:
    """A model that is saved in *folder*."""
    torch.manual_seed(0)
    model = (unet() if model is None else model).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # some begin as zeros, and would hide that they are not loaded
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    return model


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "device_map",
    [*DEVICE_MAPS, *(pytest.param(each, marks=needs_one) for each in WITH_ACCELERATOR)],
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_model_that_diffusers_loads(
    name: str, device_map: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, given = MODELS[name]
    kind = type(saved(tmp_path, make()))
    theirs = aligned(kind.from_pretrained(str(tmp_path), torch_dtype=dtype))
    ours = from_pretrained(
        tmp_path, (DEVICE_MAPS | WITH_ACCELERATOR)[device_map](theirs), dtype, ring=2
    )
    assert type(ours) is kind
    assert not ours.training
    assert any(isinstance(weight, Streamed) for weight in ours.parameters()) == (
        device_map in ("half", "disk", "by turns")
    )
    theirs.to(ours.device)
    assert {name: each.dtype for name, each in ours.state_dict().items()} == {
        n: e.dtype for n, e in theirs.state_dict().items()
    }
    for _ in range(2):
        assert torch.equal(output(ours, given()), output(theirs, given()))
    assert dict(ours.config) == dict(theirs.config)
    assert all(each.requires_grad for each in ours.parameters() if not isinstance(each, Streamed))
    assert torch.get_default_dtype() == torch.float32
    close(ours)


def test_part_of_a_model_that_is_called_alone_streams_as_well(tmp_path: Path) -> None:
    theirs = saved(tmp_path, vae())
    ours = from_pretrained(tmp_path, "disk")
    with torch.no_grad():
        latent = ours.encode(noise(1, 3, 16, 16)).latent_dist.mode()
        assert torch.equal(latent, theirs.encode(noise(1, 3, 16, 16)).latent_dist.mode())
        assert torch.equal(ours.decode(latent).sample, theirs.decode(latent).sample)


@pytest.mark.parametrize("device_map", [None, "disk"])
def test_an_old_checkpoint_is_renamed_as_diffusers_renames_it(
    device_map: str | None, tmp_path: Path
) -> None:
    model = saved(tmp_path)
    state = {}
    for name, tensor in model.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = tensor
    assert sum("proj_attn" in name for name in state) > 2
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    assert torch.equal(output(from_pretrained(tmp_path, device_map)), output(model))


@pytest.mark.parametrize("device_map", [None, "disk"])
def test_a_class_that_has_become_several_is_the_one_that_diffusers_takes(
    device_map: str | None, tmp_path: Path
) -> None:
    model = saved(tmp_path, dit())
    edit(tmp_path / "config.json", _class_name="Transformer2DModel")
    ours = from_pretrained(tmp_path, device_map)
    assert type(ours) is type(model)
    assert torch.equal(output(ours, MODELS["dit"][1]()), output(model, MODELS["dit"][1]()))


def test_without_a_type_it_has_that_of_most_of_its_weights(tmp_path: Path) -> None:
    saved(tmp_path, wan().to(torch.bfloat16))
    theirs = aligned(
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    )
    ours = from_pretrained(tmp_path, "disk")
    assert ours.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert {name: each.dtype for name, each in ours.state_dict().items()} == {
        n: e.dtype for n, e in theirs.state_dict().items()
    }
    assert torch.equal(output(ours, MODELS["wan"][1]()), output(theirs, MODELS["wan"][1]()))


def test_no_weight_is_read_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a weight is read")

    for module in ("lazy.paged", "lazy.lazy_ops", "memory.parallel_reads"):
        monkeypatch.setattr(f"shardkit.load.{module}.read_into", fail)
    model = from_pretrained(tmp_path, "disk", "bfloat16")
    assert {type(each) for each in model.parameters()} == {Streamed}
    with pytest.raises(AssertionError, match="a weight is read"):
        model.conv_in.weight.read()


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
def test_a_variant_in_a_subfolder_is_found_by_its_name(size: str, tmp_path: Path) -> None:
    saved(tmp_path / "part")
    model = saved(tmp_path / "part", unet(), variant="fp16", max_shard_size=size)
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    model.save_pretrained(tmp_path / "part", variant="fp16", max_shard_size=size)
    assert torch.equal(
        output(from_pretrained(tmp_path, subfolder="part", variant="fp16")), output(model)
    )
    assert not torch.equal(output(from_pretrained(tmp_path, subfolder="part")), output(model))
    with pytest.raises(
        LoadError, match=r"no weights under .*'diffusion_pytorch_model.int8.safetensors'"
    ):
        from_pretrained(tmp_path, subfolder="part", variant="int8")


def test_shards_go_before_one_file_as_in_diffusers(tmp_path: Path) -> None:
    saved(tmp_path)
    shutil.move(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "kept")
    model = unet().eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.move(tmp_path / "kept", tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(output(from_pretrained(tmp_path)), output(model))
    assert torch.equal(
        output(aligned(diffusers.UNet2DModel.from_pretrained(tmp_path))), output(model)
    )


def test_auto_fills_what_may_be_filled_and_the_rest_streams(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    ours = from_pretrained(tmp_path, "auto", max_memory={"cpu": 450_000})
    assert set(ours.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(output(ours), output(theirs))


def test_what_is_unexpected_is_told_and_what_is_missing_is_an_error(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        model.state_dict() | {"extra.weight": torch.ones(3)},
        tmp_path / "diffusion_pytorch_model.bin",
    )
    _, theirs = diffusers.UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    with pytest.warns(
        UserWarning, match=r"has 'extra\.weight', which the model does not have"
    ) as told:
        _, ours = from_pretrained(tmp_path, output_loading_info=True)
    assert told[0].filename == __file__
    assert ours == theirs
    assert ours["unexpected_keys"] == ["extra.weight"]
    torch.save(
        {name: each for name, each in model.state_dict().items() if name != "conv_in.bias"},
        tmp_path / "diffusion_pytorch_model.bin",
    )
    with pytest.raises(
        Mismatch, match=r"missing, with no values in the model to keep: 'conv_in\.bias'"
    ):
        from_pretrained(tmp_path)


def test_what_a_model_knows_to_be_of_no_use_is_not_told(tmp_path: Path) -> None:
    class Tolerant(diffusers.UNet2DModel):  # type: ignore[misc, name-defined]  # the module may not be there
        _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["^extra"]

    model = saved(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        model.state_dict() | {"extra.weight": torch.ones(3)},
        tmp_path / "diffusion_pytorch_model.bin",
    )
    made = diffusers_model.addressed(
        ModelFolder.at(tmp_path), Request(None, None, None, False), Tolerant
    )
    assert made.info["unexpected_keys"] == []
    assert not made.notes


def test_another_shape_is_a_mismatch_that_says_which(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", out_channels=4)
    with pytest.raises(Mismatch, match=r"'conv_out\.weight' \(\[3, 16, 3, 3\] in the checkpoint"):
        from_pretrained(tmp_path)


MODELING = """
import diffusers

class Twice(diffusers.UNet2DModel):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.sample = found.sample * 2
        return found
"""


def test_code_of_the_folder_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "twice"
    model = saved(folder)
    (folder / "modeling_twice.py").write_text(MODELING)
    edit(
        folder / "config.json", _class_name="Twice", auto_map={"AutoModel": "modeling_twice.Twice"}
    )
    with pytest.raises(LoadError, match="contains code for its model") as refused:
        from_pretrained(folder)
    assert refused.value.hint is not None
    assert "trust_remote_code=True" in refused.value.hint
    assert not (tmp_path / "modules").exists()
    assert torch.equal(
        output(from_pretrained(folder, "disk", trust_remote_code=True)), output(model) * 2
    )


FAULTS: dict[str, tuple[Given, str]] = {
    "no class": ({"_class_name": "UNet9DModel"}, "asks for 'UNet9DModel', which Diffusers"),
    "no model": ({"_class_name": "DDPMScheduler"}, "asks for 'DDPMScheduler', which Diffusers"),
    "odd class": ({"_class_name": ["a", "b"]}, "asks for .*, which Diffusers"),
    "several": (
        {"_class_name": "MultiAdapter"},
        "a MultiAdapter, which Diffusers loads by a method of its own",
    ),
    "wrong config": (
        {"down_block_types": ["Nothing"] * 2},
        r"Diffusers .* makes no model of it: .*Nothing",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "is quantised with 'bitsandbytes'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_holds_no_such_model_is_refused_with_a_sentence(
    fault: str, tmp_path: Path
) -> None:
    changes, sentence = FAULTS[fault]
    saved(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(LoadError, match=sentence):
        from_pretrained(tmp_path, dtype="float16")
    assert torch.get_default_dtype() == torch.float32


def test_what_is_of_transformers_alone_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(LoadError, match="attn_implementation is for models of Transformers"):
        from_pretrained(tmp_path, attn_implementation="eager")


def test_without_diffusers_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    for version in ("0.36.0", "1.0.0.dev0"):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["diffusers"], "__version__", version)
            with pytest.raises(
                LoadError, match=rf"needs diffusers>=0\.37,<1, and {version} is installed"
            ):
                from_pretrained(tmp_path)
    monkeypatch.setattr("shardkit.load.libraries.model_folder.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="needs Diffusers, which is not installed") as missing:
        from_pretrained(tmp_path)
    assert missing.value.hint == 'pip install "diffusers>=0.37,<1"'
