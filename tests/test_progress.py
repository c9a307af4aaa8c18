"""The bar: on a terminal only, and with whatever is installed."""

from __future__ import annotations

import sys
import time

import pytest

from shardkit.progress import progress


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the body of a test: what capsys puts in the place of stderr is not there before."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch)
    with progress("placing weights", 2_000_000) as bar:
        time.sleep(0.4)  # what is done sooner needs no bar
        bar.add(1_000_000)
    assert "placing weights:  50%" in capsys.readouterr().err


def test_the_whole_may_be_told_later(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch)
    with progress("writing") as bar:
        bar.expect(10)
        bar.add(4)
        time.sleep(0.4)
        bar.add(6)
    assert "100%" in capsys.readouterr().err


def test_a_terminal_needs_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress("writing", 10) as bar:
        bar.expect(10)
        bar.add(10)
    assert capsys.readouterr() == ("", "")


def test_it_may_be_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch)
    with progress("writing", 10, quiet=True) as bar:
        time.sleep(0.4)
        bar.add(5)
    assert capsys.readouterr() == ("", "")


def test_where_stderr_is_no_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("writing", 10) as bar:
        time.sleep(0.4)
        bar.add(5)
    assert capsys.readouterr() == ("", "")
