"""Payloads of views: the C-contiguous bytes of any view of a storage, gathered in bounded memory.

1. A contiguous view is a plain run of its storage.
2. Any other is cut into boxes: runs of the output whose input fits the memory for one. Of all ways
   to cut, the one that reads least is chosen; each read has a cost of its own, so that few large
   ones are preferred.
3. A box is read in storage order, and its axes are permuted in memory, a slab at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardkit.dtypes import DType
from shardkit.payloads.gather import Axis, Staging, count_of, memory_of, price_of, reach_of, reading
from shardkit.payloads.payload import Extent, Payload, check_range, rechunked
from shardkit.printable import shown

if TYPE_CHECKING:
    from shardkit.payloads.gather import Array

_SLAB = 4 << 20  # output made at once
_TURNED = 32 << 10  # turned at once; stays in the processor's first cache
_LINE = 64  # elements that are at least worth turning together
_MOST = 1 << 63  # bytes that are nobody's memory
_MOST_AXES = 32  # numpy 1 knows no more; after joining, each has at least two elements


def strided(
    storage: Payload,
    *,
    dtype: DType,
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    conj: bool = False,
    neg: bool = False,
) -> Payload:
    """Describe the C-contiguous bytes of a view, such as a transposed or sliced tensor.

    Nothing is read. A contiguous view becomes a plain run of the storage. The arguments mean what
    they mean in `torch.as_strided`.

    Args:
        storage: the bytes that the view is of.
        dtype: type of the elements; of F4, an element is a byte that holds two, as in torch.
        offset: the view's first element, counted in elements.
        shape: lengths of the axes in elements, outermost first.
        strides: elements from one index to the next on each axis.
        conj: whether the values are the conjugates of those stored.
        neg: whether the values are the negatives of those stored.

    Returns:
        A payload of as many bytes as *dtype* and *shape* need.

    Raises:
        ValueError: there is no such view of the storage.

    Example:
        The transpose of a 2 × 3 matrix:

        >>> from shardkit.plugin import BY_CODE, Literal, read_all, strided
        >>> matrix = Literal(bytes([1, 2, 3, 4, 5, 6]))
        >>> view = strided(matrix, dtype=BY_CODE["U8"], offset=0, shape=(3, 2), strides=(1, 3))
        >>> list(read_all(view))
        [1, 4, 2, 5, 3, 6]
    """
    if len(shape) != len(strides):
        raise ValueError(
            f"a view of shape {list(shape)} has {len(strides)} strides, and needs one for each axis"
        )
    count, dense = 1, not (conj or neg)
    for axis in reversed(range(len(shape))):
        length, stride = shape[axis], strides[axis]
        if length < 0 or stride < 0:
            raise ValueError(
                f"a view of shape {list(shape)} has strides {list(strides)}, and none may be "
                "negative"
            )
        if stride != count and length != 1:
            dense = False
        count *= length
    if not count:
        return storage.narrow(0, 0)
    if dense:
        return _span(storage, dtype, offset, count)
    return _gathered(storage, dtype, offset, _joined(shape, strides), conj, neg)


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements picked from a storage in the order of a view's indices.

    Attributes:
        storage: the bytes from the first element of the view to the last.
        dtype: type of the elements.
        axes: length and stride of each axis, outermost first; axes that are one are joined, so that
            equal is equal.
        first: number, in the order of the view, of the first element that is meant.
        count: how many are meant.
        conj: whether imaginary parts change their sign.
        neg: whether values change their sign.
    """

    storage: Payload
    dtype: DType
    axes: tuple[Axis, ...]
    first: int
    count: int
    conj: bool = False
    neg: bool = False

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def sources(self) -> tuple[Extent, ...]:
        return self.storage.sources

    def narrow(self, start: int, nbytes: int) -> Strided:
        check_range(start, nbytes, self.nbytes)
        first, before = divmod(start, self.dtype.itemsize)
        count, behind = divmod(nbytes, self.dtype.itemsize)
        if before or behind:
            raise ValueError(
                f"[{start}, {start + nbytes}) cuts an element of {self.dtype.itemsize} bytes"
            )
        return Strided(
            self.storage, self.dtype, self.axes, self.first + first, count, self.conj, self.neg
        )

    def chunks(self) -> Iterator[memoryview]:
        return rechunked(self.pieces(), self.nbytes)

    def pieces(self) -> Iterator[memoryview]:
        """The same bytes in pieces of any length, for those who may cut elements; each is valid
        until the next.
        """
        memory = memory_of(min(_SLAB, self.nbytes))
        for box in self._boxes():
            for slab in _slabs(box):
                content = memory[: slab.nbytes]
                _copy(content.view(slab.dtype).reshape(slab.shape), slab)
                self._change_signs(content)
                yield content.data

    def _boxes(self) -> Iterator[Array]:
        """The elements in order, as arrays with strides; each is valid until the next."""
        itemsize = self.dtype.itemsize
        cut = _best_cut(self.axes, itemsize)
        at, stop = self.first, self.first + self.count
        with reading(self.storage) as read:
            staging = Staging(itemsize, read)
            while at < stop:
                box = _box(self.axes, cut, at, stop)
                yield staging.gather(_offset(self.axes, at), box)
                at += count_of(box)

    def _change_signs(self, content: Array) -> None:
        """Of integers, as two's complement does; of floats the bit alone, also of zeros and NaNs,
        as torch does.
        """
        if self.neg and self.dtype.kind == "int":
            integers = content.view(f"i{self.dtype.itemsize}")
            integers *= -1
            return
        words = content.view(f"u{self.dtype.word}")
        sign = words.dtype.type(1 << (8 * self.dtype.word - 1))
        if self.neg:
            words ^= sign
        if self.conj:
            words[1::2] ^= sign


