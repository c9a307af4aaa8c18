"""The contents of a file: tensors as names, types, shapes and byte ranges; never values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardkit.dtypes import DType
from shardkit.errors import BadDType, UnknownTensor
from shardkit.near_names import near
from shardkit.payloads.payload import Payload, read_all, unreadable
from shardkit.printable import listed, shown, shown_path
from shardkit.sizes import format_size

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, repr=False)
class TensorEntry:
    """One dense tensor of a checkpoint: its name, type, shape, and where its bytes are stored.

    The values are C-contiguous and little-endian, and are read only by `read` and `numpy`.

    Attributes:
        path: the names from the root of the file down to the tensor.
        dtype: type of the elements.
        shape: lengths of the axes, in elements; () for a scalar.
        payload: where the bytes are; as many as *dtype* and *shape* need.

    Raises:
        ValueError: the payload has another length.

    Example:
        >>> import shardkit
        >>> entry = shardkit.open("model.safetensors")["0.weight"]
        >>> entry
        TensorEntry('0.weight', F32 [8, 4], 128 B)
        >>> len(entry.read())
        128
        >>> entry.numpy().shape
        (8, 4)
    """

    path: tuple[str, ...]
    dtype: DType
    shape: tuple[int, ...]
    payload: Payload

    def __post_init__(self) -> None:
        need = self.dtype.nbytes(self.shape)
        if self.payload.nbytes != need:
            raise ValueError(
                f"{self.dtype.code} {list(self.shape)} needs {need} bytes, has "
                f"{self.payload.nbytes}"
            )

    @property
    def name(self) -> str:
        """The dotted path, as in a state dict."""
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes

    def read(self) -> bytearray:
        """Read the whole tensor into memory.

        Returns:
            The values in C order, little-endian.

        Raises:
            FormatError: the file cannot be read.
        """
        return read_all(self.payload)

    def numpy(self) -> npt.NDArray[Any]:  # Any: the type is known when the file is
        """Read the tensor into a NumPy array that owns its memory.

        Returns:
            An array of the tensor's shape.

        Raises:
            BadDType: NumPy has no such type, as for bfloat16 and 8-bit floats.
            FormatError: the file cannot be read.
        """
        code = _NUMPY.get(self.dtype.code)
        if code is None:
            raise BadDType(
                f"{shown(self.name)}: NumPy has no type for {self.dtype.code}",
                hint="read the bytes with .read(), or a torch tensor with "
                "shardkit.load.tensors(path), or cast with "
                "`shardkit convert --dtype fp32` first",
            )
        import numpy as np

        return np.frombuffer(self.read(), np.dtype(code)).reshape(self.shape)

    def __repr__(self) -> str:
        return (
            f"TensorEntry({shown(self.name)}, {self.dtype.code} {list(self.shape)}, "
            f"{format_size(self.nbytes)})"
        )


# By what NumPy calls them; the bytes are little-endian on every machine.
_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
    "C128": "<c16",
}


class OtherKind(StrEnum):
    """What an `Other` is. All but OBJECT and CALL are weights.

    Example:
        >>> from shardkit.plugin import OtherKind
        >>> str(OtherKind.SPARSE), OtherKind("object") is OtherKind.OBJECT
        ('sparse tensor', True)
    """

    SPARSE = "sparse tensor"
    QUANTISED = "quantised tensor"
    NESTED = "nested tensor"
    DISTRIBUTED = "distributed tensor"
    META = "tensor without data"
    UNKNOWN_TENSOR = "tensor of an unknown kind"
    OBJECT = "object"
    CALL = "call"


@dataclass(frozen=True, slots=True)
class Other:
    """An item of a file that is not a dense tensor.

    Attributes:
        path: the names from the root of the file down to it.
        kind: what it is.
        nbytes: bytes of weights that it refers to; 0 where there are none or their size is unknown.
        reason: for a person: the class, or why it is not a dense tensor.

    Example:
        >>> import shardkit
        >>> for other in shardkit.open("training.pt").others[:2]:
        ...     print(other.name, "|", other.kind, "|", other.reason, "|", other.is_weight)
        optimizer_states.0.param_groups | object | a list of 1 | False
        lr_schedulers | object | a list of 1 | False
    """

    path: tuple[str, ...]
    kind: OtherKind
    nbytes: int
    reason: str

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def is_weight(self) -> bool:
        """Whether leaving it out would lose a weight."""
        return self.kind not in (OtherKind.OBJECT, OtherKind.CALL)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Weights that are beside what was read, or beside the model in it, and are not converted.

    Attributes:
        path: of a file or subfolder (which ends in a slash), relative to the folder that was
            opened; or the dotted path of an object inside a file.
        nbytes: bytes of the file, of the weight files in the subfolder, or of the tensors in the
            object.
        reason: for a person.
    """

    path: str
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """The state of a file when it was scanned, so that a change is noticed before the output is
    committed.

    Attributes:
        path: the file.
        size: its size in bytes.
        mtime_ns: when it was last written, in nanoseconds since the epoch.
        inode: number of the file in its file system.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.plugin import SourceFile
        >>> scanned = SourceFile.of(Path("model.safetensors"))
        >>> scanned == SourceFile.of(Path("model.safetensors"))
        True
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Record the current state of the file at *path*.

        Raises:
            FormatError: the file cannot be examined.
        """
        try:
            stat = os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True, repr=False)
