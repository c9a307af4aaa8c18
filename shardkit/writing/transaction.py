"""A `Transaction`: the output is written in OUT.partial/ and put in place by one rename.

A run that is killed leaves one of these states on disk, and the next run of the same command takes
it up. "old" is what OUT was before, which may be nothing. What `.shardkit/` holds stands in
`metadata.unit_records`::

       OUT                    OUT.partial/                         next run
    1  old                    -                                    `begin` makes OUT.partial/
    2  old                    .shardkit/, some files               `begin` keeps those on record
    3  old                    .shardkit/ with commit, all files    the same; then `commit` again
    4  -                      as 3, and old in .shardkit/replaced  `recover` puts old back: state 3
    5  new, with .shardkit/   old, or a part of it, or nothing     `recover` removes it: state 6
    6  new                    -

Two folders exchange their names at once where the system can: from 3 to 5 in one step. Elsewhere
OUT is first moved into OUT.partial/ (state 4), so that it is never without an owner; in state 5 it
is in OUT/.shardkit/replaced. Where the output is one file, .shardkit/ stays in OUT.partial/ in
state 5, and the file is no longer beside it.

1. A file is synced before it is on record, the folder before the rename, and the rename before
   anything old is removed.
2. The lock is the last file that is removed: as long as it is there, a removal that was cut short
   is known for what it is.
3. A run has the lock for itself (`begin`). The parts of a job array share it (`join`): they add
   files of one plan, and remove nothing.
4. Only records of the same plan, of unchanged sources, by the same version, are kept. `begin`
   removes all others; but what was written in parts it refuses to remove, and `join` refuses
   whatever is of another plan.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shardkit.errors import OutputError
from shardkit.hints import after_writing, output
from shardkit.metadata.unit_records import (
    COMMIT,
    LOCK,
    PLAN,
    REPLACED,
    STATE,
    Finished,
    PlanRecord,
)
from shardkit.planning.output_path import partial_folder
from shardkit.printable import shown, shown_path
from shardkit.system import folders
from shardkit.writing.partial_folder import keep_only, refuse_links, remove, remove_state
from shardkit.writing.unit_files import read_plan, read_records, this_run, write_plan

_OLD_JOURNAL = ".shardkit-journal"  # of version 0.1, which is begun anew
_REMOVALS = 100  # of OUT.partial/ by runs that end, while one tries to begin
_ATTEMPTS, _MOMENT = 4, 0.02  # seconds: `status` takes the lock for less, to see whether it is free


class Transaction:
    """One output on its way to its place.

    Attributes:
        out: the folder, or the one file, that appears.
        folder: OUT.partial/.
        plan: for which plan it is written.
        done: the files in it that are complete, by name.
    """

    out: Path
    folder: Path
    plan: PlanRecord
    done: dict[str, Finished]
    _lock: BinaryIO

    def __init__(self, out: Path, plan: PlanRecord, *, single: str | None = None) -> None:
        """Touch nothing yet.

        Args:
            out: what appears.
            plan: what it is written for.
            single: name of the file that becomes *out*; None where the folder does.
        """
        self.out = out
        self.folder = partial_folder(out)
        self.plan = plan
        self.done = {}
        self._single = single
        self._sync = not plan.boot

    @contextlib.contextmanager
    def begin(self, *, anew: bool = True) -> Iterator[Transaction]:
        """Go from state 1, 2 or 3 to state 2: keep what earlier runs of the same plan finished.

        Args:
            anew: remove what was written for another plan, unless it was written in parts, and
                what runs that were killed have left; or else refuse the one and keep the other.

        Raises:
            OutputError: another run holds it, it is not shardkit's, it is of another plan and is
                kept, or it cannot be made.
        """
        with self._locked(shared=False):
            self._resume(anew)
            yield self

    @contextlib.contextmanager
    def join(self) -> Iterator[Transaction]:
        """Go from state 1 or 2 to state 2, beside other runs of the same plan.

        Raises:
            OutputError: a run has it for itself, it is not shardkit's, it is of another plan, or it
                cannot be made.
        """
        with self._locked(shared=True):
            if read_plan(self.folder) is None:
                write_plan(self.folder, self.plan, sync=self._sync, replace=False)
            found = read_plan(self.folder)
            if found is None or found.key != self.plan.key:
                raise self._of_another(found)
            if not found.in_parts:  # one run has begun it, and parts end it
                write_plan(self.folder, self.plan, sync=self._sync)
            self.done = self._complete()
            yield self

    def commit(self) -> None:
        """Go from state 2, when all files are complete, to state 6.

        Raises:
            OutputError: the system refuses.
        """
        try:
            # State 3.
            self._mark(self.out.name)
            if self._sync:
                folders.sync_tree(self.folder)
            if os.name == "nt":
                self._lock.close()  # there no folder moves while a file in it is open
            # State 5, maybe by way of 4.
            if self._single is not None:
                os.replace(self.folder / self._single, self.out)
            elif not self.out.exists() or not any(self.out.iterdir()):
                if os.name == "nt" and self.out.exists():
                    self.out.rmdir()
                os.rename(self.folder, self.out)
            elif not folders.exchange(self.folder, self.out):
                os.rename(self.out, self.folder / REPLACED)
                try:
                    os.rename(self.folder, self.out)
                except OSError:
                    self._put_back()
                    raise
            if self._sync:
                folders.sync_folder(self.out.parent)
            # State 6.
            self._clear()
        except OSError as error:
            raise OutputError(
                f"{shown_path(self.out)}: cannot be put in place: {error.strerror or error}",
                hint=(
                    after_writing(error)
                    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
                    else "every file of it is complete: run the same command again"
                ),
            ) from None

    def recover(self, *, shared: bool = False) -> bool:
        """Undo state 4 and end state 5; returns whether OUT is now the output of this very plan.

        Args:
            shared: end nothing but a commit; what else is there may be of a part that begins.

        Raises:
            OutputError: another run is at it, or the system refuses.
        """
        try:
            left = self._left(shared)
            if left is None:
                self._remove_empty(shared)
                return False
            folder = self.out if left == "moved" else self.folder
            with open(folder / LOCK, "rb+", buffering=0) as lock:
                _lock(lock, folder / LOCK)
                if self._left(shared) != left:  # another run was faster
                    return False
                if left == "commit":
                    self._put_back()
                # Did the commit reach OUT, and is OUT still as it left it?
                is_placed = left == "moved" or (
                    self._single is not None
                    and _first_line(folder / COMMIT) == self.out.name
                    and self.out.exists()
                    and not (self.folder / self._single).exists()
                )
                plan = read_plan(folder)
                is_ours = plan is not None and plan.key == self.plan.key
                is_complete = plan is not None and self._is_whole(plan, folder)
                if is_placed or left == "cut short":
                    self._clear()
                return is_placed and is_ours and is_complete
        except (FileNotFoundError, _Vanished):  # another run was faster
            return False
        except OSError as error:
            message = f"{shown_path(self.out)}: cannot be finished: {error.strerror or error}"
            raise OutputError(message, hint=after_writing(error)) from None

    def withdraw(self) -> None:
        """Remove what was decompressed for an output that is refused, where no run has begun."""
        with contextlib.suppress(OSError):  # why it is refused is what has to be said
            if not (self.folder / LOCK).exists() and os.listdir(self.folder) == [STATE]:
                remove(self.folder)

    def discard(self) -> None:
        """Go from state 2 to state 1: remove everything that was written."""
        if os.name == "nt":
            self._lock.close()  # there no open file is removed; elsewhere it keeps the lock
        with contextlib.suppress(OSError):  # why it is discarded is what has to be said
            remove(self.folder)

    def _left(self, shared: bool) -> str | None:
        """What an earlier run has left to be ended: a commit that has moved OUT.partial/ to OUT
        ("moved"), one before or without that ("commit"), or a removal ("cut short").
        """
        refuse_links(self.folder)
        # Only a commit of OUT brings its .shardkit/ there; OUT may be called like the unfinished
        # output of another one.
        told = any((self.out / name).exists() for name in (PLAN, COMMIT))
        if (self.out / LOCK).is_file() and (
            _first_line(self.out / COMMIT) == self.out.name or not told
        ):
            return "moved"
        if not (self.folder / LOCK).is_file():
            return None
        if (self.folder / COMMIT).exists():
            return "commit"
        if not shared and self.out.exists() and not (self.folder / PLAN).exists():
            return "cut short"
        return None

    @contextlib.contextmanager
    def _locked(self, *, shared: bool) -> Iterator[None]:
        """Make OUT.partial/, and hold its lock."""
        try:
            with self._opened_lock(shared) as self._lock:
                yield
        except OSError as error:
            message = f"{shown_path(self.folder)}: cannot be written: {error.strerror or error}"
            raise OutputError(message, hint=after_writing(error)) from None

    def _opened_lock(self, shared: bool) -> BinaryIO:
        """The lock of OUT.partial/, which is made, and made again where a run that ends removes
        it meanwhile.
        """
        path = self.folder / LOCK
        for _ in range(_REMOVALS):
            refuse_links(self.folder)
            new = [parent for parent in self.folder.parents if not parent.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            for parent in new if self._sync else ():
                folders.sync_folder(parent.parent)
            with contextlib.ExitStack() as undo:
                try:
                    found = set(os.listdir(self.folder))
                    if found and not found & {STATE, _OLD_JOURNAL}:
                        raise OutputError(
                            f"{shown_path(self.folder)}, where the output is prepared, contains "
                            "files that shardkit did not write",
                            hint=("move the folder away, or choose another output with ", output()),
                        )
                    path.parent.mkdir(exist_ok=True)
                    lock = undo.enter_context(open(path, "ab+", buffering=0))
                    _lock(lock, path, shared=shared)
                except (FileNotFoundError, _Vanished):
                    continue
                undo.pop_all()
                return lock
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _resume(self, anew: bool) -> None:
        """Keep what is complete, if it is of this plan, and remove all else."""
        found = read_plan(self.folder)
        is_ours = found is not None and found.key == self.plan.key
        if not is_ours and (not anew or (found is not None and found.in_parts)):
            raise self._of_another(found)
        self.done = self._complete() if is_ours else {}
        if anew:
            self.prune()
        if not is_ours:
            write_plan(self.folder, self.plan, sync=self._sync)

    def prune(self) -> None:
        """Remove what runs that were killed have left, and all that is not of this plan."""
        plan = read_plan(self.folder)
        is_ours = plan is not None and plan.key == self.plan.key
        keep_only(self.folder, self.done, [PLAN] if is_ours else [])

    def _complete(self) -> dict[str, Finished]:
        return {
            each.name: each.finished
            for each in read_records(self.folder)
            if each.key == self.plan.key and each.finished.is_whole(self.folder / each.name)
        }

    def _of_another(self, found: PlanRecord | None) -> OutputError:
        same, folder = "give all parts the same source and options", shown_path(self.folder)
        told = list(self.plan.differences(found)) if found else ["its record is damaged"]
        return OutputError(
            f"{folder} was begun for another plan: "
            + ("; ".join(told) or "the source or the options are not the same"),
            hint=(
                f"{same}; or remove {folder} to begin anew; or choose another output with ",
                output(),
            ),
        )

    def _mark(self, name: str) -> None:
        with open(self.folder / COMMIT, "wb", buffering=0) as file:
            os.write(file.fileno(), os.fsencode(f"{name}\n"))
            if self._sync:
                os.fsync(file.fileno())

    def _put_back(self) -> None:
        """Go from state 4 to state 3."""
        if (self.folder / REPLACED).is_dir() and not self.out.exists():
            os.rename(self.folder / REPLACED, self.out)

    def _clear(self) -> None:
        """Go from state 5 to state 6: remove what OUT replaced, and the lock last."""
        remove(self.folder)
        if self.out.is_dir():
            remove_state(self.out)

    def _is_whole(self, plan: PlanRecord, folder: Path) -> bool:
        """Whether the files of *plan* are at OUT, as far as the records in *folder* tell."""
        root = self.out if self._single is None else self.out.parent
        records = list(read_records(folder))
        return all((root / name).is_file() for name, _ in plan.files) and all(
            each.finished.is_whole(root / each.name) for each in records
        )

    def _remove_empty(self, shared: bool) -> None:
        """Remove the empty folders that are the last that a commit may leave; but not, for a part,
        those that another part may just have made.
        """
        of_parts = () if shared else (self.folder / STATE, self.folder)
        for folder in (self.out / STATE, *of_parts):
            if self.out.exists():
                with contextlib.suppress(OSError):  # not empty, or not there
                    os.rmdir(folder)


def boot_id() -> str:
    """A name for this run of the system: files that were not synced last only as long as it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {os.getpid()}"


