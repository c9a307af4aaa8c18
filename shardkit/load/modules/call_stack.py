"""Which code is calling: facts from the frames of this thread, which torch does not pass to its
hooks.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from shardkit.load.modules.torch_internals import CALL_CODE, CAST_CODE


def module_call() -> FrameType | None:
    """The frame of the innermost module call that has hooks."""
    return _innermost(CALL_CODE)


def is_in_forward() -> bool:
    """Whether the forward of a module runs in this thread."""
    return _innermost(CALL_CODE) is not None


def is_module_cast() -> bool:
    """Whether a module is about to put what is made now in the place of its weight, as `Module.to`
    and `Module.half` do.
    """
    return _innermost(CAST_CODE, within=_NEAR) is not None


# frames: a method of the weight, those of the dispatcher, and the function that the module applies
_NEAR = 20


def _innermost(code: CodeType, within: int | None = None) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code and within != 0:
        frame = frame.f_back
        within = None if within is None else within - 1
    return frame if within != 0 else None
