"""OUT.partial/: where an output is written until it is whole, and what of it is done.

1. The journal is a file of JSON lines in OUT.partial/. Its first line says for which plan and from which files; each further
   line names who writes, a file that is complete (written after that file was synced), one that has to be written again, or the
   output that is being committed. A line that was cut off counts for nothing.
2. One run at a time: the journal is locked for as long as it is open.
3. A journal for the same plan and unchanged sources is resumed. Any other is begun anew.
4. The journal goes into OUT with the folder, and is removed last: one in OUT that names OUT as committed tells that the run was
   killed while it cleared up, and `mend` ends it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardkit.checkpoint.entries import SourceFile
from shardkit.errors import OutputError, shown, shown_path
from shardkit.hints import after_writing, output
from shardkit.metadata.journal_records import JOURNAL_NAME, Finished, Written
from shardkit.metadata.manifest import Digests
from shardkit.writing.commit import clear, place_file, place_folder, put_back, remove, sync_folder, sync_tree

_VERSION = 2


@dataclass(frozen=True, slots=True)
class Identity:
    """For what a partial output was begun; equal identities may share their files.

    Attributes:
        digest: of the plan.
        sources: the files that it reads.
        boot: names the run of the system whose page cache holds the files; "" where they are synced to the disk.
    """

    digest: str
    sources: tuple[SourceFile, ...]
    boot: str

    def line(self) -> str:
        """The first line of the journal."""
        sources = [[str(s.path), s.size, s.mtime_ns, s.inode] for s in self.sources]
        return json.dumps({"version": _VERSION, "digest": self.digest, "sources": sources, "boot": self.boot})


class Journal:
    """An open, locked OUT.partial/.

    Attributes:
        folder: OUT.partial/.
        done: the files that are complete, by name.
    """

    def __init__(self, folder: Path, file: BinaryIO, done: dict[str, Finished], *, sync: bool) -> None:
        self.folder = folder
        self.done = done
        self._file = file
        self._sync = sync

    def finished(self, name: str, digests: Digests | None = None) -> None:
        """Record that the file called *name* is complete.

        Raises:
            OSError: the journal cannot be written.
        """
        nbytes = (self.folder / name).stat().st_size
        line: dict[str, object] = {"done": name, "nbytes": nbytes}
        self._append(line if digests is None else {**line, "digests": [digests.whole, digests.tensors, *digests.blocks]})
        self.done[name] = Finished(nbytes, digests)

    def discard(self) -> None:
        """Remove everything that was written."""
        if os.name == "nt":
            self._file.close()  # there no file is removed while it is open; elsewhere it keeps the lock meanwhile
        with contextlib.suppress(OSError):  # why it is discarded is what has to be said
            remove(self.folder)

    def commit(self, out: Path, *, single: str | None) -> None:
        """Move what was written to *out*: the file called *single*, or the whole folder.

        Raises:
            OutputError: the system refuses.
        """
        try:
            self._append({"commit": out.name})
            if self._sync:
                sync_tree(self.folder)
            if os.name == "nt":
                self._file.close()  # there no folder moves while a file in it is open
            place_file(self.folder, single, out) if single else place_folder(self.folder, out)
            if self._sync:
                sync_folder(out.parent)
            clear(self.folder, out)
        except OSError as error:
            raise OutputError(
                f"{shown_path(out)}: cannot be put in place: {error.strerror or error}",
                hint="every file of it is complete: run the same command again",
            ) from None

    def _append(self, *lines: Mapping[str, object]) -> None:
        self._append_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def _append_text(self, text: str) -> None:
        stop = os.fstat(self._file.fileno()).st_size
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(self._file.fileno(), stop)
            raise
        if self._sync:
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def begin(folder: Path, identity: Identity) -> Iterator[Journal]:
    """Open OUT.partial/ for *identity*: what an earlier run of the same plan finished is kept, all else is removed.

    Raises:
        OutputError: another run holds it, it is not shardkit's, or it cannot be made.
    """
    try:
        _make(folder, sync=not identity.boot)
        _refuse_foreign(folder)
        with open(folder / JOURNAL_NAME, "ab+", buffering=0) as file:
            _lock(file, folder / JOURNAL_NAME)
            yield _begun(folder, file, identity)
    except OSError as error:
        message = f"{shown_path(folder)}: cannot be written: {error.strerror or error}"
        raise OutputError(message, hint=after_writing(error)) from None


def mend(out: Path, folder: Path, identity: Identity, *, single: str | None) -> bool:
    """Finish, or undo, a commit to *out* from *folder* that was killed; says whether *out* is now what *identity* asks for.

    Raises:
        OutputError: another run is at it, or the system refuses.
    """
    path = out / JOURNAL_NAME if (out / JOURNAL_NAME).is_file() else folder / JOURNAL_NAME
    try:
        with open(path, "ab+", buffering=0) if path.is_file() else contextlib.nullcontext() as file:
            if file is None:
                _remove_empty(folder, out)
                return False
            _lock(file, path)
            written = Written.read(file)
            if path.parent == folder:
                put_back(folder, out)
            return written.commit == out.name and _settled(out, folder, written, identity, single)
    except OSError as error:
        message = f"{shown_path(out)}: cannot be finished: {error.strerror or error}"
        raise OutputError(message, hint=after_writing(error)) from None


def boot_id() -> str:
    """A name for this run of the system: files that were not synced are whole only as long as it lasts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {os.getpid()}"


