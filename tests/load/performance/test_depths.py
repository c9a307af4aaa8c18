"""How deep a ring is where nobody says: deep enough to hide what can be hidden, and no deeper,
whatever there is room for.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from shardkit.load import close, explain, init_empty_weights, load_checkpoint_and_dispatch
from shardkit.load.dispatch import streamed_block
from shardkit.load.performance.bandwidth import Product, Rates, common_product
from shardkit.load.performance.cost_model import Depth, Step, depth_for, ring_bytes, seconds_with
from shardkit.load.placement.choose_resident import search
from shardkit.payloads.payload import Payload

MUCH = 1 << 40
DISK = Rates(disk=10, compute=1e6)


def reading(nbytes: int, *, compute: int = 0) -> Step:
    return Step(disk=nbytes, compute=compute, room=nbytes)


@pytest.mark.parametrize(
    ("steps", "rates", "room", "blocks", "why"),
    [
        ([reading(100)] * 40, DISK, MUCH, 4, "with 3 a forward would take 3% longer"),
        ([reading(100)] * 40, DISK, 300, 3, "with 2 a forward would take 5% longer"),
        ([reading(100)] * 40, DISK, 200, 2, "more do not fit, or would be all streamed blocks"),
        ([reading(100)] * 40, DISK, 0, 2, "more do not fit, or would be all streamed blocks"),
        (
            [reading(100, compute=300)] * 40,
            Rates(disk=10, compute=10),
            MUCH,
            2,
            "more would be no faster",
        ),
        ([reading(100)] * 3, DISK, MUCH, 2, "more do not fit, or would be all streamed blocks"),
    ],
    ids=[
        "disk is the limit",
        "three have room",
        "two have room",
        "none has room",
        "computing is longer",
        "all of it",
    ],
)
def test_a_ring_is_as_deep_as_pays(
    steps: list[Step], rates: Rates, room: int, blocks: int, why: str
) -> None:
    assert depth_for(steps, rates, room) == Depth(blocks, why)


def test_a_ring_is_deeper_where_much_is_computed_between_what_streams() -> None:
    bunched = [reading(100)] * 6 + [Step(compute=1000)] * 6
    machine = Rates(disk=10, compute=100)
    found = depth_for(bunched, machine, MUCH)
    assert found.blocks == 5
    assert (
        seconds_with(5, bunched, machine)
        < seconds_with(4, bunched, machine)
        < seconds_with(2, bunched, machine)
    )
    assert depth_for(bunched, machine, 400).blocks == 4


steps = st.lists(
    st.builds(reading, st.integers(1, 50), compute=st.integers(0, 200)), min_size=1, max_size=12
)
machines = st.builds(Rates, disk=st.integers(1, 50), compute=st.integers(1, 50))


@given(steps, machines, st.integers(0, 400))
def test_no_deeper_ring_that_has_room_is_faster_and_no_shallower_one_is_as_fast(
    steps: list[Step], machine: Rates, room: int
) -> None:
    sizes = [step.room for step in steps]
    blocks = depth_for(steps, machine, room).blocks
    assert blocks == 2 or ring_bytes(sizes, blocks) <= min(room, sum(sizes) - 1)
    fitting = [
        each
        for each in range(2, 9)
        if each == 2 or ring_bytes(sizes, each) <= min(room, sum(sizes) - 1)
    ]
    best = min(seconds_with(each, steps, machine) for each in fitting)
    assert seconds_with(blocks, steps, machine) <= best * 1.005
    assert all(seconds_with(each, steps, machine) > best * 1.005 for each in range(2, blocks))


def test_what_is_dealt_weighs_a_deep_ring_against_what_could_stay() -> None:
    sizes = [100] * 20
    slow_disk, slow_compute = Rates(disk=10, compute=1e6), Rates(disk=1e6, compute=10)
    of_disk, of_compute = (
        search(sizes, 1000, None, rates=rates) for rates in (slow_disk, slow_compute)
    )
    assert of_disk is not None
    assert of_compute is not None
    assert isinstance(of_disk.ring, Depth)
    assert isinstance(of_compute.ring, Depth)
    assert of_compute.ring == Depth(2, "more would be no faster")
    assert len(of_compute.kept) == 8
    assert of_disk.ring.blocks + len(of_disk.kept) == 10
    for dealt in (of_disk, of_compute):
        assert (
            ring_bytes([100] * (20 - len(dealt.kept)), dealt.ring) + 100 * len(dealt.kept) <= 1000
        )


def test_the_matrix_that_is_multiplied_most_stands_for_all() -> None:
    found = common_product(
        [
            (torch.float32, (4, 8)),
            (torch.bfloat16, (3, 4)),
            (torch.float32, (4, 8)),
            (torch.float32, (9,)),
        ]
    )
    assert found == Product(torch.float32, (4, 8))
    assert common_product([]) == Product(torch.bfloat16, (4096, 4096))


WIDTH, LAYERS = 64, 12
X = torch.ones(1, WIDTH)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def loaded(file: Path, device_map: Any = "disk", **options: Any) -> nn.Module:
    with init_empty_weights():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    given = {"": "disk"} if device_map == "disk" else device_map
    return load_checkpoint_and_dispatch(model.eval(), file, given, **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that is slow to compute; how many weights it was measured for, each time."""
    asked: list[int] = []

    def rates_for(
        weights: list[tuple[Payload, torch.dtype, tuple[int, ...]]], device: torch.device
    ) -> Rates:
        asked.append(len(list(weights)))
        return Rates(disk=1e9, compute=1e6)

    for module in ("dispatch.streamed_block", "dispatch.accelerate_api"):
        monkeypatch.setattr(f"shardkit.load.{module}.rates_for", rates_for)
    for module in ("dispatch.streamed_block", "placement.choose_resident"):
        monkeypatch.setattr(f"shardkit.load.{module}.LITTLE", 1000)
    return asked


