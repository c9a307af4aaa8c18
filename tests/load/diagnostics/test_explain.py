"""explain: every weight told once, with the true reason; and what forwards took, beside what they
should.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardkit
from late_lane import LateLane
from shardkit.load import (
    close,
    disk_offload,
    dispatch_model,
    explain,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from shardkit.load.devices.transfers import Timestamp
from shardkit.load.diagnostics.explanation import Explanation, Part
from shardkit.load.dispatch.attach import DispatchConfig, arrange
from shardkit.load.hooks.forward_timer import Clock, Series
from shardkit.load.modules.sizes import module_sizes
from shardkit.load.performance.bandwidth import Rates
from shardkit.load.performance.cost_model import Prediction, Step
from shardkit.load.streaming.counters import Counters
from shardkit.load.streaming.pages import Piece
from shardkit.load.streaming.prefetcher import Stream
from shardkit.payloads.payload import Buffer

WIDTH, LAYERS = 64, 6
RATES = Rates(disk=1e6, copy=1e9, compute=1e9)
IDS = torch.arange(5)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.down(self.up(x)) * self.scale
        return x + change


class Toy(nn.Module):
    """A weight beside modules, tied weights, buffers, blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(WIDTH))
        self.embedding = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.start
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "toy.safetensors"
    save_file(
        {name: tensor for name, tensor in Toy().state_dict().items() if name != "head.weight"}, path
    )
    return path


@pytest.fixture
def loaded(file: Path) -> Any:
    models = []

    def load(device_map: Any, **options: Any) -> Toy:
        with init_empty_weights():
            model = Toy().eval()
        models.append(
            load_checkpoint_and_dispatch(model, options.pop("file", file), device_map, **options)
        )
        return models[-1]

    yield load
    for model in models:
        close(model)


Load = Callable[..., Toy]


def reasons(told: Explanation) -> set[tuple[str, object, str]]:
    return {(part.name, part.place, part.why) for part in told.parts}


def streamed(told: Explanation) -> list[str]:
    return [part.name for part in told.parts if part.streams]


def test_each_part_has_its_place_and_its_reason(loaded: Load) -> None:
    told = explain(loaded({"": "disk"}), rates=RATES)
    layers = {f"layers.{number}" for number in range(LAYERS)}
    assert reasons(told) == {
        ("start", "cpu", "direct weight of a module with blocks"),
        ("embedding", "cpu", "tied: one copy for all its names"),
        *((name, "disk", "set by the device map") for name in (*layers, "norm")),
        *((name, "cpu", "a buffer") for name in layers),
    }
    assert sum(part.nbytes for part in told.parts) == module_sizes(Toy())[""]
    assert told.held == {
        "disk": told.read["disk"],
        "cpu": module_sizes(Toy())[""] - told.read["disk"],
    }


def test_a_chosen_map_says_what_fits_and_what_has_no_room(loaded: Load) -> None:
    model: Any = loaded("auto", max_memory={"cpu": 150_000})
    told = explain(model, rates=RATES)
    on_disk = [name for name, device in model.hf_device_map.items() if device == "disk"]
    assert streamed(told) == [
        *dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in on_disk)
    ]
    assert {why for _, place, why in reasons(told) if place == "disk"} == {
        "does not fit beside the resident weights"
    }
    assert ("layers.2", "cpu", "fits") in reasons(told)


def test_a_map_that_is_given_says_so(loaded: Load) -> None:
    told = explain(loaded({"": "cpu", "layers.3": "disk"}), rates=RATES)
    assert {why for _, _, why in reasons(told)} == {"set by the device map", "a buffer"}
    assert streamed(told) == ["layers.3"]


def test_a_model_in_which_nothing_streams_needs_no_rates(
    monkeypatch: pytest.MonkeyPatch, loaded: Load
) -> None:
    monkeypatch.setattr("shardkit.load.diagnostics.explain.measure", None)
    for model in (Toy(), loaded({"": "cpu"})):
        told = explain(model)
        assert {(place, why) for _, place, why in reasons(told)} == {("cpu", "fits")}
        assert (told.predicted, told.rates, told.measured, told.ring) == (None, None, None, 0)
        assert str(told).startswith("Toy: 201 kB of weights, nothing streams\n")
    assert {part.place for part in explain(loaded({"": "cpu"}).to("meta")).parts} == {"meta"}


