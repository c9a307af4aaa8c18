"""The models of the benchmarks: the shape of Llama with 40 layers, in two widths of about as many
bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LAYERS, VOCABULARY = 40, 32000


@dataclass(frozen=True, slots=True)
class Llama:
    """One width.

    Attributes:
        hidden: features between layers.
        inner: features inside the feed-forward part.
        dtype: the type of the weights, as torch calls it.
        plain: name of its checkpoint as torch saves it.
        layout: name of the folder that `shardkit offload-prep` makes of that.
    """

    hidden: int
    inner: int
    dtype: str
    plain: str
    layout: str

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights, in the order of the model."""
        yield "model.embed_tokens.weight", (VOCABULARY, self.hidden)
        for number in range(LAYERS):
            layer = f"model.layers.{number}"
            yield from (
                (f"{layer}.self_attn.{part}_proj.weight", (self.hidden, self.hidden))
                for part in "qkvo"
            )
            yield from (
                (f"{layer}.mlp.{part}_proj.weight", (self.inner, self.hidden))
                for part in ("gate", "up")
            )
            yield f"{layer}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield from (
                (f"{layer}.{part}_layernorm.weight", (self.hidden,))
                for part in ("input", "post_attention")
            )
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (VOCABULARY, self.hidden)

    def state(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Random weights, each tensor a storage of its own."""
        import torch

        made = torch.Generator().manual_seed(0)
        wanted = dtype or getattr(torch, self.dtype)
        return {
            name: torch.randn(shape, generator=made, dtype=torch.float32).to(wanted)
            for name, shape in self.shapes()
        }

    def empty(self) -> Any:  # Any: transformers is imported by those who need it only
        """The model, without weights."""
        import torch
        from accelerate import init_empty_weights  # type: ignore[import-untyped]  # as it comes
        from transformers import LlamaConfig, LlamaForCausalLM

        dtype = getattr(torch, self.dtype)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
            dtype=dtype,
        )
        with init_empty_weights():
            model: Any = LlamaForCausalLM(config)
            return model.to(dtype).eval()


WIDE = Llama(2048, 5632, "bfloat16", "big.bin", "offload")  # 2.19 billion weights, 4.37 GB
NARROW = Llama(
    1408, 4096, "float32", "narrow.bin", "offload-narrow"
)  # 1.10 billion weights, 4.39 GB
BY_DTYPE = {model.dtype: model for model in (WIDE, NARROW)}


def suited() -> Llama:
    """The one whose arithmetic this processor has: where it has none in bf16, that takes longer
    than any disk.
    """
    told = Path("/proc/cpuinfo")
    has = "bf16" in told.read_text() if told.exists() else platform.machine() == "arm64"
    return WIDE if has else NARROW
