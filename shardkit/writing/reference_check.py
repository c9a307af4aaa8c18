"""Check a written file with the safetensors library.

It takes about 1 kB for each tensor, as much as everything else here. A long header is checked in a
separate process, which releases that memory at its end.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shardkit.errors import OutputError
from shardkit.payloads.payload import Extent
from shardkit.planning.plan import OutputFile
from shardkit.printable import shown_path

LONG = 1 << 20  # bytes of a header, of about 8,000 tensors


def fetch() -> None:
    """Import what `check` will need, which brings numpy, while files are still being copied.

    Raises:
        ImportError: it is not installed.
    """
    import safetensors.numpy  # noqa: F401 - `safe_open` asks for numpy when it is called


def check(path: Path, file: OutputFile, *, name: Path | None = None) -> None:
    """Open *path* with the safetensors library; where that is not installed, compare its size with
    the plan.

    The table of frames of a compressed file is compared with the plan.

    Args:
        path: what was written.
        file: what was to be written.
        name: what messages call it; None for *path*.

    Raises:
        OutputError: the library cannot read the file.
    """
    name = name or path
    if file.codec is not None:
        listed = tuple(
            frame.expanded for frame in file.codec.frames(Extent(path, 0, path.stat().st_size))
        )
        if listed != file.frames:
            raise _faulty(name, "its table lists other frames than were planned")
        return
    try:
        fault = _fault_told_by_child(path) if file.parts[0].nbytes >= LONG else None
        if fault is None:
            fault = fault_of(path)
    except ImportError:
        if path.stat().st_size != file.nbytes:
            raise _faulty(
                name, f"{file.nbytes:,} bytes were planned, {path.stat().st_size:,} are there"
            ) from None
    else:
        if fault:
            raise _faulty(name, f"the safetensors library cannot read it: {fault}")


def fault_of(path: Path) -> str:
    """Why the reference reader does not take the file at *path*; empty if it does.

    Raises:
        ImportError: it is not installed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # which itself imports numpy
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)


_PROGRAM = """
import sys
_, path, *sys.path = sys.argv
from shardkit.writing.reference_check import fault_of
print(fault_of(path), end="")
"""


def _fault_told_by_child(path: Path) -> str | None:
    """The same from a process of its own; None where there was none, or it failed: it is no matter
    of the file then.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, path, *sys.path],
            capture_output=True,
            check=False,
        )
    except OSError:
        return None
    return None if child.returncode else child.stdout.decode(errors="replace")


def _faulty(path: Path, message: str) -> OutputError:
    return OutputError(
        f"{shown_path(path)} was not written correctly: {message}",
        hint="run the command again; if the error persists, report it as a bug of shardkit",
    )
