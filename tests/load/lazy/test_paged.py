"""A Paged is its tensor: the same shapes, strides and values, whatever is done with it, and no byte
read before it is used.
"""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE, BY_TORCH, DTYPES, DType
from shardkit.errors import FormatError, LoadError
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.paged import Paged
from shardkit.payloads.payload import Extent, Literal, Payload, check_range, read_all
from shardkit.testing import check_payload

TYPES = [dtype for dtype in DTYPES if dtype.torch and hasattr(torch, dtype.torch)]


@dataclass(frozen=True, slots=True)
class Poisoned:
    """Bytes that nobody may read."""

    nbytes: int

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Poisoned:
        check_range(start, nbytes, self.nbytes)
        return Poisoned(nbytes)

    def chunks(self) -> Iterator[memoryview]:
        raise AssertionError("a weight was read")


def stored(dtype: torch.dtype) -> DType:
    return BY_TORCH[str(dtype).removeprefix("torch.")]


def raw(tensor: torch.Tensor) -> bytes:
    """The values of a real tensor in C order."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def address(tensor: torch.Tensor, payload: Payload | None = None) -> Paged:
    """A Paged with the values of *tensor*, or of *payload*."""
    dtype = stored(tensor.dtype)
    shape = (*tensor.shape[:-1], tensor.shape[-1] * dtype.packed) if tensor.ndim else ()
    return Paged.of(TensorEntry(("w",), dtype, shape, payload or Literal(raw(tensor))))


def poisoned(tensor: torch.Tensor) -> Paged:
    return address(tensor, Poisoned(tensor.numel() * tensor.element_size()))


def values(paged: torch.Tensor) -> torch.Tensor:
    assert isinstance(paged, Paged)
    return paged.read()


def recipe(paged: torch.Tensor) -> Recipe:
    assert isinstance(paged, Paged)
    return paged.recipe


def same(paged: object, tensor: torch.Tensor) -> bool:
    """Whether *paged* is *tensor* in every respect, and reads as it."""
    assert type(paged) is Paged, "it was read"
    assert (paged.shape, paged.dtype, paged.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert paged.stride() == tensor.stride()
    return raw(paged.read()) == raw(tensor) == read_all(paged.payload)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


# What records, as anybody would write it.

RECORDED: dict[str, Callable[[torch.Tensor], object]] = {
    "to a type": lambda t: t.to(torch.bfloat16),
    "half": lambda t: t.half(),
    "to its own type": lambda t: t.to(torch.float32),
    "to a type and back": lambda t: t.to(torch.float16).to(torch.float32),
    "to fp8": lambda t: t.to(torch.float8_e4m3fn),
    "to its device": lambda t: t.to("cpu"),
    "to a device and a type": lambda t: t.to(device="cpu", dtype=torch.float64),
    "to a copy that is turned": lambda t: t.transpose(0, 1).to(torch.float16),
    "to a copy of a window": lambda t: t[:, 1:3].to(torch.float16),
    "type_as": lambda t: t.type_as(torch.empty(0, dtype=torch.bfloat16)),
    "cpu": lambda t: t.cpu(),
    "stack": lambda t: torch.stack([t, t]),
    "stack inside": lambda t: torch.stack([t, t], 2),
    "stack last": lambda t: torch.stack([t, t, t], -1),
    "cat": lambda t: torch.cat([t, t]),
    "cat inside": lambda t: torch.cat([t, t], dim=1),
    "cat of windows": lambda t: torch.cat([t[:, :1], t[:, 3:]], dim=1),
    "cat of turned": lambda t: torch.cat([t.transpose(0, 1), t.transpose(0, 1)], dim=-1),
    "cat of channels last": lambda t: torch.cat(
        [t[None].contiguous(memory_format=torch.channels_last)] * 2, 1
    ),
    "cat with nothing": lambda t: torch.cat([t, t[:0]]),
    "hstack": lambda t: torch.hstack([t, t]),
    "transpose": lambda t: t.transpose(0, 2),
    "mT": lambda t: t.mT,
    "t": lambda t: t[0].t(),
    "T": lambda t: t[0].T,
    "permute": lambda t: t.permute(2, 0, 1),
    "movedim": lambda t: t.movedim(0, -1),
    "view": lambda t: t.view(4, -1),
    "view of words": lambda t: t.view(torch.int16),
    "view of wider words": lambda t: t.view(torch.float64),
    "reshape": lambda t: t.reshape(-1),
    "reshape that copies": lambda t: t.transpose(0, 1).reshape(4, -1),
    "flatten": lambda t: t.flatten(1),
    "unflatten": lambda t: torch.unflatten(t, 2, (2, -1)),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "squeeze": lambda t: t.unsqueeze(1).squeeze(1),
    "squeeze all": lambda t: t[:1].squeeze(),
    "one row": lambda t: t[1],
    "one element": lambda t: t[1, 2, 3],
    "rows": lambda t: t[1:],
    "columns": lambda t: t[..., 1:3],
    "every second": lambda t: t[:, ::2],
    "ellipsis": lambda t: t[...],
    "none": lambda t: t[None, :, None],
    "select": lambda t: t.select(1, -1),
    "narrow": lambda t: t.narrow(2, 1, 2),
    "split": lambda t: torch.split(t, 2, dim=1)[1],
    "split by sizes": lambda t: torch.split(t, [1, 3], dim=1)[1],
    "chunk": lambda t: torch.chunk(t, 2, dim=2)[1],
    "chunk contiguous": lambda t: torch.chunk(t, 2, dim=2)[1].contiguous(),
    "tensor_split": lambda t: torch.tensor_split(t, 3, dim=1)[2],
    "unbind": lambda t: t.unbind(1)[2],
    "iteration": lambda t: list(t)[1],
    "expand": lambda t: t[:, :1].expand(3, 5, 6),
    "broadcast_to": lambda t: t[0].broadcast_to(2, 4, 6),
    "diagonal": lambda t: t.diagonal(dim1=1, dim2=2),
    "unfold": lambda t: t.unfold(2, 3, 1),
    "as_strided": lambda t: t.as_strided((3, 4), (6, 2), 5),
    "contiguous": lambda t: t.contiguous(),
    "contiguous of a window": lambda t: t[:, 1:3].contiguous(),
    "channels last": lambda t: t[None].contiguous(memory_format=torch.channels_last),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "pad by nothing": lambda t: F.pad(t, (0, 0)),
    "rotary order": lambda t: t.view(3, 2, 2, 6).transpose(1, 2).reshape(3, 4, 6),
    "a window of a window, turned and cast": lambda t: (
        t[1:, ::2].permute(2, 1, 0)[1:4].to(torch.bfloat16)[:, 1].contiguous()
    ),
}


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("name", RECORDED)
def test_what_only_moves_elements_is_recorded(name: str, mode: Callable[[], torch.no_grad]) -> None:
    weight = random((3, 4, 6))
    with mode():
        assert type(RECORDED[name](poisoned(weight))) is Paged
        found, expected = RECORDED[name](address(weight)), RECORDED[name](weight)
    assert isinstance(expected, torch.Tensor)
    assert type(found) is Paged
    if torch.empty_like(expected).stride() == expected.stride():
        assert found.read().stride() == expected.stride()
    assert same(found, expected)


COPIED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": lambda t: t.clone(),
    "clone by torch": torch.clone,
    "clone of turned": lambda t: t.transpose(0, 1).clone(),
    "clone made contiguous": lambda t: t.transpose(0, 1).clone(
        memory_format=torch.contiguous_format
    ),
    "clone of a cast": lambda t: t.half().clone(),
    "clone of joined windows": lambda t: torch.cat([t[:, :1], t[:, 3:]], dim=1).clone(),
    "clone of data": lambda t: t.data.clone(),
    "to a copy": lambda t: t.to(torch.float32, copy=True),
    "to a copy by position": lambda t: t.to(torch.float32, False, True),
    "to a copy on its device": lambda t: t.to("cpu", copy=True),
    "to a copy on its device by position": lambda t: t.to("cpu", torch.float64, False, True),
    "to a copy like another": lambda t: t.to(torch.empty(0, dtype=torch.float16), copy=True),
    "to a copy of another type": lambda t: t.to(torch.bfloat16, copy=True),
    "to a copy in an order": lambda t: t[None].to(copy=True, memory_format=torch.channels_last),
    "torch.tensor": torch.tensor,
    "asarray": lambda t: torch.asarray(t, copy=True),
    "deep copy": copy.deepcopy,
    "deep copy in a list": lambda t: copy.deepcopy([t[1:], t])[1],
    "deep copy in a dict": lambda t: copy.deepcopy({"weight": t})["weight"],
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("name", COPIED)
def test_a_copy_is_an_ordinary_tensor_that_can_be_written(
    name: str, mode: Callable[[], torch.no_grad]
) -> None:
    weight = random((3, 4, 6))
    with mode():
        lazy = address(weight)
        found, expected = COPIED[name](lazy), COPIED[name](weight)
    assert type(found) is torch.Tensor
    assert (found.dtype, found.device, found.stride()) == (
        expected.dtype,
        expected.device,
        expected.stride(),
    )
    assert raw(found) == raw(expected)
    found.zero_()
    assert torch.equal(lazy, weight)


def test_a_gradient_flows_through_a_copy() -> None:
    for make in (
        torch.clone,
        lambda t: t.to(torch.float64, copy=True),
        lambda t: t.clone(memory_format=torch.contiguous_format),
    ):
        parameter = nn.Parameter(address(random((4, 6))))
        torch.autograd.backward(make(parameter).sum())
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones(4, 6))


STEPS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "transpose": lambda t, a, b: t.transpose(a % t.ndim, b % t.ndim),
    "slice": lambda t, a, b: t.narrow(a % t.ndim, 0, max(1, t.shape[a % t.ndim] - b % 2)),
    "step": lambda t, a, b: t[(slice(None),) * (a % t.ndim) + (slice(None, None, 1 + b % 2),)],
    "unsqueeze": lambda t, a, b: t.unsqueeze(a % (t.ndim + 1)),
    "flatten": lambda t, a, b: t.flatten(a % t.ndim),
    "contiguous": lambda t, a, b: t.contiguous(),
    "cast": lambda t, a, b: t.to([torch.float16, torch.bfloat16, torch.float32][a % 3]),
    "cat": lambda t, a, b: torch.cat([t, t], a % t.ndim),
    "stack": lambda t, a, b: torch.stack([t, t], a % (t.ndim + 1)),
    "chunk": lambda t, a, b: t.chunk(2, a % t.ndim)[-1],
    "expand": lambda t, a, b: t.unsqueeze(0).expand(1 + b % 2, *t.shape),
}
STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 7), st.integers(0, 7))


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=6))
def test_any_row_of_steps_gives_what_torch_gives_and_reads_nothing(
    steps: list[tuple[str, int, int]],
) -> None:
    weight = random((2, 3, 4))
    tensors = [weight, address(weight), poisoned(weight)]
    for name, a, b in steps:
        if tensors[0].numel() > 2_000 or tensors[0].ndim > 5:
            break
        tensors = [STEPS[name](tensor, a, b) for tensor in tensors]
    expected, found, unread = tensors
    assert type(unread) is Paged
    assert same(found, expected)


# What computes.

COMPUTED: dict[str, Callable[[torch.Tensor], object]] = {
    "linear": lambda t: F.linear(torch.ones(5, 6), t),
    "linear with a bias": lambda t: F.linear(torch.ones(5, 6), t, t[:, 0]),
    "linear of batches": lambda t: F.linear(torch.ones(2, 5, 6), t, t[:, 0]),
    "matmul": lambda t: t @ t.T,
    "matmul with itself turned": lambda t: t.t() @ t,
    "addmm": lambda t: torch.addmm(t, t, torch.ones(6, 6)),
    "einsum": lambda t: torch.einsum("ij,kj->ik", t, t),
    "embedding": lambda t: F.embedding(torch.tensor([3, 0, 1]), t),
    "layer norm": lambda t: F.layer_norm(torch.ones(2, 6), (6,), t[0], t[1]),
    "rms norm": lambda t: F.rms_norm(torch.ones(2, 6), (6,), t[0]),
    "batch norm": lambda t: F.batch_norm(torch.ones(2, 6), t[0], t[1].abs(), t[2]),
    "convolution": lambda t: F.conv1d(torch.ones(1, 3, 9), t.view(4, 3, 2)),
    "attention": lambda t: F.scaled_dot_product_attention(t[None], t[None], t[None]),
    "sum": lambda t: t.sum(0),
    "comparison": lambda t: t > 0,
    "equality": lambda t: t == t,
    "any": lambda t: (t > 0).any(),
    "arithmetic": lambda t: 2 * t + t / 3 - 1,
    "with another": lambda t: torch.ones(4, 6) * t,
    "into another": lambda t: torch.zeros(4, 6).add_(t),
    "mixed cat": lambda t: torch.cat([t, torch.ones(1, 6)]),
    "complex": lambda t: torch.complex(t, t).conj(),
    "indexing": lambda t: t[torch.tensor([1, 1, 3])],
    "masking": lambda t: t[t > 0],
    "where": lambda t: torch.where(t > 0, t, -t),
    "sorting": lambda t: t.sort(1).values,
    "repeat": lambda t: t.repeat(2, 1),
    "flip": lambda t: t.flip(0),
    "pad": lambda t: F.pad(t, (1, 1)),
    "lists": lambda t: torch._foreach_add([t, t], 1)[1],
    "quantile": lambda t: t.quantile(0.3),
}


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("name", COMPUTED)
def test_what_computes_reads_and_gives_what_the_tensor_gives(
    name: str, mode: Callable[[], torch.no_grad]
) -> None:
    weight = random((4, 6))
    with mode():
        found, expected = COMPUTED[name](address(weight)), COMPUTED[name](weight)
        assert isinstance(found, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        assert type(found) is torch.Tensor
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert raw(found.resolve_conj()) == raw(expected.resolve_conj())


COMPLEX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "conj": lambda t: t.conj(),
    "mH": lambda t: t.mH,
    "imag": lambda t: t.imag,
    "as pairs": torch.view_as_real,
    "negative view": torch._neg_view,
    "conj made contiguous": lambda t: t.conj().contiguous(),
    "cat with its conj": lambda t: torch.cat([t, t.conj()]),
    "product": lambda t: t.mH @ t,
}


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_weights_are_conjugated_and_taken_apart(
    name: str, mode: Callable[[], torch.no_grad]
) -> None:
    weight = torch.complex(random((3, 4)), random((3, 4)).flip(0))
    with mode():
        found, expected = COMPLEX[name](address(weight)), COMPLEX[name](weight)
        found = found.read() if isinstance(found, Paged) else found
        assert raw(found.resolve_conj().resolve_neg()) == raw(expected.resolve_conj().resolve_neg())


def test_large_products_with_turned_weights_are_bit_equal() -> None:
    weight, x = random((300, 257)), random((64, 300))
    assert torch.equal(x @ address(weight), x @ weight)
    assert torch.equal(x[:, :257] @ address(weight).t(), x[:, :257] @ weight.t())
    assert torch.equal(F.linear(x[:, :257], address(weight)), F.linear(x[:, :257], weight))


def test_an_argument_that_comes_twice_is_read_once() -> None:
    reads: list[int] = []
    paged = address(random((4, 4)), Counting(raw(random((4, 4))), reads))
    _ = paged * paged
    assert reads == [64]


@dataclass(frozen=True)
class Counting:
    """Bytes that tell how many of them were read."""

    content: bytes
    reads: list[int]

    @property
    def nbytes(self) -> int:
        return len(self.content)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Counting:
        check_range(start, nbytes, self.nbytes)
        return Counting(self.content[start : start + nbytes], self.reads)

    def chunks(self) -> Iterator[memoryview]:
        self.reads.append(self.nbytes)
        yield memoryview(self.content)


def test_a_slice_reads_only_what_it_needs() -> None:
    reads: list[int] = []
    weight = random((100, 8))
    paged = address(weight, Counting(raw(weight), reads))
    assert torch.equal(paged[20:23] + 0, weight[20:23])
    assert reads == [96]
    assert paged[7, 3].item() == weight[7, 3].item()
    assert reads == [96, 4]


QUESTIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "shape": lambda t: (t.shape, t.size(0), t.numel(), t.ndim, t.nbytes, t.element_size(), len(t)),
    "strides": lambda t: (
        t.stride(),
        t.storage_offset(),
        t.is_contiguous(),
        t.is_contiguous(memory_format=torch.channels_last),
    ),
    "type": lambda t: (
        t.dtype,
        t.device,
        t.layout,
        t.is_floating_point(),
        t.is_complex(),
        t.is_signed(),
        t.is_cuda,
        t.is_meta,
    ),
    "gradient": lambda t: (t.requires_grad, t.is_leaf, t.grad, t.grad_fn),
    "bits": lambda t: (t.is_conj(), t.is_neg(), t.is_sparse, t.is_quantized, t.is_pinned()),
    "like": lambda t: (
        torch.empty_like(t).stride(),
        torch.zeros_like(t).sum(),
        torch.ones_like(t, dtype=torch.int8).dtype,
    ),
    "like, elsewhere": lambda t: torch.empty_like(t, device="meta").device,
    "new": lambda t: (
        t.new_zeros(3).dtype,
        t.new_empty(2, device="meta").device,
        t.new_full((2,), 5).sum(),
    ),
    "random like": lambda t: (torch.rand_like(t).shape, torch.randn_like(t).dtype),
    "meta": lambda t: (t.to("meta").device, t.to("meta").shape, type(t.to("meta"))),
    "compatible": lambda t: torch._has_compatible_shallow_copy_type(t, t),
}


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_answered_without_reading(
    name: str, mode: Callable[[], torch.no_grad]
) -> None:
    with mode():
        assert QUESTIONS[name](poisoned(random((2, 3)))) == QUESTIONS[name](random((2, 3)).clone())


def test_printing_and_comparing_identity_read_nothing(tmp_path: Path) -> None:
    paged = Paged.of(
        TensorEntry(("w",), BY_CODE["BF16"], (4, 2), Extent(tmp_path / "w.bin", 0, 16))
    )
    assert (
        repr(paged)
        == f"{paged}"
        == f"Paged(torch.bfloat16, [4, 2], device='cpu', 16 B of {tmp_path / 'w.bin'}, not read)"
    )
    assert "Literal" not in repr(address(random((2,))))
    assert len({paged, paged}) == 1


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.code)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 6)], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_every_type_torch_has_comes_through(dtype: DType, shape: tuple[int, ...]) -> None:
    if dtype.packed > 1 and not shape:
        return  # a scalar would be half a byte
    content = np.random.default_rng(0).bytes(dtype.nbytes(shape))
    if dtype.kind == "bool":
        content = bytes(each & 1 for each in content)
    paged = Paged.of(TensorEntry(("w",), dtype, shape, Literal(content)))
    assert paged.dtype is getattr(torch, str(dtype.torch))
    assert paged.stored == dtype
    assert raw(paged.read()) == content
    assert paged.shape == ((*shape[:-1], shape[-1] // dtype.packed) if shape else ())
    if shape == (2, 6):
        words = paged.read().view(_word(dtype))
        assert raw(values(paged.t())) == raw(values(paged.t().contiguous())) == raw(words.t())
        assert raw(values(torch.stack([paged[1], paged[0]]))) == raw(words.flip(0))
        check_payload(recipe(torch.cat([paged, paged], 1)).payload, itemsize=dtype.itemsize)


def _word(dtype: DType) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[
        dtype.itemsize
    ]


@pytest.mark.parametrize(
    ("dtype", "shape", "sentence"),
    [("F6_E2M3", (4,), "has no such type"), ("F4", (2, 3), "no whole bytes|has no such type")],
)
def test_what_torch_has_no_tensor_for_is_refused(
    dtype: str, shape: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(LoadError, match=sentence):
        Paged.of(TensorEntry(("w",), BY_CODE[dtype], shape, Poisoned(BY_CODE[dtype].nbytes(shape))))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(LoadError, match="no device that torch can use"):
        Paged.of(TensorEntry(("w",), BY_CODE["F32"], (1,), Poisoned(4)), "nowhere")


# Reading.


@pytest.mark.parametrize("shape", [(7,), (1000, 1000), (3, 1 << 20)], ids=str)
def test_what_is_read_has_aligned_memory_of_its_own(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = random(shape)
    (tmp_path / "w").write_bytes(b"odd" + raw(weight))
    paged = address(weight, Extent(tmp_path / "w", 3, weight.nbytes))
    first, second = paged.read(), paged.read()
    assert type(first) is torch.Tensor
    assert torch.equal(first, weight)
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert torch.equal(paged, weight)


def test_what_is_read_in_inference_mode_outlives_it() -> None:
    with torch.inference_mode():
        read, row = address(random((4, 6))).read(), address(random((4, 6)))[0]
    assert not read.is_inference()
    read.requires_grad_().square().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert nn.Parameter(row).requires_grad


PEAK = """
import resource, sys, torch
from pathlib import Path
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.load.lazy.paged import Paged
from shardkit.payloads.payload import Extent

