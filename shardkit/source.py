"""Open a path: a file, a compressed file, an index or a folder → `Checkpoint`.

1. Nothing is opened before it is known to be a regular file: a pipe would block for ever. Links are followed, as the caches of
   Hugging Face are made of them.
2. Content decides what a file is. Only an index may also be told by its name.
3. A folder is its index; without one it is the file in it that Hugging Face's loaders take; without one, what a format for
   folders makes of it; and else its one file with weights.
"""

from __future__ import annotations

import gc
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shardkit import index, registry, shards
from shardkit.checkpoint import Checkpoint, SourceFile
from shardkit.diagnosis import never_alone
from shardkit.errors import FormatError, LimitExceeded, Malformed, UnknownFormat, listed, shown, shown_path
from shardkit.expansion import expansion
from shardkit.format import Format, Source
from shardkit.freshness import record_in, refuse_stale
from shardkit.limits import Limits
from shardkit.payload import read_all, unreadable

_INDEX_NAME = re.compile(r".+\.index(\..+)?\.json")
_PREFERRED = ("model.safetensors", "pytorch_model.bin")  # what Hugging Face's loaders take, in their order
_LISTED = 8


def open(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the command line
    limits: Limits = Limits(),
    scratch: Path | None = None,
) -> Checkpoint:
    """Everything that the checkpoint at *path* holds, read from headers alone.

    Args:
        path: a file of any format, compressed or not; an index; or a folder with one of them.
        format: name of the format to read it as; None to recognise it.
        limits: what it may ask for.
        scratch: folder for temporary files, which hold what compressed data expands to; None for the system's.

    Raises:
        FormatError: it cannot be read.
        PlanError: there is no format called *format*.
        PluginError: a plugin that is needed cannot be used.
    """
    opener = _Opener(registry.format_named(format) if format else None, limits, scratch)
    path = Path(path)
    with collector_paused(), failures_told(path):
        return opener.folder(path) if _is_folder(path) else opener.file(path)


@dataclass(frozen=True, slots=True)
class _Opener:
    format: Format | None
    limits: Limits
    scratch: Path | None

    def file(self, path: Path) -> Checkpoint:
        """The checkpoint in a regular file, which may be an index."""
        source = self._source(path)
        return self._indexed(source) if _is_index(source) else self._scanned(source)

    def folder(self, path: Path) -> Checkpoint:
        source = Source.folder(path, self.limits)
        if part := never_alone(source):
            raise part
        if self.format and self.format.sniff(source):
            return self._scanned(source)
        names = [name for name in source.names or () if not name.startswith(".")]
        indexes = [name for name in names if _INDEX_NAME.fullmatch(name)]
        if indexes:
            chosen = _chosen_index(path, indexes)
            return _with_note(self._indexed(self._source(path / chosen)), chosen, indexes)
        if self.format is None and not set(names).intersection(_PREFERRED) and _is_of_a_folder_format(source):
            return self._scanned(source)
        weights = [name for name in names if _is_regular(path / name) and self._may_hold_weights(path / name)]
        if len(weights) > 1:
            return self._one_of(path, weights)
        if weights:
            self._refuse_stale(path, {_expanded(name): path / name for name in weights})
            return self.file(path / weights[0])
        return self._by_folder_format(source, names)

    def _one_of(self, folder: Path, names: Sequence[str]) -> Checkpoint:
        """The file that Hugging Face would take, or else the only one of *names* that holds a tensor."""
        for preferred in _PREFERRED:
            if preferred in names:
                others = [name for name in names if name in _PREFERRED]
                return _with_note(self.file(folder / preferred), preferred, others)
        checkpoints = [self.file(folder / name) for name in names[:_LISTED]]
        bearing = [each for each in checkpoints if each.tensors or any(other.is_weight for other in each.others)]
        if len(bearing) == 1 and len(checkpoints) == len(names):
            return bearing[0]
        raise UnknownFormat(
            folder,
            f"holds {len(names)} files with weights and no index that joins them: {_listed(names)}",
            hint=f"give one of them, as in {folder / names[0]}; if they are shards of one model, fetch its *.index.json",
        )

    def _by_folder_format(self, source: Source, names: Sequence[str]) -> Checkpoint:
        try:
            registry.recognise(source)
            return self._scanned(source)
        except UnknownFormat as error:
            if error.claimed:
                raise
            unknown = error
        endings = tuple(registry.suffixes())
        for name in names:
            if name.endswith(endings) and not (source.path / name).is_dir():
                self.file(source.path / name)  # says what is wrong with it
        raise unknown

    def _may_hold_weights(self, path: Path) -> bool:
        """Whether a format or codec claims the file, or it is a broken one of theirs."""
        try:
            source = Source.file(path, self.limits)
            return registry.codec_of(source) is not None or bool(registry.recognise(source))
        except UnknownFormat as error:
            return error.claimed
        except FormatError:
            return True

    def _indexed(self, source: Source) -> Checkpoint:
        if source.size > self.limits.header_bytes:
            raise LimitExceeded(source.path, f"the index takes {source.size:,} bytes", limit="header_bytes", actual=source.size)
        file = SourceFile.of(source.path)
        listed = index.parse(source.path, bytes(read_all(source.content)), self.limits)
        paths = {name: _stored(source.path.parent / name) for name in listed.shards}
        _check_present(source.path, paths)
        scanned = {name: self._scanned(self._source(path)) for name, path in paths.items()}
        self._refuse_stale(source.path.parent, paths)
        joined = shards.joined(source.path, listed, scanned, self.limits)
        return replace(joined, files=(file, *joined.files))

    def _refuse_stale(self, folder: Path, paths: Mapping[str, Path]) -> None:
        """Raise Malformed where an offload.json in *folder* tells of other files than *paths*, which it calls as their keys."""
        record = record_in(folder, self.limits)
        if record is not None:
            refuse_stale(folder, record, {name: self._source(path) for name, path in paths.items()})

    def _scanned(self, source: Source) -> Checkpoint:
        files = () if source.is_folder else (SourceFile.of(source.path),)
        found = self.format or registry.recognise(source)
        checkpoint = registry.scan(found, source)
        return replace(checkpoint, files=checkpoint.files or files, format=found.name)

    def _source(self, path: Path) -> Source:
        """The regular file *path*, expanded if it is compressed."""
        _check_regular(path)
        source = Source.file(path, self.limits, self.scratch)
        codec = registry.codec_of(source)
        if codec is None:
            return source
        content = expansion(source.content, codec, self.limits, self.scratch)
        return Source(path, content, limits=self.limits, scratch=self.scratch)


