"""A weight that streams, outside its block: what is copied from it is ordinary, and what is written
to it stays written.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shardkit.errors import LoadError, OverBudget, ReadOnly
from shardkit.load import (
    close,
    dispatch_model,
    load_checkpoint_and_dispatch,
    remove_hooks,
    save,
    tensors,
)
from shardkit.load.lazy import backing
from shardkit.load.lazy.paged import Paged, is_address
from shardkit.load.lazy.streamed_weight import Streamed

WIDTH, LAYERS = 6, 5
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
Write = Callable[[nn.Parameter], object]


def resident() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


def streaming(folder: Path, dtype: str | None = None) -> nn.Sequential:
    torch.save(resident().state_dict(), folder / "model.pt")
    return load_checkpoint_and_dispatch(
        resident(), folder / "model.pt", {"": "disk"}, ring=2, dtype=dtype
    )


def weight_of(model: nn.Module) -> nn.Parameter:
    found = model.get_parameter("2.weight")
    assert isinstance(found, nn.Parameter)
    return found


# Copies.

COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "double": lambda w: w.double(),
    "to a type": lambda w: w.to(torch.bfloat16),
    "to nothing new, copied": lambda w: w.to(device=None, dtype=None, copy=True),
    "type_as": lambda w: w.type_as(torch.empty(0, dtype=torch.float16)),
    "like another, copied": lambda w: w.to(torch.empty(0), copy=True),
    "to a type, not waiting, copied": lambda w: w.to(torch.float32, True, True),
    "to a device and a type, copied": lambda w: w.to(
        "cpu", torch.float64, non_blocking=True, copy=True
    ),
    "to an order, copied": lambda w: w[None, None].to(copy=True, memory_format=torch.channels_last),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "made contiguous": lambda w: w.t().contiguous(),
    "a shape that needs a copy": lambda w: w.t().reshape(-1),
    "clone made contiguous": lambda w: torch.clone(w.t(), memory_format=torch.contiguous_format),
    "chunk cloned": lambda w: w.chunk(2)[1].clone(),
    "pad by nothing": lambda w: nn.functional.pad(w, (0, 0)),
    "tensor": torch.tensor,
    "deep copy": copy.deepcopy,
}
# What libraries do to every weight to save it.
LAZY = {"cat", "stack", "made contiguous", "a shape that needs a copy", "clone made contiguous"}
TAKES: dict[str, Callable[[nn.Parameter], torch.Tensor]] = {
    "it": lambda w: w,
    "detached": lambda w: w.detach(),
    "data": lambda w: w.data,
    "view": lambda w: w[:],
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
@pytest.mark.parametrize("taken", TAKES)
@pytest.mark.parametrize("name", COPIES)
def test_whatever_torch_calls_a_copy_can_be_written(
    name: str,
    taken: str,
    mode: Callable[[], contextlib.AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    model = streaming(tmp_path)
    with mode():
        found, expected = (
            COPIES[name](TAKES[taken](weight_of(each))) for each in (model, resident())
        )
    assert isinstance(found, Paged) == is_address(found) == (name in LAZY)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(found, expected)
    with torch.no_grad():
        found.zero_()
    assert not is_address(found)
    assert not found.any()
    assert is_address(weight_of(model))
    assert torch.equal(model(X), resident()(X))


def test_a_deep_copy_of_a_weight_is_what_it_is_in_memory(tmp_path: Path) -> None:
    model = streaming(tmp_path)
    found = copy.deepcopy(weight_of(model))
    assert type(found) is nn.Parameter
    assert found.requires_grad
    for container in (
        copy.deepcopy(dict(model.named_parameters())),
        copy.deepcopy(model.state_dict()),
    ):
        assert not any(isinstance(each, Paged) for each in container.values())
        assert torch.equal(container["2.weight"], weight_of(resident()))


def test_a_deep_copy_of_a_module_streams(tmp_path: Path) -> None:
    model = streaming(tmp_path)
    for twin in (copy.deepcopy(model), copy.deepcopy({"models": [model]})["models"][0]):
        assert all(is_address(each) for each in twin.parameters())
        assert torch.equal(twin(X), resident()(X))


def test_a_state_dict_of_clones_is_a_state_dict_in_memory(tmp_path: Path) -> None:
    model = streaming(tmp_path)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    assert not any(isinstance(each, Paged) for each in state.values())
    other = resident()
    other.load_state_dict({name: each.add_(1) for name, each in state.items()})
    assert torch.equal(weight_of(other), weight_of(resident()) + 1)
    assert torch.equal(model(X), resident()(X))


def test_a_clone_may_be_the_data_of_another_weight(tmp_path: Path) -> None:
    model, layer = streaming(tmp_path), nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight.data = weight_of(model).clone()
    assert torch.equal(layer(X), X @ weight_of(resident()).t())


def test_a_module_is_cast_and_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, casts = streaming(tmp_path), ("half", "bfloat16", "double", "float")
    with monkeypatch.context() as patched:
        patched.setattr("shardkit.load.lazy.paged.read_into", lambda *_: pytest.fail("read"))
        for cast in casts:
            getattr(model, cast)()
        model.to(torch.bfloat16).type(torch.float64).to("cpu", torch.bfloat16)
    assert all(is_address(each) for each in model.parameters())
    same = resident()
    for cast in casts:
        getattr(same, cast)()
    assert torch.equal(model(X.bfloat16()), same.to(torch.bfloat16)(X.bfloat16()))


# Writes.


def stepped(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()


def given_data(weight: nn.Parameter) -> None:
    with torch.inference_mode(False):
        weight.data = torch.full((WIDTH, WIDTH), 2.0).t()


def added_to_data(weight: nn.Parameter) -> None:
    weight.data += 1


def written_by_an_older_view(weight: nn.Parameter) -> None:
    row, turned = weight.detach()[1:3], weight.data.t()
    row.mul_(2)
    turned[0] = 5
    assert torch.equal(weight.detach()[1:3], row)
    assert torch.equal(weight.t(), turned)


WRITES: dict[str, Write] = {
    "add_": lambda w: w.add_(1),
    "div_": lambda w: w.div_(2),
    "in data": lambda w: w.data.mul_(3),
    "in what is detached": lambda w: w.detach().zero_(),
    "an element": lambda w: w.__setitem__((0, 1), 7.0),
    "rows": lambda w: w.data.__setitem__(slice(1, 3), torch.ones(2, WIDTH)),
    "by a mask": lambda w: w.data.masked_fill_(torch.eye(WIDTH, dtype=torch.bool), 0),
    "augmented": added_to_data,
    "copy_": lambda w: w.copy_(torch.ones(WIDTH, WIDTH)),
    "out": lambda w: torch.add(torch.ones(WIDTH, WIDTH), 1, out=w.data),
    "initialised": nn.init.ones_,
    "a list": lambda w: torch._foreach_mul_([w, torch.ones(1)], 2),
    "a row of turned": lambda w: w.data.t()[2].fill_(0.5),
    "as words": lambda w: w.data.view(torch.int32)[0].bitwise_and_(-4096),
    "by an older view": written_by_an_older_view,
    "twice": lambda w: (w.add_(1), w.data.sub_(0.5)),
    "an optimizer": stepped,
    "other data": given_data,
}


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", WRITES)
def test_a_written_weight_is_in_memory_and_the_others_stream(
    name: str,
    warm: bool,
    mode: Callable[[], contextlib.AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    model, same = streaming(tmp_path), resident()
    if warm:
        model(X)
    for each in (model, same):
        with mode():
            WRITES[name](weight_of(each))
    for _ in range(2):
        assert torch.equal(model(X), same(X))
    assert [name for name, each in model.named_parameters() if not is_address(each)] == ["2.weight"]
    assert torch.equal(weight_of(model) + 0, weight_of(same) + 0)
    assert not torch.equal(weight_of(same), weight_of(resident()))
    assert type(model.state_dict()["2.weight"]) is torch.Tensor


def test_what_a_written_weight_gives_shares_its_memory_as_in_memory(tmp_path: Path) -> None:
    model = streaming(tmp_path)
    weight = weight_of(model)
    with torch.no_grad():
        assert weight.add_(1) is weight
    assert weight.data_ptr() == weight.detach().data_ptr() == weight.untyped_storage().data_ptr()
    weight.detach().numpy()[0, 0] = 9.0
    assert weight[0, 0].item() == 9.0
    assert "in memory" in repr(weight)


def test_a_written_weight_is_saved_copied_and_pickled_as_it_is(tmp_path: Path) -> None:
    model, same = streaming(tmp_path), resident()
    with torch.no_grad():
        for each in (model, same):
            weight_of(each).mul_(2)
    save(model, tmp_path / "saved")
    assert torch.equal(tensors(tmp_path / "saved")["2.weight"], weight_of(same))
    assert torch.equal(pickle.loads(pickle.dumps(weight_of(model).detach())), weight_of(same))
    assert torch.equal(pickle.loads(pickle.dumps(weight_of(model))), weight_of(same))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        weight_of(twin).zero_()
    assert torch.equal(model(X), same(X))
    assert not torch.equal(twin(X), same(X))


def test_a_written_weight_outlives_the_hooks(tmp_path: Path) -> None:
    model, same = streaming(tmp_path), resident()
    with torch.no_grad():
        for each in (model, same):
            weight_of(each).mul_(2)
    closed = copy.deepcopy(model)
    close(closed)
    assert torch.equal(closed(X), same(X))
    remove_hooks(model)
    assert type(weight_of(model)) is nn.Parameter
    assert weight_of(model).requires_grad
    assert torch.equal(model(X), same(X))


def test_a_model_with_written_weights_may_be_dispatched_anew(tmp_path: Path) -> None:
    model, same = streaming(tmp_path), resident()
    with torch.no_grad():
        for each in (model, same):
            weight_of(each).mul_(2)
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path / "spilled")
    assert all(is_address(each) for each in model.parameters())
    assert torch.equal(model(X), same(X))
    with torch.no_grad():
        for each in (model, same):
            weight_of(each).add_(1)
    dispatch_model(model, {"": "cpu"})
    assert all(type(each) is nn.Parameter and each.requires_grad for each in model.parameters())
    assert torch.equal(model(X), same(X))


def test_weights_that_are_cast_as_they_are_read_can_be_written(tmp_path: Path) -> None:
    model, same = streaming(tmp_path, dtype="bf16"), resident().to(torch.bfloat16)
    with torch.no_grad():
        for each in (model, same):
            weight_of(each).mul_(2)
    assert torch.equal(model(X.bfloat16()), same(X.bfloat16()))


SHAPES: dict[str, Callable[[torch.Tensor], object]] = {
    "resize": lambda w: w.resize_(3),
    "set": lambda w: w.set_(torch.ones(3).untyped_storage()),
    "turn": lambda w: w.t_(),
}


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_what_would_change_the_shape_of_a_weight_is_refused(
    name: str, written: bool, tmp_path: Path
) -> None:
    model = streaming(tmp_path)
    with torch.no_grad():
        weight, view = weight_of(model), weight_of(model).detach()
        if written:
            weight.add_(0)
        for each in (weight, view):
            with pytest.raises(
                ReadOnly,
                match=r"would (change the shape|replace the memory) of '2\.weight', which streams",
            ):
                SHAPES[name](each)
    assert torch.equal(model(X), resident()(X))


def test_a_weight_that_does_not_fit_into_memory_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streaming(tmp_path)
    monkeypatch.setattr(backing, "free_memory", lambda device: 100)
    writes: list[Write] = [lambda w: w.add_(1), lambda w: w.data.mul_(2)]
    for write in writes:
        sentence = r"'2\.weight' streams, and needs 144 B of memory to be written"
        with torch.no_grad(), pytest.raises(OverBudget, match=sentence) as caught:
            write(weight_of(model))
        assert (caught.value.needed, caught.value.available) == (144, 100)
    assert is_address(weight_of(model))
    assert torch.equal(model(X), resident()(X))


# Writes from inside of the block.


class Counting(nn.Module):
    """A module that writes to what it has while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(1.5)
            self.get_buffer("count").add_(1)
        return x * self.weight + self.get_buffer("count")


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_a_forward_writes_to_its_own_weights_stays_written(
    mode: Callable[[], contextlib.AbstractContextManager[None]], tmp_path: Path
) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(*(Counting() for _ in range(4))).eval()

    torch.save(build().state_dict(), tmp_path / "model.pt")
    model = load_checkpoint_and_dispatch(
        build(), tmp_path / "model.pt", {"": "disk"}, ring=2, offload_buffers=True
    )
    twin, same, x = copy.deepcopy(model), build(), torch.ones(4)
    with mode():
        for _ in range(3):
            assert torch.equal(model(x), same(x))
        assert torch.equal(
            twin(x), build()(x)
        )  # which shares the stream, and finds nothing of that in it
    assert torch.equal(model[2].get_buffer("count"), torch.full((1,), 3.0))


