"""The safetensors header: what the reference reader refuses is refused, and what is written it
reads.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE, DTYPES
from shardkit.errors import FormatError, LimitExceeded, Malformed, NameClash, Unwritable
from shardkit.limits import Limits
from shardkit.metadata import safetensors_header
from shardkit.payloads.payload import Extent

PATH = Path("m.safetensors")
F32 = BY_CODE["F32"]


def tensor(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def parse(
    document: object, data_nbytes: int = 4, limits: Limits = Limits()
) -> safetensors_header.Header:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return safetensors_header.parse(
        PATH, content, Extent(PATH, 8 + len(content), data_nbytes), limits
    )


def whole(document: object, data_nbytes: int = 4) -> bytes:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(content).to_bytes(8, "little") + content + bytes(data_nbytes)


def reference(document: object, data_nbytes: int) -> dict[str, tuple[str, list[int]]]:
    """What the reference reader finds."""
    listed = deserialize(whole(document, data_nbytes))  # type: ignore[no-untyped-call]  # the package has no types here
    return {name: (info["dtype"], info["shape"]) for name, info in listed}


def entry(name: str, shape: tuple[int, ...] = (1,), code: str = "F32") -> TensorEntry:
    dtype = BY_CODE[code]
    return TensorEntry((name,), dtype, shape, Extent(PATH, 0, dtype.nbytes(shape)))


LIST = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [1]}}'
TWICE = (
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", '
    b'"shape": [1], "data_offsets": [0, 4]}}'
)
FAULTS: dict[str, tuple[object, int, str]] = {
    "no object": (b'["a"]    ', 4, "must begin with '{'"),
    "a space before it": (b' {"a": 1}', 4, "must begin with '{'"),
    "no UTF-8": (b'{"\xff": 1}', 4, "not UTF-8"),
    "broken JSON": (b'{"a": ', 4, "broken JSON"),
    "a tensor that occurs twice": (TWICE, 4, "the key 'a' occurs twice"),
    "a field that occurs twice": (LIST, 4, "'shape' occurs twice"),
    "metadata that is no object": (
        {"__metadata__": ["a"], "a": tensor()},
        4,
        "__metadata__ must hold texts by name, found a list",
    ),
    "metadata with a number": (
        {"__metadata__": {"epoch": 3}, "a": tensor()},
        4,
        "'epoch' must be text, found 3",
    ),
    "metadata with null": (
        {"__metadata__": {"epoch": None}, "a": tensor()},
        4,
        "'epoch' must be text, found None",
    ),
    "a tensor that is no object": (
        {"a": 7},
        4,
        "tensor 'a': must have dtype, shape and data_offsets",
    ),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "tensor 'a': has no dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "tensor 'a': has no shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "tensor 'a': has no data_offsets"),
    "an unknown dtype": (
        {"a": tensor("Q8")},
        4,
        "tensor 'a': dtype 'Q8' is not a type of the format",
    ),
    "a dtype that only torch has": (
        {"a": tensor("C32")},
        4,
        "dtype 'C32' is not a type of the format",
    ),
    "a dtype that is not UTF-8 text": (
        {"a": tensor([])},
        4,
        "dtype a list of 0 is not a type of the format",
    ),
    "a shape that is no list": ({"a": tensor(shape=4)}, 4, "shape must be a list of whole numbers"),
    "a float in the shape": (
        {"a": tensor(shape=[1.0])},
        4,
        "whole numbers from 0 to 2⁶⁴ - 1, found [1.0]",
    ),
    "a bool in the shape": ({"a": tensor(shape=[True])}, 4, "found [True]"),
    "a negative length": ({"a": tensor(shape=[-1])}, 4, "found [-1]"),
    "a length of 65 bits": ({"a": tensor(shape=[2**64])}, 4, "shape must be"),
    "one offset": ({"a": tensor(offsets=[4])}, 4, "data_offsets must be two whole numbers"),
    "three offsets": (
        {"a": tensor(offsets=[0, 4, 4])},
        4,
        "data_offsets must be two whole numbers",
    ),
    "offsets that are text": (
        {"a": tensor(offsets="04")},
        4,
        "data_offsets must be two whole numbers",
    ),
    "a float offset": (
        {"a": tensor(offsets=[0, 4.0])},
        4,
        "data_offsets must be two whole numbers",
    ),
    "a negative offset": (
        {"a": tensor(offsets=[-4, 0])},
        4,
        "data_offsets must be two whole numbers",
    ),
    "offsets turned round": (
        {"a": tensor(offsets=[4, 0])},
        4,
        "tensor 'a': its data ends at 0, before it starts at 4",
    ),
    "a product beyond 64 bits": (
        {"a": tensor(shape=[2**32, 2**32, 0], offsets=[0, 0])},
        0,
        "larger than any memory",
    ),
    "bits beyond 64 bits": ({"a": tensor("U8", [2**62], [0, 4])}, 4, "larger than any memory"),
    "half a byte": (
        {"a": tensor("F4", [7], [0, 4])},
        4,
        "F4 [7] is 28 bits, which is not a whole number of bytes",
    ),
    "three quarters of a byte": ({"a": tensor("F6_E2M3", [1], [0, 1])}, 1, "is 6 bits"),
    "too little data for the shape": (
        {"a": tensor(shape=[2])},
        4,
        "tensor 'a': F32 [2] needs 8 bytes, has 4",
    ),
    "a scalar with the data of two": (
        {"a": tensor(shape=[], offsets=[0, 8])},
        8,
        "F32 [] needs 4 bytes, has 8",
    ),
    "a hole at the start": (
        {"a": tensor(offsets=[4, 8])},
        8,
        "data starts at 4, after 4 bytes belonging to no tensor",
    ),
    "a hole in between": (
        {"a": tensor(), "b": tensor(offsets=[6, 10])},
        10,
        "data starts at 6, after 2 bytes belonging to no tensor",
    ),
    "an overlap": (
        {"a": tensor(), "b": tensor(offsets=[2, 6])},
        6,
        "its data [2, 6) overlaps that of tensor 'a'",
    ),
    "the same data for two": (
        {"a": tensor(), "b": tensor()},
        4,
        "tensor 'b': its data [0, 4) overlaps that of tensor 'a'",
    ),
    "an empty tensor inside another": (
        {"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])},
        4,
        "its data [2, 2) overlaps",
    ),
    "data that is cut off": (
        {"a": tensor(), "b": tensor(offsets=[4, 8])},
        6,
        "6 are there; the first incomplete one is 'b'",
    ),
    "bytes after the last": (
        {"a": tensor()},
        7,
        "after the last tensor, 3 bytes belonging to no tensor",
    ),
    "bytes and no tensor": ({}, 1, "after the last tensor, 1 byte belonging to no tensor"),
}

FINE: dict[str, tuple[object, int]] = {
    "nothing": ({}, 0),
    "one tensor": ({"a": tensor()}, 4),
    "metadata alone": ({"__metadata__": {"format": "pt", "": "ü\n"}}, 0),
    "metadata that is null": ({"__metadata__": None, "a": tensor()}, 4),
    "an extra field": ({"a": tensor(crc=[1, {"x": None}])}, 4),
    "data in another order": ({"b": tensor(offsets=[4, 8]), "a": tensor(offsets=[0, 4])}, 8),
    "a scalar and an empty one": (
        {"a": tensor(shape=[]), "e": tensor(shape=[0, 9], offsets=[4, 4])},
        4,
    ),
    "an empty one at the same place": ({"a": tensor(), "e": tensor(shape=[0], offsets=[0, 0])}, 4),
    "a name that is empty": ({"": tensor()}, 4),
    "a name of strange characters": ({'a\x00 "\\/é😀': tensor()}, 4),
    "spaces at the end": (json.dumps({"a": tensor()}).encode() + b"   ", 4),
    **{
        f"{d.code}": ({"a": tensor(d.code, [8, 2], [0, d.bits * 2])}, d.bits * 2)
        for d in DTYPES
        if d.writable
    },
}


@pytest.mark.parametrize(("document", "data_nbytes", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_tensor(
    document: object, data_nbytes: int, sentence: str
) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)) as caught:
        parse(document, data_nbytes)
    assert str(caught.value).startswith("m.safetensors: ")


TAKEN_BY_THE_REFERENCE = {"a space before it", "a tensor that occurs twice"}


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault not in TAKEN_BY_THE_REFERENCE]
)
def test_the_reference_reader_refuses_it_too(fault: str) -> None:
    document, data_nbytes, _ = FAULTS[fault]
    with pytest.raises(SafetensorError):
        reference(document, data_nbytes)


@pytest.mark.parametrize(("document", "data_nbytes"), FINE.values(), ids=FINE)
def test_what_the_reference_reader_takes_is_taken_alike(document: object, data_nbytes: int) -> None:
    theirs = reference(document, data_nbytes)
    ours = parse(document, data_nbytes).tensors
    assert {each.name: (each.dtype.code, list(each.shape)) for each in ours} == theirs


def test_tensors_come_in_the_order_of_their_data() -> None:
    parsed = parse({"b": tensor(offsets=[4, 8]), "a": tensor(offsets=[0, 4])}, 8)
    assert [each.name for each in parsed.tensors] == ["a", "b"]
    first, second = (each.payload for each in parsed.tensors)
    assert isinstance(first, Extent)
    assert second == Extent(PATH, first.start + 4, 4)


def test_more_tensors_than_the_limit_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="holds 2 tensors"):
        parse({"a": tensor(), "b": tensor(offsets=[4, 8])}, 8, Limits(tensors=1))


LENGTHS = {
    "an empty file": (b"", 0, "the file has 0 bytes, and the length of the header alone takes 8"),
    "seven bytes": (
        bytes(7),
        7,
        "the file has 7 bytes, and the length of the header alone takes 8",
    ),
    "beyond the format": (
        (100_000_001).to_bytes(8, "little"),
        2**40,
        "100,000,001 bytes, and the format allows 100,000,000",
    ),
    "of 64 bits": (b"\xff" * 8, 100, "the format allows 100,000,000"),
    "beyond the file": (
        (93).to_bytes(8, "little"),
        100,
        "takes 93 bytes, and the file ends after 92 of them",
    ),
}


@pytest.mark.parametrize(("first", "nbytes", "sentence"), LENGTHS.values(), ids=LENGTHS)
def test_a_length_that_cannot_be_is_refused(first: bytes, nbytes: int, sentence: str) -> None:
    with pytest.raises(Malformed, match=re.escape(sentence)):
        safetensors_header.json_nbytes(PATH, first, nbytes, Limits())


def test_a_length_beyond_the_limit_names_the_limit() -> None:
    with pytest.raises(LimitExceeded) as caught:
        safetensors_header.json_nbytes(
            PATH, (90).to_bytes(8, "little"), 1000, Limits(header_bytes=50)
        )
    assert (caught.value.limit, caught.value.actual) == ("header_bytes", 90)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != safetensors_header.METADATA
)
shapes = st.lists(st.integers(0, 70_000), max_size=3).map(tuple)
codes = st.sampled_from([dtype.code for dtype in DTYPES if dtype.writable and dtype.bits >= 8])
metadata = st.dictionaries(names, names, max_size=4)
entry_lists = st.lists(
    st.builds(entry, names, shapes, codes), max_size=6, unique_by=lambda each: each.name
)


@given(entry_lists, metadata, st.integers(0, 4095), st.sampled_from([64, 4096]))
def test_what_is_dumped_is_parsed_and_starts_its_data_where_it_should(
    entries: list[TensorEntry], texts: dict[str, str], residue: int, modulus: int
) -> None:
    dumped = safetensors_header.dump(entries, texts, residue=residue % modulus, modulus=modulus)
    assert len(dumped) % modulus == residue % modulus
    nbytes = safetensors_header.json_nbytes(PATH, dumped[:8], len(dumped), Limits())
    assert nbytes == len(dumped) - 8
    data = Extent(PATH, len(dumped), sum(each.nbytes for each in entries))
    parsed = safetensors_header.parse(PATH, dumped[8:], data, Limits())
    assert parsed.metadata == texts
    assert {(e.name, e.dtype, e.shape) for e in parsed.tensors} == {
        (e.name, e.dtype, e.shape) for e in entries
    }
    assert [e.name for e in parsed.tensors if e.nbytes] == [e.name for e in entries if e.nbytes]


@given(entry_lists, metadata, st.integers(0, 4095))
def test_the_room_is_never_less_than_what_is_taken(
    entries: list[TensorEntry], texts: dict[str, str], residue: int
) -> None:
    with_format = {"format": "pt", **texts}
    dumped = safetensors_header.dump(entries, with_format, residue=residue, modulus=4096)
    assert len(dumped) <= safetensors_header.fixed_room(texts) + sum(
        map(safetensors_header.room, entries)
    )
    assert (
        len(dumped) + 4096 + 60 * len(entries)
        >= safetensors_header.fixed_room(texts) + sum(map(safetensors_header.room, entries)) - 64
    )


def test_the_text_is_that_of_the_reference_writer() -> None:
    theirs = save({"b": np.zeros(1, np.float32), "é\n": np.zeros(0, np.float32)}, {"k": "v"})
    ours = safetensors_header.dump([entry("b"), entry("é\n", (0,))], {"k": "v"}, modulus=8)
    assert ours + bytes(4) == theirs


UNWRITABLE = {
    "a dtype without a code": (
        [entry("a", code="C128"), entry("b"), entry("c", code="C32")],
        {},
        "safetensors does not have the types of these tensors: 'a' (C128), 'c' (C32)",
    ),
    "the name of the metadata": (
        [entry("__metadata__")],
        {},
        "no tensor of a safetensors file can be called __metadata__",
    ),
    "unpaired surrogate": (
        [entry("a"), entry("b\ud800")],
        {},
        "'b\\ud800' contains an unpaired surrogate",
    ),
    "the same in the metadata": ([entry("a")], {"x": "\udfff"}, "the metadata"),
}


@pytest.mark.parametrize(("entries", "texts", "sentence"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_the_format_cannot_hold_is_said(
    entries: list[TensorEntry], texts: dict[str, str], sentence: str
) -> None:
    with pytest.raises(Unwritable, match=re.escape(sentence)):
        safetensors_header.dump(entries, texts)


def test_two_tensors_of_one_name_clash() -> None:
    with pytest.raises(NameClash, match="two tensors would be called 'a'"):
        safetensors_header.dump([entry("a"), entry("b"), entry("a")], {})


def test_a_header_beyond_what_readers_take_is_never_written() -> None:
    with pytest.raises(Unwritable, match="and the format allows 100,000,000"):
        safetensors_header.dump([entry("a")], {"x": "y" * 100_000_000})


@given(st.binary(max_size=300))
def test_any_bytes_give_a_header_or_a_sentence(content: bytes) -> None:
    with suppress(FormatError):
        parse(b"{" + content, 4)
