"""Element types: the codes of safetensors, the names of torch, and how many bits an element takes.

Codes are those of the safetensors format (safetensors/src/tensor.rs, `Dtype`). A few types of torch
have no code there: they can be inspected and compared, never written, and `DType.writable` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from shardkit.errors import BadDType
from shardkit.printable import shown

Kind = Literal["bool", "int", "float", "complex"]
"""What the elements of a type are."""


@dataclass(frozen=True, slots=True)
class DType:
    """The element type of a tensor.

    Codes and sizes are those of the safetensors format.

    Attributes:
        code: the code of safetensors ("BF16"), or one in the same style where it has none ("C128").
        bits: width of one element in bits; below 8, elements are packed.
        kind: "bool", "int", "float" or "complex".
        torch: name of the attribute of `torch` ("bfloat16"); None where torch has no such type.
        word: bytes that are reversed together when the byte order changes (a complex number is two
            words).
        writable: whether the safetensors format has the type.
        itemsize: bytes of one element, and so its natural alignment; 1 for packed types.
        packed: how many elements of this type torch counts as one (2 for `float4_e2m1fn_x2`).

    Example:
        >>> from shardkit.plugin import BY_CODE, BY_TORCH
        >>> bf16 = BY_TORCH["bfloat16"]
        >>> bf16.code, bf16.itemsize, bf16.nbytes((4096, 4096))
        ('BF16', 2, 33554432)
        >>> BY_CODE["F4"].nbytes((3, 2))
        3
    """

    code: str
    bits: int
    kind: Kind
    torch: str | None
    word: int
    writable: bool = True
    itemsize: int = field(init=False, compare=False, repr=False)
    packed: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", max(1, self.bits // 8))
        object.__setattr__(self, "packed", 2 if self.code == "F4" else 1)

    def __hash__(self) -> int:
        return hash(self.code)  # which tells them apart, at a fifth of the price of all fields

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the size in bytes of a dense tensor of *shape*.

        Args:
            shape: lengths of the axes, in elements; () for a scalar.

        Raises:
            ValueError: packed elements do not fill whole bytes.
        """
        bits = prod(shape) * self.bits
        if bits % 8:
            raise ValueError(
                f"{self.code} {list(shape)} is {bits} bits, which is not a whole number of bytes"
            )
        return bits // 8


def _dtype(
    code: str, bits: int, kind: Kind, torch: str | None, *, word: int = 0, writable: bool = True
) -> DType:
    return DType(code, bits, kind, torch, word or max(1, bits // 8), writable)


# In the order of safetensors' own enum: its writer sorts by it, descending, so that wide types come
# first.
DTYPES: tuple[DType, ...] = (
    _dtype("BOOL", 8, "bool", "bool"),
    _dtype("F4", 4, "float", "float4_e2m1fn_x2"),
    _dtype("F6_E2M3", 6, "float", None),
    _dtype("F6_E3M2", 6, "float", None),
    _dtype("U8", 8, "int", "uint8"),
    _dtype("I8", 8, "int", "int8"),
    _dtype("F8_E5M2", 8, "float", "float8_e5m2"),
    _dtype("F8_E4M3", 8, "float", "float8_e4m3fn"),
    _dtype("F8_E8M0", 8, "float", "float8_e8m0fnu"),
    _dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
    _dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
    _dtype("I16", 16, "int", "int16"),
    _dtype("U16", 16, "int", "uint16"),
    _dtype("F16", 16, "float", "float16"),
    _dtype("BF16", 16, "float", "bfloat16"),
    _dtype("I32", 32, "int", "int32"),
    _dtype("U32", 32, "int", "uint32"),
    _dtype("F32", 32, "float", "float32"),
    _dtype("C64", 64, "complex", "complex64", word=4),
    _dtype("F64", 64, "float", "float64"),
    _dtype("I64", 64, "int", "int64"),
    _dtype("U64", 64, "int", "uint64"),
    _dtype("C32", 32, "complex", "complex32", word=2, writable=False),
    _dtype("C128", 128, "complex", "complex128", word=8, writable=False),
)

BY_CODE: dict[str, DType] = {dtype.code: dtype for dtype in DTYPES}
BY_TORCH: dict[str, DType] = {dtype.torch: dtype for dtype in DTYPES if dtype.torch}
U8 = BY_CODE["U8"]

_SHORT = {
    "half": "F16",
    "float": "F32",
    "double": "F64",
    "fp16": "F16",
    "fp32": "F32",
    "fp64": "F64",
}
_SHORT |= {"fp8": "F8_E4M3", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}


def parse_dtype(name: str) -> DType:
    """The floating-point type that people call *name*: "bf16", "bfloat16", "BF16",
    "torch.bfloat16".

    Raises:
        BadDType: it is none.
    """
    word = name.lower().removeprefix("torch.")
    dtype = BY_TORCH.get(word) or BY_CODE.get(_SHORT.get(word, word.upper()))
    if dtype is None or dtype.kind != "float" or not dtype.writable:
        raise BadDType(
            f"{shown(name)} is not a floating-point type",
            hint='use a name such as "bf16", "fp16", "fp32" or "float8_e4m3fn"',
        )
    return dtype
