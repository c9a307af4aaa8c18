"""Build models without memory for their weights: parameters move to another device, usually the
meta device, as soon as they are registered.

1. The registration hooks of torch do it; nothing of torch is replaced. They are installed once,
   when the first context is entered, and stay, idle outside of contexts: removing one while another
   thread registers a parameter would end that thread's walk over the hooks with an error.
2. Only the thread that entered a context is affected, and of nested contexts only the innermost.
3. An object that is registered again gets the same moved copy, so that tied weights stay tied.
4. Whether a buffer is persistent is known only after the hook has run, so a buffer is moved one
   registration late.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from shardkit.load.modules.torch_internals import (
    make_subclass,
    non_persistent_buffers,
    own_buffers,
)
from shardkit.system.threads import Exclusive


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build models without memory for their weights: within this context, parameters are created on
    the meta device.

    At any moment at most one parameter takes memory, the one under construction. Buffers that no
    checkpoint holds are real.

    Args:
        include_buffers: whether persistent buffers are on the meta device too.

    Example:
        >>> from shardkit.load import init_empty_weights
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(20)])  # 80 MB
        >>> model[0].weight.device
        device(type='meta')
    """
    with init_on_device(torch.device("meta"), include_buffers):
        yield


@contextmanager
def init_on_device(
    device: torch.device | str | int, include_buffers: bool = False
) -> Iterator[None]:
    """Build models on *device*: within this context, parameters are created there.

    Class, attributes and ties of parameters are kept; those of lazy modules, which have no shape
    yet, are left as they are.

    Args:
        device: where the parameters go.
        include_buffers: whether persistent buffers go there too.

    Example:
        >>> from shardkit.load import init_on_device
        >>> from torch import nn
        >>> with init_on_device("meta", include_buffers=True):
        ...     norm = nn.BatchNorm1d(8)
        >>> norm.weight.device.type, norm.running_mean.device.type
        ('meta', 'meta')
    """
    _installing.call(_install)
    context = _Context(torch.device(device), include_buffers)
    _here.contexts.append(context)
    try:
        yield
    finally:
        _here.contexts.remove(context)
        context.settle()


@dataclass(slots=True, eq=False)
class _Context:
    device: torch.device
    include_buffers: bool
    moved: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    pending: tuple[nn.Module, str, torch.Tensor] | None = None

    def parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        self.settle()
        return self._moved_copy(parameter)

    def buffer(self, module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        self.settle()
        if self.include_buffers and isinstance(buffer, torch.Tensor):
            self.pending = (module, name, buffer)

    def settle(self) -> None:
        """Move the buffer that was registered last, if it still exists and is persistent."""
        if self.pending is None:
            return
        module, name, buffer = self.pending
        self.pending = None
        if own_buffers(module).get(name) is buffer and name not in non_persistent_buffers(module):
            own_buffers(module)[name] = self._moved_copy(buffer)

    def _moved_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_lazy(tensor):
            return tensor
        if tensor not in self.moved:
            copy = tensor if tensor.device == self.device else _moved(tensor, self.device)
            self.moved[tensor] = copy
            self.moved[copy] = (
                # itself; a dictionary that held what it knows by weak references would keep it
                # alive
                None
            )
            return copy
        found = self.moved[tensor]
        return found if isinstance(found, torch.Tensor) else tensor


class _Here(threading.local):
    """The active contexts of this thread, innermost last."""

    def __init__(self) -> None:
        self.contexts: list[_Context] = []


_here = _Here()
_installing = Exclusive()
_installed: list[RemovableHandle] = []


def _install() -> None:
    if not _installed:
        # torch declares that the hook returns None, and documents that it may return another
        # parameter.
        _installed.append(register_module_parameter_registration_hook(_on_parameter))  # type: ignore[arg-type]
        _installed.append(register_module_buffer_registration_hook(_on_buffer))


def _on_parameter(module: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    return _here.contexts[-1].parameter(parameter) if _here.contexts else None


def _on_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
    if _here.contexts:
        _here.contexts[-1].buffer(module, name, buffer)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return *tensor* on *device*, of the same class and with the same attributes, without calling
    methods of the class.
    """
    if issubclass(type(tensor), nn.Parameter):
        moved = make_subclass(type(tensor), tensor.data.to(device), tensor.requires_grad)
    # a tensor of another kind, which may say that it is a parameter: its own operations know how to
    # move it
    else:
        moved = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
    for name, attribute in getattr(tensor, "__dict__", {}).items():
        moved.__dict__.setdefault(name, attribute)
    return moved
