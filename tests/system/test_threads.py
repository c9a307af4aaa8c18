"""A pool of threads: as the standard library's, and for longer."""

from __future__ import annotations

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

import pytest

from repository import GOOD
from shardkit.system.threads import Pool, Workers


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


@pytest.mark.parametrize("started", [True, False], ids=["that runs", "that does not run yet"])
def test_an_interrupt_while_a_thread_starts_hides_no_thread_from_shutdown(
    started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if started:
            start(thread)
        raise KeyboardInterrupt

    pool = Pool(1, "pooled")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(int)
    pool.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pooled")]


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
