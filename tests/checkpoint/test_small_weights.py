"""Scalars are weights, unless their names or those beside them are of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardkit
from shardkit.errors import AmbiguousRoot, NothingSelected

W = torch.ones(3, 3)
SCALAR = torch.tensor(1.0)
OPTIMIZER = {"state": {0: {"step": SCALAR, "exp_avg": W}}, "param_groups": [{"lr": 0.1}]}

KEPT = {
    "beside a child that is called as models are": (
        {"logit_scale": SCALAR, "bias": torch.ones(1), "net": {"w": W}},
        {"logit_scale", "bias", "net.w"},
    ),
    "by its name alone": ({"logit_scale": SCALAR, "net": {"w": W}}, {"logit_scale", "net.w"}),
    "with no training key beside": (
        {"queue_ptr": torch.tensor(0), "net": {"w": W}},
        {"queue_ptr", "net.w"},
    ),
    "in a child of a flat model": ({"w": W, "temp": {"value": SCALAR}}, {"w", "temp.value"}),
    "in the model of a training checkpoint": (
        {
            "model": {"w": W, "temp": {"value": SCALAR}},
            "optimizer": OPTIMIZER,
            "epoch": torch.tensor(3),
        },
        {"w", "temp.value"},
    ),
    "by its name beside an optimizer": (
        {"net": {"w": W}, "logit_scale": SCALAR, "optimizer": OPTIMIZER},
        {"net.w", "logit_scale"},
    ),
    "bytes that are no generator's": (
        {"w": W, "table": {"codes": torch.ones(300, dtype=torch.uint8)}},
        {"w", "table.codes"},
    ),
}

ASIDE = {
    "a counter": {"model": {"w": W}, "global_step": torch.tensor(7)},
    "what an unknown name is beside training keys": {
        "model": {"w": W},
        "epoch": 3,
        "ratio": SCALAR,
    },
    "a counter that is called like a parameter": {
        "state_dict": {"w": W},
        "tokens_seen": torch.tensor(5),
    },
    "whatever lies beside what training programs call the model": {
        "model": {"w": W},
        "ratio": SCALAR,
    },
    "one beside another counter": {
        "model": {"w": W},
        "tokens_seen": torch.tensor(5),
        "num_updates": torch.tensor(5),
    },
    "the best result": {"state_dict": {"w": W}, "best_acc": SCALAR},
    "the scale of losses": {"model": {"w": W}, "loss_scale": SCALAR},
    "a scaler": {
        "model": {"w": W},
        "scaler": {"scale": SCALAR, "_growth_tracker": torch.tensor(0)},
    },
    "counters of callbacks": {
        "model": {"w": W},
        "callbacks": {"Timer": {"num_batches": torch.tensor(9)}},
    },
    "a generator of any name": {"model": {"w": W}, "cpu": torch.get_rng_state()},
}


def converted(tmp_path: Path, contents: dict[str, object]) -> set[str]:
    torch.save(contents, tmp_path / "a.pt")
    shardkit.convert(tmp_path / "a.pt", tmp_path / "out")
    return set(load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(("contents", "names"), KEPT.values(), ids=KEPT)
def test_a_scalar_is_kept_with_the_model(
    tmp_path: Path, contents: dict[str, object], names: set[str]
) -> None:
    assert converted(tmp_path, contents) == names


@pytest.mark.parametrize("contents", ASIDE.values(), ids=ASIDE)
def test_a_scalar_of_a_training_run_is_set_aside(
    tmp_path: Path, contents: dict[str, object]
) -> None:
    assert converted(tmp_path, contents) == {"w"}


def test_two_parts_of_which_one_is_a_scalar_are_asked_about(tmp_path: Path) -> None:
    torch.save({"encoder": {"w": W}, "logit_scale": {"v": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(AmbiguousRoot, match="logit_scale"):
        shardkit.convert(tmp_path / "a.pt", tmp_path / "out")
    shardkit.convert(tmp_path / "a.pt", tmp_path / "out", root=".")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"encoder.w", "logit_scale.v"}


def test_a_model_of_scalars_is_found_by_its_name(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    contents = {"model": layer.state_dict(), "optimizer": OPTIMIZER, "epoch": 3}
    assert converted(tmp_path, contents) == {"weight", "bias"}


def test_where_all_is_set_aside_the_error_says_what(tmp_path: Path) -> None:
    with pytest.raises(
        NothingSelected,
        match=r"no model was found among the file's 1 tensor: 'part' \(scalars beside",
    ):
        converted(tmp_path, {"part": {"w": SCALAR}, "epoch": 3})