class Checkpoint(Mapping[str, TensorEntry]):
    """The contents of a file, or of a folder of shards: a read-only mapping of names to
    `TensorEntry`.

    Where two paths give one dotted name, the mapping has the first of them; `tensors` has both. Two
    checkpoints are equal if all of their fields are; a checkpoint and another mapping, if their
    items are.

    Attributes:
        tensors: the dense tensors, in the order of the source. Tied ones have equal payloads.
        others: what is not a dense tensor.
        metadata: the text that safetensors keeps in `__metadata__`, without the records of ties.
        files: the files that were read.
        format: name of the format, as `shardkit formats` lists it.
        notes: sentences that the user should see: conflicts settled, things ignored.
        left_out: files and subfolders with weights that were not read.

    Example:
        >>> import shardkit
        >>> checkpoint = shardkit.open("model.safetensors")
        >>> checkpoint
        <Checkpoint model.safetensors: safetensors, 4 tensors, 304 B: '0.weight', '0.bias', ...>
        >>> {name: entry.shape for name, entry in checkpoint.items() if name.endswith("bias")}
        {'0.bias': (8,), '2.bias': (4,)}
    """

    tensors: tuple[TensorEntry, ...]
    others: tuple[Other, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    files: tuple[SourceFile, ...] = ()
    format: str = ""
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        return sum({(t.payload, t.dtype.code, t.shape): t.nbytes for t in self.tensors}.values())

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownTensor(name, near(name, self._by_name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __hash__(self) -> int:
        return hash((self.tensors, self.others, self.files, self.format, self.notes))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Checkpoint):
            return all(
                getattr(self, each.name) == getattr(other, each.name) for each in fields(self)
            )
        return self._by_name == other if isinstance(other, Mapping) else NotImplemented

    def __repr__(self) -> str:
        where = f" {shown_path(self.files[0].path)}" if self.files else ""
        where += f" and {len(self.files) - 1:,} more files" if len(self.files) > 1 else ""
        count = (
            f"{len(self.tensors):,} tensor{'s' * (len(self.tensors) != 1)}, "
            f"{format_size(self.nbytes)}"
        )
        made = ", ".join(filter(None, (self.format, count)))
        names = (
            f": {listed([shown(name) for name in islice(self._by_name, 3)])}"
            if self._by_name
            else ""
        )
        return f"<Checkpoint{where}: {made}{names}{' …' if len(self._by_name) > 3 else ''}>"

    @cached_property
    def _by_name(self) -> dict[str, TensorEntry]:
        by_name: dict[str, TensorEntry] = {}
        for entry in self.tensors:
            by_name.setdefault(entry.name, entry)
        return by_name
