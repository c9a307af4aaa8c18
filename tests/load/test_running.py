"""Models that run on the CPU or an accelerator, over all tiers, are the models that they were,
whatever is asked of them.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerators import RUNNERS
from shardkit.errors import LoadError, Mismatch, NotTrained
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.dispatch.accelerate_api import dispatch_model
from shardkit.load.dispatch.attachments import attachments, remove_hooks
from shardkit.load.hooks.streaming_hooks import Pager
from toys import (
    IDS,
    LAYERS,
    MAPS,
    WIDTH,
    Toy,
    empty,
    layer,
    loaded,
    logits,
    resident_on,
    run_on,
    saved,
    streamed,
    trained,
)

Load = Callable[..., Toy]


@pytest.fixture(params=RUNNERS)
def device(request: pytest.FixtureRequest) -> str:
    """What the model runs on."""
    runner: str = request.param
    return runner


@pytest.fixture
def resident(device: str) -> Toy:
    """The same model, wholly there."""
    return resident_on(device)


@pytest.fixture
def expected(resident: Toy) -> torch.Tensor:
    with torch.no_grad():
        return logits(resident)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(trained(), tmp_path)


@pytest.fixture
def load(file: Path, device: str) -> Load:
    """Load it from its file, so that it runs there."""

    def load(device_map: Any = "disk", **options: Any) -> Toy:  # Any: as each test needs them
        return loaded(file, device, device_map, **options)

    return load


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("name", MAPS)
def test_every_map_of_every_format_computes_the_same_bits(
    name: str, kind: str, device: str, resident: Toy, expected: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = saved(trained(), tmp_path, kind)
    model = loaded(checkpoint, device, MAPS[name])
    for _ in range(3):
        found = model(IDS)
        assert found.device.type == "cpu"  # where the input came from
        assert torch.equal(found, expected)
    assert torch.equal(logits(model), expected)
    assert not any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values())
    assert isinstance(model.hf_device_map, dict)
    reported = {key: device_of(key, model.hf_device_map) for key in model.state_dict()}
    assert {key for key, each in reported.items() if each == "disk"} == streamed(model)
    assert {str(each) for key, each in reported.items() if key not in streamed(model)} <= {
        device,
        "cpu",
    }
    assert model.hf_device_map.keys() >= run_on(MAPS[name], device).keys()
    stored = resident.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor + 0, stored[key] + 0), key
    assert os.listdir(tmp_path) == [checkpoint.name]


def test_the_map_says_what_streams_and_a_prefix_is_a_module(load: Load, device: str) -> None:
    names = streamed(load({"": device, "layers.1": "disk"}))
    assert names == {
        f"layers.1.{each}"
        for each in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    }


def test_what_is_tied_or_owned_by_what_contains_blocks_stays_and_is_one(load: Load) -> None:
    model = load()
    assert model.embed.weight is model.head.weight
    assert not streamed(model) & {"embed.weight", "head.weight", "scale", "shift"}
    assert model.scale.requires_grad
    assert not layer(model, 0).up.weight.requires_grad


def test_buffers_on_disk_have_the_values_of_the_checkpoint(
    load: Load, resident: Toy, expected: torch.Tensor
) -> None:
    stays, streams = load(), load(offload_buffers=True)
    for model in (stays, streams):
        mean = layer(model, 3).norm.get_buffer("running_mean")
        assert torch.equal(mean + 0, layer(resident, 3).norm.get_buffer("running_mean"))
        assert torch.equal(model(IDS), expected)
    assert "layers.3.norm.running_mean" not in streamed(stays)
    assert "layers.3.norm.running_mean" in streamed(streams)


@pytest.mark.parametrize("ring", [2, 4])
def test_four_threads_give_1200_right_answers(
    load: Load, expected: torch.Tensor, ring: int
) -> None:
    model = load(ring=ring)
    right: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            right.extend(torch.equal(model(IDS), expected) for _ in range(300))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert right == [True] * 1200


ORDERS = [[0, 1, 2], [10, 3, 3, 3, 0], list(range(LAYERS))[::-1], [1, 10, 1, 10], [5]]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_blocks_may_be_reused_skipped_and_reordered(
    load: Load, resident: Toy, order: list[int]
) -> None:
    model = load(ring=2)
    model(IDS)
    model.order = resident.order = order
    for _ in range(3):
        assert torch.equal(logits(model), logits(resident))


def test_weights_may_be_used_without_their_blocks_forward(
    load: Load, resident: Toy, device: str
) -> None:
    model = load()
    x = torch.linspace(-1, 1, 5 * WIDTH, device=device).reshape(5, WIDTH)
    block, same = layer(model, 1), layer(resident, 1)
    assert torch.equal(block.up.weight @ x.T, same.up.weight @ x.T)
    assert torch.equal(block.up(x), same.up(x))
    assert torch.equal(block.forward(x), same(x))
    assert torch.equal(
        nn.functional.linear(x, block.up.weight[:3]), nn.functional.linear(x, same.up.weight[:3])
    )
    assert next(block.parameters()).device == torch.device(device)


def test_a_block_may_read_its_own_and_others_weights(load: Load, resident: Toy) -> None:
    model = load(ring=2)
    seen: list[bool] = []
    model.before = lambda number: seen.append(
        torch.equal(layer(model, -1 - number).up.weight + 0, layer(resident, -1 - number).up.weight)
    )
    model(IDS)
    assert seen == [True] * LAYERS


def test_a_copy_shares_the_stream_and_nothing_else(
    load: Load, expected: torch.Tensor, device: str
) -> None:
    model = load(ring=2)
    twin = copy.deepcopy(model)
    streams = [
        {each.stream for _, _, _, each in attachments(each) if isinstance(each, Pager)}
        for each in (model, twin)
    ]
    assert streams[0] == streams[1]
    assert streamed(twin) == streamed(model)
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not model.head.weight
    with torch.no_grad():
        twin.scale.zero_()
    assert torch.equal(model(IDS), expected)
    assert not torch.equal(twin(IDS), expected)
    block, x = copy.deepcopy(layer(model, 2)), torch.ones(2, WIDTH, device=device)
    del model
    gc.collect()
    assert torch.equal(block(x), layer(twin, 2)(x))


def test_the_state_dict_reads_nothing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    monkeypatch.setattr("shardkit.load.lazy.paged.read_into", lambda *_: pytest.fail("read"))
    assert list(model.state_dict()) == list(empty().state_dict())


def test_a_model_that_streams_cannot_be_moved_and_may_be_cast(
    load: Load, resident: Toy, device: str
) -> None:
    model = load()
    block = layer(model, 0)
    moves: dict[str, Callable[[], object]] = {
        "meta": lambda: block.to("meta"),
        "cuda": block.cuda,
        "xpu": block.xpu,
    }
    for kind in moves.keys() - {torch.device(device).type}:
        with pytest.raises(LoadError, match="cannot be moved"):
            moves[kind]()
    assert model.to(device) is model
    half, same = model.to(torch.bfloat16), resident.to(torch.bfloat16)
    assert torch.equal(logits(half), logits(same))
    assert torch.equal(logits(half.to(torch.bfloat16)), logits(same))


def test_what_is_put_in_a_weights_place_stays_there(load: Load, resident: Toy, device: str) -> None:
    model = load()
    for each in (model, resident):
        torch.manual_seed(3)
        layer(each, 2).up.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH).to(device))
    for _ in range(2):
        assert torch.equal(logits(model), logits(resident))
    assert layer(model, 2).up.weight.requires_grad


def test_what_stays_learns_as_it_would_have(load: Load, resident: Toy, device: str) -> None:
    model = load({"": device, "layers.0": "disk"})
    layer(model, 0).requires_grad_(False)
    for each in (model, resident):
        torch.autograd.backward(logits(each).sum())
    learned, same = layer(model, 5).up.weight.grad, layer(resident, 5).up.weight.grad
    assert learned is not None
    assert same is not None
    assert torch.equal(learned, same)
    assert layer(model, 0).up.weight.grad is None


def test_a_backward_that_comes_too_late_raises(load: Load) -> None:
    loss = load(ring=2)(IDS).sum()
    with pytest.raises(
        NotTrained, match=r"backward needs 'layers\.\d+\.\w+\.\w+' and \d more: they stream"
    ) as caught:
        loss.backward()
    assert isinstance(caught.value, RuntimeError)
    assert "gradient checkpointing" in str(caught.value.hint)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_modes_of_torch_change_nothing(
    load: Load, expected: torch.Tensor, mode: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    model = load(ring=2)
    for _ in range(2):
        with mode():
            assert torch.equal(model(IDS), expected)
    assert torch.equal(model(IDS), expected)


def test_autocast_computes_the_same_bits(load: Load, resident: Toy, device: str) -> None:
    model = load(ring=2)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        for _ in range(2):
            assert torch.equal(logits(model), logits(resident))


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_a_dtype_is_given_while_weights_are_read(
    load: Load, resident: Toy, mode: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    model, same = load(MAPS["half"], dtype="bfloat16"), resident.to(torch.bfloat16)
    model.table = model.table.bfloat16()
    with mode():
        assert torch.equal(logits(model), logits(same))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_a_model_may_be_dispatched_anew(load: Load, expected: torch.Tensor, device: str) -> None:
    model = load()
    for name in ("disk", "half", "half"):
        assert torch.equal(dispatch_model(model, run_on(MAPS[name], device))(IDS), expected)
        with pytest.raises(LoadError, match="no device"):
            dispatch_model(model, {"layers": "cpu"})
        assert torch.equal(model(IDS), expected)
    assert (
        len({each.stream for _, _, _, each in attachments(model) if isinstance(each, Pager)}) == 1
    )


def test_a_model_in_memory_is_dispatched_to_a_new_folder(
    device: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    half = run_on(MAPS["half"], device)
    for _ in range(2):  # the second time, the folder holds just these weights
        model = dispatch_model(trained(), half, offload_dir=tmp_path / "out")
        assert streamed(model)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model(IDS), expected)
    with pytest.raises(LoadError, match="no offload_dir"):
        dispatch_model(trained(), half)
    other = trained()
    with torch.no_grad():
        layer(other, 4).up.weight.add_(1)
    with pytest.raises(LoadError, match="holds weights of another model"):
        dispatch_model(other, half, offload_dir=tmp_path / "out")


def test_an_empty_model_is_dispatched_to_what_a_folder_and_a_state_dict_hold(
    file: Path, device: str, expected: torch.Tensor
) -> None:
    stored = trained().state_dict()
    maps = {name: run_on(MAPS[name], device) for name in ("cpu", "half", "disk")}
    state = {name: tensor for name, tensor in stored.items() if not name.startswith("layers.")}
    model = dispatch_model(empty(), maps["half"], state_dict=state, offload_dir=file.parent)
    assert torch.equal(model(IDS), expected)
    index = {
        name: {"safetensors_file": str(file), "weight_name": name}
        for name in stored
        if name != "head.weight"
    }
    model = dispatch_model(empty(), maps["disk"], offload_index=index)
    assert torch.equal(model(IDS), expected)
    with pytest.raises(LoadError, match="weights without values"):
        dispatch_model(empty(), maps["disk"])
    with pytest.raises(LoadError, match="safetensors_file"):
        dispatch_model(empty(), maps["disk"], offload_index={"scale": {"dtype": "float32"}})
    with pytest.raises(Mismatch, match="state dict"):
        dispatch_model(empty(), maps["cpu"], state_dict={"scale": torch.ones(3)})


def test_a_loaded_model_without_hooks_reads_what_it_uses(
    load: Load, expected: torch.Tensor
) -> None:
    model = load()
    remove_hooks(model)
    assert torch.equal(logits(model), expected)
