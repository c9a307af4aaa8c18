"""However a forward, a load, a checkpoint or a model comes to its end, nothing is left behind, and
what goes on is right.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerators import RUNNERS
from shardkit.errors import LoadError, Mismatch
from shardkit.load.dispatch.accelerate_api import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
)
from shardkit.load.dispatch.attachments import attachments, close, remove_hooks
from shardkit.load.hooks.device_moves import Mover, RoundTrip
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.modules.init_empty import init_empty_weights
from toys import (
    IDS,
    MAPS,
    WIDTH,
    Toy,
    held,
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
def expected(device: str) -> torch.Tensor:
    with torch.no_grad():
        return logits(resident_on(device))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(trained(), tmp_path)


@pytest.fixture
def load(file: Path, device: str) -> Load:
    """Load the model from its file, so that it runs there."""

    def load(device_map: Any = "disk", **options: Any) -> Toy:  # Any: as each test needs them
        return loaded(file, device, device_map, **options)

    return load


# Forwards.


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_what_is_raised_in_a_forward_leaves_nothing_resident(
    load: Load, expected: torch.Tensor, error: type[BaseException], inside: bool
) -> None:
    model = load(ring=2)
    addresses = streamed(model)

    def fail(*_: object) -> None:
        raise error

    for _ in range(5):
        if inside:
            handle = layer(model, 4).down.register_forward_pre_hook(fail)
        else:
            handle = layer(model, 4).register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(IDS)
        handle.remove()
        if error is ValueError:
            assert streamed(model) == addresses
        assert torch.equal(model(IDS), expected)
        assert streamed(model) == addresses
    assert held(model) <= 2 * 4 * (2 * 2 * WIDTH * WIDTH + 5 * WIDTH + 64)


def test_what_an_interrupt_leaves_held_is_let_go_when_its_thread_ends_or_by_closing(
    load: Load,
) -> None:
    model = load(ring=2)
    addresses = streamed(model)

    def interrupted() -> None:
        handle = layer(model, 4).down.register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            model(IDS)
        handle.remove()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()
    gc.collect()
    assert streamed(model) == addresses
    interrupted()
    assert streamed(model) < addresses
    close(model)
    assert streamed(model) == addresses


# Checkpoints.


def replaced(file: Path) -> None:
    content = file.read_bytes()
    file.rename(file.with_name("old"))
    file.write_bytes(content)


def overwritten(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")


CHANGES = [
    replaced,
    overwritten,
    lambda file: file.unlink(),
    lambda file: os.truncate(file, file.stat().st_size - 8),
]


@pytest.mark.parametrize("change", CHANGES, ids=["replaced", "overwritten", "removed", "cut"])
def test_a_file_that_changes_is_told_by_name(
    load: Load, file: Path, change: Callable[[Path], None], expected: torch.Tensor, device: str
) -> None:
    model, kept, resident = load(ring=2), load("cpu"), load({"": device})
    model(IDS)
    change(file)
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        model(IDS)
    assert torch.equal(kept(IDS), expected)
    assert torch.equal(resident(IDS), expected)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_touched(
    file: Path, device: str, tmp_path: Path
) -> None:
    with init_empty_weights():
        model = Toy()
        layer(model, 9).up = nn.Linear(WIDTH, 3)
    with pytest.raises(Mismatch) as caught:
        load_checkpoint_and_dispatch(model, file, run_on(MAPS["disk"], device))
    assert set(caught.value.wrong_shape) == {"layers.9.up.weight", "layers.9.up.bias"}
    assert all(tensor.is_meta for tensor in model.parameters())
    state = trained().state_dict()
    tensors = {
        name: tensor
        for name, tensor in state.items()
        if name not in ("layers.3.up.bias", "head.weight")
    }
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(Mismatch, match=r"layers\.3\.up\.bias"):
        loaded(tmp_path / "part.safetensors", device)
    with pytest.raises(Mismatch), warnings.catch_warnings():
        load_checkpoint_and_dispatch(
            trained(), tmp_path / "part.safetensors", run_on(MAPS["disk"], device), strict=True
        )
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "part.safetensors"]


# Models.


def test_closing_gives_everything_back_and_the_model_still_runs(
    load: Load, expected: torch.Tensor
) -> None:
    model = load()
    model(IDS)
    streams = {each.stream for _, _, _, each in attachments(model) if isinstance(each, Pager)}
    assert sum(stream.nbytes for stream in streams)
    twin = copy.deepcopy(model)
    close(model)
    assert sum(stream.nbytes for stream in streams) == 0
    assert {type(each) for _, _, _, each in attachments(model)} | {Mover} == {
        Mover,
        RoundTrip,
    }  # inputs still come there
    assert torch.equal(model(IDS), expected)
    assert torch.equal(twin(IDS), expected)
    close(model)


def test_threads_of_reading_end_with_the_model(load: Load) -> None:
    seen: set[threading.Thread] = set()
    model, before = load(), set(threading.enumerate())  # of which some may be about to end
    model.before = lambda number: seen.update(
        threading.enumerate()
    )  # as they may when there is nothing to read for a while
    model(IDS)
    started = {thread for thread in seen - before if thread.name.startswith("shardkit-stream")}
    assert started
    del model
    gc.collect()
    for thread in started:
        thread.join(200)
    assert not any(thread.is_alive() for thread in started)


Offload = Callable[[Toy, str | None, Path], Toy]
OFFLOADS: dict[str, Offload] = {
    "cpu": lambda model, device, folder: cpu_offload(model, device),
    "disk": lambda model, device, folder: disk_offload(model, folder, device),
    "dispatch": lambda model, device, folder: dispatch_model(
        model, run_on(MAPS["half"], device or "cpu"), offload_dir=folder
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_was_in_memory_is_there_again_when_hooks_are_removed(
    offload: str, device: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    model, same = OFFLOADS[offload](trained(), device, tmp_path / "out"), trained()
    assert torch.equal(model(IDS), expected)
    layers = streamed(model)
    remove_hooks(model)
    assert not streamed(model)
    assert not list(attachments(model))
    assert {model.get_parameter(name).device.type for name in layers} <= {"cpu"}
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(
        torch.equal(tensor.cpu(), same.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    assert torch.equal(logits(model.to(device)), expected)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_model_that_is_offloaded_runs_where_it_was_unless_told_otherwise(
    offload: str, device: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    model = OFFLOADS[offload](resident_on(device), None, tmp_path / "out")
    assert torch.equal(model(IDS), expected)
    assert bool(streamed(model)) == (offload == "disk" or device != "cpu")
    remove_hooks(model)
    assert {tensor.device for tensor in model.parameters()} == {torch.device(device)}
    assert torch.equal(logits(model), expected)
