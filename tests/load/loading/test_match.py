"""What of a checkpoint goes where in a model is found before a byte moves, and so is all that is
wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import BY_CODE, BY_TORCH
from shardkit.errors import Mismatch
from shardkit.load.loading.match import Assignment, Match, assign
from shardkit.load.modules.weights import stored_type, torch_type, weights_of
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import Literal


def entry(name: str, shape: Sequence[int], code: str = "F32", fill: int = 0) -> TensorEntry:
    dtype = BY_CODE[code]
    return TensorEntry((name,), dtype, tuple(shape), Literal(bytes([fill]) * dtype.nbytes(shape)))


def entries_of(model: nn.Module, *, without: tuple[str, ...] = ()) -> dict[str, TensorEntry]:
    """What a checkpoint of *model* would hold."""
    return {
        name: entry(
            name, weight.tensor.shape, BY_TORCH[str(weight.tensor.dtype)[6:]].code, number % 256
        )
        for number, weight in enumerate(weights_of(model))
        for name in weight.names
        if name not in without
    }


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def by_name(assignment: Assignment) -> dict[str, Match]:
    return {home.name: home for home in assignment.homes}


class Tied(nn.Module):
    """An embedding that is the head too, and a buffer that is a parameter elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        mask = torch.ones(3)
        self.register_buffer("mask", mask)
        self.register_buffer("same_mask", mask)
        self.register_buffer("scratch", torch.ones(3), persistent=False)


