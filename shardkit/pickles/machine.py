"""The state of a pickle being read: a window on its bytes, the stack, the marks and the memo.

A call creates a placeholder and is listed by name; nothing is executed. Faults are an IndexError
(an empty stack or window), a KeyError (a memo index never stored) or a ValueError with a sentence;
`pickles.unpickle` adds the position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from typing import Any

from shardkit.errors import LimitExceeded
from shardkit.limits import Limits
from shardkit.payloads.payload import Payload
from shardkit.pickles.objects import Builder, Dict, Global, LongString, Opaque, Vocabulary
from shardkit.printable import shown

SHORT = 4096  # bytes of the longest string that is held
OBJECT = 64  # what an object costs at least, in bytes

_WINDOW = 256 << 10
_ROOM = SHORT + 16  # an opcode and the longest argument that is read at once


class Machine:
    """A pickle machine at some byte of its stream.

    Attributes:
        window: the bytes at hand.
        base: where in the stream the window begins.
        at: the next byte, counted from the start of the window.
        begun: the byte at which the last operation began, once none is begun any more.
        refill_at: the byte of the window from which on `refill` is due.
        stack: the objects above the topmost mark.
        below: the stacks under each mark.
        memo: objects by the index they were stored under, but for those that the pickle never
            recalls.
        recalled: all indices that it recalls, and perhaps others; None where too much would have to
            be read to know.
        stored: how many times it has stored an object.
        calls: unknown classes and functions that would have been called, as a set in order.
        held: bytes of the objects made so far.
    """

    def __init__(
        self,
        path: Path,
        content: Payload,
        vocabulary: Vocabulary,
        limits: Limits,
        start: int,
        where: str,
    ) -> None:
        """Stand at byte *start* of *content*; *where* says for messages which part of *path* that
        is.
        """
        self.path = path
        self.content = content
        self.vocabulary = vocabulary
        self.limits = limits
        self.where = where
        self.window = b""
        self.base = start
        self.at = 0
        self.begun = 0
        self.refill_at = 0
        self.stack: list[Any] = []  # Any: what the stack holds is whatever the file says
        self.below: list[list[Any]] = []
        self.memo: dict[int, object] = {}
        self.recalled = _recalled(content, start)
        self.stored = 0
        self.globals: dict[tuple[str, str], object] = {}
        self.calls: dict[str, None] = {}
        self.held = 0

    def refill(self) -> None:
        """Move the window to the next byte, and check what is held so far."""
        self._check_held()
        self.base += self.at
        span = min(_WINDOW, self.content.nbytes - self.base)
        self.window = _bytes_of(self.content.narrow(self.base, span))
        self.at = 0
        self.refill_at = span - _ROOM if self.base + span < self.content.nbytes else span + 1

    def _check_held(self) -> None:
        held = self.held + OBJECT * (self.stored + len(self.below)) + 8 * len(self.stack)
        if held > self.limits.held_bytes:
            raise LimitExceeded(
                self.path,
                f"{f'{self.where}: ' if self.where else ''}"
                f"parsing the pickle takes more memory than {self.limits.held_bytes:,} bytes",
                limit="held_bytes",
                actual=2 * held,
            )

    # Reading arguments: `refill` has made sure that all but long strings lie in the window, unless
    # the stream ends.

    def number(self, struct: Struct) -> Any:
        at = self.at
        self.at = at + struct.size
        return struct.unpack_from(self.window, at)[0]

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self._taken(width), "little")

    def string(self, count: int) -> bytes | LongString:
        """The next *count* bytes; only their address if they are many."""
        if count <= SHORT:
            self.held += count + OBJECT
            return self._taken(count)
        long = LongString(self.base + self.at, count)
        self._skip(count)
        return long

    def text(self, count: int) -> str | LongString:
        raw = self.string(count)
        return raw if isinstance(raw, LongString) else raw.decode("utf-8", "backslashreplace")

    def line(self) -> bytes:
        """The bytes up to the end of the line, without it."""
        stop = self.window.find(b"\n", self.at, self.at + SHORT)
        if stop < 0:
            raise ValueError(f"a line of the pickle does not end within {SHORT:,} bytes")
        line = self.window[self.at : stop]
        self.held += len(line) + OBJECT
        self.at = stop + 1
        return line

    def _taken(self, count: int) -> bytes:
        at = self.at
        raw = self.window[at : at + count]
        if len(raw) != count:
            raise ValueError("the pickle ends before it is complete")
        self.at = at + count
        return raw

    def _skip(self, count: int) -> None:
        if self.base + self.at + count > self.content.nbytes:
            raise ValueError(f"a string of {count:,} bytes runs over the end of the pickle")
        self.at += count

    # The stack.

    def push(self, value: object) -> None:
        self.stack.append(value)

    def store(self, index: int) -> None:
        """Put the topmost object into the memo."""
        self.stored += 1
        if self.recalled is None or index in self.recalled:
            self.memo[index] = self.stack[-1]

    def new(self, value: object) -> None:
        """Push a container that was made for it."""
        self.held += OBJECT
        self.stack.append(value)

    def top(self, count: int) -> tuple[Any, ...]:
        """The *count* topmost values, taken off."""
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.held += OBJECT
        return values

    def marked(self) -> list[Any]:
        """Pop and return the items above the topmost mark; the mark is removed too."""
        values = self.stack
        self.stack = self.below.pop()
        self.held += 8 * len(values)
        return values

    # What changes an object on the stack, or makes one.

    def find(self, module: object, name: object) -> object:
        """What stands for a global."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError(
                f"the pickle names a class by {shown(module)} and {shown(name)}, where two "
                "texts "
                "are needed"
            )
        known = self.globals.get((module, name))
        if known is None:
            known = self.vocabulary.find(module, name)
            known = self.globals[module, name] = (
                Global(f"{module}.{name}") if known is None else known
            )
        return known

    def call(self, callee: object, args: object) -> object:
        """What stands for the result of a call."""
        self.held += 2 * OBJECT
        if type(callee) is Builder and type(args) is tuple:
            return callee.build(args)
        name = callee.name if isinstance(callee, Global | Builder | Opaque) else shown(callee)
        if not isinstance(callee, Builder):
            self.calls[name] = None
        return Opaque(name, args if type(args) is tuple else (args,))

    def build(self) -> None:
        """Give the topmost object its state. To what a Builder made it is not given: no weights are
        in it.
        """
        state = self.stack.pop()
        match self.stack[-1]:
            case Opaque() as opaque:
                opaque.states.append(state)
            case Dict() as table:
                table.state = state

    def append(self, values: Iterable[object]) -> None:
        match self.stack[-1]:
            case list() | Opaque() as target:
                target.extend(values)
            case other:
                raise ValueError(f"the pickle appends to {shown(other)}")

    def put(self, keys: list[Any], values: list[Any]) -> None:
        """Set items of the topmost object."""
        target = self.stack[-1]
        if not isinstance(target, Dict | Opaque):
            raise ValueError(f"the pickle sets an item of {shown(target)}")
        if len(keys) != len(values):
            raise ValueError("the pickle sets a key without a value")
        for key, value in zip(keys, values, strict=True):
            if type(key) is str and type(target) is Dict:
                target[key] = value
            else:
                target.put(key, value)


# An index of up to 255, four bytes behind LONG_BINGET, digits behind GET: what looks like one
# counts, wherever it stands.
_RECALLS = re.compile(rb"(?=j(.{4})|g([0-9]{1,20})\n)", re.DOTALL)
_SCANNED = 64 << 20  # bytes in which they are looked for
_OVERLAP = 24


def _recalled(content: Payload, start: int) -> frozenset[int] | None:
    """The indices that some GET behind byte *start* may recall.

    A pickle stores nearly every object that it makes, in case it is needed again, and nearly none
    is: what is not stored need not be kept.
    """
    if content.nbytes - start > _SCANNED:
        return None
    found = set(range(256))
    tail = b""
    for at in range(start, content.nbytes, _WINDOW):
        window = tail + _bytes_of(content.narrow(at, min(_WINDOW, content.nbytes - at)))
        for long, digits in _RECALLS.findall(window):
            found.add(int.from_bytes(long, "little") if long else int(digits))
        tail = window[-_OVERLAP:]
    return frozenset(found)


def _bytes_of(payload: Payload) -> bytes:
    return b"".join(bytes(chunk) for chunk in payload.chunks())
