"""Digests of bytes while they are copied: the algorithms, and one pass over a file and the runs in
it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Protocol

from shardkit.errors import PlanError

ALGORITHMS = ("xxh3", "sha256")


class Hash(Protocol):
    """What hashlib's objects are, and those of xxhash too."""

    def update(self, data: memoryview, /) -> None:
        """Add *data*."""
        ...

    def hexdigest(self) -> str:
        """The digest of all that was added, in hex."""
        ...


def check_algorithm(name: str) -> None:
    """Raise PlanError unless digests by the algorithm called *name* can be computed here."""
    new_hash(name)


def new_hash(name: str) -> Hash:
    """An empty hash of the algorithm called *name*; xxh3 is the one of 128 bits.

    Raises:
        PlanError: there is none, or its library is not installed.
    """
    if name == "sha256":
        return hashlib.sha256()
    if name != "xxh3":
        raise PlanError(
            f"there is no checksum {name!r}; the checksums are {' and '.join(ALGORITHMS)}",
            hint="choose one of them",
        )
    try:
        import xxhash
    except ModuleNotFoundError:
        raise PlanError(
            "the digest xxh3 needs xxhash, which is not installed",
            hint="pip install xxhash; sha256 needs no package",
        ) from None
    return xxhash.xxh3_128()


class Sums:
    """Sums a file whose bytes pass in order: all of it, and each of some runs in it."""

    def __init__(
        self, algorithm: str, runs: Sequence[tuple[int, int]], *, whole: bool = True
    ) -> None:
        """Begin at the first byte.

        Args:
            algorithm: one of `ALGORITHMS`.
            runs: pairs (start, stop) in the order of the file; they do not overlap.
            whole: whether the file as a whole is summed too.
        """
        self._algorithm = algorithm
        self._runs = [*runs, (sys.maxsize, sys.maxsize)]
        self._digests: list[str] = []
        self._whole = new_hash(algorithm) if whole else None
        self._run = new_hash(algorithm)
        self._at = 0

    def see(self, chunk: memoryview) -> None:
        """Add the bytes that follow."""
        if self._whole is not None:
            self._whole.update(chunk)
        stop = self._at + len(chunk)
        while (
            self._runs[len(self._digests)][0] < stop
            or self._runs[len(self._digests)][1] <= self._at
        ):
            start, end = self._runs[len(self._digests)]
            self._run.update(chunk[max(0, start - self._at) : max(0, end - self._at)])
            if end > stop:
                break
            self._end_run()
        self._at = stop

    def ended(self) -> tuple[str, list[str]]:
        """The digests, in hex: of the whole, "" if it is not summed, and of each run."""
        while len(self._digests) < len(self._runs) - 1:
            self._end_run()
        return self._whole.hexdigest() if self._whole is not None else "", self._digests

    def _end_run(self) -> None:
        self._digests.append(self._run.hexdigest())
        self._run = new_hash(self._algorithm)
