"""Scan one file, an index or a set of shards: bytes → `Checkpoint`.

1. Nothing is opened before it is known to be a regular file: a pipe would block for ever. Links are
   followed, because the caches of Hugging Face consist of them.
2. Content decides the format. Only an index may also be recognised by its name.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, LeftOut, SourceFile
from shardkit.errors import FormatError, LimitExceeded
from shardkit.limits import Limits
from shardkit.metadata import shard_index
from shardkit.payloads.compressed import expansion
from shardkit.payloads.payload import read_all, unreadable
from shardkit.printable import shown, shown_path
from shardkit.sources import merge_shards, path_arguments, registry
from shardkit.sources.candidates import Candidate, named, of_index, stored
from shardkit.sources.format import Format, Source
from shardkit.sources.offload_check import record_in, refuse_stale
from shardkit.sources.weight_file_names import ShardName, ShardSet, shard_sets

_LOG = logging.getLogger("shardkit")


@dataclass(frozen=True, slots=True)
class Scanner:
    """How files are read.

    Attributes:
        format: the format to read them as; None to recognise it.
        limits: what they may ask for.
        scratch: folder for temporary files; None for the system's.
    """

    format: Format | None
    limits: Limits
    scratch: Path | None

    def file(self, path: Path) -> Checkpoint:
        """The checkpoint in a regular file that is no index."""
        return self.scanned(self.source(path))

    def alone(self, source: Source) -> Checkpoint:
        """The same for one that a user gives by itself, and that may be one of several shards."""
        checkpoint, path = self.scanned(source), source.path
        shard = ShardName.of(path.name)
        if shard is None or shard.total < 2:
            return checkpoint
        others = _other_shards(path)
        absent = shard.total - 1 - len(others)
        gone = f"; {absent:,} more missing" if absent > 0 else ""
        rest = f"not read: {named(others)}{gone}" if others else "the others are missing"
        note = (
            f"{shown(path.name)} is shard {shard.number:,} of {shard.total:,} and holds only a "
            "part of "
            f"the model ({rest}): give the folder to take all of it"
        )
        left_out = tuple(_left_shard(path.parent / name) for name in others)
        return replace(checkpoint, notes=(note, *checkpoint.notes), left_out=left_out)

    def indexed(self, source: Source) -> Checkpoint:
        """The shards that the index *source* lists, as one checkpoint.

        Raises:
            FormatError: the index or a shard cannot be read, or a shard is missing.
        """
        candidate = self.listing(source)
        assert candidate.index is not None
        if candidate.missing:
            raise candidate.incomplete(source.path.parent)
        file = SourceFile.of(source.path)
        paths = {name: stored(source.path.parent / name) for name in candidate.files}
        joined = merge_shards.joined(
            source.path, candidate.index, self._all(source.path.parent, paths), self.limits
        )
        return replace(joined, files=(file, *joined.files))

    def listing(self, source: Source) -> Candidate:
        """What the index *source* lists, and which of that is there.

        Raises:
            FormatError: it cannot be read.
        """
        if source.size > self.limits.header_bytes:
            raise LimitExceeded(
                source.path,
                f"the index takes {source.size:,} bytes",
                limit="header_bytes",
                actual=source.size,
            )
        listed = shard_index.parse(source.path, bytes(read_all(source.content)), self.limits)
        return of_index(source.path.parent, source.path.name, listed)

    def set(self, folder: Path, numbered: ShardSet) -> Checkpoint:
        """A complete set of *numbered* shards without an index, as one checkpoint."""
        paths = {name: folder / name for name in numbered.names.values()}
        return merge_shards.unlisted(
            folder, numbered.pattern, self._all(folder, paths), self.limits
        )

    def scanned(self, source: Source) -> Checkpoint:
        """What a format makes of *source*."""
        files = () if source.is_folder else (SourceFile.of(source.path),)
        found = self.format or registry.recognise(source)
        _LOG.debug("%s: read as %s", shown_path(source.path), found.name)
        checkpoint = registry.scan(found, source)
        return replace(checkpoint, files=checkpoint.files or files, format=found.name)

    def source(self, path: Path) -> Source:
        """The regular file *path*, expanded if it is compressed."""
        _check_regular(path)
        source = Source.file(path, self.limits, self.scratch)
        codec = registry.codec_of(source)
        if codec is None:
            return source
        content = expansion(source.content, codec, self.limits, self.scratch)
        return Source(path, content, limits=self.limits, scratch=self.scratch)

    def refuse_stale(self, folder: Path, paths: Mapping[str, Path]) -> None:
        """Raise Malformed where an offload.json in *folder* tells of other files than *paths*,
        which it calls as their keys.
        """
        record = record_in(folder, self.limits)
        if record is not None:
            refuse_stale(folder, record, {name: self.source(path) for name, path in paths.items()})

    def _all(self, folder: Path, paths: Mapping[str, Path]) -> dict[str, Checkpoint]:
        scanned = {name: self.file(path) for name, path in paths.items()}
        self.refuse_stale(folder, paths)
        return scanned


def is_folder(path: Path) -> bool:
    """Whether *path* is a folder.

    Raises:
        FormatError: it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _missing(path, error) from None
    return stat.S_ISDIR(mode)


def is_regular(path: Path) -> bool:
    """Whether *path* is a regular file, or a link to one."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _missing(path, error) from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        hint = "copy its content to a file first"
        raise FormatError(path, f"is {kind}, and only files and folders can be read", hint=hint)


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _missing(path: Path, error: OSError | ValueError) -> FormatError:
    if isinstance(error, ValueError):
        return FormatError(path, f"is not a path: {error}", hint="check the path")
    if os.path.islink(path) and not os.path.exists(path):
        target = shown_path(Path(os.readlink(path)))
        return FormatError(
            path,
            f"is a link to {target}, which does not exist",
            hint="finish the download, and try again",
        )
    if isinstance(error, FileNotFoundError) and (hint := path_arguments.looked_for(path)):
        return FormatError(path, f"cannot be read: {error.strerror}", hint=hint)
    return unreadable(path, error)


def _other_shards(path: Path) -> list[str]:
    """The names of the shards beside the one at *path*."""
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return []
    sets = (set(each.names.values()) for each in shard_sets(names))
    mine: set[str] = next((each for each in sets if path.name in each), set())
    return sorted(mine - {path.name})


def _left_shard(path: Path) -> LeftOut:
    nbytes = path.stat().st_size if is_regular(path) else 0
    return LeftOut(path.name, nbytes, "another shard of the model")
