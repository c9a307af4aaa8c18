"""The files that weights stream from, watched: a file that changes while a model runs is an error,
and never a wrong number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from shardkit.checkpoint.entries import SourceFile
from shardkit.errors import LoadError
from shardkit.load.modules.torch_modes import eager
from shardkit.payloads.payload import Payload
from shardkit.printable import shown_path

_Identity = tuple[int, int, int, int, int]


def changed(file: SourceFile) -> LoadError:
    """The *file* that weights are read from is no longer what it was when it was opened."""
    return LoadError(
        (
            f"{shown_path(file.path)} changed since it was opened, and holds weights that were "
            f"not read yet"
        ),
        hint="load it again; to save over a checkpoint that is in use, save to another file, and "
        "rename that",
    )


def refuse_changed(files: Iterable[SourceFile], payload: Payload) -> None:
    """See that those of *files* that *payload* is read from are what they were.

    Raises:
        FormatError: one cannot be looked at.
        LoadError: one is not.
    """
    used = {extent.path for extent in payload.sources}
    for file in files:
        if file.path in used and SourceFile.of(file.path) != file:
            raise changed(file)


class Sources:
    """Files as they were when this was made."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Remember what the files are now.

        Raises:
            LoadError: one cannot be looked at.
        """
        self._files = {path: _identity(path) for path in dict.fromkeys(paths)}

    def verify(self) -> None:
        """See that all are what they were.

        Raises:
            LoadError: one is not.
        """
        for path, identity in self._files.items():
            if _identity(path) != identity:
                raise LoadError(
                    (
                        f"{shown_path(path)} changed since the model was dispatched, and some of "
                        "its "
                        "weights stream from there"
                    ),
                    hint="load the model again; to replace a checkpoint that is in use, write it "
                    "beside the old one",
                )

    def attach(self, model: nn.Module) -> None:
        """Verify once for each forward of *model*."""
        model.register_forward_pre_hook(self.check)

    @eager
    def check(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """The hook."""
        self.verify()


def _identity(path: Path) -> _Identity:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise LoadError(
            (
                f"{shown_path(path)} cannot be read any more, and some of the model's weights "
                "stream "
                f"from there: {error.strerror}"
            ),
            hint="put the file back and load the model again",
        ) from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
