"""Arenas: mappings of memory or of a file that hold many tensors, each a storage of its own."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from shardkit.alignment import round_down
from shardkit.errors import LoadError
from shardkit.payloads.payload import Extent, ended_early, unreadable
from shardkit.sizes import format_size

HUGE = 2 << 20  # a huge page of x86 and of most ARM; a larger one is never asked for
_WIPEONFORK = 18  # MADV_WIPEONFORK of Linux, which Python does not name


@dataclass(frozen=True, slots=True)
class Arena:
    """One mapping that many tensors lie in, and lives as long as one of them does.

    Attributes:
        mapping: the pages.
        start: the place in it that counts as 0.
    """

    mapping: mmap.mmap
    start: int

    @classmethod
    def of(cls, nbytes: int) -> Arena:
        """Fresh memory that begins at a page; huge pages are asked for, but none that reaches
        beyond the end.

        Raises:
            LoadError: there is no room for it.
        """
        arena = cls.untouched(nbytes)
        whole = round_down(nbytes, HUGE)
        if whole and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                arena.mapping.madvise(mmap.MADV_HUGEPAGE, arena.start, whole)
        return arena

    @classmethod
    def untouched(cls, nbytes: int) -> Arena:
        """The same, but whoever fills it says which pages it gets.

        Raises:
            LoadError: there is no room for it.
        """
        room = nbytes + (HUGE if nbytes >= HUGE else 0)
        try:
            mapping = _anonymous(room)
        except OSError as error:
            raise _no_room(nbytes, error) from None
        if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return cls(mapping, 0)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE
        whole = round_down(nbytes, HUGE)
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_NOHUGEPAGE, start + whole, room - start - whole)
        return cls(mapping, start)

    @classmethod
    def shared(cls, nbytes: int) -> Arena:
        """Fresh memory that begins at a page, and that the child of a fork has in common with its
        parent.

        Raises:
            LoadError: there is no room for it.
        """
        try:
            return cls(mmap.mmap(-1, nbytes), 0)
        except OSError as error:
            raise _no_room(nbytes, error) from None

    @classmethod
    def over(cls, path: Path, extents: Sequence[Extent]) -> Arena:
        """The pages of a file that hold *extents*; places in it are those in the file, and what is
        written stays private.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
        """
        first = (
            min(extent.start for extent in extents)
            // mmap.ALLOCATIONGRANULARITY
            * mmap.ALLOCATIONGRANULARITY
        )
        last = max(extents, key=lambda extent: extent.start + extent.nbytes)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size < last.start + last.nbytes:
                    raise ended_early(last)
                return cls(_private(file.fileno(), last.start + last.nbytes - first, first), -first)
        except OSError as error:
            raise unreadable(path, error) from None

    def wipe_in_children(self) -> None:
        """Let the child of a fork find zeros here, where the system can."""
        if sys.platform == "linux":
            with suppress(OSError):  # a kernel before 4.14
                self.mapping.madvise(_WIPEONFORK)

    def tensor(self, at: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor whose bytes begin at *at*, as a storage of its own."""
        count = prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        flat = torch.frombuffer(self.mapping, dtype=dtype, count=count, offset=self.start + at)
        return flat if len(shape) == 1 else flat.view(shape)

    def memory(self, at: int, nbytes: int) -> memoryview:
        """The *nbytes* bytes from *at* on."""
        return memoryview(self.mapping)[self.start + at : self.start + at + nbytes]


def _no_room(nbytes: int, error: OSError) -> LoadError:
    return LoadError(
        f"no memory for {format_size(nbytes)} of weights: {error.strerror}",
        hint='end other programs, or let more of the model stream: device_map="auto" with '
        "max_memory",
    )


def _anonymous(nbytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_ANONYMOUS"):
        # Not the default, which is shared: a shared mapping is never huge.
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def _private(file: int, nbytes: int, first: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        # Pages that may be written count as promised memory, of which there may be less than the
        # file has bytes.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(
            file, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=first
        )
    return mmap.mmap(file, nbytes, access=mmap.ACCESS_COPY, offset=first)
