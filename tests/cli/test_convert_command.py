"""`shardkit convert`, `verify` and `diff`: what they print, and what stands on the disk
afterwards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import shardkit
from repository import GOOD
from shardkit.cli import main

TRAINING = str(GOOD / "zip-training.pt")
TIED = str(GOOD / "safetensors-tied.safetensors")
FOLDER = str(GOOD / "folder-safetensors")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_ends_by_saying_what_it_did(capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "out"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "→ out/: 1 shard, 7 tensors, 136 B in " in shown.err
    assert "136 B copied in the kernel" in shown.err or "136 B" in shown.err
    assert "left out    optimizer_states, 208 B: optimizer state" in shown.err
    assert "never run   argparse.Namespace" in shown.err
    assert "6 objects: optimizer_states.0.param_groups" in shown.err


def test_folded_ties_are_listed_with_the_way_to_write_both(capsys: Capture) -> None:
    assert main(["convert", TIED, "-o", "out"]) == 0
    said = capsys.readouterr().err
    assert "1 name recorded instead of written twice; --ties copy writes both" in said
    assert "head.weight = weight" in said


def test_quiet_says_nothing(capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "out", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_json_is_one_document_on_stdout(capsys: Capture) -> None:
    assert main(["convert", TIED, "-o", "out", "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert shown.err == ""
    assert (report["out"], report["shards"], report["tensors"]) == ("out", 1, 1)
    assert report["aliases"] == {"head.weight": "weight"}


@pytest.mark.torch
def test_every_option_reaches_the_library(capsys: Capture) -> None:
    arguments = [
        "--root",
        "state_dict",
        "--include",
        "*weight",
        "--exclude",
        "1.*",
        "--rename",
        "^0\\.=first.",
        "--dtype",
        "bf16",
    ]
    options = [
        "--max-shard",
        "none",
        "--jobs",
        "1",
        "--no-fsync",
        "--no-companions",
        "--format",
        "torch-zip",
        "--limit",
        "tensors=100",
    ]
    assert main(["convert", TRAINING, "-o", "out", *arguments, *options]) == 0
    written = shardkit.open("out")
    assert [(entry.name, entry.dtype.code) for entry in written.tensors] == [
        ("first.weight", "BF16")
    ]
    assert "1 tensor\n" in capsys.readouterr().err
    assert main(["verify", "out", "--against", TRAINING, *arguments]) == 0


def test_ties_can_be_copied() -> None:
    assert main(["convert", TIED, "-o", "out", "--ties", "copy"]) == 0
    assert len({entry.payload for entry in shardkit.open("out").tensors}) == 2


def test_one_file_can_be_written(room: Path) -> None:
    assert main(["convert", TRAINING, "-o", "x.safetensors"]) == 0
    assert [path.name for path in room.iterdir()] == ["x.safetensors"]
    assert main(["convert", TRAINING, "-o", "y.safetensors", "--max-shard", "none"]) == 0


def test_an_output_is_replaced_when_asked(capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "out"]) == 0
    assert main(["convert", TRAINING, "-o", "out"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", TRAINING, "-o", "out", "--overwrite"]) == 0


def test_a_limit_that_is_hit_names_the_option_that_raises_it(capsys: Capture) -> None:
    option = "tensors=3"
    for _ in range(
        4
    ):  # how many there are is known only when all are counted, so each hint doubles
        if main(["convert", TRAINING, "-o", "out", "--limit", option]) == 0:
            return
        option = capsys.readouterr().err.splitlines()[-1].partition("--limit ")[2]
    pytest.fail(option)


def test_a_dry_run_prints_the_plan_and_writes_nothing(room: Path, capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "out", "--max-shard", "3kB", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "  model-00001-of-0000" in shown.out
    assert "model.safetensors.index.json" in shown.out
    assert shown.out.endswith(" free. Nothing was written.\n")
    assert not list(room.iterdir())


def test_a_dry_run_tells_a_machine_what_would_be_written(capsys: Capture) -> None:
    assert main(["convert", FOLDER, "-o", "out", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(file["nbytes"] for file in plan["files"]) == sum(
        sum(file["engines"].values()) for file in plan["files"]
    )
    assert plan["weight_map"]["embed.weight"] == plan["files"][0]["name"]
    assert plan["needed"] <= plan["free"]


@pytest.mark.parametrize("command", ["convert", "offload-prep"])
@pytest.mark.parametrize(
    "options", [[], ["--checksum", "sha256"], ["--checksum", "xxh3", "--max-shard", "3kB"]]
)
def test_a_dry_run_lists_every_file_that_the_run_writes(
    command: str, options: list[str], room: Path, capsys: Capture
) -> None:
    words = [command, FOLDER, "-o", "out", *options, "--json"]
    assert main([*words, "--dry-run"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert main(words) == 0
    written = {
        path.relative_to(room / "out").as_posix(): path.stat().st_size
        for path in (room / "out").rglob("*")
        if path.is_file()
    }
    assert {file["name"]: file["nbytes"] for file in files} == written
    assert ("offload.json" in written, "shardkit.manifest.json" in written) == (
        command == "offload-prep",
        bool(options),
    )


def test_a_dry_run_lists_a_manifest_of_compressed_files_too(room: Path, capsys: Capture) -> None:
    words = ["convert", FOLDER, "-o", "out", "--compress", "zstd", "--checksum", "xxh3", "--json"]
    assert main([*words, "--dry-run"]) == 0
    planned = {
        file["name"]: file["nbytes"] for file in json.loads(capsys.readouterr().out)["files"]
    }
    assert main(words) == 0
    assert planned.keys() == {path.name for path in (room / "out").iterdir()}
    name = "shardkit.manifest.json"
    assert planned[name] == pytest.approx((room / "out" / name).stat().st_size, abs=20)


def test_a_dry_run_of_what_cannot_be_done_shows_the_plan_and_exits_1(
    room: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    assert main(["convert", TRAINING, "-o", "out", "--dry-run"]) == 1
    shown = capsys.readouterr()
    assert "model.safetensors" in shown.out
    assert "has 100 B free, and the output of" in shown.err
    (room / "full").mkdir()
    (room / "full" / "notes.txt").write_text("mine")
    assert main(["convert", TRAINING, "-o", "full", "--dry-run", "--overwrite"]) == 1
    assert "notes.txt" in capsys.readouterr().err


def test_verify_says_that_an_output_is_whole_and_the_same(capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "out", "-q"]) == 0
    assert main(["verify", "out"]) == 0
    assert main(["verify", "out", "--against", TRAINING]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].endswith("is complete: 7 tensors, 136 B, every byte read")
    assert shown.out.splitlines()[1].endswith(
        f"holds the same tensors as {TRAINING}: 7 tensors, 136 B, bit for bit; 2 parts with "
        "weights not compared"
    )
    assert f"not compared: {TRAINING}: optimizer_states, 208 B: optimizer state" in shown.err
    assert main(["verify", "out", "--against", TRAINING, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_verify_lists_what_differs_and_exits_1(room: Path, capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "out", "-q"]) == 0
    shard = room / "out" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", "out", "--against", TRAINING]) == 1
    line, verdict = capsys.readouterr().out.splitlines()
    assert line.startswith("~ ")
    assert "bytes: the first element that differs is number" in line
    assert "in 1 tensor" in verdict
    assert main(["verify", "out", "--against", TRAINING, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["same"]
    assert [each["change"] for each in document["differences"]] == ["bytes"]


@pytest.mark.torch
def test_diff_marks_added_removed_and_changed(capsys: Capture) -> None:
    assert main(["convert", TRAINING, "-o", "a", "-q", "--exclude", "0.bias"]) == 0
    assert (
        main(["convert", TRAINING, "-o", "b", "-q", "--exclude", "0.weight", "--dtype", "fp16"])
        == 0
    )
    assert main(["diff", "a", "b"]) == 1
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line[0] != "~"] == [
        ["-", "0.weight"],
        ["+", "0.bias"],
    ]
    assert lines[1].startswith("~  1.weight ")
    assert lines[1].endswith("dtype: F32 became F16")
    assert verdict == "1 added, 1 removed, 4 changed, 5 in both"
    assert main(["diff", "a", "a"]) == 0
    assert capsys.readouterr().out.startswith("no difference: 6 tensors")


def test_a_long_list_of_differences_is_cut(capsys: Capture) -> None:
    assert main(["diff", str(GOOD / "zip-matrix.pt"), TRAINING]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert lines[20].endswith("more; --json lists all")
    assert main(["diff", str(GOOD / "zip-matrix.pt"), TRAINING, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["differences"]) > 280
