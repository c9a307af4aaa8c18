"""Facts about the operations of torch: what they write, their decompositions, and the arguments of
`Tensor.to`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from shardkit.load.modules.torch_internals import has_decomposition, parse_to, schema

if TYPE_CHECKING:
    from shardkit.load.lazy.lazy_ops import Arguments, Options
    from shardkit.load.modules.torch_internals import Operation

_Kind = TypeVar("_Kind")


def written(func: Operation, args: Arguments, options: Options) -> Iterator[object]:
    """The arguments that *func* writes to, those in lists one by one."""
    for position, name in _written(func):
        target = args[position] if position < len(args) else options.get(name)
        if isinstance(target, list | tuple):
            yield from target
        else:
            yield target


def changes_shapes(func: Operation) -> bool:
    """Whether *func* changes the shape, the strides or the storage of what it writes to."""
    return torch.Tag.inplace_view in func.tags


@cache
def is_composite(func: Operation) -> bool:
    """Whether *func* is made of other operations; such a one arrives whole in inference mode
    only.
    """
    name: str = func.name()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return has_decomposition(name)


def outliving(func: Operation) -> AbstractContextManager[object]:
    """No inference mode for a view, which may outlive it; to leave a mode that is not there would
    let gradients flow again.
    """
    return (
        torch.inference_mode(False)
        if func.is_view and torch.is_inference_mode_enabled()
        else nullcontext()
    )


def asked_of_to(
    args: Sequence[Any], options: Mapping[str, Any]
) -> tuple[torch.device | None, bool]:
    """The device that the arguments of `Tensor.to` ask for, None if for none, and whether they ask
    for a copy.
    """
    at = 2 if args and isinstance(args[0], torch.dtype | torch.Tensor) else 3
    others = {name: value for name, value in options.items() if name != "copy"}
    device: torch.device | None = parse_to(*args[:at], **others)[0]
    return device, bool(args[at] if len(args) > at else options.get("copy", False))


def replaced(value: Any, kind: type[_Kind], replacement: Callable[[_Kind], object]) -> Any:
    """*value* with all of one *kind* in it replaced, however deep in lists and the like."""
    if isinstance(value, kind):
        return replacement(value)
    if isinstance(value, list | tuple):
        return type(value)([replaced(each, kind, replacement) for each in value])
    if isinstance(value, dict):
        return {key: replaced(each, kind, replacement) for key, each in value.items()}
    return value


@cache
def _written(func: Operation) -> tuple[tuple[int, str], ...]:
    """Which arguments *func* writes to."""
    arguments = enumerate(schema(func).arguments)
    return tuple(
        (i, each.name)
        for i, each in arguments
        if each.alias_info is not None and each.alias_info.is_write
    )
