"""What each opcode of a pickle does to the machine, for all protocols from 0 to 5 (CPython's
Lib/pickle.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from struct import Struct

from shardkit.pickles.machine import OBJECT, SHORT, Machine
from shardkit.pickles.objects import Dict, Global, LongString, Opaque
from shardkit.printable import shown

Operation = Callable[[Machine], object]
"""Reads its argument from the stream and changes the stack; what it returns is ignored."""


class Stopped(Exception):
    """The pickle is complete."""


_U16 = Struct("<H")
_U32 = Struct("<I")
_I32 = Struct("<i")
_F64 = Struct(">d")
_uint = _U32.unpack_from


# Of these a torch pickle consists, by far: written out, they cost half.
def _text(m: Machine) -> None:
    window, start = m.window, m.at + 4
    (count,) = _uint(window, m.at)
    m.at = start
    if count > SHORT or start + count > len(window):
        m.stack.append(m.text(count))
        return
    m.at = stop = start + count
    m.held += count + OBJECT
    m.stack.append(window[start:stop].decode("utf-8", "backslashreplace"))


def _persistent(m: Machine) -> None:
    m.held += OBJECT
    stack = m.stack
    stack[-1] = m.vocabulary.persistent(stack[-1])


def _reduce(m: Machine) -> None:
    stack = m.stack
    args = stack.pop()
    stack[-1] = m.call(stack[-1], args)


def _false(m: Machine) -> None:
    m.stack.append(False)


def _empty_tuple(m: Machine) -> None:
    m.stack.append(())


def _stop(m: Machine) -> None:
    if not m.stack:
        raise ValueError("the pickle stops with nothing on its stack")
    raise Stopped


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
        return (
            int(line.removesuffix(b"L"))
            if line.rstrip(b"L").lstrip(b"-").isdigit()
            else float(line)
        )
    except ValueError:
        raise ValueError(f"{shown(line)} is not a number") from None


def _signed(raw: bytes | LongString) -> object:
    return raw if isinstance(raw, LongString) else int.from_bytes(raw, "little", signed=True)


def _unknown(m: Machine) -> None:
    code = m.window[m.at - 1]
    raise ValueError(f"0x{code:02x} is not an opcode of pickle")


def _out_of_band(m: Machine) -> None:
    raise ValueError("the pickle refers to an out-of-band buffer, which is not in the file")


_ESCAPED = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}

_MEANINGS: dict[str, Operation] = {
    ".": _stop,
    "0": _pop,
    "1": Machine.marked,
    "2": lambda m: m.push(m.stack[-1]),
    "F": lambda m: m.push(_number(m.line())),
    "G": lambda m: m.push(m.number(_F64)),
    "I": lambda m: m.push(_number(m.line())),
    "J": lambda m: m.push(m.number(_I32)),
    "L": lambda m: m.push(_number(m.line())),
    "M": lambda m: m.push(m.number(_U16)),
    "N": lambda m: m.push(None),
    "P": lambda m: m.new(m.vocabulary.persistent(_name(m))),
    "Q": _persistent,
    "R": _reduce,
    "S": lambda m: m.push(_python2(_quoted(m.line()))),
    "T": lambda m: m.push(_python2(m.string(m.number(_U32)))),
    "U": lambda m: m.push(_python2(m.string(m.unsigned(1)))),
    "V": lambda m: m.push(m.line().decode("raw-unicode-escape", "backslashreplace")),
    "X": _text,
    "B": lambda m: m.push(m.string(m.number(_U32))),
    "C": lambda m: m.push(m.string(m.unsigned(1))),
    "a": lambda m: m.append((m.stack.pop(),)),
    "b": Machine.build,
    "c": lambda m: m.push(_found(m)),
    "d": _table,
    "}": lambda m: m.new(Dict()),
    "e": lambda m: m.append(m.marked()),
    "g": lambda m: m.push(m.memo[int(m.line())]),
    "j": lambda m: m.push(m.memo[m.number(_U32)]),
    "i": _instance,
    "l": lambda m: m.new(m.marked()),
    "]": lambda m: m.new([]),
    "o": _call_marked,
    "p": lambda m: m.store(int(m.line())),
    "q": lambda m: m.store(m.unsigned(1)),
    "s": _set_item,
    ")": _empty_tuple,
    "u": _set_items,
    "\x80": _protocol,
    "\x81": _reduce,
    "\x82": lambda m: m.push(Global(f"copyreg extension {m.unsigned(1)}")),
    "\x83": lambda m: m.push(Global(f"copyreg extension {m.unsigned(2)}")),
    "\x84": lambda m: m.push(Global(f"copyreg extension {m.unsigned(4)}")),
    "\x86": lambda m: m.push(m.top(2)),
    "\x87": lambda m: m.push(m.top(3)),
    "\x88": lambda m: m.push(True),
    "\x89": _false,
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
    "\x94": lambda m: m.store(m.stored),
    "\x95": _frame,
    "\x96": lambda m: m.push(m.string(m.unsigned(8))),
    "\x97": _out_of_band,
    "\x98": lambda m: None,
}
OPCODES: tuple[Operation, ...] = tuple(_MEANINGS.get(chr(code), _unknown) for code in range(256))