def test_a_write_of_a_forward_that_does_not_fit_is_an_error_and_leaves_the_stream_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(nn.Sequential(Counting(), Counting()).state_dict(), tmp_path / "model.pt")
    model = nn.Sequential(Counting(), Counting()).eval()
    load_checkpoint_and_dispatch(model, tmp_path / "model.pt", {"": "disk"}, ring=2)
    with monkeypatch.context() as patched:
        patched.setattr(backing, "free_memory", lambda device: 1)
        with torch.no_grad(), pytest.raises(OverBudget, match=r"'0\.weight' streams"):
            model(torch.ones(4))
    with torch.no_grad():
        assert torch.equal(model[1](torch.ones(4)), torch.arange(4.0) * 1.5 + 1)


# Moves.


def test_a_weight_cannot_be_moved_whatever_the_form_of_the_arguments(tmp_path: Path) -> None:
    weight = weight_of(streaming(tmp_path))
    moves: list[Callable[[], object]] = [
        lambda: weight.to("meta"),
        lambda: weight.to(torch.empty(0, device="meta")),
        lambda: weight.to(device="meta", copy=True),
        lambda: weight.to("meta", torch.float64, True, True),
    ]
    for move in moves:
        with pytest.raises(LoadError, match="cannot be moved"):
            move()
    assert weight.to("cpu") is weight.to(torch.float32) is weight.to(torch.empty(0)) is weight
    assert isinstance(weight, Streamed)


