"""The checkpoints that the benchmarks run on, made once and kept: ``python benchmarks/checkpoints.py NAME FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INNER, VOCABULARY = 40, 2048, 5632, 32000  # 2.19 billion weights: 4.37 GB in bf16


def llama(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state dict of the shape of Llama with random weights, each tensor a storage of its own."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for name, shape in llama_shapes()}


def llama_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the model."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        yield from ((f"{layer}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)) for part in "qkvo")
        yield from ((f"{layer}.mlp.{part}_proj.weight", (INNER, HIDDEN)) for part in ("gate", "up"))
        yield f"{layer}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield from ((f"{layer}.{part}_layernorm.weight", (HIDDEN,)) for part in ("input", "post_attention"))
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def save_zip(path: Path) -> None:
    """As torch saves today."""
    torch.save(llama(torch.bfloat16), path)


def save_legacy(path: Path) -> None:
    """As torch saved before 1.6."""
    torch.save(llama(torch.bfloat16), path, _use_new_zipfile_serialization=False)


def save_safetensors(path: Path) -> None:
    """As its own package saves."""
    save_file(llama(torch.bfloat16), path)


def save_fp32(path: Path) -> None:
    """Twice the bytes."""
    torch.save(llama(torch.float32), path)


def save_tiny(path: Path) -> None:
    """50,000 tensors of 64 bytes."""
    torch.save({f"layers.{number}.weight": torch.full((16,), float(number)) for number in range(50_000)}, path)


def save_index(path: Path) -> None:
    """100,000 experts in 40 shards, and their index."""
    path.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(40):
        name = f"model-{shard + 1:05d}-of-00040.safetensors"
        tensors = {f"model.layers.{shard}.mlp.experts.{number}.weight": torch.zeros(4) for number in range(2500)}
        save_file(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1_600_000}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


SAVERS = {
    "big.bin": save_zip,
    "legacy.bin": save_legacy,
    "big.safetensors": save_safetensors,
    "big-fp32.bin": save_fp32,
    "tiny.pt": save_tiny,
    "experts": save_index,
}


if __name__ == "__main__":
    SAVERS[sys.argv[1]](Path(sys.argv[2]) / sys.argv[1])