class _Vanished(Exception):
    """A run that has ended took the lock along, or removed it."""


def _first_line(path: Path) -> str:
    """The first line of the file at *path*; "" if there is none."""
    try:
        return os.fsdecode(path.read_bytes().partition(b"\n")[0])
    except (FileNotFoundError, NotADirectoryError):  # OUT may be a file
        return ""


def _lock(lock: BinaryIO, path: Path, *, shared: bool = False) -> None:
    """Lock the file *lock*, which was opened at *path*.

    Raises:
        OutputError: a run has it, which is named.
        _Vanished: it is no longer there.
    """
    for _ in range(_ATTEMPTS):
        if folders.lock(lock, shared=shared):
            # A run that ended between our opening the file and locking it has moved or removed it.
            try:
                if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    raise _Vanished
            except FileNotFoundError:
                raise _Vanished from None
            if not shared:
                os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{this_run()}\n".encode())
            return
        time.sleep(_MOMENT)
    holder = ""
    with contextlib.suppress(OSError):  # where a lock forbids reading
        lock.seek(0)
        holder = lock.read().decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    raise OutputError(
        f"{shown_path(path.parent.parent)} is in use by another run of shardkit"
        + (f": {shown(holder)}" if holder else ""),
        hint=("wait for it to end, or choose another output with ", output()),
    )
