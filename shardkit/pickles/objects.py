"""The representation of a pickle's objects when nothing is executed: text, numbers, lists and
tuples are themselves, the rest is here.

Nothing here hashes, compares or prints an untrusted value, and nothing recurses: a structure may be
cyclic, 100,000 deep or shared until its size has a thousand digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

PlainKey = str | int | float | bool | bytes | None
"""What may be a key of a real dict."""

# Beyond 60 bits, integers can be chosen so that their hashes are equal; a dict of those takes
# quadratic time.
_KEY_BITS = 60
_PLAIN = frozenset({str, float, bool, bytes, type(None)})


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names and we do not know."""

    name: str


@dataclass(frozen=True, slots=True)
class Builder:
    """A class or function that we know.

    Attributes:
        name: module and name, dotted.
        build: takes the arguments that the pickle gives, and returns what stands for the result.
            Raises ValueError with a sentence if they are not what the function takes.
    """

    name: str
    build: Callable[[tuple[object, ...]], object]


@dataclass(frozen=True, slots=True)
class LongString:
    """A byte string or a text too long to be kept in memory: its range in the pickle.

    Attributes:
        start: its first byte in the pickle.
        nbytes: its length there.
        is_latin1: whether it is text in UTF-8 that stands for bytes, each character for one.
    """

    start: int
    nbytes: int
    is_latin1: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The globals and persistent ids that the pickle machine knows.

    Attributes:
        find: what stands for the global of this module and name: a Builder, a value, or None if it
            is unknown.
        persistent: what stands for a persistent id. Both raise ValueError with a sentence if the
            file is at fault.
    """

    find: Callable[[str, str], object]
    persistent: Callable[[object], object]


class Dict(dict[PlainKey, object]):
    """A dict, or one of its kin.

    Attributes:
        pairs: the items whose keys are no plain ones.
        state: what is in its `__dict__`, as in the `_metadata` of a state dict; None if nothing is.
    """

    pairs: list[tuple[object, object]] | None = None
    state: object = None

    def put(self, key: object, value: object) -> None:
        """Set *key* to *value*; only a plain key is hashed."""
        if is_plain_key(key):
            self[key] = value  # type: ignore[index]  # mypy cannot narrow by exact type
        elif self.pairs is None:
            self.pairs = [(key, value)]
        else:
            self.pairs.append((key, value))


class Opaque:
    """An object of a class that we do not know: what it was made of, and never the object.

    Attributes:
        name: the class or function, dotted.
        args: what it was called with.
        states: what `__setstate__`, or `__dict__`, was given; nearly always one.
        items: what was appended or added to it.
        mapping: what was set in it by key.
    """

    __slots__ = ("args", "items", "mapping", "name", "states")

    def __init__(
        self, name: str, args: tuple[object, ...] = (), items: list[object] | None = None
    ) -> None:
        self.name = name
        self.args = args
        self.items = items
        self.states: list[object] = []
        self.mapping: Dict | None = None

    def extend(self, values: Iterable[object]) -> None:
        """Append *values* to the items."""
        if self.items is None:
            self.items = []
        self.items.extend(values)

    def put(self, key: object, value: object) -> None:
        """Set *key* to *value*."""
        if self.mapping is None:
            self.mapping = Dict()
        self.mapping.put(key, value)


def is_plain_key(key: object) -> bool:
    """Whether *key* may be hashed: its type is one of ours, and its hash cannot be chosen."""
    kind = type(key)
    return kind in _PLAIN or (kind is int and key.bit_length() <= _KEY_BITS)  # type: ignore[attr-defined]  # it is an int


def key_text(key: PlainKey) -> str:
    """*key* as a part of a name."""
    return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)
