"""Names that are near to one that is not there: what its owner may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

_MOST = 3
_LONGEST = 200  # characters of a name that is compared
_COMPARED = 1000  # names that are compared letter by letter, which is slow


def near(name: object, names: Iterable[str]) -> list[str]:
    """A few of *names*: those that differ from *name* in the modules around it or in case, else the
    likest ones.

    >>> near("h.0.attn.weight", ["model.h.0.attn.weight", "model.h.0.attn.bias"])
    ['model.h.0.attn.weight']
    >>> near("haed", ["body", "head"])
    ['head']
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        return []
    names = [each for each in names if len(each) <= _LONGEST]
    lower = name.lower()
    inside = (
        each for each in names if _is_end(each.lower(), lower) or _is_end(lower, each.lower())
    )
    if found := list(islice(inside, _MOST)):
        return found
    last, steps = name.rpartition(".")[2], name.count(".") + 1
    alike = [each for each in names if each.rpartition(".")[2] == last]
    for some in (alike[:_COMPARED], names[:_COMPARED]):
        ends = {".".join(each.split(".")[-steps:]): each for each in reversed(some)}
        if found := get_close_matches(name, ends, _MOST):
            return [ends[each] for each in found]
    return []


def _is_end(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