nbytes = 96 << 20
paged = Paged.of(TensorEntry(("w",), BY_CODE["F32"], (nbytes // 4096, 1024), Extent(Path(sys.argv[1]), 0, nbytes)))
ways = {"plain": paged, "cast": paged.double(), "turned": paged.t().contiguous(), "joined": torch.cat([paged, paged], 1)}
tensor = ways[sys.argv[2]]
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
value = tensor.read()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(grown - value.nbytes)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="peak memory is told in other units, or not at all"
)
@pytest.mark.parametrize("way", ["plain", "cast", "turned", "joined"])
def test_reading_needs_little_beside_the_tensor(way: str, tmp_path: Path) -> None:
    with open(tmp_path / "w", "wb") as file:
        file.truncate(96 << 20)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "w", way],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 64 << 20


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(100))
    paged = Paged.of(TensorEntry(("w",), BY_CODE["F32"], (25,), Extent(tmp_path / "w", 0, 100)))
    (tmp_path / "w").write_bytes(bytes(60))
    with pytest.raises(FormatError, match="ends before byte 100"):
        paged.sum()


def test_what_is_copied_from_it_goes_straight_into_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random((40, 50))
    for target in (torch.empty(40, 50), torch.empty(40, 50, dtype=torch.bfloat16)):
        paged = address(weight)
        monkeypatch.setattr(Paged, "read", lambda self: pytest.fail("memory of its own was taken"))
        target.copy_(paged)
        assert torch.equal(target, weight.to(target.dtype))


