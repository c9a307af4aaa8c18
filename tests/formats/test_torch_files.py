"""Whatever torch saves, as a zip archive or in the old way, holds here what torch.load finds in it,
bit for bit.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import re
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkit.checkpoint.edits import Edits, edit
from shardkit.checkpoint.entries import Checkpoint, OtherKind
from shardkit.checkpoint.model_root import select_root
from shardkit.dtypes import BY_TORCH
from shardkit.errors import FormatError, LimitExceeded, Unwritable
from shardkit.formats import torch_legacy, torch_zip
from shardkit.limits import Limits
from shardkit.sources.format import Format, Source

# Torch warns of what is young (nested, CSR) and of what is old (quantised), and both are saved
# here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FORMATS = (torch_zip.FORMAT, torch_legacy.FORMAT)
both = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)

DTYPES = tuple(name for name in BY_TORCH if hasattr(torch, name))

Pair = namedtuple("Pair", "left right")


class Loud(torch.Tensor):
    """A subclass of Tensor, as users have them."""

    name_of_it = ""


def saved(value: object, form: Format, folder: Path, *, protocol: int = 2) -> Path:
    path = folder / "model.v1.pt"
    torch.save(
        value,
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=form is torch_zip.FORMAT,
    )
    return path


def scanned(path: Path, form: Format, limits: Limits = Limits()) -> Checkpoint:
    source = Source.file(path, limits)
    assert form.sniff(source)
    return form.scan(source)


def content(tensor: torch.Tensor) -> bytes:
    """What the tensor means, C-contiguous."""
    dense = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
    return bytes(dense.reshape(-1).view(torch.uint8).numpy())


def logical(tensor: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if tensor.dtype is not getattr(torch, "float4_e2m1fn_x2", None):  # which came with torch 2.8
        return shape
    return (*shape[:-1], shape[-1] * 2) if shape else (2,)


def assert_same(found: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        entry = found[name]
        assert (entry.dtype.torch, entry.shape) == (
            str(tensor.dtype).removeprefix("torch."),
            logical(tensor),
        ), name
        assert entry.read() == content(tensor), name


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Bytes of every kind in the shape of *dtype*; for bools, 0 and 1."""
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = np.random.default_rng(7).integers(0, 2 if dtype is torch.bool else 256, count, np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def layouts(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    whole = numbers(dtype, 6, 4, 5)
    yield "contiguous", whole
    yield "turned", whole.permute(2, 0, 1)
    yield "gaps", whole[1:5:2, :, 1:4]
    yield "offset", whole.view(-1)[7:31]
    yield "expanded", whole[:, :1].expand(6, 3, 5)
    yield "scalar", whole[0, 0, 0]
    yield "empty", whole[:0]
    yield "flat", whole.diagonal(0, 0, 1)
    yield "again", whole


@both
@pytest.mark.parametrize("name", DTYPES)
def test_every_type_in_every_layout_is_read_as_it_was_saved(
    form: Format, name: str, tmp_path: Path
) -> None:
    tensors = dict(layouts(getattr(torch, name)))
    found = scanned(saved(tensors, form, tmp_path), form)
    assert_same(found, tensors)
    assert found["again"].payload == found["contiguous"].payload
    assert found.others == ()


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(form: Format, protocol: int, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(600)}
    assert_same(scanned(saved(tensors, form, tmp_path, protocol=protocol), form), tensors)


@both
def test_lazy_conjugates_and_negatives_are_resolved(form: Format, tmp_path: Path) -> None:
    waves = torch.randn(4, 6, dtype=torch.complex64)
    tensors = {
        "conj": waves.conj(),
        "turned": waves.conj().t(),
        "imag": waves.clone().conj().imag,
        "neg": torch._neg_view(torch.randn(5)),
        "both": torch._neg_view(waves.conj()),
        "double": waves.to(torch.complex128).conj()[1:, ::2],
    }
    assert_same(scanned(saved(tensors, form, tmp_path), form), tensors)


@both
def test_a_parameter_and_a_subclass_are_what_they_wrap(form: Format, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    marked = torch.nn.Parameter(torch.randn(3))
    marked.kind = "extra"  # type: ignore[attr-defined]  # this is what makes torch keep a state
    loud = torch.randn(2, 2).as_subclass(Loud)
    loud.name_of_it = "loud"
    tensors = {
        "parameter": parameter,
        "marked": marked,
        "loud": loud,
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "loud parameter": torch.nn.Parameter(loud),
    }
    found = scanned(saved(tensors, form, tmp_path), form)
    assert_same(found, tensors)


@both
def test_containers_are_walked_in_order_and_a_key_is_one_step(form: Format, tmp_path: Path) -> None:
    a, b = torch.arange(3), torch.arange(4.0)
    value = {
        "epoch": 3,
        "state_dict": OrderedDict({"layers.0.weight": a, 7: b}),
        "list": [a, (b, Pair(a, b)), {"deep": [b]}],
        None: {True: a, 1.5: b, b"raw": a},
        "default": defaultdict(None, {"x": b}),
        "args": argparse.Namespace(lr=0.1, init=a),
    }
    found = scanned(saved(value, form, tmp_path), form)
    assert [entry.path for entry in found.tensors] == [
        ("state_dict", "layers.0.weight"),
        ("state_dict", "7"),
        ("list", "0"),
        ("list", "1", "0"),
        ("list", "1", "1", "0"),
        ("list", "1", "1", "1"),
        ("list", "2", "deep", "0"),
        ("None", "True"),
        ("None", "1.5"),
        ("None", "raw"),
        ("default", "x"),
        ("args", "init"),
    ]
    assert {
        entry.read() == content(a) or entry.read() == content(b) for entry in found.tensors
    } == {True}
    objects = {
        (*other.path, other.reason) for other in found.others if other.kind is OtherKind.OBJECT
    }
    assert {("epoch", "3"), ("args", "lr", "0.1")} <= objects


@both
def test_what_no_one_can_import_never_blocks_the_tensors_beside_it(
    form: Format, tmp_path: Path
) -> None:
    value = {
        "weights": torch.ones(2),
        "words": np.array(["a", "b"]),
        "scalar": np.float64(2),
        "path": pathlib.PurePosixPath("/x"),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "complex": 1j,
        "bytes": b"\xff" * 10_000,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "text": "é" * 5000,
        "range": range(3),
        "pattern": re.compile("x"),
        "big": 1 << 4000,
    }
    for protocol in (2, 4, 5):
        found = scanned(saved(value, form, tmp_path, protocol=protocol), form)
        assert_same(found, {"weights": value["weights"]})  # type: ignore[dict-item]  # the one that is a tensor
        assert {other.path[0] for other in found.others if other.path} == value.keys() - {"weights"}


@both
def test_what_has_no_dense_bytes_is_said_with_its_bytes(form: Format, tmp_path: Path) -> None:
    dense = torch.eye(3)
    value = {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "channels": torch.quantize_per_channel(
            dense, torch.ones(3), torch.zeros(3), 0, torch.quint8
        ),
        "meta": torch.empty(3, device="meta"),
        "dense": dense,
    }
    found = scanned(saved(value, form, tmp_path), form)
    assert [entry.name for entry in found.tensors] == ["dense"]
    assert {
        other.name: (other.kind, other.nbytes) for other in found.others if other.is_weight
    } == {
        "coo": (OtherKind.SPARSE, 3 * 2 * 8 + 3 * 4),
        "csr": (OtherKind.SPARSE, 4 * 8 + 3 * 8 + 3 * 4),
        "quantised": (OtherKind.QUANTISED, 9),
        "channels": (OtherKind.QUANTISED, 9),
        "meta": (OtherKind.META, 0),
    }


def test_a_nested_tensor_and_odd_types_are_said(tmp_path: Path) -> None:
    value = {
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "bits": torch.zeros(3, dtype=torch.uint8).view(torch.bits8),
    }
    found = scanned(saved(value, torch_zip.FORMAT, tmp_path), torch_zip.FORMAT)
    assert {
        other.name: (other.kind, other.nbytes) for other in found.others if other.is_weight
    } == {
        "nested": (OtherKind.NESTED, 20),
        "bits": (OtherKind.UNKNOWN_TENSOR, 3),
    }


@both
@pytest.mark.parametrize("value", [torch.arange(3), [torch.arange(3)]], ids=["tensor", "list"])
def test_a_file_may_be_a_lone_tensor(form: Format, value: object, tmp_path: Path) -> None:
    (entry,) = scanned(saved(value, form, tmp_path), form).tensors
    assert entry.read() == content(torch.arange(3))
    assert entry.name


@both
def test_a_call_never_runs_and_is_listed(form: Format, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(tmp_path / 'boom')!r}, 'w')",)

    path = saved({"weights": torch.ones(2), "bomb": Bomb()}, form, tmp_path)
    found = scanned(path, form)
    assert not (tmp_path / "boom").exists()
    assert [other.reason for other in found.others if other.kind is OtherKind.CALL] == [
        "builtins.exec"
    ]
    assert list(found) == ["weights"]


# Hostile files: whatever is done to the bytes, nothing but our own errors comes out, and soon.


def small(form: Format) -> bytes:
    file = io.BytesIO()
    value = {"a": torch.arange(3.0), "b": [torch.ones(2, 2).t()], "n": 1}
    torch.save(value, file, _use_new_zipfile_serialization=form is torch_zip.FORMAT)
    return file.getvalue()


def outcome(path: Path, form: Format) -> str:
    source = Source.file(path, Limits(pickle_ops=100_000, held_bytes=10_000_000, tensors=1000))
    try:
        if not form.sniff(source):
            return "not recognised"
        for entry in form.scan(source).tensors:
            if entry.nbytes < 1_000_000:
                entry.read()
    except FormatError:
        return "refused"
    return "read"


@both
def test_a_file_cut_anywhere_is_refused(form: Format, tmp_path: Path) -> None:
    whole = small(form)
    path = tmp_path / "cut.pt"
    for stop in range(len(whole)):
        path.write_bytes(whole[:stop])
        assert outcome(path, form) != "read", stop


@both
def test_no_flipped_byte_brings_anything_but_our_errors(form: Format, tmp_path: Path) -> None:
    whole = small(form)
    path = tmp_path / "flipped.pt"

    @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4
        )
    )
    def check(edits: list[tuple[int, int]]) -> None:
        content = bytearray(whole)
        for at, byte in edits:
            content[at] = byte
        path.write_bytes(content)
        outcome(path, form)

    check()


