"""Device maps: cleaned, checked, looked up, and kept off the disk; compared with Accelerate."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from libraries import as_of, peer
from shardkit.errors import LoadError, OverBudget
from shardkit.load import explain, init_empty_weights, load_checkpoint_and_dispatch
from shardkit.load.devices.budgets import Device
from shardkit.load.dispatch.attach import DispatchConfig
from shardkit.load.placement.device_map import (
    check_device_map,
    clean_device_map,
    device_of,
    inside,
    refuse_disk,
)

theirs = peer("accelerate.utils")
integration = peer("transformers.integrations.accelerate")

LEAVES = st.lists(
    st.lists(st.sampled_from("abc"), min_size=3, max_size=3).map(".".join),
    min_size=1,
    max_size=12,
    unique=True,
)


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    made.register_parameter("bare", nn.Parameter(torch.ones(2)))
    made.register_buffer("derived", torch.ones(2), persistent=False)
    return made


@given(LEAVES, st.data())
def test_maps_are_cleaned_as_by_accelerate(names: list[str], data: st.DataObject) -> None:
    devices: st.SearchStrategy[int | str] = st.sampled_from([0, 1, "cpu"])
    device_map = {name: data.draw(devices) for name in names}
    cleaned = clean_device_map(device_map)
    assert cleaned == theirs.modeling.clean_device_map(dict(device_map))
    assert {name: device_of(name, cleaned) for name in device_map} == device_map


@pytest.mark.parametrize(
    ("device_map", "cleaned"),
    [
        ({"a": 0, "b": 0}, {"": 0}),
        ({"a.b": 0}, {"a.b": 0}),
        ({"a.b": 0, "a.c": 0, "d": 1}, {"a": 0, "d": 1}),
        ({"a.1": 0, "a.10": 0, "b": 1}, {"a": 0, "b": 1}),
        ({"": 0, "a": 1}, {"": 0, "a": 1}),
        ({"": 0, "a": 0}, {"": 0}),
        ({"a": 1, "a.b": 0, "a.c": 0}, {"a": 1, "a.b": 0, "a.c": 0}),
        ({}, {}),
    ],
)
def test_what_has_one_device_has_one_name(
    device_map: dict[str, int | str], cleaned: dict[str, int | str]
) -> None:
    before = dict(device_map)
    assert clean_device_map(device_map) == cleaned
    assert device_map == before


def test_a_name_never_captures_one_that_only_begins_alike() -> None:
    device_map: dict[str, int | str] = {"model.layers.1": 0, "": "cpu"}
    assert device_of("model.layers.1.weight", device_map) == 0
    assert device_of("model.layers.10.weight", device_map) == "cpu"
    assert (
        integration.expand_device_map(device_map, ["model.layers.10.weight"])[
            "model.layers.10.weight"
        ]
        == 0
    )  # Transformers


def test_a_name_that_no_one_speaks_of_has_no_device() -> None:
    with pytest.raises(LoadError, match=r"says nothing of 'b\.weight'"):
        device_of("b.weight", {"a": 0})


@pytest.mark.parametrize(
    "device_map",
    [
        {"": 0},
        {"0": 0, "1": "disk", "bare": "cpu"},
        {"0": 0, "1.0": 0, "1.1": torch.device("cpu"), "bare": 1, "derived": 0},
    ],
)
def test_a_map_that_covers_all_is_fine_with_names_of_tensors_too(
    device_map: dict[str, int | str | torch.device],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_device_map(model(), device_map)


@as_of("accelerate", "1.15")
def test_accelerate_warns_of_a_tensor_that_its_own_maps_name() -> None:
    with pytest.warns(UserWarning, match="bare"):
        theirs.check_device_map(model(), {"0": 0, "1": 0, "bare": 0})


def test_what_is_not_covered_is_named() -> None:
    with pytest.raises(
        LoadError, match=r"no device to 3 of the model's tensors: 'bare', '0.weight', '0.bias'"
    ):
        check_device_map(model(), {"1": 0})
    with pytest.raises(ValueError, match=r"bare, 0\.weight, 0\.bias"):
        theirs.check_device_map(model(), {"1": 0})


def test_what_is_no_name_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="calls 'no.such'"):
        check_device_map(model(), {"": 0, "no.such": 1})


def test_nothing_lands_on_disk_in_silence() -> None:
    made = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(4)])
    refuse_disk(made, {"": "cpu"}, {"cpu": 0})
    with pytest.raises(
        OverBudget, match=r"800 B would land on disk: '2', '3'; .* 300 B are missing"
    ) as caught:
        refuse_disk(made, {"0": 0, "1": "cpu", "2": "disk", "3": "disk"}, {0: 400, "cpu": 900})
    assert (caught.value.needed, caught.value.available) == (1200, 900)
    with pytest.raises(
        OverBudget, match=r"400 B would land .* 'mps' would have to hold 800 B, and may hold 500 B"
    ) as caught:
        refuse_disk(
            made, {"0": "mps", "1": "mps", "2": "disk", "3": "disk"}, {"mps": 500}, dtype="bf16"
        )
    assert (caught.value.needed, caught.value.available) == (800, 500)


@pytest.mark.parametrize(
    ("device_map", "found"),
    [
        ({"": "cpu"}, {"": "cpu"}),
        ({"unet": "disk", "vae": 0}, {"": "disk"}),
        ({"": "cpu", "unet": "disk", "unet.mid": 0, "unetted": 1}, {"": "disk", "mid": 0}),
        ({"unet.mid": 0, "unet.up.0": 1}, {"mid": 0, "up.0": 1}),
        ({"vae": 0}, {}),
    ],
    ids=str,
)
def test_the_map_of_a_part_says_what_the_whole_map_says_of_it(
    device_map: dict[str, Device], found: dict[str, Device]
) -> None:
    assert inside("unet", device_map) == found


# Buffers that a map leaves out.


class Inner(nn.Module):
    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x)) * self.get_buffer("scale")
        return found


class Outer(nn.Module):
    """A model that is split, with a buffer of its own and one in a part that is split."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.inner, self.out = Inner(persistent=persistent), nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.inner(x)) + self.get_buffer("shift")
        return found


