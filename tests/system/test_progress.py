"""The bar: on a terminal only, gone when the work is done, and never in the way of it."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from repository import ROOT
from shardkit.system.progress import progress

if os.name == "posix":
    from terminals import Session, on_a_terminal

posix = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals as POSIX has them")
TRAINING = ROOT / "fixtures" / "good" / "zip-training.pt"
BIG = ROOT / "fixtures" / "good" / "zip-matrix.pt"

# A program in which each of the first steps takes the seconds in its first argument; how many do is
# the second.
SLOW = """
import sys, time
from itertools import repeat
from shardkit.system.progress import Progress
pauses = repeat(float(sys.argv.pop(1)), int(sys.argv.pop(1)))
add = Progress.add
def slow(self, nbytes):
    time.sleep(next(pauses, 0.0))
    add(self, nbytes)
Progress.add = slow
"""
COMMAND = f"{SLOW}\nfrom shardkit.cli import main\nsys.exit(main())"
LOAD = f"""{SLOW}
import torch
from shardkit.load import init_empty_weights, load_checkpoint_in_model
with init_empty_weights():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
load_checkpoint_in_model(model, sys.argv[1])
print("loaded")
"""


def run(
    code: str, *arguments: str | Path, pause: float, columns: int, cwd: Path, ctrl_c: bool = False
) -> Session:
    after = b"%" if ctrl_c else None
    steps = "1000" if ctrl_c else "4"  # enough to draw the bar, and to draw it again
    return on_a_terminal(
        ["-c", code, str(pause), steps, *arguments], columns=columns, cwd=cwd, ctrl_c_after=after
    )


WORK: dict[str, tuple[str, list[str | Path], str]] = {
    "convert": (COMMAND, ["convert", TRAINING, "-o", "out", "--max-shard", "2kB"], "→ out/: "),
    "offload-prep": (COMMAND, ["offload-prep", TRAINING, "-o", "out"], "→ out/: "),
    "verify": (COMMAND, ["verify", TRAINING], "is intact"),
    "diff": (
        COMMAND,
        ["diff", TRAINING, TRAINING.with_name("legacy-training.pt")],
        "no difference",
    ),
    "load": (LOAD, [TRAINING], "loaded"),
}


@posix
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("pause", [0.0, 0.4], ids=["short", "long"])
@pytest.mark.parametrize(
    "work", [pytest.param(work, marks=[pytest.mark.torch] * (work == "load")) for work in WORK]
)
def test_a_bar_leaves_nothing_on_the_terminal(
    work: str, pause: float, columns: int, tmp_path: Path
) -> None:
    code, arguments, last = WORK[work]
    session = run(code, *arguments, pause=pause, columns=columns, cwd=tmp_path)
    screen = "\n".join(session.lines)
    assert session.code == 0, screen
    assert last in screen.replace("\n", "")
    assert "%" not in screen
    assert screen == screen.strip(), "a blank line is left"
    if pause:  # a busy machine may take long for the short one too
        assert b"%" in session.raw


@posix
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("work", ["convert", "offload-prep", "verify"])
def test_ctrl_c_leaves_one_sentence_on_the_terminal(
    work: str, columns: int, tmp_path: Path
) -> None:
    code, arguments, _ = WORK[work]
    session = run(code, *arguments, pause=0.4, columns=columns, cwd=tmp_path, ctrl_c=True)
    screen = "\n".join(session.lines)
    assert session.code == 130, screen
    assert screen.startswith("shardkit: stopped")
    assert "%" not in screen
    assert "^C" not in screen


def test_ctrl_c_while_the_bar_is_drawn_for_the_first_time_leaves_a_blank_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        is_struck = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            count = super().write(text)
            if "%" in text and not self.is_struck:
                self.is_struck = True
                raise KeyboardInterrupt
            return count

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("shardkit.system.progress._DELAY", 0.01)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)

    def work() -> None:
        with progress("reading", 10) as bar:
            while True:
                bar.add(1)
                time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        work()
    line = terminal.getvalue()
    assert line.endswith("\r")
    assert not line.split("\r")[-2].strip()


@posix
@pytest.mark.parametrize("columns", [80, 200])
def test_an_error_leaves_a_sentence_on_the_terminal(columns: int, tmp_path: Path) -> None:
    source = tmp_path / "a.pt"
    source.write_bytes(TRAINING.read_bytes())
    touch = f"{SLOW}\nimport os\nfrom shardkit.cli import main\ncode = main()\nsys.exit(code)"
    touch = touch.replace("    add(self", "    os.utime('a.pt', (1, 1))\n    add(self").replace(
        "import sys,", "import os, sys,"
    )
    session = run(touch, "convert", source, "-o", "out", pause=0.4, columns=columns, cwd=tmp_path)
    screen = "\n".join(session.lines)
    assert session.code == 1
    assert screen.startswith("shardkit: ")
    assert "%" not in screen
    assert b"%" in session.raw


def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the body of a test, as capsys replaces stderr before it: a terminal, and a bar that
    appears at once.
    """
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("shardkit.system.progress._DELAY", 1e-9)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)


def test_the_whole_may_be_told_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soon(monkeypatch)
    with progress("writing") as bar:
        bar.expect(10)
        assert capsys.readouterr().err == "", "nothing is drawn before something is done"
        time.sleep(0.11)  # tqdm draws ten times a second
        bar.add(5)
        assert "writing:  50%" in capsys.readouterr().err
    assert capsys.readouterr().err.endswith("  \r")


def test_what_is_done_soon_needs_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soon(monkeypatch)
    monkeypatch.setattr("shardkit.system.progress._DELAY", 1e9)
    with progress("writing") as bar:
        bar.expect(10)
        time.sleep(0.11)
        bar.add(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_that_is_gone_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr("shardkit.system.progress._DELAY", 1e-9)
    with progress("writing", 10) as bar:
        time.sleep(0.11)
        bar.add(5)


def test_many_threads_may_add(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soon(monkeypatch)
    with progress("writing", 4001) as bar:
        threads = [
            threading.Thread(target=lambda: deque(map(bar.add, [1] * 1000), 0)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.11)
        bar.add(1)
    assert "4.00k/4.00k" in capsys.readouterr().err


def test_a_terminal_needs_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soon(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress("writing", 10) as bar:
        bar.expect(10)
        bar.add(10)
    assert capsys.readouterr() == ("", "")


def test_it_may_be_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soon(monkeypatch)
    with progress("writing", 10, quiet=True) as bar:
        time.sleep(0.11)
        bar.add(5)
    assert capsys.readouterr() == ("", "")


def test_where_stderr_is_no_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("writing", 10) as bar:
        time.sleep(0.4)
        bar.add(5)
    assert capsys.readouterr() == ("", "")
