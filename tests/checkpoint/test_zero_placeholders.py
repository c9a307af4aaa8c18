"""A file of DeepSpeed ZeRO-3 that holds nothing but placeholders is told for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardkit
from shardkit.errors import NothingSelected

EMPTY = {f"layers.{number}.weight": torch.empty(0) for number in range(7)}
SHAPES = [{name: torch.Size([3, 3]) for name in EMPTY}]


@pytest.mark.parametrize(
    "rest",
    [{}, {"optimizer": None, "lr_scheduler": None, "global_steps": 5}],
    ids=["alone", "in training"],
)
def test_placeholders_below_module_are_reported(rest: dict[str, object], tmp_path: Path) -> None:
    torch.save(
        {"module": EMPTY, "param_shapes": SHAPES, **rest}, tmp_path / "mp_rank_00_model_states.pt"
    )
    report = shardkit.convert(tmp_path / "mp_rank_00_model_states.pt", tmp_path / "out")
    assert any(
        note.startswith("the file holds no values: all 7 tensors are empty. DeepSpeed ZeRO-3")
        for note in report.notes
    )


def test_placeholders_that_are_set_aside_are_told_too(tmp_path: Path) -> None:
    torch.save({"part": EMPTY, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(
        NothingSelected, match=r"^the file holds no values: all 7 tensors are empty"
    ):
        shardkit.convert(tmp_path / "a.pt", tmp_path / "out")


def test_the_hint_of_a_partition_claims_nothing_of_files_that_it_has_not_seen(
    tmp_path: Path,
) -> None:
    state = {"optimizer_state_dict": {"fp32_flat_groups": {0: torch.ones(4)}}}
    torch.save(state, tmp_path / "a_optim_states.pt")
    with pytest.raises(NothingSelected) as caught:
        shardkit.convert(tmp_path / "a_optim_states.pt", tmp_path / "out")
    assert "zero_to_fp32.py, which DeepSpeed writes into the checkpoint folder" in str(
        caught.value.hint
    )
