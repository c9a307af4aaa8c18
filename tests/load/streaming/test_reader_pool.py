"""Reader threads: as many as there is work for, the most urgent read first, and none where there is
nothing to read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest

from shardkit.errors import LoadError
from shardkit.load.devices.transfers import Done
from shardkit.load.streaming.reader_pool import (
    BlockTensors,
    Loaded,
    PendingRead,
    Priority,
    Readers,
    locked,
)

NOTHING = Loaded(BlockTensors(), Done())


def read_of(
    *jobs: Callable[[], object],
    finish: Callable[[], Loaded] = lambda: NOTHING,
    priority: Priority = Priority.NOW,
) -> PendingRead:
    return PendingRead(jobs, finish, lambda: None, priority)


def result_of(read: PendingRead) -> Loaded:
    read.wait()
    return read.result()


class Job:
    """One that waits until it may go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        self.go.wait(30)


@pytest.fixture
def readers() -> Readers:
    return Readers(3, nullcontext)


@pytest.mark.parametrize("together", [True, False], ids=["of one read", "of several"])
def test_as_many_are_at_work_as_there_are_jobs_for(together: bool, readers: Readers) -> None:
    jobs = [Job() for _ in range(4)]
    for each in [read_of(*jobs)] if together else [read_of(job) for job in jobs]:
        readers.take(each)
    for job in jobs[:3]:
        assert job.begun.wait(200)
    assert not jobs[3].begun.is_set()
    jobs[1].go.set()
    assert jobs[3].begun.wait(200)
    for job in jobs:
        job.go.set()


def test_one_that_comes_when_others_are_at_work_is_begun(readers: Readers) -> None:
    jobs = [Job() for _ in range(3)]
    readers.take(read_of(jobs[0]))
    for before, job in pairwise(jobs):
        assert before.begun.wait(200)
        readers.take(read_of(job))
    assert jobs[2].begun.wait(200)
    for job in jobs:
        job.go.set()


def test_reads_are_done_in_the_order_of_their_priorities() -> None:
    readers, busy, order = Readers(1, nullcontext), Job(), list[str]()
    readers.take(read_of(busy))
    assert busy.begun.wait(200)

    def wanted(name: str, priority: Priority) -> PendingRead:
        read = read_of(partial(order.append, name), priority=priority)
        readers.take(read)
        return read

    reads = [
        wanted("maybe", Priority.MAYBE),
        wanted("next", Priority.NEXT),
        wanted("hurried", Priority.MAYBE),
        wanted("cancelled", Priority.NEXT),
        wanted("now", Priority.NOW),
    ]
    readers.hurry(reads[2])
    assert reads.pop(3).cancel()
    busy.go.set()
    assert [result_of(read) for read in reads] == [NOTHING] * 4
    assert order == ["now", "hurried", "next", "maybe"]


def test_after_a_job_that_fails_no_other_is_begun_and_nothing_is_finished() -> None:
    readers, done = Readers(1, nullcontext), list[str]()

    def failing() -> None:
        raise LoadError("broken on purpose")

    def finish() -> Loaded:
        done.append("finish")
        return NOTHING

    fails = read_of(failing, lambda: done.append("job"), finish=finish)
    readers.take(fails)
    with pytest.raises(LoadError, match="broken on purpose"):
        result_of(fails)
    assert (fails.failed, fails.succeeded, done) == (True, False, [])
    assert not read_of().failed


def test_what_is_begun_is_not_cancelled_and_what_is_cancelled_is_not_begun(
    readers: Readers,
) -> None:
    job, cancelled = Job(), read_of()
    begun = read_of(job)
    readers.take(begun)
    assert job.begun.wait(200)
    assert not begun.cancel()
    job.go.set()
    assert result_of(begun) == NOTHING
    assert begun.cancel()
    assert cancelled.cancel()
    assert (cancelled.begin(), cancelled.failed) == (None, True)
    with pytest.raises(LoadError, match="terminated"):
        result_of(cancelled)


def test_each_waiter_is_woken_once_whether_it_comes_before_or_after_the_end(
    readers: Readers,
) -> None:
    job, bells = Job(), [locked() for _ in range(3)]
    read = read_of(job)
    read.add_waiter(bells[0])
    readers.take(read)
    assert job.begun.wait(200)
    read.add_waiter(bells[1])
    assert not bells[0].acquire(timeout=0.01)
    job.go.set()
    assert all(bell.acquire(timeout=200) for bell in bells[:2])
    read.add_waiter(bells[2])
    assert bells[2].acquire(timeout=0)


def test_a_join_waits_for_what_there_is_to_do(readers: Readers) -> None:
    job, done = Job(), list[int]()
    readers.take(read_of(job, lambda: done.append(1)))
    assert job.begun.wait(200)
    threading.Timer(0.05, job.go.set).start()
    readers.join()
    assert done == [1]
    assert not [each for each in threading.enumerate() if each.name.startswith("shardkit-stream")]
