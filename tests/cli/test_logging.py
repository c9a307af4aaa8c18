"""What is logged, and where it is shown: with -v on stderr, in Python wherever logging is
configured to.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

import shardkit
from repository import GOOD
from shardkit.cli import main

if os.name == "posix":
    from terminals import on_a_terminal

TRAINING = GOOD / "zip-training.pt"


def test_verbose_says_what_was_recognised_how_it_was_copied_and_how_long_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(TRAINING), "-o", "out", "-v"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"s  {TRAINING}: torch-zip, 20 tensors in 1 files; headers read in 0." in shown.err
    assert (
        "model.safetensors: 512 B headers, 136 B copied in the kernel in 0." in shown.err
        or "read" in shown.err
    )
    assert "out: in place after " in shown.err
    assert "read as torch-zip" not in shown.err
    assert main(["verify", "out", "-vv"]) == 0
    shown = capsys.readouterr()
    assert "model.safetensors: read as safetensors" in shown.err
    assert "is complete" in shown.out


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["place"], ["diff", TRAINING], ["verify"]],
    ids=lambda command: command[0],
)
def test_every_command_that_reads_is_verbose_and_json_stays_one_document(
    command: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, command), str(TRAINING), "--json", "--verbose"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert "torch-zip, 20 tensors" in shown.err
    assert main(["formats", "-v"]) == 0


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("shardkit")
    before = logger.level
    assert main(["inspect", str(TRAINING), "-vv"]) == 0
    assert main(["inspect", "nowhere", "-vv"]) == 1
    assert (logger.handlers, logger.level) == ([], before)
    capsys.readouterr()
    assert main(["inspect", str(TRAINING)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.torch
def test_python_sees_the_same_through_logging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "shardkit"):
        shardkit.convert(TRAINING, tmp_path / "out")
        from shardkit.load import tensors

        tensors(tmp_path / "out")
    assert {record.name for record in caplog.records} == {"shardkit"}
    assert any("in place after" in record.getMessage() for record in caplog.records)


@pytest.mark.torch
def test_weights_that_are_placed_are_logged_by_the_loader(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from shardkit.load import load_checkpoint_in_model

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with caplog.at_level(logging.INFO, "shardkit"):
        load_checkpoint_in_model(model, TRAINING)
    assert any(
        record.name == "shardkit.load" and "weights to place" in record.getMessage()
        for record in caplog.records
    )


def test_no_control_character_of_a_name_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a\x1b[31m.pt"
    try:
        path.write_bytes(TRAINING.read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    assert main(["inspect", str(path), "-vv"]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()


# What is run, pieces that are in colour on a terminal, and the stream.
COLOURED = {
    "an error": (["inspect", "nowhere"], b"\x1b[1;31mshardkit:\x1b[0m nowhere"),
    "a hint": (["inspect", "org/name"], b"\x1b[36mhint:\x1b[0m if it is"),
    "a note": (["verify", str(GOOD / "zip-matrix.pt")], b"\x1b[33mnote:\x1b[0m "),
    "a heading": (["formats"], b"\x1b[1mNAME "),
    "a label": (["inspect", str(TRAINING)], b"\x1b[33mnever run\x1b[0m  argparse.Namespace"),
    "a removal": (["diff", str(TRAINING), str(GOOD / "zip-module.pt")], b"\x1b[31m-\x1b[0m  "),
}


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals as POSIX has them")
@pytest.mark.parametrize("what", COLOURED)
def test_a_terminal_has_colours_unless_it_asks_for_none(what: str, tmp_path: Path) -> None:
    arguments, piece = COLOURED[what]

    def raw(**environment: str) -> bytes:
        return on_a_terminal(
            ["-m", "shardkit", *arguments], columns=200, cwd=tmp_path, environment=environment
        ).raw

    assert piece in raw()
    assert b"\x1b" not in raw(NO_COLOR="1")
    assert b"\x1b" not in raw(TERM="dumb")


@pytest.mark.parametrize("what", COLOURED)
def test_what_is_no_terminal_has_colours_if_it_asks_for_them(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, piece = COLOURED[what]
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    main(arguments)
    plain = capsys.readouterr()
    assert "\x1b" not in plain.out + plain.err
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(arguments)
    coloured = capsys.readouterr()
    assert piece.decode() in coloured.out + coloured.err
    monkeypatch.setenv("NO_COLOR", "1")  # which goes before
    main(arguments)
    assert capsys.readouterr() == plain


def test_json_has_no_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["inspect", str(TRAINING), "--json"]) == 0
    assert "\x1b" not in capsys.readouterr().out
