"""safetensors, read and written, against the reference package."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE, BY_TORCH, DTYPES
from shardkit.errors import FormatError, Malformed, NameClash, Unwritable
from shardkit.formats.safetensors import FORMAT, lay_out, scan, sniff
from shardkit.limits import Limits
from shardkit.payloads.payload import Extent, Literal, Part, Payload, read_all
from shardkit.sources.format import Source


def opened(path: Path) -> Source:
    return Source.file(path, Limits())


def written(path: Path, parts: Sequence[Part]) -> Path:
    path.write_bytes(b"".join(read_all(part) for part in parts if isinstance(part, Payload)))
    return path


def held(content: bytes, name: str = "m.safetensors") -> Source:
    return Source(Path(name), Literal(content), limits=Limits())


def entry(name: str, code: str, shape: tuple[int, ...], fill: int = 0) -> TensorEntry:
    dtype = BY_CODE[code]
    return TensorEntry(
        (name,), dtype, shape, Literal(bytes((fill + i) % 256 for i in range(dtype.nbytes(shape))))
    )


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        if dtype.writable and dtype.torch and hasattr(torch, dtype.torch):
            raw = torch.randint(
                0,
                2 if dtype.code == "BOOL" else 256,
                (3 * 4 * dtype.itemsize,),
                dtype=torch.uint8,
                generator=generator,
            )
            tensors[f"a.{dtype.code}"] = raw.view(getattr(torch, dtype.torch)).reshape(3, 4)
    return {
        **tensors,
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), 1e-45]),
    }


def reference(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What the reference reader finds in *content*."""
    listed = safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # the package has no types here
    return {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in listed}


def raw(tensor: torch.Tensor) -> bytes:
    return (
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if tensor.numel()
        else b""
    )


def test_what_the_reference_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "m", {"format": "pt", "by": "test"})
    scanned = scan(opened(tmp_path / "m"))
    assert scanned.metadata == {"format": "pt", "by": "test"}
    assert {each.name: bytes(each.read()) for each in scanned.tensors} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }
    for each in scanned.tensors:
        tensor = tensors[each.name]
        assert each.dtype is BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
        assert (
            each.shape == (*tensor.shape[:-1], tensor.shape[-1] * each.dtype.packed)
            if tensor.dim()
            else each.shape == ()
        )


def test_what_is_laid_out_the_reference_reads_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "m")
    entries = scan(opened(tmp_path / "m")).tensors[::-1]
    back = load_file(written(tmp_path / "n", lay_out(entries, {})))
    assert {name: (t.dtype, t.shape, raw(t)) for name, t in back.items()} == {
        name: (t.dtype, t.shape, raw(t)) for name, t in tensors.items()
    }
    with safetensors.safe_open(tmp_path / "n", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_types_that_torch_lacks_come_through_the_reference(tmp_path: Path) -> None:
    entries = [
        entry("x", "F6_E2M3", (4, 2), 1),
        entry("y", "F6_E3M2", (8,), 9),
        entry("z", "F4", (2, 4), 3),
    ]
    content = b"".join(read_all(part) for part in lay_out(entries, {}) if isinstance(part, Payload))
    assert reference(content) == {
        e.name: (e.dtype.code, list(e.shape), bytes(e.read())) for e in entries
    }


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name not in ("__metadata__", "format")
)
writable = st.sampled_from([dtype.code for dtype in DTYPES if dtype.writable and dtype.bits >= 8])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
entry_lists = st.lists(
    st.builds(entry, names, writable, shapes, st.integers(0, 255)),
    max_size=6,
    unique_by=lambda each: each.name,
)


@given(
    entry_lists,
    st.dictionaries(
        names, st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3
    ),
)
def test_what_is_laid_out_is_scanned_again(
    entries: list[TensorEntry], metadata: dict[str, str]
) -> None:
    known = {each.name for each in entries}
    metadata = {key: text for key, text in metadata.items() if text not in known}
    content = b"".join(
        read_all(part) for part in lay_out(entries, metadata) if isinstance(part, Payload)
    )
    scanned = scan(held(content))
    assert scanned.metadata == {"format": "pt", **metadata}
    assert {(e.name, e.dtype, e.shape, bytes(e.read())) for e in scanned.tensors} == {
        (e.name, e.dtype, e.shape, bytes(e.read())) for e in entries
    }
    assert reference(content).keys() == known