def test_a_model_without_a_map_is_explained_too(tmp_path: Path) -> None:
    model = disk_offload(Toy().eval(), tmp_path / "offload")
    told = explain(model, rates=RATES)
    assert ("start", "cpu", "direct weight of a module with blocks") in reasons(told)
    assert len(streamed(told)) == LAYERS + 1
    close(model)


def test_what_two_blocks_share_says_so(tmp_path: Path) -> None:
    model = Toy().eval()
    model.layers[1].up = model.layers[0].up
    told = explain(
        dispatch_model(model, {"": "disk"}, offload_dir=tmp_path / "offload"), rates=RATES
    )
    assert ("layers.0", "cpu", "shared by several blocks") in reasons(told)
    close(model)


def test_of_a_part_of_a_model_no_reason_is_made_up(loaded: Load) -> None:
    told = explain(loaded({"": "cpu", "layers.1": "disk"}).layers, rates=RATES)
    assert ("0", "cpu", "in memory") in reasons(told)
    assert ("1", "disk", "set by the device map") in reasons(told)


def test_a_forward_is_predicted_from_rates_that_are_given(loaded: Load) -> None:
    told = explain(loaded({"": "disk"}), rates=RATES)
    layers = LAYERS * 2 * WIDTH * WIDTH * 4
    assert told.read == {"disk": layers + 2 * WIDTH * 4, "memory": 0}
    assert told.predicted is not None
    assert told.predicted.busy == pytest.approx(
        (told.read["disk"] / 1e6, 0, 0, (layers + 16 * WIDTH * 4) / 1e9)
    )
    assert told.predicted.limit == "disk"
    assert told.predicted.seconds == pytest.approx(told.read["disk"] / 1e6, rel=0.01)
    assert told.ring == 4 * 2 * WIDTH * WIDTH * 4


def test_what_has_room_in_the_ring_at_once_is_read_once(loaded: Load) -> None:
    told = explain(loaded({"": "cpu", "layers.2": "disk"}), rates=RATES)
    assert told.predicted is not None
    assert told.predicted.first > 10 * told.predicted.seconds
    assert told.read == {"disk": 0, "memory": 0}
    assert "reads nothing: all streamed blocks fit the prefetch buffer" in str(told)


def test_rates_are_measured_for_what_streams_if_none_are_given(loaded: Load) -> None:
    model = loaded({"": "disk"})
    with torch.no_grad():
        model(IDS)
    told = explain(model)
    assert told.rates is not None
    assert None not in (told.rates.disk, told.rates.copy, told.rates.compute)
    assert told.rows == len(IDS)


def test_forwards_of_one_size_are_measured_after_the_first(loaded: Load) -> None:
    model = loaded({"": "disk"})
    assert explain(model, rates=RATES).measured is None
    model(IDS)
    assert explain(model, rates=RATES).measured is None
    model(IDS)
    model(IDS)
    told = explain(model, rates=RATES)
    assert told.measured is not None
    assert told.measured.forwards == 2
    assert told.measured.counts.claims == 2 * (LAYERS + 1)
    assert told.seconds == pytest.approx(told.measured.seconds / 2)
    model(torch.arange(9))
    assert explain(model, rates=RATES).measured is None
    assert explain(model, rates=RATES, rows=5).rows == 5


def test_a_copy_has_a_clock_of_its_own_and_forwards_that_fail_do_not_disturb_it(
    loaded: Load,
) -> None:
    model = loaded({"": "disk"})
    model(IDS)
    model(IDS)
    twin = copy.deepcopy(model)
    assert explain(twin, rates=RATES).measured is None
    with pytest.raises(IndexError):
        model(IDS + 100)
    model(IDS)
    measured = explain(model, rates=RATES).measured
    assert measured is not None
    assert measured.forwards == 3


