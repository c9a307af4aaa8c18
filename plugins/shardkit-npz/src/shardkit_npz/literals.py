"""The Python literals that headers of .npy files are made of, read without Python's own parser.

A header is text from a stranger, and `ast.literal_eval` answers some texts with a MemoryError, a
RecursionError or a crash. Here nesting is bounded, and there is nothing but a dictionary of texts,
numbers, words and sequences of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Literal = str | int | bool | None | list["Literal"]

_DEEPEST = 32
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<mark>[{}()\[\]:,])
      | [ub]?'(?P<single>(?:[^'\\]|\\.)*)'
      | [ub]?"(?P<double>(?:[^"\\]|\\.)*)"
      | (?P<word>True|False|None)\b
      | (?P<number>-?\d{1,20})L?\b
    )""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
_CLOSING = {"(": ")", "[": "]"}


class _Mark(str):
    """A bracket, a comma or a colon, which is no text."""

    __slots__ = ()


_Tokens = Iterator[Literal | _Mark]


def parse_dict(text: str) -> dict[str, Literal]:
    """The dictionary that *text* writes; tuples come as lists, and escapes in texts stay as they
    are.

    Raises:
        ValueError: it is no such dictionary, or nested more than 32 deep.
    """
    tokens = _tokens(text.strip())
    if not _is(next(tokens), "{"):
        raise ValueError("it does not begin with '{'")
    items = dict(_items(tokens))
    if not _is(next(tokens), ""):
        raise ValueError("something follows the closing '}'")
    return items


def _tokens(text: str) -> _Tokens:
    """The literals and marks of *text*, and an empty mark for its end."""
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"it is not a literal, at character {at}")
        at = match.end()
        yield _token(match)
    while True:
        yield _Mark("")


def _token(match: re.Match[str]) -> Literal | _Mark:
    content = match[match.lastgroup or 0]
    match match.lastgroup:
        case "mark":
            return _Mark(content)
        case "word":
            return {"True": True, "False": False, "None": None}[content]
        case "number":
            return int(content)
    return content


def _is(token: Literal | _Mark, mark: str) -> bool:
    return isinstance(token, _Mark) and token == mark


def _items(tokens: _Tokens) -> Iterator[tuple[str, Literal]]:
    token = next(tokens)
    while not _is(token, "}"):
        if isinstance(token, _Mark) or not isinstance(token, str) or not _is(next(tokens), ":"):
            raise ValueError("a dictionary needs texts for keys, each followed by ':'")
        yield token, _value(tokens, next(tokens), 0)
        token = _after_item(tokens, "}")


def _value(tokens: _Tokens, token: Literal | _Mark, depth: int) -> Literal:
    if not isinstance(token, _Mark):
        return token
    if token not in _CLOSING or depth == _DEEPEST:
        raise ValueError(
            f"it is nested more than {_DEEPEST} deep"
            if token in _CLOSING
            else f"{token or 'its end'!r} stands for a value"
        )
    return list(_values(tokens, _CLOSING[token], depth + 1))


def _values(tokens: _Tokens, closing: str, depth: int) -> Iterator[Literal]:
    token = next(tokens)
    while not _is(token, closing):
        yield _value(tokens, token, depth)
        token = _after_item(tokens, closing)


def _after_item(tokens: _Tokens, closing: str) -> Literal | _Mark:
    """What follows an item and the comma behind it; the last needs no comma."""
    token = next(tokens)
    if _is(token, ","):
        return next(tokens)
    if not _is(token, closing):
        raise ValueError(f"',' or {closing!r} must follow an item")
    return token
