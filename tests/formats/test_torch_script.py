"""TorchScript archives give the state dict that torch gives, name for name and bit for bit, though
no code is run.
"""

# Torch leaves TorchScript, quantisation and what modules return untyped, and TorchScript takes no
# annotations that would help.
# mypy: disable-error-code="no-any-return, no-untyped-call, operator, assignment"

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import shardkit
from shardkit.checkpoint.entries import Checkpoint, OtherKind
from shardkit.errors import LimitExceeded, Malformed, NothingSelected, Unwritable
from shardkit.limits import Limits


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.plain = torch.arange(3)
        self.numbers = [1, 2]
        self.words = ["a", "b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.mask.sum() + self.plain.sum() + len(self.numbers)


class Outer(nn.Module):
    """Everything that has its own way into an archive."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()
        self.second = Inner()
        self.again = self.first
        first = nn.Linear(3, 3)
        self.items = nn.ModuleList([first, nn.Linear(3, 3, bias=False)])
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = first.weight
        self.register_buffer("turned", torch.randn(6, 5).t())
        self.register_buffer("sliced", torch.randn(10)[2:8:2])
        self.register_buffer("in_half", torch.randn(3).half())
        self.register_buffer("in_brain", torch.randn(3).bfloat16())
        self.register_buffer("in_complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("absent", None)
        self.register_parameter("none", None)
        self.cache: dict[str, torch.Tensor] = {"x": torch.ones(3)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x)) + self.again(x) + self.cache["x"]
        for layer in self.items:
            x = layer(x)
        return self.norm(self.tied(x)) + self.turned.sum() + self.scalar


class WithList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ParameterList([nn.Parameter(torch.full((3,), float(n))) for n in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for item in self.items:
            x = x * item
        return x


class Restoring(nn.Module):
    """A module that makes its state of something else when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight * 2, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.weight = state[0] / 2
        self.training = state[1]


class WithRestoring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(3, 3)
        self.restoring = Restoring()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.restoring(self.plain(x))


def quietly(make: Callable[[], object]) -> object:
    """What *make* gives; torch says of all TorchScript that it is old, and of its quantised types
    too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def saved(path: Path, make: Callable[[], torch.jit.ScriptModule]) -> Path:
    quietly(lambda: make().save(str(path)))
    return path


def traced(module: nn.Module, *shape: int) -> torch.jit.ScriptModule:
    return torch.jit.trace(module.eval(), torch.ones(shape))


def turned(module: nn.Module) -> nn.Module:
    """*module* with its weights as channels last, which no one types."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types other arguments only


def quantised() -> torch.jit.ScriptModule:
    layers = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    return torch.jit.script(torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}))


def frozen() -> torch.jit.ScriptModule:
    return torch.jit.freeze(torch.jit.script(Outer().eval()))


MODULES: dict[str, Callable[[], torch.jit.ScriptModule]] = {
    "scripted": lambda: torch.jit.script(Outer()),
    "traced": lambda: traced(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1))),
        1,
        3,
        8,
        8,
    ),
    "traced recurrent": lambda: traced(nn.LSTM(3, 4, num_layers=2, bidirectional=True), 2, 3, 3),
    "channels last": lambda: traced(turned(nn.Conv2d(3, 4, 3)), 1, 3, 8, 8),
    "parameter list": lambda: traced(WithList(), 3),
    "training": lambda: torch.jit.trace(nn.BatchNorm2d(4), torch.ones(1, 4, 8, 8)),
    "without weights": lambda: torch.jit.script(nn.Sequential(nn.ReLU())),
}


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return quietly(lambda: torch.jit.load(str(path)).state_dict())  # type: ignore[return-value]  # quietly knows no types


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(found: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].dtype.torch == str(tensor.dtype).removeprefix("torch.")
        assert found[name].read() == raw(tensor), name


@pytest.mark.parametrize("module", MODULES)
def test_the_state_dict_is_that_of_torch(module: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "weird name.v1.pt", MODULES[module])
    found = shardkit.open(path)
    assert found.format == "torchscript"
    assert_same(found, state_of(path))
    assert not [other for other in found.others if other.is_weight or other.kind is OtherKind.CALL]


