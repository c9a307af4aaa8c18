"""The ring: bounded, shared, never stuck, and right with a device whose memory is separate and
whose copies come late.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from children import forks, in_a_child, threaded
from interruption import interrupted
from late_lane import LateLane
from shardkit.dtypes import parse_dtype
from shardkit.errors import FormatError, LoadError, OverBudget
from shardkit.load.devices.transfers import CpuTransfer, DeviceTransfer, Done
from shardkit.load.streaming.page_layout import READ, READERS
from shardkit.load.streaming.pages import Piece
from shardkit.load.streaming.prefetcher import Stream
from shardkit.load.streaming.reader_pool import BlockTensors, Loaded, PendingRead, Priority, locked
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import Buffer, Concat, Extent, Payload

ELEMENTS = 1024
PAGE = 4 * ELEMENTS


@pytest.fixture(params=[CpuTransfer, LateLane], ids=["cpu", "late"])
def lane(request: pytest.FixtureRequest) -> DeviceTransfer:
    made: DeviceTransfer = request.param()
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"".join(value(number).numpy().tobytes() for number in range(8)))
    return path


def value(number: int) -> torch.Tensor:
    return torch.full((ELEMENTS,), float(number + 1))


def page(file: Path, number: int) -> list[Piece]:
    return [Piece(Extent(file, number * PAGE, PAGE), torch.float32, (ELEMENTS,), (1,))]


def streaming(file: Path, lane: DeviceTransfer, *, ring: int = 2) -> Stream:
    return Stream([page(file, number) for number in range(8)], lane, ring=ring)


def use(stream: Stream, number: int) -> None:
    borrower = object()
    tensors = stream.borrow(number, borrower)
    assert tensors is not None
    assert torch.equal(tensors[0], value(number))
    stream.release(number, borrower)


ORDERS = [
    list(range(8)) * 3,
    [0, 3, 1, 7, 7, 2] * 3,
    [7, 6, 5, 4, 3, 2, 1, 0] * 2,
    [0, 1, 2, 0, 5, 2] * 4,
    [4] * 5,
]


@pytest.mark.parametrize("ring", [2, 3, 8, 20])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_pages_are_what_they_should_be_in_any_order(
    file: Path, lane: DeviceTransfer, order: list[int], ring: int
) -> None:
    stream = streaming(file, lane, ring=ring)
    for number in order:
        use(stream, number)
    assert stream.nbytes <= ring * PAGE
    stream.close()
    assert stream.nbytes == 0


def test_four_threads_and_two_slots_come_to_an_end(file: Path, lane: DeviceTransfer) -> None:
    stream = streaming(file, lane)
    wrong: list[BaseException] = []

    def run(seed: int) -> None:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist() * 40
        try:
            for number in order:
                use(stream, number)
        except BaseException as error:  # noqa: BLE001 - told by the assertion below
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert stream.nbytes <= 2 * PAGE


class Counted:
    """A payload that counts its reads, and holds them up until it may go on."""

    def __init__(self, inner: Payload) -> None:
        self.inner = inner
        self.reads = 0
        self.go = threading.Event()
        self.go.set()
        self.fails = False

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def sources(self) -> tuple[Extent, ...]:
        return self.inner.sources

    def narrow(self, start: int, nbytes: int) -> Payload:
        return self.inner.narrow(start, nbytes)

    def chunks(self) -> Iterator[memoryview]:
        self.reads += 1
        self.go.wait(30)
        if self.fails:
            raise FormatError(Path("weights"), "broken on purpose")
        return self.inner.chunks()


def counted(file: Path, *, ring: int = 2, count: int = 8) -> tuple[Stream, list[Counted]]:
    payloads = [Counted(Extent(file, number * PAGE, PAGE)) for number in range(count)]
    pages = [[Piece(payload, torch.float32, (ELEMENTS,), (1,))] for payload in payloads]
    return Stream(pages, CpuTransfer(), ring=ring), payloads


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 200
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def test_threads_that_want_the_same_page_share_one_read(file: Path) -> None:
    stream, payloads = counted(file)
    payloads[5].go.clear()
    got: list[object] = []
    threads = [
        threading.Thread(target=lambda: got.append(stream.borrow(5, object()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert eventually(lambda: payloads[5].reads == 1)
    payloads[5].go.set()
    for thread in threads:
        thread.join(200)
    assert len(got) == 4
    assert payloads[5].reads == 1


def test_the_next_page_is_read_ahead_also_around_the_end(file: Path) -> None:
    stream, payloads = counted(file, ring=3)
    use(stream, 7)
    assert eventually(lambda: payloads[0].reads == payloads[1].reads == 1)
    assert payloads[2].reads == 0


def test_what_followed_last_time_is_read_ahead_this_time(file: Path) -> None:
    stream, payloads = counted(file)
    for number in [2, 6, 2, 6]:
        use(stream, number)
    before = payloads[6].reads
    use(stream, 4)
    use(stream, 2)
    assert eventually(lambda: payloads[6].reads > before)


def test_a_block_that_no_prediction_announced_can_be_read_ahead(file: Path) -> None:
    stream, payloads = counted(file, ring=3)
    use(stream, 0)
    stream.rest()
    stream.prefetch([5], Priority.NOW)
    assert eventually(lambda: payloads[5].reads == 1)
    stream.rest()
    before = stream.counts
    use(stream, 5)
    assert stream.counts.since(before).hits == 1


def test_a_guess_takes_no_memory_from_what_is_expected(file: Path) -> None:
    stream, _ = counted(file, ring=3)
    use(stream, 0)
    stream.rest()  # behind it, the next two were read ahead
    stream.prefetch([5, 6, 7], Priority.MAYBE)
    stream.rest()
    before = stream.counts
    use(stream, 1)
    use(stream, 2)
    assert stream.counts.since(before).hits == 2


def test_a_failed_read_is_told_and_tried_again(file: Path) -> None:
    stream, payloads = counted(file)
    payloads[3].fails = True
    for _ in range(3):
        with pytest.raises(FormatError, match="broken on purpose"):
            stream.borrow(3, object())
    payloads[3].fails = False
    use(stream, 3)
    assert stream.nbytes <= 2 * PAGE


def test_a_thread_that_holds_a_page_never_waits_for_a_slot(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    for number in range(6):
        tensors = stream.borrow(number, number, holding=number > 0)
        assert tensors is not None
        assert torch.equal(tensors[0], value(number))
    assert stream.nbytes == 6 * PAGE
    for number in range(6):
        stream.release(number, number)
    assert stream.nbytes <= 2 * PAGE
    for number in range(8):
        use(stream, number)


def test_releasing_twice_or_by_a_stranger_does_nothing(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    first, second = object(), object()
    tensors = stream.borrow(0, first)
    stream.borrow(0, second)
    assert tensors is not None
    for _ in range(2):
        stream.release(0, second)
    stream.release(0, object())
    for number in range(1, 8):
        use(stream, number)
    assert torch.equal(tensors[0], value(0))  # the first visit still holds it


def test_a_refilled_slot_refuses_a_late_backward(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    x = torch.ones(ELEMENTS, requires_grad=True)
    borrower = object()
    tensors = stream.borrow(0, borrower)
    assert tensors is not None
    assert not tensors[0].requires_grad
    y = (x * tensors[0]).sum()
    stream.release(0, borrower)
    for number in range(1, 8):
        use(stream, number)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def test_a_parameter_belongs_to_one_page_and_one_slot(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    seen: dict[int, tuple[int, int]] = {}
    kept: list[object] = []  # so that no identity comes twice
    for number in [*range(8), *range(8), 3, 1, 5, 7]:
        tensors = stream.borrow(number, "borrower")
        assert tensors is not None
        assert isinstance(tensors[0], torch.nn.Parameter)
        kept.append(tensors)
        assert seen.setdefault(id(tensors[0]), (number, tensors[0].data_ptr())) == (
            number,
            tensors[0].data_ptr(),
        )
        stream.release(number, "borrower")


def test_memory_made_in_inference_mode_is_no_inference_tensor(
    file: Path, lane: DeviceTransfer
) -> None:
    stream = streaming(file, lane)
    with torch.inference_mode():
        tensors = stream.borrow(0, "borrower")
        beside = [stream.borrow(number, "borrower", holding=True) for number in range(1, 4)]
    for number, each in enumerate([tensors, *beside]):
        assert each is not None
        assert torch.equal(each[0], value(number))
        assert not each[0].is_inference()
        stream.release(number, "borrower")
    for number in range(8):
        use(stream, number)


def test_pages_of_many_sizes_share_one_ring(tmp_path: Path) -> None:
    sizes = [10, 5000, 70, 5000, 1, 3000, 2000, 64]
    path = tmp_path / "weights"
    path.write_bytes(b"".join(bytes([number]) * size for number, size in enumerate(sizes)))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    pages = [
        [Piece(Extent(path, start, size), torch.uint8, (size,), (1,), is_buffer=True)]
        for start, size in zip(starts, sizes, strict=True)
    ]
    stream = Stream(pages, CpuTransfer(), ring=2)
    for number in [*range(8), 7, 5, 3, 1, 0, 2, 4, 6] * 3:
        tensors = stream.borrow(number, "borrower")
        assert tensors is not None
        assert torch.equal(tensors[0], torch.full((sizes[number],), number, dtype=torch.uint8))
        assert stream.nbytes <= stream.room
        stream.release(number, "borrower")


def test_verification_that_fails_is_told(file: Path) -> None:
    def verify() -> None:
        raise LoadError("changed")

    stream = Stream([page(file, 0)], CpuTransfer(), ring=2, verify=verify)
    with pytest.raises(LoadError, match="changed"):
        stream.borrow(0, "borrower")


def test_a_closed_stream_gives_nothing_and_takes_back_what_is_held(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    stream.borrow(0, "borrower")
    stream.close()
    assert stream.borrow(1, "another") is None
    assert stream.nbytes == stream.room
    stream.release(0, "borrower")
    assert stream.nbytes == 0


def test_a_thread_that_waits_for_a_slot_gets_the_one_that_is_released(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    stream.borrow(0, "a")
    stream.borrow(1, "b", holding=True)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(stream.borrow(2, "c")))
    thread.start()
    time.sleep(0.05)
    assert not got
    stream.release(1, "b")
    thread.join(200)
    assert got


@forks
@threaded
@pytest.mark.usefixtures("one_thread")
def test_a_child_of_a_fork_reads_with_threads_of_its_own(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    use(stream, 0)

    def check() -> bool:
        for number in range(8):
            use(stream, number)
        return True

    assert in_a_child(check)
    use(stream, 1)


@forks
@threaded
@pytest.mark.usefixtures("one_thread")
def test_what_was_borrowed_while_a_process_forked_raises_once_in_the_child(file: Path) -> None:
    stream = streaming(file, CpuTransfer())
    tensors = stream.borrow(3, "borrower")
    stream.borrow(4, "another", holding=True)
    assert tensors is not None

    def check() -> bool:
        with pytest.raises(LoadError, match="forked during a forward"):
            stream.release(3, "borrower")
        stream.release(4, "another")
        for number in range(8):
            use(stream, number)
        return True

    assert in_a_child(check)
    assert torch.equal(tensors[0], value(3))
    stream.release(3, "borrower")
    stream.release(4, "another")


class WatchedLane(LateLane):
    """One that knows which of its memory is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []

    def memory(self, nbytes: int) -> torch.Tensor:
        memory = super().memory(nbytes)
        self.made.append(weakref.ref(memory))
        return memory

    @property
    def left(self) -> list[bool]:
        gc.collect()
        return [memory() is not None for memory in self.made]


