"""Records of tied weights in metadata: those of other libraries are read, and those of shardkit
survive any name.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given
from hypothesis import strategies as st

import shardkit
from shardkit.checkpoint.tie_records import recorded, room, ties, without_ties

NAMES = st.text(max_size=12).filter(lambda name: name not in ("format", "shardkit.aliases"))


@given(
    st.dictionaries(NAMES, st.sampled_from(["kept", "a.kept", "b"])),
    st.dictionaries(NAMES, st.text(max_size=5)),
)
def test_what_is_recorded_is_read_again(aliases: dict[str, str], text: dict[str, str]) -> None:
    stored = {"kept", "a.kept", "b"}
    aliases = {alias: kept for alias, kept in aliases.items() if alias not in stored}
    text = {key: value for key, value in text.items() if key not in aliases and value not in stored}
    metadata = {**text, **recorded(aliases)}
    found = ties(metadata, stored)
    assert found == aliases
    assert without_ties(metadata, found) == text


@given(st.dictionaries(NAMES, st.sampled_from(["kept", "a.kept"]), min_size=1))
def test_the_room_that_is_kept_is_enough(aliases: dict[str, str]) -> None:
    needed = len(json.dumps(recorded(aliases), separators=(",", ":"))) - len("{}")
    assert needed <= sum(room(alias, kept) for alias, kept in aliases.items())


def test_ties_that_huggingface_hub_records_are_tensors_again(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    state = {
        "model.embed_tokens.weight": weight,
        "lm_head.weight": weight,
        "model.norm.weight": weight + 1,
    }
    save_torch_state_dict(dict(state), tmp_path)
    torch.save(state, tmp_path / "state.pt")
    checkpoint = shardkit.open(tmp_path / "model.safetensors")
    assert set(checkpoint) == set(state)
    assert shardkit.diff(tmp_path / "state.pt", tmp_path / "model.safetensors").same


def test_text_of_the_user_comes_through_a_conversion_as_text(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", {"author": "w", "format": "pt"})
    report = shardkit.convert(tmp_path / "m.safetensors", tmp_path / "out", ties="copy")
    assert (report.tensors, report.aliases) == (1, {})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert (list(file.keys()), file.metadata()) == (["w"], {"author": "w", "format": "pt"})
