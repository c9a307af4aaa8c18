"""Models that run over CPU and disk are the models that they were, whatever is done to them meanwhile."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardkit.errors import LoadError, Mismatch, OverBudget
from shardkit.load.arrangement import attachments, close, remove_hooks
from shardkit.load.dispatch import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from shardkit.load.empty import init_empty_weights
from shardkit.load.moves import RoundTrip
from shardkit.load.pager import Pager, Streamed
from shardkit.load.stream import _READERS

WIDTH = 16
LAYERS = 11  # so that layers.1 is the beginning of layers.10


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


IDS = torch.arange(7)


def layer(model: Toy, number: int) -> Block:
    block = model.layers[number]
    assert isinstance(block, Block)
    return block


@pytest.fixture(scope="module")
def resident() -> Toy:
    torch.manual_seed(0)
    model = Toy().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.3 + 0.1)
    return model


@pytest.fixture(scope="module")
def expected(resident: Toy) -> torch.Tensor:
    logits: torch.Tensor = resident(IDS)
    return logits


@pytest.fixture(params=["safetensors", "zip", "legacy"])
def checkpoint(request: pytest.FixtureRequest, resident: Toy, tmp_path: Path) -> Path:
    return saved(resident, tmp_path, request.param)


@pytest.fixture
def file(resident: Toy, tmp_path: Path) -> Path:
    return saved(resident, tmp_path, "safetensors")


def saved(model: nn.Module, folder: Path, kind: str) -> Path:
    if kind == "safetensors":
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}
        save_file(tensors, folder / "model.safetensors")
        return folder / "model.safetensors"
    torch.save(model.state_dict(), folder / "model.bin", _use_new_zipfile_serialization=kind == "zip")
    return folder / "model.bin"


def empty() -> Toy:
    with init_empty_weights():
        return Toy().eval()


def loaded(file: Path, device_map: object = "disk", **options: object) -> Toy:
    mapping = {"": device_map} if isinstance(device_map, str) else device_map
    return load_checkpoint_and_dispatch(empty(), file, mapping, **options)  # type: ignore[arg-type]  # as each test needs them


def streamed(model: nn.Module) -> set[str]:
    return {name for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Streamed)}


def held(model: nn.Module) -> int:
    streams = {each.stream for _, _, _, each in attachments(model) if isinstance(each, Pager)}
    return sum(stream.nbytes for stream in streams)


MAPS: dict[str, dict[str, str]] = {
    "cpu": {"": "cpu"},
    "disk": {"": "disk"},
    "half": {"": "cpu"} | {f"layers.{number}": "disk" for number in range(0, LAYERS, 2)},
    "one": {"": "cpu", "layers.1": "disk"},
    "cut": {"": "cpu", "layers.3.up": "disk", "layers.4": "disk", "layers.4.down": "cpu"},
    "bare": {"": "disk", "layers": "cpu", "layers.10.up.weight": "disk"},
}


@pytest.mark.parametrize("name", MAPS)
def test_every_map_of_every_format_computes_the_same_bits(
    name: str, checkpoint: Path, resident: Toy, expected: torch.Tensor
) -> None:
    model = loaded(checkpoint, MAPS[name])
    for _ in range(3):
        assert torch.equal(model(IDS), expected)
    assert not any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values())
    assert model.hf_device_map == MAPS[name]
    stored = resident.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor + 0, stored[key] + 0), key
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


def test_the_map_says_what_streams_and_a_prefix_is_a_module(file: Path) -> None:
    names = streamed(loaded(file, MAPS["one"]))
    assert names == {
        f"layers.1.{each}" for each in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    }


def test_what_is_tied_or_owned_by_what_contains_blocks_stays_and_is_one(file: Path) -> None:
    model = loaded(file)
    assert model.embed.weight is model.head.weight
    assert not streamed(model) & {"embed.weight", "head.weight", "scale", "shift"}
    assert model.scale.requires_grad
    assert not layer(model, 0).up.weight.requires_grad


def test_buffers_on_disk_have_the_values_of_the_checkpoint(file: Path, resident: Toy, expected: torch.Tensor) -> None:
    stays, streams = loaded(file), loaded(file, offload_buffers=True)
    for model in (stays, streams):
        assert torch.equal(
            layer(model, 3).norm.get_buffer("running_mean") + 0, layer(resident, 3).norm.get_buffer("running_mean")
        )
        assert torch.equal(model(IDS), expected)
    assert "layers.3.norm.running_mean" not in streamed(stays)
    assert "layers.3.norm.running_mean" in streamed(streams)


def test_accelerate_gives_such_a_buffer_its_initial_value(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.norm(x))
            return logits

    torch.manual_seed(0)
    right = Untied().eval()
    torch.nn.init.uniform_(right.norm.get_buffer("running_mean"), 1, 2)
    save_file(right.state_dict(), tmp_path / "norm.safetensors")
    x = torch.randn(5, WIDTH)
    devices = {"norm": "disk", "head": "cpu"}
    with accelerate.init_empty_weights():
        theirs = Untied().eval()
    file = str(tmp_path / "norm.safetensors")
    theirs = accelerate.load_checkpoint_and_dispatch(theirs, file, devices, offload_folder=str(tmp_path / "x"))
    with init_empty_weights():
        ours = Untied().eval()
    ours = load_checkpoint_and_dispatch(ours, file, devices)
    assert not torch.equal(theirs(x), right(x))
    assert torch.equal(ours(x), right(x))


def test_a_map_that_is_all_disk_works_where_accelerate_asks_safetensors_for_a_device_called_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    right = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save_file(right.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 4)
    devices, file = {"0": "disk", "1": "disk"}, str(tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="disk is invalid"):
        accelerate.load_checkpoint_and_dispatch(copy.deepcopy(right), file, devices, offload_folder=str(tmp_path / "x"))
    assert torch.equal(load_checkpoint_and_dispatch(copy.deepcopy(right), file, devices)(x), right(x))


def test_a_parameter_may_be_called_as_quantisers_call_theirs(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    right = nn.Sequential(nn.ModuleDict({"SCBlock": nn.Linear(4, 4)}))
    torch.save(right.state_dict(), tmp_path / "model.bin")
    expected = right.state_dict()["0.SCBlock.weight"]
    theirs, ours = (nn.Sequential(nn.ModuleDict({"SCBlock": nn.Linear(4, 4)})) for _ in range(2))
    accelerate.load_checkpoint_and_dispatch(theirs, str(tmp_path / "model.bin"), {"": "cpu"})
    assert not torch.equal(theirs.state_dict()["0.SCBlock.weight"], expected)
    load_checkpoint_and_dispatch(ours, tmp_path / "model.bin", {"": "disk"})
    assert torch.equal(ours.state_dict()["0.SCBlock.weight"] + 0, expected)


class Failing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")


def test_accelerate_leaves_weights_in_memory_after_an_exception_and_we_do_not(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    devices, x = {"0": "cpu", "1": "disk"}, torch.ones(1, 4)
    theirs, ours = (nn.Sequential(nn.Linear(4, 4), Failing(4, 4)) for _ in range(2))
    accelerate.dispatch_model(theirs, devices, offload_dir=str(tmp_path / "theirs"))
    dispatch_model(ours, devices, offload_dir=tmp_path / "ours")
    away = [theirs[1].weight.is_meta, isinstance(ours[1].weight, Streamed)]
    for model in (theirs, ours):
        with pytest.raises(ValueError, match="on purpose"):
            model(x)
    assert away == [True, True]
    assert not theirs[1].weight.is_meta
    assert isinstance(ours[1].weight, Streamed)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_500_forwards_take_no_more_than_the_first_and_leave_nothing(tmp_path: Path) -> None:
    resident = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    save_file(resident.state_dict(), tmp_path / "model.safetensors")
    begun, x = (open_files(), threading.active_count()), torch.ones(1, WIDTH)
    model = load_checkpoint_and_dispatch(copy.deepcopy(resident), tmp_path / "model.safetensors", {"": "disk"}, ring=2)
    stream = next(pager.stream for *_, pager in attachments(model) if isinstance(pager, Pager))
    seen = []
    with torch.no_grad():
        expected = resident(x)
        for number in range(500):
            assert torch.equal(model(x), expected)
            if number % 100 == 99:
                gc.collect()
                seen.append((open_files(), stream.nbytes, len(gc.get_objects())))
                assert threading.active_count() <= begun[1] + _READERS  # which start when there is work for one more
    first, last = seen[0], seen[-1]  # of which the first may hold what tests before left behind
    assert last[0] <= first[0]
    assert last[1] == first[1] <= stream.room
    assert last[2] <= first[2] + 400  # less than one for each forward
    close(model)
    del model, stream
    gc.collect()
    end = time.monotonic() + 20
    while (open_files(), threading.active_count()) > begun and time.monotonic() < end:  # threads end by themselves
        time.sleep(0.01)
    assert open_files() <= begun[0]
    assert threading.active_count() <= begun[1]


def test_a_ring_may_be_so_many_bytes(file: Path, expected: torch.Tensor) -> None:
    largest = 4 * (4 * WIDTH + 4 * WIDTH * WIDTH + 3 * WIDTH) + 64
    model = load_checkpoint_and_dispatch(Toy().eval(), file, {"": "disk"}, no_split_module_classes=["Block"], ring=str(largest))
    with torch.no_grad():
        assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)
    close(model)


def test_a_block_that_does_not_fit_is_told_before_the_model_is_touched(file: Path) -> None:
    with init_empty_weights(include_buffers=True):
        model = Toy()
    with pytest.raises(OverBudget, match="the largest block takes"):
        load_checkpoint_and_dispatch(model, file, {"": "disk"}, no_split_module_classes=["Block"], ring="1KB")
    assert all(weight.is_meta for weight in model.parameters())
    assert not list(attachments(model))


@pytest.mark.parametrize("ring", [2, 4])
def test_four_threads_give_1200_right_answers(file: Path, expected: torch.Tensor, ring: int) -> None:
    model = loaded(file, ring=ring)
    right: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            right.extend(torch.equal(model(IDS), expected) for _ in range(300))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert right == [True] * 1200


ORDERS = [[0, 1, 2], [10, 3, 3, 3, 0], list(range(LAYERS))[::-1], [1, 10, 1, 10], [5]]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_blocks_may_be_reused_skipped_and_reordered(file: Path, resident: Toy, order: list[int]) -> None:
    model, same = loaded(file, ring=2), copy.deepcopy(resident)
    model(IDS)
    model.order = same.order = order
    for _ in range(3):
        assert torch.equal(model(IDS), same(IDS))


def test_weights_may_be_used_without_their_blocks_forward(file: Path, resident: Toy) -> None:
    model = loaded(file)
    x = torch.randn(5, WIDTH)
    block, same = layer(model, 1), layer(resident, 1)
    assert torch.equal(block.up.weight @ x.T, same.up.weight @ x.T)
    assert torch.equal(block.up(x), same.up(x))
    assert torch.equal(block.forward(x), same(x))
    assert torch.equal(nn.functional.linear(x, block.up.weight[:3]), nn.functional.linear(x, same.up.weight[:3]))
    assert next(block.parameters()).device == torch.device("cpu")


def test_a_block_may_read_its_own_and_others_weights(file: Path, resident: Toy) -> None:
    model = loaded(file, ring=2)
    seen: list[bool] = []
    model.before = lambda number: seen.append(
        torch.equal(layer(model, -1 - number).up.weight + 0, layer(resident, -1 - number).up.weight)
    )
    model(IDS)
    assert seen == [True] * LAYERS


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_what_is_raised_in_a_forward_leaves_nothing_resident(
    file: Path, expected: torch.Tensor, error: type[BaseException], inside: bool
) -> None:
    model = loaded(file, ring=2)
    addresses = streamed(model)

    def fail(*_: object) -> None:
        raise error

    for _ in range(5):
        if inside:
            handle = layer(model, 4).down.register_forward_pre_hook(fail)
        else:
            handle = layer(model, 4).register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(IDS)
        handle.remove()
        if error is ValueError:
            assert streamed(model) == addresses
        assert torch.equal(model(IDS), expected)
        assert streamed(model) == addresses
    assert held(model) <= 2 * 4 * (2 * 2 * WIDTH * WIDTH + 5 * WIDTH + 64)


def test_what_an_interrupt_leaves_held_is_let_go_when_its_thread_ends_or_by_closing(file: Path) -> None:
    model = loaded(file, ring=2)
    addresses = streamed(model)

    def interrupted() -> None:
        handle = layer(model, 4).down.register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            model(IDS)
        handle.remove()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()
    gc.collect()
    assert streamed(model) == addresses
    interrupted()
    assert streamed(model) < addresses
    close(model)
    assert streamed(model) == addresses


def test_a_copy_shares_the_stream_and_nothing_else(file: Path, expected: torch.Tensor) -> None:
    model = loaded(file, ring=2)
    twin = copy.deepcopy(model)
    streams = [{each.stream for _, _, _, each in attachments(each) if isinstance(each, Pager)} for each in (model, twin)]
    assert streams[0] == streams[1]
    assert streamed(twin) == streamed(model)
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not model.head.weight
    with torch.no_grad():
        twin.scale.zero_()
    assert torch.equal(model(IDS), expected)
    assert not torch.equal(twin(IDS), expected)
    block = copy.deepcopy(layer(model, 2))
    del model
    gc.collect()
    assert torch.equal(block(torch.ones(2, WIDTH)), layer(twin, 2)(torch.ones(2, WIDTH)))


def test_the_state_dict_reads_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(file)
    monkeypatch.setattr("shardkit.load.paged.read_into", lambda *_: pytest.fail("read"))
    assert list(model.state_dict()) == list(empty().state_dict())


def test_a_model_that_streams_cannot_be_moved_and_may_be_cast(file: Path, resident: Toy) -> None:
    model = loaded(file)
    with pytest.raises(LoadError, match="cannot be moved"):
        layer(model, 0).to("meta")
    assert model.to("cpu") is model
    half, same = model.to(torch.float64), copy.deepcopy(resident).to(torch.float64)
    assert torch.equal(half(IDS), same(IDS))
    assert torch.equal(half.to(torch.float64)(IDS), same(IDS))


def test_what_is_put_in_a_weights_place_stays_there(file: Path, resident: Toy) -> None:
    model, same = loaded(file), copy.deepcopy(resident)
    for each in (model, same):
        torch.manual_seed(3)
        layer(each, 2).up.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))
    for _ in range(2):
        assert torch.equal(model(IDS), same(IDS))
    assert layer(model, 2).up.weight.requires_grad


def test_adapters_learn_on_top_of_resident_weights(file: Path) -> None:
    model = loaded(file, {"": "cpu", "layers.0": "disk"})
    layer(model, 0).requires_grad_(False)
    model(IDS).sum().backward()
    assert layer(model, 5).up.weight.grad is not None
    assert layer(model, 0).up.weight.grad is None


def test_a_backward_that_comes_too_late_raises(file: Path) -> None:
    model = loaded(file, ring=2)
    loss = model(IDS).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modes_of_torch_change_nothing(
    file: Path, expected: torch.Tensor, mode: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    model = loaded(file, ring=2)
    for _ in range(2):
        with mode():
            assert torch.equal(model(IDS), expected)
    assert torch.equal(model(IDS), expected)


def test_autocast_computes_the_same_bits(file: Path, resident: Toy) -> None:
    model = loaded(file, ring=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(IDS), resident(IDS))
        assert torch.equal(model(IDS), resident(IDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_compiled_model_computes_what_the_resident_one_does(file: Path, resident: Toy, backend: str) -> None:
    torch._dynamo.reset()
    model = loaded(file, ring=2)
    model.order = [0, 1]
    same = copy.deepcopy(resident)
    same.order = [0, 1]
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(IDS), same(IDS))
    assert streamed(model)
    torch._dynamo.reset()


def replaced(file: Path) -> None:
    content = file.read_bytes()
    file.rename(file.with_name("old"))
    file.write_bytes(content)


def overwritten(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")


CHANGES = [replaced, overwritten, lambda file: file.unlink(), lambda file: os.truncate(file, file.stat().st_size - 8)]


@pytest.mark.parametrize("change", CHANGES, ids=["replaced", "overwritten", "removed", "cut"])
def test_a_file_that_changes_is_told_by_name(file: Path, change: Callable[[Path], None], expected: torch.Tensor) -> None:
    model, kept = loaded(file, ring=2), loaded(file, "cpu")
    model(IDS)
    change(file)
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        model(IDS)
    assert torch.equal(kept(IDS), expected)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_touched(file: Path, resident: Toy, tmp_path: Path) -> None:
    with init_empty_weights():
        model = Toy()
        layer(model, 9).up = nn.Linear(WIDTH, 3)
    with pytest.raises(Mismatch) as caught:
        load_checkpoint_and_dispatch(model, file, {"": "disk"})
    assert set(caught.value.wrong_shape) == {"layers.9.up.weight", "layers.9.up.bias"}
    assert all(tensor.is_meta for tensor in model.parameters())
    tensors = {name: tensor for name, tensor in resident.state_dict().items() if name not in ("layers.3.up.bias", "head.weight")}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(Mismatch, match=r"layers\.3\.up\.bias"):
        loaded(tmp_path / "part.safetensors")
    with pytest.raises(Mismatch), warnings.catch_warnings():
        load_checkpoint_and_dispatch(copy.deepcopy(resident), tmp_path / "part.safetensors", {"": "disk"}, strict=True)


def test_a_dtype_is_given_while_weights_are_read(file: Path, resident: Toy) -> None:
    model, same = loaded(file, MAPS["half"], dtype="bfloat16"), copy.deepcopy(resident).to(torch.bfloat16)
    same.table, model.table = resident.table.bfloat16(), resident.table.bfloat16()
    assert torch.equal(model(IDS), same(IDS))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_a_word_makes_the_map_and_the_disk_may_be_refused(file: Path, expected: torch.Tensor) -> None:
    for word in ("auto", "balanced", "balanced_low_0", "sequential"):
        model = load_checkpoint_and_dispatch(empty(), file, word, max_memory={"cpu": 30_000}, no_split_module_classes=["Block"])
        assert "disk" in model.hf_device_map.values()  # type: ignore[operator]  # a dict
        assert torch.equal(model(IDS), expected)
    with pytest.raises(OverBudget, match="would land on disk"):
        load_checkpoint_and_dispatch(empty(), file, "auto", max_memory={"cpu": 30_000}, offload="never")
    with pytest.raises(OverBudget, match="on disk"):
        load_checkpoint_and_dispatch(empty(), file, {"": "cpu", "layers.2": "disk"}, offload="never")
    with pytest.raises(LoadError, match="'best' is no device map"):
        load_checkpoint_and_dispatch(empty(), file, "best")
    with pytest.raises(LoadError, match="no device"):
        load_checkpoint_and_dispatch(empty(), file, {"layers": "cpu"})


def test_arguments_without_a_meaning_are_not_taken_in_silence(file: Path, tmp_path: Path) -> None:
    for argument in ({"offload_folder": tmp_path / "x"}, {"offload_state_dict": True}):
        with pytest.warns(UserWarning, match="has no meaning here"):
            loaded(file, **argument)
    assert not (tmp_path / "x").exists()
    with pytest.raises(LoadError, match="one process"):
        loaded(file, full_state_dict=False)


def test_without_a_map_weights_are_loaded_and_nothing_is_attached(file: Path, expected: torch.Tensor) -> None:
    model = load_checkpoint_and_dispatch(empty(), file)
    assert torch.equal(model(IDS), expected)
    assert not list(attachments(model))
    assert not hasattr(model, "hf_device_map")


def test_hooks_where_all_is_on_one_device_only_by_force(file: Path) -> None:
    assert not list(attachments(loaded(file, "cpu")))
    assert list(attachments(loaded(file, "cpu", force_hooks=True)))


def test_closing_gives_everything_back_and_the_model_still_runs(file: Path, expected: torch.Tensor) -> None:
    model = loaded(file)
    model(IDS)
    streams = {each.stream for _, _, _, each in attachments(model) if isinstance(each, Pager)}
    assert sum(stream.nbytes for stream in streams)
    twin = copy.deepcopy(model)
    close(model)
    assert sum(stream.nbytes for stream in streams) == 0
    assert {type(each) for _, _, _, each in attachments(model)} == {RoundTrip}  # inputs still come to where it runs
    assert torch.equal(model(IDS), expected)
    assert torch.equal(twin(IDS), expected)
    close(model)


def test_threads_of_reading_end_with_the_model(file: Path) -> None:
    before = threading.active_count()
    model = loaded(file)
    model(IDS)
    assert threading.active_count() > before
    del model
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("shardkit-stream"):
            thread.join(10)
    assert threading.active_count() <= before


def test_a_model_in_memory_is_dispatched_to_a_new_folder(resident: Toy, tmp_path: Path, expected: torch.Tensor) -> None:
    for _ in range(2):  # the second time, the folder holds just these weights
        model = dispatch_model(copy.deepcopy(resident), MAPS["half"], offload_dir=tmp_path / "out")
        assert streamed(model)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model(IDS), expected)
    with pytest.raises(LoadError, match="no offload_dir"):
        dispatch_model(copy.deepcopy(resident), MAPS["half"])


def test_a_folder_of_another_model_is_refused_where_accelerate_computes_with_it(resident: Toy, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(1)
    one, two = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = two(x)
    accelerate.disk_offload(copy.deepcopy(one), tmp_path / "theirs")
    assert not torch.equal(accelerate.disk_offload(copy.deepcopy(two), tmp_path / "theirs")(x), expected)
    disk_offload(copy.deepcopy(one), tmp_path / "ours")
    with pytest.raises(LoadError, match="another model"):
        disk_offload(copy.deepcopy(two), tmp_path / "ours")
    assert torch.equal(disk_offload(copy.deepcopy(two), tmp_path / "new")(x), expected)


def test_an_empty_model_is_dispatched_to_what_a_folder_and_a_state_dict_hold(
    file: Path, resident: Toy, expected: torch.Tensor
) -> None:
    state = {name: tensor for name, tensor in resident.state_dict().items() if not name.startswith("layers.")}
    model = dispatch_model(empty(), MAPS["half"], state_dict=state, offload_dir=file.parent)
    assert torch.equal(model(IDS), expected)
    index = {
        name: {"safetensors_file": str(file), "weight_name": name} for name in resident.state_dict() if name != "head.weight"
    }
    model = dispatch_model(empty(), MAPS["disk"], offload_index=index)
    assert torch.equal(model(IDS), expected)
    with pytest.raises(LoadError, match="have no values"):
        dispatch_model(empty(), MAPS["disk"])
    with pytest.raises(LoadError, match="safetensors_file"):
        dispatch_model(empty(), MAPS["disk"], offload_index={"scale": {"dtype": "float32"}})
    with pytest.raises(Mismatch, match="state dict"):
        dispatch_model(empty(), MAPS["cpu"], state_dict={"scale": torch.ones(3)})


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_what_was_in_memory_is_there_again_when_hooks_are_removed(
    resident: Toy, tmp_path: Path, expected: torch.Tensor, offload: str
) -> None:
    model = copy.deepcopy(resident)
    model = cpu_offload(model) if offload == "cpu" else disk_offload(model, tmp_path / "out")
    assert torch.equal(model(IDS), expected)
    remove_hooks(model)
    assert not streamed(model)
    assert not list(attachments(model))
    assert torch.equal(model(IDS), expected)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is such a device")
def test_the_device_0_is_no_missing_device(resident: Toy, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="there is no accelerator 0"):
        cpu_offload(copy.deepcopy(resident), 0)
    with pytest.raises(LoadError, match="there is no accelerator 0"):
        disk_offload(copy.deepcopy(resident), tmp_path / "out", 0)


def test_a_model_may_be_dispatched_anew(file: Path, expected: torch.Tensor) -> None:
    model = loaded(file)
    for name in ("disk", "half", "half"):
        assert torch.equal(dispatch_model(model, MAPS[name])(IDS), expected)
        with pytest.raises(LoadError, match="no device"):
            dispatch_model(model, {"layers": "cpu"})
        assert torch.equal(model(IDS), expected)
    assert len({each.stream for _, _, _, each in attachments(model) if isinstance(each, Pager)}) == 1


def test_a_loaded_model_without_hooks_reads_what_it_uses(file: Path, expected: torch.Tensor) -> None:
    model = loaded(file)
    remove_hooks(model)
    assert torch.equal(model(IDS), expected)


@pytest.fixture(autouse=True)
def _no_stray_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some parameters are on the meta device")
        yield