@forks
@threaded
@pytest.mark.usefixtures("one_thread")
def test_the_child_of_a_fork_lets_go_of_nothing_that_is_on_the_device_of_its_parent(
    file: Path,
) -> None:
    lane = WatchedLane()
    streams = [streaming(file, lane)]
    for number in range(3):
        use(streams[0], number)
    tensors = [streams[0].borrow(number, "borrower", holding=number > 3) for number in range(3, 6)]

    def check() -> bool:
        with pytest.raises(LoadError, match="forked during a forward"):
            streams[0].release(3, "borrower")
        streams.pop().close()
        tensors.clear()
        return lane.left == [True, True]

    assert in_a_child(check)
    for number in range(3, 6):
        streams[0].release(number, "borrower")
    tensors.clear()
    streams.pop().close()
    assert lane.left == [False, False]


LARGE = (300 << 10) + 40


@pytest.fixture(params=[0, 8, 4096])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> list[list[Piece]]:
    """Six pages of two tensors, large enough to be read directly, that begin somewhere in a
    file.
    """
    path, head = tmp_path / "large", int(request.param)
    values = [
        torch.full((LARGE,), number, dtype=torch.uint8).numpy().tobytes() for number in range(12)
    ]
    path.write_bytes(bytes(head) + b"".join(values))
    pieces = [
        Piece(Extent(path, head + number * LARGE, LARGE), torch.uint8, (LARGE,), (1,))
        for number in range(12)
    ]
    return [pieces[number : number + 2] for number in range(0, 12, 2)]


