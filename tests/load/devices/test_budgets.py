"""Budgets: what users write, what devices have, and how a model is spread; compared with
Accelerate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from libraries import as_of, peer
from shardkit.errors import BadSize, LoadError
from shardkit.load.devices import budgets
from shardkit.load.devices.budgets import get_max_memory
from shardkit.load.modules.sizes import module_sizes
from shardkit.load.placement.infer_device_map import get_balanced_memory, infer_auto_device_map
from shardkit.system.free_memory import available_memory

theirs = peer("accelerate.utils")

GIB = 1 << 30

# An older one has torch make a device of each number, which takes an accelerator.
spread_by_accelerate = as_of("accelerate", "1.15")

Budgets = dict[int | str | torch.device, int | float | str]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # Accelerate warns of devices that this machine has not
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({0: 10, "cpu": 5}, {0: 10, "cpu": 5}),
        (
            {"disk": 7, "cpu": "1GiB", 2: "2GB", 0: "500MB"},
            {0: 500_000_000, 2: 2_000_000_000, "cpu": GIB, "disk": 7},
        ),
        ({"cpu": "1.5GB", 1: 0}, {1: 0, "cpu": 1_500_000_000}),
        ({"mps": "3KB"}, {"mps": 3000}),
    ],
    ids=["bytes", "units", "zero", "mps"],
)
def test_budgets_are_read_as_by_accelerate(said: Any, meant: dict[object, int]) -> None:
    assert get_max_memory(said) == theirs.get_max_memory(dict(said)) == meant
    assert list(get_max_memory(said)) == list(theirs.get_max_memory(dict(said)))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"cuda:1": "1GB", torch.device("cpu"): 5}, {1: 1_000_000_000, "cpu": 5}),
        ({torch.device("cuda", 3): 1, "cpu": 0}, {3: 1, "cpu": 0}),
        ({"xpu:0": 9.75, "cpu": 1e3}, {0: 9, "cpu": 1000}),
        ({"cuda": 1, "cpu": "0GB"}, {0: 1, "cpu": 0}),
        ({torch.device("mps"): "2 TiB"}, {"mps": 2 << 40}),
    ],
    ids=["names", "devices", "floats", "no number", "tebibytes"],
)
def test_budgets_are_read_that_accelerate_refuses(said: Any, meant: dict[object, int]) -> None:
    assert get_max_memory(said) == meant
    with pytest.raises(ValueError, match=r"Device .* is not recognized|not in a valid format"):
        theirs.get_max_memory(dict(said))


@pytest.mark.parametrize("size", ["10gb", "10Gb", "10GB"])
def test_a_lower_case_b_is_no_bit(size: str) -> None:
    assert get_max_memory({0: size, "cpu": 0})[0] == 10**10
    assert theirs.get_max_memory({0: size, "cpu": 0})[0] == (
        10**10 if size == "10GB" else 10**10 // 8
    )


def test_a_cpu_that_is_left_out_has_what_is_available() -> None:
    assert theirs.get_max_memory({0: "1GB"}) == {0: 10**9}
    ours = get_max_memory({0: "1GB"})
    assert 0 < ours["cpu"] < 1 << 60
    assert list(ours) == [0, "cpu"]
    assert "cpu" not in get_max_memory({"mps": "1GB"})  # it is the same memory


def test_the_dictionary_of_the_caller_stays_as_it_is() -> None:
    said: Budgets = {1: "1GB", 0: "1GB", "cpu": "1GB"}
    get_max_memory(said)
    assert list(said.items()) == [(1, "1GB"), (0, "1GB"), ("cpu", "1GB")]


def test_a_percentage_is_of_what_the_device_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "available_memory", lambda: 1000)
    monkeypatch.setattr(budgets, "_free_on_accelerator", lambda index: 500 if index == 0 else None)
    assert get_max_memory({"cpu": "80%", 0: "12.5 %"}) == {0: 62, "cpu": 800}
    with pytest.raises(LoadError, match="the free memory of device 1 is unknown"):
        get_max_memory({1: "80%"})
    with pytest.raises(LoadError, match="free memory of device 'disk' is unknown"):
        get_max_memory({"disk": "80%"})


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"tpu:x": 1}, "'tpu:x' is not a device"),
        ({-1: 1}, "-1 is not a device"),
        ({True: 1}, "True is not a device"),
        ({"meta": 1}, "the meta device holds no weights"),
        ({None: 1}, "None is not a device"),
        ({0: 1, "cuda:0": 2}, "two sizes for device 0"),
        ({0: -5}, "-5 is not a size for device 0"),
        ({0: float("nan")}, "nan is not a size"),
        ({0: None}, "None is not a size"),
        ({0: True}, "True is not a size"),
    ],
)
def test_what_cannot_be_a_budget_is_refused(said: Any, sentence: str) -> None:
    with pytest.raises(LoadError, match=sentence):
        get_max_memory(said)


def test_what_cannot_be_a_size_is_refused() -> None:
    with pytest.raises(BadSize, match="'ten' is not a size"):
        get_max_memory({0: "ten"})


def test_this_machine_has_a_cpu() -> None:
    there = get_max_memory()
    if not torch.accelerator.is_available():
        assert list(there) == ["cpu"]
        assert abs(there["cpu"] - available_memory()) < GIB


class Machine:
    """A machine with accelerators that have so many bytes free, taken by torch, and used of those;
    None does not answer.
    """

    def __init__(
        self, *devices: tuple[int, int, int] | None, kind: str = "cuda", integrated: bool = False
    ) -> None:
        self.devices, self.kind, self.is_integrated = devices, kind, integrated

    def mem_get_info(self, index: int) -> tuple[int, int]:
        device = self.devices[index]
        if device is None:
            raise RuntimeError("CUDA error: all devices are busy or unavailable")
        return device[0], 10**12

    def memory_reserved(self, index: int) -> int:
        return (self.devices[index] or (0, 0, 0))[1]

    def memory_allocated(self, index: int) -> int:
        return (self.devices[index] or (0, 0, 0))[2]

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "device_count", lambda: len(self.devices))
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(self.kind))
        patch.setattr(torch, "get_device_module", lambda kind: self)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: self)
        patch.setattr(budgets, "available_memory", lambda: 7)


@pytest.mark.parametrize(
    ("machine", "there"),
    [
        (Machine((100, 0, 0), (200, 50, 10)), {0: 100, 1: 240, "cpu": 7}),
        (Machine(None, (200, 0, 0)), {1: 200, "cpu": 7}),
        (Machine((100, 0, 0), integrated=True), {0: 100}),
        (Machine((100, 0, 0), kind="xpu"), {0: 100, "cpu": 7}),
        (Machine((100, 0, 0), kind="mps"), {"mps": 7}),
    ],
    ids=["two", "one is busy", "integrated", "xpu", "mps"],
)
def test_what_a_machine_has_is_found(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, there: dict[object, int]
) -> None:
    machine.install(monkeypatch)
    assert get_max_memory() == there


def test_what_is_left_out_has_no_budget_but_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((100, 0, 0), (200, 0, 0)).install(monkeypatch)
    assert get_max_memory({1: 50}) == {1: 50, "cpu": 7}
    assert get_max_memory({"cpu": 5}) == {"cpu": 5}
    assert get_balanced_memory(layers(), {0: 10**6, "cpu": 0}) == {0: 10**6, "cpu": 0}
    assert infer_auto_device_map(layers(), {1: 10**6, "cpu": 0}) == {"": 1}


def test_on_one_accelerator_some_room_is_left_for_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Machine((1000, 0, 0)).install(monkeypatch)
    assert get_balanced_memory(nn.Linear(2, 2)) == {0: 900, "cpu": 7}
    assert get_balanced_memory(nn.Linear(2, 2), {0: 1000, "cpu": 7}) == {0: 1000, "cpu": 7}


class Uneven(nn.Module):
    """Two blocks of one class, of which the second is the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(nn.Linear(10, 10, bias=False))
        self.large = nn.Sequential(nn.Linear(30, 30, bias=False))
        self.rest = nn.ModuleList([nn.Linear(10, 10, bias=False) for _ in range(8)])


