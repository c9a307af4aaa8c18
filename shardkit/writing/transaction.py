"""A `Transaction`: the output is written in OUT.partial/ and put in place by one rename.

A run that is killed leaves one of these states on disk, and the next run of the same command takes
it up. "old" is what OUT was before, which may be nothing::

       OUT                    OUT.partial/                        next run
    1  old                    -                                   `begin` makes OUT.partial/
    2  old                    journal, some files                 `begin` keeps the files on record
    3  old                    journal with "commit", all files    the same; then `commit` again
    4  -                      as 3, and old in .shardkit-replaced `recover` puts old back: state 3
    5  new, with the journal  old, or a part of it, or nothing    `recover` removes it: state 6
    6  new                    -

Two folders exchange their names at once where the system can: from 3 to 5 in one step. Elsewhere
OUT is first moved into OUT.partial/ (state 4), so that it is never without an owner; in state 5 it
is in OUT/.shardkit-replaced. Where the output is one file, the journal stays in OUT.partial/ in
state 5, and the file is no longer beside it.

1. The journal has JSON lines. The first says for which plan and from which files. Each other line
   names who writes, a file that is complete, one that has to be written again, or the output that
   is being committed. A line that was cut off counts for nothing.
2. A file is synced before it is on record, the folder before the rename, and the rename before
   anything old is removed.
3. The journal is the last file that is removed: as long as it is there, a removal that was cut
   short is known for what it is.
4. One run at a time: the journal is locked for as long as it is open.
5. Only a journal for the same plan and unchanged sources is resumed. Any other is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardkit.checkpoint.entries import SourceFile
from shardkit.errors import OutputError, shown, shown_path
from shardkit.hints import after_writing, output
from shardkit.metadata.journal_records import JOURNAL_NAME, Finished, Written
from shardkit.metadata.manifest import Digests
from shardkit.planning.output_path import partial_folder
from shardkit.system import folders

_VERSION = 2
_REPLACED = ".shardkit-replaced"


@dataclass(frozen=True, slots=True)
class Identity:
    """For what a partial output was begun; equal identities may share their files.

    Attributes:
        digest: of the plan.
        sources: the files that it reads.
        boot: names the run of the system whose page cache holds the files; "" where they are
            synced.
    """

    digest: str
    sources: tuple[SourceFile, ...]
    boot: str

    def line(self) -> str:
        """The first line of the journal."""
        sources = [[str(s.path), s.size, s.mtime_ns, s.inode] for s in self.sources]
        return json.dumps(
            {"version": _VERSION, "digest": self.digest, "sources": sources, "boot": self.boot}
        )


class Transaction:
    """One output on its way to its place.

    Attributes:
        out: the folder, or the one file, that appears.
        folder: OUT.partial/.
        done: the files in it that are complete, by name.
    """

    out: Path
    folder: Path
    done: dict[str, Finished]
    _journal: BinaryIO

    def __init__(self, out: Path, identity: Identity, *, single: str | None = None) -> None:
        """Touch nothing yet.

        Args:
            out: what appears.
            identity: for which plan, from which files.
            single: name of the file that becomes *out*; None where the folder does.
        """
        self.out = out
        self.folder = partial_folder(out)
        self.done = {}
        self._identity = identity
        self._single = single
        self._sync = not identity.boot

    @contextlib.contextmanager
    def begin(self) -> Iterator[Transaction]:
        """Go from state 1, 2 or 3 to state 2: keep what an earlier run of the same plan finished.

        Raises:
            OutputError: another run holds it, it is not shardkit's, or it cannot be made.
        """
        path = self.folder / JOURNAL_NAME
        try:
            new = [parent for parent in self.folder.parents if not parent.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            for parent in new if self._sync else ():
                folders.sync_folder(parent.parent)
            if os.listdir(self.folder) and not path.exists():
                raise OutputError(
                    f"{shown_path(self.folder)}, where the output is prepared, contains files "
                    f"that shardkit did not write",
                    hint=("move the folder away, or choose another output with ", output()),
                )
            with open(path, "ab+", buffering=0) as self._journal:
                _lock(self._journal, path)
                self._resume(Written.read(self._journal))
                yield self
        except OSError as error:
            message = f"{shown_path(self.folder)}: cannot be written: {error.strerror or error}"
            raise OutputError(message, hint=after_writing(error)) from None

    def _resume(self, written: Written) -> None:
        """Keep what *written* has as complete, if it is of this plan, and remove all else."""
        line = self._identity.line()
        is_ours = written.identity == line and not written.broken
        listed = written.done if is_ours else {}
        self.done = {
            name: each for name, each in listed.items() if each.is_whole(self.folder / name)
        }
        _keep_only(self.folder, self.done)
        # What is complete stays recorded throughout: a run that is killed here costs nothing.
        os.ftruncate(self._journal.fileno(), written.nbytes if is_ours else 0)
        lost = [json.dumps({"redo": name}) for name in sorted(listed.keys() - self.done.keys())]
        self._append(*([] if is_ours else [line]), *lost, json.dumps({"by": _this_run()}))

    def finished(self, name: str, digests: Digests | None = None) -> None:
        """Record that the file called *name* is complete; it is synced already.

        Raises:
            OSError: the journal cannot be written.
        """
        nbytes = (self.folder / name).stat().st_size
        line: dict[str, object] = {"done": name, "nbytes": nbytes}
        if digests is not None:
            line["digests"] = [digests.whole, digests.tensors, *digests.blocks]
        self._append(json.dumps(line))
        self.done[name] = Finished(nbytes, digests)

    def commit(self) -> None:
        """Go from state 2, when all files are complete, to state 6.

        Raises:
            OutputError: the system refuses.
        """
        try:
            # State 3.
            self._append(json.dumps({"commit": self.out.name}))
            if self._sync:
                folders.sync_tree(self.folder)
            if os.name == "nt":
                self._journal.close()  # there no folder moves while a file in it is open
            # State 5, maybe by way of 4.
            if self._single is not None:
                os.replace(self.folder / self._single, self.out)
            elif not self.out.exists() or not any(self.out.iterdir()):
                if os.name == "nt" and self.out.exists():
                    self.out.rmdir()
                os.rename(self.folder, self.out)
            elif not folders.exchange(self.folder, self.out):
                os.rename(self.out, self.folder / _REPLACED)
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
                hint="every file of it is complete: run the same command again",
            ) from None

    def recover(self) -> bool:
        """Undo state 4 and end state 5; returns whether OUT is now the output of this very plan.

        Raises:
            OutputError: another run is at it, or the system refuses.
        """
        moved = self.out / JOURNAL_NAME
        path = moved if moved.is_file() else self.folder / JOURNAL_NAME
        try:
            if not path.is_file():
                if self.out.exists():  # the last that a commit may leave is an empty folder
                    with contextlib.suppress(OSError):  # not empty, or not there
                        os.rmdir(self.folder)
                return False
            with open(path, "ab+", buffering=0) as journal:
                _lock(journal, path)
                written = Written.read(journal)
                if path != moved:
                    self._put_back()
                if written.commit != self.out.name:
                    return False
                # Did the commit reach OUT, and is OUT still as it left it?
                if self._single is None:
                    is_placed = moved.is_file()
                    is_complete = is_placed and all(
                        each.is_whole(self.out / name) for name, each in written.done.items()
                    )
                else:
                    file = written.done.get(self._single)
                    is_moved = not (self.folder / self._single).exists()
                    is_complete = file is not None and is_moved and file.is_whole(self.out)
                    is_placed = is_complete
                if is_placed:
                    self._clear()
                return is_complete and written.identity == self._identity.line()
        except OSError as error:
            message = f"{shown_path(self.out)}: cannot be finished: {error.strerror or error}"
            raise OutputError(message, hint=after_writing(error)) from None

    def discard(self) -> None:
        """Go from state 2 to state 1: remove everything that was written."""
        if os.name == "nt":
            self._journal.close()  # there no open file is removed; elsewhere it keeps the lock
        with contextlib.suppress(OSError):  # why it is discarded is what has to be said
            remove(self.folder)

    def _put_back(self) -> None:
        """Go from state 4 to state 3."""
        if (self.folder / _REPLACED).is_dir() and not self.out.exists():
            os.rename(self.folder / _REPLACED, self.out)

    def _clear(self) -> None:
        """Go from state 5 to state 6: remove what OUT replaced, and the journal last."""
        remove(self.folder)
        if self.out.is_dir():
            remove(self.out / _REPLACED)
            (self.out / JOURNAL_NAME).unlink(missing_ok=True)

    def _append(self, *lines: str) -> None:
        """Add *lines* to the journal."""
        file = self._journal.fileno()
        stop = os.fstat(file).st_size
        rest = memoryview("".join(f"{line}\n" for line in lines).encode())
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(file, stop)
            raise
        if self._sync:
            os.fsync(file)


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


def boot_id() -> str:
    """A name for this run of the system: files that were not synced last only as long as it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {os.getpid()}"


def _keep_only(folder: Path, names: Iterable[str]) -> None:
    kept = {folder / name for name in names} | {folder / JOURNAL_NAME}
    for parent, inside, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(parent, name) not in kept:
                Path(parent, name).unlink()
        for name in inside:
            with contextlib.suppress(OSError):  # not empty: it holds what is kept
                Path(parent, name).rmdir()


def _lock(journal: BinaryIO, path: Path) -> None:
    """Lock the *journal*, which was opened at *path*, or name the run that has it."""
    try:
        # A run that ended between our opening the journal and locking it has moved or removed it.
        if folders.lock(journal) and os.path.samestat(os.fstat(journal.fileno()), path.stat()):
            return
    except FileNotFoundError:
        pass
    holder = ""
    with contextlib.suppress(OSError):  # where a lock forbids reading
        holder = Written.read(journal).by
    raise OutputError(
        f"{shown_path(path.parent)} is in use by another run of shardkit"
        + (f": {shown(holder)}" if holder else ""),
        hint=("wait for it to end, or choose another output with ", output()),
    )


def _this_run() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
