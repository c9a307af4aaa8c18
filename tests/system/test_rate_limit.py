"""Waiting for a limit of bytes in a second, on a clock of the test's own."""

from __future__ import annotations

import pytest

from shardkit.system import rate_limit
from shardkit.system.rate_limit import RateLimit


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rate_limit, "time", clock)
    return clock


def test_bytes_take_as_long_as_the_rate_says(clock: Clock) -> None:
    limit = RateLimit(1000)
    for _ in range(10):
        limit.wait(500)
    assert clock.now == pytest.approx(105)


def test_a_pause_gives_no_credit(clock: Clock) -> None:
    limit = RateLimit(1000)
    clock.now += 60
    limit.wait(1000)
    assert clock.now == pytest.approx(161)


def test_a_step_is_a_fraction_of_a_second() -> None:
    assert RateLimit(80).step == 10
    assert RateLimit(1).step == 1
