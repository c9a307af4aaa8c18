"""Rounding to multiples, and the alignment of tensors."""

from __future__ import annotations

ALIGNMENT = 64  # bytes; tensors begin at multiples of it, in the files that we write and in memory


def round_up(number: int, multiple: int) -> int:
    """The least multiple of *multiple* that is at least *number*.

    >>> round_up(65, 64), round_up(64, 64), round_up(0, 64)
    (128, 64, 0)
    """
    return ceil_div(number, multiple) * multiple


def round_down(number: int, multiple: int) -> int:
    """The greatest multiple of *multiple* that is at most *number*.

    >>> round_down(65, 64), round_down(64, 64), round_down(63, 64)
    (64, 64, 0)
    """
    return number // multiple * multiple


def ceil_div(number: int, divisor: int) -> int:
    """*number* divided by *divisor*, rounded up.

    >>> ceil_div(9, 8), ceil_div(8, 8), ceil_div(0, 8)
    (2, 1, 0)
    """
    return -(-number // divisor)
