"""How the tensors of a block stand: experts together, 64 bytes where sizes allow, always in step
with their types.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shardkit.checkpoint.blocks import BlockEntries, arranged, misaligned, reordered
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE, DType
from shardkit.payloads.payload import Extent

F32, BF16, U8, I64 = (BY_CODE[code] for code in ("F32", "BF16", "U8", "I64"))
SIZED = st.tuples(st.sampled_from([F32, BF16, U8, I64]), st.integers(0, 70))


def tensor(name: str, count: int = 64, dtype: DType = F32) -> TensorEntry:
    return TensorEntry((name,), dtype, (count,), Extent(Path("x"), 0, count * dtype.itemsize))


def names(entries: Iterable[TensorEntry]) -> list[str]:
    return [entry.name for entry in entries]


def test_experts_come_last_each_in_one_piece_by_their_numbers() -> None:
    parts = [f"l.mlp.experts.{expert}.{part}" for part in ("w1", "w2") for expert in (10, 2)]
    block = BlockEntries("l", tuple(map(tensor, [*parts, "l.gate", "l.mlp.shared_experts.w1"])))
    assert names(arranged(block).entries) == [
        "l.gate",
        "l.mlp.shared_experts.w1",
        *(f"l.mlp.experts.{expert}.{part}" for expert in (2, 10) for part in ("w1", "w2")),
    ]


def test_experts_are_told_however_they_are_called() -> None:
    for first, second in (
        ("experts.expert_0.wi", "experts.expert_1.wi"),
        ("moe.expert.0.w", "moe.expert.1.w"),
    ):
        block = BlockEntries(
            "l",
            (tensor(f"l.{second}"), tensor(f"l.{first}.a"), tensor("l.z"), tensor(f"l.{second}.b")),
        )
        assert names(arranged(block).entries) == [
            "l.z",
            f"l.{first}.a",
            f"l.{second}",
            f"l.{second}.b",
        ]


def test_what_is_no_multiple_of_64_bytes_comes_last_and_wide_types_before_narrow_ones() -> None:
    block = BlockEntries(
        "l",
        (
            tensor("mask", 3, U8),
            tensor("count", 1, I64),
            tensor("w"),
            tensor("e.experts.0.w"),
            tensor("half", 3, BF16),
        ),
    )
    assert names(arranged(block).entries) == ["w", "e.experts.0.w", "count", "half", "mask"]


def test_a_block_of_even_sizes_keeps_the_order_of_the_source() -> None:
    block = BlockEntries("l", tuple(tensor(name) for name in "cab"))
    assert arranged(block) == block


@given(st.lists(SIZED, max_size=12), st.booleans())
def test_every_tensor_is_in_step_with_its_type_and_none_is_lost(
    sizes: list[tuple[DType, int]], apart: bool
) -> None:
    called = [f"l.experts.{at // 2}.{at}" if apart else f"l.{at}" for at in range(len(sizes))]
    block = BlockEntries(
        "l",
        tuple(
            tensor(name, count, dtype) for name, (dtype, count) in zip(called, sizes, strict=True)
        ),
    )
    found = arranged(block).entries
    assert not misaligned(found)
    assert sorted(names(found)) == sorted(called)


@given(st.lists(st.integers(0, 5).map(lambda count: 16 * count), max_size=12))
def test_where_every_size_allows_it_every_tensor_lies_at_64_bytes(counts: list[int]) -> None:
    block = BlockEntries(
        "l", tuple(tensor(f"l.experts.{at % 3}.{at}", count) for at, count in enumerate(counts))
    )
    at = 0
    for entry in arranged(block).entries:
        assert at % 64 == 0
        at += entry.nbytes


def test_blocks_are_called_by_their_names_or_by_what_lies_in_them() -> None:
    blocks = [
        BlockEntries(name, (tensor(f"{name}.w"),))
        for name in ("embed", "layers.1", "layers.10", "head")
    ]
    called, silent = reordered(
        blocks, ["model", "layers.10.attn.q", "embed.w", "layers", "layers.1", "embed"]
    )
    assert ([block.name for block in called], [block.name for block in silent]) == (
        ["layers.10", "embed", "layers.1"],
        ["head"],
    )
    assert reordered(blocks, ["." * 100_000]) == ((), tuple(blocks))
