"""JSON that readers take in two ways is refused with a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata.strict_json import parse_json

PATH = Path("some.json")

FAULTS = {
    "a key that occurs twice": (b'{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
    "not a number": (b'{"a": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
    "bytes that are no UTF-8": (b'{"a\xff": 1}', "byte 3 is not UTF-8 text"),
    "unpaired surrogate in a key": (b'{"\\ud800": 1}', "unpaired surrogate"),
    "unpaired surrogate in a value": (b'{"a": ["x", "\\uDFFF"]}', "unpaired surrogate"),
    "an integer of too many digits": (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
    "cut off": (b'{"a": [1, 2', "broken JSON"),
    "something after the document": (b'{"a": 1} x', "Extra data at character 9"),
    "nothing": (b"", "broken JSON"),
    "a raw control character": (b'{"a\x01": 1}', "broken JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "broken JSON"),
}


@pytest.mark.parametrize(("content", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(content: bytes, sentence: str) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)) as caught:
        parse_json(PATH, content, Limits(), where="index")
    assert str(caught.value).startswith("some.json: index: ")


@pytest.mark.parametrize("around", [("[", "]"), ('{"a":', "}"), ('[0, {"b": ', '}, "]]]"]')])
def test_nesting_is_bounded_at_exactly_the_limit(around: tuple[str, str]) -> None:
    levels = sum(around[0].count(bracket) for bracket in "[{")
    limits = Limits(json_nesting=64)
    fine = around[0] * (64 // levels) + "0" + around[1] * (64 // levels)
    parse_json(PATH, fine.encode(), limits, where="header")
    deeper = "[" + fine + "]"
    with pytest.raises(LimitExceeded, match="nested 65 deep"):
        parse_json(PATH, deeper.encode(), limits, where="header")


def test_nesting_beyond_the_parser_is_the_same_error() -> None:
    with pytest.raises(LimitExceeded) as caught:
        parse_json(PATH, b"[" * 200_000 + b"]" * 200_000, Limits(), where="header")
    assert caught.value.limit == "json_nesting"


def test_a_whole_surrogate_pair_and_an_escaped_backslash_are_text() -> None:
    assert parse_json(PATH, rb'{"\ud83d\ude00": "\\ud800"}', Limits(), where="header") == {
        "😀": "\\ud800"
    }