TARGETS: dict[str, Callable[[], torch.Tensor]] = {
    "turned": lambda: torch.empty(4, 6).t(),
    "broadcast": lambda: torch.empty(2, 6, 4),
    "another type": lambda: torch.empty(6, 4, dtype=torch.int32),
    "a parameter": lambda: nn.Parameter(torch.empty(4, 6).t()),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_copied_elsewhere_arrives_too(name: str) -> None:
    weight, target, same = random((6, 4)), TARGETS[name](), TARGETS[name]()
    with torch.no_grad():
        assert torch.equal(target.copy_(address(weight)), same.copy_(weight))


WRITING: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda t: t.add_(1),
    "zero_": lambda t: t.zero_(),
    "copy_": lambda t: t.copy_(torch.ones(2, 3)),
    "item assignment": lambda t: t.__setitem__((0, 0), 1.0),
    "slice assignment": lambda t: t.__setitem__(slice(0, 1), torch.ones(3)),
    "augmented": lambda t: t.__imul__(2),
    "out": lambda t: torch.add(torch.ones(2, 3), 1, out=t),
    "initialisation": nn.init.normal_,
    "a list": lambda t: torch._foreach_mul_([torch.ones(1), t], 2),
    "resize": lambda t: t.resize_(3),
    "set": lambda t: t.set_(torch.ones(3).untyped_storage()),
}