def _is_folder(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _missing(path, error) from None
    return stat.S_ISDIR(mode)


def _is_regular(path: Path) -> bool:
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
        raise FormatError(path, f"is {kind}, and only files and folders can be read", hint="copy what it gives to a file first")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _missing(path: Path, error: OSError | ValueError) -> FormatError:
    if isinstance(error, ValueError):
        return FormatError(path, f"is no path: {error}", hint="check the path")
    if os.path.islink(path) and not os.path.exists(path):
        target = shown_path(Path(os.readlink(path)))
        return FormatError(path, f"is a link to {target}, which is not there", hint="finish the download, and try again")
    return unreadable(path, error)


def _is_index(source: Source) -> bool:
    if _INDEX_NAME.fullmatch(source.path.name.removesuffix(".zst")):
        return True
    head = source.head.lstrip()
    return head.startswith(b"{") and b'"weight_map"' in head


def _chosen_index(folder: Path, names: Sequence[str]) -> str:
    safe, pickled = ([name for name in names if kind in name] for kind in (".safetensors.", ".bin."))
    preferred = safe or pickled or names
    if len(preferred) > 1:
        hint = f"give one of them, as in {folder / preferred[0]}"
        raise UnknownFormat(folder, f"holds {len(preferred)} indexes: {_listed(preferred)}", hint=hint)
    return preferred[0]


def _is_of_a_folder_format(source: Source) -> bool:
    """Whether a format claims the folder *source* as a whole; what lies in it may look like anything.

    Raises:
        UnknownFormat: several do.
    """
    try:
        return bool(registry.recognise(source))
    except UnknownFormat as error:
        if error.claimed:
            raise
        return False


def _stored(path: Path) -> Path:
    """*path*; or where it lies compressed, if it is not there itself."""
    beside = (path.with_name(path.name + suffix) for suffix in registry.codec_suffixes())
    return path if path.exists() else next((each for each in beside if each.exists()), path)


def _expanded(name: str) -> str:
    """What the file called *name* is called once it is expanded."""
    return next((name.removesuffix(suffix) for suffix in registry.codec_suffixes() if name.endswith(suffix)), name)


def _check_present(path: Path, paths: Mapping[str, Path]) -> None:
    missing = [name for name, file in paths.items() if not file.exists()]
    if missing:
        raise Malformed(
            path,
            f"{len(missing)} of the {len(paths)} files that it lists are not there: {_listed(missing)}",
            hint="finish the download: the checkpoint is not whole",
        )


def _with_note(checkpoint: Checkpoint, chosen: str, found: Sequence[str]) -> Checkpoint:
    others = [name for name in found if name != chosen]
    if not others:
        return checkpoint
    return replace(checkpoint, notes=(f"{shown(chosen)} was read, and not {_listed(others)} beside it", *checkpoint.notes))


def _listed(names: Sequence[str]) -> str:
    return listed([shown(name) for name in names], most=_LISTED)


@contextmanager
def failures_told(path: Path) -> Iterator[None]:
    """Say of *path* what the system says, in passing, of it or of what lies beside it.

    Raises:
        FormatError: something could not be looked at.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector of cycles from walking, again and again, the many small objects of a scan, none of which is garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
