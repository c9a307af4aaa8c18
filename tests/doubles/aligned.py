"""Peers whose weights lie where ours do, so that their results can be compared bit by bit.

The BLAS that torch calls (MKL) picks kernels by the address of a matrix: on processors with
AVX-512, products with one row differ in their last bits between a matrix at a multiple of 64 bytes
and the same matrix elsewhere. Shardkit and torch put weights at multiples of 64 bytes.
Transformers, Diffusers and Accelerate leave them where they lie in a safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

ALIGNMENT = 64


def aligned(peer: Any) -> Any:  # Any: a model or a pipeline, which the libraries leave untyped
    """Return *peer*, a model or a pipeline, after moving its weights and buffers to multiples of 64
    bytes.
    """
    with torch.no_grad():
        for tensor in _off(peer):
            tensor.data = tensor.detach().clone()
    assert not list(_off(peer)), "torch gives memory at other addresses than it did"
    return peer


def _off(peer: Any) -> Iterator[torch.Tensor]:
    """The tensors of *peer* in main memory that lie elsewhere; lazy ones, which lie in a file, are
    none of them.
    """
    models = (
        [peer]
        if isinstance(peer, nn.Module)
        else [part for part in peer.components.values() if isinstance(part, nn.Module)]
    )
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if (
                type(tensor) in (torch.Tensor, nn.Parameter)
                and tensor.device.type == "cpu"
                and tensor.data_ptr() % ALIGNMENT
            ):
                yield tensor
