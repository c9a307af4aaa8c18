"""What of a model a checkpoint fills: its weights, each physical one once with all its names.

Names are tied where they hold the same object, whether it is a parameter or a buffer, real or on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from shardkit.dtypes import BY_TORCH, DType

_EXTRA_STATE = "_extra_state"  # torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX


class Seat(NamedTuple):
    """Where a module keeps a tensor."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """What is there."""
        owner = self.owner
        return owner._parameters[self.name] if self.name in owner._parameters else owner._buffers.get(self.name)

    def take(self, tensor: torch.Tensor) -> None:
        """Put *tensor* there."""
        owner = self.owner
        if type(owner).__setattr__ is not nn.Module.__setattr__:  # such as that of LSTM, which keeps a list of its own
            setattr(owner, self.name, tensor)
        elif self.name in owner._parameters:
            owner._parameters[self.name] = tensor  # type: ignore[assignment]  # what is a Parameter to torch is none to mypy
        else:
            owner._buffers[self.name] = tensor


class Weight(NamedTuple):
    """One physical tensor of a model.

    Attributes:
        names: all its names in the model's state dict, in its order.
        tensor: the object that all these names hold; on the meta device as long as nothing is loaded.
        is_buffer: whether it is a buffer under each of its names.
        seats: where it is kept; a module that has several names is one place.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    is_buffer: bool
    seats: tuple[Seat, ...]


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """The parameters and persistent buffers of *model*, each physical one once, in the order of its state dict."""
    return weights_in(named_modules(model))


def weights_in(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Weight]:
    """The same of *modules* with all their names, of which each is as in `named_modules`."""
    found: dict[int, Weight] = {}
    for name, tensor, is_buffer, seat in _named_tensors(modules):
        weight = Weight((name,), tensor, is_buffer, (seat,))
        first = found.setdefault(id(tensor), weight)
        if first is not weight:
            seats = tuple(dict.fromkeys((*first.seats, seat)))
            found[id(tensor)] = Weight((*first.names, name), tensor, first.is_buffer and is_buffer, seats)
    return iter(found.values())


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with all their names, in the order of `Module.named_modules`, which is a generator for each module."""
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        if module._modules:
            dotted = f"{name}." if name else ""
            stack += [(dotted + step, child) for step, child in reversed(module._modules.items()) if child is not None]


def unreal_buffers(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """Buffers of *modules* that no checkpoint holds and that have no values."""
    for prefix, module in modules:
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                yield f"{prefix}.{name}" if prefix else name


def extra_states(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """The keys of what *modules* keep in a state dict beside their tensors, and take back by `set_extra_state`."""
    plain = nn.Module.set_extra_state
    for prefix, module in modules:
        if type(module).set_extra_state is not plain:
            yield f"{prefix}.{_EXTRA_STATE}" if prefix else _EXTRA_STATE


@cache
def stored_type(dtype: torch.dtype) -> DType | None:
    """What *dtype* is in a checkpoint; None if no checkpoint has it."""
    return BY_TORCH.get(str(dtype).removeprefix("torch."))


@cache
def torch_type(dtype: DType) -> torch.dtype | None:
    """What *dtype* is in torch; None if the torch that is installed has no such type."""
    found = getattr(torch, dtype.torch, None) if dtype.torch else None
    return found if isinstance(found, torch.dtype) else None


def _named_tensors(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, torch.Tensor, bool, Seat]]:
    """Name, tensor, whether it is a buffer, and its place, for all that a state dict of *modules* holds, without making one."""
    for prefix, module in modules:
        dotted = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dotted + name, parameter, False, Seat(module, name)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dotted + name, buffer, True, Seat(module, name)
