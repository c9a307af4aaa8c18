"""What the reference reader of safetensors says of a file that was written."""

from __future__ import annotations

from pathlib import Path

from shardkit.errors import OutputError, shown_path
from shardkit.payloads.payload import Extent
from shardkit.planning.plan import OutputFile


def fetch() -> None:
    """Import what `check` will need, which brings numpy, while files are still being copied.

    Raises:
        ImportError: it is not installed.
    """
    import safetensors.numpy  # noqa: F401 - `safe_open` asks for numpy when it is called


def check(path: Path, file: OutputFile) -> None:
    """Open *path* with the reference reader of safetensors; where it is not installed, hold its size against the plan.

    One that is compressed is held against the plan by its table of frames.

    Raises:
        OutputError: it does not take the file.
    """
    if file.codec is not None:
        listed = tuple(frame.expanded for frame in file.codec.frames(Extent(path, 0, path.stat().st_size)))
        if listed != file.frames:
            raise _faulty(path, "its table lists other frames than were planned")
        return
    try:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as opened:  # which itself imports numpy
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise _faulty(path, f"the reference reader does not take it: {error}") from None
    except ImportError:
        if path.stat().st_size != file.nbytes:
            raise _faulty(path, f"{file.nbytes:,} bytes were planned, {path.stat().st_size:,} are there") from None


def _faulty(path: Path, message: str) -> OutputError:
    return OutputError(
        f"{shown_path(path)} was not written right: {message}",
        hint="run the command again; if it stays so, it is a bug in shardkit",
    )
