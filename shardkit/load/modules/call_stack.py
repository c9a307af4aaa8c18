"""Who asks: what can be told from the frames of this thread, which torch does not hand to its hooks."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def module_call() -> FrameType | None:
    """The frame of the innermost module call that has hooks."""
    return _innermost(nn.Module._call_impl)


def is_in_forward() -> bool:
    """Whether the forward of a module runs in this thread."""
    return _innermost(nn.Module._call_impl) is not None


def is_module_cast() -> bool:
    """Whether a module is about to put what is made now in the place of its weight, as `Module.to` and `Module.half` do."""
    return _innermost(nn.Module._apply, within=_NEAR) is not None


_NEAR = 20  # frames: a method of the weight, those of the dispatcher, and the function that the module applies


def _innermost(function: object, within: int | None = None) -> FrameType | None:
    code = function.__code__  # type: ignore[attr-defined]  # a function, which mypy sees as a method of what it does not know
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code and within != 0:
        frame = frame.f_back
        within = None if within is None else within - 1
    return frame if within != 0 else None
