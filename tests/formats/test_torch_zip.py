"""What only zip archives of torch.save can be: renamed roots, byte orders, compressed records, and
lies in the directory.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from shardkit.checkpoint.entries import Checkpoint
from shardkit.dtypes import BY_CODE
from shardkit.errors import FormatError, Malformed
from shardkit.formats.torch_zip import FORMAT
from shardkit.limits import Limits
from shardkit.payloads.payload import Extent, Literal, Payload
from shardkit.pickles.torch_tensors import Storage, StorageClass, View
from shardkit.pickles.walk import collect
from shardkit.sources.format import Source

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4),
    "c": torch.tensor([1 + 2j, 3 - 4j]),
    "u": torch.ones(3, dtype=torch.uint16),
}


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def rezipped(
    content: bytes,
    method: int,
    *,
    root: str = "",
    without: Sequence[str] = (),
    changed: Mapping[str, bytes] | None = None,
) -> bytes:
    """The archive written anew: by another method, under another root, some records left out and
    some changed.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", method) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            if name not in without:
                new.writestr(root + name, (changed or {}).get(name, old.read(info)))
    return file.getvalue()


def scanned(content: bytes, folder: Path) -> Checkpoint:
    path = folder / "m.pt"
    path.write_bytes(content)
    source = Source.file(path, Limits())
    assert FORMAT.sniff(source)
    return FORMAT.scan(source)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(found: Checkpoint) -> None:
    assert {entry.name: bytes(entry.read()) for entry in found.tensors} == {
        name: raw(tensor) for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"]
)
@pytest.mark.parametrize("root", ["", "archive/", "weird name.v1/", "deep/er/"])
def test_any_root_and_either_method_is_read(method: int, root: str, tmp_path: Path) -> None:
    assert_same(scanned(rezipped(saved(TENSORS), method, root=root), tmp_path))


def test_old_archives_lack_records_that_nothing_needs(tmp_path: Path) -> None:
    lacking = (
        "byteorder",
        ".format_version",
        ".storage_alignment",
        ".data/serialization_id",
        "version",
    )
    assert_same(
        scanned(
            rezipped(saved(TENSORS), zipfile.ZIP_STORED, root="archive/", without=lacking), tmp_path
        )
    )


def test_what_torch_stores_plainly_is_where_torch_says(tmp_path: Path) -> None:
    found = scanned(saved(TENSORS), tmp_path)
    for entry in found.tensors:
        assert isinstance(entry.payload, Extent)
        assert entry.payload.start % 64 == 0


def test_big_endian_words_are_turned(tmp_path: Path) -> None:
    content = saved(TENSORS)
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        records = {
            info.filename.partition("/")[2]: old.read(info)
            for info in old.infolist()
            if "/data/" in info.filename
        }
    widths = {f"data/{i}": word for i, word in enumerate((4, 8, 4, 2))}
    turned = {
        name: b"".join(records[name][at : at + w][::-1] for at in range(0, len(records[name]), w))
        for name, w in widths.items()
    }
    content = rezipped(
        content, zipfile.ZIP_STORED, root="m/", changed={"byteorder": b"big", **turned}
    )
    assert_same(scanned(content, tmp_path))
    typed = torch.load(tmp_path / "m.pt")
    assert all(
        torch.equal(typed[name], TENSORS[name]) for name in "abc"
    )  # "u", of no typed storage, torch itself gets wrong


FAULTY_RECORDS = {
    "missing": (
        rezipped(saved({"w": torch.arange(4)}), 0, root="m/", without=["data/0"]),
        "no member 'm/data/0'",
    ),
    "short": (
        rezipped(saved({"w": torch.arange(4)}), 0, root="m/", changed={"data/0": bytes(31)}),
        "holds 31 bytes, and 4 elements of I64 need 32",
    ),
    "long": (
        rezipped(saved({"w": torch.arange(4)}), 0, root="m/", changed={"data/0": bytes(33)}),
        "holds 33 bytes",
    ),
}


@pytest.mark.parametrize("fault", FAULTY_RECORDS)
def test_a_tensor_is_named_whose_storage_is(fault: str, tmp_path: Path) -> None:
    content, sentence = FAULTY_RECORDS[fault]
    with pytest.raises(Malformed, match=f"tensor 'w': .*{sentence}"):
        scanned(content, tmp_path)


def test_an_unknown_byte_order_is_refused(tmp_path: Path) -> None:
    content = rezipped(
        saved(TENSORS), zipfile.ZIP_STORED, root="m/", changed={"byteorder": b"middle"}
    )
    with pytest.raises(Malformed, match="neither little nor big"):
        scanned(content, tmp_path)


@pytest.mark.parametrize(
    "names",
    [("m/constants.pkl", "m/data.pkl"), ("m/archive_format",), ("x.npy",), ("metadata.pkl",)],
    ids=lambda names: names[-1],
)
def test_other_zip_archives_are_left_to_others(names: tuple[str, ...], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as writer:
        for name in names:
            writer.writestr(name, b"")
    source = Source.file(tmp_path / "x.zip", Limits())
    assert not FORMAT.sniff(source)
    if "constants.pkl" not in names[0]:
        with pytest.raises(FormatError, match=r"without data\.pkl"):
            FORMAT.scan(source)


def test_a_data_pkl_that_is_no_torch_pickle_is_refused_or_empty(tmp_path: Path) -> None:
    content = rezipped(
        saved({}), zipfile.ZIP_STORED, root="m/", changed={"data.pkl": b"not a pickle"}
    )
    with pytest.raises(Malformed, match=r"m/data\.pkl, byte \d+"):
        scanned(content, tmp_path)
    plain = rezipped(
        saved({}), zipfile.ZIP_STORED, root="m/", changed={"data.pkl": pickle.dumps(3)}
    )
    assert scanned(plain, tmp_path).tensors == ()


def test_views_saved_as_torch_0_3_did_begin_inside_their_storage() -> None:
    root = StorageClass(BY_CODE["I16"])
    view = View(Storage(root, "1", 8, 2, 4), root.dtype, 1, (3,), (1,))

    def record(storage: Storage) -> Payload:
        return Literal(bytes(range(16)))

    (entry,) = collect(Path("m.pt"), view, record=record, limits=Limits()).tensors
    assert entry.read() == bytes(range(6, 12))
