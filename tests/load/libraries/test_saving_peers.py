"""Models that stream are saved by their own libraries: the files are those of a model in memory,
and no weight is held for it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libraries import peer
from shardkit.errors import LoadError
from shardkit.load import (
    close,
    dispatch_model,
    from_pretrained,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    save,
)
from shardkit.load.lazy.streamed_weight import Streamed
from truth import values

accelerate: Any = peer(
    "accelerate"
)  # Any, here and below: these libraries leave their models half typed
diffusers: Any = peer("diffusers")
transformers: Any = pytest.importorskip("transformers", reason="its models are saved here")
pytestmark = [
    pytest.mark.skipif(
        not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
    ),
    pytest.mark.filterwarnings(
        "ignore:Attempting to save a model with offloaded modules:UserWarning"
    ),
]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DISK: dict[str, Any] = {"": "disk"}
MIXED: dict[str, Any] = {"": "disk", "model.embed_tokens": "cpu", "model.layers.1": "cpu"}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more))


def qwen_moe() -> Any:
    experts = {
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "experts, one by one in the checkpoint": qwen_moe,
    "mixtral": mixtral,
}


def saved(make: Callable[[], Any], folder: Path) -> Any:
    """A model with random weights, and the folder that it saves."""
    torch.manual_seed(0)
    made = make().eval()
    made.save_pretrained(folder)
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: values(each)
        for path in folder.glob("*.safetensors")
        for name, each in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("device_map", [DISK, MIXED, None], ids=["disk", "mixed", "in memory"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_writes_the_files_of_the_model_in_memory(
    name: str, device_map: Any, dtype: str, tmp_path: Path
) -> None:
    kind = type(saved(MODELS[name], tmp_path / "source"))
    kind.from_pretrained(tmp_path / "source", dtype=dtype).save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "source", device_map, dtype)
    ours.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    close(ours)


@pytest.mark.parametrize("name", MODELS)
def test_shards_are_cut_as_transformers_cuts_those_of_its_own_offloaded_models(
    name: str, tmp_path: Path
) -> None:
    kind = type(saved(MODELS[name], tmp_path / "source"))
    theirs = kind.from_pretrained(tmp_path / "source")
    theirs.save_pretrained(tmp_path / "in memory", max_shard_size="30KB")
    theirs.hf_device_map = {
        "": "disk"
    }  # by which it tells an offloaded model; its weights are here all the same
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ours = from_pretrained(tmp_path / "source", DISK)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert weights(tmp_path / "ours") == weights(tmp_path / "in memory")
    close(ours)


@pytest.mark.parametrize("shard", ["50GB", "30KB"], ids=["one file", "shards"])
def test_a_model_is_saved_over_the_folder_that_it_streams_from(shard: str, tmp_path: Path) -> None:
    saved(qwen_moe, tmp_path / "model").save_pretrained(tmp_path / "model", max_shard_size=shard)
    if shard != "50GB":
        (tmp_path / "model" / "model.safetensors").unlink()
    before = weights(tmp_path / "model")
    ours = from_pretrained(tmp_path / "model", DISK, "float32")
    ours.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "model.safetensors").unlink(missing_ok=True)
    assert weights(tmp_path / "model") == before
    close(ours)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}],
    ids=["one", "shards", "bin"],
)
def test_accelerate_writes_the_files_of_the_model_in_memory(options: Any, tmp_path: Path) -> None:
    kind = type(saved(lambda: llama(tie_word_embeddings=True), tmp_path / "source"))
    ours = from_pretrained(tmp_path / "source", DISK)
    accelerate.Accelerator().save_model(ours, tmp_path / "ours", **options)
    accelerate.Accelerator().save_model(
        kind.from_pretrained(tmp_path / "source"), tmp_path / "theirs", **options
    )
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    close(ours)


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


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "10KB"}, {"safe_serialization": False}],
    ids=["one", "shards", "bin"],
)
def test_diffusers_writes_the_files_of_the_model_in_memory(options: Any, tmp_path: Path) -> None:
    kind = type(saved(unet, tmp_path / "source"))
    ours = from_pretrained(tmp_path / "source", DISK)
    ours.save_pretrained(tmp_path / "ours", **options)
    kind.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "theirs", **options)
    ours_files, their_files = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours_files == their_files
    close(ours)


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
def test_diffusers_writes_the_files_of_a_pipeline_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "source")
    ours = from_pretrained(tmp_path / "source", DISK)
    ours.save_pretrained(tmp_path / "ours")
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "theirs")
    ours_files, their_files = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours_files.keys() == their_files.keys()
    assert all(
        ours_files[name] == their_files[name]
        for name in ours_files
        if name.endswith(".safetensors")
    )
    close(ours)


def test_a_sentence_transformer_is_saved_with_all_of_its_modules(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="it saves its modules itself")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from tokenizers import Tokenizer, models

    sizes = {
        "vocab_size": 9,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    saved(lambda: transformers.BertModel(transformers.BertConfig(**sizes)), tmp_path / "bert")
    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(9)}, unk_token="w0")
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(
        tmp_path / "bert"
    )
    parts = [Transformer(str(tmp_path / "bert")), Pooling(32), Dense(32, 16)]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(tmp_path / "theirs"))
    ours = SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    expected = ours.encode(["w3 w4"])
    dispatch_model(ours, {"": "disk"}, offload_dir=tmp_path / "offload")
    assert any(isinstance(each, Streamed) for each in ours[2].parameters())
    assert (ours.encode(["w3 w4"]) == expected).all()
    assert ours.device == torch.device("cpu")
    ours.save_pretrained(str(tmp_path / "ours"))
    ours_files, their_files = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours_files.keys() == their_files.keys()
    assert all(
        ours_files[name] == their_files[name]
        for name in ours_files
        if name.endswith(".safetensors")
    )
    close(ours)


def test_a_model_that_load_checkpoint_and_dispatch_loaded_is_saved_too(tmp_path: Path) -> None:
    theirs = saved(llama, tmp_path / "source")
    with init_empty_weights():
        ours = type(theirs)(theirs.config)
    load_checkpoint_and_dispatch(ours, tmp_path / "source", DISK)
    ours.save_pretrained(tmp_path / "ours")
    assert weights(tmp_path / "ours") == weights(tmp_path / "source")
    close(ours)


SAVE = """
import resource, sys, warnings
from pathlib import Path
import torch, transformers
from shardkit.load import from_pretrained

