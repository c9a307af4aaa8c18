"""OUT.partial/: where an output is written until it is whole, and what of it is done.

1. The journal is a file of JSON lines in OUT.partial/. Its first line says for which plan, from which files and by whom;
   each further line names a file that is complete, with its length, and is written after that file was synced.
2. One run at a time: the journal is locked for as long as it is open.
3. A journal for the same plan and unchanged sources is resumed. Any other is begun anew.
4. The commit moves the folder, or the one file in it, to OUT by one rename, removes what was replaced, and the journal last:
   a journal in OUT tells that the commit was killed on the way, and `mend` finishes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shardkit.checkpoint import SourceFile
from shardkit.errors import OutputError, shown_path

NAME = ".shardkit-journal"
_VERSION = 1


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
        done: names of the files that are complete.
        resumed: whether an earlier run began it.
    """

    def __init__(self, folder: Path, file: IO[str], done: set[str], *, resumed: bool, sync: bool) -> None:
        self.folder = folder
        self.done = done
        self.resumed = resumed
        self._file = file
        self._sync = sync

    def finished(self, name: str) -> None:
        """Record that the file called *name* is complete."""
        self._append(_done_line(self.folder, name))
        self.done.add(name)

    def discard(self) -> None:
        """Remove everything that was written."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(self, out: Path, *, single: str | None) -> None:
        """Move what was written to *out*: the file called *single*, or the whole folder.

        Raises:
            OutputError: the system refuses.
        """
        try:
            if os.name == "nt":
                self._file.close()  # there no folder moves while a file in it is open
            if self._sync:
                sync_folder(self.folder)
            _place_file(self.folder, single, out) if single else _place_folder(self.folder, out)
            if self._sync:
                sync_folder(out.parent)
            mend(out, self.folder)
        except OSError as error:
            raise OutputError(
                f"{shown_path(out)}: cannot be put in place: {error.strerror}", hint=f"the complete output is in {self.folder}"
            ) from None

    def _append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def begin(folder: Path, identity: Identity) -> Iterator[Journal]:
    """Open OUT.partial/ for *identity*: what an earlier run of the same plan finished is kept, all else is removed.

    Raises:
        OutputError: another run holds it, it is not shardkit's, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        with open(folder / NAME, "a+", encoding="utf-8", errors="replace") as file:
            _lock(file, folder)
            finished = _finished(file, identity)
            done = {name for name, nbytes in (finished or {}).items() if _is_whole(folder / name, nbytes)}
            _keep_only(folder, done)
            journal = Journal(folder, file, done, resumed=finished is not None, sync=not identity.boot)
            file.truncate(0)  # a line that was cut off would spoil the next one
            journal._append("\n".join((identity.line(), *(_done_line(folder, name) for name in sorted(done)))))
            yield journal
    except OSError as error:
        raise OutputError(f"{shown_path(folder)}: {error.strerror or error}", hint=advice(error)) from None


def mend(out: Path, folder: Path) -> None:
    """Finish a commit to *out* that brought the new output there from *folder*, and was killed before it had cleaned up."""
    if (out / NAME).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # since the exchange it holds what was replaced
        (out / NAME).unlink(missing_ok=True)


def advice(error: OSError) -> str | None:
    """What to try after *error*, which the system raised while an output was prepared."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again: it goes on from what is done"
    return None


def boot_id() -> str:
    """A name for this run of the system: files that were not synced are whole only as long as it lasts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {os.getpid()}"


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* last; a system that cannot open folders needs none of this."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign(folder: Path) -> None:
    names = [name for name in os.listdir(folder) if name != NAME]
    if names and not (folder / NAME).exists():
        raise OutputError(
            f"{shown_path(folder)} is where the output would be prepared, and it holds files that no run of shardkit left there",
            hint="move the folder away, or choose another output with -o",
        )


def _done_line(folder: Path, name: str) -> str:
    return json.dumps({"done": name, "nbytes": (folder / name).stat().st_size})


def _finished(file: IO[str], identity: Identity) -> dict[str, int] | None:
    """The files that an earlier run for *identity* completed; None where the journal is new, broken or for another plan."""
    file.seek(0)
    first, *rest = file.read().split("\n")
    if first != identity.line():
        return None
    try:
        lines = [json.loads(line) for line in rest[:-1]]  # what follows the last line end was cut off while written
        return {str(line["done"]): int(line["nbytes"]) for line in lines}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_whole(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _keep_only(folder: Path, names: set[str]) -> None:
    kept = {folder / name for name in names} | {folder / NAME}
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(parent, name) not in kept:
                Path(parent, name).unlink()
        for name in folders:
            with contextlib.suppress(OSError):  # not empty: it holds what is kept
                Path(parent, name).rmdir()


def _lock(file: IO[str], folder: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return  # a file system without locks; nothing better is to be had
        raise OutputError(
            f"{shown_path(folder)} is in use by another run of shardkit",
            hint="wait for it to end, or choose another output with -o",
        ) from None


def _place_file(folder: Path, name: str, out: Path) -> None:
    os.replace(folder / name, out)
    shutil.rmtree(folder)


def _place_folder(folder: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        _rename_over_empty(folder, out)
    elif not _exchange(folder, out):
        old = out.with_name(f"{out.name}.old")
        os.rename(out, old)
        os.rename(folder, out)
        os.rename(old, folder)  # as after an exchange


def _rename_over_empty(folder: Path, out: Path) -> None:
    if os.name == "nt" and out.exists():
        out.rmdir()
    os.rename(folder, out)


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
