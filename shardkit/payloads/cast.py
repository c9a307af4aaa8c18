"""A payload that casts numbers while it is read, exactly as `Tensor.to` does.

Torch is imported when the first byte is read. It gets so little at a time that the data stays in
the processor's cache, and that torch starts no threads of its own: the writer's threads are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardkit.dtypes import DType
from shardkit.errors import Unwritable
from shardkit.hints import option
from shardkit.payloads.payload import Extent, Payload, check_range, rechunked

if TYPE_CHECKING:
    import torch

# elements; at::internal::GRAIN_SIZE, of which torch says that more is worth a second thread
GRAIN = 32768
_OUTPUT = 1 << 20  # bytes of a chunk


@dataclass(frozen=True, slots=True)
class Cast:
    """Numbers of the type *source*, as *target*: floats rounded to nearest even, out of range as
    torch has it.

    Attributes:
        inner: the numbers as they are stored.
        source: their type.
        target: the type they get.

    Raises:
        Unwritable: torch casts no such types.
        ValueError: an element of *inner* is cut.
    """

    inner: Payload
    source: DType
    target: DType

    def __post_init__(self) -> None:
        if not can_cast(self.source, self.target):
            raise Unwritable(
                (
                    f"{self.source.code} cannot be cast to {self.target.code}: torch casts numbers "
                    "of 8 bits and more"
                ),
                hint=(
                    "leave such tensors out with ",
                    option("exclude"),
                    ", or leave out ",
                    option("dtype"),
                ),
            )
        if self.inner.nbytes % self.source.itemsize:
            raise ValueError(
                f"{self.inner.nbytes} bytes are not a whole number of {self.source.code} elements"
            )

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes // self.source.itemsize * self.target.itemsize

    @property
    def sources(self) -> tuple[Extent, ...]:
        return self.inner.sources

    def narrow(self, start: int, nbytes: int) -> Cast:
        check_range(start, nbytes, self.nbytes)
        first, before = divmod(start, self.target.itemsize)
        count, behind = divmod(nbytes, self.target.itemsize)
        if before or behind:
            raise ValueError(
                f"[{start}, {start + nbytes}) cuts an element of {self.target.itemsize} bytes"
            )
        return Cast(
            self.inner.narrow(first * self.source.itemsize, count * self.source.itemsize),
            self.source,
            self.target,
        )

    def chunks(self) -> Iterator[memoryview]:
        if not self.nbytes:
            return
        output = memoryview(bytearray(min(_OUTPUT, self.nbytes)))
        rooms = parts(tensor_over(output, self.target), GRAIN)
        for chunk in rechunked(self.inner.chunks(), self.inner.nbytes):
            # Torch warns of memory that must not be written, though it will only read it.
            floats = tensor_over(
                memoryview(bytearray(chunk)) if chunk.readonly else chunk, self.source
            )
            for part in parts(floats, GRAIN * len(rooms)):
                for room, grain in zip(rooms, parts(part, GRAIN), strict=False):
                    room[: len(grain)].copy_(grain)
                yield output[: len(part) * self.target.itemsize]


def can_cast(source: DType, target: DType) -> bool:
    """Whether torch makes *target* of *source* without losing more than precision: complex numbers
    stay complex.
    """
    known = all(dtype.bits >= 8 and dtype.torch is not None for dtype in (source, target))
    return known and (source.kind != "complex" or target.kind == "complex")


def parts(tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """*tensor* in parts of *count* elements and a rest."""
    return tensor.split(count)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves it untyped


def tensor_over(memory: memoryview, dtype: DType) -> torch.Tensor:
    """*memory* as a tensor that shares it."""
    try:
        import torch
    except ImportError:
        raise Unwritable(
            "casting needs torch, which is not installed",
            hint=("pip install torch, or leave out ", option("dtype")),
        ) from None
    name = str(dtype.torch)
    if not hasattr(torch, name):
        raise Unwritable(
            f"torch {torch.__version__}, which is installed, has no {name}", hint="update torch"
        )
    return torch.frombuffer(memory, dtype=getattr(torch, name))