# What torch does to a weight that was written is as in memory.

OF_WRITTEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: copied for name, copied in COPIES.items() if name not in ("tensor", "deep copy")},
    "clone": lambda w: w.clone(),
    "half": lambda w: w.half(),
    "pad": lambda w: nn.functional.pad(w, (1, 0)),
    "empty": lambda w: torch.empty_like(w).fill_(1),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "full": lambda w: torch.full_like(w, 3),
    "random": lambda w: torch.rand_like(w) + torch.randn_like(w),
    "new": lambda w: torch.cat(
        [w.new_zeros(2), w.new_ones(2), w.new_full((2,), 3), w.new_empty(2).fill_(4)]
    ),
    "new with strides": lambda w: w.new_empty_strided((2, 3), (1, 2)).fill_(5),
    "copied from": lambda w: torch.zeros_like(w).copy_(w),
    "flattened": lambda w: w.flatten(),
    "to the device that it is on": lambda w: w.to("cpu").cpu(),
}


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
@pytest.mark.parametrize("of", ["weight", "join"])
@pytest.mark.parametrize("name", OF_WRITTEN)
def test_what_was_written_is_copied_and_cast_like_any_tensor(
    name: str, of: str, mode: Callable[[], contextlib.AbstractContextManager[None]], tmp_path: Path
) -> None:
    def made(model: nn.Module) -> torch.Tensor:
        weight: torch.Tensor = weight_of(model)
        if of == "join":
            weight = torch.cat([weight.detach(), model.get_parameter("3.weight").detach()])
        weight.add_(1)
        torch.manual_seed(1)
        return OF_WRITTEN[name](weight)

    with mode():
        found, expected = made(streaming(tmp_path)), made(resident())
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_is_cast_after_a_weight_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    model, expected = streaming(tmp_path), resident()
    with torch.no_grad():
        for each in (model, expected):
            weight_of(each).add_(1)
        found, there = model.to(dtype)(X.to(dtype)), expected.to(dtype)(X.to(dtype))
    assert {each.dtype for each in model.parameters()} == {dtype}
    assert torch.equal(found, there)


def test_a_parametrization_is_refused_with_what_it_would_do_and_what_to_do(tmp_path: Path) -> None:
    model = streaming(tmp_path)
    with pytest.raises(
        ReadOnly, match=r"set_ would replace the memory of '2\.weight', which streams"
    ) as refused:
        nn.utils.parametrizations.spectral_norm(model[2])
    assert "device_map" in str(refused.value.hint)
    mixed = load_checkpoint_and_dispatch(
        resident(), tmp_path / "model.pt", {"": "disk", "2": "cpu"}, ring=2
    )
    nn.utils.parametrizations.spectral_norm(mixed.get_submodule("2"))  # as the hint says
    assert mixed(X).shape == X.shape
