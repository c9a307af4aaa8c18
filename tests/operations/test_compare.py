import struct
from pathlib import Path

import pytest

import shardkit
from repository import GOOD
from shardkit.checkpoint.edits import Edits
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.errors import Malformed, NameClash
from shardkit.operations.compare import compare
from shardkit.payloads.payload import CHUNK, Concat, Literal


def tensor(
    name: str, content: bytes, code: str = "F32", shape: tuple[int, ...] | None = None
) -> TensorEntry:
    dtype = BY_CODE[code]
    return TensorEntry((name,), dtype, shape or (len(content) // dtype.itemsize,), Literal(content))


def test_a_nan_equals_itself_and_minus_zero_is_not_zero() -> None:
    nan, zero, minus = (
        struct.pack("<I", 0x7FC00001),
        struct.pack("<f", 0.0),
        struct.pack("<f", -0.0),
    )
    assert compare([tensor("a", nan)], [tensor("a", nan)]).same
    assert not compare([tensor("a", zero)], [tensor("a", minus)]).same


@pytest.mark.parametrize(
    ("left", "right", "change", "detail"),
    [
        (tensor("a", bytes(8)), tensor("a", bytes(8), "I32"), "dtype", "F32 became I32"),
        (tensor("a", bytes(8)), tensor("a", bytes(8), shape=(2, 1)), "shape", "[2] became [2, 1]"),
        (
            tensor("a", bytes(8)),
            tensor("a", bytes(6) + b"\1\1"),
            "bytes",
            "the first element that differs is number 1 of 2",
        ),
        (tensor("a", bytes(8)), None, "removed", "F32 [2]"),
        (None, tensor("a", bytes(8)), "added", "F32 [2]"),
    ],
)
def test_each_difference_is_named(
    left: TensorEntry | None, right: TensorEntry | None, change: str, detail: str
) -> None:
    (difference,) = compare([left] if left else [], [right] if right else []).differences
    assert (difference.name, difference.change, difference.detail) == ("a", change, detail)


def test_streams_that_are_cut_in_other_places_are_the_same() -> None:
    content = bytes(range(256)) * ((2 * CHUNK + 4096) // 256)
    cut = Concat((Literal(content[: CHUNK + 512]), Literal(content[CHUNK + 512 :])))
    whole = tensor("a", content, "U8")
    assert compare([whole], [TensorEntry(("a",), whole.dtype, whole.shape, cut)]).same


def test_a_difference_late_in_a_long_stream_is_found() -> None:
    content = bytes(2 * CHUNK + 100)
    changed = bytearray(content)
    changed[-1] = 1
    (difference,) = compare(
        [tensor("a", content, "U8")], [tensor("a", bytes(changed), "U8")]
    ).differences
    assert f"number {len(content) - 1:,} of" in difference.detail


def test_progress_counts_every_byte_once() -> None:
    counted: list[int] = []
    entries = [tensor(name, bytes([number] * 64)) for number, name in enumerate("abc")]
    again = [tensor(name, bytes([number] * 64)) for number, name in enumerate("abc")]
    comparison = compare(entries, again, on_bytes=counted.append)
    assert sum(counted) == comparison.nbytes == 192


def test_an_output_is_verified_against_its_source_with_the_same_edits(tmp_path: Path) -> None:
    source, out = GOOD / "zip-training.pt", tmp_path / "out"
    shardkit.convert(source, out, max_shard="1kB", rename=[("^", "x.")])
    assert shardkit.verify(out, source, Edits(rename=(("^", "x."),))).same
    assert not shardkit.verify(out, source).same


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    source, out = GOOD / "zip-training.pt", tmp_path / "out.safetensors"
    shardkit.convert(source, out)
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    (difference,) = shardkit.verify(out, source).differences
    assert difference.change == "bytes"
    assert shardkit.verify(out).same  # nothing in the file itself tells


def test_a_missing_byte_is_found_without_a_source(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    shardkit.convert(GOOD / "zip-training.pt", out)
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(Malformed):
        shardkit.verify(out)


def test_ties_are_compared_under_each_of_their_names(tmp_path: Path) -> None:
    source, out = GOOD / "zip-shared.pt", tmp_path / "out"
    report = shardkit.convert(source, out)
    assert report.aliases
    comparison = shardkit.verify(out, source)
    assert comparison.same
    assert comparison.tensors == report.tensors + len(report.aliases)
    assert shardkit.diff(source, out).same
    for checked in (comparison, shardkit.verify(out), shardkit.diff(source, out, root=".")):
        assert (checked.tensors - checked.tied, checked.nbytes) == (report.tensors, report.nbytes)


@pytest.mark.parametrize("turned", [False, True], ids=["on the left", "on the right"])
def test_two_tensors_of_one_name_are_refused_and_never_compared_as_one(
    tmp_path: Path, turned: bool
) -> None:
    torch = pytest.importorskip("torch")
    twofold, plain = tmp_path / "twofold.pt", tmp_path / "plain.pt"
    torch.save({"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}}, twofold)
    torch.save({"a.b": torch.ones(2)}, plain)
    sides = (plain, twofold) if turned else (twofold, plain)
    with pytest.raises(
        NameClash, match=r"twofold\.pt: two tensors would be called 'a\.b': 'a\.b', and 'a' → 'b'"
    ) as caught:
        shardkit.diff(*sides, root=".")
    assert "root" in str(caught.value.hint)
    with pytest.raises(NameClash):
        shardkit.verify(*sides, Edits(root="."))
    entries = shardkit.open(twofold).tensors
    with pytest.raises(NameClash, match=r"'a\.b'"):
        compare(*((entries[1:], entries) if turned else (entries, entries[1:])))
