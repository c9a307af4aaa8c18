"""Joined payloads are the bytes of torch's cat and stack, and weights in memory are given out as
they lie there.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.dtypes import BY_CODE
from shardkit.payloads import joined as joining
from shardkit.payloads.cast import Cast
from shardkit.payloads.joined import Joined, joined
from shardkit.payloads.payload import CHUNK, PAGE, Buffer, Concat, Literal, Payload, read_all
from shardkit.testing import check_payload


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def held(tensor: torch.Tensor) -> Literal:
    return Literal(raw(tensor))


def filled(shape: list[int], first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.data())
def test_a_join_is_a_cat_along_any_axis(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    tensors = [
        filled([*shape[:dim], n, *shape[dim + 1 :]], 1000 * i) for i, n in enumerate(lengths)
    ]
    payload = joined([held(t) for t in tensors], [t.shape for t in tensors], dim)
    assert read_all(payload) == raw(torch.cat(tensors, dim))
    if payload.nbytes:
        check_payload(payload, itemsize=4)


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 4), st.data())
def test_a_stack_is_a_join_of_shapes_with_one_index(
    shape: list[int], count: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape)))
    tensors = [filled(shape, 1000 * i) for i in range(count)]
    payload = joined([held(t) for t in tensors], [[*shape[:dim], 1, *shape[dim:]]] * count, dim)
    assert read_all(payload) == raw(torch.stack(tensors, dim))


@pytest.mark.parametrize("slab", [1, 100, 1000, 4 << 20])
def test_rows_are_read_in_the_memory_there_is(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_SLAB", slab)
    tensors = [filled([70, n, 3], 10_000 * n) for n in (1, 4, 2)]
    payload = joined([held(t) for t in tensors], [t.shape for t in tensors], 1)
    check_payload(payload, itemsize=4)
    assert read_all(payload) == raw(torch.cat(tensors, 1))


@pytest.mark.parametrize("rows", [3, 3_000])
def test_large_joins_come_in_whole_pages(rows: int) -> None:
    tensors = [
        torch.randint(0, 255, (rows, 12_000_011 // rows), dtype=torch.uint8) for _ in range(2)
    ]
    payload = joined([Buffer(t.numpy().data) for t in tensors], [t.shape for t in tensors], 1)
    lengths = [len(chunk) for chunk in payload.chunks()]
    assert all(n <= CHUNK for n in lengths)
    assert all(n % PAGE == 0 for n in lengths[:-1])
    assert read_all(payload) == raw(torch.cat(tensors, 1))


def test_a_join_along_the_first_axis_is_a_concat() -> None:
    parts: tuple[Payload, ...] = (Literal(b"abcd"), Literal(b"efgh"))
    assert joined(parts, [(2, 2), (2, 2)], 0) == Concat(parts)
    assert joined(parts, [(1, 4), (1, 4)], 1) == Concat(parts)
    assert isinstance(joined(parts, [(2, 2), (2, 2)], 1), Joined)
    assert joined((Literal(b"abcd"), Literal(b"")), [(2, 2), (2, 0)], 1) == Literal(b"abcd")


def test_a_narrowed_join_cuts_no_element_of_what_it_is_made_of() -> None:
    part = Cast(Literal(bytes(24)), BY_CODE["F32"], BY_CODE["BF16"])
    payload = joined([part, part], [(2, 3), (2, 3)], 1)
    with pytest.raises(ValueError, match="cuts an element"):
        payload.narrow(1, 2)
    assert payload.narrow(2, 14).nbytes == 14


@pytest.mark.parametrize("shapes", [[(2, 2), (3, 2)], [(2, 2), (2,)], [(2, 2)], []])
def test_what_does_not_fit_is_not_joined(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="cannot be joined"):
        joined([Literal(bytes(4))] * 2, shapes, 1)


@pytest.mark.parametrize("nbytes", [0, 1, 100, CHUNK + 5])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_buffer_keeps_the_rules_of_payloads(kind: type, nbytes: int) -> None:
    content = bytes(range(256)) * (nbytes // 256 + 1)
    payload = Buffer(kind(content[:nbytes]))
    check_payload(payload)
    assert read_all(payload) == content[:nbytes]


def test_the_chunks_of_a_buffer_are_the_memory_itself() -> None:
    memory = bytearray(CHUNK + 100)
    first, second = Buffer(memory).chunks()
    memory[3] = memory[CHUNK + 3] = 7
    assert first[3] == second[3] == 7


def test_equal_buffers_are_the_same_run_of_one_memory() -> None:
    memory = bytes(8)
    whole = Buffer(memory)
    assert whole.narrow(2, 4) == whole.narrow(0, 6).narrow(2, 4) != whole.narrow(2, 5)
    assert whole.narrow(0, 4) != whole.narrow(4, 4)
    assert whole != Buffer(memory)
    assert pickle.loads(pickle.dumps(whole.narrow(2, 4))) == whole.narrow(2, 4)
    assert len(repr(Buffer(bytes(100_000)))) < 200


def test_memory_of_any_items_is_held_as_bytes() -> None:
    table = torch.arange(6, dtype=torch.int16).reshape(2, 3).numpy()
    assert read_all(Buffer(table.data)).hex() == "000001000200030004000500"