@both
def test_a_checkpoint_of_too_many_tensors_hits_the_limit_by_name(
    form: Format, tmp_path: Path
) -> None:
    path = saved([torch.ones(1)] * 20, form, tmp_path)
    with pytest.raises(LimitExceeded, match=re.escape(str(path))) as caught:
        scanned(path, form, Limits(tensors=10))
    assert caught.value.limit == "tensors"


@both
def test_a_tensor_that_does_not_fit_its_storage_is_named(form: Format, tmp_path: Path) -> None:
    path = saved({"weight": torch.arange(300)}, form, tmp_path)
    whole = path.read_bytes()
    shape = b"M\x2c\x01\x85"  # (300,)
    assert shape in whole
    path.write_bytes(whole.replace(shape, b"M\x2d\x01\x85"))
    with pytest.raises(FormatError, match="'weight'"):
        scanned(path, form)


PART = {"l.weight": torch.arange(4.0), "l.bias": torch.ones(2)}
SHARING: dict[str, tuple[object, list[str]]] = {
    "two models": ({"encoder": PART, "decoder": PART}, ["encoder", "decoder"]),
    "a setting pickled first": (
        {"hyper_parameters": {"pretrained": PART}, "state_dict": PART},
        ["hyper_parameters.pretrained", "state_dict"],
    ),
    "an average pickled first": ({"ema": PART, "model": PART}, ["ema", "model"]),
    "an optimizer's copy": (
        {"optimizer": {"state": {}, "param_groups": [], "master": PART}, "model": PART},
        ["optimizer.master", "model"],
    ),
    "a list": ([PART, PART], ["0", "1"]),
    "an OrderedDict at two depths": (
        {"a": {"b": (shared := OrderedDict(PART))}, "c": [shared]},
        ["a.b", "c.0"],
    ),
}


