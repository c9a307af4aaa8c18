"""Which blocks may lose their memory to others: a policy, and nothing but a policy. No memory,
thread or tensor is here, so that it can be tested with a list of numbers and replaced by another.
"""

from __future__ import annotations

from collections.abc import Collection


class EvictionPolicy:
    """Blocks that were used go first; those that were read ahead wait for their use, but not for
    ever.

    Which of those that may go is taken is the prefetch buffer's affair: the one that was filled the
    longest ago (see `ring_buffer`).
    """

    def __init__(self, count: int) -> None:
        """Know nothing of the *count* blocks yet."""
        self._clock = 0
        self._read_at = [0] * count
        self._used = [False] * count

    def on_read(self, number: int) -> None:
        """A read of the block *number* is begun."""
        self._clock += 1
        self._read_at[number] = self._clock
        self._used[number] = False

    def on_use(self, number: int) -> None:
        """A forward uses the block, or it is not expected to be used any more."""
        self._used[number] = True

    def may_evict(self, number: int, expected: Collection[int]) -> bool:
        """Whether it may go for another one that is read ahead.

        Args:
            number: the block.
            expected: the blocks that are expected to be needed soon.
        """
        if number in expected:
            return False
        age = self._clock - self._read_at[number]
        return self._used[number] or age > 4 * max(2, len(expected))
