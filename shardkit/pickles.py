"""The pickle machine: it reads a pickle of any protocol (0 to 5) and runs nothing.

1. A global is an opaque stand-in unless the vocabulary knows it; a call makes a stand-in and is listed by name.
2. The stream is read through a window of 256 KiB, so a `data.pkl` of any size takes no more memory than what it builds.
   Strings above 4 KiB (arrays, source code) are skipped over and kept as their address.
3. Nothing recurses, and no foreign value is hashed, compared or printed; the memo is a dict, so that an index of 2³¹
   costs what any other does.
4. Whatever the stream does wrong is Malformed with the byte it happened at: a stack that runs dry, a memo index never
   stored, an end without a STOP.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from shardkit.errors import LimitExceeded, Malformed, shown
from shardkit.limits import Limits
from shardkit.payload import Payload
from shardkit.pickle_machine import Machine
from shardkit.stand_ins import Dict, Global, LongString, Opaque, Vocabulary


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


def unpickle(path: Path, content: Payload, vocabulary: Vocabulary, *, limits: Limits, start: int = 0, where: str = "") -> Pickle:
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
    code_at = 0
    try:
        machine.refill()
        for _ in range(limits.pickle_ops):
            if machine.at >= machine.refill_at:
                machine.refill()
            code_at = machine.at
            code = machine.window[code_at]
            machine.at = code_at + 1
            if code == _STOP:
                return _finished(machine)
            _OPCODES[code](machine)
    except (IndexError, KeyError, struct.error, ValueError) as error:
        raise _malformed(machine, code_at, error) from None
    fault = f"{where}: the pickle has more than {limits.pickle_ops:,} operations".removeprefix(": ")
    raise LimitExceeded(path, fault, limit="pickle_ops", actual=2 * limits.pickle_ops)


def _finished(machine: Machine) -> Pickle:
    value = machine.stack.pop()
    return Pickle(value, machine.base + machine.at, tuple(machine.calls))


def _malformed(machine: Machine, code_at: int, error: Exception) -> Malformed:
    match error:
        case ValueError():
            fault = str(error)
        case KeyError():
            fault = "the pickle recalls what it never stored"
        case _ if machine.at >= len(machine.window):
            fault = "the pickle ends before it is complete"
        case _:
            fault = "the pickle takes from its stack what is not there"
    place = f"{machine.where}, byte {machine.base + code_at:,}".removeprefix(", ")
    return Malformed(machine.path, fault, where=place, hint="the file is damaged or was cut short; fetch it again")


_STOP = ord(".")
_U16 = Struct("<H")
_U32 = Struct("<I")
_I32 = Struct("<i")
_F64 = Struct(">d")


# Of these opcodes a torch pickle consists, by far: one call less for each.
def _binput(m: Machine) -> None:
    m.memo[m.window[m.at]] = m.stack[-1]
    m.at += 1


def _long_binput(m: Machine) -> None:
    m.memo[m.number(_U32)] = m.stack[-1]


def _binget(m: Machine) -> None:
    m.stack.append(m.memo[m.window[m.at]])
    m.at += 1


def _binint1(m: Machine) -> None:
    m.stack.append(m.window[m.at])
    m.at += 1


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)


def _call_with_keywords(m: Machine) -> None:
    callee, args, keywords = m.top(3)
    m.push(m.call(callee, (*args, keywords) if type(args) is tuple else (args, keywords)))


def _call_marked(m: Machine) -> None:
    called = m.marked()
    m.push(m.call(called[0], tuple(called[1:])))


def _instance(m: Machine) -> None:
    callee = _found(m)
    m.push(m.call(callee, tuple(m.marked())))


def _found(m: Machine) -> object:
    module = _name(m)
    return m.find(module, _name(m))


def _name(m: Machine) -> str:
    return m.line().decode("utf-8", "backslashreplace")


def _stack_global(m: Machine) -> None:
    m.push(m.find(*m.top(2)))


def _table(m: Machine) -> None:
    items = m.marked()
    m.new(Dict())
    m.put(items[::2], items[1::2])


def _set_items(m: Machine) -> None:
    items = m.marked()
    m.put(items[::2], items[1::2])


def _set_item(m: Machine) -> None:
    key, value = m.top(2)
    m.put([key], [value])


def _frame(m: Machine) -> None:
    length = m.unsigned(8)
    if m.base + m.at + length > m.content.nbytes:
        raise ValueError(f"a frame of {length:,} bytes runs over the end of the stream")


def _protocol(m: Machine) -> None:
    if (version := m.unsigned(1)) > 5:
        raise ValueError(f"the pickle is of protocol {version}, and 5 is the highest there is")


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.marked()


def _python2(raw: bytes | LongString) -> object:
    """A `str` of Python 2: text, if it can be."""
    try:
        return raw if isinstance(raw, LongString) else raw.decode()
    except UnicodeDecodeError:
        return raw


def _quoted(line: bytes) -> bytes:
    """What the `repr` of a Python 2 `str` stands for."""
    return _ESCAPED.sub(_unescaped, line[1:-1])


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    return bytes([int(escape[1:], 16)]) if len(escape) == 3 else _ESCAPES.get(escape, escape)


def _number(line: bytes) -> object:
    if line in (b"00", b"01"):  # how protocols 0 and 1 write a bool
        return line == b"01"
    try:
        return int(line.removesuffix(b"L")) if line.rstrip(b"L").lstrip(b"-").isdigit() else float(line)
    except ValueError:
        raise ValueError(f"{shown(line)} is no number") from None


def _signed(raw: bytes | LongString) -> object:
    return raw if isinstance(raw, LongString) else int.from_bytes(raw, "little", signed=True)


def _unknown(m: Machine) -> None:
    code = m.window[m.at - 1]
    raise ValueError(f"0x{code:02x} is not an operation of any pickle")


def _out_of_band(m: Machine) -> None:
    raise ValueError("the pickle keeps a buffer outside of itself, which nothing can follow")


_ESCAPED = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}

_MEANINGS: dict[str, Callable[[Machine], object]] = {
    "(": Machine.mark,
    "0": _pop,
    "1": Machine.marked,
    "2": lambda m: m.push(m.stack[-1]),
    "F": lambda m: m.push(_number(m.line())),
    "G": lambda m: m.push(m.number(_F64)),
    "I": lambda m: m.push(_number(m.line())),
    "J": lambda m: m.push(m.number(_I32)),
    "K": _binint1,
    "L": lambda m: m.push(_number(m.line())),
    "M": lambda m: m.push(m.number(_U16)),
    "N": lambda m: m.push(None),
    "P": lambda m: m.new(m.vocabulary.persistent(_name(m))),
    "Q": lambda m: m.push(m.vocabulary.persistent(m.stack.pop())),
    "R": _reduce,
    "S": lambda m: m.push(_python2(_quoted(m.line()))),
    "T": lambda m: m.push(_python2(m.string(m.number(_U32)))),
    "U": lambda m: m.push(_python2(m.string(m.unsigned(1)))),
    "V": lambda m: m.push(m.line().decode("raw-unicode-escape", "backslashreplace")),
    "X": lambda m: m.push(m.text(m.number(_U32))),
    "B": lambda m: m.push(m.string(m.number(_U32))),
    "C": lambda m: m.push(m.string(m.unsigned(1))),
    "a": lambda m: m.append((m.stack.pop(),)),
    "b": Machine.build,
    "c": lambda m: m.push(_found(m)),
    "d": _table,
    "}": lambda m: m.new(Dict()),
    "e": lambda m: m.append(m.marked()),
    "g": lambda m: m.push(m.memo[int(m.line())]),
    "h": _binget,
    "j": lambda m: m.push(m.memo[m.number(_U32)]),
    "i": _instance,
    "l": lambda m: m.new(m.marked()),
    "]": lambda m: m.new([]),
    "o": _call_marked,
    "p": lambda m: m.memo.__setitem__(int(m.line()), m.stack[-1]),
    "q": _binput,
    "r": _long_binput,
    "s": _set_item,
    "t": lambda m: m.new(tuple(m.marked())),
    ")": lambda m: m.push(()),
    "u": _set_items,
    "\x80": _protocol,
    "\x81": _reduce,
    "\x82": lambda m: m.push(Global(f"copyreg extension {m.unsigned(1)}")),
    "\x83": lambda m: m.push(Global(f"copyreg extension {m.unsigned(2)}")),
    "\x84": lambda m: m.push(Global(f"copyreg extension {m.unsigned(4)}")),
    "\x85": lambda m: m.push(m.top(1)),
    "\x86": lambda m: m.push(m.top(2)),
    "\x87": lambda m: m.push(m.top(3)),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "\x8a": lambda m: m.push(_signed(m.string(m.unsigned(1)))),
    "\x8b": lambda m: m.push(_signed(m.string(m.unsigned(4)))),
    "\x8c": lambda m: m.push(m.text(m.unsigned(1))),
    "\x8d": lambda m: m.push(m.text(m.unsigned(8))),
    "\x8e": lambda m: m.push(m.string(m.unsigned(8))),
    "\x8f": lambda m: m.new(Opaque("builtins.set")),
    "\x90": lambda m: m.append(m.marked()),
    "\x91": lambda m: m.new(Opaque("builtins.frozenset", items=m.marked())),
    "\x92": _call_with_keywords,
    "\x93": _stack_global,
    "\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "\x95": _frame,
    "\x96": lambda m: m.push(m.string(m.unsigned(8))),
    "\x97": _out_of_band,
    "\x98": lambda m: None,
}
_OPCODES = tuple(_MEANINGS.get(chr(code), _unknown) for code in range(256))
