"""Weights that come and go beside what a person computes: what torch lets watch that, neither sees nor spoils it.

1. A transform of torch.func, or a mode such as that of fake tensors, would put tensors of its own in the place of those that are
   made while it is on, and these have no memory to read into.
2. Some keep the weights that they meet: a trace in what it writes down, torch.func.grad for its way back, where it does not ask
   whether they have changed. They get tensors with memory of their own.
3. `torch.compile` is not let into hooks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache, wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from shardkit.errors import LoadError

_set_trace: Callable[[object], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]  # which torch leaves out
_P = ParamSpec("_P")
_R = TypeVar("_R")


def unseen(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """*function*, of which no mode, no transform and no trace sees anything."""

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_watched():
            return function(*args, **kwargs)
        with ExitStack() as aside:
            aside.enter_context(torch._C._DisableFuncTorch())
            aside.enter_context(_disable_current_modes())
            if (trace := torch._C._get_tracing_state()) is not None:  # torch lets none be set below its dispatcher
                aside.callback(_set_trace, trace)
                _set_trace(None)
            return function(*args, **kwargs)

    return called


def eager(hook: Callable[_P, _R]) -> Callable[_P, _R]:
    """*hook*, which `torch.compile` leaves alone. Its compiler takes seconds to import, so that is left to who uses it."""
    disabled = cache(lambda: torch.compiler.disable(hook))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @wraps(hook)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "torch._dynamo" not in sys.modules:
            return hook(*args, **kwargs)
        result: _R = disabled()(*args, **kwargs)
        return result

    return called


def hide_from_compiler(function: FunctionType) -> None:
    """Let torch.compile run *function*, and not trace it, which takes long and gives nothing.

    `torch.compiler.disable` would do the same, and import the compiler, which takes as long as to import torch.
    """
    with suppress(ImportError):  # an older torch: it traces, and computes the same
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def lasting(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """*tensors* where a forward is watched, or copies of them if somebody may keep them."""
    return _copies(tensors) if _is_written_down() or _has_way_back() else tensors


def refuse_trace() -> None:
    """See that no torch.jit.trace meets an address, which it takes for a constant with memory.

    Raises:
        LoadError: one does.
    """
    if torch._C._is_tracing():
        raise LoadError(
            "torch.jit.trace writes down what it meets, and cannot do so with the address of a weight that is used where it lies",
            hint="trace a model that is in memory: load it with device_map=None",
        )


def is_watched() -> bool:
    """Asked for each block and forward: whether anything is on, whatever it is."""
    on = bool(torch._C._len_torch_dispatch_stack()) or torch._C._is_tracing()
    return on or torch._C._functorch.peek_interpreter_stack() is not None


def _is_written_down() -> bool:
    """Whether torch.jit.trace, or make_fx and what is built on it, is at work."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return torch._C._is_tracing() or (proxies is not None and proxies.get_proxy_mode() is not None)


def _has_way_back() -> bool:
    """Whether a transform that is on, the innermost or not, goes back over what is computed."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(each.key() == torch._C._functorch.TransformType.Grad for each in torch._C._functorch.get_interpreter_stack())


@unseen
def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    copies = [each.detach().clone() for each in tensors]
    return [
        nn.Parameter(copy, requires_grad=False) if isinstance(each, nn.Parameter) else copy
        for each, copy in zip(tensors, copies, strict=True)
    ]
