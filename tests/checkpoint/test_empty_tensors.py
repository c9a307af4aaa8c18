"""Placeholders of ZeRO-3 are reported with exact counts; tensors that are empty on purpose are
not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardkit
from shardkit.cli import main

NONE = torch.empty(0)
ONE = torch.ones(1)
NOTES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "placeholders": (
        {"embed.weight": NONE, "layer.A_log": NONE, "norm.weight": ONE},
        "2 of 3 tensors are empty, of shape [0]: 'embed.weight', 'layer.A_log'. DeepSpeed ZeRO-3",
    ),
    "one placeholder": (
        {"a.bias": NONE, "b": ONE},
        "1 of 2 tensors is empty, of shape [0]: 'a.bias'. DeepSpeed ZeRO-3",
    ),
    "nothing but placeholders": (
        {"a.weight": NONE, "b.weight": NONE},
        "the file holds no values: all 2 tensors are empty. DeepSpeed ZeRO-3",
    ),
    "nothing at all": (
        {"a": torch.empty(0, 3)},
        "the file holds no values: its only tensor is empty",
    ),
    "an axis that is empty": ({"a.weight": torch.empty(0, 128), "b": ONE}, ""),
    "an observer": ({"act.min_val": NONE, "act.max_val": NONE, "b": ONE}, ""),
    "indices": ({"a.weight": torch.empty(0, dtype=torch.int64), "b": ONE}, ""),
    "none": ({"b": ONE}, ""),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(("state", "note"), NOTES.values(), ids=NOTES)
def test_placeholders_are_counted_and_what_is_empty_on_purpose_is_not(
    state: dict[str, torch.Tensor], note: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    notes = [each for each in shardkit.open(path).notes if "empty" in each]
    assert [each.startswith(note) for each in notes] == [True] * bool(note)


def test_every_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "pytorch_model.bin", tmp_path / "out"
    torch.save({"a.weight": NONE, "b": ONE}, path)
    for command in (
        ["inspect", path],
        ["convert", path, "-o", out],
        ["verify", out],
        ["verify", out, "--against", path],
        ["verify", path],
    ):
        assert main([*map(str, command)]) == 0
        said = "".join(capsys.readouterr())
        assert "1 of 2 tensors is empty" in said, command
        assert "zero_to_fp32.py" in said
    report = shardkit.convert(path, tmp_path / "again")
    assert any("zero_to_fp32.py" in note for note in report.notes)
