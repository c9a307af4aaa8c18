"""A terminal: a real pseudo-terminal that a program runs on, and the screen that a person would
see.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte

from repository import ROOT

_ROWS = 50

# Makes the pseudo-terminal the one that Ctrl-C comes from, and then is the program. Tests that are
# run in the background of a shell inherit an ignored SIGINT; a program on a terminal starts with
# the default.
_LEAD = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@dataclass(frozen=True, slots=True)
class Session:
    """What became of a program on a terminal.

    Attributes:
        code: its exit code.
        lines: what stands on the screen at the end, without the empty lines below.
        raw: all that was written, control sequences and all.
    """

    code: int
    lines: tuple[str, ...]
    raw: bytes


def on_a_terminal(
    arguments: Sequence[str | Path],
    *,
    columns: int,
    cwd: Path,
    ctrl_c_after: bytes | None = None,
    environment: dict[str, str] | None = None,
) -> Session:
    """Run Python with *arguments* on a terminal that is *columns* wide; press Ctrl-C once
    *ctrl_c_after* was written.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    plain = {
        name: text
        for name, text in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    }
    program = subprocess.Popen(
        [sys.executable, "-c", _LEAD, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=cwd,
        env=plain | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"} | (environment or {}),
    )
    os.close(theirs)
    raw = b""
    while piece := _read(ours):
        raw += piece
        if ctrl_c_after is not None and ctrl_c_after in raw:
            os.write(ours, b"\x03")
            ctrl_c_after = None
    os.close(ours)
    return Session(program.wait(), _seen(raw, columns), raw)


def _read(terminal: int) -> bytes:
    """What is written next; nothing once the program has ended."""
    select.select([terminal], [], [])
    try:
        return os.read(terminal, 65_536)
    except OSError:  # so Linux says that nobody has the other end any more
        return b""


def _seen(raw: bytes, columns: int) -> tuple[str, ...]:
    screen = pyte.Screen(columns, _ROWS)
    pyte.ByteStream(screen).feed(raw)
    lines = [text.rstrip() for text in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)
