"""Checkpoints that a library has quantised: which of their weights must be in memory, whatever the
device map says.

1. bitsandbytes turns quantised weights into objects whose state is more than their bytes. They are
   read, and stay in memory; the other weights of the model stream.
2. compressed-tensors decompresses all weights of a model in its first forward, and chooses their
   place itself. None of them streams.
3. Other libraries create plain tensors, which stream, or compute tensors from the checkpoint, which
   do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def method_of(fields: Mapping[str, object]) -> str | None:
    """The library that quantised the model whose config.json has *fields*, by its own name; None if
    none did.
    """
    match fields.get("quantization_config"):
        case {"quant_method": str(method)}:
            return method
        case {"load_in_4bit": True} | {"load_in_8bit": True}:  # as older ones say it
            return "bitsandbytes"
    return None


def packed_names(names: Iterable[str]) -> set[str]:
    """Those of *names* in a checkpoint of bitsandbytes that become one object with the tensors
    beside them.
    """
    names = list(names)
    layers = {
        _layer_of(name) for name in names if ".weight.quant_state." in name or name.endswith(".SCB")
    }
    return {name for name in names if _layer_of(name) in layers and not name.endswith(".bias")}


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is an object of bitsandbytes."""
    return type(tensor).__module__.partition(".")[0] == "bitsandbytes"


def expands_itself(model: nn.Module) -> bool:
    """Whether compressed-tensors will expand the weights of *model* in its first forward."""
    return hasattr(model, "ct_decompress_hook")


def _layer_of(name: str) -> str:
    """The layer that has the tensor *name*, which may be one of those that describe its weight."""
    layer, described, _ = name.partition(".weight.")
    return layer if described else name.rpartition(".")[0]
