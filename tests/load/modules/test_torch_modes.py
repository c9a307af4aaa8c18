"""What watches a forward, and what torch chooses kernels by, is as in memory; and nobody keeps what
others are read into.
"""

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
from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch, tensors
from shardkit.load.lazy.streamed_weight import Streamed

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),  # since Python 3.14
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
    "vmap of grad": lambda model, x: torch.vmap(
        torch.func.grad(lambda row: model(row).square().sum())
    )(x),
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
def test_what_watches_a_forward_gets_what_it_gets_of_a_model_in_memory(
    watch: str, warm: bool, tmp_path: Path
) -> None:
    resident, x = layers(tmp_path), torch.randn(2, 4)
    model = load_checkpoint_and_dispatch(
        copy.deepcopy(resident), tmp_path / "model.pt", {"": "disk"}, ring=2
    )
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
    with pytest.raises(LoadError, match="records the tensors that it meets"):
        traced(model, x)
    assert model(x).shape == x.shape


class Turned(nn.Linear):
    """Whose input is no plain matrix: what torch does with it depends on whether the weight asks
    for a gradient.
    """

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
    model = load_checkpoint_and_dispatch(
        copy.deepcopy(resident), tmp_path / "model.pt", {"": "disk"}
    )
    x = torch.randn(2, 6, 56)
    with mode():
        assert torch.equal(model(x), resident(x))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model(x).requires_grad


@pytest.mark.parametrize(
    "device_map", [None, {"": "disk"}, {"0": "cpu", "1": "disk", "2": "disk"}], ids=str
)
@pytest.mark.parametrize("is_empty", [False, True])
def test_what_is_compiled_by_torch_jit_stays_in_memory(
    device_map: dict[str, str] | None, is_empty: bool, tmp_path: Path
) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        )

    torch.manual_seed(0)
    resident, x = build(), torch.randn(2, 4)
    torch.save(resident.state_dict(), tmp_path / "model.pt")
    with init_empty_weights() if is_empty else contextlib.nullcontext():
        model = build()
    model = load_checkpoint_and_dispatch(model, tmp_path / "model.pt", device_map)
    assert torch.equal(model(x), resident(x))
    assert not any(isinstance(weight, Streamed) for weight in model[1].parameters())


# Weights that are read outside their block's forward.

READS: dict[str, Callable[[nn.Sequential, torch.Tensor], torch.Tensor]] = {
    "a weight": lambda model, x: nn.functional.linear(x, model.get_parameter("1.weight")),
    "a view": lambda model, x: x @ model.get_parameter("1.weight").T[:, 1:],
    "a stack": lambda model, x: (
        torch.stack([model.get_parameter("1.weight"), model.get_parameter("2.weight")]) @ x.T
    ),
    "a copy": lambda model, x: torch.zeros(4, 4).copy_(model.get_parameter("1.weight")) + x[0],
    "a clone that is written": lambda model, x: (
        model.get_parameter("1.weight").detach().clone().add_(1) + x[0]
    ),
    "a cast": lambda model, x: model.get_parameter("1.weight").double() + x[0],
    "a new tensor": lambda model, x: model.get_parameter("1.weight").new_zeros(4).add_(1) + x[0],
    "a module": lambda model, x: model[1](x),
    "the model": lambda model, x: model(x),
}


def linearized(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    along: torch.Tensor = torch.func.linearize(function, x)[1](x + 1)
    return along


def pulled_back(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    value, back, *_ = torch.func.vjp(function, x)
    gradient: torch.Tensor = back(torch.ones_like(value))[0]
    return gradient


def run_twice(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    graph = make_fx(function)(x + 1)
    return torch.stack([graph(x), graph(x)])


OUTSIDE: dict[
    str, Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]
] = {
    "graph": run_twice,
    "graph of functions": lambda function, x: run_twice(torch.func.functionalize(function), x),
    "linearize": linearized,
    "forward mode": lambda function, x: torch.func.jvp(function, (x,), (x,))[1],
    "backward": pulled_back,
    "vmap": lambda function, x: torch.vmap(function)(torch.stack([x, x + 1])),
}


def opened(state: str, resident: nn.Sequential, folder: Path) -> nn.Sequential:
    """A model that has the weights of *resident*, which no ring brings."""
    if state == "addresses":
        model = copy.deepcopy(resident)
        model.load_state_dict(tensors(folder / "model.pt"), assign=True)
        return model.requires_grad_(False)
    model = load_checkpoint_and_dispatch(
        copy.deepcopy(resident), folder / "model.pt", {"": "disk"}, ring=2
    )
    assert isinstance(model, nn.Sequential)
    if state == "written":
        with torch.no_grad():
            for each in (*model.parameters(), *resident.parameters()):
                each.add_(1)
    elif state == "closed":
        close(model)
    return model


@pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr Node:UserWarning"
)  # linearize, of constants in its own graphs
@pytest.mark.parametrize("state", ["streams", "closed", "written", "addresses"])
@pytest.mark.parametrize("watch", OUTSIDE)
@pytest.mark.parametrize("read", READS)
def test_what_watches_a_weight_that_is_read_by_itself_gets_its_values(
    read: str, watch: str, state: str, tmp_path: Path
) -> None:
    resident, x = layers(tmp_path).requires_grad_(False), torch.randn(2, 4)
    model = opened(state, resident, tmp_path)
    expected = OUTSIDE[watch](lambda x: READS[read](resident, x), x)
    assert torch.equal(OUTSIDE[watch](lambda x: READS[read](model, x), x), expected)


@pytest.mark.parametrize("state", ["streams", "written"])
def test_fake_tensors_meet_a_weight_that_is_read_by_itself(state: str, tmp_path: Path) -> None:
    resident, x = layers(tmp_path), torch.randn(2, 4)
    model = opened(state, resident, tmp_path)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert nn.functional.linear(mode.from_tensor(x), model.get_parameter("1.weight")).shape == (
            2,
            4,
        )
    assert torch.equal(
        nn.functional.linear(x, model.get_parameter("1.weight")),
        nn.functional.linear(x, resident.get_parameter("1.weight")),
    )


def test_a_weight_that_is_written_under_a_mode_gets_memory_with_its_values(tmp_path: Path) -> None:
    resident, x = layers(tmp_path), torch.randn(2, 4)
    model = opened("streams", resident, tmp_path)

    def written(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model.get_parameter("1.weight").add_(1)
        return x

    make_fx(written)(x)
    assert torch.equal(model.get_parameter("1.weight"), resident.get_parameter("1.weight") + 1)
