"""What one thread may do to a model that another thread runs: copy it or its weights, save it, take
its hooks off, close it. The forward and the copy are right, or there is an error.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from late_lane import LateLane
from shardkit.errors import LoadError
from shardkit.load import (
    close,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    remove_hooks,
    save,
)
from shardkit.load.devices.transfers import CpuTransfer, DeviceTransfer
from shardkit.load.dispatch import attach
from shardkit.load.dispatch.attachments import attachments
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.borrow_tables import BorrowTable

pytestmark = pytest.mark.timeout(300)

WIDTH, BLOCKS, AT = 8, 5, 1
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
State = dict[str, torch.Tensor]


class Block(nn.Module):
    """One that has parameters, a buffer, and a module that keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("shift", torch.rand(WIDTH))
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.inside: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.linear(x))
        self.inside()
        z: torch.Tensor = self.linear(y) + self.get_buffer("shift") + self.lstm(y)[0]
        return z


class Blocks(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(Block() for _ in range(BLOCKS)))


def block(model: nn.Module, number: int = AT) -> Block:
    found = model.get_submodule(str(number))
    assert isinstance(found, Block)
    return found


@pytest.fixture
def right() -> Blocks:
    return Blocks().eval()


@pytest.fixture
def model(right: Blocks, tmp_path: Path) -> Iterator[Blocks]:
    save_file(right.state_dict(), tmp_path / "model.safetensors")
    model = load_checkpoint_and_dispatch(
        Blocks().eval(),
        tmp_path / "model.safetensors",
        {"": "disk"},
        ring=2,
        offload_buffers=True,
    )
    yield model
    close(model)


@contextmanager
def running(
    model: nn.Module, expected: torch.Tensor, *, grad: bool = False, between: bool = False
) -> Iterator[None]:
    """Another thread is in the middle of a block of *model*, or *between* two, meanwhile; then its
    forward goes on, and gives what is *expected*.
    """
    there, go_on = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def hold(*_: object) -> None:
        there.set()
        assert go_on.wait(200)

    def run() -> None:
        with torch.set_grad_enabled(grad):
            found.append(model(X))

    second = model.get_submodule("2")
    handle = second.register_forward_pre_hook(hold, prepend=True) if between else None
    if not between:
        block(model).inside = hold
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert there.wait(200)
        yield
    finally:
        go_on.set()
        thread.join(200)
        block(model).inside = lambda: None
        if handle is not None:
            handle.remove()
    alike(found[0], expected)


def alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the last bits, in which the kernels of LSTM differ, which are chosen by the kind of
    tensor and by whether there are gradients.
    """
    torch.testing.assert_close(found.detach(), expected.detach())


def forwards(model: nn.Module, expected: torch.Tensor) -> None:
    """Fill the memory with the weights of other blocks, several times."""
    with torch.no_grad():
        for _ in range(3):
            alike(model(X), expected)


def same(found: State, right: nn.Module) -> bool:
    state = right.state_dict()
    return found.keys() == state.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in state.items()
    )


Copy = Callable[[torch.Tensor], torch.Tensor]
COPIES: dict[str, Copy] = {
    "clone": lambda w: w.clone(),
    "torch.clone": torch.clone,
    "tensor": torch.tensor,
    "to, copied": lambda w: w.to(torch.float32, copy=True),
    "cast": lambda w: w.to(torch.float64).float(),
    "copied into": lambda w: torch.empty_like(w).copy_(w),
    "stacked": lambda w: torch.stack([w, w])[0] + 0,
    "deep copy": copy.deepcopy,
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "pickled": lambda w: pickle.loads(pickle.dumps(w)),
}
TAKES: dict[str, Callable[[nn.Module], State]] = {
    "state dict": lambda model: model.state_dict(),
    "state dict of variables": lambda model: dict(model.state_dict(keep_vars=True)),
    "named": lambda model: {**dict(model.named_parameters()), **dict(model.named_buffers())},
    "attributes": lambda model: {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in Blocks().state_dict()
    },
    "dicts": lambda model: {
        f"{path}.{name}": tensor
        for path, module in model.named_modules()
        for name, tensor in {**module._parameters, **module._buffers.copy()}.items()
        if tensor is not None
    },
    "data": lambda model: {name: each.data for name, each in model.state_dict().items()},
    "views": lambda model: {name: each[:] for name, each in model.state_dict().items()},
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("taken", TAKES)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_weight_that_another_thread_uses_is_right(
    name: str, taken: str, grad: bool, model: Blocks, right: Blocks
) -> None:
    expected = right(X)
    with running(model, expected, grad=grad):
        weights = TAKES[taken](model)
        with torch.no_grad():
            early = {name_: COPIES[name](each) for name_, each in weights.items()}
    forwards(model, expected)
    with torch.no_grad():
        late = {name_: COPIES[name](each) for name_, each in weights.items()}
    assert same(early, right)
    assert same(late, right)


def test_a_deep_copy_of_a_model_that_another_thread_runs_streams(
    model: Blocks, right: Blocks
) -> None:
    expected = right(X)
    for _ in range(2):  # modules such as LSTM remember what they had
        with running(model, expected):
            twin = copy.deepcopy(model)
        forwards(model, expected)
        direct = [block(twin, number).lstm(X)[0] for number in range(BLOCKS)]
        assert all(isinstance(each, Streamed) for each in twin.parameters())
        assert same(twin.state_dict(), right)
        alike(twin(X), expected)
        for number, found in enumerate(direct):
            alike(found, block(right, number).lstm(X)[0])


def test_a_model_that_another_thread_runs_is_saved_as_it_is(
    model: Blocks, right: Blocks, tmp_path: Path
) -> None:
    with running(model, right(X)):
        save(model, tmp_path / "saved")
    assert same(load_file(tmp_path / "saved" / "model.safetensors"), right)


def test_a_weight_that_is_replaced_while_another_thread_uses_it_stays(
    model: Blocks, right: Blocks
) -> None:
    given = nn.Parameter(block(right).linear.bias.detach().clone())
    with running(model, right(X)):
        block(model).linear.bias = given
        assert block(model).linear.bias is given
    forwards(model, right(X))
    assert block(model).linear.bias is given


def test_a_thread_finds_what_it_has_borrowed_and_no_other_does(model: Blocks) -> None:
    bias = block(model).linear.bias
    mine, others = [], []

    def look() -> None:
        others.append(block(model).linear.bias)

    def inside() -> None:
        mine.append(block(model).linear.bias)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(200)

    block(model).inside = inside
    model(X)
    assert not isinstance(mine[0], Streamed)
    assert others[0] is bias


def test_hooks_stay_while_another_thread_runs_a_block(model: Blocks, right: Blocks) -> None:
    expected = right(X)
    before = [key for _, _, key, _ in attachments(model)]
    with running(model, expected):
        for act in (
            lambda: remove_hooks(model),
            lambda: dispatch_model(model, {"": "cpu"}),
        ):
            with pytest.raises(LoadError, match="another thread runs a block") as refused:
                act()
            assert "while no thread runs it" in str(refused.value.hint)
        assert [key for _, _, key, _ in attachments(model)] == before
    forwards(model, expected)
    remove_hooks(model)
    assert not list(attachments(model))
    assert not any(
        isinstance(table, BorrowTable)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
    )
    forwards(model, expected)


@pytest.mark.parametrize("in_memory", [False, True])
def test_hooks_may_go_while_another_thread_is_between_two_blocks(
    in_memory: bool, right: Blocks, tmp_path: Path
) -> None:
    save_file(right.state_dict(), tmp_path / "model.safetensors")
    with nullcontext() if in_memory else init_empty_weights():
        model = Blocks().eval()
    load_checkpoint_and_dispatch(model, tmp_path / "model.safetensors", {"": "disk"}, ring=2)
    expected = right(X)
    with running(model, expected, between=True):
        remove_hooks(model)
        assert not list(attachments(model))
    forwards(model, expected)
    assert any(isinstance(each, Streamed) for each in model.parameters()) != in_memory


@pytest.mark.parametrize("end", [remove_hooks, close])
def test_hooks_may_go_while_another_thread_is_about_to_call_them(
    end: Callable[[nn.Module], None], model: Blocks, right: Blocks
) -> None:
    def from_another_thread(*_: object) -> None:
        thread = threading.Thread(target=end, args=(model,))
        thread.start()
        thread.join(200)

    model.register_forward_pre_hook(from_another_thread, prepend=True)
    alike(model(X), right(X))
    assert not any(isinstance(each, Pager) for *_, each in attachments(model))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("between", [False, True], ids=["in a block", "between blocks"])
@pytest.mark.parametrize("lane", [CpuTransfer, LateLane])
def test_a_forward_of_another_thread_goes_on_after_a_close(
    lane: Callable[[], DeviceTransfer],
    between: bool,
    grad: bool,
    right: Blocks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attach, "lane_to", lambda device: lane())
    save_file(right.state_dict(), tmp_path / "model.safetensors")
    model = load_checkpoint_and_dispatch(
        Blocks().eval(), tmp_path / "model.safetensors", {"": "disk"}, ring=2
    )
    expected = right(X)
    stream = next(each.stream for *_, each in attachments(model) if isinstance(each, Pager))
    with running(model, expected, between=between, grad=grad):
        close(model)
        assert all(isinstance(each, Streamed) for each in model.parameters())
        hooked = any(isinstance(each, Pager) for *_, each in attachments(model))
        assert hooked == (lane is LateLane and not between)
    assert stream.nbytes == 0
    forwards(model, expected)
    close(model)
    assert not any(isinstance(each, Pager) for *_, each in attachments(model))
    assert all(isinstance(each, Streamed) for each in model.parameters())


@pytest.mark.parametrize("end", [remove_hooks, close])
def test_what_an_interrupt_left_in_another_thread_keeps_no_hooks(
    end: Callable[[nn.Module], None], model: Blocks, right: Blocks
) -> None:
    expected = right(X)
    left, go_on = threading.Event(), threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with suppress(KeyboardInterrupt):
            model(X)
        left.set()
        go_on.wait(200)

    block(model).inside = interrupt
    thread = threading.Thread(target=run)
    thread.start()
    assert left.wait(200)
    block(model).inside = lambda: None
    end(model)
    assert not [each for *_, each in attachments(model) if isinstance(each, Pager)]
    forwards(model, expected)
    go_on.set()
    thread.join(200)
    forwards(model, expected)


# The table of a module.


def table() -> BorrowTable:
    tensors = {"a": torch.zeros(1), "b": None}
    return BorrowTable(tensors.items())


def test_a_table_reads_as_a_dict_whatever_reads_it() -> None:
    there, borrowed = table(), torch.ones(1)
    stood = there["a"]
    assert stood is not None
    threads: list[int] = []
    there.records["a"] = (borrowed, stood, threads)
    there["a"] = borrowed

    def found() -> list[object]:
        return [
            there["a"],
            there.get("a"),
            dict(there)["a"],
            {**there}["a"],
            dict(there.items())["a"],
            next(iter(there.values())),
            there.copy()["a"],
            copy.copy(there)["a"],
            (there | {})["a"],
            ({} | there)["a"],
            there.setdefault("a", None),
            next(iter(there.items()))[1],
        ]

    assert all(each is stood for each in found())
    copies: list[State] = [pickle.loads(pickle.dumps(there)), dict(copy.deepcopy(there).items())]
    assert all(torch.equal(each["a"], stood) for each in copies)
    threads.append(threading.get_ident())
    assert all(each is borrowed for each in found())
    assert (list(there), len(there), "b" in there, there.get("c", 1)) == (["a", "b"], 2, True, 1)
    assert there.popitem() == ("b", None)
    threads.clear()
    assert there.pop("a") is stood
    assert there.pop("a", 5) == 5
    with pytest.raises(KeyError):
        there["a"]


def test_no_thread_finds_what_another_borrows_again_and_again() -> None:
    there, stop = table(), threading.Event()
    stood = there["a"]
    assert stood is not None
    borrowed = [torch.ones(1), torch.ones(1)]
    found: set[bool] = set()

    def look() -> None:
        while not stop.is_set():
            found.update(each is stood for each in (there["a"], there.get("a")))

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(20_000):
        tensor = borrowed[number % 3 // 2]
        there.records["a"] = (tensor, stood, (threading.get_ident(),))
        there["a"] = tensor
        there["a"] = stood
        there.records["a"] = (None, None, (threading.get_ident(),))
    stop.set()
    thread.join(200)
    assert found == {True}
