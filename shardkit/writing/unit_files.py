"""Read and write what `.shardkit/` of an unfinished output holds: the plan, and a record for each
complete file. Each is written under a unique name, synced, and renamed: it is whole or not there.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from shardkit.metadata.unit_records import DONE, NEW, PLAN, Finished, PlanRecord, UnitRecord
from shardkit.writing.copier import write_at


def read_plan(folder: Path) -> PlanRecord | None:
    """The plan of the output that is prepared in *folder*; None if there is none, or it is damaged.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return PlanRecord.parse((folder / PLAN).read_bytes())
    except FileNotFoundError:
        return None


def write_plan(folder: Path, plan: PlanRecord, *, sync: bool, replace: bool = True) -> None:
    """Write *plan*; where it does not *replace* another, one that is there stays.

    Raises:
        OSError: the system refuses.
    """
    new = _write_new(folder, plan.dump(), sync=sync)
    if replace:
        os.replace(new, folder / PLAN)
        return
    try:
        os.link(new, folder / PLAN)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not (folder / PLAN).exists():
            os.replace(new, folder / PLAN)
            return
    os.unlink(new)


def read_records(folder: Path) -> Iterator[UnitRecord]:
    """The records of files that are complete, as they are named; those that are damaged are not
    among them.

    Raises:
        OSError: one cannot be read.
    """
    done = folder / DONE
    for parent, _, names in os.walk(done):
        for name in names:
            path = Path(parent, name)
            record = None
            with contextlib.suppress(FileNotFoundError):  # removed by another run
                record = UnitRecord.parse(path.read_bytes())
            if record is not None and record.name == path.relative_to(done).as_posix():
                yield record


def write_record(folder: Path, key: str, name: str, finished: Finished, *, sync: bool) -> None:
    """Record that the file called *name*, of the plan *key*, is complete; it is synced already.

    Raises:
        OSError: the system refuses.
    """
    content = UnitRecord(name, key, finished, this_run()).dump()
    new = _write_new(folder, content, sync=sync)
    path = folder / DONE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, path)


def new_path(folder: Path) -> Path:
    """A unique name for a file that is being written in *folder*, which has begun."""
    (folder / NEW).mkdir(exist_ok=True)
    return folder / NEW / uuid4().hex


def this_run() -> str:
    """The process and the machine, for messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _write_new(folder: Path, content: bytes, *, sync: bool) -> Path:
    path = new_path(folder)
    try:
        with open(path, "xb", buffering=0) as file:
            write_at(file.fileno(), content, 0)
            if sync:
                os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # why it failed is what has to be said
            os.unlink(path)
        raise
    return path
