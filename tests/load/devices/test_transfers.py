"""The seam to a device: the CPU needs no copy, and an accelerator gets copies that nobody needs to
wait for.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from accelerators import KIND, device, needs_one
from shardkit.errors import LoadError
from shardkit.load.devices.transfers import (
    AcceleratorTransfer,
    CpuTransfer,
    DeviceTransfer,
    _issuing_on,
    lane_to,
)


@pytest.fixture(params=[pytest.param(f"{KIND}:0", id="accelerator", marks=needs_one)])
def lane(request: pytest.FixtureRequest) -> DeviceTransfer:
    return lane_to(torch.device(request.param))


def test_the_cpu_needs_no_copy() -> None:
    lane: DeviceTransfer = lane_to(torch.device("cpu"))
    assert isinstance(lane, CpuTransfer)
    memory = lane.memory(64)
    assert memory.data_ptr() % 64 == 0
    assert lane.host(memory) is memory
    memory.fill_(7)
    lane.send(memory, memory, []).precede()
    lane.issued(memory).finish()
    assert memory.tolist() == [7] * 64


def test_a_device_that_has_no_streams_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(**_: object) -> torch.Stream:
        raise RuntimeError("Backend doesn't support create a new Stream.")

    monkeypatch.setattr(torch, "Stream", refusing)
    with pytest.raises(
        LoadError, match=r"weights cannot stream to mps.*Backend doesn't support"
    ) as told:
        lane_to(torch.device("mps"))
    assert "cpu" in (told.value.hint or "")


def test_a_device_that_has_no_room_says_for_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "Stream", lambda **_: None)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(LoadError, match=r"no memory on cuda:0 for 2\.00 MB of weights"):
        lane_to(torch.device("cuda:0")).memory(2_000_000)


def test_copies_go_out_of_pinned_memory(lane: DeviceTransfer) -> None:
    assert isinstance(lane, AcceleratorTransfer)
    memory = lane.memory(1 << 20)
    host = lane.host(memory)
    assert host.is_pinned()
    for value in range(20):
        host.fill_(value)
        sent = lane.send(host, memory, [lane.issued(memory)])
        sent.precede()
        assert (memory == value).all()
        sent.finish()


def test_threads_send_side_by_side_and_go_on_where_they_were(lane: DeviceTransfer) -> None:
    right: list[bool] = []

    def run(value: int) -> None:
        stream, host, memory = (
            torch.accelerator.current_stream(),
            lane.kept(1 << 20).fill_(value),
            lane.memory(1 << 20),
        )
        for _ in range(100):
            lane.send(host, memory, [lane.issued(memory)]).precede()
        right.append(bool((memory == value).all()) and torch.accelerator.current_stream() == stream)

    threads = [threading.Thread(target=run, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert right == [True] * 4


@pytest.mark.skipif(
    not hasattr(torch.Stream, "__enter__"), reason="a stream is no context before torch 2.7"
)
def test_each_context_of_a_stream_is_an_object_of_its_own() -> None:
    stream = torch.Stream(stream_id=3, device_index=0, device_type=0)
    first, second = _issuing_on(stream), _issuing_on(stream)
    assert first is not second
    assert first == second == stream


def test_memory_that_is_taken_is_not_written_while_what_was_there_is_read(
    lane: DeviceTransfer,
) -> None:
    size = 1024
    zeros = lane.kept(4 * size * size).zero_()
    for _ in range(10):
        ones, busy = (
            torch.ones(size, size, device=KIND),
            torch.full((size, size), 1e-3, device=KIND),
        )
        for _ in range(10):
            busy = busy @ busy
        total = ones.sum()  # when all before is done
        del ones
        memory = lane.memory(len(zeros))
        lane.send(zeros, memory, [])
        assert total.item() == size * size
        del memory


def test_memory_that_is_let_go_is_not_given_away_while_it_is_written(lane: DeviceTransfer) -> None:
    size = 16 << 20
    zeros = lane.kept(size).zero_()
    for _ in range(10):
        memory = lane.memory(size)
        for _ in range(4):
            lane.send(zeros, memory, [])
        del memory
        ones = torch.ones(size, dtype=torch.uint8, device=KIND)
        device.synchronize()
        assert ones.sum(dtype=torch.int64).item() == size


@pytest.mark.parametrize("nbytes", [192, (1 << 20) + 64, (65 << 20) + 4096])
def test_kept_memory_is_pinned_in_exact_size_until_nobody_has_it(
    nbytes: int, lane: DeviceTransfer
) -> None:
    kept, there = lane.kept(nbytes), lane.memory(nbytes)
    mine = torch.arange(nbytes).to(torch.uint8)
    assert kept.is_pinned()
    assert len(kept.untyped_storage()) == nbytes
    kept.copy_(mine)
    lane.send(kept, there, [lane.issued(there)])
    del kept  # while it may be copied
    gc.collect()
    lane.send(lane.kept(64), there[:64], []).finish()
    assert torch.equal(there[64:].cpu(), mine[64:])
