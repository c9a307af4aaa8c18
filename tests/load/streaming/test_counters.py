"""Counts: what is added is there, from however many threads, and reads side by side take their time
once.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from shardkit.load.devices.transfers import CpuTransfer
from shardkit.load.streaming import counters as module
from shardkit.load.streaming.counters import Counters, LiveCounters
from shardkit.load.streaming.pages import Piece
from shardkit.load.streaming.prefetcher import Stream
from shardkit.payloads.payload import Buffer, Extent


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_reads_side_by_side_take_their_time_once(clock: Clock) -> None:
    tally = LiveCounters()
    with tally.reading():
        clock.now += 1
        with tally.reading():
            clock.now += 2
            assert tally.counts.reading == 3
        clock.now += 4
    clock.now += 100
    assert tally.counts.reading == 7


def test_a_read_that_fails_takes_its_time_and_is_none(clock: Clock) -> None:
    tally = LiveCounters()

    def fail() -> None:
        with tally.reading():
            clock.now += 1
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        fail()
    assert tally.counts == Counters(reading=1)


def test_nothing_is_lost_between_threads() -> None:
    tally = LiveCounters()

    def add() -> None:
        for _ in range(1000):
            tally.read(disk=1, memory=2)
            tally.borrowed(waited=0.5, hit=True)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.counts == Counters(
        disk=4000, memory=8000, reads=4000, waited=2000.0, claims=4000, hits=4000
    )


def test_the_difference_is_what_was_done_between() -> None:
    tally = LiveCounters()
    tally.read(disk=5)
    before = tally.counts
    tally.read(disk=7)
    tally.borrowed(waited=1.0, hit=False)
    assert tally.counts.since(before) == Counters(disk=7, reads=1, waited=1.0, claims=1)


def test_a_stream_counts_what_it_reads_and_from_where(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(64)) * 2)
    pages = [
        [Piece(Extent(path, 0, 64), torch.uint8, (64,), (1,), is_buffer=True)],
        [Piece(Buffer(bytes(32)), torch.uint8, (32,), (1,), is_buffer=True)],
    ]
    stream = Stream(pages, CpuTransfer(), ring=2)
    for number in [0, 1, 0, 1, 1]:
        stream.borrow(number, "visit")
        stream.release(number, "visit")
    stream.close()
    counts = stream.counts
    assert (counts.disk, counts.memory, counts.reads, counts.claims) == (64, 32, 2, 5)
    assert 3 <= counts.hits <= 4  # the second page may have been there, read ahead
    assert counts.reading > 0