@given(entry_lists)
def test_every_tensor_is_aligned_to_its_type(entries: list[TensorEntry]) -> None:
    parts = lay_out(entries, {})
    assert parts[0].nbytes % 64 == 0
    content = b"".join(read_all(part) for part in parts if isinstance(part, Payload))
    document = json.loads(content[8 : parts[0].nbytes])
    for each in entries:
        assert document[each.name]["data_offsets"][0] % each.dtype.itemsize == 0


def order(parts: Sequence[Part]) -> list[str]:
    assert isinstance(parts[0], Literal)
    return [name for name in json.loads(parts[0].content[8:]) if name != "__metadata__"]


def test_the_order_is_kept_where_all_is_aligned() -> None:
    assert order(
        lay_out(
            [
                entry("u", "U8", (8,)),
                entry("d", "F64", (1,)),
                entry("h", "F16", (4,)),
                entry("i", "I64", (1,)),
            ],
            {},
        )
    ) == list("udhi")


def test_wide_types_go_first_and_stably_where_one_would_be_misaligned() -> None:
    mixed = [
        entry("u", "U8", (3,)),
        entry("h", "F16", (1,)),
        entry("d", "F64", (1,)),
        entry("g", "BF16", (1,)),
        entry("e", "I64", (1,)),
    ]
    assert order(lay_out(mixed, {})) == list("dehgu")


def run_of(path: Path, start: int, codes: Sequence[tuple[str, int]]) -> list[TensorEntry]:
    entries = []
    for number, (code, count) in enumerate(codes):
        nbytes = BY_CODE[code].nbytes((count,))
        entries.append(
            TensorEntry((f"t{number}",), BY_CODE[code], (count,), Extent(path, start, nbytes))
        )
        start += nbytes
    return entries


@pytest.mark.parametrize("start", [0, 64, 4096, 12_345_672, 4095 * 8])
def test_one_run_of_a_file_starts_at_the_same_place_in_its_page(start: int) -> None:
    head, *data = lay_out(run_of(Path("m"), start, [("F32", 100), ("I64", 3), ("U8", 5)]), {})
    assert head.nbytes % 4096 == start % 4096
    assert data == [Extent(Path("m"), start, 400 + 24 + 5)]


@pytest.mark.parametrize("start", [3, 4, 4095])
def test_a_run_that_is_misaligned_in_its_file_starts_at_a_multiple_of_64(start: int) -> None:
    head, *data = lay_out(run_of(Path("m"), start, [("F32", 2), ("I64", 3)]), {})
    assert head.nbytes % 64 == 0
    assert len(data) == 1


def test_tensors_of_two_files_start_at_a_multiple_of_64() -> None:
    head, *data = lay_out(
        [
            *run_of(Path("m"), 200, [("F32", 4)]),
            TensorEntry(("z",), BY_CODE["F32"], (4,), Extent(Path("n"), 0, 16)),
        ],
        {},
    )
    assert head.nbytes % 64 == 0
    assert data == [Extent(Path("m"), 200, 16), Extent(Path("n"), 0, 16)]


def test_a_layout_is_a_function_of_its_input_alone() -> None:
    entries = run_of(Path("m"), 123, [("F32", 4), ("U8", 4)])
    assert lay_out(entries, {"a": "b"}) == lay_out(list(entries), {"a": "b"})


@pytest.mark.parametrize(
    "metadata", [{"format": "mlx", "x": "y"}, {"x": "y"}, {"x": "y", "format": "pt"}], ids=str
)
def test_metadata_is_written_as_it_is_but_for_the_format_which_is_pt(
    metadata: dict[str, str],
) -> None:
    content = b"".join(read_all(p) for p in lay_out([], metadata) if isinstance(p, Payload))
    assert scan(held(content)).metadata == {**metadata, "format": "pt"}