@pytest.mark.parametrize("order", [[*range(6)] * 4, [5, 0, 3, 3, 1] * 4], ids=str)
def test_large_pages_are_read_past_the_cache_and_are_the_same(
    large: list[list[Piece]], lane: DeviceTransfer, order: list[int]
) -> None:
    stream = Stream(large, lane, ring=2)
    for number in order:
        tensors = stream.borrow(number, "borrower")
        assert tensors is not None
        for tensor, expected in zip(tensors, (2 * number, 2 * number + 1), strict=True):
            assert tensor.data_ptr() % 64 == 0 or isinstance(
                lane, LateLane
            )  # whose memory begins anywhere
            assert torch.equal(tensor, torch.full((LARGE,), expected, dtype=torch.uint8))
        stream.release(number, "borrower")
    assert stream.nbytes <= stream.room


def test_a_ring_of_bytes_holds_as_many_pages_as_fit(file: Path) -> None:
    assert Stream([page(file, 0)], CpuTransfer(), ring="1MB").room == PAGE  # all that there is
    payloads = [Counted(Extent(file, number * PAGE, PAGE)) for number in range(8)]
    stream = Stream(
        [[Piece(each, torch.float32, (ELEMENTS,), (1,))] for each in payloads],
        CpuTransfer(),
        ring=f"{3 * PAGE + 100}",
    )
    use(stream, 0)
    assert eventually(lambda: [payload.reads for payload in payloads] == [1, 1, 1, 0, 0, 0, 0, 0])
    assert stream.nbytes == stream.room == 3 * PAGE + 100


