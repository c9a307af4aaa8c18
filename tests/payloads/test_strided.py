"""The bytes of a view are those that torch would make contiguous."""

from __future__ import annotations

import pickle
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.dtypes import BY_CODE, BY_TORCH, DType
from shardkit.errors import FormatError
from shardkit.payloads import gather
from shardkit.payloads import strided as module
from shardkit.payloads.payload import (
    CHUNK,
    PAGE,
    Concat,
    Extent,
    Literal,
    Payload,
    Swapped,
    read_all,
)
from shardkit.payloads.strided import Strided, strided

CODES = ("U8", "F16", "F32", "C64", "C128", "F8_E4M3", "BOOL", "I64")
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a contiguous tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def content(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def in_torch(
    stored: bytes, dtype: DType, offset: int, shape: list[int], strides: list[int]
) -> bytes:
    """What torch makes of the view."""
    whole = torch.frombuffer(bytearray(stored), dtype=torch.uint8).reshape(-1, dtype.itemsize)
    rows = whole.as_strided(
        [*shape, dtype.itemsize],
        [*(s * dtype.itemsize for s in strides), 1],
        offset * dtype.itemsize,
    )
    return raw(rows) if prod(shape) else b""


@st.composite
def views(draw: st.DrawFn) -> tuple[DType, int, list[int], list[int]]:
    dtype = BY_CODE[draw(st.sampled_from(CODES))]
    shape = draw(SHAPES)
    return (
        dtype,
        draw(st.integers(0, 4)),
        shape,
        draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape))),
    )


@settings(max_examples=400)
@given(views(), st.data())
def test_any_view_gives_the_bytes_torch_gives(
    view: tuple[DType, int, list[int], list[int]], data: st.DataObject
) -> None:
    dtype, offset, shape, strides = view
    need = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
    stored = content(max(1, need) * dtype.itemsize)
    payload = strided(Literal(stored), dtype=dtype, offset=offset, shape=shape, strides=strides)
    expected = in_torch(stored, dtype, offset, shape, strides)
    assert read_all(payload) == expected
    assert payload.nbytes == len(expected)
    first = data.draw(st.integers(0, prod(shape)))
    last = data.draw(st.integers(first, prod(shape)))
    part = payload.narrow(first * dtype.itemsize, (last - first) * dtype.itemsize)
    assert read_all(part) == expected[first * dtype.itemsize : last * dtype.itemsize]


LAYOUTS = {
    "transposed": lambda t: t.reshape(600, 700).t(),
    "batch of transposed": lambda t: t.reshape(6, 100, 700).transpose(1, 2),
    "channels last": lambda t: t.reshape(10, 30, 35, 40).permute(0, 3, 1, 2),
    "reversed axes": lambda t: t.reshape(10, 30, 35, 40).permute(3, 2, 1, 0),
    "every third column": lambda t: t.reshape(600, 700)[:, ::3],
    "few columns": lambda t: t.reshape(600, 700)[:, 5:9],
    "few columns turned": lambda t: t.reshape(600, 700)[:, 5:9].t(),
    "every fifth row": lambda t: t.reshape(600, 700)[::5],
    "one column": lambda t: t.reshape(600, 700)[:, 3],
    "expanded rows": lambda t: t[:700].reshape(1, 700).expand(600, 700),
    "expanded columns": lambda t: t[:600].reshape(600, 1).expand(600, 700),
    "unfolded": lambda t: t.unfold(0, 50, 3),
    "unfolded and turned": lambda t: t.unfold(0, 50, 3).t(),
    "diagonal": lambda t: t.reshape(600, 700).diagonal(),
    "a block": lambda t: t.reshape(60, 70, 10, 10)[3:50, 2:60, 1:7, ::2],
}


@pytest.fixture(params=["small memory", "memory as it is"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "small memory":
        monkeypatch.setattr(gather, "_STAGING", 20_000)
        monkeypatch.setattr(gather, "_WINDOW", 5_000)
        monkeypatch.setattr(gather, "_SEEK", 100)
        monkeypatch.setattr(module, "_SLAB", 3_000)
        monkeypatch.setattr(module, "_TURNED", 500)
        monkeypatch.setattr(module, "_LINE", 3)
    return str(request.param)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weights_come_through(
    layout: str, dtype: torch.dtype, memory: str, tmp_path: Path
) -> None:
    stored = content(420_000 * dtype.itemsize)
    (tmp_path / "storage").write_bytes(b"front" + stored + b"back")
    view = LAYOUTS[layout](torch.frombuffer(bytearray(stored), dtype=dtype))
    payload = of_tensor(Extent(tmp_path / "storage", 5, len(stored)), view)
    assert read_all(payload) == raw(view)
    itemsize = dtype.itemsize
    start, stop = 12_345 * itemsize, 17_001 * itemsize
    if stop < payload.nbytes:
        assert read_all(payload.narrow(start, stop - start)) == raw(view)[start:stop]


def of_tensor(storage: Payload, view: torch.Tensor) -> Payload:
    dtype = BY_TORCH[str(view.dtype).removeprefix("torch.")]
    return strided(
        storage,
        dtype=dtype,
        offset=int(view.storage_offset()),
        shape=view.shape,
        strides=view.stride(),
        conj=view.is_conj(),
        neg=view.is_neg(),
    )


def test_chunks_are_whole_pages_of_at_most_a_chunk(tmp_path: Path) -> None:
    matrix = torch.arange(3_000 * 1_001, dtype=torch.int32).reshape(3_000, 1_001)
    (tmp_path / "storage").write_bytes(raw(matrix))
    payload = of_tensor(Extent(tmp_path / "storage", 0, matrix.nbytes), matrix.t())
    lengths = [len(chunk) for chunk in payload.chunks()]
    assert all(n <= CHUNK for n in lengths)
    assert all(n % PAGE == 0 for n in lengths[:-1])
    assert read_all(payload) == read_all(payload) == raw(matrix.t())


SIGNS = {
    "conj": lambda t: t.conj(),
    "turned conj": lambda t: t.reshape(8, -1).t().conj(),
    "imaginary part of a conj": lambda t: t.conj().imag,
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("sign", SIGNS)
def test_conj_and_neg_bits_are_resolved_as_torch_does(sign: str, dtype: torch.dtype) -> None:
    word = {torch.complex64: "u4", torch.complex128: "u8"}[dtype]
    view = SIGNS[sign](torch.frombuffer(bytearray(odd_floats(word)), dtype=dtype))
    assert view.is_conj() or view.is_neg()
    assert read_all(of_tensor(Literal(odd_floats(word)), view)) == raw(
        view.resolve_conj().resolve_neg()
    )


@pytest.mark.parametrize("conj", [False, True])
def test_a_negative_complex_view_has_the_sign_bits_flipped(conj: bool) -> None:
    # Torch computes 0 - x here in all but the last few elements, and so disagrees with itself on
    # zeros and NaNs.
    words = np.frombuffer(odd_floats("u4"), "u4")
    view = torch._neg_view(torch.frombuffer(bytearray(words.tobytes()), dtype=torch.complex64))
    view = view.conj() if conj else view
    found = np.frombuffer(read_all(of_tensor(Literal(words.tobytes()), view)), "u4")
    assert (
        found
        == words ^ np.array([1 << 31, 0 if conj else 1 << 31], "u4")[np.arange(words.size) % 2]
    ).all()
    plain = torch.frombuffer(bytearray(found.tobytes()), dtype=torch.complex64)
    assert torch.allclose(plain, view.resolve_conj().resolve_neg(), equal_nan=True)


NEGATED = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int64,
    torch.uint8,
]


@pytest.mark.parametrize("dtype", NEGATED, ids=str)
def test_a_negative_view_is_resolved_as_torch_does(dtype: torch.dtype) -> None:
    stored = odd_floats(
        {torch.float64: "u8", torch.float16: "u2", torch.bfloat16: "u2"}.get(dtype, "u4")
    )
    view = torch._neg_view(torch.frombuffer(bytearray(stored), dtype=dtype))
    assert read_all(of_tensor(Literal(stored), view)) == raw(view.resolve_neg())


def odd_floats(word: str) -> bytes:
    """Zeros, infinities, denormals, and NaNs with payloads, of both signs, between random ones."""
    words = np.frombuffer(content(4096), word).copy()
    exponent = {"u2": 0x7C00, "u4": 0x7F800000, "u8": 0x7FF0000000000000}[word]
    top = 1 << (8 * words.itemsize - 1)
    odd = [
        0,
        top,
        exponent,
        exponent | top,
        1,
        top | 1,
        exponent | 5,
        exponent | top | 5,
        exponent | (exponent >> 1) | 9,
    ]
    words[: len(odd)] = odd
    words[-len(odd) :] = odd[::-1]
    return words.tobytes()


def test_a_contiguous_view_is_the_run_itself() -> None:
    storage = Extent(Path("x"), 100, 400)
    dtype = BY_CODE["F32"]
    assert strided(storage, dtype=dtype, offset=10, shape=(3, 4), strides=(4, 1)) == Extent(
        Path("x"), 140, 48
    )
    assert strided(
        storage, dtype=dtype, offset=10, shape=(1, 3, 1, 4), strides=(77, 4, 0, 1)
    ) == Extent(Path("x"), 140, 48)
    assert strided(storage, dtype=dtype, offset=99, shape=(), strides=()) == Extent(
        Path("x"), 496, 4
    )
    assert strided(storage, dtype=dtype, offset=5000, shape=(3, 0), strides=(9, 9)).nbytes == 0


def test_equal_views_are_equal_payloads() -> None:
    storage = Extent(Path("x"), 0, 4800)
    turned = strided(storage, dtype=BY_CODE["F32"], offset=0, shape=(20, 30), strides=(1, 20))
    assert turned == strided(
        storage, dtype=BY_CODE["F32"], offset=0, shape=(1, 20, 5, 6), strides=(9, 1, 120, 20)
    )
    assert hash(turned) == hash(pickle.loads(pickle.dumps(turned)))
    assert turned.sources == (Extent(Path("x"), 0, 2400),)
    assert turned != strided(
        storage, dtype=BY_CODE["F32"], offset=1, shape=(20, 30), strides=(1, 20)
    )


def test_big_endian_storages_and_joined_ones_can_be_turned() -> None:
    matrix = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    swapped = matrix.numpy().byteswap().tobytes()
    storage = Swapped(Concat((Literal(swapped[:20]), Literal(swapped[20:]))), 4)
    assert read_all(of_tensor(storage, matrix.t())) == raw(matrix.t())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too short": ({"offset": 1, "shape": (3, 4), "strides": (4, 1)}, "needs 48 bytes from byte 4"),
    "too short when turned": ({"offset": 0, "shape": (4, 4), "strides": (1, 4)}, "needs 64 bytes"),
    "a negative offset": ({"offset": -1, "shape": (2, 2), "strides": (2, 1)}, "from byte -4"),
    "a negative offset, turned": (
        {"offset": -1, "shape": (2, 2), "strides": (1, 2)},
        "from byte -4",
    ),
    "a negative stride": ({"offset": 3, "shape": (4,), "strides": (-1,)}, "none may be negative"),
    "negative lengths": (
        {"offset": 0, "shape": (-2, -3), "strides": (-3, 1)},
        "none may be negative",
    ),
    "a huge length": (
        {"offset": 0, "shape": (1 << 80,), "strides": (1 << 80,)},
        "its storage, which has 48",
    ),
    "fewer strides than axes": ({"offset": 0, "shape": (2, 2), "strides": (1,)}, "has 1 strides"),
    "more than any memory": (
        {"offset": 0, "shape": (1 << 40, 1 << 40), "strides": (0, 0)},
        "larger than any memory",
    ),
    "conj of reals": ({"offset": 0, "shape": (2,), "strides": (1,), "conj": True}, "not complex"),
    "too many axes": ({"offset": 0, "shape": (2,) * 40, "strides": (1, 0) * 20}, "40 axes"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_view_that_cannot_be_is_refused(fault: str) -> None:
    view, message = REFUSED[fault]
    with pytest.raises(ValueError, match=message):
        strided(Literal(bytes(48)), dtype=BY_CODE["F32"], **view)


@pytest.mark.parametrize("code", ["BOOL", "F8_E4M3FNUZ", "F8_E8M0", "F4"])
def test_what_cannot_be_negated_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="cannot be negated"):
        strided(
            Literal(bytes(48)), dtype=BY_CODE[code], offset=0, shape=(2,), strides=(1,), neg=True
        )


def test_a_payload_is_cut_between_elements_only() -> None:
    payload = strided(
        Literal(bytes(48)), dtype=BY_CODE["F32"], offset=0, shape=(4, 3), strides=(1, 4)
    )
    assert isinstance(payload, Strided)
    with pytest.raises(ValueError, match="cuts an element"):
        payload.narrow(2, 4)
    with pytest.raises(ValueError, match="outside"):
        payload.narrow(44, 8)


def test_a_file_that_became_shorter_is_said(tmp_path: Path) -> None:
    (tmp_path / "storage").write_bytes(bytes(40))
    payload = strided(
        Extent(tmp_path / "storage", 0, 48),
        dtype=BY_CODE["F32"],
        offset=0,
        shape=(4, 3),
        strides=(1, 4),
    )
    with pytest.raises(FormatError, match="ends before byte 48"):
        read_all(payload)
    (tmp_path / "storage").unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        read_all(payload)