@both
@pytest.mark.parametrize(("value", "places"), SHARING.values(), ids=SHARING)
def test_what_is_saved_at_two_places_is_found_at_both(
    value: object, places: list[str], form: Format, tmp_path: Path
) -> None:
    checkpoint = scanned(saved(value, form, tmp_path), form)
    assert list(checkpoint) == [f"{place}.{name}" for place in places for name in PART]
    for entry in checkpoint.tensors:
        assert entry.read() == content(PART[entry.path[-1]])
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in PART.values())


@both
@pytest.mark.parametrize("first", ["state_dict", "hyper_parameters"])
def test_which_of_two_equal_parts_was_pickled_first_makes_no_model(
    first: str, form: Format, tmp_path: Path
) -> None:
    parts = {"state_dict": PART, "hyper_parameters": {"pretrained": PART}}
    checkpoint = scanned(saved({first: parts[first], **parts}, form, tmp_path), form)
    rooted = select_root(checkpoint, None)
    assert rooted.path == ("state_dict",)
    assert [entry.name for entry in rooted.tensors] == list(PART)
    assert [part.path for part in rooted.left_out] == ["hyper_parameters"]


@both
def test_tensors_in_the_attributes_of_an_ordered_dict_are_named_like_its_items(
    form: Format, tmp_path: Path
) -> None:
    state = OrderedDict({"w": torch.ones(3)})
    vars(state).update(
        _metadata={"": {"version": 1}},
        extra=torch.zeros(2),
        deep={"x": [torch.zeros(4)]},
        itself=state,
    )
    path = saved({"model": state}, form, tmp_path)
    assert torch.load(path, weights_only=False)["model"].extra.shape == (2,)
    checkpoint = scanned(path, form)
    assert {entry.name: entry.shape for entry in checkpoint.tensors} == {
        "model.w": (3,),
        "model.extra": (2,),
        "model.deep.x.0": (4,),
    }
    assert [(other.name, other.kind) for other in checkpoint.others] == [
        ("model.itself", OtherKind.OBJECT)
    ]


@both
@pytest.mark.parametrize(
    "make",
    [lambda tensor: tensor, lambda tensor: (tensor, 1), lambda tensor: (1, (tensor,))],
    ids=["alone", "in a tuple", "deeper"],
)
def test_a_tensor_in_a_key_is_a_weight_that_cannot_be_converted(
    make: Callable[[torch.Tensor], object], form: Format, tmp_path: Path
) -> None:
    checkpoint = scanned(
        saved({"model": {"w": torch.ones(1), make(torch.ones(3)): "value"}}, form, tmp_path), form
    )
    (weight,) = (other for other in checkpoint.others if other.is_weight)
    assert (weight.name, weight.kind, weight.nbytes) == (
        "model.<key of item 0>",
        OtherKind.UNKNOWN_TENSOR,
        12,
    )
    with pytest.raises(Unwritable, match="a tensor in a key of a dict"):
        edit(checkpoint, Edits())
