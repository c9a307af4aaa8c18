"""Inputs and outputs go where they are needed; what need not move is left alone. The meta device
stands for an accelerator.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from shardkit.load.hooks.device_moves import Mover, RoundTrip, attach_movers, device_of_first, moved

CPU, META = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", "left right")


def devices(value: Any) -> list[str]:  # Any: nested containers
    match value:
        case torch.Tensor():
            return [value.device.type]
        case dict():
            return [device for part in value.values() for device in devices(part)]
        case tuple() | list():
            return [device for part in value for device in devices(part)]
    return []


VALUES: list[Any] = [
    torch.ones(2),
    (torch.ones(2), 3, "text", None),
    [torch.ones(2), {"a": (torch.ones(1),)}],
    Pair(torch.ones(2), [torch.ones(1)]),
    OrderedDict(a=torch.ones(2), b={"c": [torch.ones(1)]}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_tensor_moves_and_containers_keep_their_type(value: Any) -> None:
    there = moved(value, META)
    assert type(there) is type(value)
    assert set(devices(there)) == {"meta"}
    assert len(devices(there)) == len(devices(value))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_is_there_already_is_the_same_object(value: Any) -> None:
    assert moved(value, CPU) is value


def test_a_key_that_is_skipped_stays() -> None:
    cache = [torch.ones(1)]
    there = moved({"past": cache, "x": torch.ones(1)}, META, {"past"})
    assert there["past"] is cache
    assert there["x"].is_meta


def test_outputs_of_model_libraries_keep_their_type() -> None:
    outputs = pytest.importorskip("transformers").modeling_outputs.BaseModelOutput(
        last_hidden_state=torch.ones(1)
    )
    there = moved(outputs, META)
    assert type(there) is type(outputs)
    assert there.last_hidden_state.is_meta


def test_the_first_tensor_is_found_in_any_depth() -> None:
    assert device_of_first(((), {"a": [3, {"b": torch.ones(1, device="meta")}]})) == META
    assert device_of_first("text") is None


class Doubling(nn.Module):
    def forward(
        self, x: torch.Tensor, *, past: list[torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        assert x.is_meta
        assert past is None or not past[0].is_meta
        if len(x) == 3:
            raise ValueError("three")
        return {"y": torch.zeros_like(x, device="cpu")}


def test_a_module_gets_its_inputs_where_it_runs() -> None:
    module = Doubling()
    Mover(META, {"past"}).attach(module)
    assert not module(torch.ones(2), past=[torch.ones(1)])["y"].is_meta


def test_a_model_gives_its_output_where_its_input_was() -> None:
    model = Doubling()
    RoundTrip(META).attach(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^three$"):
            model(torch.ones(3))
        assert model(torch.ones(2, device="meta"))["y"].is_meta
        assert not model(torch.ones(2))["y"].is_meta


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # since Python 3.14
def test_what_is_compiled_by_torch_jit_takes_no_hooks_and_is_passed_over() -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    )
    attach_movers(model, lambda _: META, META)
    assert [bool(module._forward_pre_hooks) for module in model] == [True, False]
