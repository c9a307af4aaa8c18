"""Which modules stream as one."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch
from torch import nn

from shardkit.load.modules.blocks import Cut, cut
from shardkit.load.modules.weights import ParameterSlot, Weight, weights_of


class Expert(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.experts = nn.ModuleList(Expert() for _ in range(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(2))
        self.embed = nn.Embedding(3, 2)
        self.layers = nn.ModuleList(Layer() for _ in range(11))
        self.tail = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
        self.head = nn.Linear(2, 3, bias=False)


def cut_by(model: nn.Module, device_map: dict[str, Hashable], whole: set[str] = frozenset()) -> Cut:  # type: ignore[assignment]  # empty
    def target(weight: Weight) -> Hashable:
        name = weight.names[0]
        nearest = max(
            (key for key in device_map if not key or f"{name}.".startswith(f"{key}.")), key=len
        )
        return device_map[nearest]

    return cut(model, list(weights_of(model)), target=target, whole=whole)


def names(found: Cut) -> list[str]:
    return [block.name for block in found.blocks]


LAYERS = [f"layers.{number}" for number in range(11)]
PARTS = ["attention", "experts.0", "experts.1"]

CASTS: list[tuple[dict[str, Hashable], set[str], list[str]]] = [
    ({"": "disk"}, set(), ["embed", *LAYERS, "tail.0", "tail.2.0", "head"]),
    ({"": None, "layers.1": "disk"}, set(), ["layers.1"]),
    ({"": None, "layers": "disk", "layers.4": None}, set(), LAYERS[:4] + LAYERS[5:]),
    (
        {"": "disk"},
        {"Expert"},
        [
            "embed",
            *(f"{layer}.{part}" for layer in LAYERS for part in PARTS),
            "tail.0",
            "tail.2.0",
            "head",
        ],
    ),
    ({"": "disk"}, {"Sequential"}, ["embed", *LAYERS, "tail", "head"]),
    ({"": "disk"}, {"Model"}, [""]),
    ({"": "disk", "layers.3.attention": None}, set(), None),  # type: ignore[list-item]  # made below
    ({"": None, "layers.3.experts.1.bias": "disk"}, set(), []),
    ({"": None}, set(), []),
]
CASTS[6] = (
    CASTS[6][0],
    set(),
    [
        "embed",
        *LAYERS[:3],
        "layers.3.experts.0",
        "layers.3.experts.1",
        *LAYERS[4:],
        "tail.0",
        "tail.2.0",
        "head",
    ],
)


@pytest.mark.parametrize(
    ("device_map", "whole", "expected"), CASTS, ids=[str(number) for number in range(len(CASTS))]
)
def test_the_classes_that_stay_whole_and_the_map_make_the_blocks(
    device_map: dict[str, Hashable], whole: set[str], expected: list[str]
) -> None:
    assert names(cut_by(Model(), device_map, whole)) == expected


@pytest.mark.parametrize(("device_map", "whole"), [case[:2] for case in CASTS])
def test_every_weight_is_in_one_block_or_stays(
    device_map: dict[str, Hashable], whole: set[str]
) -> None:
    model = Model()
    found = cut_by(model, device_map, whole)
    counted = [weight.names[0] for block in found.blocks for weight in block.weights]
    counted += [weight.names[0] for weight in found.resident]
    assert sorted(counted) == sorted(name for name, _ in model.named_parameters())
    modules = [module for block in found.blocks for module in block.module.modules()]
    assert len(modules) == len(set(modules))
    for block in found.blocks:
        for weight, seat in zip(block.weights, block.seats, strict=True):
            assert seat.tensor is weight.tensor
            assert seat.owner in set(block.module.modules())


def test_what_a_module_owns_that_contains_blocks_stays() -> None:
    assert [weight.names[0] for weight in cut_by(Model(), {"": "disk"}).resident] == ["bias"]


def test_ties_stay_and_a_module_with_two_names_is_no_tie() -> None:
    model = Model()
    model.head.weight = nn.Parameter(torch.ones(3, 2))
    model.embed.weight = model.head.weight
    model.layers.append(model.layers[3])
    found = cut_by(model, {"": "disk"})
    assert names(found) == [*LAYERS, "tail.0", "tail.2.0"]
    assert [weight.names for weight in found.resident] == [
        ("bias",),
        ("embed.weight", "head.weight"),
    ]


def test_what_two_blocks_share_stays() -> None:
    model = Model()
    first, second = model.layers[0], model.layers[1]
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    second.attention = first.attention
    resident = [weight.names[0] for weight in cut_by(model, {"": "disk"}).resident]
    assert resident == ["bias", "layers.0.attention.weight", "layers.0.attention.bias"]


def test_buffers_that_stay_divide_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    weights = list(weights_of(model))
    found = cut(model, weights, target=lambda weight: None if weight.is_buffer else "disk")
    assert [weight.names[0] for weight in found.blocks[0].weights] == ["0.weight", "0.bias"]


def test_a_seat_is_taken_as_the_module_wants_it() -> None:
    lstm = nn.LSTM(2, 2)
    new = nn.Parameter(torch.zeros(8, 2))
    ParameterSlot(lstm, "weight_ih_l0").take(new)
    assert lstm._flat_weights[0] is new
    norm = nn.BatchNorm1d(2)
    ParameterSlot(norm, "running_mean").take(torch.ones(2))
    assert torch.equal(norm.get_buffer("running_mean"), torch.ones(2))
