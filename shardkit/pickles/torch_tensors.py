"""Tensors as torch pickles have them: views on storages, not yet looked up in any record.

1. A `View` is numbers only. What they mean is checked when the tensor gets its name, so that a
   fault can name it.
2. A storage is known by its key, never by an object: a pickle says the same storage anew for every
   tensor.
3. None of them is frozen, though nothing changes them: they are made for every tensor, and a frozen
   one takes four times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from shardkit.checkpoint.entries import OtherKind
from shardkit.dtypes import BY_CODE, DType
from shardkit.payloads.payload import Payload, Swapped
from shardkit.payloads.strided import strided
from shardkit.pickles.objects import Dict, Global
from shardkit.printable import shown

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


STORAGE_CLASSES = {
    "UntypedStorage": StorageClass(BY_CODE["U8"]),
    "_UntypedStorage": StorageClass(BY_CODE["U8"]),
    "DoubleStorage": StorageClass(BY_CODE["F64"]),
    "FloatStorage": StorageClass(BY_CODE["F32"]),
    "HalfStorage": StorageClass(BY_CODE["F16"]),
    "BFloat16Storage": StorageClass(BY_CODE["BF16"]),
    "LongStorage": StorageClass(BY_CODE["I64"]),
    "IntStorage": StorageClass(BY_CODE["I32"]),
    "ShortStorage": StorageClass(BY_CODE["I16"]),
    "CharStorage": StorageClass(BY_CODE["I8"]),
    "ByteStorage": StorageClass(BY_CODE["U8"]),
    "BoolStorage": StorageClass(BY_CODE["BOOL"]),
    "ComplexDoubleStorage": StorageClass(BY_CODE["C128"]),
    "ComplexFloatStorage": StorageClass(BY_CODE["C64"]),
    "QInt8Storage": StorageClass(BY_CODE["I8"], quantised=True),
    "QUInt8Storage": StorageClass(BY_CODE["U8"], quantised=True),
    "QInt32Storage": StorageClass(BY_CODE["I32"], quantised=True),
    "QUInt4x2Storage": StorageClass(BY_CODE["U8"], quantised=True),
    "QUInt2x4Storage": StorageClass(BY_CODE["U8"], quantised=True),
}


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
"""Finds the bytes of the record of a storage, as many as it says; raises ValueError with a
sentence.
"""


@dataclass(slots=True)
class View:
    """A dense tensor: a window on a storage, in elements. F4 is counted by torch in bytes of
    two.
    """

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
        return (
            (*self.shape[:-1], self.shape[-1] * self.dtype.packed)
            if self.shape
            else (self.dtype.packed,)
        )

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
            content,
            dtype=self.dtype,
            offset=self.offset,
            shape=self.shape,
            strides=self.strides,
            conj=self.conj,
            neg=self.neg,
        )

    def _check(self) -> None:
        shape, strides = self.shape, self.strides
        if len(shape) > _MOST_AXES or len(shape) != len(strides):
            counts = f"{len(shape)} lengths and {len(strides)} strides"
            raise ValueError(
                f"it has {counts}, and torch has as many of both, {_MOST_AXES} at most"
            )
        for number in (self.offset, *shape, *strides):
            if not 0 <= number < _MOST:
                raise ValueError(
                    f"an axis, a stride or the offset is {shown(number)}, and torch counts "
                    "from "
                    "0 to 2⁶³ - 1"
                )


@dataclass(frozen=True, slots=True)
class NonDense:
    """A tensor that is no plain block of values."""

    kind: OtherKind
    nbytes: int
    reason: str


@dataclass(slots=True, eq=False)
class Stateful:
    """A tensor with attributes of its own, as some subclasses and parameters have. Whether these
    hold tensors is determined later.

    Attributes:
        tensor: its values, if the attributes do not matter.
        name: its class.
        state: the attributes.
    """

    tensor: View
    name: str
    state: object

    @property
    def nbytes(self) -> int:
        """Bytes of its values, without the state."""
        return self.tensor.nbytes


def stated(tensor: View | Stateful, name: str, states: tuple[object, ...]) -> View | Stateful:
    """*tensor* with those of its *states* that may hold tensors."""
    held = tuple(state for state in states if not _is_plain(state))
    if not held:
        return tensor
    if isinstance(tensor, Stateful):
        return Stateful(tensor.tensor, name, (tensor.state, *held))
    return Stateful(tensor, name, held)


def _is_plain(state: object) -> bool:
    """Whether *state* is texts, numbers and types, or a dict of those."""
    if isinstance(state, Dict):
        return (
            not state.pairs
            and state.state is None
            and all(isinstance(value, _PLAIN) for value in state.values())
        )
    return isinstance(state, _PLAIN)


_PLAIN = (str, int, float, bytes, DType, type(None))


Tensor = View | NonDense
TENSORS = (View, NonDense, Storage, Stateful)


def storage_of(pid: object) -> Storage:
    """The storage that a persistent id means, as zip and legacy files write it.

    Raises:
        ValueError: it means none.
    """
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError(f"the persistent id {shown(pid)} does not name a storage")
    kind, key, count = pid[1], pid[2], pid[4]
    if type(kind) is Global:
        raise ValueError(f"a storage is of the class {shown(kind.name)}, which torch does not have")
    if type(kind) is not StorageClass or type(key) is not str:
        raise ValueError(
            f"a storage is named by {shown(kind)} and {shown(key)}, where a class of torch "
            "and a "
            "text are needed"
        )
    if type(count) is not int or not 0 <= count < _MOST:
        raise ValueError(
            f"storage {shown(key)} claims {shown(count)} elements, and torch counts "
            "from 0 to 2⁶³ - 1"
        )
    root = Storage(kind, key, count, 0, count)
    return root if len(pid) == 5 or pid[5] is None else _viewed(root, pid[5])


def _viewed(root: Storage, view: object) -> Storage:
    """A part of a storage, as torch wrote them before 0.4: (key of the view, first element,
    elements).
    """
    match view:
        case (_, int(start), int(length)) if 0 <= start <= start + length <= root.count:
            return Storage(root.kind, root.key, root.count, start, length)
    raise ValueError(f"a view on storage {shown(root.key)} exceeds its {root.count} elements")
