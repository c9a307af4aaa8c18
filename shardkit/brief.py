"""Reprs that fit in a few lines, whatever a value holds: reports and plans may list a hundred
thousand names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, ClassVar, Protocol, TypeGuard

from shardkit.printable import shown

_MOST = 3  # items of a collection
_LONGEST = 100  # characters of one field


class Dataclass(Protocol):
    """Any instance of one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # Any: as of dataclasses.fields


def brief(value: Dataclass) -> str:
    """The repr of a dataclass without what is empty, and of long fields the beginning only."""
    held = ((field.name, getattr(value, field.name)) for field in fields(value) if field.repr)
    parts = [f"{name}={_bounded(each)}" for name, each in held if not _is_empty(each)]
    return f"{type(value).__name__}({', '.join(parts)})"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, Sized) and not len(value))


def _bounded(value: object) -> str:
    match value:
        case str():
            return shown(value)
        case bytes() | bytearray() | memoryview():
            return shown(bytes(value[:_LONGEST]))
        case Mapping() if not is_dataclass(value):
            inside = [
                f"{_bounded(key)}: {_bounded(each)}" for key, each in islice(value.items(), _MOST)
            ]
            return f"{{{', '.join([*inside, *_more(len(value))])}}}"
        case tuple() | list():
            inside = [_bounded(each) for each in value[:_MOST]]
            return f"({', '.join([*inside, *_more(len(value))])})"
    text = brief(value) if _has_long_repr(value) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _has_long_repr(value: object) -> TypeGuard[Dataclass]:
    """Whether the repr of *value* is the one that `dataclass` makes, which ends where the value
    does.
    """
    return is_dataclass(value) and bool(getattr(value, "__dataclass_params__").repr)  # noqa: B009 - not in typeshed


def _more(count: int) -> list[str]:
    return [f"… {count - _MOST:,} more"] if count > _MOST else []
