"""What watches a forward, and what torch chooses kernels by, is as in memory; and nobody keeps what others are read into."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from shardkit.errors import LoadError
from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch, tensors
from shardkit.load.streamed_weight import Streamed

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

Watch = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def traced(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch.jit.trace(model, x, check_trace=False)(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


def faked(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return torch.zeros(model(mode.from_tensor(x)).shape, device="meta")


WATCHES: dict[str, Watch] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "jacobian": lambda model, x: torch.func.jacrev(model)(x),
    "forward mode": lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
    "vmap of grad": lambda model, x: torch.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x),
    "trace": traced,
    "graph": lambda model, x: make_fx(model)(x)(x),
    "fake": faked,
}


def layers(folder: Path) -> nn.Sequential:
    torch.manual_seed(0)
    resident = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).eval()
    torch.save(resident.state_dict(), folder / "model.pt")
    return resident


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("watch", WATCHES)
def test_what_watches_a_forward_gets_what_it_gets_of_a_model_in_memory(watch: str, warm: bool, tmp_path: Path) -> None:
    resident, x = layers(tmp_path), torch.randn(2, 4)
    model = load_checkpoint_and_dispatch(copy.deepcopy(resident), tmp_path / "model.pt", {"": "disk"}, ring=2)
    if warm:
        model(x)
    expected, found = WATCHES[watch](resident, x), WATCHES[watch](model, x)
    assert (found.shape, found.device) == (expected.shape, expected.device)
    assert found.is_meta or torch.equal(found, expected)
    assert torch.equal(model(x), resident(x))


def test_an_address_in_a_trace_is_refused(tmp_path: Path) -> None:
    model, x = nn.Conv1d(4, 4, 1), torch.randn(2, 4, 3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.load_state_dict(tensors(tmp_path / "model.pt"), assign=True)
    with pytest.raises(LoadError, match="writes down what it meets"):
        traced(model, x)
    assert model(x).shape == x.shape


class Turned(nn.Linear):
    """Whose input is no plain matrix: what torch does with it depends on whether the weight asks for a gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(0, 1))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_weight_gets_the_kernels_that_it_gets_in_memory(
    learned: bool, mode: Callable[[], contextlib.AbstractContextManager[None]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    resident = nn.Sequential(*(Turned(56, 56) for _ in range(8))).requires_grad_(learned)
    torch.save(resident.state_dict(), tmp_path / "model.pt")
    model = load_checkpoint_and_dispatch(copy.deepcopy(resident), tmp_path / "model.pt", {"": "disk"})
    x = torch.randn(2, 6, 56)
    with mode():
        assert torch.equal(model(x), resident(x))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model(x).requires_grad


@pytest.mark.parametrize("device_map", [None, {"": "disk"}, {"0": "cpu", "1": "disk", "2": "disk"}], ids=str)
@pytest.mark.parametrize("is_empty", [False, True])
def test_what_is_compiled_by_torch_jit_stays_in_memory(device_map: dict[str, str] | None, is_empty: bool, tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))

    torch.manual_seed(0)
    resident, x = build(), torch.randn(2, 4)
    torch.save(resident.state_dict(), tmp_path / "model.pt")
    with init_empty_weights() if is_empty else contextlib.nullcontext():
        model = build()
    model = load_checkpoint_and_dispatch(model, tmp_path / "model.pt", device_map)
    assert torch.equal(model(x), resident(x))
    assert not any(isinstance(weight, Streamed) for weight in model[1].parameters())
