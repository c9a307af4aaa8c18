"""The accelerator that there is, for tests that need one: CUDA, ROCm, XPU, or another that torch
was given.

MPS is left out: its memory is that of the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

_FOUND = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
_THERE = _FOUND is not None and _FOUND.type != "mps"
KIND = _FOUND.type if _FOUND is not None and _THERE else "cuda"
COUNT = torch.accelerator.device_count() if _THERE else 0
device: Any = torch.get_device_module(KIND)  # Any: each kind has a module of its own

needs_one = [pytest.mark.gpu, pytest.mark.skipif(COUNT == 0, reason="there is no accelerator")]
needs_two = pytest.mark.skipif(COUNT < 2, reason="there are no two accelerators")

RUNNERS = ["cpu", pytest.param(f"{KIND}:0", id="accelerator", marks=needs_one)]
"""The devices that run models, for what is to hold on each. Bits are compared with what the same
device computes.
"""
TIERS = ["cpu", "disk", pytest.param(0, id="accelerator", marks=needs_one)]
"""The places of weights in a device map."""


def allocated() -> int:
    """Bytes that tensors take in the memory of the accelerators, when all is done that was issued
    to them.
    """
    if COUNT:
        device.synchronize()
    return sum(device.memory_allocated(number) for number in range(COUNT))
