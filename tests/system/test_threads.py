"""A pool of threads: as the standard library's, and for longer."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from interruption import interrupted
from repository import GOOD
from shardkit.system.threads import Exclusive, Pool, Workers

_R = TypeVar("_R")


def in_another_thread(act: Callable[[], _R]) -> _R:
    """What *act* returns, within a time."""
    results: list[_R] = []
    thread = threading.Thread(target=lambda: results.append(act()), daemon=True)
    thread.start()
    thread.join(100)
    return results.pop()


def fail(error: Exception) -> None:
    raise error


def test_what_is_submitted_is_done_by_so_many_threads_as_there_may_be() -> None:
    together = threading.Barrier(3, timeout=200)
    with Pool(3, "pooled") as pool:
        futures = [
            pool.submit(lambda number: (together.wait(), number * 10)[1], number)
            for number in range(9)
        ]
        assert [future.result() for future in futures] == [number * 10 for number in range(9)]
        assert {thread.name for thread in threading.enumerate()} >= {
            "pooled_0",
            "pooled_1",
            "pooled_2",
        }
        assert list(pool.map(str, range(5))) == ["0", "1", "2", "3", "4"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pooled")]


def test_what_fails_is_raised_where_it_is_asked_for_and_the_others_go_on() -> None:
    with Pool(1, "pooled") as pool:
        wrong, right = pool.submit(int, "x"), pool.submit(int, "7")
        with pytest.raises(ValueError, match="invalid literal"):
            wrong.result()
        assert right.result() == 7


def test_a_shutdown_may_cancel_what_was_not_begun_and_waits_for_what_was() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(200)
        done.append("slow")

    with Pool(1, "pooled") as pool:
        pool.submit(slow)
        waiting = pool.submit(done.append, "waiting")
        begun.wait(200)
        threading.Timer(0.05, go_on.set).start()
        pool.shutdown(cancel_futures=True)
        assert done == ["slow"]
        with pytest.raises(CancelledError):
            waiting.result()


def test_an_interrupt_at_any_moment_leaves_an_exclusive_call_to_others() -> None:
    exclusive = Exclusive()
    inside: list[str] = []

    def act() -> str:
        inside.append("first")
        exclusive.call(inside.append, "again, in the same thread")
        return "done"

    moment = 0
    while interrupted(lambda: exclusive.call(act), moment):
        assert in_another_thread(partial(exclusive.call, int, "7")) == 7
        moment += 1
    assert moment > 3
    assert exclusive.call(act) == "done"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_an_interrupt_while_another_thread_is_inside_leaves_that_one_inside() -> None:
    exclusive = Exclusive()
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(200)
        order.append("first")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    first = threading.Thread(target=exclusive.call, args=(slow,))
    first.start()
    begun.wait(200)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            exclusive.call(order.append, "second")
    finally:
        signal.signal(signal.SIGALRM, old)
    third = threading.Thread(target=exclusive.call, args=(order.append, "third"))
    third.start()
    go_on.set()
    for thread in (first, third):
        thread.join(200)
    assert order == ["first", "third"]


def test_what_an_exclusive_call_raises_is_raised_and_others_may_call() -> None:
    exclusive = Exclusive()
    with pytest.raises(RuntimeError, match="of the call"):
        exclusive.call(fail, RuntimeError("of the call"))
    assert in_another_thread(partial(exclusive.call, int, "7")) == 7


def test_an_interrupt_at_any_moment_of_a_submission_hides_no_thread_from_shutdown() -> None:
    moment, goes_on = 0, True
    while goes_on:
        pool = Pool(1, "pooled")
        goes_on = interrupted(partial(pool.submit, int), moment)
        assert in_another_thread(lambda: pool.submit(int, "7").result()) == 7  # noqa: B023 - called at once
        pool.shutdown()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("pooled")]
        moment += 1
    assert moment > 10


def test_what_is_done_is_not_kept() -> None:
    class Result:
        pass

    with Pool(1, "pooled") as pool:
        result = pool.submit(Result).result()
        gone = weakref.ref(result)
        pool.submit(int).result()
        del result
        assert gone() is None


LATE = """
import threading
import shardkit
def late():
    threading.main_thread().join()
    shardkit.convert({source!r}, {out!r}, max_shard="1KB")
threading.Thread(target=late).start()
"""


def test_a_thread_converts_after_the_main_thread_has_ended(tmp_path: Path) -> None:
    source = GOOD / "zip-shared.pt"
    body = LATE.format(source=str(source), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "out").glob("*.safetensors"))


def workers_of(tasks: deque[Callable[[], object]], count: int) -> Workers:
    def next_task() -> Callable[[], object] | None:
        try:
            return tasks.popleft()
        except IndexError:
            return None

    return Workers(count, "working", next_task, lambda: bool(tasks))


def test_workers_do_every_task_whoever_posts_it_and_end() -> None:
    tasks, done = deque[Callable[[], object]](), deque[int]()
    workers = workers_of(tasks, 2)

    def post(first: int) -> None:
        for number in range(first, first + 500):
            tasks.append(partial(done.append, number))
            workers.wake()

    posters = [threading.Thread(target=post, args=(500 * each,)) for each in range(4)]
    for poster in posters:
        poster.start()
    for poster in posters:
        poster.join(200)
    workers.join()
    assert sorted(done) == list(range(2000))
    assert not workers._threads


def test_one_worker_does_its_tasks_in_order_also_after_it_was_joined() -> None:
    tasks, done = deque[Callable[[], object]](), list[int]()
    workers = workers_of(tasks, 1)
    for number in range(100):
        tasks.append(partial(done.append, number))
        workers.wake()
        if number == 50:
            workers.join()
    workers.join()
    assert done == list(range(100))


def test_a_worker_that_was_taken_and_not_woken_looks_for_tasks_by_itself() -> None:
    tasks, done = deque[Callable[[], object]](), threading.Event()
    workers = workers_of(tasks, 1)
    workers.wake()
    while not workers._idle:
        time.sleep(0.001)
    workers._idle.pop()  # and there an interrupt comes
    tasks.append(done.set)
    assert done.wait(200)
