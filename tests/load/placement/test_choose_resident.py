"""Which blocks stay: budgets are kept, no fewer bytes stay than with a greedy map, and what streams
is spread.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardkit.errors import OverBudget
from shardkit.load.devices.budgets import Device
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.modules.blocks import ModuleBlock, cut
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.modules.sizes import module_sizes, named_tensors
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.load.performance.cost_model import Depth, Ring, ring_bytes
from shardkit.load.placement.choose_resident import Residents, choose_residents, spread
from shardkit.load.placement.device_map import check_device_map
from shardkit.load.placement.infer_device_map import infer_auto_device_map
from shardkit.sizes import parse_size

KB = 1024
RING = 4


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = (
            nn.Linear(16, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, 16, bias=False),
        )
        self.register_buffer("scale", torch.ones(16))


class Toy(nn.Module):
    """An embedding, blocks of given widths (128 bytes for each), a norm, and a head that may be
    tied to the embedding.
    """

    def __init__(self, widths: Sequence[int], *, words: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 16)
        self.layers = nn.ModuleList(Layer(width) for width in widths)
        self.norm, self.dropout = nn.LayerNorm(16), nn.Dropout()
        self.head = nn.Linear(16, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def toy(widths: Sequence[int], *, words: int = 64, tied: bool = False) -> Toy:
    with init_empty_weights(include_buffers=True):
        return Toy(widths, words=words, tied=tied)


def chosen(
    model: nn.Module,
    budgets: dict[Device, int],
    *,
    whole: Sequence[str] = ("Layer",),
    ring: int | str = RING,
) -> Residents:
    greedy = infer_auto_device_map(model, budgets, whole, offload_buffers=True)  # type: ignore[arg-type]  # invariant keys
    return choose_residents(model, greedy, budgets, ring=ring, whole=whole)


def streaming(
    model: nn.Module, device_map: Mapping[str, Device], whole: Collection[str]
) -> tuple[ModuleBlock, ...]:
    runner = runner_of(device_map)

    def target(weight: Weight) -> Device | None:
        device = device_of(weight.names[0], device_map)
        return device if device in {"cpu", "disk"} - {runner} and not weight.is_buffer else None

    return cut(model, list(weights_of(model)), target=target, whole=whole).blocks


def runner_of(device_map: Mapping[str, Device]) -> Device:
    return next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")


def pages(model: nn.Module, device_map: Mapping[str, Device], whole: Collection[str]) -> list[int]:
    sizes = module_sizes(model)
    blocks = streaming(model, device_map, whole)
    return [
        sum(-(-sizes[weight.names[0]] // 64) * 64 for weight in block.weights) for block in blocks
    ]


def holding(
    model: nn.Module, device_map: Mapping[str, Device], ring: Ring, whole: Collection[str]
) -> Counter[Device]:
    """What each device holds once the model is dispatched: weights, and the ring, which has a twin
    on the CPU for the disk.
    """
    blocks, runner = streaming(model, device_map, whole), runner_of(device_map)
    away = {name for block in blocks for weight in block.weights for name in weight.names}
    sizes, held = module_sizes(model), Counter[Device]()
    for name, _ in named_tensors(model):
        device = device_of(name, device_map)
        held[device if name in away or device not in ("cpu", "disk") else runner] += sizes[name]
    nbytes = ring_bytes(pages(model, device_map, whole), ring)
    held[runner] += nbytes
    held["cpu"] += nbytes if runner != "cpu" and held["disk"] else 0
    return held


models = st.builds(
    toy,
    st.lists(st.sampled_from([3, 8, 8, 8, 8, 40]), max_size=10),
    words=st.integers(1, 200),
    tied=st.booleans(),
)
sizes = st.integers(0, 40 * KB)
machines = st.one_of(
    st.fixed_dictionaries({"cpu": sizes}),
    st.fixed_dictionaries({0: sizes, "cpu": sizes}),
    st.fixed_dictionaries({0: sizes, 1: sizes, "cpu": sizes}),
)
wholes = st.sampled_from([(), ("Layer",)])


@given(models, machines, wholes, st.one_of(st.integers(2, 5), st.sampled_from(["2KB", "9KB"])))
def test_budgets_are_kept_and_everything_is_placed_once(
    model: nn.Module, budgets: dict[Device, int], whole: tuple[str, ...], ring: int | str
) -> None:
    try:
        device_map, depth = chosen(model, budgets, whole=whole, ring=ring)
    except OverBudget:
        return
    check_device_map(model, device_map)
    if isinstance(ring, str) and max(pages(model, device_map, whole), default=0) > parse_size(ring):
        return  # which is refused when the model is arranged
    held = holding(model, device_map, depth, whole)
    assert all(held[device] <= budgets[device] for device in budgets if held[device]), (
        device_map,
        held,
    )


@given(models, machines, wholes, st.integers(2, 5))
def test_no_fewer_bytes_stay_than_with_the_greedy_map_where_that_keeps_the_budgets(
    model: nn.Module, budgets: dict[Device, int], whole: tuple[str, ...], ring: int
) -> None:
    greedy = infer_auto_device_map(model, budgets, whole, offload_buffers=True)  # type: ignore[arg-type]  # keys of a mapping
    theirs = holding(model, greedy, ring, whole)
    if all(theirs[device] <= budgets[device] for device in budgets):
        ours = holding(model, *chosen(model, budgets, whole=whole, ring=ring), whole)
        assert ours["disk"] <= theirs["disk"]


def test_what_streams_is_spread_over_the_model() -> None:
    model = toy(
        [8] * 10
        # blocks of 1 KiB, with buffers of 64 bytes beside them; an embedding and a head of 4 KiB
        # each
    )
    others = 2 * 4 * KB + 2 * 64 + 10 * 64
    device_map, ring = chosen(model, {"cpu": others + 7 * KB}, ring=2)
    assert [name for name, device in device_map.items() if device == "disk"] == [
        f"layers.{number}" for number in (0, 2, 4, 6, 8)
    ]
    assert ring == 2


def test_a_large_part_stays_where_the_ring_would_be_larger_for_it() -> None:
    model = toy([8] * 10)
    device_map, _ = chosen(model, {"cpu": 15 * KB})
    assert device_map["embedding"] == device_map["head"] == "cpu"


def test_a_ring_gets_fewer_blocks_where_there_is_not_room_for_as_many() -> None:
    model = toy([8] * 10, words=1)
    small = 10 * 64 + 2 * 64 + 2 * 64
    ring = chosen(model, {"cpu": small + 3 * KB}).ring
    assert ring == Depth(3 - 1, "at most 4 were requested, and fewer keep more blocks resident")
    assert isinstance(few := chosen(model, {"cpu": small + 2 * KB}).ring, Depth)
    assert few.blocks == 2
    with pytest.raises(OverBudget, match=r"'layers\.9' with 1\.02 kB") as caught:
        chosen(model, {"cpu": 2 * KB})
    assert (caught.value.needed, caught.value.available) == (10 * 64 + 2 * KB, 2 * KB)


def test_what_comes_from_disk_needs_a_ring_in_main_memory_too() -> None:
    model = toy([8] * 10, words=1)
    with pytest.raises(
        OverBudget, match=r"device 'cpu' needs at least 2\.05 kB .* host staging buffer"
    ) as caught:
        chosen(model, {0: 6 * KB, "cpu": 1000})
    assert (caught.value.needed, caught.value.available) == (2 * KB, 1000)
    device_map, ring = chosen(model, {0: 6 * KB, "cpu": 5 * KB}, ring=2)
    held = holding(model, device_map, ring, ("Layer",))
    assert held["cpu"] <= 5 * KB < held["cpu"] + KB
    assert chosen(model, {0: 6 * KB, "cpu": 100 * KB}).device_map.keys() >= {
        "layers.0"
    }  # nothing is on disk, and no ring there


def test_tied_weights_stay_together_with_what_runs_them() -> None:
    model = toy([8] * 10, tied=True)
    device_map, _ = chosen(model, {0: 9 * KB, "cpu": 4 * KB})
    assert device_map["embedding"] == device_map["head"] == 0
    assert Counter(device_map.values())["cpu"] > 0 < Counter(device_map.values())["disk"]
    assert (
        next(iter(device for device in device_map.values() if device not in ("cpu", "disk"))) == 0
    )


def test_what_another_accelerator_holds_stays_there() -> None:
    model = toy([8] * 10)
    budgets: dict[Device, int] = {0: 10 * KB, 1: 3 * KB, "cpu": 100 * KB}
    greedy = infer_auto_device_map(
        model, {0: 10 * KB, 1: 3 * KB, "cpu": 100 * KB}, ["Layer"], offload_buffers=True
    )
    device_map, _ = choose_residents(model, greedy, budgets, ring=RING, whole=["Layer"])
    on_second = [name for name, _ in named_tensors(model) if device_of(name, greedy) == 1]
    assert on_second
    assert [
        name for name, _ in named_tensors(model) if device_of(name, device_map) == 1
    ] == on_second


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 500))
def test_spread_keeps_to_the_room_and_no_fewer_bytes_than_the_first_that_fit(
    sizes: list[int], room: int
) -> None:
    kept = sum(sizes[number] for number in spread(sizes, room))
    prefixes = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    assert max(total for total in prefixes if total <= room) <= kept <= room


@given(st.integers(1, 60), st.integers(0, 60))
def test_between_equal_blocks_that_stream_lie_almost_equally_many_that_stay(
    count: int, room: int
) -> None:
    kept = spread([1] * count, room)
    assert len(kept) == min(count, room)
    streamed = [number for number in range(count) if number not in kept]
    gaps = [after - before for before, after in itertools.pairwise(streamed)]
    assert not gaps or max(gaps) - min(gaps) <= 1 + (len(kept) < len(streamed))


def test_a_ring_may_be_given_in_bytes() -> None:
    model = toy([8] * 10, words=1)
    device_map, ring = chosen(model, {"cpu": 14 * 64 + 8 * KB}, ring="3KB")
    assert (ring, Counter(device_map[f"layers.{number}"] for number in range(10))["disk"]) == (
        "3KB",
        5,
    )
    with pytest.raises(OverBudget, match="a buffer for 3KB of blocks"):
        chosen(model, {"cpu": 14 * 64 + 2 * KB}, ring="3KB")
