"""Weights that come and go beside what a person computes: what torch lets watch that, neither sees
nor spoils it.

1. A transform of torch.func, or a mode such as that of fake tensors, would put tensors of its own
   in the place of those that are made while it is on, and these have no memory to read into.
2. Some keep the weights that they meet: a trace in what it writes down, torch.func.grad for its way
   back, where it does not ask whether they have changed. They get tensors with memory of their own.
3. `torch.compile` is not let into hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.modules.torch_internals import (
    current_trace,
    has_gradient_transform,
    innermost_transform,
    is_compiler_imported,
    is_graph_traced,
    is_tracing,
    mode_count,
    no_modes,
    no_transforms,
    set_trace,
)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def unseen(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """*function*, of which no mode, no transform and no trace sees anything."""

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_watched():
            return function(*args, **kwargs)
        with ExitStack() as aside:
            aside.enter_context(no_transforms())
            aside.enter_context(no_modes())
            if (
                trace := current_trace()
            ) is not None:  # torch lets none be set below its dispatcher
                aside.callback(set_trace, trace)
                set_trace(None)
            return function(*args, **kwargs)

    return called


def eager(hook: Callable[_P, _R]) -> Callable[_P, _R]:
    """*hook*, which `torch.compile` leaves alone. Its compiler takes seconds to import, so that is
    left to who uses it.
    """
    disabled = cache(lambda: torch.compiler.disable(hook))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @wraps(hook)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_compiler_imported():
            return hook(*args, **kwargs)
        result: _R = disabled()(*args, **kwargs)
        return result

    return called


def lasting(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """*tensors* where a forward is watched, or copies of them if somebody may keep them."""
    may_keep = is_tracing() or is_graph_traced() or has_gradient_transform()
    return _copies(tensors) if may_keep else tensors


def refuse_trace() -> None:
    """See that no torch.jit.trace meets an address, which it takes for a constant with memory.

    Raises:
        LoadError: one does.
    """
    if is_tracing():
        raise LoadError(
            "torch.jit.trace records the tensors that it meets, and cannot record a lazy tensor "
            "that is used in place",
            hint="trace a model that is in memory: load it with device_map=None",
        )


def is_watched() -> bool:
    """Asked for each block and forward: whether anything is on, whatever it is."""
    return mode_count() > 0 or is_tracing() or innermost_transform() is not None


@unseen
def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    copies = [each.detach().clone() for each in tensors]
    return [
        nn.Parameter(copy, requires_grad=False) if isinstance(each, nn.Parameter) else copy
        for each, copy in zip(tensors, copies, strict=True)
    ]