def layers() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10)) for _ in range(12)])


@spread_by_accelerate
@pytest.mark.parametrize(
    "build", [layers, lambda: nn.Linear(10, 10), lambda: nn.TransformerEncoderLayer(8, 2, 16)]
)
@pytest.mark.parametrize("low_zero", [False, True])
@pytest.mark.parametrize("classes", [None, "Sequential", ["Linear", "BatchNorm1d"], {"Sequential"}])
def test_models_are_spread_as_by_accelerate(
    build: Callable[[], nn.Module], low_zero: bool, classes: Any
) -> None:
    model = build()
    total = module_sizes(model)[""]
    for count in range(4):
        for share in (1, total // 3, total // 2, total, 3 * total):
            said: Any = {**{number: share + number for number in range(count)}, "cpu": 10}
            ours = get_balanced_memory(model, said, classes, low_zero=low_zero)
            assert ours == theirs.get_balanced_memory(model, dict(said), classes, low_zero=low_zero)


@spread_by_accelerate
def test_numbers_need_not_be_consecutive() -> None:
    model = layers()
    said: Budgets = {0: 6000, 2: 6000, 5: 0, "cpu": 0}
    assert get_balanced_memory(model, said) == theirs.get_balanced_memory(model, dict(said))
    ours = get_balanced_memory(model, said, low_zero=True)
    assert ours == {0: max(0, module_sizes(model)[""] - 6000), 2: 6000, 5: 0, "cpu": 0}
    with pytest.raises(KeyError):
        theirs.get_balanced_memory(model, {0: 6000, 2: 6000, "cpu": 0}, low_zero=True)
    with pytest.raises(KeyError):
        theirs.get_balanced_memory(model, {1: 6000, 2: 6000, "cpu": 0}, low_zero=True)
    assert get_balanced_memory(model, {1: 9000, 2: 9000, "cpu": 0}, low_zero=True)[1] == 0


@spread_by_accelerate
def test_a_first_accelerator_without_budget_needs_no_sparing() -> None:
    model = layers()
    said: Budgets = {0: 0, 1: 9000, 2: 9000, "cpu": 0}
    assert get_balanced_memory(model, said, low_zero=True) == get_balanced_memory(model, said)
    assert (
        theirs.get_balanced_memory(model, dict(said), low_zero=True)[1]
        > get_balanced_memory(model, said)[1]
    )


def test_the_disk_is_no_accelerator() -> None:
    said: Any = {0: 6000, 1: 6000, "cpu": 0, "disk": 100}
    assert get_balanced_memory(layers(), said)["disk"] == 100
    with pytest.raises(RuntimeError):
        theirs.get_balanced_memory(layers(), dict(said))


@spread_by_accelerate
def test_the_slack_is_that_of_the_largest_block_and_not_of_the_first() -> None:
    model = Uneven()
    said: Budgets = {0: 10**6, 1: 10**6, "cpu": 0}
    half = module_sizes(model)[""] // 2
    mean = (
        400 + 3600 + 8 * 400
    ) // 10  # of the innermost modules, which is more than the first block
    assert get_balanced_memory(model, said, "Sequential")[0] == half + int(1.25 * 3600)
    assert theirs.get_balanced_memory(model, dict(said), "Sequential")[0] == half + int(1.25 * mean)
