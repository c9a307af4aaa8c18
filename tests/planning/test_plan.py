import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.checkpoint.edits import Edited
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.errors import Unwritable
from shardkit.formats.safetensors import FORMAT
from shardkit.metadata.shard_names import INDEX_NAME
from shardkit.payloads.payload import Extent, Literal
from shardkit.planning.plan import OutputFile, Plan, by_size, plan_file, plan_folder

F32 = BY_CODE["F32"]
SOURCE = Path("/source/big.bin")


def tensor(name: str, elements: int, start: int = 0) -> TensorEntry:
    return TensorEntry((name,), F32, (elements,), Extent(SOURCE, start, 4 * elements))


def literal(file: OutputFile) -> bytes:
    """What a file begins with that is held in the plan itself."""
    (first, *_) = file.parts
    assert isinstance(first, Literal)
    return first.content


def edited(*entries: TensorEntry, **aliases: str) -> Edited:
    return Edited(entries, dict(aliases), ())


def folder(max_shard: int | None, *entries: TensorEntry) -> Plan:
    return plan_folder(edited(*entries), FORMAT, max_shard=max_shard, metadata={})


@given(st.lists(st.integers(1, 100)), st.integers(1, 150))
def test_runs_keep_order_and_bound(sizes: list[int], limit: int) -> None:
    entries = [tensor(str(number), size) for number, size in enumerate(sizes)]
    runs = list(by_size(entries, limit, lambda entry: entry.nbytes // 4))
    assert [entry for run in runs for entry in run] == entries
    assert all(sum(entry.nbytes // 4 for entry in run) <= limit or len(run) == 1 for run in runs)
    assert all(
        sum(e.nbytes // 4 for e in (*run, after[0])) > limit for run, after in pairwise(runs)
    )


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(4_000, 40_000))
def test_every_file_with_its_header_stays_within_the_bound(elements: list[int], bound: int) -> None:
    entries = [
        tensor(f"layers.{number}.weight", count, 100_000 * number)
        for number, count in enumerate(elements)
    ]
    plan = folder(bound, *entries)
    assert all(shard.nbytes <= bound or set(plan.oversized) for shard in plan.shards)
    for shard in plan.shards:
        inside = [name for name, file in plan.weight_map.items() if file == shard.name]
        assert shard.nbytes <= bound or (len(inside) == 1 and inside[0] in plan.oversized)


def test_one_shard_has_no_index_and_no_number() -> None:
    assert [file.name for file in folder(None, tensor("a", 4)).files] == ["model.safetensors"]


def test_several_shards_are_numbered_and_indexed() -> None:
    plan = folder(10_000, tensor("b", 2000), tensor("a", 2000, 9000))
    assert [file.name for file in plan.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX_NAME,
    ]
    index = json.loads(literal(plan.files[-1]))
    assert list(index["weight_map"].items()) == [
        ("a", plan.files[1].name),
        ("b", plan.files[0].name),
    ]
    assert index["metadata"]["total_size"] == plan.total_size == 16_000


def test_what_is_larger_than_the_bound_stands_alone_and_is_named() -> None:
    plan = folder(
        10_000, tensor("small", 10), tensor("large", 9000, 100), tensor("last", 10, 50_000)
    )
    assert plan.oversized == ("large",)
    assert len(plan.shards) == 3


def test_a_folded_tie_is_recorded_beside_the_tensor_that_is_kept() -> None:
    plan = plan_folder(
        edited(tensor("a", 2000), tensor("b", 2000, 9000), c="b"),
        FORMAT,
        max_shard=10_000,
        metadata={"by": "me"},
    )
    headers = [json.loads(literal(file)[8:]) for file in plan.shards]
    assert [header["__metadata__"] for header in headers] == [
        {"format": "pt", "by": "me"},
        {"format": "pt", "by": "me", "c": "b", "shardkit.aliases": '["c"]'},
    ]
    assert "c" not in plan.weight_map


def test_one_file_takes_everything() -> None:
    plan = plan_file(
        edited(tensor("a", 10), tensor("b", 10, 100)), FORMAT, name="x.safetensors", metadata={}
    )
    assert plan.weight_map == {"a": "x.safetensors", "b": "x.safetensors"}


def test_a_format_that_is_only_read_is_refused() -> None:
    with pytest.raises(Unwritable, match="safetensors can only be read"):
        plan_file(edited(tensor("a", 1)), replace(FORMAT, lay_out=None), name="x", metadata={})


def test_the_digest_is_of_what_is_written_from_where() -> None:
    plan = folder(None, tensor("a", 4))
    assert plan.digest == folder(None, tensor("a", 4)).digest
    others = [
        folder(None, tensor("a", 4, 8)),
        folder(None, tensor("b", 4)),
        folder(None, tensor("a", 5)),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 4
