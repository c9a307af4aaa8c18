"""The pickle machine: it reads a pickle of any protocol (0 to 5) and executes nothing.

1. A global is an opaque placeholder unless the vocabulary knows it; a call creates a placeholder
   and is listed by name.
2. The stream is read through a window of 256 KiB, so a `data.pkl` of any size takes no more memory
   than its objects. Strings above 4 KiB (arrays, source code) are skipped and kept as byte ranges.
3. Nothing recurses, and no untrusted value is hashed, compared or printed; the memo is a dict, so
   that an index of 2³¹ costs no more than any other.
4. Every fault of the stream is Malformed with the offset of its byte: an empty stack, a memo index
   never stored, an end without a STOP.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.payloads.payload import Payload
from shardkit.pickles.machine import OBJECT, Machine
from shardkit.pickles.objects import Vocabulary
from shardkit.pickles.opcodes import OPCODES, Stopped


@dataclass(frozen=True, slots=True)
class Pickle:
    """What one pickle holds.

    Attributes:
        value: the object, made of plain values and of those of `stand_ins` and the vocabulary.
        stop: the first byte after the pickle; another may follow.
        calls: unknown classes and functions that it would have called, each once, in order.
    """

    value: object
    stop: int
    calls: tuple[str, ...]


def unpickle(
    path: Path,
    content: Payload,
    vocabulary: Vocabulary,
    *,
    limits: Limits,
    start: int = 0,
    where: str = "",
) -> Pickle:
    """Read one pickle.

    Args:
        path: the file, for messages.
        content: the bytes that it stands in.
        vocabulary: which globals and persistent ids are known.
        limits: `pickle_ops` and `held_bytes` bound it.
        start: where in *content* it begins.
        where: the part of the file that *content* is, for messages.

    Raises:
        Malformed: it is no pickle, or it is cut short or inconsistent.
        LimitExceeded: it does more, or holds more, than is allowed.
    """
    machine = Machine(path, content, vocabulary, limits, start, where)
    try:
        _run(machine, limits.pickle_ops)
    except Stopped:
        return Pickle(machine.stack.pop(), machine.base + machine.at, tuple(machine.calls))
    except (IndexError, KeyError, struct.error, ValueError) as error:
        raise _malformed(machine, error) from None
    fault = f"{where}: the pickle has more than {limits.pickle_ops:,} operations".removeprefix(": ")
    raise LimitExceeded(path, fault, limit="pickle_ops", actual=2 * limits.pickle_ops)


def _run(machine: Machine, most: int) -> None:
    """Do what the pickle says until it stops, or *most* operations are done."""
    stack, below, memo, recalled = machine.stack, machine.below, machine.memo, machine.recalled
    window, at, refill_at = b"", 0, 0
    try:
        for _ in repeat(None, most):
            if at >= refill_at:
                machine.at = at
                machine.refill()
                window, at, refill_at = machine.window, 0, machine.refill_at
            code = window[at]
            # Of all operations of a torch pickle three quarters are these, so they are spared the
            # call.
            if code == _LONG_BINPUT:
                machine.stored += 1
                index = _uint(window, at + 1)[0]
                if recalled is None or index in recalled:
                    memo[index] = stack[-1]
                at += 5
            elif code == _BINGET:
                stack.append(memo[window[at + 1]])
                at += 2
            elif code == _BININT1:
                stack.append(window[at + 1])
                at += 2
            elif code == _MARK:
                below.append(stack)
                machine.stack = stack = []
                at += 1
            elif code == _TUPLE1:
                machine.held += OBJECT
                stack[-1] = (stack[-1],)
                at += 1
            elif code == _TUPLE:
                machine.held += OBJECT + 8 * len(stack)
                below[-1].append(tuple(stack))
                machine.stack = stack = below.pop()
                at += 1
            else:
                machine.at = at + 1
                OPCODES[code](machine)
                stack, at = machine.stack, machine.at
    finally:
        machine.begun = at


def _malformed(machine: Machine, error: Exception) -> Malformed:
    at = machine.begun
    match error:
        case ValueError():
            fault = str(error)
        case KeyError():
            fault = "the pickle reads a memo entry that it never stored"
        case _ if isinstance(error, struct.error) or at + 1 >= len(machine.window):
            fault = "the pickle ends before it is complete"
        case _:
            fault = "the pickle pops from an empty stack"
    place = f"{machine.where}, byte {machine.base + at:,}".removeprefix(", ")
    return Malformed(
        machine.path,
        fault,
        where=place,
        hint="the file is corrupt or truncated: download it again",
    )


_LONG_BINPUT, _BINGET, _BININT1, _MARK, _TUPLE1, _TUPLE = b"rhK(\x85t"
_uint = struct.Struct("<I").unpack_from
