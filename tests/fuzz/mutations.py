"""Changes that leave JSON what it is: with bytes changed at random little is JSON, and nothing
reaches what lies behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = [0, 1, -1, 7, 16, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, True, None]
TEXTS = [
    "",
    "F32",
    "U8",
    "F4",
    "pt",
    "..",
    "/",
    "a/b",
    "C:x",
    "a\\b",
    "\x1b[2J",
    "\ud800",
    "model-00001-of-00001.safetensors",
]
NESTED = [[], {}, [0, 0], [2, 2], [0, 16], [[[]]], {"": ""}, {"format": "pt"}]
VALUES = [*NUMBERS, *TEXTS, *NESTED]

Place = tuple[Any, Any]  # a dict or a list of JSON, and a key or an index in it


def changed(content: bytes, random: Random) -> bytes | None:
    """*content* with one value in it renamed, removed or replaced; None where it is not JSON that
    holds any.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    places = list(_places(document))
    if not places:
        return None
    around, key = random.choice(places)
    change = random.choice([_remove, _rename, _copy, _replace, _replace])
    change(around, key, places, random)
    return json.dumps(document).encode()


def _places(document: object) -> Iterator[Place]:
    stack = [document]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            yield from (
                (node, key) for key in (list(node) if isinstance(node, dict) else range(len(node)))
            )
            stack.extend(node.values() if isinstance(node, dict) else node)


def _remove(around: Any, key: Any, places: list[Place], random: Random) -> None:
    del around[key]


def _rename(around: Any, key: Any, places: list[Place], random: Random) -> None:
    if isinstance(around, dict):
        names = TEXTS + [other for _, other in places if isinstance(other, str)]
        around[random.choice(names)] = around.pop(key)


def _copy(around: Any, key: Any, places: list[Place], random: Random) -> None:
    other, at = random.choice(places)
    around[key] = json.loads(json.dumps(other[at]))


def _replace(around: Any, key: Any, places: list[Place], random: Random) -> None:
    around[key] = random.choice(VALUES)
