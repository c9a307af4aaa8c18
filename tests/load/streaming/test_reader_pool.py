"""Reader threads: as many as there is work for, in the order of the queue, and none where there is
none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest

from shardkit.errors import LoadError
from shardkit.load.devices.transfers import Done, Ticket
from shardkit.load.streaming.reader_pool import PendingRead, Readers


def filling(*jobs: Callable[[], object], finish: Callable[[], Ticket] = Done) -> PendingRead:
    return PendingRead(jobs, finish, lambda: None)


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


@pytest.mark.parametrize("together", [True, False], ids=["of one filling", "of several"])
def test_as_many_are_at_work_as_there_are_jobs_for(together: bool, readers: Readers) -> None:
    jobs = [Job() for _ in range(4)]
    for each in [filling(*jobs)] if together else [filling(job) for job in jobs]:
        readers.take(each, first=False)
    for job in jobs[:3]:
        assert job.begun.wait(200)
    assert not jobs[3].begun.is_set()
    jobs[1].go.set()
    assert jobs[3].begun.wait(200)
    for job in jobs:
        job.go.set()


def test_one_that_comes_when_others_are_at_work_is_begun(readers: Readers) -> None:
    jobs = [Job() for _ in range(3)]
    readers.take(filling(jobs[0]), first=False)
    for before, job in pairwise(jobs):
        assert before.begun.wait(200)
        readers.take(filling(job), first=False)
    assert jobs[2].begun.wait(200)
    for job in jobs:
        job.go.set()


def test_what_is_hurried_comes_before_what_was_there_first() -> None:
    readers, busy, order = Readers(1, nullcontext), Job(), list[int]()
    readers.take(filling(busy), first=False)
    assert busy.begun.wait(200)
    waiting = [filling(partial(order.append, number)) for number in range(4)]
    for each in waiting[:3]:
        readers.take(each, first=False)
    readers.take(waiting[3], first=True)
    readers.hurry(waiting[2])
    assert waiting[1].give_up()
    busy.go.set()
    for each in (waiting[2], waiting[3], waiting[0]):
        assert each.result() == Done()
    assert order == [2, 3, 0]


def test_after_a_job_that_fails_no_other_is_begun_and_nothing_is_finished() -> None:
    readers, done = Readers(1, nullcontext), list[str]()

    def failing() -> None:
        raise LoadError("broken on purpose")

    def finish() -> Ticket:
        done.append("finish")
        return Done()

    fails = filling(failing, lambda: done.append("job"), finish=finish)
    readers.take(fails, first=False)
    with pytest.raises(LoadError, match="broken on purpose"):
        fails.result()
    assert (fails.failed, done) == (True, [])
    assert not filling().failed


def test_what_is_begun_is_not_given_up_and_what_is_given_up_is_not_begun(readers: Readers) -> None:
    job, given_up = Job(), filling()
    begun = filling(job)
    readers.take(begun, first=False)
    assert job.begun.wait(200)
    assert not begun.give_up()
    job.go.set()
    assert begun.result() == Done()
    assert begun.give_up()
    assert given_up.give_up()
    assert (given_up.begin(), given_up.failed) == (None, True)
    with pytest.raises(LoadError, match="stopped"):
        given_up.result()


def test_a_close_waits_for_what_there_is_to_do(readers: Readers) -> None:
    job, done = Job(), list[int]()
    readers.take(filling(job, lambda: done.append(1)), first=False)
    assert job.begun.wait(200)
    threading.Timer(0.05, job.go.set).start()
    readers.close()
    assert done == [1]
    assert not readers._threads
