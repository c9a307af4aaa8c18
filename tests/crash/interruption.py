"""KeyboardInterrupt at one chosen moment of those at which Python lets a signal in."""

from __future__ import annotations

import dis
import sys
import weakref
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING

import pytest

import shardkit.load

if TYPE_CHECKING:
    from _typeshed import TraceFunction

_DEAF = ((3, 12), (3, 14))
_LOADER = str(Path(shardkit.load.__file__).parent)


def interrupted(act: Callable[[], object], moment: int) -> bool:
    """Whether *act* was not over before the moment of that number in what this thread runs of the
    loader, and ended with it.
    """
    if sys.version_info[:2] in _DEAF:
        pytest.skip(
            "a tracer of this Python is not told of all instructions, once another has raised"
        )
    left = moment

    def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        nonlocal left
        if not frame.f_code.co_filename.startswith(_LOADER) or _finalizes(frame):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode" and frame.f_lasti in _moments(frame.f_code):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def _finalizes(frame: FrameType) -> bool:
    """Whether *frame* is called by a finalizer, out of which Python lets nothing come."""
    return frame.f_back is not None and frame.f_back.f_code is weakref.finalize.__call__.__code__


@cache
def _moments(code: CodeType) -> frozenset[int]:
    """Where in *code* the interpreter has just looked whether a signal came: behind the begin,
    calls, and turns of loops.

    What a signal raises counts as raised by the instruction before, and what a tracer raises by the
    one behind: where these two are not in the same `try`, there is no moment.
    """
    bytecode = dis.Bytecode(code)
    guards = bytecode.exception_entries  # type: ignore[attr-defined]  # typeshed does not know it

    def guard(offset: int) -> object:
        return next((entry.target for entry in guards if entry.start <= offset < entry.end), None)

    return frozenset(
        behind.offset
        for looking, behind in pairwise(bytecode)
        if looking.opname.startswith(("RESUME", "CALL", "JUMP_BACKWARD"))
        and guard(behind.offset - 2) == guard(behind.offset)
    )
