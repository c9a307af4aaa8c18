"""The folders that Accelerate offloads to disk: index.json, and a file NAME.dat for each tensor.
Read only.

1. index.json has type and shape of each name, a file only the bytes. Types that numpy does not have
   (bfloat16, float8) are stored as integers of the same width, but index.json names the true type.
   A scalar is stored as one element.
2. Accelerate checks nothing: a file may be truncated, and entries of another model may stay in
   index.json. Here a file of another length than its entry says is an error. Whether the entries
   belong to one model cannot be checked.
3. An entry may refer to a safetensors file anywhere. Such a weight is listed, and not read: an
   untrusted file does not decide what else is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardkit.plugin import (
    BY_TORCH,
    Checkpoint,
    DType,
    Extent,
    Format,
    FormatError,
    LimitExceeded,
    Limits,
    Malformed,
    Other,
    OtherKind,
    Source,
    SourceFile,
    TensorEntry,
    fault_of_name,
    parse_json,
    several,
    shown,
)

_INDEX = "index.json"
_WHERE = "index"


def sniff(source: Source) -> bool:
    """Whether the folder holds .dat files, and an index that begins with a type and a shape."""
    names = source.names or ()
    if _INDEX not in names or not any(name.endswith(".dat") for name in names):
        return False
    path = source.path / _INDEX
    try:
        head = Source.file(path, source.limits).head if path.is_file() else b""
    except FormatError:
        return False
    return head.lstrip().startswith(b"{") and b'"dtype"' in head and b'"shape"' in head


def scan(source: Source) -> Checkpoint:
    """The tensors of the folder, in the order of its index."""
    path = source.path / _INDEX
    index = SourceFile.of(path)
    lines = _lines(path, index.size, source.limits)
    tensors: list[TensorEntry] = []
    others: list[Other] = []
    files = [index]
    for name, line in lines.items():
        if isinstance(line, dict) and "safetensors_file" in line:
            others.append(
                Other(
                    (name,),
                    OtherKind.META,
                    0,
                    f"its values are stored in {shown(line['safetensors_file'])}",
                )
            )
            continue
        dtype, shape = _described(path, name, line)
        file = _file(source, path, name)
        tensors.append(_entry(file, name, dtype, shape))
        files.append(file)
    unlisted = sum(
        name.endswith(".dat") and name.removesuffix(".dat") not in lines
        for name in source.names or ()
    )
    notes = (
        (f"left out, because {_INDEX} does not list them: {several(unlisted, '.dat file')}",)
        if unlisted
        else ()
    )
    return Checkpoint(tuple(tensors), tuple(others), files=tuple(files), notes=notes)


FORMAT = Format(name="accelerate-dat", suffixes=(), sniff=sniff, scan=scan)


def _lines(path: Path, nbytes: int, limits: Limits) -> Mapping[str, object]:
    if nbytes > limits.header_bytes:
        raise LimitExceeded(
            path, f"the index takes {nbytes:,} bytes", limit="header_bytes", actual=nbytes
        )
    content = b"".join(map(bytes, Extent(path, 0, nbytes).chunks()))
    document = parse_json(path, content, limits, where=_WHERE)
    if not isinstance(document, dict):
        raise Malformed(
            path,
            f"must be an object with an entry for each tensor, found {shown(document)}",
            where=_WHERE,
        )
    if len(document) > limits.tensors:
        raise LimitExceeded(
            path, f"lists {several(len(document), 'tensor')}", limit="tensors", actual=len(document)
        )
    return document


def _described(path: Path, name: str, line: object) -> tuple[DType, tuple[int, ...]]:
    match line:
        case {"dtype": str(word), "shape": list(shape)} if all(
            type(length) is int and length >= 0 for length in shape
        ):
            dtype = BY_TORCH.get(word)
            if dtype is None:
                raise Malformed(
                    path, f"its type {shown(word)} is not known", where=f"tensor {shown(name)}"
                )
            return dtype, tuple(shape)
    raise Malformed(
        path, f"must have a dtype and a shape, found {shown(line)}", where=f"tensor {shown(name)}"
    )


def _file(source: Source, path: Path, name: str) -> SourceFile:
    """The file of the tensor *name*; nothing that is no regular file is opened later."""
    fault = fault_of_name(f"{name}.dat")
    if fault:
        raise Malformed(
            path, f"its file, {shown(f'{name}.dat')}, {fault}", where=f"tensor {shown(name)}"
        )
    file = source.path / f"{name}.dat"
    if not file.is_file():
        raise Malformed(
            path, f"its file, {shown(file.name)}, is missing", where=f"tensor {shown(name)}"
        )
    return SourceFile.of(file)


def _entry(file: SourceFile, name: str, dtype: DType, shape: tuple[int, ...]) -> TensorEntry:
    try:
        need = dtype.nbytes(shape)
    except ValueError as error:
        raise Malformed(file.path, str(error), where=f"tensor {shown(name)}") from None
    # numpy maps no file of no bytes, and so gives an empty tensor one.
    if file.size != need and (need or file.size > 1):
        message = (
            f"{dtype.code} {list(shape)[:8]} needs {several(need, 'byte')}, and the file "
            f"has {file.size:,}"
        )
        hint = "the file is truncated, or index.json belongs to another model"
        raise Malformed(file.path, message, where=f"tensor {shown(name)}", hint=hint)
    return TensorEntry((name,), dtype, shape, Extent(file.path, 0, need))
