"""Which code is calling: facts from the frames of this thread, which torch does not pass to its
hooks.
"""

from __future__ import annotations

import sys
from types import FrameType

from shardkit.load.modules.torch_internals import CALL_CODE, CAST_CODE


def module_call() -> FrameType | None:
    """The frame of the innermost module call that has hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not CALL_CODE:
        frame = frame.f_back
    return frame


def hooked_call() -> FrameType | None:
    """The same for a hook that is `eager`, from which the usual way to that frame is known. To look
    at the frames between would make an object of each.
    """
    try:
        frame = sys._getframe(_HOOKED)
    except ValueError:
        return module_call()
    return frame if frame.f_code is CALL_CODE else module_call()


def is_in_forward() -> bool:
    """Whether the forward of a module runs in this thread."""
    return module_call() is not None


def is_module_cast() -> bool:
    """Whether a module is about to put what is made now in the place of its weight, as `Module.to`
    and `Module.half` do.
    """
    frame: FrameType | None = sys._getframe(1)
    within = _NEAR
    while frame is not None and frame.f_code is not CAST_CODE and within:
        frame = frame.f_back
        within -= 1
    return frame is not None and within > 0


def is_executing(frame: FrameType) -> bool:
    """Whether *frame*, which may be one of another thread, has not ended. One that has loses its
    variables.
    """
    try:
        frame.clear()
    except RuntimeError:  # as Python documents it
        return True
    return False


# frames: the above, the hook, what makes it eager, and a function of torch inside of the call
_HOOKED = 4

# frames: a method of the weight, those of the dispatcher, and the function that the module applies
_NEAR = 20