def test_what_is_done_to_weights_on_each_read_is_told_with_what_to_do(
    loaded: Load, file: Path, tmp_path: Path
) -> None:
    cast = explain(loaded({"": "disk"}, dtype="bfloat16"), rates=RATES)
    assert sum(part.cast for part in cast.parts) == cast.read["disk"] // 2
    assert [sentence for sentence in cast.advice if "offload-prep --dtype" in sentence]
    content = {name: tensor for name, tensor in Toy().state_dict().items() if name != "head.weight"}
    torch.save(content, tmp_path / "toy.bin")
    plain = explain(loaded({"": "disk"}, file=tmp_path / "toy.bin"), rates=RATES)
    assert plain.advice == ()
    weights = [
        entry
        for entry in shardkit.open(file).tensors
        if entry.name.endswith(("up.weight", "down.weight"))
    ]
    starts = [weight.payload.sources[0].start for weight in weights]
    askew = explain(loaded({"": "cpu", "layers": "disk"}), rates=RATES)
    assert sum(part.askew for part in askew.parts) == sum(start % 64 > 0 for start in starts)
    assert " not aligned to 64 bytes, moved whenever they are read" in askew.advice[0]
    pytest.importorskip("zstandard")
    shardkit.convert(file, tmp_path / "packed", compress="zstd")
    packed = explain(loaded({"": "disk"}, file=tmp_path / "packed"), rates=RATES)
    assert sum(part.compressed for part in packed.parts) == cast.read["disk"]
    assert "decompressed" in packed.advice[0]


def test_weights_that_no_file_has_are_told_from_those_on_disk() -> None:
    model = Toy().eval()
    arrange(model, DispatchConfig({"": "disk"}, torch.device("cpu")))
    model.hf_device_map = {"": "disk"}  # type: ignore[assignment]  # an attribute that no module declares
    told = explain(model, rates=RATES)
    assert ("norm", "cpu", "in no file: computed when the model was created") in reasons(told)
    assert told.read == {"disk": 0, "memory": LAYERS * 2 * WIDTH * WIDTH * 4 + 2 * WIDTH * 4}
    close(model)


def test_it_goes_through_json_and_prints_one_line_for_each_reason(loaded: Load) -> None:
    model = loaded({"": "cpu", **{f"layers.{number}": "disk" for number in (0, 2, 3, 5)}}, ring=2)
    for _ in range(2):
        model(IDS)
    told = explain(model, rates=RATES)
    document = json.loads(json.dumps(told.as_dict(), allow_nan=False))
    assert document["predicted"]["limit"] == "disk"
    assert document["measured"]["forwards"] == 1
    assert document["read_per_forward"] == {"disk": 4 * 2 * WIDTH * WIDTH * 4, "memory": 0}
    lines = str(told).splitlines()
    assert lines[0] == "Toy: 201 kB of weights, of which 131 kB stream"
    assert [" ".join(line.split()) for line in lines if line.startswith("  disk")] == [
        "disk 131 kB 4 parts set by the device map layers.[0, 2-3, 5]"
    ]
    assert [line.split()[0] for line in lines[-5:]] == ["A", "predicted", "with", "measured", "8"]
    assert "limit: disk" in lines[-4]


@pytest.mark.parametrize(
    ("numbers", "printed"),
    [
        ([0], "h.0.mlp"),
        ([0, 1, 2], "h.0-2.mlp"),
        ([0, 2, 3, 7], "h.[0, 2-3, 7].mlp"),
        (range(0, 40, 2), "h.[0, 2, 4 … 38].mlp"),
    ],
)
def test_names_that_differ_in_a_number_are_one(numbers: range, printed: str) -> None:
    parts = tuple(Part(f"h.{number}.mlp", "cpu", "cpu", 1, "fits", Step()) for number in numbers)
    assert str(Explanation("Toy", parts)).endswith(f"  fits  {printed}")


@pytest.mark.parametrize(
    ("place", "runs_on", "twin"),
    [("disk", "cpu", 0), ("disk", "cuda:0", 100), ("cpu", "cuda:0", 0)],
    ids=str,
)
def test_the_ring_has_a_twin_in_main_memory_where_a_device_gets_weights_from_disk(
    place: str, runs_on: str, twin: int
) -> None:
    told = Explanation(
        "Toy",
        (Part("h.0", place, runs_on, 50, "set by the device map", Step(room=64)),),
        ring=100,
        depths=("2, why",),
    )
    assert told.host_ring == told.as_dict()["host_ring"] == twin
    assert (str(told).count("host staging buffer, for blocks on disk") == 1) == bool(twin)