@pytest.mark.parametrize("name", WRITING)
def test_a_paged_cannot_be_written(name: str) -> None:
    with pytest.raises(LoadError, match="cannot be written"), torch.no_grad():
        WRITING[name](poisoned(random((2, 3))))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize(
    "ask", [lambda t: t.storage(), lambda t: t.is_shared(), lambda t: t.share_memory_()]
)
def test_memory_that_is_not_there_is_not_shared(ask: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(LoadError, match="has no memory"):
        ask(poisoned(random((2, 3))))


def test_an_optimizer_cannot_step_it() -> None:
    parameter = nn.Parameter(address(random((3,))))
    (parameter * 2).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with pytest.raises(LoadError, match="cannot be written"):
        torch.optim.SGD([parameter], lr=0.1).step()
    assert torch.equal(parameter, random((3,)))


def test_values_come_out_as_python_and_numpy_have_them() -> None:
    weight = random((2, 3))
    paged = address(weight)
    assert paged.tolist() == weight.tolist()
    assert paged[1, 1].item() == float(paged[1, 1]) == weight[1, 1].item()
    assert bool(paged[0, 0] != 0)
    assert f"{paged[0, 0].item():.3f}" == f"{weight[0, 0].item():.3f}"
    assert (paged.numpy() == weight.numpy()).all()
    assert (np.asarray(paged) == weight.numpy()).all()
    assert (np.from_dlpack(paged) == weight.numpy()).all()
    assert weight[0, 0] in paged
    assert int(address(torch.tensor(3))) == 3
    assert [1, 2, 3][address(torch.tensor(1))] == 2


# Parameters, modules, autograd.


def test_a_parameter_of_it_is_a_paged_parameter() -> None:
    paged = poisoned(random((2, 3)))
    parameter = nn.Parameter(paged, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert recipe(parameter) == paged.recipe
    assert not parameter.requires_grad
    assert not isinstance(paged, nn.Parameter)


def test_gradients_flow_through_a_parameter_that_requires_them() -> None:
    weight, x = random((4, 6)), random((3, 6)).requires_grad_()
    grads: list[torch.Tensor] = []
    for parameter in (nn.Parameter(weight.clone()), nn.Parameter(address(weight))):
        F.linear(x, parameter).square().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        assert parameter.grad is not None
        assert x.grad is not None
        grads += [parameter.grad, x.grad]
        x.grad = None
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_where_no_gradient_is_wanted_none_flows() -> None:
    paged, x = address(random((4, 6))), random((3, 6)).requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not F.linear(x, paged).requires_grad
    assert F.linear(x, paged).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_for_memory(dtype: torch.dtype) -> None:
    weight, x = random((4, 6)), random((3, 6))
    with torch.autocast("cpu", dtype):
        expected = F.linear(x, weight)
        assert torch.equal(F.linear(x, address(weight)), expected)
        assert torch.equal(F.linear(x, nn.Parameter(address(weight))), expected)


def test_a_module_is_cast_without_reading() -> None:
    module = nn.Linear(6, 4)
    module.load_state_dict(
        {"weight": poisoned(module.weight), "bias": poisoned(module.bias)}, assign=True
    )
    module.half().to("cpu", torch.bfloat16)
    assert type(module.weight) is Paged
    assert module.weight.dtype is torch.bfloat16
    assert module.weight.is_leaf
    assert type(module.to("meta").weight) is nn.Parameter


def test_other_data_may_be_given_to_a_parameter() -> None:
    parameter = nn.Parameter(address(random((4, 6))))
    parameter.data = parameter.data * 2
    assert torch.equal(parameter, random((4, 6)) * 2)
    parameter.data = torch.ones(3, 2, dtype=torch.bfloat16).t()
    assert parameter.dtype is torch.bfloat16
    assert torch.equal(parameter, torch.ones(2, 3, dtype=torch.bfloat16))


def test_copies_are_other_objects_with_the_same_recipe_and_attributes() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    module[0].weight = module[1].weight = nn.Parameter(
        poisoned(random((4, 6))), requires_grad=False
    )
    vars(module[0].weight)["mark"] = "a library's own"
    copied = copy.deepcopy(module)
    assert copied[0].weight is copied[1].weight is not module[0].weight
    for other in (copied[0].weight, pickle.loads(pickle.dumps(module))[0].weight):
        assert isinstance(other, nn.Parameter)
        assert recipe(other) == recipe(module[0].weight)
        assert vars(other)["mark"] == "a library's own"
        assert not other.requires_grad
    assert recipe(copy.copy(module[0].weight)) == recipe(module[0].weight)


def test_an_lstm_runs_from_paged_weights() -> None:
    module, x = nn.LSTM(5, 7, num_layers=2), random((4, 2, 5))
    with torch.no_grad():
        expected = module(x)[0]
        state = {name: address(tensor) for name, tensor in module.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.load_state_dict(state, assign=True)
        assert torch.allclose(
            module(x)[0], expected
        )  # oneDNN's kernels are for memory only, and another order of sums


# torch 2.6 traces what newer ones skip.
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin:UserWarning")
def test_torch_compile_leaves_it_alone() -> None:
    module, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.LayerNorm(4)), random((3, 6))
    expected = module(x)
    module.load_state_dict(
        {name: address(tensor) for name, tensor in module.state_dict().items()}, assign=True
    )
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), expected)


