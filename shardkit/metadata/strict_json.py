"""Untrusted JSON: documents that parsers read differently, or fail on, are refused with a sentence.

Duplicate keys, NaN, half a surrogate pair, text that is not UTF-8 and deep nesting are accepted by
some parsers and break others.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.printable import shown


def parse_json(
    path: Path,
    content: bytes,
    limits: Limits,
    *,
    where: str,
    made: Callable[[dict[str, object]], object] = lambda fields: fields,
) -> object:
    """Parse an untrusted JSON document strictly.

    Duplicate keys, NaN and unpaired surrogates are errors, because parsers disagree about them (RFC
    8259, section 4).

    Args:
        path: the file, for messages.
        content: the document, UTF-8.
        limits: `json_nesting` bounds its depth.
        where: what the document is, for messages.
        made: called with each JSON object as soon as it is read; what it returns takes the object's
            place. For documents of very many objects, since a dict takes much memory.

    Returns:
        Dicts, lists and scalars.

    Raises:
        Malformed: it is not JSON, or JSON that parsers read differently.
        LimitExceeded: it is nested too deeply.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.plugin import Limits, Malformed, parse_json
        >>> parse_json(Path("x.json"), b'{"shape": [4, 8]}', Limits(), where="header")
        {'shape': [4, 8]}
        >>> try:
        ...     parse_json(Path("x.json"), b'{"a": 1, "a": 2}', Limits(), where="header")
        ... except Malformed as error:
        ...     print(error)
        x.json: header: broken JSON: the key 'a' occurs twice
    """
    try:
        decoder = json.JSONDecoder(
            object_pairs_hook=lambda pairs: made(_unique(pairs)), parse_constant=_refuse
        )
        document: object = decoder.decode(content.decode())
    except RecursionError:
        raise _too_deep(path, limits.json_nesting + 1, where) from None
    except UnicodeDecodeError as error:
        raise Malformed(path, f"byte {error.start:,} is not UTF-8 text", where=where) from None
    except json.JSONDecodeError as error:
        raise Malformed(
            path, f"broken JSON: {error.msg} at character {error.pos:,}", where=where
        ) from None
    except ValueError as error:
        # Ours from below, or Python's: an integer of more digits than it converts.
        if "set_int_max_str_digits" in str(error):
            error = ValueError(f"a number of more than {sys.get_int_max_str_digits():,} digits")
        raise Malformed(path, f"broken JSON: {error}", where=where) from None
    _check_nesting(path, document, limits, where)
    _check_surrogates(path, content, document, where)
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return fields


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not a JSON number")


def _check_nesting(path: Path, document: object, limits: Limits, where: str) -> None:
    level = [document]
    for _ in range(limits.json_nesting):
        fields = [
            v
            for each in level
            if type(each) is dict
            for v in each.values()
            if type(v) is dict or type(v) is list
        ]
        items = [
            v
            for each in level
            if type(each) is list
            for v in each
            if type(v) is dict or type(v) is list
        ]
        level = [*fields, *items]
    if level:
        raise _too_deep(path, limits.json_nesting + 1, where)


def _check_surrogates(path: Path, content: bytes, document: object, where: str) -> None:
    if re.search(rb"\\u[dD]", content) is None:
        return
    try:
        # Some of it may have been made into what is no JSON, hence the default.
        json.dumps(document, ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError:
        raise Malformed(
            path, "a text contains an unpaired surrogate, which UTF-8 cannot encode", where=where
        ) from None


def _too_deep(path: Path, depth: int, where: str) -> LimitExceeded:
    return LimitExceeded(
        path, f"{where}: JSON nested {depth} deep or deeper", limit="json_nesting", actual=depth
    )
