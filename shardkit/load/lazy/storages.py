"""Storages of lazy tensors, for libraries that save tensors through pointers: safetensors, and all
that call it.

1. Requesting a storage reads nothing. Libraries request the pointer and the size of every storage,
   to find ties.
2. A run of a file is mapped read-only from the file itself: it takes no memory of the process. The
   system reads the pages when they are touched, and drops them when it needs memory. Tensors in
   memory stay where they are.
3. Anything else (a cast, a concatenation, compressed data) gets a range of a temporary file without
   a name, which is mapped too. Its bytes are written there when a pointer is requested.
4. A storage keeps its files open: one that is replaced meanwhile, as by safetensors, which writes
   beside it and renames, is read as it was. A file that was written to in place is an error. If a
   file is truncated during a read through a pointer, the process ends, as with any mapped file.
5. Equal payloads of the same files have one storage for as long as a tensor has it. So ties are
   found, and cost no second copy.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardkit.alignment import ALIGNMENT, round_up
from shardkit.checkpoint.entries import SourceFile
from shardkit.errors import FormatError, NoRoom
from shardkit.load.lazy.file_watch import changed
from shardkit.load.memory.pinned_payload import PinnedPayload
from shardkit.payloads.gather import address_of
from shardkit.payloads.open_files import opened
from shardkit.payloads.payload import Buffer, Extent, Payload, ended_early, unreadable
from shardkit.printable import shown_path
from shardkit.sizes import format_size
from shardkit.system.fork import begin_again_in_children
from shardkit.system.threads import Exclusive

_ROOM = (
    1 << 30 if sys.platform == "linux" else 0
)  # bytes of a temporary file; elsewhere it takes them when it is made


class Storage:
    """What those who save tensors ask of a torch.UntypedStorage, for the bytes of a payload."""

    def __init__(
        self, payload: Payload, pages: Mapping[Path, Pages], place: Place | None, address: int
    ) -> None:
        """Read nothing.

        Args:
            payload: the bytes.
            pages: of the files that they are read from.
            place: where they are written when they are asked for; None where they are already in
                memory, or in a file.
            address: where they will be.
        """
        self._payload = payload
        self._pages = pages
        self._place = place
        self._address = address
        self._is_filled = place is None
        self._unlock()
        begin_again_in_children(self, Storage._unlock)

    def data_ptr(self) -> int:
        """The address, which tells this storage from others. Ask `filled` for the bytes too."""
        return self._address

    def nbytes(self) -> int:
        return self._payload.nbytes

    def size(self) -> int:
        return self._payload.nbytes

    def __len__(self) -> int:
        return self._payload.nbytes

    def filled(self) -> int:
        """The address, with the bytes there.

        Raises:
            FormatError: a file cannot be read.
            LoadError: a file was written to since it was opened.
            NoRoom: there is no room for the temporary file.
        """
        for pages in self._pages.values():
            pages.refuse_written()
        self._exclusive.call(self._fill)
        return self._address

    def _fill(self) -> None:
        if self._place is not None and not self._is_filled:
            self._place.write(
                opened(
                    self._payload,
                    lambda path, memory, start: self._pages[path].read(memory, start),
                )
            )
            self._is_filled = True

    def _unlock(self) -> None:
        self._exclusive = Exclusive()


class Storages:
    """The storages of a process, by what they hold; each is there for as long as a tensor has
    it.
    """

    def __init__(self) -> None:
        """Hold none yet."""
        self._last: weakref.ref[Scratch] | None = None
        self._made: weakref.WeakValueDictionary[tuple[Payload, tuple[SourceFile, ...]], Storage] = (
            weakref.WeakValueDictionary()
        )
        self._pages: weakref.WeakValueDictionary[SourceFile, Pages] = weakref.WeakValueDictionary()
        self._begin()
        begin_again_in_children(self, Storages._begin)

    def of(self, payload: Payload, files: tuple[SourceFile, ...]) -> Storage:
        """The storage with the bytes of *payload*.

        Args:
            payload: the bytes.
            files: what they are read from, as it was when it was opened; other files are taken as
                they are now.

        Raises:
            FormatError: a file cannot be opened, or is too short.
            LoadError: a file changed since it was opened.
            NoRoom: there is no room for a temporary file.
        """
        if not payload.nbytes:
            return Storage(payload, {}, None, 0)
        known = {file.path: file for file in files}
        paths = dict.fromkeys(extent.path for extent in payload.sources)
        used = tuple(known.get(path) or SourceFile.of(path) for path in paths)
        return self._exclusive.call(self._known_or_new, payload, used)

    def _known_or_new(self, payload: Payload, files: tuple[SourceFile, ...]) -> Storage:
        storage = self._made.get((payload, files))
        if storage is None:
            storage = self._made[payload, files] = self._new(payload, files)
        return storage

    def _new(self, payload: Payload, files: tuple[SourceFile, ...]) -> Storage:
        pages = {
            file.path: self._pages.get(file) or self._pages.setdefault(file, Pages(file))
            for file in files
        }
        for extent in payload.sources:
            pages[extent.path].check(extent)
        if isinstance(payload, Extent):
            return Storage(payload, pages, None, pages[payload.path].address + payload.start)
        if isinstance(payload, Buffer | PinnedPayload):
            return Storage(payload, pages, None, address_of(memoryview(payload.memory)))
        place = self._placed(payload.nbytes)
        return Storage(payload, pages, place, place.address)

    def _placed(self, nbytes: int) -> Place:
        scratch = self._last() if self._last else None
        if scratch is None or scratch.free < nbytes:
            scratch = Scratch(max(_ROOM, nbytes))
            self._last = weakref.ref(scratch)
        return scratch.place(nbytes)

    def _begin(self) -> None:
        """The child of a fork writes to other temporary files than its parent."""
        self._exclusive = Exclusive()
        self._last = None


class Pages:
    """The pages of a file, as it was when it was opened."""

    def __init__(self, file: SourceFile) -> None:
        """Map *file*, which is not empty.

        Raises:
            FormatError: it cannot be opened.
            LoadError: it changed.
        """
        self._file = file
        try:
            with open(file.path, "rb", buffering=0) as there:
                stat = os.fstat(there.fileno())
                if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != (
                    file.size,
                    file.mtime_ns,
                    file.inode,
                ):
                    raise changed(file)
                # Read-only, because what is written to a private copy would be lost without a word.
                self._memory = memoryview(mmap.mmap(there.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise unreadable(file.path, error) from None
        self.address = address_of(self._memory)

    def check(self, extent: Extent) -> None:
        """Raise Malformed unless *extent* is inside the file."""
        if extent.start + extent.nbytes > self._file.size:
            raise ended_early(extent)

    def read(self, memory: memoryview, start: int) -> None:
        """Fill *memory* with the bytes from *start* on."""
        memory[:] = self._memory[start : start + len(memory)]

    def refuse_written(self) -> None:
        """Raise LoadError if the file was written to in place: to touch pages behind a new end
        would end the process.
        """
        with suppress(FormatError):  # it is gone, and the pages are still there
            now = SourceFile.of(self._file.path)
            if now.inode == self._file.inode and now != self._file:
                raise changed(self._file)


class Scratch:
    """A temporary file without a name, and the pages of it."""

    def __init__(self, nbytes: int) -> None:
        """Make it, with a hole of *nbytes* bytes in it.

        Raises:
            NoRoom: the system refuses.
        """
        try:
            self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as this
            self.file.truncate(nbytes)
            self.memory = memoryview(mmap.mmap(self.file.fileno(), nbytes))
        except OSError as error:
            raise no_room(nbytes, error) from None
        weakref.finalize(self, self.file.close)
        self._address = address_of(self.memory)
        self._at, self.free = 0, nbytes

    def place(self, nbytes: int) -> Place:
        """Room for *nbytes* bytes."""
        place = Place(self, self._at, self._address + self._at)
        taken = min(self.free, round_up(nbytes, ALIGNMENT))
        self._at, self.free = self._at + taken, self.free - taken
        return place


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """A place in a temporary file.

    Attributes:
        scratch: the file.
        start: where in it.
        address: where in memory.
    """

    scratch: Scratch
    start: int
    address: int

    def write(self, payload: Payload) -> None:
        """Write *payload* there.

        Raises:
            FormatError: it cannot be read.
            NoRoom: the disk is full.
        """
        try:
            if hasattr(os, "posix_fallocate"):  # or else a full disk would end the process
                os.posix_fallocate(self.scratch.file.fileno(), self.start, payload.nbytes)
        except OSError as error:
            raise no_room(payload.nbytes, error) from None
        at = self.start
        for chunk in payload.chunks():
            self.scratch.memory[at : at + len(chunk)] = chunk
            at += len(chunk)


def no_room(nbytes: int, error: OSError) -> NoRoom:
    """Report the error of the system for a temporary file."""
    return NoRoom(
        f"{shown_path(Path(tempfile.gettempdir()))}: a temporary file with {format_size(nbytes)} "
        "of weights cannot be written: "
        f"{error.strerror}",
        hint="set TMPDIR to a folder on a larger disk, or save with shardkit.load.save, which "
        "needs no such file",
    )


STORAGES = Storages()
