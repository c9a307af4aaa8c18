"""Recipes: which bytes of a payload are the elements of a tensor, and in which order its strides
place them in memory.

Strides are those that torch would give. A product computed with a transposed matrix may differ in
its last bit from one computed with the same matrix made contiguous, and results with lazy tensors
must not differ from results in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from shardkit.checkpoint.entries import SourceFile, TensorEntry
from shardkit.dtypes import BY_TORCH, DType
from shardkit.errors import LoadError
from shardkit.payloads.cast import Cast, can_cast
from shardkit.payloads.joined import joined
from shardkit.payloads.payload import Payload
from shardkit.payloads.strided import strided
from shardkit.printable import shown


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor as a view of bytes that are not read yet.

    Attributes:
        storage: the bytes that the view looks at.
        dtype: type of the elements; of F4, an element is a byte that holds two, as in torch.
        shape: lengths of the axes.
        strides: elements of the storage from one index to the next on each axis.
        offset: the view's first element.
        files: the files of the checkpoint, as they were when it was opened; none where nobody
            looked.
    """

    storage: Payload
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    files: tuple[SourceFile, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, entry: TensorEntry, files: tuple[SourceFile, ...] = ()) -> Recipe:
        """Describe all of *entry*, of a checkpoint that consists of *files*.

        Raises:
            LoadError: torch has no such tensors.
        """
        if entry.dtype.torch is None or not hasattr(torch, entry.dtype.torch):
            raise LoadError(
                (
                    f"{shown(entry.name)} is {entry.dtype.code}, and torch {torch.__version__} has "
                    "no such type"
                ),
                hint=f"it has {entry.nbytes:,} bytes, which shardkit.open can read",
            )
        shape = entry.shape
        if entry.dtype.packed > 1:
            if not shape or shape[-1] % entry.dtype.packed:
                raise LoadError(
                    (
                        f"{shown(entry.name)} is {entry.dtype.code} {list(shape)}, and a row is "
                        f"not a whole number of bytes"
                    ),
                    hint="leave the name out; shardkit.open can read its bytes",
                )
            shape = (*shape[:-1], shape[-1] // entry.dtype.packed)
        return cls(entry.payload, entry.dtype, shape, _contiguous(shape), files=files)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, str(self.dtype.torch))
        return dtype

    @property
    def payload(self) -> Payload:
        """The elements in C order."""
        return strided(
            self.storage,
            dtype=self.dtype,
            offset=self.offset,
            shape=self.shape,
            strides=self.strides,
        )

    @property
    def in_memory(self) -> tuple[Payload, tuple[int, ...]]:
        """What is read, and the strides that then give the tensor: its own where it has no gaps,
        else those of C order.
        """
        shape = [
            length if stride else 1 for length, stride in zip(self.shape, self.strides, strict=True)
        ]
        if not _is_dense(shape, self.strides):
            return self.payload, _contiguous(self.shape)
        itemsize = self.dtype.itemsize
        return self.storage.narrow(self.offset * itemsize, prod(shape) * itemsize), self.strides

    def shape_only(self) -> torch.Tensor:
        """A tensor without data that has this geometry, so that torch can say what becomes of
        it.
        """
        count = self.storage.nbytes // self.dtype.itemsize
        whole = torch.empty(count, dtype=self.torch_dtype, device="meta")
        return whole.as_strided(self.shape, self.strides, self.offset)

    def viewed(self, view: torch.Tensor) -> Recipe | None:
        """The recipe of *view*, a view of what `shape_only` gave; None if it changes more than
        geometry and type.
        """
        if view.is_conj() or view.is_neg() or (dtype := dtype_of(view)) is None:
            return None
        geometry = tuple(view.shape), view.stride(), int(view.storage_offset())
        return Recipe(self.storage, dtype, *geometry, files=self.files)

    def copied(self, copy: torch.Tensor) -> Recipe | None:
        """The recipe of a copy with the type and strides of *copy*, which has no gaps; None where
        torch must compute it.
        """
        dtype = dtype_of(copy)
        if dtype is None or not _is_dense(self.shape, copy.stride()):
            return None
        payload = self._in(_order(copy.stride()))
        if dtype != self.dtype:
            if not can_cast(self.dtype, dtype):
                return None
            payload = Cast(payload, self.dtype, dtype)
        return Recipe(payload, dtype, self.shape, copy.stride(), files=self.files)

    def _in(self, order: Sequence[int]) -> Payload:
        """The elements, with the axes in *order*, outermost first."""
        shape, strides = ([each[axis] for axis in order] for each in (self.shape, self.strides))
        return strided(
            self.storage, dtype=self.dtype, offset=self.offset, shape=shape, strides=strides
        )


def join(
    parts: Sequence[Recipe], shapes: Sequence[Sequence[int]], dim: int, whole: torch.Tensor
) -> Recipe | None:
    """The recipe of *parts*, which have one type and are taken to have *shapes*, joined along
    *dim*.

    Args:
        parts: what is joined.
        shapes: of each its shape, with an axis of one index at *dim* where it is a stack.
        dim: the axis.
        whole: what torch makes of tensors without data.
    """
    order = _order(whole.stride())
    if not _is_dense(whole.shape, whole.stride()):
        return None
    viewed = (
        part.shape_only().reshape(list(shape)) for part, shape in zip(parts, shapes, strict=True)
    )
    recipes = (part.viewed(view) for part, view in zip(parts, viewed, strict=True))
    payloads = [recipe._in(order) for recipe in recipes if recipe is not None]
    payload = joined(
        payloads, [[shape[axis] for axis in order] for shape in shapes], order.index(dim)
    )
    several = dict.fromkeys(
        part.files for part in parts
    )  # one in most cases: all parts are of one checkpoint
    files = tuple(dict.fromkeys(file for each in several for file in each))
    return Recipe(payload, parts[0].dtype, tuple(whole.shape), whole.stride(), files=files)


def dtype_of(tensor: torch.Tensor) -> DType | None:
    """The type of the elements of *tensor*; None if it is one that no format stores."""
    return BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(max(1, length) for length in shape[axis + 1 :]) for axis in range(len(shape)))


def _order(strides: Sequence[int]) -> list[int]:
    """The axes from the largest stride to the smallest."""
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one run of memory, each place once, in whatever order."""
    reach = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride != reach:
            return 0 in shape
        reach *= length
    return True
