"""`shardkit offload-prep`: what it prints, and that every option reaches the library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libraries import peer
from shardkit.cli import main

transformers = peer("transformers")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small model in it."""
    monkeypatch.chdir(tmp_path)
    names = [
        "embed.weight",
        *(f"layers.{number}.{part}.weight" for number in range(3) for part in "qk"),
        "head.weight",
    ]
    save_file(
        {name: torch.full((64,), float(at)) for at, name in enumerate(names)},
        tmp_path / "m.safetensors",
    )
    return tmp_path


def test_a_run_ends_by_saying_what_it_did(capsys: Capture) -> None:
    assert main(["offload-prep", "m.safetensors"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "m.safetensors → m-offload/: 1 shard, 5 blocks, 8 tensors, 2.05 kB in " in shown.err
    assert "copied in the kernel" in shown.err


def test_a_dry_run_lists_the_blocks_in_their_order(capsys: Capture, room: Path) -> None:
    assert main(["offload-prep", "m.safetensors", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "blocks  embed → layers.0 … 2 → head" in printed
    assert "Nothing was written." in printed
    assert main(["offload-prep", "m.safetensors", "--dry-run", "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert blocks[1]["block"] == "layers.0"
    assert blocks[1]["tensors"] == ["layers.0.k.weight", "layers.0.q.weight"]
    assert [path.name for path in room.iterdir()] == ["m.safetensors"]


def test_json_is_one_document_and_quiet_is_quiet(capsys: Capture) -> None:
    assert main(["offload-prep", "m.safetensors", "-o", "a", "--json"]) == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out)["blocks"], shown.err) == (5, "")
    assert main(["offload-prep", "m.safetensors", "-o", "b", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_option_reaches_the_library(room: Path) -> None:
    (room / "order.txt").write_text("head\nl.1\n")
    arguments = [
        "--max-shard",
        "6kB",
        "--blocks",
        r"l\.\d+\.q$",
        "--order",
        "order.txt",
        "--rename",
        "^layers=l",
        "--dtype",
        "bf16",
    ]
    arguments += [
        "--exclude",
        "layers.0.*",
        "--checksum",
        "sha256",
        "--jobs",
        "1",
        "--no-fsync",
        "-q",
    ]
    assert main(["offload-prep", "m.safetensors", "-o", "out", *arguments]) == 0
    record = json.loads((room / "out" / "offload.json").read_text())
    names = [block["name"] for block in record["blocks"]]
    assert names[0] == "head"
    assert {"l.1.q", "l.2.q", "embed"} <= set(names)
    assert not any("0" in name for name in names)
    assert record["algorithm"] == "sha256"
    assert (room / "out" / "shardkit.manifest.json").is_file()
    assert {
        tensor.dtype
        for path in (room / "out").glob("*.safetensors")
        for tensor in load_file(path).values()
    } == {torch.bfloat16}


def test_verify_holds_it_against_its_digests_and_its_source(capsys: Capture) -> None:
    assert main(["offload-prep", "m.safetensors", "-q"]) == 0
    assert main(["verify", "m-offload"]) == 0
    assert "compared with the xxh3 of 5 blocks in offload.json" in capsys.readouterr().err
    assert main(["verify", "m-offload", "--against", "m.safetensors"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--blocks", "("], 2, "'(' is not a regular expression"),
        (["--blocks", "a", "--model-class"], 2, "exclude each other"),
        (
            ["-o", "x.safetensors"],
            1,
            "x.safetensors is a file, but offload-prep writes a folder",
        ),
        (["--order", "nowhere"], 1, "nowhere: cannot be read"),
        (["--model-class"], 1, "has no config.json"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    arguments: list[str], code: int, sentence: str, capsys: Capture
) -> None:
    assert main(["offload-prep", "m.safetensors", *arguments]) == code
    assert sentence in capsys.readouterr().err


def test_the_class_of_the_model_is_asked_where_the_user_wants_it(
    room: Path, capsys: Capture
) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(room / "tiny")
    assert main(["offload-prep", "tiny", "--model-class", "--dry-run"]) == 0
    assert "transformer.h.0 … 1" in capsys.readouterr().out


def test_it_imports_no_torch() -> None:
    code = (
        "import sys; from shardkit.cli import main; main(['offload-prep', 'm.safetensors', "
        "'-q']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout == "False\n", done.stderr
