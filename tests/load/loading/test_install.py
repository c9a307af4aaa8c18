"""Weights are placed where they belong, and a terminal sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardkit.load.dispatch.accelerate_api import dispatch_model, load_checkpoint_and_dispatch
from shardkit.load.loading import install
from shardkit.load.loading.load_checkpoint import load_checkpoint_in_model
from shardkit.load.memory.allocate import Item, materialise
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.payloads.payload import Buffer
from shardkit.system.progress import Progress

Seen = list[tuple[str, int | None, list[int]]]
Load = Callable[[nn.Module, Path], object]

LOADERS: dict[str, Load] = {
    "load_checkpoint_in_model": load_checkpoint_in_model,
    "load_checkpoint_and_dispatch": lambda model, path: load_checkpoint_and_dispatch(
        model, path, {"0": "cpu", "1": "disk"}
    ),
    "dispatch_model": lambda model, path: dispatch_model(
        model, {"0": "cpu", "1": "disk"}, offload_dir=path.parent
    ),
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What a bar would show: its label, its end, and the steps towards it."""
    bars: Seen = []

    class Bar(Progress):
        def __init__(self, steps: list[int]) -> None:
            super().__init__(None)
            self.steps = steps

        def add(self, nbytes: int) -> None:
            self.steps.append(nbytes)

    @contextmanager
    def progress(label: str, nbytes: int | None = None) -> Iterator[Progress]:
        bars.append((label, nbytes, []))
        yield Bar(bars[-1][2])

    monkeypatch.setattr(install, "progress", progress)
    return bars


def file_in(folder: Path) -> Path:
    save_file(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).state_dict(), folder / "model.safetensors"
    )
    return folder / "model.safetensors"


def empty() -> nn.Module:
    with init_empty_weights():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.mark.parametrize("name", LOADERS)
def test_a_bar_shows_each_byte_that_is_placed_once(name: str, seen: Seen, tmp_path: Path) -> None:
    LOADERS[name](empty(), file_in(tmp_path))
    placed = (2 if name == "load_checkpoint_in_model" else 1) * (8 * 8 + 8) * 4
    assert [(label, nbytes, sum(steps)) for label, nbytes, steps in seen if nbytes] == [
        ("placing weights", placed, placed)
    ]


@pytest.mark.parametrize("name", LOADERS)
def test_a_terminal_shows_nothing_that_is_over_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    LOADERS[name](empty(), file_in(tmp_path))
    assert capsys.readouterr() == ("", "")


def test_what_goes_to_another_device_takes_little_main_memory_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    staged: list[int] = []

    def counted(items: Iterable[Item], **options: object) -> list[torch.Tensor]:
        wanted = list(items)
        staged.append(sum(payload.nbytes for payload, _, _ in wanted))
        return materialise(wanted)

    monkeypatch.setattr(install, "materialise", counted)
    monkeypatch.setattr(install, "_STAGED", 100)
    sizes = [40, 40, 40, 300, 8]
    devices = map(torch.device, ["meta", "cpu", "meta", "meta", "cpu"])
    items = [
        ((Buffer(memoryview(bytes([number] * size))), torch.uint8, (size,)), device)
        for number, (size, device) in enumerate(zip(sizes, devices, strict=True))
    ]
    placed = install.place(items)
    assert staged == [48, 80, 300]
    assert [(tensor.device.type, tensor.numel()) for tensor in placed] == [
        ("meta", 40), ("cpu", 40), ("meta", 40), ("meta", 300), ("cpu", 8)
    ]  # fmt: skip
    assert placed[1].tolist() == [1] * 40
    assert placed[4].tolist() == [4] * 8
