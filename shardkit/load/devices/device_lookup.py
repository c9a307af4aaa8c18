"""Look up devices: what a device map says of a part of a model, and what torch calls a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shardkit.errors import LoadError
from shardkit.load.devices.budgets import Device, accelerator
from shardkit.printable import shown


def device_of(name: str, device_map: Mapping[str, Device]) -> Device:
    """Return the device of the tensor or module *name*: its own, or that of the nearest enclosing
    module.

    >>> device_of("layers.0.weight", {"": "cpu", "layers": 0})
    0

    Raises:
        LoadError: the map has no device for it.
    """
    around = name
    while around not in device_map:
        if not around:
            raise LoadError(
                f"the device map has no device for {shown(name)}",
                hint='give the rest of the model a device, as in {"": "cpu"}',
            )
        around = around.rpartition(".")[0]
    return device_map[around]


def main_device(device_map: Mapping[str, Device]) -> torch.device:
    """Where a model with such a map runs: on its first accelerator, or else on the CPU.

    >>> main_device({"embed": "disk", "layers": "cpu"})
    device(type='cpu')

    Raises:
        LoadError: there is no such accelerator.
    """
    accelerators = [device for device in device_map.values() if device not in ("cpu", "disk")]
    return torch_device(accelerators[0] if accelerators else "cpu")


def torch_device(device: Device | torch.device) -> torch.device:
    """*device* with its number, as tensors on it say it; a number is that of an accelerator.

    >>> torch_device("cpu")
    device(type='cpu')

    Raises:
        LoadError: there is no such device.
    """
    if isinstance(device, int):
        there = accelerator()
        if there is None:
            raise LoadError(
                f"there is no accelerator {device}: this machine has none",
                hint='use "cpu" and "disk" only',
            )
        device = f"{there.type}:{device}"
    try:
        return torch.empty(0, device=device).device
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch raises what it likes, device by device
        raise LoadError(
            f"torch cannot use the device {str(device)!r} here: {error}",
            hint='give another, as in "cpu" or "cuda:0"',
        ) from None
