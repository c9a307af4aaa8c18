"""Tensors as torch pickles have them: views on storages, not yet looked up in any record.

1. A `View` is numbers only. What they mean is checked when the tensor gets its name, so that a fault can name it.
2. A storage is known by its key, never by an object: a pickle says the same storage anew for every tensor.
3. Neither is frozen, though nothing changes them: both are made for every tensor, and a frozen one takes four times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from shardkit.checkpoint import OtherKind
from shardkit.dtypes import DType
from shardkit.errors import shown
from shardkit.payload import Payload, Swapped
from shardkit.stand_ins import Global
from shardkit.strided import strided

_MOST = 1 << 63  # torch counts elements in signed 64 bits
_MOST_AXES = 64  # as torch has it (c10/core/TensorImpl.h)


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A class of storages, as in `torch.FloatStorage`.

    Attributes:
        dtype: type of the elements, in which lengths are counted.
        quantised: whether the elements mean something only with a scale beside them.
    """

    dtype: DType
    quantised: bool = False


@dataclass(slots=True)
class Storage:
    """A run of elements that tensors look at.

    Attributes:
        kind: its class.
        key: names the record that it lies in.
        count: elements of the record.
        start: first of its elements in the record; not 0 only in files older than torch 0.4.
        length: its own elements.
    """

    kind: StorageClass
    key: str
    count: int
    start: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the record."""
        return self.count * self.kind.dtype.itemsize


Record = Callable[[Storage], Payload]
"""Finds the bytes of the record of a storage, as many as it says; raises ValueError with a sentence."""


@dataclass(slots=True)
class View:
    """A dense tensor: a window on a storage, in elements. F4 is counted by torch in bytes of two."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conj: bool = False
    neg: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its values; no more than its storage has, since a shape may lie."""
        count = prod(self.shape) if len(self.shape) <= _MOST_AXES else self.storage.length
        return min(max(count, 0), self.storage.length) * self.dtype.itemsize

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """The shape as safetensors has it, which counts packed elements one by one."""
        if self.dtype.packed == 1:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] * self.dtype.packed) if self.shape else (self.dtype.packed,)

    def payload(self, record: Record, *, big_endian: bool) -> Payload:
        """Its bytes: C-contiguous, little-endian.

        Raises:
            ValueError: the storage does not hold such a view.
        """
        self._check()
        storage, itemsize = self.storage, self.storage.kind.dtype.itemsize
        content = record(storage)
        if storage.length != storage.count:
            content = content.narrow(storage.start * itemsize, storage.length * itemsize)
        if big_endian and self.dtype.word > 1:
            content = Swapped(content, self.dtype.word)
        return strided(
            content, dtype=self.dtype, offset=self.offset, shape=self.shape, strides=self.strides, conj=self.conj, neg=self.neg
        )

    def _check(self) -> None:
        shape, strides = self.shape, self.strides
        if len(shape) > _MOST_AXES or len(shape) != len(strides):
            counts = f"{len(shape)} lengths and {len(strides)} strides"
            raise ValueError(f"it has {counts}, and torch has as many of both, {_MOST_AXES} at most")
        for number in (self.offset, *shape, *strides):
            if not 0 <= number < _MOST:
                raise ValueError(f"an axis, a stride or the offset is {shown(number)}, and torch counts from 0 to 2⁶³ - 1")


@dataclass(frozen=True, slots=True)
class Undense:
    """A tensor that is no plain block of values."""

    kind: OtherKind
    nbytes: int
    reason: str


Tensor = View | Undense


def storage_of(pid: object) -> Storage:
    """The storage that a persistent id means, as zip and legacy files write it.

    Raises:
        ValueError: it means none.
    """
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError(f"the persistent id {shown(pid)} means no storage")
    kind, key, count = pid[1], pid[2], pid[4]
    if type(kind) is Global:
        raise ValueError(f"a storage is of the class {shown(kind.name)}, which torch does not have")
    if type(kind) is not StorageClass or type(key) is not str:
        raise ValueError(f"a storage is named by {shown(kind)} and {shown(key)}, where a class of torch and a text are needed")
    if type(count) is not int or not 0 <= count < _MOST:
        raise ValueError(f"storage {shown(key)} is said to have {shown(count)} elements, and torch counts from 0 to 2⁶³ - 1")
    root = Storage(kind, key, count, 0, count)
    return root if len(pid) == 5 or pid[5] is None else _viewed(root, pid[5])


def _viewed(root: Storage, view: object) -> Storage:
    """A part of a storage, as torch wrote them before 0.4: (key of the view, first element, elements)."""
    match view:
        case (_, int(start), int(length)) if 0 <= start <= start + length <= root.count:
            return Storage(root.kind, root.key, root.count, start, length)
    raise ValueError(f"a view on storage {shown(root.key)} is no part of its {root.count} elements")
