"""Whole models that take turns on a device. The meta device, which is easily told from the CPU,
cannot come back from it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.hooks.turn_taking import cpu_offload_with_hook


def test_a_model_runs_where_it_is_told_to_and_makes_room_for_the_next() -> None:
    first, hook = cpu_offload_with_hook(nn.Linear(2, 2), "cpu")
    second, other = cpu_offload_with_hook(nn.Linear(2, 2), "cpu", hook)
    moves: list[str] = []

    def count(*_: object) -> nn.Module:
        moves.append("first")
        return first

    first._apply = count  # type: ignore[method-assign]  # what every move of a module comes to
    x = torch.ones(1, 2)
    first(x)
    assert moves == ["first"]
    second(x)
    assert moves == ["first", "first"]
    other.remove()
    second(x)
    assert moves == ["first", "first"]
    hook.offload()
    assert moves == ["first"] * 3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(LoadError, match="accelerator"):
        cpu_offload_with_hook(nn.Linear(2, 2), 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_where_torch_is_made_for_a_device_that_is_not_there_the_cpu_runs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    model, _ = cpu_offload_with_hook(nn.Linear(2, 2))
    assert model(torch.ones(1, 2)).device.type == "cpu"
