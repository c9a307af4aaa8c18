"""The index of a folder of shards: what it may say, and how it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata import shard_index

PATH = Path("model.safetensors.index.json")

FAULTS: dict[str, tuple[object, str]] = {
    "a list": ([], "must be an object, found a list of 0"),
    "no weight_map": ({"metadata": {}}, "weight_map must name a file for each tensor, found None"),
    "an empty weight_map": ({"weight_map": {}}, "found a dict of 0"),
    "a weight_map that is a list": ({"weight_map": ["a"]}, "found a list of 1"),
    "metadata that is a list": (
        {"metadata": [1], "weight_map": {"a": "x"}},
        "metadata must be an object",
    ),
    "a file that is a number": (
        {"weight_map": {"a": 3}},
        "the file of tensor 'a' must be a name, found 3",
    ),
}
NAMES = {
    "": "has an empty name",
    "/etc/passwd": "is an absolute path",
    "C:\\x": "is an absolute path",
    "c:x": "is an absolute path",
    "a\\b": "contains a backslash",
    "../x.bin": "leads out of the folder",
    "a/../../x.bin": "leads out of the folder",
    "..": "leads out of the folder",
    "a\nb": "contains a control character",
    "a\x00": "contains a control character",
    "a\x85": "contains a control character",
    "a//b": "contains an empty component",
    "a/": "contains an empty component",
}


@pytest.mark.parametrize(("document", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(document: object, sentence: str) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)):
        shard_index.parse(PATH, json.dumps(document).encode(), Limits())


@pytest.mark.parametrize(("name", "sentence"), NAMES.items(), ids=map(repr, NAMES))
def test_a_name_that_could_escape_is_refused(name: str, sentence: str) -> None:
    content = json.dumps({"weight_map": {"w": name}}).encode()
    with pytest.raises(Malformed, match=re.escape(sentence)) as caught:
        shard_index.parse(PATH, content, Limits())
    assert "tensor 'w'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.bin", "sub/a.safetensors", "..a", "a..b", "modèle 1.bin", ".hidden"]
)
def test_a_name_inside_the_folder_is_fine(name: str) -> None:
    assert shard_index.parse(
        PATH, json.dumps({"weight_map": {"w": name}}).encode(), Limits()
    ).shards == [name]


def test_more_tensors_than_the_limit_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="lists 2 tensors"):
        shard_index.parse(PATH, b'{"weight_map": {"a": "x", "b": "x"}}', Limits(tensors=1))


def test_a_tensor_listed_twice_is_refused() -> None:
    with pytest.raises(Malformed, match="the key 'a' occurs twice"):
        shard_index.parse(PATH, b'{"weight_map": {"a": "x", "a": "y"}}', Limits())


def test_what_is_dumped_is_parsed() -> None:
    weight_map = {"b": "m2", "a": "m1", "é\n": "m1"}
    parsed = shard_index.parse(PATH, shard_index.dump(weight_map, 12), Limits())
    assert (parsed.weight_map, parsed.metadata, parsed.shards) == (
        weight_map,
        {"total_size": 12},
        ["m1", "m2"],
    )


def test_the_text_is_sorted_and_indented_by_two() -> None:
    text = shard_index.dump({"b": "y", "a": "x"}, 12).decode()
    assert text == (
        '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n    "a": "x",\n   '
        ' "b": "y"\n  }\n}\n'
    )


def test_an_index_beyond_what_hub_reads_is_compact() -> None:
    names = {
        f"model.layers.{number:07}.weight": "model-00001-of-00002.safetensors"
        for number in range(150_000)
    }
    text = shard_index.dump(names, 1)
    assert b"\n" not in text
    assert b", " not in text
    assert shard_index.parse(PATH, text, Limits()).weight_map == names
