"""Budgets that spread a model evenly over the accelerators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from torch import nn

from shardkit.load.budgets import Device, MaxMemory, get_max_memory
from shardkit.load.module_sizes import AnyDType, class_names, module_sizes

_SHARE_OF_ONE = 0.9  # of an only accelerator, where the user sets no budget: the rest is for activations
_SLACK = 1.25  # layers by which a budget is larger than an even share, since layers do not come out even


def get_balanced_memory(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: AnyDType | None = None,
    special_dtypes: Mapping[str, AnyDType] | None = None,
    low_zero: bool = False,
) -> dict[Device, int]:
    """Budgets for `infer_auto_device_map` with which all accelerators get about as much of *model*.

    The last accelerator keeps its whole budget, so that nothing is left over. An only one gets 90% of what it has free, if
    *max_memory* is not given.

    Args:
        model: the model, on any device.
        max_memory: what each device may hold at most, as `get_max_memory` takes it.
        no_split_module_classes: names of classes whose modules stay on one device.
        dtype: what floats are cast to when the weights are loaded; None for the types that the model has.
        special_dtypes: the types of some tensors, by name, that overrule *dtype*.
        low_zero: give the first accelerator only what the others cannot hold; `generate` needs memory there.

    Raises:
        LoadError: a device or a budget cannot be understood.
        BadSize: a size cannot be read.
    """
    budgets = get_max_memory(max_memory)
    accelerators = [device for device in budgets if isinstance(device, int)]
    usable = [device for device in accelerators if budgets[device] > 0]
    if len(usable) == 1 and max_memory is None:
        budgets[usable[0]] = int(budgets[usable[0]] * _SHARE_OF_ONE)
    if len(usable) < 2:
        return budgets
    sizes = module_sizes(model, dtype, special_dtypes)
    spares_first = low_zero and usable[0] == accelerators[0]
    sharers = usable[1:] if spares_first else usable
    share = sizes[""] // len(sharers) + int(_SLACK * _typical_layer(model, sizes, class_names(no_split_module_classes)))
    for device in sharers[:-1]:
        budgets[device] = min(share, budgets[device])
    if spares_first:
        left_over = sizes[""] - sum(budgets[device] for device in sharers)
        budgets[usable[0]] = min(max(0, left_over), budgets[usable[0]])
    return budgets


def _typical_layer(model: nn.Module, sizes: Mapping[str, int], no_split: frozenset[str]) -> int:
    """The largest module that stays whole, or the mean of the innermost modules with tensors if that is more."""
    modules = model.named_modules(remove_duplicate=False)
    whole = (sizes.get(name, 0) for name, module in modules if name and type(module).__name__ in no_split)
    innermost = _innermost(sizes)
    return max(int(fmean(sizes[name] for name in innermost)) if innermost else 0, max(whole, default=0))


def _innermost(sizes: Mapping[str, int]) -> list[str]:
    """The modules with tensors that hold no other such module."""
    modules = {name for name in sizes if name} - set(_without_parts(sizes))
    return _without_parts(modules)


def _without_parts(names: Iterable[str]) -> list[str]:
    around = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name and name not in around]
