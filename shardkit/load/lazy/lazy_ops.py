"""Tensor operations on lazy tensors: the result is lazy too, if it can be described without
reading.

The functions here take and return `Address` wherever the operation has a tensor without memory;
NotImplemented means that values are needed. What torch documents as a copy is marked as one that
must be read:

1. A clone, and a cast to the type that the tensor has.
2. Any cast of a weight of a model, which is then used as any other tensor. A cast of a tensor of a
   checkpoint stays lazy, because libraries that load models cast every weight.

A concatenation, and an operation that only makes contiguous, stays lazy: libraries that save models
apply these to every weight. Made of weights of a model it has a backing of its own, so that it can
be written like any other tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from shardkit.load.devices.device_lookup import torch_device
from shardkit.load.lazy.backing import Backing
from shardkit.load.lazy.lazy_view import Recipe, join
from shardkit.load.memory.allocate import memory_of
from shardkit.load.memory.parallel_reads import read_into
from shardkit.load.modules.torch_internals import TO_COPY, UNSAFE_VIEW
from shardkit.load.modules.torch_modes import is_watched

if TYPE_CHECKING:
    from shardkit.load.modules.torch_internals import Operation

Arguments = Sequence[Any]  # Any, here and below: what operations take, of which torch has thousands
Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Address:
    """A tensor that is not read.

    Attributes:
        recipe: what it is made of.
        device: where it will be.
        backing: what it shares with the weight of a model that it is, or is a view of; None if it
            is of none.
        is_copy: whether it must be read now, because it is to be an ordinary tensor.
    """

    recipe: Recipe
    device: torch.device
    backing: Backing | None = None
    is_copy: bool = False


def record(func: Operation, args: Arguments, options: Options) -> object:
    """What *func*, which is no composite of other operations, gives without reading; else
    NotImplemented.
    """
    recording = _RECORDING.get(func) or (_view if func.is_view else None)
    return recording(func, args, options) if recording else NotImplemented


def _view(func: Operation, args: Arguments, options: Options) -> object:
    """A view, or a list of them, has another geometry, which torch finds for a tensor without
    data.
    """
    source, *rest = args
    if not isinstance(source, Address):
        return NotImplemented
    views = func(source.recipe.shape_only(), *rest, **options)
    several = isinstance(views, list | tuple)
    recipes = [source.recipe.viewed(view) for view in (views if several else [views])]
    made = [
        Address(recipe, source.device, source.backing) for recipe in recipes if recipe is not None
    ]
    if len(made) < len(recipes):
        return NotImplemented
    return made if several else made[0]


def _clone(func: Operation, args: Arguments, options: Options) -> object:
    """A copy; an address where it comes from `contiguous` or `reshape`."""
    made, source = _copy(func, args, options), args[0]
    if not isinstance(made, Address):
        return made
    if options.get("memory_format") in (None, torch.preserve_format):
        return replace(made, is_copy=True)
    return _backed(replace(made, is_copy=False), [source])


def _cast(func: Operation, args: Arguments, options: Options) -> object:
    """A cast, or a move to a device; a copy where it changes neither."""
    made, source = _copy(func, args, options), args[0]
    if not isinstance(made, Address):
        return made
    same = made.device == source.device and made.recipe.dtype == source.recipe.dtype
    return replace(made, is_copy=made.is_copy or same)


def _copy(func: Operation, args: Arguments, options: Options) -> object:
    """The recipe gains a Cast, or a new order of the axes."""
    source, *rest = args
    if (
        not isinstance(source, Address)
        or options.get("pin_memory")
        or options.get("layout") not in (None, torch.strided)
    ):
        return NotImplemented
    device = torch.device(options.get("device") or source.device)
    elsewhere = {"device": "meta"} if "device" in options else {}
    copy = func(source.recipe.shape_only(), *rest, **(options | elsewhere))
    if device.type == "meta":
        return copy
    recipe = source.recipe.copied(copy)
    if recipe is None:
        return NotImplemented
    there = device if device == source.device else torch_device(device)
    return Address(recipe, there, is_copy=source.backing is not None)


def _pad(func: Operation, args: Arguments, options: Options) -> object:
    """Nothing added on any side is a clone; model libraries do that when they make a bias fit its
    weight.
    """
    source, pads, *_ = args
    return NotImplemented if any(pads) else _copy(_aten.clone.default, (source,), {})


def _join(func: Operation, args: Arguments, options: Options) -> object:
    """A cat or a stack of nothing but addresses that are of one type and on one device."""
    sources, dim = args[0], args[1] if len(args) > 1 else options.get("dim", 0)
    if any(not isinstance(each, Address) or _kind(each) != _kind(sources[0]) for each in sources):
        return NotImplemented
    recipes = [each.recipe for each in sources]
    whole = func([recipe.shape_only() for recipe in recipes], dim)
    dim %= max(1, whole.ndim)
    if func is _aten.stack.default:
        shapes = [(*recipe.shape[:dim], 1, *recipe.shape[dim:]) for recipe in recipes]
    else:
        recipes = [
            recipe for recipe in recipes if len(recipe.shape) == whole.ndim
        ]  # a flat empty tensor may join in anywhere
        shapes = [recipe.shape for recipe in recipes]
    joined = join(recipes, shapes, dim, whole)
    if joined is None:
        return NotImplemented
    return _backed(Address(joined, sources[0].device), sources)


def _backed(made: Address, sources: Sequence[Address]) -> Address:
    """*made*, with a backing of its own if one of its *sources* has one."""
    names = [each.backing.name for each in sources if each.backing is not None]
    return replace(made, backing=Backing(made.recipe, made.device, names[0])) if names else made


def _kind(address: Address) -> tuple[object, torch.device]:
    return address.recipe.dtype, address.device


def _empty(func: Operation, args: Arguments, options: Options) -> object:
    """A new tensor that takes nothing from the old one but its geometry."""
    source, *rest = args
    if not isinstance(source, Address):
        return NotImplemented
    return func(
        source.recipe.shape_only(),
        *rest,
        **(options | {"device": options.get("device") or source.device}),
    )


def _fill(func: Operation, args: Arguments, options: Options) -> object:
    """A copy into memory that is there: read straight into it, if it is in one piece and torch
    need not compute.
    """
    target, source, *_ = args
    if (
        is_watched()
        or not isinstance(source, Address)
        or target.shape != source.recipe.shape
        or not _is_plain(target)
    ):
        return NotImplemented
    recipe = source.recipe.copied(target)
    if recipe is None:
        return NotImplemented
    read_into(recipe.payload, memory_of(target))
    return target


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _not_pinned(func: Operation, args: Arguments, options: Options) -> object:
    return False


_Recording = Callable[["Operation", Arguments, Options], object]
_aten = torch.ops.aten

_RECORDING: dict[object, _Recording] = {
    TO_COPY: _cast,
    _aten.clone.default: _clone,
    _aten.constant_pad_nd.default: _pad,
    _aten.cat.default: _join,
    _aten.stack.default: _join,
    UNSAFE_VIEW: _view,
    _aten.copy_.default: _fill,
    _aten.is_pinned.default: _not_pinned,
    _aten.empty_like.default: _empty,
    _aten.zeros_like.default: _empty,
    _aten.ones_like.default: _empty,
    _aten.full_like.default: _empty,
    _aten.rand_like.default: _empty,
    _aten.randn_like.default: _empty,
    _aten.new_empty.default: _empty,
    _aten.new_empty_strided.default: _empty,
    _aten.new_zeros.default: _empty,
    _aten.new_ones.default: _empty,
    _aten.new_full.default: _empty,
}
