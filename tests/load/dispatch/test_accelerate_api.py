"""Models are dispatched as they are asked to be, or it is said why not; and where Accelerate is
wrong we are right.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardkit.errors import LoadError, OverBudget
from shardkit.load.dispatch.accelerate_api import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
)
from shardkit.load.dispatch.attachments import attachments, close
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.streaming.page_layout import READERS
from toys import IDS, WIDTH, Toy, empty, loaded, logits, saved, trained


@pytest.fixture(scope="module")
def resident() -> Toy:
    return trained()


@pytest.fixture(scope="module")
def expected(resident: Toy) -> torch.Tensor:
    return logits(resident)


@pytest.fixture
def file(resident: Toy, tmp_path: Path) -> Path:
    return saved(resident, tmp_path)


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
    theirs = accelerate.load_checkpoint_and_dispatch(
        theirs, file, devices, offload_folder=str(tmp_path / "x")
    )
    with init_empty_weights():
        ours = Untied().eval()
    ours = load_checkpoint_and_dispatch(ours, file, devices)
    assert not torch.equal(theirs(x), right(x))
    assert torch.equal(ours(x), right(x))


def test_a_map_that_is_all_disk_works_where_accelerate_asks_safetensors_for_a_device_called_disk(
    tmp_path: Path,
) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    right = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save_file(right.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 4)
    devices, file = {"0": "disk", "1": "disk"}, str(tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="disk is invalid"):
        accelerate.load_checkpoint_and_dispatch(
            copy.deepcopy(right), file, devices, offload_folder=str(tmp_path / "x")
        )
    assert torch.equal(
        load_checkpoint_and_dispatch(copy.deepcopy(right), file, devices)(x), right(x)
    )


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


def test_accelerate_leaves_weights_in_memory_after_an_exception_and_we_do_not(
    tmp_path: Path,
) -> None:
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


@pytest.mark.slow
def test_500_forwards_take_no_more_than_the_first_and_leave_nothing(tmp_path: Path) -> None:
    resident = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    save_file(resident.state_dict(), tmp_path / "model.safetensors")
    begun, x = (open_files(), threading.active_count()), torch.ones(1, WIDTH)
    model = load_checkpoint_and_dispatch(
        copy.deepcopy(resident), tmp_path / "model.safetensors", {"": "disk"}, ring=2
    )
    stream = next(pager.stream for *_, pager in attachments(model) if isinstance(pager, Pager))
    seen = []
    with torch.no_grad():
        expected = resident(x)
        for number in range(500):
            assert torch.equal(model(x), expected)
            if number % 100 == 99:
                gc.collect()
                seen.append((open_files(), stream.nbytes, len(gc.get_objects())))
                assert (
                    threading.active_count() <= begun[1] + READERS
                )  # which start when there is work for one more
    first, last = seen[0], seen[-1]  # of which the first may hold what tests before left behind
    assert last[0] <= first[0]
    assert last[1] == first[1] <= stream.room
    assert last[2] <= first[2] + 400  # less than one for each forward
    close(model)
    del model, stream
    gc.collect()
    end = time.monotonic() + 200
    while (
        open_files(),
        threading.active_count(),
    ) > begun and time.monotonic() < end:  # threads end by themselves
        time.sleep(0.01)
    assert open_files() <= begun[0]
    assert threading.active_count() <= begun[1]


def test_a_ring_may_be_so_many_bytes(file: Path, expected: torch.Tensor) -> None:
    largest = 4 * (4 * WIDTH + 4 * WIDTH * WIDTH + 3 * WIDTH) + 64
    model = load_checkpoint_and_dispatch(
        Toy().eval(), file, {"": "disk"}, no_split_module_classes=["Block"], ring=str(largest)
    )
    with torch.no_grad():
        assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)
    close(model)


def test_a_block_that_does_not_fit_is_told_before_the_model_is_touched(file: Path) -> None:
    with init_empty_weights(include_buffers=True):
        model = Toy()
    with pytest.raises(OverBudget, match="the largest block takes"):
        load_checkpoint_and_dispatch(
            model, file, {"": "disk"}, no_split_module_classes=["Block"], ring="1KB"
        )
    assert all(weight.is_meta for weight in model.parameters())
    assert not list(attachments(model))


def test_a_word_makes_the_map_and_the_disk_may_be_refused(
    file: Path, expected: torch.Tensor
) -> None:
    for word in ("auto", "balanced", "balanced_low_0", "sequential"):
        model = load_checkpoint_and_dispatch(
            empty(), file, word, max_memory={"cpu": 30_000}, no_split_module_classes=["Block"]
        )
        assert "disk" in model.hf_device_map.values()  # type: ignore[operator]  # a dict
        assert torch.equal(model(IDS), expected)
    with pytest.raises(OverBudget, match="would be offloaded to disk"):
        load_checkpoint_and_dispatch(
            empty(), file, "auto", max_memory={"cpu": 30_000}, offload="never"
        )
    with pytest.raises(OverBudget, match="offloaded to disk"):
        load_checkpoint_and_dispatch(
            empty(), file, {"": "cpu", "layers.2": "disk"}, offload="never"
        )
    with pytest.raises(LoadError, match="'best' is not a device map"):
        load_checkpoint_and_dispatch(empty(), file, "best")
    with pytest.raises(LoadError, match="no device"):
        load_checkpoint_and_dispatch(empty(), file, {"layers": "cpu"})


def test_arguments_without_a_meaning_are_not_taken_in_silence(file: Path, tmp_path: Path) -> None:
    for argument in ({"offload_folder": tmp_path / "x"}, {"offload_state_dict": True}):
        with pytest.warns(UserWarning, match="is ignored"):
            loaded(file, "cpu", **argument)
    assert not (tmp_path / "x").exists()
    with pytest.raises(LoadError, match="one process"):
        loaded(file, "cpu", full_state_dict=False)


def test_without_a_map_weights_are_loaded_and_nothing_is_attached(
    file: Path, expected: torch.Tensor
) -> None:
    model = load_checkpoint_and_dispatch(empty(), file)
    assert torch.equal(model(IDS), expected)
    assert not list(attachments(model))
    assert not hasattr(model, "hf_device_map")


def test_hooks_where_all_is_on_one_device_only_by_force(file: Path) -> None:
    assert not list(attachments(loaded(file, "cpu", "cpu")))
    assert list(attachments(loaded(file, "cpu", "cpu", force_hooks=True)))


def test_a_folder_of_another_model_is_refused_where_accelerate_computes_with_it(
    resident: Toy, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(1)
    one, two = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = two(x)
    accelerate.disk_offload(copy.deepcopy(one), tmp_path / "theirs")
    assert not torch.equal(
        accelerate.disk_offload(copy.deepcopy(two), tmp_path / "theirs")(x), expected
    )
    disk_offload(copy.deepcopy(one), tmp_path / "ours")
    with pytest.raises(LoadError, match="another model"):
        disk_offload(copy.deepcopy(two), tmp_path / "ours")
    assert torch.equal(disk_offload(copy.deepcopy(two), tmp_path / "new")(x), expected)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is such a device")
def test_the_device_0_is_no_missing_device(resident: Toy, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="there is no accelerator 0"):
        cpu_offload(copy.deepcopy(resident), 0)
    with pytest.raises(LoadError, match="there is no accelerator 0"):
        disk_offload(copy.deepcopy(resident), tmp_path / "out", 0)


@pytest.fixture(autouse=True)
def _no_stray_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some parameters are on the meta device")
        yield