def test_tied_weights_and_shared_modules_have_equal_payloads(tmp_path: Path) -> None:
    found = shardkit.open(saved(tmp_path / "m.pt", MODULES["scripted"]))
    assert found["tied.weight"].payload == found["items.0.weight"].payload
    assert found["first.linear.weight"].payload == found["again.linear.weight"].payload
    assert found["first.linear.weight"].payload != found["second.linear.weight"].payload


def test_tensors_that_are_no_part_of_the_state_dict_are_said(tmp_path: Path) -> None:
    others = {
        other.name: other
        for other in shardkit.open(saved(tmp_path / "m.pt", MODULES["scripted"])).others
    }
    assert others["first.plain"].nbytes == 24
    assert others["cache"].nbytes == 12
    assert "not part of the state dict" in others["cache"].reason


def test_constants_of_the_code_are_said(tmp_path: Path) -> None:
    found = shardkit.open(saved(tmp_path / "m.pt", MODULES["training"]))
    constants = [other for other in found.others if other.name.startswith("CONSTANTS.")]
    assert constants
    assert not any(other.is_weight for other in constants)
    assert not found.notes


def test_a_frozen_module_is_explained(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", frozen)
    found = shardkit.open(path)
    assert not found.tensors
    assert re.search(r"frozen.*CONSTANTS\.c0 \(F32 \[.*before torch\.jit\.freeze", found.notes[0])
    with pytest.raises(NothingSelected, match="frozen TorchScript module"):
        shardkit.convert(path, tmp_path / "out")


def test_packed_weights_are_other_weights_and_block_nothing_beside_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", quantised)
    found = shardkit.open(path)
    assert_same(found, state_of(path))
    assert [other.name for other in found.others if other.is_weight] == [
        "1._packed_params._packed_params"
    ]
    with pytest.raises(Unwritable, match="LinearPackedParamsBase"):
        shardkit.convert(path, tmp_path / "out")


def test_a_module_that_restores_itself_is_not_guessed_at(tmp_path: Path) -> None:
    found = shardkit.open(saved(tmp_path / "m.pt", lambda: torch.jit.script(WithRestoring())))
    assert list(found) == ["plain.weight", "plain.bias"]
    assert [(other.name, other.is_weight) for other in found.others] == [("restoring", True)]


def code(change: Callable[[bytes], bytes | None]) -> Callable[[str, bytes], bytes | None]:
    """A change of all code."""
    return lambda name, content: change(content) if name.endswith(".py") else content


def record(name: str, content: bytes) -> Callable[[str, bytes], bytes | None]:
    """A change of the record *name*."""
    return lambda each, old: content if each.endswith(name) else old


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive with each member changed, or left out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("new.pt"), "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path.with_name("new.pt")


def test_before_torch_1_5_every_other_tensor_was_a_buffer(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", MODULES["scripted"])
    old = rewritten(path, code(lambda text: re.sub(rb"  __buffers__ = .*\n", b"", text)))
    plain = {"first.plain", "second.plain", "again.plain"}
    assert set(shardkit.open(old)) == set(state_of(path)) | plain


def test_a_deflated_archive_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", MODULES["scripted"])
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(shardkit.open(tmp_path / "deflated.pt"), state_of(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (code(lambda text: None), "its code does not say which attributes of '__torch__.*Outer'"),
        (code(lambda text: b"\xff" * 100), "its code does not say"),
        (record("data.pkl", pickle.dumps([1, 2], 2)), "holds a list of 2 instead of a"),
        (record("constants.pkl", b""), "constants.pkl.*ends before it is complete"),
    ],
    ids=["no code", "garbage for code", "no module", "no constants"],
)
def test_a_broken_archive_is_refused_with_a_sentence(
    change: Callable[[str, bytes], bytes | None], message: str, tmp_path: Path
) -> None:
    path = rewritten(saved(tmp_path / "m.pt", MODULES["scripted"]), change)
    with pytest.raises(Malformed, match=message):
        shardkit.open(path)


def test_more_code_than_is_sensible_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", MODULES["scripted"])
    long = rewritten(path, code(lambda text: text + b"#" * 100_000))
    assert_same(shardkit.open(long), state_of(path))
    with pytest.raises(LimitExceeded, match="code has more than"):
        shardkit.open(long, limits=Limits(header_bytes=90_000))
