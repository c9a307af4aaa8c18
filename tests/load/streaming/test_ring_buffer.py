"""Rings: blocks that differ by a sector, as they lie in a file, never stand in each other's way."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shardkit.load.devices.transfers import CpuTransfer
from shardkit.load.memory.direct_io import SECTOR
from shardkit.load.streaming.page_layout import Layout, evened
from shardkit.load.streaming.ring_buffer import Ring, Slot, room_for
from shardkit.payloads.payload import Extent

LAYER = (
    1 << 20
) + 1000  # no multiple of a sector, so that each layer begins at another place of one


def layers(count: int, head: int) -> list[Layout]:
    """Layouts of as many layers as *count*, one behind the other in a file, and of a head."""
    sizes = [LAYER] * count + [head]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        Layout.of([Extent(Path("weights"), start, nbytes)])
        for start, nbytes in zip(starts, sizes, strict=True)
    ]


@given(st.integers(2, 9), st.integers(2, 6), st.integers(0, 3 * LAYER))
def test_in_a_ring_of_any_depth_as_many_blocks_have_a_place_as_it_is_deep(
    count: int, depth: int, head: int
) -> None:
    layouts = evened(layers(count, head))
    ring = Ring(CpuTransfer(), room_for([layout.nbytes for layout in layouts], depth))
    held: list[Slot] = []
    for number in islice(cycle(range(count)), 4 * count):
        while len(held) >= min(depth, count):
            ring.evict(held.pop(0))
        found = ring.find(number, layouts[number], lambda place: place not in held)
        assert found is not None
        ring.take(found[0])
        held.append(found[0])


@given(st.lists(st.integers(0, 1 << 30), max_size=30))
def test_lengths_are_evened_upwards_by_less_than_a_hundredth(sizes: list[int]) -> None:
    layouts = [Layout(nbytes, SECTOR, (), (), (), ()) for nbytes in sizes]
    for before, after in zip(layouts, evened(layouts), strict=True):
        assert before.nbytes <= after.nbytes <= before.nbytes * 100 / 99


def test_a_block_without_bytes_between_two_others_makes_no_room() -> None:
    ring, full, empty = (
        Ring(CpuTransfer(), 200),
        Layout(100, 1, (), (), (), ()),
        Layout(0, 1, (), (), (), ()),
    )
    first, *_ = [taken(ring, number, full) for number in range(2)]
    ring.evict(first)
    taken(ring, 2, full)
    taken(ring, 3, empty)
    assert ring.find(4, full, lambda _: False) is None


def taken(ring: Ring, number: int, layout: Layout) -> Slot:
    """The place of a page in *ring*, where all others stay."""
    found = ring.find(number, layout, lambda _: False)
    assert found is not None
    ring.take(found[0])
    return found[0]
