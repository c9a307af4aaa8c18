"""NumPy arrays in pickles, taken apart without NumPy: their type, their shape and where their bytes
are.

1. `_reconstruct` makes an empty array, which then gets its state; `_frombuffer` (protocol 5) makes
   a complete one. Both are in `numpy.core`, and since NumPy 2 in `numpy._core`.
2. The bytes are in the pickle: `pickle_strings` makes payloads of them.
3. Arrays of numbers are tensors. Scalars, random-number generators and arrays of text, dates and
   objects are not. Records, masked arrays and numbers without a type here (float128) cannot become
   tensors: they are `NonDense`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from shardkit.alignment import ceil_div
from shardkit.checkpoint.entries import OtherKind
from shardkit.dtypes import BY_CODE, BY_TORCH, DType
from shardkit.payloads.payload import Payload, Swapped
from shardkit.payloads.strided import strided
from shardkit.pickles.objects import Global, LongString, Opaque
from shardkit.pickles.torch_tensors import TENSORS, NonDense
from shardkit.printable import shown

_MOST_AXES = 64  # as NumPy 2 has it (NPY_MAXDIMS); torch has as many
_MOST = 1 << 63  # of anything that is counted


class Array(Opaque):
    """An array as the pickle makes it: what it was made of, and the state that it was given."""

    __slots__ = ()

    @property
    def is_numeric(self) -> bool:
        """Whether it holds numbers, and not text, dates or objects."""
        return _letters(self._type) not in _NO_NUMBERS

    @property
    def elements(self) -> list[object]:
        """The objects in an array of objects; empty for any other."""
        match self.states:
            case [(*_, list(elements))] if not self.is_numeric:
                return elements
        return []

    @property
    def nbytes(self) -> int:
        """Bytes of its values; 0 where they cannot be told."""
        try:
            return numbers_of(self).nbytes
        except ValueError:
            return 0

    @property
    def description(self) -> str:
        """What it is, for a person."""
        fields = _fields(self)
        return (
            f"NumPy array, {_type_name(self._type)} "
            f"{_shown_shape(fields.shape if fields else None)}"
        ).rstrip()

    @property
    def _type(self) -> object:
        fields = _fields(self)
        return fields.type if fields else None


@dataclass(frozen=True, slots=True)
class Numbers:
    """A dense array, whose bytes are in the pickle.

    Attributes:
        dtype: type of the elements.
        shape: lengths of the axes.
        content: the bytes, or where they are.
        is_fortran: whether the first axis runs fastest.
        is_big_endian: whether the bytes of each word are reversed.
    """

    dtype: DType
    shape: tuple[int, ...]
    content: bytes | LongString
    is_fortran: bool = False
    is_big_endian: bool = False

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    def payload(self, stored: Payload) -> Payload:
        """The values, C-contiguous and little-endian, made of the bytes that *content* means."""
        if self.is_big_endian and self.dtype.word > 1:
            stored = Swapped(stored, self.dtype.word)
        if not self.is_fortran:
            return stored
        strides = list(accumulate(self.shape[:-1], mul, initial=1))
        return strided(stored, dtype=self.dtype, offset=0, shape=self.shape, strides=strides)


def is_tensor(value: object) -> bool:
    """Whether *value* is one tensor of any kind; an array of numbers is one."""
    return isinstance(value, TENSORS) or (type(value) is Array and value.is_numeric)


def dtype_of(array: Array) -> DType | None:
    """The type of the elements; None where no tensor has it."""
    return _dtype(array._type)


def numbers_of(array: Array) -> Numbers | NonDense:
    """What the *array* of numbers holds.

    Raises:
        ValueError: it lies about itself, or what it says of itself is incomplete.
    """
    fields = _fields(array)
    if fields is None:
        return NonDense(
            OtherKind.UNKNOWN_TENSOR,
            0,
            f"{array.description} of the class {_class(array)}, whose state is unknown",
        )
    dtype = _dtype(fields.type)
    if dtype is None or array.name == _MASKED:
        what = f"masked {array.description}" if array.name == _MASKED else array.description
        return NonDense(OtherKind.UNKNOWN_TENSOR, _held(fields.content), what)
    shape, content = _shape(fields.shape), _content(fields.content)
    _check_length(content, dtype.nbytes(shape), f"{dtype.code} {_shown_shape(shape)}")
    is_fortran = fields.is_fortran and len(shape) > 1
    return Numbers(dtype, shape, content, is_fortran, _order(fields.type) == ">")


@dataclass(frozen=True, slots=True, eq=False)
class _Fields:
    shape: object
    type: object
    is_fortran: bool
    content: object


def _fields(array: Array) -> _Fields | None:
    """What NumPy's `__setstate__` or `_frombuffer` would be given; None if it is something else."""
    match array.name, array.args, array.states:
        case str(name), (content, kind, shape, "C" | "F" as order), [] if name == _FROM_BUFFER:
            return _Fields(shape, kind, order == "F", content)
        case str(name), _, [(int(), shape, kind, is_fortran, content, *more)] if (
            name != _FROM_BUFFER
        ):
            if isinstance(is_fortran, int) and bool(more) == (name == _MASKED):
                return _Fields(shape, kind, bool(is_fortran), content)
    return None


