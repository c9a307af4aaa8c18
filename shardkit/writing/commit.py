"""Put a finished OUT.partial/ in the place of OUT by one rename, and clear away what it replaced.

1. Two folders exchange their names at once where the system can. Elsewhere the old OUT is first moved into OUT.partial/, so that
   it is never without an owner: a run that is killed between the two renames is mended by putting it back.
2. The journal is the last file of a folder that is removed, so that a removal which was cut short is known for what it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from shardkit.metadata.journal_records import JOURNAL_NAME

_REPLACED = ".shardkit-replaced"


def place_file(folder: Path, name: str, out: Path) -> None:
    """Move the file called *name* from *folder* to *out*, over what is there."""
    os.replace(folder / name, out)


def place_folder(folder: Path, out: Path) -> None:
    """Move *folder* to *out*; what was there lies afterwards where `clear` finds it.

    Raises:
        OSError: the system refuses, and *out* is what it was.
    """
    if not out.exists() or not any(out.iterdir()):
        _rename_over_empty(folder, out)
    elif not _exchange(folder, out):
        _swap(folder, out)


def put_back(folder: Path, out: Path) -> None:
    """Undo the first half of a swap that was killed between its two renames."""
    if (folder / _REPLACED).is_dir() and not out.exists():
        os.rename(folder / _REPLACED, out)


def clear(folder: Path, out: Path) -> None:
    """Remove what *out* replaced, and the journal last: from then on nothing tells that it was ever prepared.

    Raises:
        OSError: something cannot be removed; doing it again goes on.
    """
    remove(folder)
    if out.is_dir():
        remove(out / _REPLACED)
        (out / JOURNAL_NAME).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove *folder* and what it holds, the journal last.

    Raises:
        OSError: something in it cannot be removed.
    """
    if not folder.exists():
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != JOURNAL_NAME:
            os.unlink(entry.path)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another run may have begun in it
        os.rmdir(folder)


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


def _raise(error: OSError) -> None:
    raise error


def _rename_over_empty(folder: Path, out: Path) -> None:
    if os.name == "nt" and out.exists():
        out.rmdir()
    os.rename(folder, out)


def _swap(folder: Path, out: Path) -> None:
    os.rename(out, folder / _REPLACED)
    try:
        os.rename(folder, out)
    except OSError:
        put_back(folder, out)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once, by renameat2(2) with RENAME_EXCHANGE; False where the system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return (
        renameat2 is not None
        and renameat2(at_cwd, os.fsencode(first.absolute()), at_cwd, os.fsencode(second.absolute()), exchange) == 0
    )