SPLIT: dict[str, int | str] = {"inner.first": "disk", "inner.second": "cpu", "out": "disk"}


@pytest.mark.parametrize("is_empty", [False, True])
def test_buffers_that_no_checkpoint_holds_may_be_left_out_as_in_accelerate(
    is_empty: bool, tmp_path: Path
) -> None:
    resident, x = Outer(persistent=False).eval(), torch.linspace(-1, 1, 8).reshape(2, 4)
    save_file(resident.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    accelerate = peer("accelerate")
    folder = str(tmp_path / "theirs")
    made = accelerate.load_checkpoint_and_dispatch(
        Outer(persistent=False),
        str(tmp_path / "model.safetensors"),
        dict(SPLIT),
        offload_folder=folder,
    )
    with init_empty_weights() if is_empty else contextlib.nullcontext():
        ours = Outer(persistent=False)
    found = load_checkpoint_and_dispatch(ours.eval(), tmp_path / "model.safetensors", SPLIT)
    assert torch.equal(found(x), resident(x))
    assert torch.equal(made(x), resident(x))
    for name, buffer in found.named_buffers():
        assert buffer.device == made.get_buffer(name).device
    reported: object = found.hf_device_map
    assert isinstance(reported, dict)
    assert SPLIT.keys() <= reported.keys()
    assert explain(found).parts


def test_buffers_of_the_checkpoint_and_parameters_may_not_be_left_out(tmp_path: Path) -> None:
    resident = Outer(persistent=True)
    save_file(resident.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        LoadError, match=r"gives no device to 2 of the model's tensors: 'shift', 'inner\.scale'"
    ):
        load_checkpoint_and_dispatch(Outer(persistent=True), tmp_path / "model.safetensors", SPLIT)
    with pytest.raises(ValueError, match=r"shift, inner\.scale"):
        theirs.check_device_map(resident, SPLIT)
    with pytest.raises(
        LoadError, match=r"no device to 2 of the model's tensors: 'out\.weight', 'out\.bias'"
    ):
        load_checkpoint_and_dispatch(
            Outer(persistent=False), tmp_path / "model.safetensors", {"inner": "cpu"}
        )


def test_a_map_that_leaves_out_buffers_can_refuse_the_disk(tmp_path: Path) -> None:
    resident = Outer(persistent=False)
    save_file(resident.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(OverBudget, match="would land on disk"):
        load_checkpoint_and_dispatch(
            Outer(persistent=False), tmp_path / "model.safetensors", SPLIT, offload="never"
        )
    in_memory: dict[str, int | str] = {"inner": "cpu", "out": "cpu"}
    found = load_checkpoint_and_dispatch(
        Outer(persistent=False), tmp_path / "model.safetensors", in_memory, offload="never"
    )
    x = torch.ones(2, 4)
    assert torch.equal(found(x), resident(x))


def test_a_buffer_that_is_left_out_goes_to_the_main_device() -> None:
    wish = DispatchConfig(
        {"inner.first": 1, "inner.second": "cpu", "out": "disk"}, torch.device("cuda", 1)
    )
    assert {wish.runs_on(name) for name in ("shift", "inner.scale", "inner.second.weight")} == {
        torch.device("cuda", 1)
    }
