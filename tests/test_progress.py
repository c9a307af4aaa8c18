"""The bar: on a terminal only, gone when the work is done, and never in the way of it."""

from __future__ import annotations

import doctest
import io
import os
import sys
import threading
from itertools import count
from pathlib import Path

import pytest

import shardkit.progress
from shardkit.progress import Bar, line, progress

if os.name == "posix":
    from terminals import Session, on_a_terminal

posix = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals as POSIX has them")
ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "fixtures" / "good" / "zip-training.pt"
BIG = ROOT / "fixtures" / "good" / "zip-matrix.pt"

# A program in which each step takes the seconds in its first argument.
SLOW = """
import sys, time
from shardkit.progress import Progress
pause, add = float(sys.argv.pop(1)), Progress.add
def slow(self, nbytes):
    time.sleep(pause)
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


def run(code: str, *arguments: str | Path, pause: float, columns: int, cwd: Path, ctrl_c: bool = False) -> Session:
    after = b"%" if ctrl_c else None
    return on_a_terminal(["-c", code, str(pause), *arguments], columns=columns, cwd=cwd, ctrl_c_after=after)


WORK: dict[str, tuple[str, list[str | Path], str]] = {
    "convert": (COMMAND, ["convert", TRAINING, "-o", "out", "--max-shard", "2kB"], "→ out/: "),
    "offload-prep": (COMMAND, ["offload-prep", TRAINING, "-o", "out"], "→ out/: "),
    "verify": (COMMAND, ["verify", TRAINING], "is whole"),
    "diff": (COMMAND, ["diff", TRAINING, TRAINING.with_name("legacy-training.pt")], "no difference"),
    "load": (LOAD, [TRAINING], "loaded"),
}


@posix
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("pause", [0.0, 0.4], ids=["short", "long"])
@pytest.mark.parametrize("work", WORK)
def test_a_bar_leaves_nothing_on_the_terminal(work: str, pause: float, columns: int, tmp_path: Path) -> None:
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
def test_ctrl_c_leaves_one_sentence_on_the_terminal(work: str, columns: int, tmp_path: Path) -> None:
    code, arguments, _ = WORK[work]
    session = run(code, *arguments, pause=0.4, columns=columns, cwd=tmp_path, ctrl_c=True)
    screen = "\n".join(session.lines)
    assert session.code == 130, screen
    assert screen.startswith("shardkit: stopped")
    assert "%" not in screen
    assert "^C" not in screen


@posix
@pytest.mark.parametrize("columns", [80, 200])
def test_an_error_leaves_a_sentence_on_the_terminal(columns: int, tmp_path: Path) -> None:
    source = tmp_path / "a.pt"
    source.write_bytes(TRAINING.read_bytes())
    touch = f"{SLOW}\nimport os\nfrom shardkit.cli import main\ncode = main()\nsys.exit(code)"
    touch = touch.replace("    add(self", "    os.utime('a.pt', (1, 1))\n    add(self").replace("import sys,", "import os, sys,")
    session = run(touch, "convert", source, "-o", "out", pause=0.4, columns=columns, cwd=tmp_path)
    screen = "\n".join(session.lines)
    assert session.code == 1
    assert screen.startswith("shardkit: ")
    assert "%" not in screen
    assert b"%" in session.raw


def ticking(monkeypatch: pytest.MonkeyPatch, step: float = 1.0) -> None:
    """Let each look at the clock of the bar find it *step* seconds later."""
    clock = count()
    monkeypatch.setattr("shardkit.progress.time.monotonic", lambda: next(clock) * step)


def test_a_bar_appears_after_a_delay_and_is_blank_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, 0.2)
    stream = io.StringIO()
    bar = Bar(stream, "writing", 1000)
    bar.add(100)  # after 0.2 s
    assert stream.getvalue() == ""
    bar.add(400)
    assert "writing:  50%" in stream.getvalue()
    bar.end()
    drawn = len(stream.getvalue())
    bar.add(500)
    assert len(stream.getvalue()) == drawn, "nothing is drawn after the end"
    assert stream.getvalue().endswith("  \r")


def test_the_whole_may_be_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    stream = io.StringIO()
    bar = Bar(stream, "writing", None)
    bar.expect(10)
    assert stream.getvalue() == ""
    bar.add(10)
    assert "writing: 100%" in stream.getvalue()


class Gone(io.StringIO):
    """A terminal whose window was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    bar = Bar(Gone(), "writing", 10)
    bar.add(5)
    bar.end()


def test_many_threads_may_add(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, 0.01)
    stream = io.StringIO()
    bar = Bar(stream, "writing", 4000)

    def add() -> None:
        for _ in range(1000):
            bar.add(1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.add(0)
    assert "writing: 100%" in stream.getvalue()


@pytest.mark.parametrize("room", [1, 10, 20, 40, 75, 195])
@pytest.mark.parametrize(
    ("done", "total", "seconds"), [(0, None, 0.0), (0, 5, 0.0), (1, 10**14, 9.0), (7, 5, 1.0), (10**12, 10**13, 9.0)]
)
def test_a_line_never_is_wider_than_its_room(done: int, total: int | None, seconds: float, room: int) -> None:
    text = line("placing weights", done, total, seconds, room)
    assert len(text) <= room
    assert text.isascii(), "a terminal of any character set can show it"


@pytest.mark.parametrize(
    ("seconds", "left"), [(1.0, "9 s left"), (10.0, "1:30 min left"), (1000.0, "2:30 h left")], ids=["s", "min", "h"]
)
def test_a_line_says_how_long_it_will_take(seconds: float, left: str) -> None:
    assert line("writing", 10, 100, seconds, 80).endswith(left)


def test_the_example_of_a_line_is_true() -> None:
    assert doctest.testmod(shardkit.progress).attempted == 1
    assert doctest.testmod(shardkit.progress).failed == 0


def test_it_may_be_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ticking(monkeypatch)
    with progress("writing", 10, quiet=True) as bar:
        bar.add(5)
    assert capsys.readouterr() == ("", "")


def test_where_stderr_is_no_terminal_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticking(monkeypatch)
    with progress("writing", 10) as bar:
        bar.add(5)
    assert capsys.readouterr() == ("", "")