def test_a_ring_of_one_page_reads_what_is_needed_when_it_is_needed(
    file: Path, lane: DeviceTransfer
) -> None:
    stream = Stream([page(file, number) for number in range(8)], lane, ring=f"{PAGE}")
    for number in [*range(8), 3, 3, 0]:
        use(stream, number)
    assert stream.nbytes == PAGE


def test_a_page_that_does_not_fit_is_told_with_the_numbers(file: Path) -> None:
    with pytest.raises(
        OverBudget, match=r"largest block takes 4\.10 kB.* may take 4\.00 kB"
    ) as told:
        Stream([page(file, number) for number in range(8)], CpuTransfer(), ring="4KB")
    assert (told.value.needed, told.value.available) == (PAGE, 4000)


@pytest.mark.parametrize(
    "fault", [SystemExit, KeyboardInterrupt, MemoryError], ids=lambda fault: fault.__name__
)
def test_a_reader_that_is_stopped_is_told_and_replaced(
    file: Path, fault: type[BaseException]
) -> None:
    stream, payloads = counted(file)
    chunks = payloads[3].chunks

    def stopping() -> Iterator[memoryview]:
        raise fault

    for _ in range(5):  # more often than there are readers
        payloads[3].chunks = stopping  # type: ignore[method-assign]  # the fault that is struck
        with pytest.raises(MemoryError if fault is MemoryError else LoadError):
            stream.borrow(3, object())
    payloads[3].chunks = chunks  # type: ignore[method-assign]  # which is taken away again
    for number in range(8):
        use(stream, number)


