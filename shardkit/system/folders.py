"""Exchange two names on a disk at once, make names durable, and lock files."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once, by renameat2(2); False where the system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, flag = -100, 2
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    return renameat2 is not None and renameat2(at_cwd, names[0], at_cwd, names[1], flag) == 0


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* last; a system that cannot open folders needs none of this."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make the names in *folder*, and in every folder below it, last."""
    for parent, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        sync_folder(Path(parent))


def lock(file: BinaryIO, *, shared: bool = False) -> bool:
    """Lock the open *file* for as long as it is open; False where another process has it.

    A file system without locks counts as one that gave the lock: nothing better is to be had there.

    Args:
        file: open for reading and writing.
        shared: let others that share it have it too; on Windows nobody shares.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)  # it is the byte at the position that is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
    return True


def _raise(error: OSError) -> None:
    raise error
