"""A checkpoint as the loader sees it: the tensors of the model that is in it, by their names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shardkit import source
from shardkit.checkpoint import Other, SourceFile, TensorEntry
from shardkit.errors import LoadError, shown, shown_path
from shardkit.formats import torch_legacy, torch_script  # noqa: F401 - here, beside torch, and not in the first load
from shardkit.integrity import refuse_unlike_written
from shardkit.limits import Limits
from shardkit.roots import select_root

_Named = TypeVar("_Named", TensorEntry, Other)


@dataclass(frozen=True, slots=True)
class Opened:
    """What there is to load, of which only headers have been read.

    Attributes:
        where: the path, for messages.
        entries: the dense tensors by their names.
        others: whatever else has a name: sparse tensors, objects of a pickle.
        files: the files as they were.
        notes: sentences that the user should see.
        limits: what the files may ask for.
    """

    where: str
    entries: Mapping[str, TensorEntry]
    others: Mapping[str, Other]
    files: tuple[SourceFile, ...]
    notes: tuple[str, ...] = ()
    limits: Limits = Limits()

    @classmethod
    def at(cls, path: str | os.PathLike[str], *, root: str | None = None, limits: Limits = Limits()) -> Opened:
        """What is at *path*, which is whatever `shardkit.open` opens.

        Args:
            path: a file of any format, compressed or not; an index; a folder with one of them.
            root: dotted path of the subtree to take; "." for everything; None to find the model.
            limits: what the file may ask for.

        Raises:
            FormatError: it cannot be read.
            PlanError: several parts of it could be the model, or there is nothing at *root*.
            LoadError: two weights have one name.
        """
        checkpoint = source.open(path, limits=limits)
        rooted = select_root(checkpoint, root)
        weights = (other for other in rooted.others if other.is_weight)
        objects = {other.name: other for other in rooted.others if not other.is_weight}
        others = objects | _by_name(weights)
        return cls(shown_path(Path(path)), _by_name(rooted.tensors), others, checkpoint.files, checkpoint.notes, limits)

    def verify(self, entries: Iterable[TensorEntry]) -> None:
        """Read the files that *entries* lie in, whole, and hold them against the checksums that were written with them.

        Raises:
            FormatError: a file differs, or cannot be read.
            LoadError: nothing tells what was written.
        """
        used = {extent.path for entry in entries for extent in entry.payload.sources}
        unchecked = refuse_unlike_written((file.path for file in self.files if file.path in used), self.entries, self.limits)
        if unchecked:
            raise LoadError(
                f"{shown_path(unchecked[0])} cannot be verified: it carries no checksums, and no file beside it has any",
                hint="write it with `shardkit convert --checksum sha256`, or load it without verify",
            )

    def check_unchanged(self) -> None:
        """Raise LoadError if a file is no longer what it was when it was opened."""
        for file in self.files:
            if SourceFile.of(file.path) != file:
                raise LoadError(
                    f"{shown_path(file.path)} changed while it was read", hint="load it again when nothing writes to it any more"
                )


def _by_name(found: Iterable[_Named]) -> dict[str, _Named]:
    by_name: dict[str, _Named] = {}
    for each in found:
        first = by_name.setdefault(each.name, each)
        if first is not each:
            paths = (" → ".join(map(shown, one.path)) for one in (first, each))
            raise LoadError(
                f"two weights would be called {shown(each.name)}: {', and '.join(paths)}",
                hint="give the root of one of them, or rename one with shardkit.convert",
            )
    return by_name
