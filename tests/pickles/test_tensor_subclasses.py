"""Tensors that are more than a block of values are refused by name, with their size, and never
converted by half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import shardkit
from shardkit.checkpoint.entries import OtherKind
from shardkit.errors import LoadError, Unwritable
from shardkit.load import tensors

ao: Any = torch.ao.quantization  # which has no types
two_tensors: Any = TwoTensor


def with_attributes(**attributes: object) -> nn.Parameter:
    made = nn.Parameter(torch.ones(2))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Scaled(torch.Tensor):
    """A subclass with an attribute."""


def scaled() -> torch.Tensor:
    made = torch.ones(2).as_subclass(Scaled)
    made.scale = torch.ones(1)  # type: ignore[attr-defined]  # an attribute that no tensor declares
    return made


def static_convolution() -> Any:
    net = nn.Sequential(ao.QuantStub(), nn.Conv2d(1, 2, 1), ao.DeQuantStub()).eval()
    net.qconfig = ao.get_default_qconfig("x86")
    ao.prepare(net, inplace=True)
    net(torch.rand(1, 1, 4, 4))
    return ao.convert(net, inplace=True)


def dynamic(module: nn.Module) -> Any:
    return ao.quantize_dynamic(nn.Sequential(module), {type(module)}, dtype=torch.qint8)


def jagged() -> torch.Tensor:
    parts = [torch.ones(2, 3), torch.ones(3, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


UNKNOWN, QUANTISED = OtherKind.UNKNOWN_TENSOR, OtherKind.QUANTISED
LINEAR = "packed weights, __torch__.torch.classes.quantized.LinearPackedParamsBase"
PARAMETER = "torch.nn.Parameter with tensors in its attributes"

CASES: dict[str, tuple[Callable[[], Any], dict[str, tuple[OtherKind, str, int]]]] = {
    "a parameter with a scale": (
        lambda: {"w": with_attributes(scale=torch.ones(1))},
        {"w": (UNKNOWN, f"{PARAMETER} scale", 12)},
    ),
    "a parameter with a table in an object": (
        lambda: {
            "w": with_attributes(quant_state=SimpleNamespace(absmax=torch.ones(3)), tag="nf4")
        },
        {"w": (UNKNOWN, f"{PARAMETER} quant_state (types.SimpleNamespace)", 20)},
    ),
    "a subclass with a scale": (
        lambda: {"w": scaled()},
        {"w": (UNKNOWN, f"{__name__}.Scaled with tensors in its attributes scale", 12)},
    ),
    "a wrapper of two tensors": (
        lambda: {"w": two_tensors(torch.ones(2, 3), torch.ones(2, 3))},
        {
            "w": (
                UNKNOWN,
                "of the class torch.testing._internal.two_tensor.TwoTensor, F32 [2, 3]",
                48,
            )
        },
    ),
    "a jagged tensor": (
        lambda: {"w": jagged()},
        {"w": (OtherKind.NESTED, "several tensors of unequal shapes in one", 15 * 4 + 3 * 8)},
    ),
    "a linear layer that is quantised as it runs": (
        lambda: dynamic(nn.Linear(2, 3)),
        {"0._packed_params._packed_params": (QUANTISED, LINEAR, 6 + 12)},
    ),
    "the same, beside other things": (
        lambda: {"model": dynamic(nn.Linear(2, 3)), "epoch": 3},
        {"model.0._packed_params._packed_params": (QUANTISED, LINEAR, 6 + 12)},
    ),
}


def saved(value: object, folder: Path) -> Path:
    torch.save(value, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.filterwarnings(
    "ignore"
)  # of quantisation and of jagged tensors torch says that they are old, or new
@pytest.mark.parametrize(("made", "expected"), CASES.values(), ids=CASES)
def test_what_is_more_than_its_values_is_named_with_its_size(
    made: Callable[[], Any], expected: dict[str, tuple[OtherKind, str, int]], tmp_path: Path
) -> None:
    path = saved({"plain": torch.ones(1), "more": made()}, tmp_path)
    checkpoint = shardkit.open(path)
    assert [entry.name for entry in checkpoint.tensors if entry.name != "plain"] == []
    found = {
        other.name: (other.kind, other.reason, other.nbytes)
        for other in checkpoint.others
        if other.is_weight
    }
    assert found == {f"more.{name}": expectation for name, expectation in expected.items()}
    (name,) = found
    with pytest.raises(Unwritable, match=re.escape(repr(name))):
        shardkit.convert(path, tmp_path / "out", root=".")
    with pytest.raises(LoadError, match=re.escape(repr(name))):
        tensors(path, root=".")[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "made", [lambda: dynamic(nn.LSTM(2, 3)), static_convolution], ids=["LSTM", "convolution"]
)
def test_a_quantised_module_is_never_converted_by_half(
    made: Callable[[], nn.Module], tmp_path: Path
) -> None:
    path = saved({"model": made(), "norm": nn.LayerNorm(4)}, tmp_path)
    weights = [other for other in shardkit.open(path).others if other.is_weight]
    assert weights
    assert all(other.nbytes for other in weights)
    with pytest.raises(Unwritable, match="quantised tensor") as caught:
        shardkit.convert(path, tmp_path / "out", root="model")
    assert "convert the model from before it was quantised" in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore")
def test_a_static_convolution_is_called_by_its_class(tmp_path: Path) -> None:
    (other,) = (
        each
        for each in shardkit.open(saved({"model": static_convolution()}, tmp_path)).others
        if each.is_weight
    )
    assert (other.name, other.kind) == ("model.1", QUANTISED)
    assert other.reason == "packed weights of torch.ao.nn.quantized.modules.conv.Conv2d"


@pytest.mark.filterwarnings("ignore")
def test_a_hint_does_not_suggest_to_leave_out_all_weights(tmp_path: Path) -> None:
    net = static_convolution()
    with pytest.raises(Unwritable, match=r"'1' \(quantised tensor") as beside_scales:
        shardkit.convert(saved(net, tmp_path), tmp_path / "out")
    with pytest.raises(Unwritable, match=r"'0' \(quantised tensor") as alone:
        shardkit.convert(saved(nn.Sequential(net[1]), tmp_path), tmp_path / "out")
    advice = "convert the model from before it was quantised"
    assert beside_scales.value.hint == f"{advice}, or leave them out: exclude=['1']"
    assert alone.value.hint == advice


@pytest.mark.parametrize(
    "attributes",
    [
        {"tag": "a"},
        {"shape_of": (1, 2)},
        {"options": {"a": [1]}},
        {"owner": SimpleNamespace(rate=0.1)},
    ],
    ids=str,
)
def test_attributes_without_tensors_do_not_matter(
    attributes: dict[str, object], tmp_path: Path
) -> None:
    (entry,) = shardkit.open(saved({"w": with_attributes(**attributes)}, tmp_path)).tensors
    assert entry.read() == torch.ones(2).numpy().tobytes()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6
def test_a_distributed_tensor_is_named_with_its_shape_and_what_to_do(
    mesh: Any, tmp_path: Path
) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    path = saved(
        {"w": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]), "n": torch.ones(3)}, tmp_path
    )
    (other,) = (other for other in shardkit.open(path).others if other.is_weight)
    assert (other.name, other.kind, other.nbytes) == ("w", OtherKind.DISTRIBUTED, 24)
    assert other.reason.endswith("DTensor, F32 [6]")
    with pytest.raises(
        Unwritable, match=r"'w' \(distributed tensor: .*DTensor, F32 \[6\]\)"
    ) as caught:
        shardkit.convert(path, tmp_path / "out")
    assert "full_tensor()" in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore")
def test_4_bit_and_8_bit_parameters_of_bitsandbytes_are_refused_with_their_tables(
    tmp_path: Path,
) -> None:
    nn_of_bnb = pytest.importorskip("bitsandbytes.nn")
    four = nn_of_bnb.Linear4bit(64, 4, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    path = saved({"weight": four.weight}, tmp_path)
    (other,) = (other for other in shardkit.open(path).others if other.is_weight)
    assert "quant_state (bitsandbytes.functional.QuantState)" in other.reason
    assert other.nbytes > four.weight.nbytes
    dense = dict(four.state_dict())
    assert len(shardkit.open(saved(dense, tmp_path)).tensors) == len(
        dense
    )  # its own way to save it loses nothing


class Hidden(nn.Module):
    """A module with tensors where no state dict looks, and references to what it has anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.unregistered = [nn.Linear(3, 3), nn.Linear(3, 3)]
        self.cache = {"k": {"deep": torch.ones(5)}}
        self.again = {"same": [self.layer, self.unregistered[0]]}
        self.settings = {"rate": 0.1}


def test_tensors_in_plain_attributes_of_modules_are_reported_once_with_their_bytes(
    tmp_path: Path,
) -> None:
    path = saved(Hidden(), tmp_path)
    assert list(torch.load(path, weights_only=False).state_dict()) == ["layer.weight", "layer.bias"]
    checkpoint = shardkit.open(path)
    assert [entry.name for entry in checkpoint.tensors] == ["layer.weight", "layer.bias"]
    found = {
        other.name: other.nbytes for other in checkpoint.others if other.kind is OtherKind.OBJECT
    }
    assert found == {"unregistered": 2 * (9 + 3) * 4, "cache": 20}
    (note,) = shardkit.convert(path, tmp_path / "out").notes
    assert note.endswith("are left out, as by state_dict(): 'unregistered' (96 B), 'cache' (20 B)")
