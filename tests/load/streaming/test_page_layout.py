"""Layouts: whatever lies how in which file, each tensor comes to an aligned place, whole, by reads
that may be direct.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardkit.alignment import ALIGNMENT
from shardkit.dtypes import BY_CODE
from shardkit.load.memory.allocate import memory_of, private
from shardkit.load.memory.direct_io import SECTOR, Files
from shardkit.load.streaming.page_layout import READ, Layout
from shardkit.load.streaming.pages import BlockBuffer, Piece
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import Buffer, Concat, Extent, Payload, Swapped, read_all

MiB = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "weights"
    path.write_bytes(torch.randint(0, 256, (12 * MiB + 77,), dtype=torch.uint8).numpy().tobytes())
    return path


def filled(payloads: list[Payload]) -> tuple[Layout, bytes]:
    """What a page of *payloads* has in memory when it was read."""
    [page] = BlockBuffer.of_each(
        [
            [
                Piece(payload, torch.uint8, (payload.nbytes,), (1,), is_buffer=True)
                for payload in payloads
            ]
        ]
    )
    host = private(page.nbytes)
    for job in page.jobs(Files(), host):
        job()
    page.settle(host)
    return page.layout, bytes(memory_of(host))


@dataclass(frozen=True)
class Case:
    """Extents of the file, by start and length."""

    extents: tuple[tuple[int, int], ...]
    reads: int
    makings: int
    moves: int


CASES = {
    "one run that is aligned": Case(((SECTOR, MiB),), 1, 0, 0),
    "several reads of one run": Case(((0, 9 * MiB),), 3, 0, 0),
    "tensors that touch": Case(((64, MiB), (64 + MiB, MiB)), 1, 0, 0),
    "gaps that are read along": Case(
        ((64, MiB), (MiB + 1024, MiB), (2 * MiB + 2048, 128)), 1, 0, 0
    ),
    "a gap that is not": Case(((0, MiB), (3 * MiB, MiB)), 2, 0, 0),
    "off by eight": Case(((8, MiB), (8 + MiB, MiB)), 1, 0, 2),
    "off by one after a tensor of one byte": Case(
        ((64, MiB), (64 + MiB, 1), (65 + MiB, MiB), (65 + 2 * MiB, MiB)), 1, 0, 2
    ),
    "the same bytes twice": Case(((0, MiB), (0, MiB)), 2, 0, 0),
    "backwards": Case(((3 * MiB, MiB), (2 * MiB, MiB), (MiB, MiB)), 1, 0, 0),
    "too small to be direct": Case(((0, 100), (100, 1000), (5000, 3)), 0, 3, 0),
    "up to the end of the file": Case(((11 * MiB, MiB + 77),), 1, 0, 0),
    "nothing": Case((), 0, 0, 0),
    "empty tensors": Case(((5, 0), (0, MiB), (7, 0)), 1, 0, 0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_tensor_comes_to_an_aligned_place(file: Path, case: Case) -> None:
    payloads: list[Payload] = [Extent(file, start, nbytes) for start, nbytes in case.extents]
    layout, memory = filled(payloads)
    assert (len(layout.reads), len(layout.makings), len(layout.moves)) == (
        case.reads,
        case.makings,
        case.moves,
    )
    for payload, place in zip(payloads, layout.places, strict=True):
        assert place % ALIGNMENT == 0
        assert memory[place : place + payload.nbytes] == read_all(payload)


@given(
    st.lists(
        st.tuples(st.integers(0, 3 * MiB), st.one_of(st.integers(0, 300), st.integers(0, MiB))),
        max_size=12,
    ),
    st.booleans(),
)
def test_tensors_lie_apart_and_reads_are_of_whole_sectors(
    extents: list[tuple[int, int]], chained: bool
) -> None:
    at, payloads = 0, []
    for start, nbytes in extents:
        payloads.append(Extent(Path("weights"), at if chained else start, nbytes))
        at += nbytes
    layout = Layout.of(payloads)
    for read in layout.reads:
        assert read.start % SECTOR == read.nbytes % SECTOR == read.at % SECTOR == 0
        assert 0 < read.needed <= read.nbytes <= READ
    taken = sorted(
        (place, place + payload.nbytes)
        for payload, place in zip(payloads, layout.places, strict=True)
        if payload.nbytes
    )
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert all(stop <= layout.nbytes for _, stop in taken)


def test_what_is_no_plain_run_is_made_by_itself(file: Path) -> None:
    run = Extent(file, 4, 6 * MiB)
    payloads: list[Payload] = [
        Cast(run, BY_CODE["F32"], BY_CODE["BF16"]),
        Swapped(run, 4),
        Cast(Swapped(run, 4), BY_CODE["F32"], BY_CODE["F64"]),
        Buffer(bytes(range(256))),
        Buffer(bytearray(range(256))),
        Buffer(b""),
        Concat((Extent(file, 0, 10), Extent(file, 99, 10))),
    ]
    layout, memory = filled(payloads)
    for payload, place in zip(payloads, layout.places, strict=True):
        assert memory[place : place + payload.nbytes] == read_all(payload)
    assert len(layout.makings) == 1 + 2 + 3 + 1 + 1 + 2
