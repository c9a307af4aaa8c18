"""Remove what OUT.partial/ holds: all of it, or what no record names; and never through a link."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from shardkit.errors import OutputError
from shardkit.metadata.unit_records import (
    COMMIT,
    DONE,
    EXPANDED,
    LOCK,
    NEW,
    PLAN,
    REPLACED,
    STATE,
)
from shardkit.printable import shown_path


def refuse_links(folder: Path) -> None:
    """Refuse a link where a folder of ours is expected: what it leads to is not ours to change."""
    for path in (folder, *(folder / name for name in (STATE, DONE, NEW, EXPANDED, REPLACED))):
        if path.is_symlink():
            raise OutputError(
                f"{shown_path(path)} is a link, and not a folder that shardkit made",
                hint="remove the link",
            )


def keep_only(folder: Path, names: Collection[str], others: Iterable[str]) -> None:
    """Remove all from *folder* but the files called *names*, their records, and *others*."""
    kept = {folder / name for name in (*names, *others, LOCK)}
    kept |= {folder / DONE / name for name in names}
    for top in (folder / DONE, folder):  # the record of a file goes before the file
        for parent, inside, files in os.walk(top, topdown=False):
            if Path(parent).is_relative_to(folder / EXPANDED):  # for all that plan this output
                continue
            for name in files:
                if Path(parent, name) not in kept:
                    Path(parent, name).unlink()
            for name in inside:
                with contextlib.suppress(OSError):  # not empty: it holds what is kept
                    Path(parent, name).rmdir()


def remove(folder: Path) -> None:
    """Remove *folder* and what it holds, the lock last.

    Raises:
        OSError: something in it cannot be removed.
    """
    if not folder.exists():
        return
    for entry in list(os.scandir(folder)):
        if entry.name == STATE:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    remove_state(folder)
    with contextlib.suppress(OSError):  # another run may have begun in it
        os.rmdir(folder)


def remove_state(folder: Path) -> None:
    """Remove .shardkit/ of *folder*: the plan and the commit, which tell what happened, and the
    lock last.
    """
    state = folder / STATE
    if not state.is_dir():
        return
    last = [folder / PLAN, folder / COMMIT, folder / LOCK]
    for entry in list(os.scandir(state)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif Path(entry.path) not in last:
            os.unlink(entry.path)
    for path in last:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another run may have begun in it
        os.rmdir(state)
