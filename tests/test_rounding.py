"""Rounding to multiples, over all numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardkit.alignment import ceil_div, round_down, round_up

NUMBERS = st.integers(-(1 << 70), 1 << 70)  # beyond what a float counts exactly
MULTIPLES = st.integers(1, 1 << 40)


@given(NUMBERS, MULTIPLES)
def test_a_number_lies_between_the_multiples_that_it_is_rounded_to(
    number: int, multiple: int
) -> None:
    low, high = round_down(number, multiple), round_up(number, multiple)
    assert low <= number <= high
    assert low % multiple == high % multiple == 0
    assert high - low == (multiple if number % multiple else 0)
    assert ceil_div(number, multiple) * multiple == high
