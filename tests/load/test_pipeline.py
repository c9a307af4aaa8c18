"""Several accelerators are a pipeline in one process; see `twins` for what stands for them where
there are none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import backend_registration

import twins
from twins import IDS, LAYERS, Model

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no devices that are made in Python",
)

LAYER_MAP: dict[str, int] = {f"layers.{number}": number // 2 % 2 for number in range(LAYERS)}
LAYER_MAP |= {"embed": 0, "head": 1, "scale": 1}
MAPS: list[Any] = [
    LAYER_MAP,
    {"": 0, "layers": 1},
    {"": 1, "layers.3.up": 0},
    "auto",
    "balanced",
    "sequential",
]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def found(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    checkpoint = tmp_path_factory.mktemp("twins") / "model.safetensors"
    save_file(model.state_dict(), checkpoint)
    script = [sys.executable, twins.__file__, str(checkpoint), *map(json.dumps, MAPS)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_twins_refuse_what_lies_on_both(found: list[Any]) -> None:
    assert found[0] == "all tensors must be on one device, and are on ['twin:0', 'twin:1']"


@pytest.mark.parametrize("number", range(len(MAPS)), ids=str)
def test_each_part_runs_where_its_weights_are_in_the_order_of_the_model(
    model: Model, found: list[Any], number: int
) -> None:
    run = found[1 + number]
    assert torch.equal(torch.tensor(run["logits"]), model(IDS))
    assert run["closed"] == run["logits"]
    places = dict(run["ran"])
    assert list(places) == [
        name for name, module in model.named_modules() if not list(module.children())
    ]
    assert {name: places[name.rpartition(".")[0]] for name in run["weights"]} == run["weights"]
    assert set(places.values()) == {"twin:0", "twin:1"}


@pytest.mark.parametrize("number", range(len(MAPS)), ids=str)
def test_nothing_moves_but_where_the_device_changes_and_the_output_comes_back(
    found: list[Any], number: int
) -> None:
    run = found[1 + number]
    assert run["moves"][0][0] == run["moves"][-1][1] == "cpu"
    if MAPS[number] != {
        "": 1,
        "layers.3.up": 0,
    }:  # there a layer is cut, and its input is needed on both
        path = ["cpu", *(place for _, place in run["ran"]), "cpu"]
        changes = [list(pair) for pair in pairwise(path) if pair[0] != pair[1]]
        assert run["moves"] == changes


def test_a_map_that_is_given_is_kept_and_one_that_is_made_uses_both(found: list[Any]) -> None:
    assert found[1]["map"] == {name: str(device) for name, device in LAYER_MAP.items()}
    assert found[4]["map"] == found[5]["map"]
    for run in found[4:]:
        assert set(run["map"].values()) == {"0", "1"}
        assert all(name.count(".") < 2 for name in run["map"])  # no layer is cut