def test_a_reader_that_is_slow_holds_up_nobody_who_needs_another_page(file: Path) -> None:
    stream, payloads = counted(file, ring=3)
    use(stream, 0)
    payloads[2].go.clear()
    use(stream, 1)  # behind which the second is read ahead, and stays on its way
    use(stream, 6)
    use(stream, 7)
    payloads[2].go.set()
    use(stream, 2)


def test_a_rest_is_when_what_is_read_ahead_has_come_or_failed(file: Path) -> None:
    stream, payloads = counted(file, ring=3)
    payloads[1].go.clear()
    payloads[2].fails = True
    use(stream, 0)  # behind which these two are read ahead
    assert eventually(lambda: payloads[1].reads == payloads[2].reads == 1)
    resting = threading.Thread(target=stream.rest)
    resting.start()
    resting.join(0.05)
    assert resting.is_alive()
    payloads[1].go.set()
    resting.join(200)
    assert not resting.is_alive()
    assert stream._owner.buffers[1].is_ready
    assert (read := stream._owner.buffers[2].read) is not None
    assert read.failed


def test_what_is_read_ahead_stands_back_for_what_is_needed(file: Path) -> None:
    stream, payloads = counted(file, ring=8)
    for payload in payloads:
        payload.go.clear()
    thread = threading.Thread(target=use, args=(stream, 0))  # and the others behind it
    thread.start()
    assert eventually(
        lambda: sum(payload.reads for payload in payloads) == READERS
    )  # all are busy, and held up
    needed = threading.Thread(target=use, args=(stream, 7))
    needed.start()
    assert eventually(lambda: len(stream._owner.buffers[7].borrowers) == 1)
    payloads[0].go.set()
    assert eventually(lambda: payloads[7].reads == 1)  # the one reader that could go on took it
    assert sum(payload.reads for payload in payloads) == READERS + 1
    for payload in payloads:
        payload.go.set()
    for each in (thread, needed):
        each.join(200)


def test_a_thread_that_waits_for_a_slot_gets_it_though_an_interrupt_kept_the_release_untold(
    file: Path, lane: DeviceTransfer
) -> None:
    stream = streaming(file, lane)
    for number in (0, 1):
        assert stream.borrow(number, number, holding=number > 0) is not None
    waiting = threading.Thread(target=use, args=(stream, 2))
    waiting.start()
    assert eventually(lambda: bool(stream._owner._waiting))
    stream._owner.buffers[0].borrowers.discard(0)  # as far as `release` has come
    waiting.join(200)
    assert not waiting.is_alive()
    stream.release(1, 1)
    stream.close()


def test_who_comes_as_a_read_completes_wakes_itself_and_no_other_thread() -> None:
    read = PendingRead.over_with(Loaded(BlockTensors(), Done()))
    others = locked()
    read._waiters.append(others)  # another thread is about to look whether the read is over
    read.wait()
    assert others.locked()
    assert [*read._waiters] == [others]


def test_an_interrupt_between_any_two_calls_leaves_pages_that_can_be_used(
    file: Path, lane: DeviceTransfer
) -> None:
    stream = streaming(file, lane)
    order = [0, 3, 1, 7, 7, 2]

    def cycle() -> None:
        for number in order:
            use(stream, number)

    moment = 0
    while interrupted(cycle, moment):
        for number in order:  # what a block lets go of at the next forward of its thread
            for borrower in list(stream._owner.buffers[number].borrowers):
                stream.release(number, borrower)
        cycle()
        moment += 2
    assert moment > 100
    stream.close()
    assert stream.nbytes == 0


def test_a_close_that_is_interrupted_between_any_two_calls_can_be_repeated(
    file: Path, lane: DeviceTransfer
) -> None:
    moment, goes_on = 0, True
    while goes_on:
        stream = streaming(file, lane, ring=4)
        use(stream, 0)
        goes_on = interrupted(stream.close, moment)
        stream.close()
        assert stream.nbytes == 0
        assert stream.borrow(1, "borrower") is None
        moment += 1
    assert moment > 10


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shardkit-stream")]


