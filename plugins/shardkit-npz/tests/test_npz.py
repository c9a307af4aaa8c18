"""What numpy writes is read bit for bit, what is written numpy reads, and what is no array of
numbers is said.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkit.checkpoint.entries import Checkpoint, OtherKind, TensorEntry
from shardkit.dtypes import BY_CODE, DTYPES, DType
from shardkit.errors import LimitExceeded, Malformed, NameClash, Unwritable
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal, Trailer, read_all
from shardkit.sources.format import Format, Source
from shardkit.testing import READING, WRITING, Watched, check_foreign
from shardkit.testing.payloads import Zeros
from shardkit_npz import npy, npz
from shardkit_npz.zip_parts import NewMember, archive

Array = np.ndarray[Any, Any]

LITTLE = (
    "?",
    "i1",
    "u1",
    "<i2",
    "<u2",
    "<i4",
    "<u4",
    "<i8",
    "<u8",
    "<f2",
    "<f4",
    "<f8",
    "<c8",
    "<c16",
)
BIG = (">i2", ">u2", ">i4", ">u4", ">i8", ">u8", ">f2", ">f4", ">f8", ">c8", ">c16")
NUMBERS = (*LITTLE, *BIG)
LAYOUTS = ("c", "fortran", "scalar", "empty", "one", "turned", "gaps")


def array_of(descr: str, layout: str) -> Array:
    dtype = np.dtype(descr)
    dice = np.random.default_rng(len(descr) + len(layout))
    values = dice.bytes(120 * dtype.itemsize)
    if dtype.kind == "b":
        values = bytes(byte & 1 for byte in values)
    whole: Array = np.frombuffer(values, dtype).reshape(2, 3, 4, 5)
    shapes: dict[str, Array] = {
        "c": whole,
        "fortran": np.asfortranarray(whole),
        "scalar": whole[0, 0, 0, 0].reshape(()),
        "empty": whole[:, :0],
        "one": whole[:1, :1, :1, :1],
        "turned": whole.transpose(3, 1, 0, 2),
        "gaps": whole[:, ::2, 1:, ::-1],
    }
    return shapes[layout]


def little_c_order(array: Array) -> bytearray:
    return bytearray(
        np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()
    )


def scanned(format: Format, path: Path) -> Checkpoint:  # noqa: A002 - it is one
    source = Source.file(path, Limits())
    assert format.sniff(source)
    return format.scan(source)


def write(
    path: Path,
    format: Format,  # noqa: A002 - it is one
    entries: Sequence[TensorEntry],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    assert format.lay_out
    crcs: list[int] = []
    with path.open("wb") as file:
        for part in format.lay_out(entries, metadata or {}):
            content = part.make(crcs) if isinstance(part, Trailer) else bytes(read_all(part))
            crcs.append(zlib.crc32(content))
            file.write(content)
    return path


def entry_of(name: str, array: Array) -> TensorEntry:
    code = {"b": "BOOL", "i": "I", "u": "U", "f": "F", "c": "C"}[array.dtype.kind]
    dtype = BY_CODE[code if code == "BOOL" else f"{code}{array.dtype.itemsize * 8}"]
    return TensorEntry((name,), dtype, array.shape, Literal(bytes(little_c_order(array))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_all_that_numpy_saves_is_read_bit_for_bit(save: Any, tmp_path: Path) -> None:
    arrays = {
        f"{descr} {layout}": array_of(descr, layout) for descr in NUMBERS for layout in LAYOUTS
    }
    save(tmp_path / "all.npz", **arrays)
    found = scanned(npz.FORMAT, tmp_path / "all.npz")
    assert [entry.name for entry in found.tensors] == list(arrays)
    for entry in found.tensors:
        array = arrays[entry.name]
        assert (entry.shape, entry.read()) == (array.shape, little_c_order(array)), entry.name
        assert (entry.dtype.itemsize, entry.dtype.kind) == (
            array.dtype.itemsize,
            KINDS[array.dtype.kind],
        ), entry.name


KINDS = {"b": "bool", "i": "int", "u": "int", "f": "float", "c": "complex"}


@pytest.mark.parametrize("descr", NUMBERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lone_array_is_read_bit_for_bit(descr: str, layout: str, tmp_path: Path) -> None:
    array = array_of(descr, layout)
    np.save(tmp_path / "x.npy", array)
    (entry,) = scanned(npy.FORMAT, tmp_path / "x.npy").tensors
    assert (entry.name, entry.shape, entry.read()) == ("tensor", array.shape, little_c_order(array))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(version: tuple[int, int], tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, np.arange(6, dtype="f4").reshape(2, 3), version=version)
    (entry,) = scanned(npy.FORMAT, tmp_path / "x.npy").tensors
    assert (entry.shape, entry.read()) == ((2, 3), bytearray(np.arange(6, dtype="f4").tobytes()))


WEIGHT, OBJECT = OtherKind.UNKNOWN_TENSOR, OtherKind.OBJECT
OTHERS = {
    "objects": (np.array([{"a": 1}, None], dtype=object), OBJECT, "pickle, which is never run"),
    "texts": (np.array(["a", "bc"]), OBJECT, "texts"),
    "bytes": (np.array([b"a", b"bc"]), OBJECT, "texts"),
    "dates": (np.array(["2026-01-01"], dtype="M8[D]"), OBJECT, "dates"),
    "spans": (np.array([3], dtype="m8[s]"), OBJECT, "dates"),
    "records": (
        np.zeros(2, dtype=[("x", "f4"), ("größe", "i4", (2,))]),
        WEIGHT,
        "records of several fields",
    ),
    "untyped": (np.zeros(2, dtype="V2"), WEIGHT, "ml_dtypes leaves bfloat16"),
    "long": (np.zeros(2, dtype=np.longdouble), WEIGHT, "numpy type"),
}


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_array_of_numbers_is_said(kind: str, tmp_path: Path) -> None:
    array, expected, reason = OTHERS[kind]
    np.savez(tmp_path / "x.npz", plain=np.ones(3), **{kind: array})  # type: ignore[arg-type]  # its keywords are typed as its one flag is
    found = scanned(npz.FORMAT, tmp_path / "x.npz")
    assert [entry.name for entry in found.tensors] == ["plain"]
    assert [(other.name, other.kind) for other in found.others] == [(kind, expected)]
    assert reason in found.others[0].reason


def test_an_object_array_is_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    np.save(tmp_path / "x.npy", np.array([Trap()], dtype=object))
    assert scanned(npy.FORMAT, tmp_path / "x.npy").others
    assert not (tmp_path / "ran").exists()


def test_scan_expands_no_compressed_member(tmp_path: Path) -> None:
    np.savez_compressed(
        tmp_path / "x.npz", noise=np.frombuffer(np.random.default_rng(0).bytes(4 << 20), np.uint8)
    )
    path = tmp_path / "x.npz"
    content = Watched(path, Source.file(path, Limits()).content)
    (entry,) = npz.FORMAT.scan(Source(path, content, limits=Limits())).tensors
    assert entry.nbytes == 4 << 20
    assert sum(stop - start for start, stop in content.log) < 400_000


OLD_AND_ODD = (
    '{"shape": (2L, 1), "fortran_order": False, "descr": "<f4"}',
    "{'descr':u'<f4','fortran_order':False,'shape':[2,1],} \n",
)


@pytest.mark.parametrize("text", OLD_AND_ODD)
def test_headers_of_python_2_and_of_other_tools_are_read(text: str) -> None:
    content = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(8)
    (entry,) = npy.scan(source_of(content)).tensors
    assert (entry.dtype.code, entry.shape) == ("F32", (2, 1))


def source_of(content: bytes) -> Source:
    return Source(Path("x.npy"), Watched(Path("x.npy"), Literal(content)), limits=Limits())


HEADERS = {
    "": "does not begin with '{'",
    "{": "needs texts for keys",
    "{}": "must say descr, fortran_order and shape, found nothing",
    "{'descr': '<f4', 'fortran_order': False}": (
        "must say descr, fortran_order and shape, found 'descr', 'fortran_order'"
    ),
    "{'descr': '<f4', 'fortran_order': 0, 'shape': ()}": "must say descr",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (), 'x': 1}": "must say descr",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 3}": "must say descr",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}": "shape holds -1",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}": "shape holds True",
    "{'descr': '<f4', 'fortran_order': False, 'shape': ('2',)}": "shape holds '2'",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,)}": (
        "needs 39,999,999,996 bytes of data, and there are 8"
    ),
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}": "there are 8",
    "{'descr': 'f4', 'fortran_order': False, 'shape': (2,)}": (
        "descr is 'f4', which is not a NumPy type"
    ),
    "{'descr': 4, 'fortran_order': False, 'shape': (2,)}": "descr is 4",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)} + 1": "not a literal",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}}": "something follows",
    "{'descr': '<f4' 'fortran_order': False}": "',' or '}' must follow",
    "{'descr': __import__('os').system('true')}": "not a literal",
    "{[]: 1}": "needs texts for keys",
    "{'descr': " + "(" * 60_000: "nested more than 32 deep",
    "{'descr': " + "-" * 60_000 + "1}": "not a literal",
    "{'shape': " + "9" * 60_000 + "}": "not a literal",
}


@pytest.mark.parametrize("text", HEADERS, ids=lambda text: text[:60])
def test_a_header_that_lies_is_refused_with_a_sentence(text: str) -> None:
    content = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(8)
    with pytest.raises(Malformed) as caught:
        npy.scan(source_of(content))
    assert HEADERS[text] in str(caught.value)


def test_a_header_of_gigabytes_is_refused() -> None:
    with pytest.raises(Malformed, match="the header takes 4,294,967,307 bytes"):
        npy.scan(source_of(b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(64)))


def test_a_version_from_the_future_is_refused() -> None:
    with pytest.raises(Malformed, match="version 4, and 1 to 3 are known"):
        npy.scan(source_of(b"\x93NUMPY\4\0\1\0\0\0" + bytes(64)))


def test_more_arrays_than_the_limit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(LimitExceeded, match="holds 2 arrays"):
        npz.scan(Source.file(tmp_path / "x.npz", Limits(tensors=1)))


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is a text of some length", b"PK\3\4" + bytes(40)]
)
def test_what_is_no_archive_is_refused_when_it_is_forced(content: bytes) -> None:
    with pytest.raises(Malformed):
        npz.scan(source_of(content))


def test_several_arrays_in_one_npy_file_are_not_half_read(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.save(file, np.ones(3))
        np.save(file, np.ones(3))
    with pytest.raises(Malformed, match="needs 24 bytes of data, and there are 176") as caught:
        npy.scan(Source.file(tmp_path / "x.npy", Limits()))
    assert (
        caught.value.hint == "if several arrays were saved to one file, save them as .npz instead"
    )


def test_numpy_and_zipfile_read_what_is_written(tmp_path: Path) -> None:
    arrays = {
        f"layers/{descr} größe.{layout}": array_of(descr, layout)
        for descr in LITTLE
        for layout in LAYOUTS
    }
    path = write(
        tmp_path / "x.npz",
        npz.FORMAT,
        [entry_of(name, array) for name, array in arrays.items()],
        {"author": "ü"},
    )
    with zipfile.ZipFile(path) as written:
        assert written.testzip() is None
    with np.load(path) as loaded:
        assert loaded.files == list(arrays)
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype, name
            assert (loaded[name].shape, loaded[name].tobytes()) == (array.shape, array.tobytes()), (
                name
            )


def test_numpy_maps_a_lone_array_that_is_written(tmp_path: Path) -> None:
    array = array_of("<f4", "c")
    path = write(tmp_path / "x.npy", npy.FORMAT, [entry_of("tensor", array)])
    assert path.read_bytes() == saved(array)
    assert np.array_equal(np.load(path, mmap_mode="r"), array, equal_nan=True)


def saved(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_tie_is_written_under_each_name_and_the_rest_of_the_metadata_is_kept(
    tmp_path: Path,
) -> None:
    entry = entry_of("embed", np.ones(3, "f4"))
    path = write(
        tmp_path / "x.npz", npz.FORMAT, [entry], {"head": "embed", "format": "pt", "author": "ü"}
    )
    with np.load(path) as loaded:
        assert loaded.files == ["embed", "head"]
        assert np.array_equal(loaded["embed"], loaded["head"])
    assert scanned(npz.FORMAT, path).metadata == {"author": "ü"}


@pytest.mark.parametrize(
    "comment",
    [b"made by hand", b"{", b"{]", b"[" * 60_000, b'{"a": 1}', b"{" * 60_000, b"\xff\xfe"],
)
def test_the_comment_of_a_stranger_is_passed_over(comment: bytes, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as file:
        file.comment = comment
    found = scanned(npz.FORMAT, tmp_path / "x.npz")
    assert [entry.name for entry in found.tensors] == ["a"]
    assert found.metadata == {}


PLAIN = entry_of("tensor", np.ones(3, "f4"))
REFUSED: dict[str, tuple[Format, list[TensorEntry], dict[str, str]]] = {
    "two tensors in .npy": (npy.FORMAT, [PLAIN, PLAIN], {}),
    "no tensor in .npy": (npy.FORMAT, [], {}),
    "another name in .npy": (npy.FORMAT, [replace(PLAIN, path=("w",))], {}),
    "metadata in .npy": (npy.FORMAT, [PLAIN], {"author": "me"}),
    "too much metadata": (npz.FORMAT, [PLAIN], {"author": "x" * 70_000}),
    "a NUL in a name": (npz.FORMAT, [replace(PLAIN, path=("a\0b",))], {}),
    "unpaired surrogate": (npz.FORMAT, [replace(PLAIN, path=("\ud800",))], {}),
    "a long name": (npz.FORMAT, [replace(PLAIN, path=("x" * 70_000,))], {}),
    "33 axes": (npz.FORMAT, [TensorEntry(("a",), BY_CODE["U8"], (1,) * 33, Literal(b"1"))], {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_room_is_refused_with_advice(case: str) -> None:
    form, entries, metadata = REFUSED[case]
    assert form.lay_out
    with pytest.raises(Unwritable) as caught:
        form.lay_out(entries, metadata)
    assert caught.value.hint


LACKING = [
    dtype
    for dtype in DTYPES
    if dtype.code.startswith(("BF", "F8_", "F6_")) or dtype.code in ("F4", "C32")
]


@pytest.mark.parametrize("dtype", LACKING, ids=lambda dtype: dtype.code)
def test_a_type_that_numpy_lacks_is_refused_with_advice(dtype: DType) -> None:
    entry = TensorEntry(("w",), dtype, (8,), Literal(bytes(dtype.nbytes((8,)))))
    with pytest.raises(Unwritable, match="numpy has no such type") as caught:
        npz.lay_out([entry], {})
    assert caught.value.hint
    assert ("dtype='fp32'" in caught.value.hint) == (dtype.kind == "float")


def test_two_tensors_of_one_name_clash() -> None:
    with pytest.raises(NameClash):
        npz.lay_out([PLAIN, PLAIN], {})


def test_archives_beyond_4_gib_are_zip64(tmp_path: Path) -> None:
    members = [NewMember(b"a", Zeros(5 << 30)), NewMember(b"b", Literal(b"after"))]
    crcs: list[int] = []
    path = tmp_path / "sparse.zip"
    with path.open("wb") as file:
        for part in archive(members):
            if isinstance(part, Zeros):
                file.seek(part.nbytes, io.SEEK_CUR)
                crcs.append(7)  # of zeros that nobody reads here
                continue
            content = part.make(crcs) if isinstance(part, Trailer) else bytes(read_all(part))
            crcs.append(zlib.crc32(content))
            file.write(content)
    with zipfile.ZipFile(path) as opened:
        found = [(info.filename, info.file_size, info.CRC) for info in opened.infolist()]
        assert found == [("a", 5 << 30, 7), ("b", 5, zlib.crc32(b"after"))]
        assert opened.read("b") == b"after"
    assert [member.nbytes for member in Source.file(path, Limits()).members] == [5 << 30, 5]


def test_more_members_than_16_bits_count_are_zip64(tmp_path: Path) -> None:
    entries = [replace(PLAIN, path=(str(number),)) for number in range(66_000)]
    path = write(tmp_path / "x.npz", npz.FORMAT, entries)
    with zipfile.ZipFile(path) as opened:
        assert len(opened.infolist()) == 66_000
    assert len(Source.file(path, Limits()).members) == 66_000


def samples(folder: Path) -> dict[str, tuple[Format, Path]]:
    arrays = {
        name: array_of(descr, layout)
        for name, descr, layout in (
            ("a", "<f4", "c"),
            ("b", ">i2", "fortran"),
            ("c", "?", "scalar"),
        )
    }
    np.savez(folder / "stored.npz", **arrays)  # type: ignore[arg-type]  # its keywords are typed as its one flag is
    np.savez_compressed(folder / "deflated.npz", **arrays)  # type: ignore[arg-type]  # likewise
    np.save(folder / "plain.npy", arrays["a"])
    np.save(folder / "turned.npy", arrays["b"])
    forms = {".npz": npz.FORMAT, ".npy": npy.FORMAT}
    return {path.name: (forms[path.suffix], path) for path in folder.iterdir()}


@pytest.mark.parametrize("check", READING, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["stored.npz", "deflated.npz", "plain.npy", "turned.npy"])
def test_the_formats_keep_the_rules_of_reading(name: str, check: Any, tmp_path: Path) -> None:
    check(*samples(tmp_path)[name])


@pytest.mark.parametrize("check", WRITING, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("form", "name"), [(npz.FORMAT, "weight"), (npy.FORMAT, "tensor")], ids=["npz", "npy"]
)
def test_the_formats_keep_the_rules_of_writing(form: Format, name: str, check: Any) -> None:
    check(form, name)


def test_the_formats_claim_nothing_foreign(tmp_path: Path) -> None:
    found = samples(tmp_path)
    for form in (npz.FORMAT, npy.FORMAT):
        check_foreign(form, [path for other, path in found.values() if other is not form])
