"""What the bytes of a part depend on, as bytes for a digest: the same wherever and whenever a plan
is made, whether its paths were given as relative ones or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from shardkit.payloads.compressed import Spool
from shardkit.payloads.payload import Extent, Literal, Part


def identity(part: Part, absolute: Callable[[Path], str]) -> bytes:
    """The identity of *part*: its class, and the fields that its `repr` shows.

    Args:
        part: a payload or a trailer.
        absolute: makes a path absolute.
    """
    if type(part) is Extent:  # as most parts are
        text = f"{absolute(part.path)}\0{part.start}\0{part.nbytes}\n"
    elif type(part) is Literal:  # a header, which may be long
        return hashlib.sha256(part.content).digest()
    else:
        text = "".join(_told(part, absolute)) + "\n"
    return text.encode("utf-8", "surrogateescape")


def _told(value: object, absolute: Callable[[Path], str]) -> Iterator[str]:
    if isinstance(value, Path):
        yield repr(absolute(value))
    elif isinstance(value, Spool):
        yield "Spool("
        yield from _told(value.origin, absolute)
        yield f",{value.codec.name!r})"
    elif isinstance(value, tuple):
        yield "("
        for each in value:
            yield from _told(each, absolute)
            yield ","
        yield ")"
    elif is_dataclass(value) and not isinstance(value, type):
        yield f"{type(value).__qualname__}("
        for field in fields(value):
            if field.repr:
                yield f"{field.name}="
                yield from _told(getattr(value, field.name), absolute)
                yield ","
        yield ")"
    else:
        yield repr(value)
