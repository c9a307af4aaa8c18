"""What a device map says of a part of a model, and what torch calls its device."""

from __future__ import annotations

import pytest
import torch

from accelerators import KIND, RUNNERS, needs_one
from libraries import peer
from shardkit.errors import LoadError
from shardkit.load.devices.budgets import Device
from shardkit.load.devices.device_lookup import device_of, main_device, torch_device

integration = peer("transformers.integrations.accelerate")


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
    with pytest.raises(LoadError, match=r"has no device for 'b\.weight'"):
        device_of("b.weight", {"a": 0})


@pytest.mark.parametrize("device", RUNNERS)
def test_a_device_has_the_number_that_tensors_on_it_have(device: str) -> None:
    kind = torch.device(device).type
    assert torch_device(kind) == torch.ones(1).to(kind).device


@pytest.mark.parametrize("device", [99, "cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_named(device: Device) -> None:
    with pytest.raises(LoadError, match=str(device)):
        torch_device(device)


@pytest.mark.parametrize("device_map", [{}, {"": "disk"}, {"a": "disk", "b": "cpu"}])
def test_a_model_without_an_accelerator_runs_on_the_cpu(device_map: dict[str, Device]) -> None:
    assert main_device(device_map) == torch.device("cpu")


@pytest.mark.parametrize("number", [pytest.param(0, marks=needs_one)])
def test_a_number_is_that_of_an_accelerator(number: int) -> None:
    assert torch_device(number) == torch.device(KIND, number)
    assert main_device({"a": "disk", "b": number, "c": "cpu"}) == torch.device(KIND, number)
