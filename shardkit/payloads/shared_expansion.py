"""Decompressed files that the processes of one machine share: the first that needs one makes it,
and the others wait.

They are in a folder called `expanded`, below it in one for each machine and start of the system,
and stay until somebody removes that folder. A file has its name once it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO
from uuid import uuid4

from shardkit.payloads.payload import Payload

SHARED = "expanded"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def is_shared(folder: Path | None) -> bool:
    """Whether files in *folder* are shared; on Windows, none are."""
    return folder is not None and folder.name == SHARED and sys.platform != "win32"


def shared_file(
    folder: Path, origin: Payload, codec: str, fill: Callable[[IO[bytes]], None]
) -> IO[bytes]:
    """The decompressed bytes of *origin*, as an open file.

    Args:
        folder: of the shared files.
        origin: the compressed bytes.
        codec: its name.
        fill: writes the decompressed bytes; called where no process of this machine has done so.

    Raises:
        OSError: the file cannot be made.
        Exception: whatever *fill* raises.
    """
    import fcntl

    place = folder / f"{socket.gethostname()}-{_boot()}"
    place.mkdir(parents=True, exist_ok=True)
    path = place / _key(origin, codec)
    with open(path.with_suffix(".lock"), "ab") as lock:
        with contextlib.suppress(
            OSError
        ):  # without locks, each process makes it, and all are alike
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "rb", buffering=0)
        new = place / uuid4().hex
        try:
            with open(new, "x+b", buffering=0) as file:
                fill(file)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        return open(path, "rb", buffering=0)


def _key(origin: Payload, codec: str) -> str:
    """A name for what decompressing *origin* gives, as long as its file does not change."""
    parts: list[object] = [codec]
    for source in origin.sources:
        stat = os.stat(source.path)
        state = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        parts.append((os.path.abspath(source.path), source.start, source.nbytes, *state))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return "unknown"