class Counting(nn.Module):
    """A module with a state beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.count = torch.zeros(1)

    def get_extra_state(self) -> torch.Tensor:
        return self.count

    def set_extra_state(self, state: Any) -> None:  # Any: torch leaves it to the module
        self.count = state


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "tied": Tied,
    "batchnorm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_name_of_a_state_dict_is_a_name_of_one_home(make: Callable[[], nn.Module]) -> None:
    model = make()
    assignment = assign(model, entries_of(model), strict=True)
    names = [name for home in assignment.homes for name in home.names]
    assert sorted(names) == sorted(model.state_dict())
    assert (assignment.missing, assignment.unexpected, assignment.notes) == (
        (),
        (),
        assignment.notes,
    )
    for home in assignment.homes:
        tensor = model.state_dict()[home.name]
        assert (home.shape, home.dtype) == (tuple(tensor.shape), tensor.dtype)


def test_weights_stand_in_the_order_of_the_state_dict_with_all_their_names() -> None:
    weights = list(weights_of(Tied()))
    assert [weight.names for weight in weights] == [
        ("mask", "same_mask"), ("embed.weight", "head.weight"), ("body.weight",), ("body.bias",)
    ]  # fmt: skip
    assert [weight.is_buffer for weight in weights] == [True, False, False, False]


def test_a_module_that_stands_at_two_places_is_one() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert [weight.names for weight in weights_of(model)] == [
        ("a.weight", "b.weight"),
        ("a.bias", "b.bias"),
    ]


def test_a_parameter_that_is_a_buffer_elsewhere_is_no_buffer() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("copy", model.weight)
    assert [weight.is_buffer for weight in weights_of(model)] == [False, False]


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("on_meta", [True, False])
def test_one_name_of_a_tie_is_enough(kept: str, on_meta: bool) -> None:
    model = Tied()
    if on_meta:
        model = model.to("meta")
        model.head.weight = model.embed.weight
        model.scratch = torch.ones(3)
        model.mask = model.same_mask = torch.ones(3)
    entries = entries_of(model, without=tuple({"embed.weight", "head.weight"} - {kept}))
    assignment = assign(model, entries, strict=True)
    [home] = [home for home in assignment.homes if len(home.names) == 2 and not home.is_buffer]
    assert home.names == ("embed.weight", "head.weight")
    assert home.entry.name == kept
    assert assignment.missing == ()


def test_a_tie_of_which_no_name_is_there_is_missing_by_all_names() -> None:
    assignment = assign(Tied(), entries_of(Tied(), without=("embed.weight", "head.weight")))
    assert assignment.missing == ("embed.weight", "head.weight")
    [note] = assignment.notes
    assert "has no 'embed.weight', 'head.weight', which keep the values that the model has" in note


def test_a_tie_with_two_values_takes_the_first_and_says_so() -> None:
    entries = entries_of(Tied()) | {"head.weight": entry("head.weight", (4, 3), fill=99)}
    assignment = assign(Tied(), entries)
    assert by_name(assignment)["embed.weight"].entry.name == "embed.weight"
    assert "one weight in the model, and several" in "".join(assignment.notes)
    same = entries | {"head.weight": entries["embed.weight"], "same_mask": entries["mask"]}
    assert assign(Tied(), same).notes == ()


# stored, declared by the model, asked for → what the weight becomes
TYPES = [
    ("F32", torch.float32, None, torch.float32),
    ("F16", torch.float32, None, torch.float32),
    ("F32", torch.bfloat16, None, torch.bfloat16),
    ("I64", torch.float32, None, torch.float32),
    ("F32", torch.int64, None, torch.int64),
    ("U8", torch.bool, None, torch.bool),
    ("F32", torch.float32, torch.float16, torch.float16),
    ("F16", torch.float32, torch.bfloat16, torch.bfloat16),
    ("I64", torch.int64, torch.float16, torch.int64),
    ("BOOL", torch.bool, torch.float16, torch.bool),
    ("I8", torch.float32, torch.float16, torch.int8),
    ("C64", torch.complex64, torch.float16, torch.complex64),
    ("F8_E4M3", torch.float32, None, torch.float32),
    ("F8_E4M3", torch.float32, torch.bfloat16, torch.bfloat16),
    ("F8_E4M3", torch.float8_e4m3fn, torch.bfloat16, torch.float8_e4m3fn),
    ("F64", torch.float32, torch.float8_e5m2, torch.float8_e5m2),
]


@pytest.mark.parametrize(("stored", "declared", "asked", "becomes"), TYPES)
def test_types_are_those_of_accelerate(
    stored: str, declared: torch.dtype, asked: torch.dtype | None, becomes: torch.dtype
) -> None:
    model = nn.Module()
    model.register_buffer("x", torch.zeros(6, 2, dtype=torch.uint8).to(declared))
    [home] = assign(model, {"x": entry("x", (6, 2), stored)}, dtype=asked).homes
    assert home.dtype == becomes
    assert home.nbytes == 12 * becomes.itemsize
    assert isinstance(home.payload, Cast) == (torch_type(BY_CODE[stored]) != becomes)


@pytest.mark.parametrize(
    ("asked", "noted"), [(None, True), (torch.bfloat16, True), (torch.float8_e4m3fn, False)]
)
def test_codes_of_8_bits_do_not_become_wide_floats_without_a_word(
    asked: torch.dtype | None, noted: bool
) -> None:
    model = nn.Linear(2, 2)
    entries = {"weight": entry("weight", (2, 2), "F8_E4M3"), "bias": entry("bias", (2,))}
    notes = assign(model, entries, dtype=asked).notes
    assert ["'weight' in 8-bit floats" in note for note in notes] == ([True] if noted else [])


def test_modules_that_stay_in_fp32_are_told_by_whole_steps_of_their_names() -> None:
    model = nn.ModuleDict(
        {"wo": nn.Linear(1, 1), "wo2": nn.Linear(1, 1), "x": nn.ModuleDict({"wo": nn.Linear(1, 1)})}
    )
    entries = entries_of(model)
    for dtype in (torch.float16, torch.bfloat16):
        homes = by_name(assign(model, entries, dtype=dtype, keep_in_fp32=["wo"]))
        kept = {name for name, home in homes.items() if home.dtype == torch.float32}
        assert kept == {"wo.weight", "wo.bias", "x.wo.weight", "x.wo.bias"}
    homes = by_name(assign(model, entries, dtype=torch.float64, keep_in_fp32=["wo"]))
    assert {home.dtype for home in homes.values()} == {torch.float64}


def test_everything_that_is_wrong_is_said_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    entries = {
        "0.weight": entry("0.weight", (2, 3)),
        "0.bias": entry("0.bias", (3,)),
        "1.weight": entry("1.weight", (4,)),
        "1.bias": entry("1.bias", (4,), "F4"),
        "2.weight": entry("2.weight", (2, 2)),
        "other": entry("other", (1,)),
    }
    with pytest.raises(Mismatch) as raised:
        assign(model, entries, strict=True, where="x.bin")
    error = raised.value
    assert error.missing == ("2.bias",)
    assert error.unexpected == ("other",)
    assert error.wrong_shape == {"0.bias": ((3,), (2,)), "1.weight": ((4,), (2, 2))}
    assert str(error) == (
        "x.bin does not match the model: shape mismatch: "
        "'0.bias' ([3] in the checkpoint, [2] in the model), "
        "'1.weight' ([4] in the checkpoint, [2, 2] in the model); "
        "type not supported by torch: '1.bias' (F4 as float32); missing: '2.bias'; not in "
        "the model: 'other'"
    )


def test_a_shape_that_differs_is_an_error_even_where_nothing_is_strict() -> None:
    with pytest.raises(Mismatch, match="shape mismatch"):
        assign(nn.Linear(3, 2), entries_of(nn.Linear(2, 3)))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scalar_may_be_a_tensor_of_one_element_as_before_torch_0_4(
    shape: tuple[int, ...],
) -> None:
    model = nn.BatchNorm1d(2)
    entries = entries_of(model) | {
        "num_batches_tracked": entry("num_batches_tracked", shape, "I64")
    }
    assert by_name(assign(model, entries))["num_batches_tracked"].shape == ()


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has this type since 2.8")
def test_two_floats_of_4_bits_are_one_element_of_torch() -> None:
    model = nn.Module()
    model.register_buffer("x", torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    [home] = assign(model, {"x": entry("x", (3, 8), "F4")}, dtype=torch.bfloat16).homes
    assert (home.shape, home.dtype, home.nbytes) == ((3, 4), torch.float4_e2m1fn_x2, 12)
    with pytest.raises(Mismatch, match="shape mismatch"):
        assign(model, {"x": entry("x", (3, 4), "F4")})


def test_a_type_that_torch_has_not_is_refused_only_where_it_is_needed() -> None:
    model = nn.Linear(2, 2)
    odd = entry("odd", (4,), "F6_E2M3")
    assert assign(model, entries_of(model) | {"odd": odd}).unexpected == ("odd",)
    with pytest.raises(Mismatch, match="'bias' \\(F6_E2M3 as float32\\)"):
        assign(nn.Linear(4, 4), entries_of(nn.Linear(4, 4)) | {"bias": odd})


def test_names_of_one_side_only_are_told_and_strict_refuses_them() -> None:
    model = nn.Linear(2, 2)
    entries = entries_of(model, without=("bias",)) | {"more": entry("more", (1,))}
    assignment = assign(model, entries)
    assert (assignment.missing, assignment.unexpected) == (("bias",), ("more",))
    assert len(assignment.notes) == 2
    with pytest.raises(Mismatch, match="missing: 'bias'; not in the model: 'more'"):
        assign(model, entries, strict=True)


def test_what_would_stay_on_meta_is_refused_and_what_is_real_is_kept() -> None:
    model = empty(lambda: nn.Linear(2, 2))
    entries = entries_of(model, without=("bias",))
    with pytest.raises(Mismatch, match="with no values in the model to keep: 'bias'"):
        assign(model, entries)
    model.bias = nn.Parameter(torch.zeros(2))
    assert assign(model, entries).missing == ("bias",)


def test_a_buffer_that_no_checkpoint_holds_must_be_real() -> None:
    model = empty(Tied)
    with pytest.raises(Mismatch, match="'scratch'") as raised:
        assign(model, entries_of(model))
    assert "init_empty_weights" in str(raised.value.hint)
    assert raised.value.missing == ("scratch",)


def test_a_buffer_that_is_not_persistent_is_not_expected() -> None:
    entries = entries_of(Tied())
    assert "scratch" not in entries
    assert assign(Tied(), entries, strict=True).missing == ()
    assert assign(Tied(), entries | {"scratch": entry("scratch", (3,))}).unexpected == ("scratch",)


def test_nothing_in_common_is_an_error_even_where_nothing_is_strict() -> None:
    with pytest.raises(Mismatch, match="no name is common to both"):
        assign(nn.Linear(2, 2), {"x": entry("x", (1,))})


def test_a_prefix_is_said_and_not_guessed() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = {f"module.{name}": each for name, each in entries_of(model).items()}
    with pytest.raises(Mismatch) as raised:
        assign(model, wrapped)
    assert r"begin with 'module.'" in str(raised.value.hint)
    assert r"--rename '^module\.='" in str(raised.value.hint)
    with pytest.raises(Mismatch) as raised:
        assign(nn.ModuleDict({"model": model}), entries_of(model))
    assert "the names in the model begin with 'model.'" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["SCBlock", "SCB", "weight_format", "module"])
def test_a_name_says_nothing_of_what_a_tensor_is_for(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2)})
    assert set(by_name(assign(model, entries_of(model), strict=True))) == {
        f"{name}.weight",
        f"{name}.bias",
    }


def test_extra_state_is_matched_and_missed_like_a_weight() -> None:
    model = nn.ModuleDict({"a": Counting()})
    entries = {"a.weight": entry("a.weight", (2,)), "a._extra_state": entry("a._extra_state", (1,))}
    assignment = assign(model, entries, strict=True)
    assert list(assignment.extra) == ["a._extra_state"]
    assert assign(model, {"a.weight": entries["a.weight"]}).missing == ("a._extra_state",)
    assert assign(
        nn.Linear(2, 2), entries_of(nn.Linear(2, 2)) | {"_extra_state": entries["a.weight"]}
    ).unexpected


def test_a_lazy_parameter_takes_the_shape_of_the_checkpoint() -> None:
    lazy = nn.LazyLinear(2)
    homes = by_name(assign(lazy, entries_of(nn.Linear(5, 2)), strict=True))
    assert homes["weight"].shape == (2, 5)


def test_types_go_there_and_back() -> None:
    for dtype in BY_TORCH.values():
        own = torch_type(dtype)
        assert own is None or stored_type(own) == dtype
    assert stored_type(torch.qint8) is None
