"""Models that share a device by turns: each is moved there for its forward, and back to main memory
on request.
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
    """The hook that `cpu_offload_with_hook` returns, which moves its model back to main memory.

    Attributes:
        model: the model.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, previous: UserCpuOffloadHook | None
    ) -> None:
        """Attach to *model*, which is moved to *device* when it is called, after *previous* has
        left it.
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
        """Run before each forward: move the model and its inputs to the device."""
        if self._previous is not None:
            self._previous.offload()
        module.to(self._device)
        return moved(args, self._device), moved(kwargs, self._device)


def cpu_offload_with_hook(
    model: _Model,
    execution_device: str | int | torch.device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[_Model, UserCpuOffloadHook]:
    """Keep *model* in main memory until it is called; then move it to *execution_device*, where it
    stays.

    For pipelines whose models run one after the other; the name and arguments are those of
    Accelerate.

    Args:
        model: the model. It is moved and returned.
        execution_device: the device that runs it; None for the accelerator of this machine, or else
            the CPU.
        prev_module_hook: the hook of the model that is moved back when this one is called.

    Returns:
        The model, and the hook that moves it back.

    Raises:
        LoadError: there is no such device.

    Example:
        >>> import torch
        >>> from shardkit.load import cpu_offload_with_hook
        >>> from torch import nn
        >>> encoder, hook = cpu_offload_with_hook(nn.Linear(4, 8))
        >>> decoder, last = cpu_offload_with_hook(nn.Linear(8, 4), prev_module_hook=hook)
        >>> with torch.inference_mode():
        ...     output = decoder(encoder(torch.ones(1, 4)))  # makes room for the decoder
        >>> last.offload()
        >>> decoder.weight.device
        device(type='cpu')
    """
    if execution_device is None:
        execution_device = accelerator() or "cpu"
    hook = UserCpuOffloadHook(model, torch_device(device_key(execution_device)), prev_module_hook)
    hook.offload()
    return model, hook
