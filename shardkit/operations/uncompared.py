"""List what a comparison does not compare: weights of one side, and the files beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, LeftOut
from shardkit.printable import listed, shown, shown_path
from shardkit.sources.folder_contents import surroundings
from shardkit.sources.weight_file_names import is_index


@dataclass(frozen=True, slots=True)
class Side:
    """The checkpoint at *path*, and the *parts* of it that are left out for the model in it."""

    path: Path
    checkpoint: Checkpoint
    parts: Sequence[LeftOut] = ()

    def left_out(self, other: Side | None = None) -> Iterator[LeftOut]:
        """Weights that are not compared, under the path of this side; what the *other* side read
        was.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        read = [os.path.abspath(file.path) for file in other.checkpoint.files] if other else []
        for part in self.checkpoint.left_out:
            if is_index(part.path):  # it holds no weights itself
                continue
            below = "*" if part.path.endswith("/") else ""
            pattern = os.path.join(os.path.abspath(folder), part.path) + below
            if not any(fnmatchcase(file, pattern) for file in read):
                yield replace(part, path=os.path.join(folder, part.path))
        for part in self.parts:
            if part.nbytes:
                yield replace(part, path=f"{self.path}: {part.path}")

    def indexes(self) -> Iterator[str]:
        """Sentences on the indexes that were of no use."""
        for part in self.checkpoint.left_out:
            if is_index(part.path):
                yield f"{shown(part.path)}, an index, was not read: {part.reason}"

    def notes(self) -> Iterator[str]:
        """Sentences on the files beside the weights, on unused indexes, and on weights that are no
        dense tensors.
        """
        yield from self.indexes()
        count = sum(other.is_weight for other in self.checkpoint.others)
        if count:
            yield (
                f"{shown_path(self.path)}: {count:,} weights that are not dense tensors are not "
                f"compared"
            )
        names = self.others()
        if names:
            yield (
                f"{shown_path(self.path)}: files beside the weights are not compared: "
                f"{listed(names)}"
            )

    def others(self, seen: Iterable[Path] = ()) -> list[str]:
        """The names of the files beside the weights that are none of *seen*."""
        if not self.path.is_dir():
            return []
        read = {file.path for file in self.checkpoint.files}.union(seen)
        found = surroundings(self.path, read).companions
        return [shown(path.relative_to(self.path).as_posix()) for path in found]