@pytest.fixture
def no_readers() -> None:
    """There are none of earlier tests."""
    gc.collect()
    assert eventually(lambda: not readers())


@pytest.mark.usefixtures("no_readers")
def test_readers_that_have_nothing_to_do_end(file: Path, lane: DeviceTransfer) -> None:
    stream = streaming(file, lane)
    for _ in range(2):
        use(stream, 0)
        assert eventually(lambda: not readers())


class NoThreads:
    """Starts of threads that read fail as often as is wanted, the first two together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.together = threading.Barrier(2)
        self.left = times
        self.start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", self.method())

    def method(self) -> Callable[[threading.Thread], None]:
        return lambda thread: self.begin(thread)  # noqa: PLW0108 - which a class binds

    def begin(self, thread: threading.Thread) -> None:
        if not thread.name.startswith("shardkit-stream") or not self.left:
            self.start(thread)
            return
        self.left -= 1
        if not self.together.broken:
            self.together.wait(200)
            self.together.abort()
        raise RuntimeError("can't start new thread")


ASKS: dict[str, Callable[[Stream], object]] = {
    "answer": lambda stream: stream.nbytes,
    "block": lambda stream: stream.borrow(0, object()),
}


def of_two_threads(ask: Callable[[], object]) -> list[object]:
    """What *ask* gives or raises in two threads."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(ask())
        except LoadError as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    return found


