"""The weights of a model that a checkpoint fills: each physical one once, with all its names.

Names are tied where they refer to the same object, whether it is a parameter or a buffer, in memory
or on the meta device. Seats and weights are not frozen, though nothing changes them: they are made
for every tensor, and a frozen one takes three times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from shardkit.dtypes import BY_TORCH, DType
from shardkit.load.modules.torch_internals import (
    EXTRA_STATE,
    non_persistent_buffers,
    own_buffers,
    own_modules,
    own_parameters,
)

_SETATTR = nn.Module.__setattr__


@dataclass(slots=True, unsafe_hash=True)
class ParameterSlot:
    """Where a module keeps a tensor."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """What is there."""
        owner, name = self.owner, self.name
        # What torch.jit.script makes has no dicts here.
        table = own_parameters(owner)
        if name in table and (found := table[name]) is not None:
            return found
        table = own_buffers(owner)
        return table[name] if name in table else None  # noqa: SIM401 - that has no `get` either

    @property
    def is_plain(self) -> bool:
        """Whether the owner keeps the tensor nowhere else, as modules such as LSTM do in a list of
        their own.
        """
        return type(self.owner).__setattr__ is _SETATTR

    def take(self, tensor: torch.Tensor) -> None:
        """Put *tensor* there."""
        owner, name = self.owner, self.name
        if not self.is_plain:
            setattr(owner, name, tensor)
        elif name in (table := own_parameters(owner)):
            table[name] = tensor
        else:
            own_buffers(owner)[name] = tensor

    def renew(self) -> None:
        """Put what is there into the other places in which the owner keeps it."""
        if (tensor := self.tensor) is not None:
            self.take(tensor)


@dataclass(slots=True, unsafe_hash=True)
class Weight:
    """One physical tensor of a model.

    Attributes:
        names: all its names in the model's state dict, in its order.
        tensor: the object that all these names hold; on the meta device as long as nothing is
            loaded.
        is_buffer: whether it is a buffer under each of its names.
        seats: where it is kept; a module that has several names is one place.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    is_buffer: bool
    seats: tuple[ParameterSlot, ...]

    def tied_to(self, other: Weight) -> Weight:
        """The same with the names and seats of *other* too, which holds the same tensor."""
        seats = tuple(dict.fromkeys((*self.seats, *other.seats)))
        return Weight(
            (*self.names, *other.names), self.tensor, self.is_buffer and other.is_buffer, seats
        )


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """The parameters and persistent buffers of *model*, each physical one once, in the order of its
    state dict.
    """
    return weights_in(named_modules(model))


def weights_in(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Weight]:
    """The same of *modules* with all their names, of which each is as in `named_modules`."""
    found: dict[int, Weight] = {}
    for weight in _one_by_one(modules):
        first = found.setdefault(id(weight.tensor), weight)
        if first is not weight:
            found[id(weight.tensor)] = first.tied_to(weight)
    return iter(found.values())


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with all their names, in the order of `Module.named_modules`, which is a
    generator for each module.
    """
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        if own_modules(module):
            dotted = f"{name}." if name else ""
            stack += [
                (dotted + step, child)
                for step, child in reversed(own_modules(module).items())
                if child is not None
            ]


def unreal_buffers(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """Buffers of *modules* that no checkpoint holds and that have no values."""
    for prefix, module in modules:
        for name in non_persistent_buffers(module):
            buffer = own_buffers(module).get(name)
            if buffer is not None and buffer.is_meta:
                yield f"{prefix}.{name}" if prefix else name


def extra_states(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """The keys of what *modules* keep in a state dict beside their tensors, and take back by
    `set_extra_state`.
    """
    plain = nn.Module.set_extra_state
    for prefix, module in modules:
        if type(module).set_extra_state is not plain:
            yield f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE


@cache
def stored_type(dtype: torch.dtype) -> DType | None:
    """What *dtype* is in a checkpoint; None if no checkpoint has it."""
    return BY_TORCH.get(str(dtype).removeprefix("torch."))


@cache
def torch_type(dtype: DType) -> torch.dtype | None:
    """What *dtype* is in torch; None if the torch that is installed has no such type."""
    found = getattr(torch, dtype.torch, None) if dtype.torch else None
    return found if isinstance(found, torch.dtype) else None


def _one_by_one(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Weight]:
    """What a state dict of *modules* holds, without making one; what is tied comes once for each
    name.
    """
    for prefix, module in modules:
        dotted = f"{prefix}." if prefix else ""
        for name, parameter in own_parameters(module).items():
            if parameter is not None:
                yield Weight((dotted + name,), parameter, False, (ParameterSlot(module, name),))
        for name, buffer in own_buffers(module).items():
            if buffer is not None and name not in non_persistent_buffers(module):
                yield Weight((dotted + name,), buffer, True, (ParameterSlot(module, name),))