def _shape(shape: object) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > _MOST_AXES:
        most = f"and must be a tuple of at most {_MOST_AXES} lengths"
        raise ValueError(f"the shape of an array is {shown(shape)}, {most}")
    for length in shape:
        if type(length) is not int or not 0 <= length < _MOST:
            limits = "NumPy counts from 0 to 2⁶³ - 1"
            raise ValueError(f"an axis of an array has the length {shown(length)}, and {limits}")
    return shape


def _content(content: object) -> bytes | LongString:
    match content:
        case bytes() | LongString():
            return content
        case str():  # what Python 2 wrote as a str of bytes, and happens to be text
            return content.encode("utf-8", "surrogateescape")
    raise ValueError(f"the values of an array are {shown(content)}, and must be bytes")


def _shown_shape(shape: object) -> str:
    """A *shape* of at most eight lengths as text; no text for any other."""
    if type(shape) is not tuple or len(shape) > 8:
        return ""
    return f"[{', '.join(map(shown, shape))}]"


def _held(content: object) -> int:
    """How many bytes of the pickle *content* takes."""
    if isinstance(content, bytes):
        return len(content)
    return content.nbytes if isinstance(content, LongString) else 0


def _check_length(content: bytes | LongString, need: int, what: str) -> None:
    if isinstance(content, bytes):
        least = most = len(content)
    else:  # a character of Latin-1 text takes one byte or two; how many each, only reading tells
        least, most = (
            ceil_div(content.nbytes, 2) if content.is_latin1 else content.nbytes,
            content.nbytes,
        )
    if not least <= need <= most:
        raise ValueError(f"{what} needs {shown(need)} bytes, and the pickle has {most:,}")


def _dtype(kind: object) -> DType | None:
    """The type that a pickled numpy.dtype means; None for what no tensor has."""
    match kind:
        case Opaque(name="numpy.dtype", args=(Global(name=name), *_)) if name.startswith(
            "ml_dtypes."
        ):
            dtype = BY_TORCH.get(name.removeprefix("ml_dtypes."))
            return dtype if dtype and dtype.packed == 1 else None
        case Opaque(name="numpy.dtype", args=(str(code), *_)):
            return BY_CODE.get(_CODES.get(code.lstrip("<>=|"), ""))
    return None


def _order(kind: object) -> str:
    """The byte order that a pickled numpy.dtype says: ``"<"``, ``">"``, ``"="`` or ``"|"``."""
    match kind:
        case Opaque(states=[(int(), str(order), *_)]):
            return order
        case Opaque(args=(str(code), *_)):
            return code[:1]
    return ""


def _letters(kind: object) -> str:
    """The letter of a pickled numpy.dtype that says what its elements are; empty if it has none."""
    match kind:
        case Opaque(name="numpy.dtype", args=(str(code), *_)):
            return code.lstrip("<>=|")[:1]
    return ""


def _type_name(kind: object) -> str:
    match kind:
        case Opaque(name="numpy.dtype", args=(str(code), *_)):
            return code[:16]
        case Opaque(name="numpy.dtype", args=(Global(name=name), *_)):
            return name
    return "of an unknown type"


def _class(array: Array) -> str:
    match array.args:
        case (Global(name=name), *_):
            return name
    return array.name


def _made(name: str) -> Callable[[tuple[object, ...]], Array]:
    return lambda args: Array(name, args)


def _random(args: tuple[object, ...]) -> Global:
    # A Global takes no state, so that nothing in the state of the generator is taken for a weight.
    return Global("a NumPy random-number generator")


def _opaque(name: str) -> Callable[[tuple[object, ...]], Opaque]:
    return lambda args: Opaque(name, args)


_FROM_BUFFER = "numpy.core.numeric._frombuffer"
_MASKED = "numpy.ma.core._mareconstruct"
_NO_NUMBERS = frozenset("OSUMma")
_CODES = {"b1": "BOOL", "?": "BOOL", "c8": "C64", "c16": "C128"}
_CODES |= {f"i{bits // 8}": f"I{bits}" for bits in (8, 16, 32, 64)}
_CODES |= {f"u{bits // 8}": f"U{bits}" for bits in (8, 16, 32, 64)}
_CODES |= {f"f{bits // 8}": f"F{bits}" for bits in (16, 32, 64)}

RENAMED = {f"numpy._core.{module}": f"numpy.core.{module}" for module in ("multiarray", "numeric")}
BUILDERS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "numpy.core.multiarray._reconstruct": _made("numpy.core.multiarray._reconstruct"),
    _FROM_BUFFER: _made(_FROM_BUFFER),
    _MASKED: _made(_MASKED),
    "numpy.core.multiarray.scalar": _opaque("a NumPy scalar"),
    "numpy.dtype": _opaque("numpy.dtype"),
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _random,
    "numpy.random._pickle.__bit_generator_ctor": _random,
    "numpy.random._pickle.__generator_ctor": _random,
    "numpy.random._pickle.__randomstate_ctor": _random,
}
