"""KeyboardInterrupt at one chosen moment of those at which Python lets a signal in: when a function
begins, after a call, and at the turn of a loop.
"""

from __future__ import annotations

import dis
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING

import shardkit

if TYPE_CHECKING:
    from _typeshed import TraceFunction

_PACKAGE = Path(shardkit.__file__).parent
_FILES = (str(_PACKAGE / "load"), str(_PACKAGE / "system" / "threads.py"))


def interrupted(act: Callable[[], object], moment: int) -> bool:
    """Whether *act* was not over before the moment of that number in what this thread runs of
    the loader and its threads, and ended with it.
    """
    left = moment

    def interrupt() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    try:
        with _at_each_moment(interrupt):
            act()
    except KeyboardInterrupt:
        return True
    return False


if sys.version_info >= (3, 12):

    @contextmanager
    def _at_each_moment(interrupt: Callable[[], None]) -> Iterator[None]:
        """Call *interrupt*, which may raise, at each moment of this thread.

        What it raises after a call counts as raised by the call itself, as with a signal: so it
        comes between taking a lock and its `with`, where this Python lets a signal in.
        """
        mine, monitoring = threading.get_ident(), sys.monitoring
        events = monitoring.events

        def begin(code: CodeType, *_: object) -> object:
            if not _is_ours(code):
                return monitoring.DISABLE
            reach(sys._getframe(1))
            return None

        def call(code: CodeType, *_: object) -> object:
            return None if _is_ours(code) else monitoring.DISABLE

        def returned(code: CodeType, *_: object) -> None:
            if _is_ours(code):
                reach(sys._getframe(1))

        def jump(code: CodeType, start: int, target: int) -> object:
            if target > start or not _is_ours(code):
                return monitoring.DISABLE
            reach(sys._getframe(1))
            return None

        def reach(frame: FrameType) -> None:
            if threading.get_ident() == mine and not _finalizes(frame):
                interrupt()

        callbacks: dict[int, Callable[..., object]] = {
            events.PY_START: begin,
            events.PY_RESUME: begin,
            events.CALL: call,
            events.C_RETURN: returned,
            events.JUMP: jump,
        }
        monitoring.use_tool_id(monitoring.DEBUGGER_ID, __name__)
        try:
            for event, callback in callbacks.items():
                monitoring.register_callback(monitoring.DEBUGGER_ID, event, callback)
            # That of a return comes with that of its call.
            monitoring.set_events(
                monitoring.DEBUGGER_ID,
                events.PY_START | events.PY_RESUME | events.CALL | events.JUMP,
            )
            yield
        finally:
            monitoring.set_events(monitoring.DEBUGGER_ID, events.NO_EVENTS)
            for event in callbacks:
                monitoring.register_callback(monitoring.DEBUGGER_ID, event, None)
            monitoring.free_tool_id(monitoring.DEBUGGER_ID)

else:

    @contextmanager
    def _at_each_moment(interrupt: Callable[[], None]) -> Iterator[None]:
        """Call *interrupt*, which may raise, at each moment of this thread."""

        def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
            if not _is_ours(frame.f_code) or _finalizes(frame):
                return None
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            if event == "opcode" and frame.f_lasti in _moments(frame.f_code):
                interrupt()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_FILES)


def _finalizes(frame: FrameType) -> bool:
    """Whether *frame* is called by a finalizer, out of which Python lets nothing come."""
    above: FrameType | None = frame
    while above is not None and above.f_code is not weakref.finalize.__call__.__code__:
        above = above.f_back
    return above is not None


@cache
def _moments(code: CodeType) -> frozenset[int]:
    """Where in *code* Python 3.11 has just looked whether a signal came.

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