@pytest.mark.parametrize(("runs_on", "hidden"), [("cpu", 0.25), ("cuda:0", 0.4)])
def test_what_is_hidden_is_told_by_waiting_or_where_a_forward_is_only_issued_by_the_time_it_took(
    runs_on: str, hidden: float
) -> None:
    part = Part("h.0", "cpu", runs_on, 50, "set by the device map", Step(link=50, room=64))
    measured = Series(1, forwards=2, seconds=4.4, counts=Counters(reading=4.0, waited=3.0))
    told = Explanation(
        "Toy", (part,), predicted=Prediction(2.0, 2.0, (0.0, 0.0, 2.0, 1.0)), measured=measured
    )
    assert told.hidden == pytest.approx(hidden)


def test_rows_are_tokens_or_vectors() -> None:
    model, clock = nn.Linear(3, 4), Clock((), chosen=False)
    clock.attach(model)
    for shape, rows in (((3,), 1), ((5, 3), 5), ((2, 5, 3), 10)):
        model(torch.ones(shape))
        assert clock.series.rows == rows
    embedding = nn.Embedding(4, 4)
    clock.attach(embedding)
    embedding(input=torch.ones(2, 7, dtype=torch.int64))
    assert clock.series.rows == 14


class Plodding(LateLane):
    """A device that takes a second for each step, and is no further than somebody waits for.

    Attributes:
        given: how many it was given.
        steps: how many it has done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given = self.steps = 0

    def issue(self, steps: int) -> None:
        self.given += steps

    def moment(self) -> Timestamp:
        return Reached(self, self.given)


@dataclass(frozen=True)
class Reached:
    """When so many steps are done."""

    lane: Plodding
    steps: int

    @property
    def passed(self) -> bool:
        return self.lane.steps >= self.steps

    def seconds_since(self, earlier: Timestamp) -> float:
        assert isinstance(earlier, Reached)
        self.lane.steps = max(self.lane.steps, self.steps)
        return self.steps - earlier.steps


def test_a_forward_takes_what_its_device_takes_and_is_not_waited_for() -> None:
    lane = Plodding()
    stream = Stream([[Piece(Buffer(bytes(64)), torch.uint8, (64,), (1,))]], lane)
    model, clock = nn.Linear(3, 4), Clock([stream], chosen=False)
    clock.attach(model)
    for steps in (7, 2, 5, 3):
        hook = model.register_forward_pre_hook(lambda *_, steps=steps: lane.issue(steps))
        model(torch.ones(3))
        hook.remove()
        lane.issue(100)  # what the caller does between forwards
    assert lane.steps == 0
    series = clock.series
    assert (series.forwards, series.seconds, lane.steps) == (3, 10.0, 317)
    copy.deepcopy(clock)
    model(torch.ones(2, 3))
    assert clock.series.forwards == 0
    stream.close()


def test_rates_are_measured_when_nothing_is_being_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with init_empty_weights():
        empty = Toy()
    model = load_checkpoint_and_dispatch(empty, file, {"": "disk"}, ring=3)
    told: list[str] = []
    monkeypatch.setattr(Stream, "rest", lambda stream: told.append("at rest"))

    def measure(*_: object) -> Rates:
        told.append("measured")
        return RATES

    monkeypatch.setattr("shardkit.load.diagnostics.explain.measure", measure)
    model(IDS)
    explain(model)
    explain(model, rates=RATES)
    assert told == ["at rest", "measured"]
    close(model)


def test_a_closed_model_is_said_to_be_closed(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardkit.load.diagnostics.explain.measure", None)  # nothing is predicted
    model = loaded({"": "cpu", "layers": "disk"})
    before = explain(model, rates=RATES)
    close(model)
    told = explain(model)
    assert sum(part.nbytes for part in told.parts) == sum(part.nbytes for part in before.parts)
    assert streamed(told) == streamed(before)
    assert {part.why for part in told.parts if part.streams} == {"closed: read whenever it is used"}
    assert {part.place for part in told.parts if part.streams} == {"disk"}
    assert "of which 197 kB are read whenever they are used: the model is closed" in str(told)
    assert "nothing streams" not in str(told)
    assert (told.predicted, told.ring) == (None, 0)
    assert told.as_dict()["predicted"] is None
