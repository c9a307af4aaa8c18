"""A whole pickled module is its state dict: torch's names, torch's order, without its classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shardkit.checkpoint.entries import Checkpoint, OtherKind
from shardkit.errors import LimitExceeded
from shardkit.formats import torch_legacy, torch_zip
from shardkit.limits import Limits
from shardkit.sources.format import Source

# Torch says that it saves no source code for the old format, and that its old weight_norm is old.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Block(nn.Module):
    """A module with everything that a module can have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(width))
        self.register_buffer("passing", torch.ones(width), persistent=False)
        self.register_buffer("unset", None)
        self.register_parameter("absent", None)
        self.scale = nn.Parameter(torch.randn(width))
        self.norm = nn.BatchNorm1d(width)
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False), nn.ReLU()])
        self.table = nn.ParameterDict({"x": nn.Parameter(torch.zeros(2))})
        self.nothing: nn.Module | None = None
        self.constant = torch.full((3,), 7.0)
        self.history = [torch.ones(2)]
        self.add_module("gap", None)


class Tied(nn.Module):
    """A weight under two names, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = Block(4)
        self.same = self.block
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 3),
    "block": lambda: Block(4),
    "tied": Tied,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
    "weight_norm": lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 4))),
    "copied": lambda: copy.deepcopy(Tied()),
    "half": lambda: Block(4).half(),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
}


def scanned(
    value: object,
    folder: Path,
    *,
    legacy: bool = False,
    protocol: int = 2,
    limits: Limits | None = None,
) -> Checkpoint:
    path = folder / "m.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    form = torch_legacy.FORMAT if legacy else torch_zip.FORMAT
    return form.scan(Source.file(path, limits or Limits()))


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", MODULES)
def test_a_whole_module_gives_its_state_dict(
    name: str, protocol: int, legacy: bool, tmp_path: Path
) -> None:
    module = MODULES[name]()
    expected = module.state_dict()
    found = scanned(module, tmp_path, legacy=legacy, protocol=protocol)
    assert [entry.path for entry in found.tensors] == [(name,) for name in expected]
    assert {entry.name: bytes(entry.read()) for entry in found.tensors} == {
        name: raw(t) for name, t in expected.items()
    }
    assert not any(other.is_weight for other in found.others)


def test_a_module_inside_a_checkpoint_is_one_step_with_dotted_names(tmp_path: Path) -> None:
    module = Tied()
    found = scanned({"model": module, "ema": module, "epoch": 1}, tmp_path)
    names = list(module.state_dict())
    assert [entry.path for entry in found.tensors] == [("model", name) for name in names] + [
        ("ema", name) for name in names
    ]
    assert (
        found["model.embed.weight"].payload
        == found["model.head.weight"].payload
        == found["ema.head.weight"].payload
    )


def test_tensors_of_a_module_outside_its_state_dict_are_said(tmp_path: Path) -> None:
    found = scanned({"model": Block(4)}, tmp_path)
    aside = {other.path: (other.kind, other.nbytes) for other in found.others if other.nbytes}
    assert aside == {
        ("model", "passing"): (OtherKind.OBJECT, 16),
        ("model", "constant"): (OtherKind.OBJECT, 12),
        ("model", "history"): (OtherKind.OBJECT, 8),
    }


def test_a_module_that_contains_itself_ends(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].above = module
    found = scanned(module, tmp_path)
    assert list(found) == ["0.weight", "0.bias"]
    assert [other.reason for other in found.others if other.kind is OtherKind.OBJECT] == [
        "a module that contains itself"
    ]


def test_modules_shared_until_their_names_are_numberless_hit_the_limit(tmp_path: Path) -> None:
    module: nn.Module = nn.Linear(1, 1, bias=False)
    for _ in range(40):
        module = nn.Sequential(module, module)
    with pytest.raises(LimitExceeded):
        scanned(module, tmp_path, limits=Limits(tensors=1000))


def test_a_module_without_tensors_is_one_object(tmp_path: Path) -> None:
    found = scanned({"loss": nn.CrossEntropyLoss(), "w": torch.ones(1)}, tmp_path)
    assert [
        (other.path, other.reason) for other in found.others if other.kind is OtherKind.OBJECT
    ] == [(("loss",), "torch.nn.modules.loss.CrossEntropyLoss")]
