"""Extents of open files give the bytes of those that they stand for, and open nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardkit.dtypes import BY_CODE
from shardkit.payloads.joined import joined
from shardkit.payloads.open_files import OpenExtent, opened
from shardkit.payloads.payload import CHUNK, Concat, Extent, Literal, Payload, Swapped, read_all
from shardkit.payloads.strided import strided

F32 = BY_CODE["F32"]
NBYTES = 4 * 64 * 64

MADE: dict[str, Callable[[Extent], Payload]] = {
    "itself": lambda extent: extent,
    "swapped": lambda extent: Swapped(extent, 4),
    "turned": lambda extent: strided(extent, dtype=F32, offset=0, shape=(64, 64), strides=(1, 64)),
    "of swapped, turned": lambda extent: strided(
        Swapped(extent, 4), dtype=F32, offset=0, shape=(64, 64), strides=(1, 64)
    ),
    "parts": lambda extent: Concat(
        (Literal(b"head"), extent.narrow(0, 100), extent.narrow(4000, 5000))
    ),
    "joined": lambda extent: joined([extent, extent], [(64, 64), (64, 64)], 1),
}


@pytest.fixture
def extent(tmp_path: Path) -> Extent:
    path = tmp_path / "weights"
    path.write_bytes(bytes(number * 7 % 256 for number in range(NBYTES + 10)))
    return Extent(path, 10, NBYTES)


@dataclass
class Kept:
    """A file whose bytes are known."""

    content: bytes
    reads: int = 0

    def read(self, path: Path, memory: memoryview, start: int) -> None:
        self.reads += 1
        memory[:] = self.content[start : start + len(memory)]


@pytest.mark.parametrize("made", MADE)
def test_what_is_made_of_open_files_is_the_same_and_opens_none(made: str, extent: Extent) -> None:
    payload = MADE[made](extent)
    expected, kept = read_all(payload), Kept(extent.path.read_bytes())
    extent.path.unlink()
    again = opened(payload, kept.read)
    assert (again.nbytes, read_all(again)) == (payload.nbytes, expected)
    assert kept.reads > 0
    part = again.narrow(again.nbytes // 8 * 4, again.nbytes // 16 * 4)
    assert read_all(part) == expected[again.nbytes // 8 * 4 :][: part.nbytes]


def test_chunks_are_as_long_as_those_of_an_extent() -> None:
    extent = OpenExtent(Path("weights"), 0, 2 * CHUNK + 5, Kept(bytes(2 * CHUNK + 5)).read)
    assert [len(chunk) for chunk in extent.chunks()] == [CHUNK, CHUNK, 5]
    assert not list(extent.narrow(3, 0).chunks())


def test_what_is_made_of_no_file_stays_what_it_is() -> None:
    literal = Literal(b"some")
    assert opened(literal, Kept(b"").read) is literal
