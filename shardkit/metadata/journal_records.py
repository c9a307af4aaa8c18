"""Parse the lines of a journal: its plan and sources, the complete files, the last writer, and the
commit.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from shardkit.metadata.manifest import Digests

JOURNAL_NAME = ".shardkit-journal"
PARTIAL = ".partial"  # what the folder of an unfinished output is called, behind its name


@dataclass(frozen=True, slots=True)
class Finished:
    """A file that is recorded as complete."""

    nbytes: int
    digests: Digests | None

    def is_whole(self, path: Path) -> bool:
        """Whether it is at *path*, at full length."""
        return path.is_file() and path.stat().st_size == self.nbytes


@dataclass(slots=True)
class Written:
    """What a journal says.

    Attributes:
        identity: its first line.
        nbytes: length of its whole lines.
        done: the files that are complete, by name.
        commit: name of the output that it was being moved to.
        by: the run that wrote it last.
        broken: whether a line of it cannot be read.
    """

    identity: str
    nbytes: int
    done: dict[str, Finished] = field(default_factory=dict)
    commit: str = ""
    by: str = ""
    broken: bool = False

    @property
    def source(self) -> str:
        """The file or folder that the run read; "" if the first line does not tell."""
        try:
            document: object = json.loads(self.identity)
        except (ValueError, RecursionError):
            return ""
        match document:
            case {"sources": list(lines)} if lines:
                paths = [
                    line[0]
                    for line in lines
                    if isinstance(line, list) and line and isinstance(line[0], str)
                ]
                try:
                    return os.path.commonpath(paths)
                except ValueError:  # some are relative
                    return ""
        return ""

    @classmethod
    def read(cls, file: BinaryIO) -> Written:
        """What the open journal *file* says."""
        file.seek(0)
        content = file.read()
        nbytes = (
            content.rfind(b"\n") + 1
        )  # what follows the last line end was cut off while written
        first, *rest = content[:nbytes].decode(errors="replace").split("\n")
        written = cls(first, nbytes)
        for line in rest[:-1]:
            written._add(line)
        return written

    def _add(self, line: str) -> None:
        try:
            entry: object = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        match entry:
            case {
                "done": str(name),
                "nbytes": int(nbytes),
                "digests": [str(whole), dict(tensors), *blocks],
            }:
                self.done[name] = Finished(nbytes, Digests(whole, tensors, tuple(map(str, blocks))))
            case {"done": str(name), "nbytes": int(nbytes)}:
                self.done[name] = Finished(nbytes, None)
            case {"redo": str(name)}:
                self.done.pop(name, None)
            case {"commit": str(name)}:
                self.commit = name
            case {"by": str(name)}:
                self.by = name
            case _:
                self.broken = True
