"""Values and paths as printable text: a message never contains a control character from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    r"""Quote a *value* from an untrusted file as one bounded, escaped piece of a sentence.

    The value's own methods are never called. Text and bytes are quoted, cut at 80 characters and
    freed of control characters. Containers and objects are named by kind only, since the `repr` of
    a deep or shared structure may never end.

    Args:
        value: anything that a file holds.

    Returns:
        Printable text on one line.

    Example:
        >>> from shardkit.plugin import shown
        >>> print(shown("name\n\x1b[31m"), shown([1, 2]), shown(2**200))
        'name\n\x1b[31m' a list of 2 an integer of 201 bits
    """
    match value:
        case str():
            return _clipped(value)
        case bytes() | bytearray():
            return "bytes " + _clipped(bytes(value[: _SHOWN_CHARACTERS + 1]).decode("latin-1"))
        case bool() | None | float():
            return str(value)
        case int():
            return (
                str(value)
                if value.bit_length() <= 128
                else f"an integer of {value.bit_length()} bits"
            )
        case tuple() | list() | dict() | set() | frozenset():
            return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def listed(items: Sequence[str], *, most: int = 5) -> str:
    """The first *most* of *items*, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def several(count: int, noun: str) -> str:
    """Write *count* with its *noun*, in the plural unless it is one.

    Args:
        count: how many there are.
        noun: in the singular; the plural adds an "s".

    Example:
        >>> from shardkit.plugin import several
        >>> several(1, "file"), several(1200, "tensor")
        ('1 file', '1,200 tensors')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shown_path(path: Path) -> str:
    """Return *path* as it is printed: complete, but with control characters escaped."""
    return printable(str(path))


def printable(text: str) -> str:
    """*text* with all that a terminal might obey, or not show, as escapes."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _clipped(text: str) -> str:
    body = printable(text[:_SHOWN_CHARACTERS])
    return f"'{body}'" if len(text) <= _SHOWN_CHARACTERS else f"'{body}…'"


def _escaped(character: str) -> str:
    return (
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
    )
