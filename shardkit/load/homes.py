"""Where a tensor of a checkpoint lives in a model, and what becomes of its type and shape on the way there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch.nn.parameter import is_lazy

from shardkit.casting import Cast, can_cast
from shardkit.checkpoint import TensorEntry
from shardkit.dtypes import DType
from shardkit.load.weights import Seat, stored_type, torch_type
from shardkit.payload import Payload


@dataclass(slots=True, unsafe_hash=True)
class Home:
    """One weight of a model, and the tensor of the checkpoint that is to live there.

    Attributes:
        names: all names of the weight in the model, in its order.
        entry: the tensor of the checkpoint.
        dtype: the type that the weight will have.
        shape: the shape that it will have, as torch counts it: two 4-bit floats are one element.
        is_buffer: whether it is a buffer (a persistent one) under each of its names.
        seats: where the model keeps it.
    """

    names: tuple[str, ...]
    entry: TensorEntry
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_buffer: bool
    seats: tuple[Seat, ...]

    @property
    def name(self) -> str:
        """Its first name in the model."""
        return self.names[0]

    @property
    def payload(self) -> Payload:
        """Its values as they will be in memory, cast where they are stored in another type."""
        target = stored_type(self.dtype)
        if target is None or target is self.entry.dtype or target == self.entry.dtype:
            return self.entry.payload
        return Cast(self.entry.payload, self.entry.dtype, target)

    @property
    def stored(self) -> TensorEntry:
        """The entry as if it were stored as it will be in memory."""
        target = stored_type(self.dtype) or self.entry.dtype
        shape = (*self.shape[:-1], self.shape[-1] * target.packed) if self.shape else ()
        return TensorEntry(self.entry.path, target, shape, self.payload)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Change:
    """What a change of type comes to.

    Attributes:
        possible: whether torch has both types, and we know how.
        widens: whether 8-bit floats, which may be codes, become wider.
        other_kind: whether floats become integers or the reverse, or are so beside what the model declares.
    """

    possible: bool
    widens: bool = False
    other_kind: bool = False


@cache
def change_of(stored: DType, target: torch.dtype | None, declared: torch.dtype) -> Change:
    """What it comes to that a weight which is *stored* in one type gets *target* where the model has declared another."""
    known = stored_type(target) if target else None
    if target is None or known is None or torch_type(stored) is None:
        return Change(possible=False)
    is_float = stored.kind == "float"
    return Change(
        possible=stored == known or can_cast(stored, known),
        widens=is_float and stored.bits < 16 <= target.itemsize * 8,
        other_kind=len({is_float, target.is_floating_point, declared.is_floating_point}) > 1,
    )


def fitting_shape(tensor: torch.Tensor, entry: TensorEntry) -> tuple[int, ...] | None:
    """The shape that a weight of the model, now *tensor*, gets; None where that of *entry* does not fit."""
    packed = entry.dtype.packed
    if is_lazy(tensor):
        return (*entry.shape[:-1], entry.shape[-1] // packed) if entry.shape else ()
    if packed == 1 and tensor.shape == entry.shape:
        return entry.shape
    shape = tuple(tensor.shape)
    counted = (*shape[:-1], shape[-1] * packed) if shape else shape
    # As torch does: a scalar was a tensor of one element before torch 0.4.
    return shape if counted == entry.shape or (not shape and entry.shape == (1,)) else None
