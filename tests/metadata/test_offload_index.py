"""offload.json: what is dumped is parsed again, and what breaks its rules is refused with a
sentence.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata.offload_index import BlockRun, OffloadRecord, Origin, Shard, dump, parse

PATH = Path("folder/offload.json")
TEXT = st.text(max_size=6)


def record(*runs: BlockRun) -> OffloadRecord:
    origin = Origin("big.bin", "torch-zip", (("big.bin", 900),))
    return OffloadRecord(
        "sha256",
        origin,
        (("BF16", 40),),
        (Shard("a.safetensors", 100, "ab"), Shard("b", 50, "cd")),
        runs,
    )


GOOD = record(
    BlockRun("embed", "a.safetensors", 10, 50, ("w", "é"), "11"),
    BlockRun("layers.0", "b", 10, 50, (), "22"),
)


@given(st.lists(st.tuples(TEXT, st.integers(0, 1), st.lists(TEXT, max_size=3)), max_size=4))
def test_what_is_dumped_is_parsed_again(blocks: list[tuple[str, int, list[str]]]) -> None:
    runs = [
        BlockRun(name, "b", at, at + 5, tuple(tensors), "ff")
        for at, (name, _, tensors) in enumerate(blocks)
        for at in [5 * at]
    ]
    assert parse(PATH, dump(record(*runs)), Limits()) == record(*runs)


def test_digests_are_put_in_where_they_belong() -> None:
    bare = record(
        BlockRun("x", "b", 0, 5, ()),
        BlockRun("y", "a.safetensors", 0, 5, ()),
        BlockRun("x", "b", 5, 9, ()),
    )
    written = parse(
        PATH, dump(bare, {"b": ["first", "second"], "a.safetensors": ["third"]}), Limits()
    )
    assert [run.digest for run in written.runs] == ["first", "third", "second"]
    assert written.blocks == ("x", "y")
    assert [run.start for run in written.runs_in("b")] == [0, 5]


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(dump(GOOD)), **fields}).encode()


BLOCK: dict[str, Any] = {
    "name": "x",
    "shard": "b",
    "start": 0,
    "stop": 5,
    "digest": "ff",
    "tensors": [],
}
BROKEN = {
    "no JSON": (b"{", "broken JSON"),
    "a list": (b"[]", "must name a source, an algorithm, shards and blocks"),
    "an empty object": (b"{}", "must name a source, an algorithm, shards and blocks"),
    "a later version": (changed(version=2), "is of version 2, and 1 is known"),
    "an unknown algorithm": (
        changed(algorithm="md5"),
        "the algorithm is 'md5', and xxh3 and sha256 are known",
    ),
    "no source": (changed(source={"name": 3}), "the source must have a name, a format and files"),
    "a size that is none": (
        changed(dtypes={"BF16": "many"}),
        "'BF16' must have a number of bytes, found 'many'",
    ),
    "a file elsewhere": (
        changed(shards={"../b": {"nbytes": 1, "header": ""}}),
        "'../b' leads out of the folder",
    ),
    "a file without a header": (
        changed(shards={"b": {"nbytes": 1}}),
        "must have a length and the digest of its header",
    ),
    "a block that is none": (
        changed(blocks=[3]),
        "a block must have a name and a byte range, found 3",
    ),
    "a block in no file": (
        changed(blocks=[{**BLOCK, "shard": "c"}]),
        "the block 'x' has no byte range",
    ),
    "a block behind the end": (
        changed(blocks=[{**BLOCK, "stop": 51}]),
        "the block 'x' has no byte range",
    ),
    "blocks that overlap": (
        changed(blocks=[BLOCK, {**BLOCK, "start": 4}]),
        "has no byte range, or overlaps another",
    ),
    "tensors that are no names": (
        changed(blocks=[{**BLOCK, "tensors": [1]}]),
        "must name its tensors, found a list of 1",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_record_that_breaks_the_rules_is_refused(content: bytes, sentence: str) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)):
        parse(PATH, content, Limits())


def test_a_record_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        # Deeper than any recursion limit that another library may have set.
        parse(PATH, b"[" * 100_000, Limits())
