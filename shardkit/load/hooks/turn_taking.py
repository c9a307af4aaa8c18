"""Whole models that take turns on a device: each is moved there for its first forward, and back
when it is told to.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from shardkit.load.devices.budgets import accelerator, device_key
from shardkit.load.devices.device_lookup import torch_device
from shardkit.load.hooks.device_moves import moved
from shardkit.load.modules.torch_modes import eager

_Model = TypeVar("_Model", bound=nn.Module)


class UserCpuOffloadHook:
    """What `cpu_offload_with_hook` gives to move its model with.

    Attributes:
        model: the model.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, previous: UserCpuOffloadHook | None
    ) -> None:
        """Attach to *model*, which is moved to *device* when it is called, after *previous* has
        gone from there.
        """
        self.model = model
        self._device = device
        self._previous = previous
        self._handle = model.register_forward_pre_hook(self.bring, with_kwargs=True)

    def offload(self) -> None:
        """Move the model to main memory."""
        self.model.to("cpu")

    def remove(self) -> None:
        """Leave the model where it is from now on."""
        self._handle.remove()

    @eager
    def bring(
        self,
        module: nn.Module,
        args: tuple[Any, ...],  # Any: whatever a model takes
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook."""
        if self._previous is not None:
            self._previous.offload()
        module.to(self._device)
        return moved(args, self._device), moved(kwargs, self._device)


def cpu_offload_with_hook(
    model: _Model,
    execution_device: str | int | torch.device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[_Model, UserCpuOffloadHook]:
    """Keep *model* in main memory until it is called; then it moves to *execution_device*, and
    stays.

    Args:
        model: the model. It is moved, and returned.
        execution_device: what runs it; None for the accelerator that there is, or else the CPU.
        prev_module_hook: that of the model which makes room when this one is called.

    Returns:
        The model, and what moves it back.

    Raises:
        LoadError: there is no such device.
    """
    if execution_device is None:
        execution_device = accelerator() or "cpu"
    hook = UserCpuOffloadHook(model, torch_device(device_key(execution_device)), prev_module_hook)
    hook.offload()
    return model, hook
