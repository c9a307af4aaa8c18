"""Download large files of a repository into the Hub's cache: several ranges at a time, and after a
kill only what is missing.

    8 threads: the bytes of a range each → `PartialFile`, which records what has come
    a thread for each processor: the ranges of a file, once there → sha256 → blobs/<sha256>

The lock of a file is the one that huggingface_hub takes, so that on one machine a file is
downloaded once, whoever asks for it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from shardkit.errors import LoadError
from shardkit.load.hub.partial_file import PartialFile
from shardkit.load.hub.remote_bytes import RemoteBytes, Stopped
from shardkit.load.hub.repository import RemoteFile, Repository
from shardkit.printable import shown_path
from shardkit.system.progress import OnBytes
from shardkit.system.threads import Pool

Argument = TypeVar("Argument")

CONNECTIONS = 8
# Bytes that are hashed at a time: the threads that receive bytes hold the interpreter, for which a
# thread that hashes has to wait after each piece.
_PIECE = 8 * 2**20


@dataclass(frozen=True, slots=True)
class _Blob:
    """A file on its way.

    Attributes:
        remote: what it is.
        part: what has come.
        is_resumed: whether an earlier process has begun it.
        on_bytes: called with the number of bytes that have come.
    """

    remote: RemoteBytes
    part: PartialFile
    is_resumed: bool
    on_bytes: OnBytes

    def fetch(self, number: int) -> None:
        """Download what the range with that *number* lacks."""
        start, end = self.part.ranges[number]
        with self.part.open() as handle:
            for piece in self.remote.pieces(start + self.part.count(number), end):
                self.part.add(number, handle, piece)
                self.on_bytes(len(piece))

    def digest(self, coming: Sequence[Future[None]] = ()) -> str:
        """The sha256 of what has come, each range after its future of *coming*."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_PIECE, self.part.nbytes)))
        for number in range(len(self.part.ranges)):
            if coming:
                try:
                    coming[number].result()
                except CancelledError:
                    raise Stopped from None
            for piece in self.part.pieces(number, buffer):
                digest.update(piece)
        return digest.hexdigest()

    def finish(self, coming: Sequence[Future[None]]) -> None:
        """Check the file while its ranges are *coming*, and put it in its place."""
        wanted = self.remote.file.sha256
        is_right = self.digest(coming) == wanted
        if not is_right and self.is_resumed:  # the record outlived bytes, as where power failed
            self.on_bytes(-self.part.present)
            self.part.forget()
            for number in range(len(self.part.ranges)):
                self.fetch(number)
            is_right = self.digest() == wanted
        if not is_right:
            self.part.forget()
            raise self.remote.changed(f"its sha256 is not {wanted}")
        self.part.finish()


def fetch(
    repository: Repository,
    commit: str,
    files: Sequence[RemoteFile],
    on_bytes: OnBytes,
    *,
    anew: bool = False,
) -> None:
    """Download *files*, which have digests, into the cache's folder for blobs.

    Args:
        repository: where they are from.
        commit: of which they are.
        files: those that are not in the folder, as far as is known.
        on_bytes: called, from any thread, with the number of bytes that are there or have come.
        anew: replace what is there.

    Raises:
        LoadError: they cannot be downloaded, or are not what the Hub lists; what has come stays.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # not in __all__

    blobs = repository.folder / "blobs"
    locks = repository.cache / ".locks" / repository.folder.name
    stop = threading.Event()
    try:
        with ExitStack() as held:
            todo: list[_Blob] = []
            for folder in (blobs, locks):
                folder.mkdir(parents=True, exist_ok=True)
            # All processes take the locks in one order, so that none waits for another for ever.
            # Files of the same content are one.
            for sha256, file in sorted({f"{file.sha256}": file for file in files}.items()):
                held.enter_context(WeakFileLock(locks / f"{sha256}.lock"))
                place = blobs / sha256
                if place.exists() and not anew:  # another process was faster
                    on_bytes(file.nbytes)
                    continue
                part = held.enter_context(PartialFile(place, file.nbytes))
                if anew:
                    part.forget()
                on_bytes(part.present)
                remote = RemoteBytes(repository, commit, file, stop)
                todo.append(_Blob(remote, part, part.present > 0, on_bytes))
            _fetch_all(sorted(todo, key=lambda blob: blob.remote.file.name), stop)
    except OSError as error:
        raise LoadError(
            f"{repository.name} cannot be written to {shown_path(repository.cache)}: "
            f"{error.strerror or error}",
            hint="free some space or mend the folder, and call again: what has come stays; "
            "HF_HOME or cache_dir= choose another folder",
        ) from None


def _fetch_all(blobs: Sequence[_Blob], stop: threading.Event) -> None:
    with (
        Pool(os.cpu_count() or 1, "shardkit-check") as checks,
        Pool(CONNECTIONS, "shardkit-fetch") as pool,
    ):
        ended: list[Future[None]] = []
        try:
            for blob in blobs:
                coming = [
                    pool.submit(partial(_or_stop, stop, blob.fetch, number))
                    for number in range(len(blob.part.ranges))
                ]
                ended.append(checks.submit(partial(_or_stop, stop, blob.finish, coming)))
            for future in ended:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            checks.shutdown()
            _raise_first(ended)


def _or_stop(stop: threading.Event, act: Callable[[Argument], None], argument: Argument) -> None:
    """Call *act*; where it fails, let all others end."""
    try:
        act(argument)
    except BaseException:
        stop.set()
        raise


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """Raise what went wrong first, and not that others were stopped for it."""
    for future in futures:
        error = future.exception() if future.done() and not future.cancelled() else None
        if error is not None and not isinstance(error, Stopped):
            raise error
