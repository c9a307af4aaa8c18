"""The CPU tier of an accelerator: read once into memory of exact size, and sent from there, with
nothing in between.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from interruption import interrupted
from late_lane import LateLane
from shardkit import load
from shardkit.dtypes import BY_CODE
from shardkit.errors import FormatError, LoadError
from shardkit.load import (
    close,
    cpu_offload,
    dispatch_model,
    explain,
    load_checkpoint_and_dispatch,
    remove_hooks,
    save,
)
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.devices.transfers import CpuTransfer, DeviceTransfer
from shardkit.load.dispatch import attach
from shardkit.load.dispatch.attach import DispatchConfig
from shardkit.load.dispatch.attachments import attachments
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.memory.allocate import memory_of
from shardkit.load.memory.pinned_payload import PinnedPayload
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.modules.weights import Weight
from shardkit.load.performance.bandwidth import Rates
from shardkit.load.streaming.page_layout import Layout
from shardkit.load.streaming.pages import Piece
from shardkit.load.streaming.pinned_blocks import keep, memory_of_page
from shardkit.load.streaming.prefetcher import Stream
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import Buffer, Extent, Payload, Swapped, read_all

WIDTH, LAYERS = 32, 6
BLOCK = 4 * (WIDTH * WIDTH + WIDTH)
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


@pytest.fixture
def bytes_of_file(tmp_path: Path) -> tuple[Path, bytes]:
    content = (
        torch.randint(
            0, 256, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        .numpy()
        .tobytes()
    )
    (tmp_path / "weights").write_bytes(content)
    return tmp_path / "weights", content


def test_blocks_are_read_into_memory_of_their_own_size(bytes_of_file: tuple[Path, bytes]) -> None:
    path, content = bytes_of_file
    payloads: list[list[Payload]] = [
        [Extent(path, 3, 700_001), Extent(path, 800_000, 64), Buffer(b"123")],
        [
            Swapped(Extent(path, 16, 4096), 2),
            Cast(Extent(path, 0, 128), BY_CODE["BF16"], BY_CODE["F32"]),
            Extent(path, 9, 0),
        ],
    ]
    lane = LateLane()
    kept = keep(payloads, lane)
    assert [[read_all(each) for each in block] for block in kept] == [
        [read_all(each) for each in block] for block in payloads
    ]
    assert [len(block[0].block.memory) for block in kept] == [700_032 + 64 + 64, 4096 + 256]
    assert lane.kept_bytes == 700_160 + 4352
    assert bytes(kept[0][0].memory) == content[3:700_004]
    assert (lane.bytes, lane.host_bytes, kept[0][0].sources) == (0, 0, ())


def test_kept_weights_are_cut_compared_and_pickled_like_any_other(
    bytes_of_file: tuple[Path, bytes],
) -> None:
    path, content = bytes_of_file
    ((first, second), (third,)) = keep(
        [[Extent(path, 0, 100), Extent(path, 0, 100)], [Extent(path, 0, 100)]], CpuTransfer()
    )
    assert first == first.narrow(0, 100) != second != third
    assert len({first, first.narrow(0, 100), second, third}) == 3
    assert read_all(first.narrow(10, 20)) == content[10:30]
    assert read_all(pickle.loads(pickle.dumps(second))) == content[:100]
    with pytest.raises(ValueError, match="outside"):
        first.narrow(90, 20)


def test_a_block_that_cannot_be_read_is_told_and_its_memory_is_gone(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    lane = LateLane()
    with pytest.raises(FormatError):
        keep([[Extent(tmp_path / "short", 0, 200)]], lane)
    with pytest.raises(FormatError):
        keep([[Extent(tmp_path / "missing", 0, 200)]], lane)


def test_only_what_lies_as_its_page_wants_it_is_sent_as_it_lies(
    bytes_of_file: tuple[Path, bytes],
) -> None:
    path, _ = bytes_of_file
    ((first, second), (third,)) = keep(
        [[Extent(path, 0, 100), Extent(path, 0, 100)], [Extent(path, 0, 100)]], CpuTransfer()
    )

    def found(*payloads: Payload) -> bool:
        return memory_of_page(payloads, Layout.of(payloads)) is not None

    assert found(first, second)
    assert found(third)
    assert not found(second, first)
    assert not found(first, third)
    assert not found(second)
    assert not found(first, Buffer(bytes(100)))
    assert not found()


def pages_of(
    path: Path, lane: DeviceTransfer, *, kept: list[int], count: int = 8, nbytes: int = 4096
) -> list[list[Piece]]:
    """Pages of one tensor, those with the numbers *kept* in memory."""
    stored: list[Payload] = [Extent(path, number * nbytes, nbytes) for number in range(count)]
    payloads = [
        keep([[each]], lane)[0][0] if number in kept else each for number, each in enumerate(stored)
    ]
    return [[Piece(each, torch.uint8, (nbytes,), (1,))] for each in payloads]


@pytest.fixture(params=[CpuTransfer, LateLane], ids=["cpu", "late"])
def lane(request: pytest.FixtureRequest) -> DeviceTransfer:
    made: DeviceTransfer = request.param()
    return made


@pytest.mark.parametrize("order", [[*range(8)] * 3, [7, 2, 2, 5, 0, 1, 6] * 3, [1, 0] * 9], ids=str)
@pytest.mark.parametrize("kept", [[*range(8)], [0, 2, 4, 6], [7], []], ids=str)
@pytest.mark.parametrize("ring", [2, 3, 8])
def test_kept_pages_and_others_share_a_ring_in_any_order(
    bytes_of_file: tuple[Path, bytes],
    lane: DeviceTransfer,
    order: list[int],
    kept: list[int],
    ring: int,
) -> None:
    path, content = bytes_of_file
    stream = Stream(pages_of(path, lane, kept=kept), lane, ring=ring)
    for number in order:
        tensors = stream.borrow(number, "visit")
        assert tensors is not None
        assert bytes(memory_of(tensors[0])) == content[number * 4096 : (number + 1) * 4096]
        stream.release(number, "visit")
    assert stream.nbytes <= ring * 4096
    counts = stream.counts
    assert counts.disk + counts.memory == counts.reads * 4096
    stream.close()
    assert stream.nbytes == 0


def test_a_ring_of_kept_pages_has_no_main_memory_and_sends_each_from_where_it_lies(
    bytes_of_file: tuple[Path, bytes],
) -> None:
    path, _ = bytes_of_file
    lane = LateLane()
    pages = pages_of(path, lane, kept=[*range(8)])
    stream = Stream(pages, lane, ring=2)
    for number in [*range(8)] * 2:
        stream.borrow(number, "visit")
        stream.release(number, "visit")
    own = {
        payload.block.memory.data_ptr()
        for [piece] in pages
        if isinstance(payload := piece.payload, PinnedPayload)
    }
    assert {address for address, _ in lane.sent} == own
    assert {nbytes for _, nbytes in lane.sent} == {4096}
    assert (lane.host_bytes, lane.kept_bytes, lane.bytes) == (0, 8 * 4096, 2 * 4096)


def test_a_thread_that_holds_kept_pages_gets_more_beside_the_ring(
    bytes_of_file: tuple[Path, bytes],
) -> None:
    path, content = bytes_of_file
    lane = LateLane()
    stream = Stream(pages_of(path, lane, kept=[*range(8)]), lane, ring=2)
    held = [stream.borrow(number, number, holding=number > 0) for number in range(5)]
    for number, tensors in enumerate(held):
        assert tensors is not None
        assert bytes(memory_of(tensors[0])) == content[number * 4096 : (number + 1) * 4096]
    assert lane.host_bytes == 0
    for number in range(5):
        stream.release(number, number)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [[*range(8)], [0, 2, 4, 6]], ids=str)
def test_an_interrupt_between_any_two_calls_leaves_kept_pages_that_can_be_used(
    bytes_of_file: tuple[Path, bytes], kept: list[int]
) -> None:
    path, content = bytes_of_file
    lane = LateLane()
    stream = Stream(pages_of(path, lane, kept=kept), lane, ring=2)
    order = [0, 3, 1, 7, 7, 2]

    def cycle() -> None:
        for number in order:
            tensors = stream.borrow(number, "visit")
            assert tensors is not None
            assert bytes(memory_of(tensors[0])) == content[number * 4096 : (number + 1) * 4096]
            stream.release(number, "visit")

    moment = 0
    while interrupted(cycle, moment):
        for number in order:
            stream.release(number, "visit")
        cycle()
        moment += 2
    assert moment > 100
    stream.close()
    assert stream.nbytes == 0


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, lambda: torch.device("meta")],
    ids=["inference_mode", "default device"],
)
def test_what_the_thread_that_asks_is_in_makes_no_other_weights(
    mode: Callable[[], AbstractContextManager[object]], bytes_of_file: tuple[Path, bytes]
) -> None:
    path, content = bytes_of_file
    lane = LateLane()
    stream = Stream(pages_of(path, lane, kept=[*range(8)]), lane, ring=2)
    for number in range(8):
        with mode():
            tensors = stream.borrow(number, "visit")
        assert tensors is not None
        assert not tensors[0].is_inference()
        assert bytes(memory_of(tensors[0])) == content[number * 4096 : (number + 1) * 4096]
        stream.release(number, "visit")
    stream.close()


def test_pinned_copies_are_sent_ahead(bytes_of_file: tuple[Path, bytes]) -> None:
    path, _ = bytes_of_file
    lane = LateLane()
    stream = Stream(pages_of(path, lane, kept=[*range(8)]), lane, ring=4)
    stream.borrow(0, "visit")
    stream.rest()
    assert [nbytes for _, nbytes in lane.sent] == [4096] * 4  # what is needed, and what will be
    stream.close()


def test_threads_share_kept_pages_and_others(bytes_of_file: tuple[Path, bytes]) -> None:
    path, content = bytes_of_file
    lane = LateLane()
    stream = Stream(pages_of(path, lane, kept=[1, 2, 5, 7]), lane, ring=2)
    right: list[bool] = []

    def run(seed: int) -> None:
        for number in (
            torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist() * 25
        ):
            visit = object()
            tensors = stream.borrow(number, visit)
            assert tensors is not None
            right.append(
                bytes(memory_of(tensors[0])) == content[number * 4096 : (number + 1) * 4096]
            )
            stream.release(number, visit)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert right == [True] * 800


def blocks(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(blocks().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateLane:
    """The CPU as if it were an accelerator, with memory of its own, so that what the map sends to
    the CPU streams.
    """
    lane = LateLane()

    def streams(wish: DispatchConfig, weight: Weight) -> Hashable:
        tier = device_of(weight.names[0], wish.device_map)
        return (tier, lane.device) if tier in ("cpu", "disk") else None

    monkeypatch.setattr(DispatchConfig, "streams", streams)
    monkeypatch.setattr(attach, "lane_to", lambda device: lane)
    return lane


def loaded(file: Path, device_map: dict[str, int | str], **options: Any) -> nn.Sequential:
    with init_empty_weights():
        model = blocks()
    return load_checkpoint_and_dispatch(model, file, device_map, ring=2, **options)


def recipes_of(model: nn.Module) -> list[Payload]:
    return [each.recipe.storage for each in model.parameters() if isinstance(each, Streamed)]


@torch.no_grad()
def test_a_checkpoint_is_read_once_into_kept_memory_and_runs_from_there(
    file: Path, device: LateLane
) -> None:
    expected, model = blocks()(X), loaded(file, {"": "cpu"})
    for _ in range(3):
        assert torch.equal(model(X), expected)
    assert (device.kept_bytes, device.host_bytes, device.bytes) == (LAYERS * BLOCK, 0, 2 * BLOCK)
    assert (
        len({payload.block for payload in recipes_of(model) if isinstance(payload, PinnedPayload)})
        == LAYERS
    )
    told = explain(model, rates=Rates(link=1e9))
    assert {part.place for part in told.parts} == {"cpu"}
    assert told.read == {"disk": 0, "memory": LAYERS * BLOCK}
    assert sum(part.step.copied for part in told.parts) == 0
    close(model)
    assert torch.equal(model(X), expected)


@torch.no_grad()
def test_disk_and_kept_memory_share_a_stream(file: Path, device: LateLane) -> None:
    expected, model = blocks()(X), loaded(file, {"": "cpu", "1": "disk", "4": "disk"})
    for _ in range(3):
        assert torch.equal(model(X), expected)
    assert device.kept_bytes == (LAYERS - 2) * BLOCK
    assert device.host_bytes == device.bytes
    close(model)


@torch.no_grad()
def test_kept_weights_do_not_change_when_the_file_does(file: Path, device: LateLane) -> None:
    expected, model = blocks()(X), loaded(file, {"": "cpu"})
    file.write_bytes(bytes(100))
    assert torch.equal(model(X), expected)
    assert torch.equal(model.get_parameter("3.weight") + 0, blocks().get_parameter("3.weight"))
    os.remove(file)
    assert torch.equal(model(X), expected)
    close(model)


@torch.no_grad()
def test_a_file_that_changes_is_told_where_some_of_it_streams_from_disk(
    file: Path, device: LateLane
) -> None:
    model = loaded(file, {"": "cpu", "1": "disk"})
    model(X)
    os.utime(file, ns=(1, 1))
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        model(X)
    close(model)


@torch.no_grad()
def test_a_checkpoint_that_cannot_be_read_leaves_the_model_as_it_was(
    file: Path, device: LateLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FormatError(file, "broken on purpose")

    monkeypatch.setattr("shardkit.load.streaming.pinned_blocks.fill_all", fail)
    model = blocks(seed=1)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    with pytest.raises(FormatError, match="broken on purpose"):
        load_checkpoint_and_dispatch(model, file, {"": "cpu"})
    assert all(id(tensor) == before[name][0] for name, tensor in model.named_parameters())
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in model.named_parameters())


@torch.no_grad()
def test_what_the_checkpoint_casts_is_cast_once(file: Path, device: LateLane) -> None:
    model = loaded(file, {"": "cpu"}, dtype="bfloat16")
    expected = blocks().to(torch.bfloat16)(X.bfloat16())
    assert torch.equal(model(X.bfloat16()), expected)
    assert device.kept_bytes == LAYERS * BLOCK // 2
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    close(model)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
def test_a_model_in_memory_moves_into_kept_memory_block_by_block(
    how: str, device: LateLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, model = blocks()(X), blocks()
    originals = [weakref.ref(parameter) for parameter in model.parameters()]
    there: list[int] = []
    kept = device.kept

    def counting(nbytes: int) -> torch.Tensor:
        gc.collect()
        there.append(sum(each() is not None for each in originals))
        return kept(nbytes)

    monkeypatch.setattr(device, "kept", counting)
    model = (
        cpu_offload(model, "cpu")
        if how == "cpu_offload"
        else dispatch_model(model, {"": "cpu"}, "cpu")
    )
    assert there == [2 * left for left in range(LAYERS, 0, -1)]
    assert torch.equal(model(X), expected)
    assert (device.kept_bytes, device.host_bytes) == (LAYERS * BLOCK, 0)
    remove_hooks(model)
    assert not any(isinstance(each, Streamed) for each in model.parameters())
    assert torch.equal(model(X), expected)


@torch.no_grad()
def test_addresses_are_read_into_kept_memory_and_nowhere_else(
    file: Path, device: LateLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    with init_empty_weights():
        model = blocks()
    model.load_state_dict(load.tensors(file), assign=True)
    read: list[object] = []

    def materialise(items: Iterable[object], **_: object) -> list[torch.Tensor]:
        read.extend(items)
        return []

    monkeypatch.setattr("shardkit.load.loading.install.materialise", materialise)
    dispatch_model(model, {"": "cpu"}, "cpu")
    os.remove(file)
    assert torch.equal(model(X), blocks()(X))
    assert (device.kept_bytes, device.host_bytes, read) == (LAYERS * BLOCK, 0, [])
    close(model)


@torch.no_grad()
def test_a_model_that_is_dispatched_again_keeps_the_memory_that_it_has(
    file: Path, device: LateLane
) -> None:
    expected, model = blocks()(X), loaded(file, {"": "cpu"})
    dispatch_model(model, {"": "cpu"}, "cpu")
    assert torch.equal(model(X), expected)
    assert device.kept_bytes == LAYERS * BLOCK
    close(model)


@torch.no_grad()
def test_kept_memory_is_gone_with_the_model(file: Path, device: LateLane) -> None:
    model = loaded(file, {"": "cpu"})
    model(X)
    blocks_of = [
        weakref.ref(payload.block.memory)
        for payload in recipes_of(model)
        if isinstance(payload, PinnedPayload)
    ]
    pagers = [each for *_, each in attachments(model) if isinstance(each, Pager)]
    close(model)
    assert all(each() is not None for each in blocks_of)
    del model, pagers
    device.run_until(device.count)  # what was sent ahead, and nobody waited for
    gc.collect()
    assert all(each() is None for each in blocks_of)


@torch.no_grad()
def test_without_hooks_a_checkpoint_that_was_kept_is_in_memory_like_any_other(
    file: Path, device: LateLane
) -> None:
    expected, model = blocks()(X), loaded(file, {"": "cpu", "2": "disk"})
    model(X)
    remove_hooks(model)
    assert {
        name.split(".")[0] for name, each in model.named_parameters() if isinstance(each, Streamed)
    } == {"2"}
    assert all(each.requires_grad for each in model.parameters() if not isinstance(each, Streamed))
    assert torch.equal(model(X), expected)


@torch.no_grad()
def test_a_model_whose_weights_are_kept_can_be_saved_and_copied(
    file: Path, device: LateLane, tmp_path: Path
) -> None:
    expected, model = blocks()(X), loaded(file, {"": "cpu", "2": "disk"})
    twin = copy.deepcopy(model)
    save(model, tmp_path / "saved")
    again = load_checkpoint_and_dispatch(
        blocks(seed=1), tmp_path / "saved", {"": "disk"}, strict=True
    )
    for each in (twin, again, model):
        assert torch.equal(each(X), expected)
    assert device.kept_bytes == (LAYERS - 1) * BLOCK
    close(again)
    close(model)
