"""What the arguments of dispatching mean, on the CPU and on an accelerator; without one, the meta
device stands for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerators import KIND, RUNNERS, TIERS, needs_one
from shardkit.errors import Mismatch
from shardkit.load.dispatch import accelerate_api, attach
from shardkit.load.dispatch.accelerate_api import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
)
from shardkit.load.dispatch.attachments import attachments
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.streamed_weight import Streamed

WIDTH = 8
X = torch.linspace(-1, 1, WIDTH)


class Pair(nn.Module):
    """Two layers, of which one is never called: its weight is used by the other's owner."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = (
            self.first(x) + nn.functional.linear(x, self.second.weight) + self.norm.running_mean
        )
        return summed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.out = nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(
        self, x: torch.Tensor, past: Any = None
    ) -> torch.Tensor:  # Any: whatever is kept from one call to the next
        assert past is None or past["key"][0].is_meta
        made: torch.Tensor = self.out(self.pair(x)) * self.scale
        return made


class Elsewhere(nn.Module):
    """It has no weights, and sees where it is run."""

    def forward(self, x: torch.Tensor, past: list[torch.Tensor]) -> dict[str, Any]:
        assert x.is_meta
        assert not past[0].is_meta
        return {"y": torch.zeros(len(x)), "past": past}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    made = Model().eval()
    made.pair.norm.get_buffer("running_mean").fill_(2)
    return made


@pytest.fixture
def file(model: Model, tmp_path: Path) -> Path:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def paged(model: nn.Module) -> set[str]:
    """The modules that stream as one."""
    names = {module: name for name, module in model.named_modules()}
    return {names[module] for module, *_, each in attachments(model) if isinstance(each, Pager)}


def streamed(model: nn.Module) -> set[str]:
    return {
        name
        for name, each in model.state_dict(keep_vars=True).items()
        if isinstance(each, Streamed)
    }


@pytest.fixture(params=RUNNERS)
def device(request: pytest.FixtureRequest) -> str:
    """What the model runs on."""
    runner: str = request.param
    return runner


@pytest.fixture
def expected(model: Model, device: str) -> torch.Tensor:
    logits: torch.Tensor = copy.deepcopy(model).to(device)(X.to(device))
    return logits.cpu()


@pytest.fixture
def ways(file: Path, device: str, tmp_path: Path) -> Callable[..., Iterator[Model]]:
    def ways(**options: Any) -> Iterator[Model]:
        """The model, all of it on disk but for what says where it runs, by every function that
        takes it there.
        """
        device_map = {"": "disk"} | ({} if device == "cpu" else {"scale": device})
        yield load_checkpoint_and_dispatch(Model().eval(), file, device_map, **options)
        in_memory = load_checkpoint_and_dispatch(Model().eval(), file)
        yield dispatch_model(
            in_memory,
            device_map,
            offload_dir=tmp_path / "-".join(["offloaded", *options]),
            **options,
        )

    return ways


Ways = Callable[..., Iterator[Model]]


def test_classes_to_preload_stream_as_one(
    ways: Ways, file: Path, device: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    for each in ways():
        assert paged(each) == {"pair.first", "pair.second", "pair.norm", "out"}
        assert torch.equal(each(X), expected)
    for each in ways(preload_module_classes=["Pair"]):
        assert paged(each) == {"pair", "out"}
        assert torch.equal(each(X), expected)
    for preloaded in ("Pair", ["Pair"]):
        offloaded = disk_offload(
            load_checkpoint_and_dispatch(Model().eval(), file),
            tmp_path / "offload",
            device,
            preload_module_classes=preloaded,
        )
        assert paged(offloaded) == {"pair", "out"}
        assert torch.equal(offloaded(X), expected)


def test_buffers_stay_unless_they_are_to_go(
    ways: Ways, model: Model, expected: torch.Tensor
) -> None:
    buffers = {name for name, _ in model.named_buffers()}
    for each in ways():
        assert not streamed(each) & buffers
    for each in ways(offload_buffers=True):
        assert buffers < streamed(each)
        assert torch.equal(each(X), expected)


def test_keys_that_are_skipped_stay_where_they_are(ways: Ways, expected: torch.Tensor) -> None:
    past = {"key": [torch.ones(1, device="meta")]}
    for each in ways(skip_keys="past"):
        assert torch.equal(each(X, past=past), expected)
    for each in ways():
        with pytest.raises(
            NotImplementedError, match="meta"
        ):  # what has no values cannot come to where the model runs
            each(X, past=past)


def test_the_main_device_runs_what_no_accelerator_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        accelerate_api,
        "torch_device",
        lambda device: torch.device("cpu" if device == "cpu" else "meta"),
    )
    monkeypatch.setattr(attach, "device_key", lambda device: 0)  # the meta device has none
    for main in (0, "cuda:1", torch.device("cuda")):
        run = dispatch_model(Elsewhere(), {"": "cpu"}, main, skip_keys=["past"], force_hooks=True)
        assert not run(X, past=[torch.ones(1)])["y"].is_meta  # it goes back to where the input was
    run = cpu_offload(Elsewhere(), 0)
    with pytest.raises(AssertionError):  # no key is skipped
        run(X, past=[torch.ones(1)])
    assert not list(attachments(dispatch_model(Elsewhere(), {"": "cpu"}, 0)))


@pytest.mark.parametrize(
    "main",
    [pytest.param(main, marks=needs_one) for main in (0, f"{KIND}:0", torch.device(KIND, 0))],
)
def test_a_main_device_that_is_there_runs_what_lies_on_cpu_and_disk(
    main: int | str | torch.device, model: Model, tmp_path: Path
) -> None:
    expected = copy.deepcopy(model).to(KIND)(X.to(KIND)).cpu()
    run = dispatch_model(model, {"": "cpu", "pair": "disk"}, main, offload_dir=tmp_path / "out")
    assert paged(run) == {"pair.first", "pair.second", "pair.norm", "out"}
    assert {tensor.device.type for tensor in run.state_dict().values()} == {KIND}
    for _ in range(2):
        assert torch.equal(run(X), expected)


@pytest.mark.parametrize("device_map", [*TIERS, "auto", None])
def test_strict_means_both_directions_before_a_weight_is_touched(
    device_map: Any, model: Model, tmp_path: Path
) -> None:
    device_map = {"": device_map} if device_map in ("cpu", "disk", 0) else device_map
    state = model.state_dict()
    save_file(
        {name: tensor for name, tensor in state.items() if name != "out.bias"},
        tmp_path / "less.safetensors",
    )
    save_file(state | {"more": torch.ones(1)}, tmp_path / "more.safetensors")
    for name in ("less", "more"):
        fresh = Model()
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        with pytest.raises(Mismatch, match=r"out\.bias" if name == "less" else "more"):
            load_checkpoint_and_dispatch(
                fresh, tmp_path / f"{name}.safetensors", device_map, strict=True
            )
        assert all(torch.equal(tensor, before[each]) for each, tensor in fresh.state_dict().items())
        assert not list(attachments(fresh))
        with pytest.warns(UserWarning, match=r"out\.bias" if name == "less" else "more"):
            load_checkpoint_and_dispatch(fresh, tmp_path / f"{name}.safetensors", device_map)
        assert torch.equal(
            fresh.out.bias.cpu(), before["out.bias"] if name == "less" else state["out.bias"]
        )
        assert len({tensor.device for tensor in fresh.state_dict().values()}) == 1