def test_where_nobody_says_how_deep_a_ring_is_it_is_measured_and_told(
    file: Path, measured: list[int]
) -> None:
    model = loaded(file)
    assert measured == [LAYERS]
    told = explain(model, rates=Rates(disk=1e9, compute=1e6))
    assert told.ring == 2 * WIDTH * WIDTH * 4
    assert told.depths == ("2 blocks: more would be no faster",)
    assert "prefetch buffer 2 blocks: more would be no faster" in " ".join(str(told).split())
    assert explain(copy.deepcopy(model), rates=told.rates).depths == told.depths
    close(model)


def test_a_map_that_is_made_weighs_the_ring_at_the_same_rates(
    file: Path, measured: list[int]
) -> None:
    model = loaded(file, "auto", max_memory={"cpu": 6 * WIDTH * WIDTH * 4})
    assert measured == [LAYERS]
    told = explain(model, rates=Rates(disk=1e9, compute=1e6))
    assert told.depths == ("2 blocks: more would be no faster",)
    assert (
        told.ring + sum(part.nbytes for part in told.parts if not part.streams)
        <= 6 * WIDTH * WIDTH * 4
    )
    close(model)


@pytest.mark.parametrize(
    ("ring", "sentence"), [(3, "3, as requested"), ("100KB", "100KB, as requested")]
)
def test_a_ring_that_somebody_gives_is_taken_and_nothing_is_measured(
    file: Path, measured: list[int], ring: int | str, sentence: str
) -> None:
    model = loaded(file, ring=ring)
    assert explain(model, rates=DISK).depths == (sentence,)
    assert not measured
    close(model)


def test_for_little_nothing_is_measured(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_block, "rates_for", None)
    model = loaded(file)
    told = explain(model, rates=DISK)
    assert told.ring == 4 * WIDTH * WIDTH * 4
    assert told.depths == ("4 blocks: too little streams to be worth measuring",)
    close(model)


@pytest.mark.parametrize(
    ("ring", "sentence"),
    [
        (None, "3 blocks: too little streams to be worth measuring"),
        (5, "3 blocks: at most 5 were requested, and fewer keep more blocks resident"),
        (3, "3, as requested"),
    ],
)
def test_a_ring_that_is_chosen_for_a_map_says_so(
    file: Path, ring: int | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shardkit.load.placement.choose_resident.seconds_with", lambda depth, *_: abs(depth - 3)
    )
    model = loaded(file, "auto", max_memory={"cpu": 6 * WIDTH * WIDTH * 4}, ring=ring)
    assert explain(model, rates=DISK).depths == (sentence,)
    close(model)


@torch.no_grad()
def test_a_ring_that_was_measured_for_runs_like_any_other(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_block, "LITTLE", 0)
    model, same = loaded(file), loaded(file, {"": "cpu"})
    for _ in range(2):
        assert torch.equal(model(X), same(X))
    (sentence,) = explain(model, rates=DISK).depths
    assert sentence[0] in "2345678"
    close(model)
