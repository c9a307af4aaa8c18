"""What a forward is predicted to take: cases that can be worked out by hand, and laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.load.performance.bandwidth import Rate, Rates
from shardkit.load.performance.cost_model import STAGES, Prediction, Step, predict, ring_bytes
from shardkit.load.placement.choose_resident import spread

RATES = Rates(disk=10, copy=50, link=20, compute=100)


def streamed(nbytes: int) -> Step:
    return Step(disk=nbytes, compute=nbytes, room=nbytes)


def resident(nbytes: int) -> Step:
    return Step(compute=nbytes)


@pytest.mark.parametrize(
    ("steps", "ring", "seconds", "limit"),
    [
        ([resident(100)] * 4, 0, 4.0, "compute"),
        ([streamed(100)] * 4, 200, 40.0, "disk"),
        (
            [streamed(100)] * 4,
            100,
            44.0,
            "disk",
        ),  # one block has room: nothing is read while it is computed
        ([streamed(100), resident(900)] * 4, 200, 40.0, "disk"),
        (
            [streamed(100)] * 4 + [resident(900)] * 4,
            200,
            58.0,
            "disk",
        ),  # two are read behind 36 s, the others one by one
        ([streamed(100), resident(1900)] * 4, 200, 80.0, "compute"),
        ([Step(disk=100, copied=1000, compute=100, room=100)] * 4, 300, 80.0, "copy"),
        ([Step(link=100, compute=100, room=100)] * 4, 300, 20.0, "link"),
        ([Step(disk=100, link=100, compute=100, room=100)] * 4, 300, 40.0, "disk"),
        ([streamed(100)] * 4, 400, 4.0, "compute"),
        ([], 0, 0.0, "link"),
    ],
    ids=[
        "resident",
        "streamed",
        "ring of one",
        "spread",
        "bunched",
        "hidden",
        "cast",
        "from memory to a device",
        "from disk to a device",
        "all of it in the ring",
        "nothing",
    ],
)
def test_a_forward_takes_what_its_slowest_stage_takes_and_what_cannot_be_hidden(
    steps: list[Step], ring: int, seconds: float, limit: str
) -> None:
    found = predict(steps, RATES, ring)
    assert found.seconds == pytest.approx(seconds)
    assert not steps or found.limit == limit


def test_the_first_forward_has_nothing_read_before_it() -> None:
    steps = [streamed(100), resident(1900)] * 4
    found = predict(steps, RATES, 200)
    assert [found.first, found.seconds] == pytest.approx([90, 80])


def test_what_there_is_no_rate_of_limits_nothing() -> None:
    assert predict([Step(10, 10, 10, 10, 10)], Rates(), 10).seconds == 0
    assert predict([Step(disk=40, room=40)], Rates(disk=4), 30).seconds == 10


@pytest.mark.parametrize(
    ("busy", "seconds", "hidden"),
    [
        ((40.0, 0.0, 0.0, 80.0), 80.0, 1.0),
        ((40.0, 0.0, 0.0, 10.0), 40.0, 0.25),
        ((40.0, 0.0, 0.0, 10.0), 50.0, 0.0),
    ],
)
def test_reading_is_hidden_while_the_model_computes(
    busy: tuple[float, ...], seconds: float, hidden: float
) -> None:
    assert Prediction(seconds, seconds, busy).hidden == pytest.approx(hidden)
    assert Prediction(1.0, 1.0, (0.0, 0.0, 0.0, 1.0)).hidden == 1


sizes = st.integers(0, 50)
steps = st.lists(st.builds(Step, sizes, sizes, sizes, sizes, sizes), min_size=1, max_size=12)
speeds = st.one_of(st.none(), st.integers(1, 100).map(float))
rates = st.builds(Rates, speeds, speeds, speeds, speeds)


@given(steps, rates, st.integers(0, 200))
def test_no_stage_is_beaten_and_no_stage_waits_for_nothing(
    steps: list[Step], rates: Rates, ring: int
) -> None:
    found = predict(steps, rates, ring)
    assert max(found.busy) <= found.seconds <= sum(found.busy) * 1.000001
    assert found.seconds <= found.first * 1.000001
    assert 0 <= found.hidden <= 1
    assert found.busy[STAGES.index(found.limit)] == max(found.busy)


@given(steps, rates, st.integers(0, 200), st.integers(0, 200))
def test_a_larger_ring_and_a_faster_machine_are_never_slower(
    steps: list[Step], rates: Rates, ring: int, more: int
) -> None:
    found = predict(steps, rates, ring)
    speeds = (rates.disk, rates.copy, rates.link, rates.compute)
    faster = Rates(*(None if each is None else each * 2 for each in speeds))
    assert predict(steps, rates, ring + more).first <= found.first * 1.000001
    assert predict(steps, faster, ring).seconds == pytest.approx(found.seconds / 2)


@given(st.integers(2, 40), st.integers(0, 39), st.integers(1, 100), st.integers(1, 100))
def test_residents_that_are_spread_hide_at_least_as_much_as_the_first_ones(
    count: int, kept: int, disk: int, compute: int
) -> None:
    machine, ring = Rates(disk=disk, compute=compute), ring_bytes([100] * count, 4)
    chosen = spread([100] * count, 100 * kept)
    evenly = [resident(100) if number in chosen else streamed(100) for number in range(count)]
    bunched = [resident(100) if number < kept else streamed(100) for number in range(count)]
    assert (
        predict(evenly, machine, ring).seconds <= predict(bunched, machine, ring).seconds * 1.000001
    )


def test_a_prediction_at_measured_rates_says_how_far_it_may_be_off() -> None:
    steps = [Step(disk=100, compute=10, room=100)] * 8
    measured = Rates.measured(disk=Rate(10, 8, 20), compute=Rate(100, 50, 200))
    found = predict(steps, measured, 200)
    assert found.seconds == predict(steps, Rates(disk=10, compute=100), 200).seconds
    assert found.spread == tuple(
        predict(steps, Rates(disk=d, compute=c), 200).seconds for d, c in ((20, 200), (8, 50))
    )
    assert str(found) == f"{found.seconds:.3g} s ({found.spread[0]:.3g} to {found.spread[1]:.3g})"
    exact = measured.given(disk=10, compute=100)
    assert exact == Rates(disk=10, compute=100)
    assert str(predict(steps, exact, 200)) == f"{found.seconds:.3g} s"
