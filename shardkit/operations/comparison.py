"""The result of a comparison: the tensors that differ, and what was not compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardkit.brief import brief
from shardkit.checkpoint.entries import LeftOut

Change = Literal["added", "removed", "dtype", "shape", "bytes"]
"""How a tensor differs; "added" is on the right side only, "removed" on the left only."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that differs between two checkpoints.

    Attributes:
        name: of the tensor.
        change: "added" is on the right side only, "removed" on the left only; else the first thing
            that differs.
        detail: for a person: both values, or the first element that differs.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "out", exclude=["2.bias"])
        >>> shardkit.diff("model.safetensors", "out").differences
        (Difference(name='2.bias', change='removed', detail='F32 [4]'),)
    """

    name: str
    change: Change
    detail: str


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """The result of `verify` or `diff`.

    Attributes:
        tensors: how many were compared.
        nbytes: bytes of one side that were compared.
        differences: what differs, in the order of the left side, then what is on the right only.
        notes: sentences that the user should see: what was compared with what, and what was not.
        left_out: weights on either side that were not compared, under the path of that side.
        unchecked: how many of *tensors* were read, but are in files without a checksum for them; 0
            where two checkpoints were compared.
        tied: how many of *tensors* are further names of tied weights, which `convert` does not
            count; their bytes count once.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "out")
        >>> comparison = shardkit.verify("out", "model.safetensors")
        >>> comparison.same, comparison.tensors, comparison.nbytes
        (True, 4, 304)
    """

    tensors: int
    nbytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    unchecked: int = 0
    tied: int = 0

    def __repr__(self) -> str:
        return brief(self)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences
