"""Casts give what `Tensor.to` gives, bit for bit, and need no more memory than a chunk."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardkit.dtypes import BY_CODE, DTYPES
from shardkit.errors import Unwritable
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import CHUNK, PAGE, Concat, Extent, Literal, Swapped, read_all

FLOATS = [
    d.code for d in DTYPES if d.kind == "float" and d.bits >= 8 and hasattr(torch, str(d.torch))
]


def content(nbytes: int) -> bytes:
    """Random bytes: every kind of number, denormals and NaNs with payloads among them."""
    return np.random.default_rng(0).bytes(nbytes)


def to(stored: bytes, source: str, target: str) -> bytes:
    """What `Tensor.to` makes of *stored*."""
    tensor = torch.frombuffer(bytearray(stored), dtype=getattr(torch, str(BY_CODE[source].torch)))
    cast = tensor.to(getattr(torch, str(BY_CODE[target].torch)))
    return bytes(cast.view(torch.uint8).numpy())


def cast(stored: bytes, source: str, target: str) -> Cast:
    return Cast(Literal(stored), BY_CODE[source], BY_CODE[target])


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_a_cast_is_what_torch_makes_of_the_whole_tensor(source: str, target: str) -> None:
    stored = content(100_003 * BY_CODE[source].itemsize)
    assert read_all(cast(stored, source, target)) == to(stored, source, target)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("I64", "F32"),
        ("U8", "BOOL"),
        ("BOOL", "I32"),
        ("I32", "I64"),
        ("F32", "C64"),
        ("C64", "C128"),
        ("BF16", "I8"),
    ],
)
def test_numbers_of_other_kinds_are_cast_too(source: str, target: str) -> None:
    stored = content(30_000 * BY_CODE[source].itemsize) if source != "BF16" else bytes(60_000)
    assert read_all(cast(stored, source, target)) == to(stored, source, target)


@given(st.integers(0, 70_000), st.integers(0, 70_000))
def test_a_part_of_a_cast_is_that_part_of_the_whole(a: int, b: int) -> None:
    stored = np.random.default_rng(1).standard_normal(70_000).astype("f4").tobytes()
    first, last = sorted((a, b))
    part = cast(stored, "F32", "BF16").narrow(first * 2, (last - first) * 2)
    assert part.nbytes == (last - first) * 2
    assert read_all(part) == to(stored, "F32", "BF16")[first * 2 : last * 2]


@pytest.mark.parametrize(
    ("source", "target"), [("F32", "BF16"), ("BF16", "F32"), ("F64", "F8_E4M3"), ("F8_E5M2", "F64")]
)
def test_chunks_are_whole_pages_of_at_most_a_chunk(
    source: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "stored").write_bytes(stored := content(9 * CHUNK // 4 + 8 * 7))
    payload = Cast(Extent(tmp_path / "stored", 0, len(stored)), BY_CODE[source], BY_CODE[target])
    lengths = [len(chunk) for chunk in payload.chunks()]
    assert sum(lengths) == payload.nbytes
    assert all(length % PAGE == 0 for length in lengths[:-1])
    assert max(lengths) <= CHUNK
    assert read_all(payload) == read_all(payload) == to(stored, source, target)


def test_floats_in_pieces_of_odd_lengths_can_be_cast() -> None:
    stored = content(400_000)
    swapped = np.frombuffer(stored, "u4").byteswap().tobytes()
    inner = Swapped(
        Concat((Literal(swapped[:4]), Literal(swapped[4:300_012]), Literal(swapped[300_012:]))), 4
    )
    assert read_all(Cast(inner, BY_CODE["F32"], BY_CODE["F16"])) == to(stored, "F32", "F16")


def test_nothing_is_cast_to_nothing() -> None:
    assert list(cast(b"", "F32", "BF16").chunks()) == []
    assert cast(b"", "F32", "BF16").narrow(0, 0).nbytes == 0


@pytest.mark.parametrize(
    ("source", "target"),
    [("F4", "F32"), ("F32", "F4"), ("F6_E2M3", "F32"), ("C64", "F32")],
)
def test_types_that_torch_does_not_cast_are_refused(source: str, target: str) -> None:
    with pytest.raises(Unwritable, match=f"{source} cannot be cast to {target}"):
        cast(bytes(48), source, target)


def test_cut_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        cast(bytes(7), "F32", "BF16")
    with pytest.raises(ValueError, match="cuts an element"):
        cast(bytes(8), "F32", "BF16").narrow(1, 2)
    with pytest.raises(ValueError, match="outside"):
        cast(bytes(8), "F32", "BF16").narrow(2, 4)


def test_equal_casts_are_equal_and_travel() -> None:
    extent = Extent(Path("x"), 0, 8)
    payload = Cast(extent, BY_CODE["F32"], BY_CODE["BF16"])
    assert payload == pickle.loads(pickle.dumps(payload))
    assert hash(payload) == hash(Cast(extent, BY_CODE["F32"], BY_CODE["BF16"]))
    assert payload.sources == (extent,)


def test_torch_is_imported_with_the_first_byte_and_its_absence_is_a_sentence() -> None:
    script = """
import sys
from shardkit.payloads.cast import Cast
from shardkit.dtypes import BY_CODE
from shardkit.errors import Unwritable
from shardkit.payloads.payload import Literal
payload = Cast(Literal(bytes(8)), BY_CODE["F32"], BY_CODE["BF16"])
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    list(payload.chunks())
except Unwritable as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "casting needs torch, which is not installed\n"