def test_many_threads_use_one(tmp_path: Path) -> None:
    weight, x = random((64, 64)), random((8, 64))
    (tmp_path / "w").write_bytes(raw(weight))
    paged = address(weight, Extent(tmp_path / "w", 0, weight.nbytes))
    expected = F.linear(x, weight)
    right: list[bool] = []

    def work() -> None:
        right.extend(torch.equal(F.linear(x, paged.clone().detach()), expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 200


def test_a_default_device_does_not_matter() -> None:
    weight = random((4, 6))
    with torch.device("meta"):
        assert same(address(weight).t().half(), weight.t().half())


def test_it_is_freed_when_nobody_has_it() -> None:
    gc.collect()
    before = sum(type(each) is Paged for each in gc.get_objects())
    module = nn.Linear(6, 4)
    module.load_state_dict(
        {"weight": address(random((4, 6))), "bias": address(random((4,)))}, assign=True
    )
    module(random((1, 6)))
    del module
    gc.collect()
    assert sum(type(each) is Paged for each in gc.get_objects()) == before


def test_recipes_of_the_same_bytes_are_equal() -> None:
    made = address(random((4, 6)), Poisoned(96)).recipe
    assert made == Recipe(Poisoned(96), BY_CODE["F32"], (4, 6), (6, 1))
    assert hash(made) == hash(replace(made))
