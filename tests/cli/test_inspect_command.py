"""`shardkit inspect`: the tree, what is folded, what shares bytes, and the same for a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardkit
from repository import GOOD
from shardkit.checkpoint.entries import TensorEntry
from shardkit.cli import main
from shardkit.cli.output.name_tree import Leaf, Line, outline
from shardkit.cli.output.shared_storage import overlaps, ties
from shardkit.dtypes import U8
from shardkit.payloads.payload import Extent

Capture = pytest.CaptureFixture[str]

LABELS = st.sampled_from(["a", "b", "0", "1", "2", "3", "10", "weight", ""])
PATHS = st.lists(st.lists(LABELS, min_size=1, max_size=5).map(tuple), max_size=60)


def leaf(shape: str = "[2]", *, tie: str = "") -> Leaf:
    return Leaf("F32", shape, 0 if tie else 8, f"= {tie}" if tie else "", tie=tie)


def drawn(lines: list[Line]) -> list[str]:
    """Each line as its label, indented by its depth, with what it stands for."""
    texts = []
    for line in lines:
        item = line.item
        what = (
            f"+{line.hidden}"
            if item is None
            else f"{item.label}{f' x{item.times}' if item.times > 1 else ''}"
        )
        texts.append("  " * line.depth + what)
    return texts


def inspected(capsys: Capture, *arguments: str | Path) -> list[str]:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


@given(PATHS)
def test_all_lines_show_every_leaf_once(paths: list[tuple[str, ...]]) -> None:
    lines, folded = outline([(path, leaf()) for path in paths], most=None)
    assert not folded
    assert sum(line.item is not None and line.item.leaf is not None for line in lines) == len(paths)


@given(PATHS, st.integers(1, 30))
def test_a_folded_outline_fits_and_loses_nothing(paths: list[tuple[str, ...]], most: int) -> None:
    lines, _ = outline([(path, leaf()) for path in paths], most=most)
    assert len(lines) <= most
    if not any(line.item is None and line.depth == 0 for line in lines):
        tops = [line.item for line in lines if line.depth == 0 and line.item]
        assert sum(item.tensors for item in tops) == len(paths) or not lines


def test_numbered_siblings_that_look_alike_become_one() -> None:
    shapes = ["[2]", "[2]", "[3]", "[2]", "[2]", "[2]"]
    leaves = [
        (("m", str(at), part), leaf(shape))
        for at, shape in enumerate(shapes)
        for part in ("weight", "bias")
    ]
    below = ["    weight", "    bias"]
    assert drawn(outline(leaves, most=13)[0]) == [
        "m",
        "  0",
        *below,
        "  1",
        *below,
        "  2",
        *below,
        "  3 … 5 x3",
        *below,
    ]
    assert drawn(outline(leaves, most=12)[0]) == [
        "m",
        "  0",
        *below,
        "  1",
        *below,
        "  2",
        *below,
        "  3 … 5 x3",
    ]


def test_numbers_are_in_their_order_whatever_that_of_the_file() -> None:
    leaves = [((f"h.{number}.w",), leaf()) for number in sorted(range(12), key=str)]
    assert drawn(outline(leaves, most=None)[0]) == ["h", *(f"  {number}.w" for number in range(12))]
    assert drawn(outline(leaves, most=5)[0]) == ["h", "  0 … 11 x12", "    w"]


def test_layers_that_are_tied_in_the_same_way_look_alike() -> None:
    leaves = [
        ((f"h.{n}.{part}",), leaf(tie=tie))
        for n in range(4)
        for part, tie in (("a", ""), ("b", "^.a"))
    ]
    assert drawn(outline(leaves, most=6)[0])[1] == "  0 … 3 x4"
    leaves[-1] = (leaves[-1][0], leaf(tie="^.^.0.a"))
    assert drawn(outline(leaves, most=6)[0])[1] == "  0 … 2 x3"


def test_a_long_flat_list_is_cut_with_a_count() -> None:
    lines = drawn(outline([((f"p{at}",), leaf()) for at in range(1000)], most=20)[0])
    assert lines[0] == "p0"
    assert lines[18:] == ["p18", "+981"]


def test_a_list_that_does_not_fit_gets_the_lines_that_are_left() -> None:
    leaves = [(("m", f"p{at}"), leaf()) for at in range(1000)] + [
        (("n", part), leaf()) for part in "ab"
    ]
    lines = drawn(outline(leaves, most=20)[0])
    assert len(lines) == 20
    assert lines[0] == "m"
    assert lines[-4:] == ["  +985", "n", "  a", "  b"]


def test_a_name_as_deep_as_a_mine_is_drawn() -> None:
    lines, _ = outline([((".".join("a" * 100_000),), leaf()), (("a", "b"), leaf())], most=200)
    assert len(lines) == 3


def test_ties_are_equal_bytes_types_and_shapes() -> None:
    path = Path("x")
    entries = [
        TensorEntry((name,), U8, (4,), Extent(path, start, 4))
        for name, start in (("a", 0), ("b", 2), ("c", 0), ("d", 6))
    ]
    entries.append(TensorEntry(("e",), U8, (2, 2), Extent(path, 0, 4)))
    assert ties(entries) == {2: 0}
    assert overlaps(entries, {2: 0}) == {1: 0, 4: 0}


def test_the_tree_shows_types_shapes_bytes_ties_and_views(capsys: Capture) -> None:
    lines = inspected(capsys, GOOD / "zip-shared.pt")
    assert lines[0].endswith("zip-shared.pt: torch-zip, 1 file, 3.49 kB")
    assert lines[1] == "17 tensors, 1.25 kB: 13 F32, 4 F16"
    assert "  weight_3   F32  [3, 4]       48 B  in the storage of flat" in lines
    assert "head         F16  [4, 4]             = embed" in lines
    assert "head-turned  F16  [4, 4]       32 B  strided view, in the storage of embed" in lines


def test_what_is_no_tensor_and_what_was_never_run_is_shown(capsys: Capture) -> None:
    lines = inspected(capsys, GOOD / "zip-training.pt")
    assert any(
        line.split() == ["hyper_parameters", "object", "argparse.Namespace"] for line in lines
    )
    assert "never run  argparse.Namespace" in lines
    others = inspected(capsys, GOOD / "zip-others.pt")
    assert any(line.split()[:3] == ["coo", "sparse", "tensor"] for line in others)


def test_it_says_what_convert_would_take(tmp_path: Path, capsys: Capture) -> None:
    assert any(
        line.startswith(
            "convert    takes 'state_dict' and leaves out optimizer_states (208 B, optimizer state)"
        )
        for line in inspected(capsys, GOOD / "zip-training.pt")
    )
    torch.save(
        {"model": {"w": torch.ones(2, 2)}, "ema": {"w": torch.zeros(2, 2)}}, tmp_path / "two.pt"
    )
    (line,) = (
        line for line in inspected(capsys, tmp_path / "two.pt") if line.startswith("convert")
    )
    assert "several subtrees of the file could be the model: 'model' (16 B), 'ema' (16 B)" in line
    assert "--root" in line


def test_a_large_model_is_folded_and_all_shows_it_whole(tmp_path: Path, capsys: Capture) -> None:
    tensors = {
        f"h.{layer}.{part}.weight": torch.zeros(2) for layer in range(40) for part in "abcdef"
    }
    save_file(tensors, tmp_path / "x.safetensors")
    folded = inspected(capsys, tmp_path / "x.safetensors")
    assert len(folded) < 20
    assert any(line.split()[:7] == ["0", "…", "39", "40", "×", "6", "tensors"] for line in folded)
    assert "folded  --all shows every tensor" in folded
    whole = inspected(capsys, tmp_path / "x.safetensors", "--all")
    assert sum("F32" in line for line in whole) == len(tensors) + 1


def test_no_control_character_of_a_name_reaches_the_terminal(
    tmp_path: Path, capsys: Capture
) -> None:
    save_file(
        {"a\x1b[31m\u202e.\nb": torch.zeros(2)},
        tmp_path / "x.safetensors",
        metadata={"k\x07": "v\x07"},
    )
    lines = inspected(capsys, tmp_path / "x.safetensors")
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith("a\\x1b[31m\\u202e.\\nb ") for line in lines)


def test_json_has_every_tensor_with_the_place_of_its_bytes(capsys: Capture) -> None:
    path = GOOD / "zip-shared.pt"
    (line,) = inspected(capsys, path, "--json")
    document = json.loads(line)
    opened = shardkit.open(path)
    assert [each["name"] for each in document["tensors"]] == list(opened)
    content = path.read_bytes()
    for each in document["tensors"]:
        assert each["file"] == str(path)
        if each["offset"] is not None:
            assert content[each["offset"] :][: each["nbytes"]] == opened[each["name"]].read()
    by_name = {each["name"]: each for each in document["tensors"]}
    assert by_name["head"]["tied_to"] == "embed"
    assert by_name["head-turned"]["offset"] is None


def test_json_says_what_else_there_is(capsys: Capture) -> None:
    document = json.loads(inspected(capsys, GOOD / "zip-training.pt", "--json")[0])
    assert document["root"]["name"] == "state_dict"
    assert document["calls"] == ["argparse.Namespace"]
    assert {
        "name": "epoch",
        "path": ["epoch"],
        "kind": "object",
        "nbytes": 0,
        "reason": "3",
    } in document["others"]