@pytest.mark.usefixtures("no_readers")
@pytest.mark.parametrize("ask", ASKS)
def test_two_threads_that_fail_to_start_a_reader_together_are_both_told(
    ask: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = streaming(file, CpuTransfer())
    NoThreads(monkeypatch, times=1000)
    found = of_two_threads(lambda: ASKS[ask](stream))
    assert [type(each) for each in found] == [LoadError, LoadError]
    assert "no thread could be started" in str(found[0])
    monkeypatch.undo()
    for number in range(8):
        use(stream, number)
    stream.close()


@pytest.mark.usefixtures("no_readers")
@pytest.mark.parametrize("ask", ASKS)
def test_a_thread_that_waits_though_no_reader_could_be_started_tries_again(
    ask: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = streaming(file, CpuTransfer())
    NoThreads(monkeypatch, times=2)
    found = of_two_threads(lambda: ASKS[ask](stream))
    assert len(found) == 2
    assert sum(isinstance(each, LoadError) for each in found) == 1
    stream.close()


def closing(stream: Stream) -> threading.Thread:
    """A thread that is about to close *stream*."""
    thread = threading.Thread(target=stream.close)
    thread.start()
    assert eventually(lambda: stream._owner.is_closed)
    return thread


@pytest.mark.usefixtures("no_readers")
def test_a_close_in_the_middle_of_a_read_waits_for_what_was_begun_and_drops_the_rest(
    file: Path,
) -> None:
    parts = [Counted(Buffer(bytes(READ))) for _ in range(2 * READERS)]
    behind = [Piece(Concat(tuple(parts)), torch.uint8, (2 * READERS * READ,), (1,))]
    stream = Stream([page(file, 0), behind], CpuTransfer())
    for part in parts:
        part.go.clear()
    use(stream, 0)
    assert eventually(lambda: sum(part.reads for part in parts) == READERS)
    thread = closing(stream)
    assert stream.nbytes == 0
    assert stream.borrow(1, "borrower") is None
    thread.join(0.05)
    assert thread.is_alive()
    for part in parts:
        part.go.set()
    thread.join(200)
    assert not thread.is_alive()
    assert not readers()
    assert sum(part.reads for part in parts) == READERS


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is counted as Linux does"
)
def test_the_memory_is_back_when_a_close_in_the_middle_of_a_read_returns(tmp_path: Path) -> None:
    nbytes = 16 << 20
    with open(tmp_path / "large", "wb") as large:
        large.truncate(4 * nbytes)
    pieces = [
        Piece(Extent(tmp_path / "large", at, nbytes), torch.uint8, (nbytes,), (1,))
        for at in range(0, 4 * nbytes, nbytes)
    ]
    memory = 0
    for lap in range(4):
        stream = Stream([[piece] for piece in pieces], CpuTransfer(), ring=4)
        stream.borrow(0, "borrower")
        stream.release(0, "borrower")
        stream.close()
        memory = memory if lap else anonymous_memory()
        assert anonymous_memory() - memory < nbytes // 2


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is counted as Linux does"
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["as it lies", "cast"])
def test_the_memory_is_back_after_a_close_though_the_error_of_a_read_is_kept(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    nbytes = 16 << 20
    path = tmp_path / "short"
    path.write_bytes(bytes(nbytes + 4096))
    payload: Payload = Extent(path, 4096, nbytes)
    if dtype is torch.float32:
        payload = Cast(Extent(path, 4096, nbytes // 2), parse_dtype("bf16"), parse_dtype("fp32"))
    memory, kept = 0, []
    for lap in range(5):
        stream = Stream([[Piece(payload, dtype, (nbytes // dtype.itemsize,), (1,))]], CpuTransfer())
        os.truncate(path, nbytes // 4)
        with pytest.raises(FormatError) as error:
            stream.borrow(0, "borrower")
        kept.append(error)
        stream.close()
        memory = memory if lap else anonymous_memory()
        assert anonymous_memory() - memory < nbytes // 2


def anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")
    )


@pytest.mark.usefixtures("no_readers")
def test_a_close_waits_for_what_another_thread_needs_and_may_be_repeated(file: Path) -> None:
    stream, payloads = counted(file)
    payloads[0].go.clear()
    got: list[tuple[torch.Tensor, ...] | None] = []
    needing = threading.Thread(target=lambda: got.append(stream.borrow(0, "borrower")))
    needing.start()
    assert eventually(lambda: payloads[0].reads == 1)
    closes = [closing(stream), closing(stream)]
    payloads[0].go.set()
    for thread in (needing, *closes):
        thread.join(200)
        assert not thread.is_alive()
    assert not readers()
    assert got[0] is not None
    assert torch.equal(got[0][0], value(0))
    stream.release(0, "borrower")
    assert stream.nbytes == 0


def test_a_reader_that_closes_waits_for_no_reader(file: Path) -> None:
    def closing() -> None:
        stream.close()

    stream = Stream([page(file, number) for number in range(8)], CpuTransfer(), verify=closing)
    assert stream.borrow(0, "borrower") is not None
    assert stream.borrow(1, "another") is None


def test_a_close_by_the_owner_itself_waits_for_nobody(file: Path) -> None:
    """As where the garbage collector runs a finalizer there."""
    stream, payloads = counted(file)
    payloads[1].go.clear()
    use(stream, 0)
    assert eventually(lambda: payloads[1].reads == 1)
    stream._owner.ask(stream.close)
    assert eventually(lambda: stream._owner.is_closed)
    payloads[1].go.set()
    assert stream.borrow(1, "borrower") is None


@forks
@threaded
@pytest.mark.usefixtures("one_thread")
def test_what_was_closed_is_closed_in_the_child_of_a_fork_and_may_be_closed_there(
    file: Path,
) -> None:
    stream, payloads = counted(file)
    payloads[1].go.clear()
    use(stream, 0)
    assert eventually(lambda: payloads[1].reads == 1)

    def closed() -> bool:
        stream.close()
        return stream.borrow(0, "borrower") is None

    assert in_a_child(closed)
    payloads[1].go.set()
    stream.close()
    assert in_a_child(lambda: stream.borrow(0, "borrower") is None)


def test_a_page_that_nobody_takes_from_the_ring_gathers_nothing(
    file: Path, lane: DeviceTransfer
) -> None:
    stream = streaming(file, lane, ring=8)
    for _ in range(50):
        for number in range(8):
            use(stream, number)
    assert all(
        slot is not None and len(slot.after) <= 1
        for slot in (buffer.slot for buffer in stream._owner.buffers)
    )
