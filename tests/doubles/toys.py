"""A toy model with every kind of weight, what it is given, and how it is loaded to run on a
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch
from shardkit.load.dispatch.attachments import attachments
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.streamed_weight import Streamed

WIDTH = 16
LAYERS = 11  # so that layers.1 is the beginning of layers.10
IDS = torch.arange(7)
Map = Mapping[str, str | int | torch.device]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + hidden


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.register_buffer("table", torch.arange(WIDTH) * 0.5, persistent=False)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.embed.weight
        self.order = list(range(LAYERS))
        self.before: Callable[[int], None] = lambda number: None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale + self.shift + self.table
        for number in self.order:
            self.before(number)
            x = self.layers[number](x)
        logits: torch.Tensor = self.head(x)
        return logits


MAPS: dict[str, dict[str, str]] = {
    "cpu": {"": "cpu"},
    "disk": {"": "disk"},
    "half": {"": "cpu"} | {f"layers.{number}": "disk" for number in range(0, LAYERS, 2)},
    "one": {"": "cpu", "layers.1": "disk"},
    "cut": {"": "cpu", "layers.3.up": "disk", "layers.4": "disk", "layers.4.down": "cpu"},
    "bare": {"": "disk", "layers": "cpu", "layers.10.up.weight": "disk"},
}


def trained() -> Toy:
    """One whose every value is another than a new one has."""
    torch.manual_seed(0)
    model = Toy().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.3 + 0.1)
    return model


def saved(model: nn.Module, folder: Path, kind: str = "safetensors") -> Path:
    if kind == "safetensors":
        tensors = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if name != "head.weight"
        }
        save_file(tensors, folder / "model.safetensors")
        return folder / "model.safetensors"
    torch.save(
        model.state_dict(), folder / "model.bin", _use_new_zipfile_serialization=kind == "zip"
    )
    return folder / "model.bin"


def empty() -> Toy:
    with init_empty_weights():
        return Toy().eval()


def resident_on(device: str) -> Toy:
    """The trained one, wholly in the memory of *device*."""
    model = trained().to(device)
    model.head.weight = model.embed.weight  # which a move undoes on some kinds of device
    return model


def run_on(device_map: Map, device: str) -> dict[str, str | int | torch.device]:
    """*device_map* for a model that runs on *device*: an accelerator has what stays, which says
    where the model runs.
    """
    return dict(device_map) if device == "cpu" else {**device_map, "embed": 0}


def loaded(file: Path, device: str, device_map: Map | str = "disk", **options: object) -> Toy:
    """The model in *file*, which runs on *device*; a word is the place of all the rest."""
    mapping = run_on({"": device_map} if isinstance(device_map, str) else device_map, device)
    return load_checkpoint_and_dispatch(empty(), file, mapping, **options)  # type: ignore[arg-type]  # as each test needs them


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What *model* computes, given where it runs and brought to main memory."""
    computed: torch.Tensor = model(ids.to(next(model.parameters()).device))
    return computed.cpu()


def layer(model: nn.Module, number: int) -> Block:
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    block = layers[number]
    assert isinstance(block, Block)
    return block


def streamed(model: nn.Module) -> set[str]:
    return {
        name
        for name, each in model.state_dict(keep_vars=True).items()
        if isinstance(each, Streamed)
    }


def held(model: nn.Module) -> int:
    """Bytes of the memory that *model* streams through."""
    streams = {each.stream for _, _, _, each in attachments(model) if isinstance(each, Pager)}
    return sum(stream.nbytes for stream in streams)
