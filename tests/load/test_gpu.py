"""What only an accelerator has: memory of its own, pinned copies, streams, and others beside it.

What holds on every device is in the tests that run on each, as those of forwards in `test_running`
and `test_endings`.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerators import KIND, device, needs_one, needs_two
from shardkit.errors import LoadError
from shardkit.load import (
    close,
    cpu_offload_with_hook,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    save,
)
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.memory.pinned_payload import PinnedPayload

pytestmark = needs_one

WIDTH, LAYERS = 512, 12
BLOCK = 2 * (WIDTH * WIDTH + WIDTH) * 4  # bytes of its weights
SLACK = 4 << 20  # bytes of activations and of rounding by the allocator
Map = dict[str, int | str | torch.device]
Budgets = dict[int | str | torch.device, int | float | str]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.head.weight = self.embed.weight
        self.fails = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for number, layer in enumerate(self.layers):
            if self.fails and number == LAYERS // 2:
                raise ValueError("as it was told")
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


IDS = torch.arange(10)


@pytest.fixture(scope="module")
def resident() -> Model:
    """All on the CPU."""
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def expected(resident: Model) -> torch.Tensor:
    """What the model computes that is wholly on the device."""
    with torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(resident).to(KIND)(IDS.to(KIND)).cpu()
    return logits


@pytest.fixture
def file(resident: Model, tmp_path: Path) -> Path:
    state = {
        name: tensor for name, tensor in resident.state_dict().items() if name != "head.weight"
    }
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def _device_is_left_clean() -> Iterator[None]:
    with torch.no_grad():
        yield
    device.synchronize()


def empty() -> Model:
    with init_empty_weights():
        return Model().eval()


def loaded(file: Path, device_map: Map | str, **options: Any) -> Model:
    return load_checkpoint_and_dispatch(empty(), file, device_map, **options)


MAPS: dict[str, Map] = {
    "cuda": {"": 0},
    "cpu": {"": "cpu", "embed": 0},
    "disk": {"": "disk", "embed": 0},
    "all": {
        "": 0,
        "layers.0": "cpu",
        "layers.1": "cpu",
        "layers.3": "cpu",
        "layers.5": "disk",
        "layers.9": "disk",
    },
    "words": {"": f"{KIND}:0", "layers": torch.device(KIND, 0), "layers.10": "disk"},
}


@pytest.mark.parametrize("name", MAPS)
def test_every_map_computes_the_same_bits(name: str, file: Path, expected: torch.Tensor) -> None:
    model = loaded(
        file, MAPS[name], ring=2, force_hooks=True
    )  # which tells only where all is on one device
    for _ in range(3):
        found = model(IDS)
        assert found.device.type == "cpu"  # where the input came from
        assert torch.equal(found, expected)
    assert torch.equal(model(IDS.to(KIND)).cpu(), expected)


def test_the_numbers_are_those_of_the_cpu(file: Path, resident: Model) -> None:
    torch.testing.assert_close(loaded(file, MAPS["all"])(IDS), resident(IDS), rtol=1e-3, atol=1e-3)


def test_the_guide_runs_over_all_three_tiers(file: Path, expected: torch.Tensor) -> None:
    budgets: Budgets = {0: 5 * BLOCK, "cpu": 4 * BLOCK}
    model = loaded(file, "auto", max_memory=budgets, no_split_module_classes=["Block"])
    assert isinstance(model.hf_device_map, dict)
    assert set(model.hf_device_map.values()) == {0, "cpu", "disk"}
    assert torch.equal(model(IDS), expected)


def test_a_checkpoint_comes_into_the_memory_of_the_device(file: Path, resident: Model) -> None:
    model = empty()
    load_checkpoint_in_model(model, file, {"": 0})
    assert {tensor.device.type for tensor in model.state_dict().values()} == {KIND}
    assert model.head.weight is model.embed.weight
    assert all(
        torch.equal(tensor.cpu(), resident.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )


def test_what_streams_says_the_device_that_it_runs_on(
    file: Path, resident: Model, tmp_path: Path
) -> None:
    model = loaded(file, MAPS["all"])
    assert {parameter.device.type for parameter in model.parameters()} == {KIND}
    weight = model.get_parameter("layers.5.up.weight")
    assert torch.equal((weight + 0).cpu(), resident.get_parameter("layers.5.up.weight"))
    save(model, tmp_path / "out")
    again = Model()
    load_checkpoint_in_model(again, tmp_path / "out", strict=True)
    assert all(
        torch.equal(tensor, resident.state_dict()[name])
        for name, tensor in again.state_dict().items()
    )


def test_what_lies_on_the_cpu_is_sent_from_where_it_lies(
    file: Path, expected: torch.Tensor
) -> None:
    pinned_by_torch = host_bytes()
    model = loaded(file, MAPS["cpu"], ring=2)
    for _ in range(3):
        assert torch.equal(model(IDS), expected)
    storages = [each.recipe.storage for each in model.parameters() if isinstance(each, Streamed)]
    blocks = {each.block for each in storages if isinstance(each, PinnedPayload)}
    assert len(blocks) == LAYERS
    assert all(block.memory.is_pinned() and len(block.memory) == BLOCK for block in blocks)
    assert host_bytes() <= pinned_by_torch
    os.remove(file)
    assert torch.equal(model(IDS), expected)
    close(model)


def host_bytes() -> int:
    """What torch itself has pinned; CUDA alone pins memory in exact size, and says what it has."""
    pinned: int = (
        device.host_memory_stats().get("allocated_bytes.current", 0) if KIND == "cuda" else 0
    )
    return pinned


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("ring", [2, 4])
def test_the_device_holds_what_stays_and_the_ring(
    tier: str, ring: int, file: Path, expected: torch.Tensor
) -> None:
    before = device.memory_allocated()  # when what the device needs to compute at all is there
    model = loaded(file, {"": tier, "embed": 0}, ring=ring)
    device.reset_peak_memory_stats()
    for _ in range(3):
        assert torch.equal(model(IDS), expected)
    device.synchronize()
    assert device.max_memory_allocated() - before <= ring * BLOCK + SLACK
    close(model)


def test_an_exception_leaves_nothing_on_the_device_and_closing_gives_all_back(
    file: Path, expected: torch.Tensor
) -> None:
    before = device.memory_allocated()
    model = loaded(file, MAPS["disk"], ring=2)
    assert torch.equal(model(IDS), expected)
    held = device.memory_allocated()
    model.fails = True
    for _ in range(5):
        with pytest.raises(ValueError, match="as it was told"):
            model(IDS)
    model.fails = False
    assert torch.equal(model(IDS), expected)
    device.synchronize()
    assert device.memory_allocated() <= held
    close(model)
    assert torch.equal(model(IDS), expected)
    del model
    device.synchronize()
    assert device.memory_allocated() <= before


def test_four_threads_with_streams_of_their_own_share_a_ring_of_two(
    file: Path, expected: torch.Tensor
) -> None:
    model, ids = loaded(file, MAPS["disk"], ring=2), IDS.to(KIND)
    right: list[bool] = []

    def run() -> None:
        stream = torch.Stream(device=KIND)
        with torch.no_grad(), stream:
            right.extend(torch.equal(model(ids).cpu(), expected) for _ in range(50))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert right == [True] * 200


def test_work_on_a_stream_of_the_caller_waits_for_its_weights(
    file: Path, expected: torch.Tensor
) -> None:
    model, stream = loaded(file, MAPS["all"], ring=2), torch.Stream(device=KIND)
    ids = IDS.to(KIND)
    for _ in range(5):
        stream.wait_stream(torch.accelerator.current_stream())
        with stream:
            found = model(ids)
        stream.synchronize()
        assert torch.equal(found.cpu(), expected)


def test_models_take_turns_on_the_device(resident: Model, expected: torch.Tensor) -> None:
    first, hook = cpu_offload_with_hook(copy.deepcopy(resident), 0)
    second, _ = cpu_offload_with_hook(
        copy.deepcopy(resident), prev_module_hook=hook
    )  # to the one that there is
    assert devices_of(first, ["embed.weight"]) == [None]
    assert torch.equal(first(IDS).cpu(), expected)
    assert devices_of(first, ["embed.weight"]) == [0]
    assert torch.equal(second(IDS).cpu(), expected)
    assert devices_of(first, ["embed.weight"]) == [None]
    assert devices_of(second, ["embed.weight"]) == [0]


def devices_of(model: Model, names: Sequence[str]) -> list[int | None]:
    return [model.get_parameter(name).device.index for name in names]


@needs_two
def test_several_devices_are_a_pipeline_in_one_process(file: Path, expected: torch.Tensor) -> None:
    second: Map = {f"layers.{number}": 1 for number in range(6, LAYERS)}
    model = loaded(file, {"": 0} | second)
    assert devices_of(model, ["embed.weight", "layers.5.up.weight", "layers.6.up.weight"]) == [
        0,
        0,
        1,
    ]
    for _ in range(3):
        torch.testing.assert_close(model(IDS), expected)
    model = loaded(file, {"": 0, "layers.3": "cpu", "layers.7": 1, "layers.8": "disk"}, ring=2)
    for _ in range(3):
        torch.testing.assert_close(model(IDS), expected)


@needs_two
def test_balanced_spreads_a_model_over_the_devices(file: Path, expected: torch.Tensor) -> None:
    model = loaded(
        file,
        "balanced",
        max_memory={0: 10 * BLOCK, 1: 10 * BLOCK},
        no_split_module_classes=["Block"],
    )
    assert isinstance(model.hf_device_map, dict)
    assert set(model.hf_device_map.values()) == {0, 1}
    torch.testing.assert_close(model(IDS), expected)


@needs_two
def test_what_streams_to_one_device_cannot_be_moved_to_the_other(
    file: Path, expected: torch.Tensor
) -> None:
    model = loaded(file, MAPS["disk"])
    assert model.to(f"{KIND}:0") is model
    with pytest.raises(LoadError, match="cannot be moved"):
        model.layers[0].to(f"{KIND}:1")
    assert torch.equal(model(IDS), expected)
