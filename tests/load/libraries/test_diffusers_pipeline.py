"""A pipeline of Diffusers from its folder, in one line: the images that Diffusers makes of aligned
weights, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerators import needs_one
from aligned import aligned
from shardkit.errors import FormatError, LoadError
from shardkit.load import close, explain, from_pretrained
from shardkit.load.diagnostics.explanation import PipelineExplanation
from shardkit.load.dispatch.attachments import attachments
from shardkit.load.hooks.device_moves import RoundTrip
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.file_watch import Sources
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.performance.bandwidth import Rates
from shardkit.sizes import format_size

diffusers: Any = pytest.importorskip("diffusers", reason="its pipelines are loaded here")
huggingface_hub: Any = pytest.importorskip("huggingface_hub")
transformers: Any = pytest.importorskip("transformers", reason="its encoders are parts of them")
pytestmark = [
    pytest.mark.skipif(
        not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
    ),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore::FutureWarning:diffusers"
    ),  # it warns of what it will drop one day
    pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning"),  # transformers 5.0
]

BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def tokenizer(folder: Path) -> Any:  # Any, here and below: neither library types its models
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(WORDS)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def text_encoder() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ends: dict[str, Any] = {
        "bos_token_id": len(WORDS) - 2,
        "eos_token_id": len(WORDS) - 1,
        "pad_token_id": len(WORDS) - 1,
    }
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), max_position_embeddings=16, **sizes, **ends
    )
    return transformers.CLIPTextModel(config)


def stable_diffusion(folder: Path) -> Any:
    """The smallest that there can be: CLIP, a UNet, an autoencoder."""
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": 24, "attention_head_dim": 4}
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer(folder / "words"),
        text_encoder=text_encoder(),
        unet=diffusers.UNet2DConditionModel(
            down_block_types=down, up_block_types=up, **sizes, **BLOCKS
        ),
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **BLOCKS,
        ),
        scheduler=diffusers.DDIMScheduler(
            num_train_timesteps=20, steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ddpm(folder: Path) -> Any:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DModel(
        sample_size=8, down_block_types=down, up_block_types=up, attention_head_dim=4, **BLOCKS
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=10))


def images(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = (
        {"prompt": "a cat", "height": 16, "width": 16} if hasattr(pipe, "tokenizer") else {}
    )
    generator = torch.Generator().manual_seed(1)
    return torch.as_tensor(
        pipe(**given, num_inference_steps=3, generator=generator, output_type="np").images
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {"stable diffusion": stable_diffusion, "ddpm": ddpm}

DEVICE_MAPS: dict[str, Any] = {
    "none": None,
    "cpu": "cpu",
    "unet": {"": "cpu", "unet": "disk"},
    "part": {"": "disk", "unet.mid_block": "cpu"},
    "disk": {"": "disk"},
}
WITH_ACCELERATOR: dict[str, Any] = {
    "all there": {"": 0},
    "unet there": {"": "cpu", "unet": 0},
    "all but a part there": {"": 0, "unet.mid_block": "disk"},
    "a part there": {"": "disk", "unet.mid_block": "cpu", "unet.conv_in": 0},
}


def saved(folder: Path, make: Callable[[Path], Any] = stable_diffusion, **options: Any) -> Any:
    """A pipeline that is saved in *folder*, as Diffusers loads it."""
    torch.manual_seed(0)
    make(folder.parent / f"{folder.name}-parts").save_pretrained(folder, **options)
    return aligned(diffusers.DiffusionPipeline.from_pretrained(folder))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pipeline"


def streaming(pipe: Any) -> set[str]:
    """The parts of *pipe* that stream."""
    parts: Mapping[str, Any] = pipe.components
    models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {
        name
        for name, model in models.items()
        if any(isinstance(weight, Streamed) for weight in model.parameters())
    }


@pytest.mark.parametrize(
    "device_map",
    [*DEVICE_MAPS, *(pytest.param(each, marks=needs_one) for each in WITH_ACCELERATOR)],
)
@pytest.mark.parametrize("name", PIPELINES)
def test_images_are_those_of_the_pipeline_that_diffusers_loads(
    name: str, device_map: str, folder: Path
) -> None:
    theirs, asked = saved(folder, PIPELINES[name]), (DEVICE_MAPS | WITH_ACCELERATOR)[device_map]
    ours = from_pretrained(folder, asked, ring=2)
    assert type(ours) is type(theirs)
    assert {name: type(part) for name, part in ours.components.items()} == {
        n: type(p) for n, p in theirs.components.items()
    }
    assert ("unet" in streaming(ours)) == (
        device_map not in ("none", "cpu", "all there", "unet there")
    )
    assert ours.hf_device_map == ({"": "cpu"} if device_map == "cpu" else asked)
    theirs.to(ours.device)
    for _ in range(2):
        assert torch.equal(images(ours), images(theirs))
    close(ours)
    assert torch.equal(images(ours), images(theirs))


def test_explain_tells_of_each_model_of_a_pipeline_where_it_is_and_of_the_one_ring(
    folder: Path,
) -> None:
    saved(folder)
    pipe = from_pretrained(folder, {"": "cpu", "unet": "disk", "text_encoder": "disk"}, ring=2)
    for _ in range(2):
        images(pipe)
    told = explain(pipe, rates=Rates(disk=1e9, compute=1e9))
    assert isinstance(told, PipelineExplanation)
    assert set(told.models) == {"text_encoder", "unet", "vae"}
    assert (
        {name for name, each in told.models.items() if each.predicted}
        == streaming(pipe)
        == {"text_encoder", "unet"}
    )
    assert told.ring == told.models["unet"].ring == told.models["text_encoder"].ring
    assert {part.why for part in told.models["vae"].parts} == {"the map says so"}
    assert {part.place for part in told.models["unet"].parts if part.why == "the map says so"} == {
        "disk"
    }
    measured = told.models["unet"].measured
    assert measured is not None
    assert (
        measured.forwards == 5
    )  # of two images with three steps each, of which the first does not count
    document = json.loads(json.dumps(told.as_dict(), allow_nan=False))
    assert list(document) == ["pipeline", "ring", "models"]
    lines = str(told).splitlines()
    assert lines[0].startswith("StableDiffusionPipeline: 3 models, ")
    assert lines[0].endswith(f"through one ring of {format_size(told.ring)}")
    assert all(f"{name}: {each}".splitlines()[0] in lines for name, each in told.models.items())
    close(pipe)


def test_a_map_is_made_for_all_models_at_once_and_the_largest_comes_first(folder: Path) -> None:
    theirs = saved(folder)
    size = theirs.unet.get_memory_footprint()
    assert size > theirs.text_encoder.get_memory_footprint()
    ours = from_pretrained(folder, "sequential", max_memory={"cpu": size + 100_000})
    assert ours.hf_device_map["unet"] == "cpu"
    assert "disk" in ours.hf_device_map.values()
    assert torch.equal(images(ours), images(theirs))
    with pytest.raises(ValueError, match="device mapping"):
        ours.to("cpu")


def test_its_models_stream_through_one_ring(folder: Path) -> None:
    saved(folder)
    pipe = from_pretrained(folder, "disk")
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    attached = [each for model in models for *_, each in attachments(model)]
    assert len({each.stream for each in attached if isinstance(each, Pager)}) == 1
    assert len([each for each in attached if isinstance(each, Sources)]) == len(
        models
    )  # files are looked at for each
    assert len({each for each in attached if isinstance(each, RoundTrip)}) == len(models)


def test_a_name_that_no_model_has_is_a_warning(folder: Path) -> None:
    saved(folder)
    with pytest.warns(UserWarning, match="no part that the device map calls 'unte'"):
        from_pretrained(folder, {"": "cpu", "unte": "disk"})
    with pytest.raises(LoadError, match=r"no device to .* of the model's tensors: 'vae\."):
        from_pretrained(folder, {"unet": "disk", "text_encoder": "cpu"})


def test_what_is_given_for_a_part_is_taken_as_it_is(folder: Path) -> None:
    theirs = saved(folder)
    unet = from_pretrained(folder, "disk", "bf16", subfolder="unet")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=20)
    ours = from_pretrained(folder, "cpu", unet=unet, scheduler=scheduler, tokenizer=None)
    assert ours.unet is unet
    assert streaming(ours) == {"unet"}
    assert ours.scheduler.__dict__ == scheduler.__dict__
    assert ours.tokenizer is None
    assert torch.equal(ours.vae.encoder.conv_in.weight, theirs.vae.encoder.conv_in.weight)
    with pytest.raises(LoadError, match="no part called 'unett'") as refused:
        from_pretrained(folder, unett=unet)
    assert "'unet'" in str(refused.value.hint)


def test_a_type_is_given_to_all_models(folder: Path) -> None:
    saved(folder)
    theirs = aligned(
        diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    )
    ours = from_pretrained(folder, "disk", torch_dtype=torch.bfloat16, use_safetensors=True)
    assert {ours.unet.dtype, ours.vae.dtype, ours.text_encoder.dtype} == {torch.bfloat16}
    assert torch.equal(images(ours), images(theirs))


def test_a_variant_is_for_the_models_that_have_it_and_their_types_are_as_stored(
    folder: Path,
) -> None:
    saved(folder)
    torch.manual_seed(1)
    other = stable_diffusion(folder.parent / "other-parts").to(torch.float16)
    other.unet.save_pretrained(folder / "unet", variant="fp16")
    other.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16")
    edit(folder / "text_encoder" / "config.json", dtype="float32", torch_dtype="float32")
    ours = from_pretrained(folder, "disk", variant="fp16")
    assert (ours.unet.dtype, ours.text_encoder.dtype, ours.vae.dtype) == (
        torch.float16,
        torch.float16,
        torch.float32,
    )
    assert torch.equal(ours.unet.conv_in.weight.read(), other.unet.conv_in.weight)
    theirs = aligned(
        diffusers.DiffusionPipeline.from_pretrained(
            folder, variant="fp16", torch_dtype=torch.float32
        )
    )
    assert torch.equal(
        images(from_pretrained(folder, "disk", "float32", variant="fp16")), images(theirs)
    )
    with pytest.raises(LoadError, match="`variant=int8`"):
        from_pretrained(folder, variant="int8")


def test_one_of_its_models_is_loaded_alone_by_its_folder(folder: Path) -> None:
    theirs = saved(folder)
    unet, encoder = (
        from_pretrained(folder, "disk", subfolder="unet"),
        from_pretrained(folder, "disk", subfolder="text_encoder"),
    )
    assert (type(unet), type(encoder)) == (type(theirs.unet), type(theirs.text_encoder))
    theirs.unet, theirs.text_encoder, reference = unet, encoder, images(theirs)
    assert torch.equal(images(theirs), reference)
    with pytest.raises(LoadError, match=r"scheduler has no config\.json"):
        from_pretrained(folder, subfolder="scheduler")


def test_a_model_that_lies_beside_the_index_is_found_there(folder: Path) -> None:
    theirs = saved(folder, ddpm)
    for file in (folder / "unet").iterdir():
        shutil.move(file, folder / file.name)
    shutil.move(folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    for part in ("unet", "scheduler"):
        (folder / part).rmdir()
    assert torch.equal(images(from_pretrained(folder, "disk")), images(theirs))


def test_what_is_told_is_told_by_the_names_of_the_models(folder: Path) -> None:
    saved(folder)
    pipe, info = from_pretrained(folder, output_loading_info=True)
    assert info.keys() == {"unet", "vae", "text_encoder"}
    assert not any(found["missing_keys"] or found["unexpected_keys"] for found in info.values())
    assert pipe.config._name_or_path == str(folder)


def test_a_pipeline_in_the_cache_of_the_hub_is_found_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder.parent / "hub"))
    monkeypatch.setattr("socket.socket.connect", None)
    repository, commit = folder.parent / "hub" / "models--someone--tiny", "f" * 40
    shutil.move(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    ours = from_pretrained("someone/tiny", "disk")
    assert torch.equal(images(ours), images(theirs))
    assert ours.config._name_or_path == "someone/tiny"
    assert type(from_pretrained("someone/tiny", subfolder="vae")) is type(theirs.vae)


CODE = """
import diffusers

class Twice(diffusers.DDPMPipeline):
    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        found.images = found.images * 2
        return found
"""
PART = """
import diffusers

class Odd(diffusers.UNet2DModel):
    pass
"""


def of_own_class(folder: Path) -> None:
    (folder / "twice.py").write_text(CODE)
    edit(folder / "model_index.json", _class_name=["twice", "Twice"])


def with_own_part(folder: Path) -> None:
    (folder / "unet" / "odd.py").write_text(PART)
    edit(folder / "model_index.json", unet=["odd", "Odd"])
    edit(folder / "unet" / "config.json", _class_name="Odd")


def with_part_of_a_known_name(folder: Path) -> None:
    """Diffusers looks for code first."""
    (folder / "unet" / "diffusers.py").write_text(PART)


def with_part_of_any_module(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["antigravity", "Odd"])


@pytest.mark.parametrize(
    "spoil", [of_own_class, with_own_part, with_part_of_a_known_name, with_part_of_any_module]
)
def test_code_that_is_not_trusted_does_not_run(
    spoil: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, ddpm)
    spoil(folder)
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder.parent / "modules")
    )
    with pytest.raises(
        LoadError, match="asks for code that is neither of Diffusers nor of Transformers"
    ) as refused:
        from_pretrained(folder)
    assert refused.value.hint is not None
    assert "trust_remote_code=True" in refused.value.hint
    assert not (folder.parent / "modules").exists()


def test_a_pipeline_of_code_that_is_trusted_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved(folder, ddpm)
    of_own_class(folder)
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder.parent / "modules")
    )
    monkeypatch.syspath_prepend(folder.parent / "modules")
    ours = from_pretrained(folder, "disk", trust_remote_code=True)
    assert streaming(ours) == {"unet"}
    assert torch.equal(images(ours), images(theirs) * 2)


def test_a_model_of_code_that_is_trusted_is_read_and_stays_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved(folder, ddpm)
    with_own_part(folder)
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder.parent / "modules")
    )
    monkeypatch.syspath_prepend(folder.parent / "modules")
    with pytest.warns(UserWarning, match=r"in memory, and not streamed.*: 'unet\.conv_in\.weight'"):
        ours = from_pretrained(folder, "disk", trust_remote_code=True)
    assert type(ours.unet).__name__ == "Odd"
    assert torch.equal(images(ours), images(theirs))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda folder: (folder / "vae" / "config.json").unlink(),
        r"vae has no config\.json",
    ),
    "no weights": (
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae.* holds no weights",
    ),
    "no class": (
        lambda folder: edit(folder / "model_index.json", _class_name="NoPipeline"),
        "Diffusers .* makes no pipeline of it",
    ),
    "no such model": (
        lambda folder: edit(folder / "model_index.json", unet=["diffusers", "UNet9"]),
        "makes no pipeline of it",
    ),
    "no scheduler": (
        lambda folder: edit(folder / "model_index.json", scheduler=[None, None]),
        "makes no pipeline of it",
    ),
    "broken index": (
        lambda folder: (folder / "model_index.json").write_text("{"),
        r"model_index\.json is no JSON",
    ),
    "quantised": (
        lambda folder: edit(
            folder / "unet" / "config.json", quantization_config={"quant_method": "gguf"}
        ),
        "unet is quantised with 'gguf'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_holds_no_such_pipeline_is_refused_with_a_sentence(
    fault: str, folder: Path
) -> None:
    spoil, sentence = FAULTS[fault]
    saved(folder)
    spoil(folder)
    with pytest.raises((LoadError, FormatError), match=sentence):
        from_pretrained(folder)


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_a_lora_is_loaded_and_taken_off_as_from_a_pipeline_in_memory(
    device_map: str, folder: Path, tmp_path: Path
) -> None:
    peft: Any = pytest.importorskip("peft", reason="Diffusers loads adapters by it")
    theirs = saved(folder)
    ours = from_pretrained(folder, DEVICE_MAPS[device_map], ring=2)
    bare = images(ours)
    torch.manual_seed(3)
    adapted = type(theirs.unet).from_pretrained(folder / "unet")
    adapted.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    theirs.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=peft.get_peft_model_state_dict(adapted)
    )
    for pipe in (ours, theirs):
        pipe.load_lora_weights(tmp_path / "lora")
    found = [
        {name: each for name, each in pipe.unet.state_dict().items() if "lora_" in name}
        for pipe in (ours, theirs)
    ]
    assert found[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], each) for name, each in found[1].items())
    with_adapter = images(ours)
    assert not torch.equal(with_adapter, bare)
    torch.testing.assert_close(with_adapter, images(theirs))
    ours.unload_lora_weights()
    assert torch.equal(images(ours), bare)
    close(ours)
