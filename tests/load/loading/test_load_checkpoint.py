"""A checkpoint comes into a model as its own library loads it, bit for bit, or the model stays as
it was.
"""

from __future__ import annotations

import json
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

import shardkit
from accelerators import TIERS, allocated, needs_one
from aligned import aligned
from shardkit.errors import BadDType, FormatError, LoadError, Mismatch
from shardkit.load.lazy.paged import Paged
from shardkit.load.loading.load_checkpoint import load_checkpoint_in_model
from shardkit.load.loading.match import Assignment
from shardkit.load.modules.init_empty import init_empty_weights


class Net(nn.Module):
    """Every kind of weight in one: ties, buffers of both kinds, a scalar, an empty tensor,
    integers.
    """

    def __init__(self, *, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.lstm = nn.LSTM(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        result: torch.Tensor = self.head(self.norm(hidden) * self.scale)
        return result


def trained() -> Net:
    """A net whose every value is another than a new one has."""
    torch.manual_seed(1)
    net = Net().eval()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(
                torch.randn(tensor.shape)
                if tensor.is_floating_point()
                else torch.randint(0, 9, tensor.shape)
            )
        net.get_buffer("norm.running_var").abs_()
        net.get_buffer("scratch").fill_(1)
    return net


def empty() -> Net:
    with init_empty_weights():
        return Net().eval()


def save_sharded(state: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    names = list(state)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, inside in files.items():
        save_file({name: state[name].clone() for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map, "metadata": {}})
    )


SAVERS: dict[str, Callable[[dict[str, torch.Tensor], Path], object]] = {
    "zip": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, path: save_file(
        {name: each.clone() for name, each in state.items()}, path
    ),
    "index": save_sharded,
    "nested": lambda state, path: torch.save(
        {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}}, path
    ),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are alike bit by bit, wherever they are."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.detach().cpu(), b.detach().cpu())
    )


def assert_same_state(model: nn.Module, wanted: nn.Module) -> None:
    found, needed = model.state_dict(), wanted.state_dict()
    assert list(found) == list(needed)
    assert [name for name in needed if not same(found[name], needed[name])] == []


def load(model: nn.Module, path: Path, **options: Any) -> Assignment:  # Any: of any of the options
    """Load, and do not mind what there is to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_checkpoint_in_model(model, path, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(trained().state_dict(), tmp_path / "net.bin")
    return tmp_path / "net.bin"


IN_MEMORY = [each for each in TIERS if each != "disk"]
DEVICE_MAPS: list[Any] = [
    None,
    {"": "cpu"},
    {"embed": "disk", "": "cpu", "norm": "disk"},
    {"": "disk"},
    *(
        pytest.param(each, marks=needs_one)
        for each in ({"": 0}, {"embed": "disk", "": 0, "norm": "cpu", "head": 0})
    ),
]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("device_map", DEVICE_MAPS)
@pytest.mark.parametrize("skeleton", [empty, Net])
@pytest.mark.parametrize("saver", SAVERS)
def test_every_kind_of_checkpoint_comes_bit_for_bit_into_every_model(
    tmp_path: Path, saver: str, skeleton: Callable[[], Net], device_map: Any, mmap: bool
) -> None:
    path = tmp_path / "checkpoint"
    wanted = trained()
    SAVERS[saver](wanted.state_dict(), path)
    model = skeleton().eval()
    assignment = load(model, path, device_map=device_map, strict=True, mmap=mmap)
    assert_same_state(model, wanted)
    assert model.head.weight is model.embed.weight
    assert (assignment.missing, assignment.unexpected) == ((), ())
    if 0 in (device_map or {}).values():
        return  # nothing moves inputs, and another device computes other bits
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(
            aligned(model)(ids), wanted(ids)
        )  # what is mapped lies where it lies in the file


def test_nothing_stays_on_meta_and_what_is_resident_is_aligned(checkpoint: Path) -> None:
    model = empty()
    load(model, checkpoint)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.parameters())


def test_a_real_model_keeps_its_parameters_and_an_optimizer_its_hold_on_them(
    checkpoint: Path,
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = dict(model.named_parameters())
    load(model, checkpoint)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    model(torch.tensor([[1, 2, 3, 4]])).sum().backward()
    optimizer.step()
    assert not same(model.embed.weight, trained().embed.weight)


def test_what_a_parameter_is_stays(tmp_path: Path) -> None:
    class Marked(nn.Parameter):
        loader = ""

    model = nn.Linear(2, 2, device="meta")
    model.weight = marked = Marked(model.weight.detach(), requires_grad=False)
    marked.loader = "mine"
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "x.safetensors")
    load(model, tmp_path / "x.safetensors")
    assert isinstance(model.weight, Marked)
    assert (model.weight.loader, model.weight.requires_grad, model.bias.requires_grad) == (
        "mine",
        False,
        True,
    )
    assert type(model.bias) is nn.Parameter


def test_weights_on_disk_are_read_when_they_are_used_and_buffers_are_not_unless_asked(
    checkpoint: Path,
) -> None:
    model = empty()
    load(model, checkpoint, device_map={"": "disk"})
    assert all(isinstance(parameter.data, Paged) for parameter in model.parameters())
    assert not any(isinstance(buffer, Paged) for buffer in model.buffers())
    load(model, checkpoint, device_map={"": "disk"}, offload_buffers=True)
    assert isinstance(model.norm.running_mean, Paged)
    load(model, checkpoint, device_map={"": "cpu"})
    assert not any(isinstance(tensor, Paged) for tensor in (*model.parameters(), *model.buffers()))
    assert_same_state(model, trained())


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16", "bf16", torch.float64])
@pytest.mark.parametrize("device", TIERS)
def test_floats_are_cast_and_integers_kept_on_every_tier(
    checkpoint: Path, dtype: Any, device: str | int
) -> None:
    model = empty()
    load(model, checkpoint, dtype=dtype, device_map={"": device})
    wanted = trained().to(
        {"float16": torch.float16, torch.float64: torch.float64}.get(dtype, torch.bfloat16)
    )
    assert_same_state(model, wanted)
    assert model.steps.dtype == torch.int64


def test_a_type_that_is_none_is_refused(checkpoint: Path) -> None:
    with pytest.raises(BadDType, match="'int8' is not a floating-point type"):
        load(Net(), checkpoint, dtype="int8")


def test_without_a_type_the_model_says_which(checkpoint: Path) -> None:
    model = Net().half()
    load(model, checkpoint)
    assert_same_state(model, trained().half())


@pytest.mark.parametrize("skeleton", [empty, Net])
@pytest.mark.parametrize("device", TIERS)
def test_a_shape_that_differs_is_found_before_anything_is_touched(
    tmp_path: Path, skeleton: Callable[[], Net], device: str | int
) -> None:
    state = trained().state_dict() | {"norm.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "net.bin")
    model = skeleton()
    before = {
        name: (id(tensor), tensor.is_meta or tensor.clone()) for name, tensor in _all(model).items()
    }
    with pytest.raises(
        Mismatch,
        match=r"net\.bin does not match the model: shape mismatch: 'norm\.bias' \(\[5\] in "
        r"the checkpoint, \[4\] in the model\)",
    ):
        load(model, tmp_path / "net.bin", device_map={"": device})
    _assert_untouched(model, before)


def _all(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _assert_untouched(model: nn.Module, before: dict[str, tuple[int, Any]]) -> None:
    for name, tensor in _all(model).items():
        identity, value = before[name]
        assert id(tensor) == identity
        assert tensor.is_meta if value is True else torch.equal(tensor, value)


@pytest.mark.parametrize("device", IN_MEMORY)
def test_a_load_that_fails_while_it_reads_leaves_the_model_and_the_folder_as_they_were(
    checkpoint: Path, device: str | int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truncated = checkpoint.read_bytes()
    opened = shardkit.open(checkpoint)
    monkeypatch.setattr(
        "shardkit.load.lazy.checkpoint.open_checkpoint", lambda *args, **kwargs: opened
    )
    monkeypatch.setattr(
        "shardkit.load.loading.install._STAGED", 1
    )  # so that some weights are on an accelerator when one cannot be read
    checkpoint.write_bytes(truncated[: len(truncated) // 2])
    model = Net()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in _all(model).items()}
    left = set(os.listdir(tmp_path)), threading.active_count(), allocated()
    with pytest.raises(FormatError, match="ends before byte"):
        load(model, checkpoint, device_map={"": device})
    _assert_untouched(model, before)
    assert (set(os.listdir(tmp_path)), threading.active_count(), allocated()) == left


def test_a_file_that_changes_while_it_is_read_is_noticed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = shardkit.open(checkpoint)
    monkeypatch.setattr(
        "shardkit.load.lazy.checkpoint.open_checkpoint", lambda *args, **kwargs: opened
    )
    os.utime(checkpoint, ns=(1, 1))
    with pytest.raises(LoadError, match="changed while it was read"):
        load(Net(), checkpoint)


@pytest.mark.parametrize("device", IN_MEMORY)
@pytest.mark.parametrize("saver", ["zip", "safetensors", "legacy"])
def test_overwriting_the_checkpoint_does_not_change_what_is_resident(
    tmp_path: Path, saver: str, device: str | int
) -> None:
    SAVERS[saver](trained().state_dict(), tmp_path / "net")
    model = empty()
    load(model, tmp_path / "net", device_map={"": device})
    with (tmp_path / "net").open("r+b") as file:
        file.write(b"\xff" * (tmp_path / "net").stat().st_size)
    assert_same_state(model, trained())


@pytest.mark.parametrize("device", TIERS)
def test_missing_names_are_told_and_kept_and_strict_refuses_them(
    device: str | int, tmp_path: Path
) -> None:
    state = trained().state_dict()
    del state["norm.bias"]
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "net.bin")
    model = Net()
    with pytest.warns(UserWarning, match=r"net\.bin") as said:
        assignment = load_checkpoint_in_model(model, tmp_path / "net.bin", {"": device})
    assert (assignment.missing, assignment.unexpected) == (("norm.bias",), ("more",))
    assert [str(warning.message) for warning in said] == list(assignment.notes)
    assert {warning.filename for warning in said} == {__file__}
    assert torch.equal(model.norm.bias, torch.zeros(4))
    with pytest.raises(Mismatch, match=r"missing: 'norm\.bias'; not in the model: 'more'"):
        load(Net(), tmp_path / "net.bin", device_map={"": device}, strict=True)
    with pytest.raises(Mismatch, match=r"with no values in the model to keep: 'norm\.bias'"):
        load(empty(), tmp_path / "net.bin", device_map={"": device})


def test_arguments_without_a_meaning_are_not_accepted_in_silence(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="offload_folder is ignored"):
        load_checkpoint_in_model(empty(), checkpoint, {"": "disk"}, tmp_path / "offload")
    with pytest.warns(UserWarning, match="offload_state_dict is ignored"):
        load_checkpoint_in_model(empty(), checkpoint, offload_state_dict=True)
    assert not (tmp_path / "offload").exists()
    for refused in (
        {"offload_8bit_bnb": True},
        {"full_state_dict": False},
        {"broadcast_from_rank0": True},
    ):
        with pytest.raises(LoadError, match=next(iter(refused))):
            load(empty(), checkpoint, **refused)


@pytest.mark.parametrize(
    ("device_map", "sentence"),
    [
        ("auto", "device_map must be a dict here, found 'auto'"),
        ({"embed": "cpu"}, "gives no device to"),
        ({"": "quantum"}, "is not a device"),
        pytest.param(
            {"": 0},
            "no accelerator 0",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_device_map_that_cannot_be_met_is_refused(
    checkpoint: Path, device_map: Any, sentence: str
) -> None:
    model = empty()
    with pytest.raises(LoadError, match=sentence):
        load(model, checkpoint, device_map=device_map)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_modules_that_stay_in_fp32_do(checkpoint: Path) -> None:
    model = empty()
    load(model, checkpoint, dtype=torch.bfloat16, keep_in_fp32_modules=["norm"])
    assert (model.norm.weight.dtype, model.embed.weight.dtype) == (torch.float32, torch.bfloat16)


def test_a_weight_that_is_no_dense_tensor_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(2).to_sparse(), "bias": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(Mismatch, match="'weight' is a sparse tensor"):
        load(nn.Linear(2, 2), tmp_path / "x.pt")


def test_what_is_mapped_shares_the_file_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    net = trained()
    torch.save(net.state_dict(), tmp_path / "zip")
    model = empty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint_in_model(model, tmp_path / "zip", mmap=True)
    with pytest.warns(
        UserWarning,
        match="read into memory, because the file stores them in another form: 'scale'",
    ):
        load_checkpoint_in_model(empty(), tmp_path / "zip", mmap=True, dtype="bf16")
    with torch.no_grad():
        model.embed.weight.zero_()
    assert_same_state(Net_loaded(tmp_path / "zip"), net)


def Net_loaded(path: Path) -> Net:  # noqa: N802 - a net, made in another way
    net = Net()
    load(net, path)
    return net


class Counting(nn.Module):
    """A module with a state beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.count: object = torch.zeros(1)

    def get_extra_state(self) -> object:
        return self.count

    def set_extra_state(self, state: object) -> None:
        self.count = state


def test_extra_state_is_given_back_if_it_is_a_tensor_and_told_if_it_is_an_object(
    tmp_path: Path,
) -> None:
    counting, counted = Counting(), Counting()
    model, twin = nn.Sequential(counting), nn.Sequential(counted)
    counting.count = torch.tensor([7.0, 8.0])
    torch.save(model.state_dict(), tmp_path / "x.pt")
    load_checkpoint_in_model(twin, tmp_path / "x.pt", strict=True)
    assert isinstance(counted.count, torch.Tensor)
    assert counted.count.tolist() == [7.0, 8.0]
    counting.count = {"steps": 7}
    torch.save(model.state_dict(), tmp_path / "x.pt")
    notes = load(twin, tmp_path / "x.pt").notes
    assert any("which is not executed" in note for note in notes)


def test_lazy_modules_take_the_shapes_of_the_checkpoint(tmp_path: Path) -> None:
    linear = nn.Linear(3, 2)
    save_file(linear.state_dict(), tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of lazy modules that they are new
        lazy = nn.LazyLinear(2)
    load(lazy, tmp_path / "x.safetensors", strict=True)
    assert torch.equal(lazy(torch.ones(1, 3)), linear(torch.ones(1, 3)))


@pytest.mark.parametrize(
    "make", [lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), lambda: nn.GRU(3, 2)]
)
def test_modules_that_keep_their_weights_elsewhere_see_the_new_ones(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    wanted = make()
    torch.save(wanted.state_dict(), tmp_path / "x.pt")
    with init_empty_weights():
        model = make()
    load(model, tmp_path / "x.pt", strict=True)
    found, needed = (each(torch.ones(1, 3)) for each in (model, wanted))
    assert torch.equal(found[0], needed[0])