def _span(storage: Payload, dtype: DType, offset: int, count: int) -> Payload:
    """*count* elements of *storage* from *offset* on."""
    start, nbytes = offset * dtype.itemsize, count * dtype.itemsize
    if start < 0 or start + nbytes > storage.nbytes:
        raise ValueError(
            f"the view needs {nbytes} bytes from byte {start} of its storage, which has "
            f"{storage.nbytes}"
        )
    return storage if nbytes == storage.nbytes else storage.narrow(start, nbytes)


def _joined(shape: Sequence[int], strides: Sequence[int]) -> tuple[Axis, ...]:
    """The axes, without those of length one, and neighbours joined wherever one continues the
    other.
    """
    axes: list[Axis] = []
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            axes[-1] = (axes[-1][0] * length, stride)
        else:
            axes.append((length, stride))
    return tuple(axes) or ((1, 1),)


def _gathered(
    storage: Payload, dtype: DType, offset: int, axes: tuple[Axis, ...], conj: bool, neg: bool
) -> Strided:
    if len(axes) > _MOST_AXES:
        raise ValueError(
            f"the view has {len(axes)} axes, none of which continues another; at most "
            f"{_MOST_AXES} can be read"
        )
    if conj and dtype.kind != "complex":
        raise ValueError(
            f"the view is marked as conjugate, and its type is {dtype.code}, which is not complex"
        )
    if neg and not _has_negatives(dtype):
        raise ValueError(
            f"the view is marked as negative, and its type is {dtype.code}, which cannot be negated"
        )
    span, count = _span(storage, dtype, offset, reach_of(axes)), count_of(axes)
    if count * dtype.itemsize >= _MOST:
        raise ValueError(f"the view has {shown(count)} elements, which is larger than any memory")
    return Strided(span, dtype, axes, 0, count, conj, neg)


def _has_negatives(dtype: DType) -> bool:
    # Floats of 8 bits and less may have no sign bit, or a NaN where -0 would be; torch negates none
    # of them.
    return dtype.kind != "bool" and (dtype.kind == "int" or dtype.bits > 8)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Boxes are at most *step* indices of the axis number *axis*, and all of the axes inside it."""

    axis: int
    step: int


def _best_cut(axes: tuple[Axis, ...], itemsize: int) -> _Cut:
    """The cut that reads least for an element of the output; of equals, the one with the largest
    boxes.
    """
    if reach_of(axes) * itemsize <= _SLAB:
        return _Cut(0, axes[0][0])  # so little that to think about it takes longer

    def price(cut: _Cut) -> float:
        box = ((cut.step, axes[cut.axis][1]), *axes[cut.axis + 1 :])
        return price_of(box, itemsize) / count_of(box)

    return min(_cuts(axes), key=price)


def _cuts(axes: tuple[Axis, ...]) -> Iterator[_Cut]:
    """For every axis its length and the halves of it, down to a box of one element."""
    for axis, (length, _) in enumerate(axes):
        step = length
        while step:
            yield _Cut(axis, step)
            step //= 2


def _box(axes: tuple[Axis, ...], cut: _Cut, at: int, stop: int) -> tuple[Axis, ...]:
    """The largest box that begins with element number *at*, ends by *stop* and is within the
    *cut*.
    """
    axis, inside = cut.axis, count_of(axes[cut.axis + 1 :])
    while at % inside or stop - at < inside:
        axis += 1
        inside //= axes[axis][0]
    length, stride = axes[axis]
    steps = min(
        length - at // inside % length,
        (stop - at) // inside,
        cut.step if axis == cut.axis else length,
    )
    return ((steps, stride), *axes[axis + 1 :])


def _offset(axes: tuple[Axis, ...], at: int) -> int:
    """Where in the storage the element is that has number *at* in the view."""
    offset = 0
    for length, stride in reversed(axes):
        at, index = divmod(at, length)
        offset += index * stride
    return offset


def _slabs(array: Array) -> Iterator[Array]:
    """*array* in order, in pieces of at most `_SLAB` bytes."""
    if array.nbytes <= _SLAB:
        yield array
        return
    rows = _SLAB // (array.nbytes // len(array))
    if rows:
        yield from (array[i : i + rows] for i in range(0, len(array), rows))
    else:
        for row in array:
            yield from _slabs(row)


def _copy(target: Array, slab: Array) -> None:
    """Copy *slab* into the contiguous *target*, by way of blocks that are contiguous in the
    storage.
    """
    moving = [
        (stride, -axis)
        for axis, stride in enumerate(slab.strides)
        if stride and slab.shape[axis] > 1
    ]
    near = -min(moving, default=(0, 1 - slab.ndim))[1]
    if near == slab.ndim - 1:
        target[...] = slab
        return
    length = slab.shape[-1]
    width = max(_LINE, _TURNED * length // slab.nbytes)
    for at in range(0, length, width):
        block = slab[..., at : at + width].swapaxes(near, -1)
        target[..., at : at + width] = block.copy().swapaxes(near, -1)
