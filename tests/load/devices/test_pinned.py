"""Pinned memory of exact size: pinned once, let go once, and plain memory where it cannot be
pinned.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from shardkit.errors import LoadError
from shardkit.load.devices.pinned import kept_memory, ring_memory
from shardkit.load.memory.arenas import Arena

CUDA = torch.device("cuda", 0)
Pinned = Callable[[int, torch.device], torch.Tensor]
NBYTES = 5 * mmap.PAGESIZE + 192


@dataclass
class Runtime:
    """What CUDA would be asked for, in order.

    Attributes:
        code: what it answers to a request to pin.
        calls: the requests.
    """

    code: int = 0
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - as CUDA calls it
        self.calls.append(("pin", address, nbytes))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - likewise
        self.calls.append(("unpin", address))
        return 0

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize", device))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.accelerator, "synchronize", made.synchronize)
    yield made
    gc.collect()


@pytest.fixture(params=[ring_memory, kept_memory], ids=["ring", "kept"])
def pinned(request: pytest.FixtureRequest) -> Pinned:
    made: Pinned = request.param
    return made


def test_memory_is_pinned_in_exactly_the_size_that_is_asked_for(
    runtime: Runtime, pinned: Pinned
) -> None:
    memory = pinned(NBYTES, CUDA)
    assert runtime.calls == [("pin", memory.data_ptr(), NBYTES)]
    assert memory.data_ptr() % mmap.PAGESIZE == 0
    assert (memory.dtype, memory.shape, len(memory.untyped_storage())) == (
        torch.uint8,
        (NBYTES,),
        NBYTES,
    )


def test_no_more_is_mapped_than_the_pages_that_it_needs(
    runtime: Runtime, pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    real = mmap.mmap

    def counting(file: int, nbytes: int, **kwargs: int) -> mmap.mmap:
        mapped.append(nbytes)
        return real(file, nbytes, **kwargs)

    monkeypatch.setattr(mmap, "mmap", counting)
    memory = pinned(NBYTES, CUDA)
    assert len(memory) == NBYTES
    assert [-(-nbytes // mmap.PAGESIZE) for nbytes in mapped] == [6]


def test_it_is_let_go_with_the_last_tensor_in_it_when_no_copy_is_under_way(
    runtime: Runtime, pinned: Pinned
) -> None:
    memory = pinned(NBYTES, CUDA)
    address, part = memory.data_ptr(), memory[100:200].fill_(7)
    del memory
    gc.collect()
    assert [call[0] for call in runtime.calls] == ["pin"]
    assert part.sum() == 700
    del part
    gc.collect()
    assert runtime.calls[1:] == [("synchronize", CUDA), ("unpin", address)]


def test_what_cannot_be_pinned_is_plain_memory_and_told(
    runtime: Runtime, pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.code = 2
    started: list[object] = []
    monkeypatch.setattr("shardkit.load.devices.pinned._forget_failure", started.append)
    with pytest.warns(
        UserWarning, match=r"20\.7 kB of main memory cannot be pinned \(CUDA error 2\)"
    ):
        memory = pinned(NBYTES, CUDA)
    assert memory.fill_(3).sum() == 3 * NBYTES
    assert started == [CUDA]
    del memory
    gc.collect()
    assert [call[0] for call in runtime.calls] == ["pin"]


def test_nothing_takes_no_memory(runtime: Runtime, pinned: Pinned) -> None:
    assert pinned(0, CUDA).numel() == 0
    assert not runtime.calls


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork_reads_what_is_kept_and_lets_nothing_go(runtime: Runtime) -> None:
    memory = kept_memory(NBYTES, CUDA).fill_(9)
    child = os.fork()
    if child == 0:
        right = bool((memory == 9).all())
        del memory
        gc.collect()
        os._exit(0 if right and [call[0] for call in runtime.calls] == ["pin"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_that_is_not_to_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="no memory for"):
        Arena.shared(1 << 62)