def _make(folder: Path, *, sync: bool) -> None:
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in new if sync else ():
        sync_folder(parent.parent)


def _refuse_foreign(folder: Path) -> None:
    names = [name for name in os.listdir(folder) if name != JOURNAL_NAME]
    if names and not (folder / JOURNAL_NAME).exists():
        raise OutputError(
            f"{shown_path(folder)} is where the output would be prepared, and it holds files that no run of shardkit left there",
            hint=("move the folder away, or choose another output with ", output()),
        )


def _begun(folder: Path, file: BinaryIO, identity: Identity) -> Journal:
    written = Written.read(file)
    resumed = written.identity == identity.line() and not written.broken
    listed = written.done if resumed else {}
    done = {name: finished for name, finished in listed.items() if finished.is_whole(folder / name)}
    _keep_only(folder, done)
    journal = Journal(folder, file, done, sync=not identity.boot)
    # What is complete stays recorded throughout: a run that is killed here costs nothing.
    os.ftruncate(file.fileno(), written.nbytes if resumed else 0)
    if not resumed:
        journal._append_text(f"{identity.line()}\n")
    journal._append(*({"redo": name} for name in sorted(listed.keys() - done.keys())), {"by": _this_run()})
    return journal


def _remove_empty(folder: Path, out: Path) -> None:
    """Remove the last that a commit leaves, where it was killed before its very last step."""
    if out.exists():
        with contextlib.suppress(OSError):  # not empty, or not there
            os.rmdir(folder)


def _settled(out: Path, folder: Path, written: Written, identity: Identity, single: str | None) -> bool:
    """Clear up after a commit that reached *out*; says whether it was that of *identity*, and *out* is still as it left it."""
    if single is None:
        moved = (out / JOURNAL_NAME).is_file()
        whole = moved and all(finished.is_whole(out / name) for name, finished in written.done.items())
    else:
        moved = whole = single in written.done and not (folder / single).exists() and written.done[single].is_whole(out)
    if moved:
        clear(folder, out)
    return whole and written.identity == identity.line()


def _keep_only(folder: Path, names: Iterable[str]) -> None:
    kept = {folder / name for name in names} | {folder / JOURNAL_NAME}
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(parent, name) not in kept:
                Path(parent, name).unlink()
        for name in folders:
            with contextlib.suppress(OSError):  # not empty: it holds what is kept
                Path(parent, name).rmdir()


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the journal *file*, which is at *path*, or say who has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)  # it is the byte at the position that is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return  # a file system without locks; nothing better is to be had
        raise _in_use(file, path) from None
    if not _is_at(file, path):  # its run ended between our opening it and locking it
        raise _in_use(file, path)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _in_use(file: BinaryIO, path: Path) -> OutputError:
    holder = ""
    with contextlib.suppress(OSError):  # where a lock forbids reading
        holder = Written.read(file).by
    return OutputError(
        f"{shown_path(path.parent)} is in use by another run of shardkit" + (f": {shown(holder)}" if holder else ""),
        hint=("wait for it to end, or choose another output with ", output()),
    )


def _this_run() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