warnings.simplefilter("ignore")
source, out, dtype, grows = sys.argv[1:]
model = from_pretrained(source, {"": "disk"}, dtype, ring=2)
model(torch.tensor([[1, 2, 3]]))
held = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (held + int(grows), held + int(grows)))
model.save_pretrained(out)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is there on Linux")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_large_model_is_saved_in_the_memory_of_a_few_weights(dtype: str, tmp_path: Path) -> None:
    sizes = SIZES | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    saved(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        tmp_path / "source",
    )
    nbytes = (tmp_path / "source" / "model.safetensors").stat().st_size
    grows = 48 << 20
    assert nbytes > 3 * grows
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SAVE,
            str(tmp_path / "source"),
            str(tmp_path / "out"),
            dtype,
            str(grows),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "source", dtype=dtype
    ).state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], each) for name, each in theirs.items())


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
def test_a_pipeline_is_refused_with_what_saves_it(tmp_path: Path) -> None:
    pipeline = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    with pytest.raises(LoadError, match="'DDPMPipeline' is a pipeline of several") as refused:
        save(pipeline, tmp_path / "out")
    assert "pipeline.save_pretrained(folder)" in str(refused.value.hint)
    with pytest.raises(LoadError, match=r"'dict' is not a torch\.nn\.Module"):
        save({}, tmp_path / "out")  # type: ignore[arg-type]  # a state dict in the place of a model
    assert not (tmp_path / "out").exists()
