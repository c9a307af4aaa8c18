"""Models and pipelines of Diffusers by name: what is computed, and which files come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hub import Hub
from shardkit.errors import LoadError, OverBudget
from shardkit.load import from_pretrained

diffusers: Any = pytest.importorskip("diffusers", reason="its pipelines are loaded here")
transformers: Any = pytest.importorskip("transformers")
huggingface_hub: Any = pytest.importorskip("huggingface_hub")

NAME = "org/pipeline"


@pytest.fixture
def pipeline(tmp_path: Path) -> dict[str, bytes]:
    """The files of a pipeline of two models, with twins of other kinds beside the weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    made = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    for safe in (True, False):
        made.save_pretrained(tmp_path / "saved", safe_serialization=safe)
    made.to(torch.float16).save_pretrained(tmp_path / "saved", variant="fp16")
    folder = tmp_path / "saved"
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    return files | {"unet/model.onnx": b"0", "v1.ckpt": b"0" * 100, "README.md": b"#"}


def image(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=2, generator=generator, output_type="np").images


def fetched(cache: Path) -> set[str]:
    folder = next(cache.glob("models--org--pipeline/snapshots/*"))
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_is_that_of_its_folder_and_of_the_files_that_diffusers_takes(
    hub: Hub, pipeline: dict[str, bytes], tmp_path: Path, variant: str | None
) -> None:
    hub.add(NAME, pipeline)
    theirs = from_pretrained(tmp_path / "saved", variant=variant, dtype=torch.float32)
    ours = from_pretrained(
        NAME, {"": "cpu", "unet.up_blocks": "disk"}, torch.float32, variant=variant
    )
    assert (image(ours) == image(theirs)).all()
    assert ours.config._name_or_path == NAME
    diffusers.DiffusionPipeline.download(NAME, variant=variant, cache_dir=tmp_path / "theirs")
    assert fetched(tmp_path / "hub") == fetched(tmp_path / "theirs")


def test_a_model_of_a_pipeline_comes_alone(
    hub: Hub, pipeline: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, pipeline)
    from_pretrained(NAME, "disk", subfolder="unet")
    assert fetched(tmp_path / "hub") == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_a_part_that_is_given_is_not_fetched(
    hub: Hub, pipeline: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, pipeline)
    unet = from_pretrained(tmp_path / "saved", subfolder="unet")
    ours = from_pretrained(NAME, unet=unet)
    assert ours.unet is unet
    assert not {name for name in fetched(tmp_path / "hub") if "diffusion_pytorch_model" in name}


def test_a_pipeline_that_will_not_fit_is_refused_before_its_weights(
    hub: Hub, pipeline: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, pipeline)
    with pytest.raises(OverBudget):
        from_pretrained(NAME, "auto", max_memory={"cpu": "2KB"})
    with pytest.raises(LoadError, match="has no part called 'vae'"):
        from_pretrained(NAME, vae=None)
    assert not {name for name in fetched(tmp_path / "hub") if name.endswith(".safetensors")}


@pytest.mark.parametrize("ending", ["killed", "refused"])
def test_a_pipeline_of_which_only_small_files_came_is_completed(
    hub: Hub,
    pipeline: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    commit = hub.add(NAME, pipeline)
    if ending == "killed":
        with monkeypatch.context() as patch:
            patch.setattr("shardkit.load.hub.download.fetch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                from_pretrained(NAME, "disk")
    else:
        with pytest.raises(OverBudget):
            from_pretrained(NAME, "auto", max_memory={"cpu": "2KB"})
    with pytest.raises(LoadError, match=r"missing: '?unet/"):
        from_pretrained(NAME, "disk", revision=commit, local_files_only=True)
    with pytest.raises(LoadError, match="revision 'main' is not complete"):
        from_pretrained(NAME, "disk", local_files_only=True)
    ours = from_pretrained(NAME, "cpu", torch.float32)
    theirs = from_pretrained(tmp_path / "saved", "cpu", torch.float32)
    assert (image(ours) == image(theirs)).all()
    assert (image(from_pretrained(NAME, "cpu", torch.float32)) == image(theirs)).all()
    from_pretrained(NAME, "disk", local_files_only=True)


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt
