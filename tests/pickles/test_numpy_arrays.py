"""Arrays of NumPy in torch files are tensors, bit for bit those of NumPy, and what is no number is
named.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

import shardkit
from repository import GOOD
from shardkit.checkpoint.entries import Checkpoint, OtherKind
from shardkit.errors import Malformed
from shardkit.payloads.compressed import Expanded
from shardkit.payloads.payload import Extent
from shardkit.testing import check_payload

WIDE = ("i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")
CODES = ["?", "i1", "u1", *(order + code for code in WIDE for order in "<>")]


def saved(value: object, folder: Path, protocol: int = 2) -> Checkpoint:
    path = folder / f"{protocol}.pt"
    torch.save(value, path, pickle_protocol=protocol)
    return shardkit.open(path)


def content(array: np.ndarray[Any, Any]) -> bytes:
    """The values in C order, little-endian; swapped as bytes, so that no NaN changes."""
    return (array.byteswap() if array.dtype.byteorder == ">" else array).tobytes()


@settings(max_examples=150, deadline=None)
@given(
    arrays_of.arrays(
        st.sampled_from(CODES),
        arrays_of.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=20),
    ),
    st.sampled_from([2, 3, 4, 5]),
    st.booleans(),
)
def test_every_array_comes_back(
    tmp_path_factory: pytest.TempPathFactory, array: Any, protocol: int, turned: bool
) -> None:
    array = array.T if turned else array
    (entry,) = saved({"w": array}, tmp_path_factory.mktemp("arrays"), protocol).tensors
    assert (entry.shape, bytes(entry.read())) == (array.shape, content(array))


@pytest.mark.parametrize("path", sorted(GOOD.glob("*arrays*")), ids=lambda path: path.name)
def test_the_payload_of_every_array_keeps_the_rules(path: Path) -> None:
    for entry in shardkit.open(path).tensors:
        check_payload(entry.payload, itemsize=entry.dtype.itemsize)


def test_a_long_array_is_a_run_of_the_file_where_protocols_write_bytes_as_they_are(
    tmp_path: Path,
) -> None:
    array = np.arange(5000.0)
    for protocol in (3, 4, 5):
        payload = saved(array, tmp_path, protocol).tensors[0].payload
        assert isinstance(payload, Extent)
        stored = payload.path.read_bytes()[payload.start : payload.start + payload.nbytes]
        assert stored == array.tobytes()
    assert isinstance(
        saved(array, tmp_path, 2).tensors[0].payload, Expanded
    )  # which writes bytes as text


@pytest.mark.parametrize("length", [3, 3000])
def test_one_array_under_two_names_is_tied_and_two_equal_ones_are_not(
    length: int, tmp_path: Path
) -> None:
    one, other = np.ones(length), np.ones(length)
    for protocol in (2, 4):
        found = saved({"a": one, "b": one, "c": other}, tmp_path, protocol)
        assert found["a"].payload == found["b"].payload
        assert found["a"].payload != found["c"].payload
        report = shardkit.convert(tmp_path / f"{protocol}.pt", tmp_path / f"out{protocol}")
        assert report.aliases == {"b": "a"}


def test_equal_arrays_of_two_shards_are_not_tied(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.save({name: np.ones(3)}, tmp_path / f"{name}.bin")
    a, b = (shardkit.open(tmp_path / f"{name}.bin")[name] for name in ("a", "b"))
    assert a.payload != b.payload


def test_types_that_numpy_has_from_ml_dtypes_are_known(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    for name, code in names.items():
        array = np.arange(6).astype(getattr(ml_dtypes, name))
        (entry,) = saved(array, tmp_path).tensors
        assert (entry.dtype.code, bytes(entry.read())) == (code, array.tobytes())
    four_bits = np.arange(6).astype(ml_dtypes.int4)  # which takes a byte for each
    (other,) = saved(four_bits, tmp_path).others
    assert (other.kind, other.reason) == (
        OtherKind.UNKNOWN_TENSOR,
        "NumPy array, ml_dtypes.int4 [6]",
    )


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_arrays_of_numpy_1_and_2_are_read(module: str, tmp_path: Path) -> None:
    content = pickle.dumps({"w": np.arange(3.0)}, 2)
    assert b"numpy._core" in content or b"numpy.core" in content
    named = content.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module.encode())
    path = tmp_path / "model.pt"
    torch.save({"w": np.arange(3.0)}, path, pickle_protocol=2, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(content[2:-1], named[2:-1]))
    assert shardkit.open(path)["w"].read() == np.arange(3.0).tobytes()


def test_numbers_that_no_tensor_has_are_refused_and_what_is_no_number_is_an_object() -> None:
    others = {other.name: other for other in shardkit.open(GOOD / "zip-arrays-others.pt").others}
    assert {name: (other.kind, other.reason) for name, other in others.items()} == {
        "record": (OtherKind.UNKNOWN_TENSOR, "NumPy array, V8 [2]"),
        "masked": (OtherKind.UNKNOWN_TENSOR, "masked NumPy array, f8 [2]"),
        "wide": (OtherKind.UNKNOWN_TENSOR, "NumPy array, f16 [2]"),
        "text": (OtherKind.OBJECT, "NumPy array, U6 [2]"),
        "bytes": (OtherKind.OBJECT, "NumPy array, S2 [2]"),
        "dates": (OtherKind.OBJECT, "NumPy array, M8 [1]"),
        "objects": (OtherKind.OBJECT, "NumPy array, O8 [3]"),
        "number": (OtherKind.OBJECT, "a NumPy scalar"),
        "generator": (OtherKind.OBJECT, "a NumPy random-number generator"),
    }


def test_an_array_whose_bytes_do_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": np.arange(300)}, path, pickle_protocol=2)
    path.write_bytes(path.read_bytes().replace(b"M\x2c\x01\x85", b"M\x2d\x01\x85"))
    with pytest.raises(
        Malformed, match=r"tensor 'w': I64 \[301\] needs 2408 bytes, and the pickle has 2,400"
    ):
        shardkit.open(path)


def test_an_array_is_converted_verified_and_compared(tmp_path: Path) -> None:
    long = np.random.default_rng(0).standard_normal((300, 20))
    state = {"w": np.arange(12.0, dtype="f4").reshape(3, 4), "long": long, "t": torch.ones(2)}
    saved(state, tmp_path)
    report = shardkit.convert(tmp_path / "2.pt", tmp_path / "out")
    assert (report.tensors, report.left_out, report.objects) == (3, (), ())
    assert shardkit.verify(tmp_path / "out", tmp_path / "2.pt").same
    assert [entry.name for entry in shardkit.open(tmp_path / "out").tensors] == ["w", "long", "t"]


def test_no_numpy_is_imported_for_arrays_as_they_lie(tmp_path: Path) -> None:
    saved({"w": np.arange(5000.0), "v": np.arange(3)}, tmp_path)
    code = """
import sys, shardkit
for entry in shardkit.open("2.pt").tensors:
    entry.read()
print({"numpy", "torch"} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_the_arrays_of_many_shards_are_one_note(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        arrays = {f"{number}.{name}": np.ones(2) for name in range(number)}
        torch.save(arrays, tmp_path / f"pytorch_model-0000{number}-of-00003.bin")
    notes = [note for note in shardkit.open(tmp_path).notes if "NumPy" in note]
    assert notes == ["the pickle holds NumPy arrays, which are read like tensors"]