DEEP = "[" * 99_999
RECORDS: dict[str, tuple[dict[str, str], list[str], dict[str, str]]] = {
    "names with the same last part": ({"head.w": "a.w"}, ["head.w"], {}),
    "text that happens to be the name of a tensor": (
        {"main": "a.w", "author": "b"},
        [],
        {"main": "a.w", "author": "b"},
    ),
    "an alias that shardkit lists": ({"z": "b", "shardkit.aliases": '["z"]'}, ["z"], {}),
    "one beside text": ({"z": "b", "by": "b", "shardkit.aliases": '["z"]'}, ["z"], {"by": "b"}),
    "a listing of nothing": ({"shardkit.aliases": '["z"]', "by": "me"}, [], {"by": "me"}),
    "a listing that is none": (
        {"z": "b", "shardkit.aliases": "z"},
        [],
        {"z": "b", "shardkit.aliases": "z"},
    ),
    "a listing too deep to parse": (
        {"z": "b", "shardkit.aliases": DEEP},
        [],
        {"z": "b", "shardkit.aliases": DEEP},
    ),
    "a tensor that the file lacks": ({"head.w": "gone.w"}, [], {"head.w": "gone.w"}),
    "a name that is stored": ({"b": "a.w", "a.w": "b"}, [], {"b": "a.w", "a.w": "b"}),
}


@pytest.mark.parametrize(("metadata", "aliases", "rest"), RECORDS.values(), ids=RECORDS)
def test_a_record_of_a_tie_is_a_tensor_again_and_other_text_stays_text(
    metadata: dict[str, str], aliases: list[str], rest: dict[str, str]
) -> None:
    entries = [entry("a.w", "F32", (2,)), entry("b", "F32", (2,))]
    content = b"".join(
        read_all(part) for part in lay_out(entries, metadata) if isinstance(part, Payload)
    )
    scanned = scan(held(content))
    assert [each.name for each in scanned.tensors] == ["a.w", "b", *aliases]
    assert all(scanned[alias].payload == scanned[metadata[alias]].payload for alias in aliases)
    assert scanned.metadata == {"format": "pt", **rest}


def test_a_name_the_format_keeps_and_a_type_it_lacks_cannot_be_written() -> None:
    with pytest.raises(Unwritable, match="__metadata__"):
        lay_out([entry("__metadata__", "F32", (1,))], {})
    with pytest.raises(Unwritable, match=r"'x' \(C128\)"):
        lay_out([entry("x", "C128", (1,))], {})
    with pytest.raises(NameClash, match="'x'"):
        lay_out([entry("x", "F32", (1,)), entry("x", "F32", (1,))], {})


LIES = {
    "a length beyond the file": (2**20).to_bytes(8, "little") + b'{"a": {"dtype": "F32"',
    "a length beyond the format": (2**63).to_bytes(8, "little")
    + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "a header that does not begin with a brace": (64).to_bytes(8, "little")
    + b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(68),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_file_that_lies_about_its_header_is_still_safetensors(content: bytes) -> None:
    assert sniff(held(content))
    with pytest.raises(Malformed, match=re.escape("m.safetensors: header: ")):
        scan(held(content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"a": {"data_offsets": [0, 4]}}',
        b"PK\3\4" + bytes(60),
        b"\x80\x02}q\0." * 9,
        bytes(100),
    ],
)
def test_other_files_are_not(content: bytes) -> None:
    assert not sniff(held(content))


def test_a_file_cut_anywhere_gives_a_sentence(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.int8)}, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    for length in range(len(content)):
        with pytest.raises(FormatError):
            scan(held(content[:length]))


@given(st.data())
def test_a_flipped_byte_gives_a_checkpoint_or_a_sentence(data: st.DataObject) -> None:
    content = bytearray(
        b"".join(
            read_all(p)
            for p in lay_out([entry("a", "F32", (2,)), entry("b", "I8", (3,))], {})
            if isinstance(p, Payload)
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(FormatError):
        scan(held(bytes(content)))


def test_the_record_is_what_a_plugin_exports() -> None:
    assert (FORMAT.name, FORMAT.suffixes, FORMAT.api) == ("safetensors", (".safetensors",), 1)
