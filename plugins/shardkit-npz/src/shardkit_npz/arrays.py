"""An array of numpy, header and data, as a tensor."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path

from shardkit.plugin import DType, Malformed, Other, Payload, Swapped, TensorEntry, several, strided
from shardkit_npz.header import Foreign, Header


def tensor(path: Path, name: str, header: Header, data: Payload, where: str) -> TensorEntry | Other:
    """What the array is whose bytes after the *header* are *data*.

    Raises:
        Malformed: the data is not as long as the header says.
    """
    if isinstance(header.dtype, Foreign):
        return Other((name,), header.dtype.kind, data.nbytes, header.dtype.reason)
    need = header.dtype.itemsize * prod(header.shape)
    if data.nbytes != need:
        message = (
            f"{header.dtype.code} {list(header.shape)} needs {several(need, 'byte')} of "
            f"data, and there are {data.nbytes:,}"
        )
        raise Malformed(path, message, where=where, hint=_hint(data.nbytes, need))
    if header.is_big_endian and header.dtype.word > 1:
        data = Swapped(data, header.dtype.word)
    try:
        return TensorEntry(
            (name,), header.dtype, header.shape, _in_c_order(data, header.dtype, header)
        )
    except ValueError as error:
        raise Malformed(path, str(error), where=where) from None


def _in_c_order(data: Payload, dtype: DType, header: Header) -> Payload:
    if not header.is_fortran or not data.nbytes:
        return data
    strides = tuple(accumulate(header.shape[:-1], mul, initial=1))
    return strided(
        data, dtype=dtype, offset=0, shape=header.shape, strides=strides[: len(header.shape)]
    )


def _hint(found: int, need: int) -> str:
    if found < need:
        return "the file is truncated: copy or download it again"
    return "if several arrays were saved to one file, save them as .npz instead"
