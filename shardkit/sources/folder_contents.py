"""The contents of a folder beside the weights that were read: files to copy, and weights left out.

1. A subfolder with weights is a checkpoint of its own: nothing in it or below it is copied.
2. A file is judged by its first bytes, and only where a format needs it by more. The walk is
   bounded in depth, in entries and in files that are opened; anything beyond is judged by its name,
   and a note says so. Links are followed, but not in circles; only regular files are opened.
3. A link that leads out of the folder is not copied, since an untrusted folder could have any file
   of this machine copied into the output. The files of a Hugging Face cache lie in its ``blobs``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from pathlib import Path

from shardkit.errors import FormatError, UnknownFormat
from shardkit.limits import Limits
from shardkit.metadata.manifest import MANIFEST_NAME
from shardkit.metadata.offload_index import OFFLOAD_NAME
from shardkit.metadata.shard_names import is_shard_name
from shardkit.printable import listed, shown, shown_path
from shardkit.sources import registry
from shardkit.sources.foreign.marks import LFS_POINTER
from shardkit.sources.format import Source
from shardkit.sources.weight_file_names import foreign

LARGEST_COMPANION = 50_000_000
_DEEPEST = 8
_MOST_ENTRIES = 100_000
_MOST_OPENED = 1_000
_LOOK = Limits(header_bytes=1 << 20)  # a longer zip directory is weights for all that we ask


class Role(Enum):
    """What a file beside the weights is."""

    COMPANION = auto()
    WEIGHTS = auto()
    FOREIGN_WEIGHTS = auto()
    NOT_FETCHED = auto()
    TOO_LARGE = auto()
    UNREADABLE = auto()
    LISTING = auto()

    @property
    def is_weights(self) -> bool:
        return self in (Role.WEIGHTS, Role.FOREIGN_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Beside:
    """Something in the folder that is not copied.

    Attributes:
        path: relative to the folder; that of a subfolder ends in a slash.
        nbytes: bytes of the file, or of the files with weights in the subfolder.
        role: what it is; of a subfolder, what all weights in it are.
        what: a name for a foreign format, if it is of one.
        count: how many files *path*, then a glob, stands for: those that were not opened.
    """

    path: str
    nbytes: int
    role: Role
    what: str = ""
    count: int = 1

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")


@dataclass(slots=True)
class Surroundings:
    """What a walk through a folder found.

    Attributes:
        companions: the files to be copied.
        beside: what is left where it is, and may matter.
        notes: sentences on what was not looked at.
    """

    companions: list[Path] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def surroundings(folder: Path, read: Iterable[Path]) -> Surroundings:
    """What is in *folder* beside the files *read*, which are the weights."""
    files = frozenset(read)
    walk = _Walk(folder, files, {path.parent for path in files}, tuple(registry.suffixes()))
    walk.top()
    walk.found.companions.sort()
    walk.found.beside.sort(key=lambda each: each.path)
    walk.found.notes.extend(walk.unseen())
    return walk.found


def role_of(path: Path, nbytes: int) -> Role:
    """What the regular file *path* is, judged by its name and its first bytes."""
    if _is_listing(path.name):
        return Role.LISTING
    if nbytes and (claim := _claim(path)) is not None:
        return claim
    if is_shard_name(path.name):
        return Role.NOT_FETCHED
    return Role.TOO_LARGE if nbytes > LARGEST_COMPANION else Role.COMPANION


def holds_weights(source: Source) -> bool:
    """Whether a codec or a format claims *source*, or it is a broken file of one of them."""
    try:
        return registry.codec_of(source) is not None or bool(registry.recognise(source))
    except UnknownFormat as error:
        return error.claimed
    except FormatError:
        return True


def _is_called_weights(name: str) -> bool:
    return name.endswith(tuple(registry.suffixes())) or foreign(name) is not None


def _is_in_a_cache(target: Path) -> bool:
    """Whether *target* is a file of a Hugging Face cache, to which its snapshots hold links."""
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


def _named(names: list[str]) -> str:
    return listed([shown(name) for name in names], most=3)


def _is_listing(name: str) -> bool:
    # A manifest, or a record of blocks, tells of the folder that it lies in, and of no other.
    is_index = name.endswith(".json") and ".index." in name
    return is_index or name in (MANIFEST_NAME, OFFLOAD_NAME)


def _claim(path: Path) -> Role | None:
    """What the content of a file makes it; None if it may be anything."""
    try:
        source = Source.file(path, _LOOK)
        head = source.head
    except FormatError:
        return Role.UNREADABLE
    is_called_so = _is_called_weights(path.name)
    if head.startswith(LFS_POINTER):
        return Role.NOT_FETCHED if is_called_so else None
    # The directory of a zip archive may be long, and need not be read where the name says enough.
    if (head.startswith(b"PK") and is_called_so) or holds_weights(source):
        return Role.WEIGHTS
    return Role.FOREIGN_WEIGHTS if foreign(path.name) else None


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    nbytes: int
    role: Role
    is_opened: bool


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder on the way, with the identities of those around it, so that no circle is entered."""

    path: Path
    around: tuple[tuple[int, int], ...]

    def below(self, path: Path, status: os.stat_result) -> _Folder | None:
        identity = (status.st_dev, status.st_ino)
        if identity in self.around or len(self.around) > _DEEPEST:
            return None
        return _Folder(path, (*self.around, identity))


@dataclass(slots=True)
class _Walk:
    folder: Path
    read: frozenset[Path]
    read_from: set[Path]
    endings: tuple[str, ...]
    found: Surroundings = field(default_factory=Surroundings)
    entries: int = 0
    opened: int = 0
    by_name: int = 0
    closed: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    reals: dict[Path, Path] = field(default_factory=dict)

    def top(self) -> None:
        status = self.folder.stat()
        here = _Folder(self.folder, ((status.st_dev, status.st_ino),))
        self._plain(here, *self._listed(here))

    def unseen(self) -> Iterator[str]:
        """Sentences on what was not looked at."""
        if self.by_name:
            yield f"the folder holds many files: {self.by_name:,} of them were judged by name alone"
        if self.entries >= _MOST_ENTRIES:
            yield (
                f"the folder has more than {_MOST_ENTRIES:,} entries; the others were not examined"
            )
        if self.closed:
            yield f"folders that cannot be read: {_named(self.closed)}"
        if self.dangling:
            yield f"links to files that are missing: {_named(self.dangling)}"
        if self.outside:
            links = listed(self.outside, most=3)
            yield (
                f"not copied, because links lead out of the folder: {links}; replace the links "
                "with the files if they belong to the model"
            )

    def _plain(self, here: _Folder, files: list[_File], folders: list[_Folder]) -> None:
        """Take what is in a folder without weights of its own, or in the one at the top."""
        unopened: dict[tuple[str, Role], list[_File]] = {}
        for file in files:
            if file.role is Role.COMPANION:
                self._companion(file.path)
            elif file.role is not Role.LISTING and file.is_opened:
                what = foreign(file.path.name) or ""
                self.found.beside.append(
                    Beside(self._name(file.path), file.nbytes, file.role, what)
                )
            elif file.role is not Role.LISTING:
                unopened.setdefault((file.path.suffix, file.role), []).append(file)
        for (suffix, role), alike in unopened.items():
            pattern = self._name(here.path / f"*{suffix}")
            nbytes = sum(file.nbytes for file in alike)
            self.found.beside.append(
                Beside(pattern, nbytes, role, foreign(pattern) or "", len(alike))
            )
        for folder in folders:
            self._enter(folder)

    def _companion(self, path: Path) -> None:
        """Have *path* copied, unless it or a folder above it is a link out of the folder."""
        target = path.resolve() if path.is_symlink() else self._real(path.parent) / path.name
        if self._real(self.folder) in target.parents or _is_in_a_cache(target):
            self.found.companions.append(path)
        else:
            self.outside.append(f"{shown(self._name(path))} (to {shown_path(target)})")

    def _real(self, folder: Path) -> Path:
        if folder not in self.reals:
            self.reals[folder] = folder.resolve()
        return self.reals[folder]

    def _enter(self, here: _Folder) -> None:
        files, folders = self._listed(here)
        if any(file.role.is_weights for file in files) or here.path in self.read_from:
            self._checkpoint(here, files, folders)
        else:
            self._plain(here, files, folders)

    def _checkpoint(self, here: _Folder, files: list[_File], folders: list[_Folder]) -> None:
        """Count the weights in a subfolder that is a checkpoint of its own."""
        weights = [file for file in files if file.role.is_weights]
        while folders:
            more, below = self._listed(folders.pop())
            weights += [file for file in more if file.role.is_weights]
            folders += below
        if weights:
            kinds = {(file.role, foreign(file.path.name) or "") for file in weights}
            is_one = len(kinds) == 1 and weights[0].role is Role.FOREIGN_WEIGHTS
            role, what = kinds.pop() if is_one else (Role.WEIGHTS, "")
            nbytes = sum(file.nbytes for file in weights)
            self.found.beside.append(Beside(f"{self._name(here.path)}/", nbytes, role, what))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _listed(self, here: _Folder) -> tuple[list[_File], list[_Folder]]:
        """The files in a folder that were not read, each judged, and the folders in it."""
        regular: list[tuple[Path, int]] = []
        folders: list[_Folder] = []
        for path, status in self._entries(here.path):
            if stat.S_ISDIR(status.st_mode):
                below = here.below(path, status)
                folders += [below] if below else []
            elif stat.S_ISREG(status.st_mode) and path not in self.read:
                regular.append((path, status.st_size))
        called_so = {path for path, _ in regular if self._is_called_weights(path.name)}
        regular.sort(key=lambda each: (each[0] not in called_so, -each[1]))
        return [self._judged(path, nbytes, path in called_so) for path, nbytes in regular], folders

    def _judged(self, path: Path, nbytes: int, is_called_weights: bool) -> _File:
        if self.opened < _MOST_OPENED:
            self.opened += 1
            return _File(path, nbytes, role_of(path, nbytes), True)
        self.by_name += 1
        if _is_listing(path.name):
            role = Role.LISTING
        elif is_called_weights:
            role = Role.FOREIGN_WEIGHTS if foreign(path.name) else Role.WEIGHTS
        else:
            role = Role.TOO_LARGE if nbytes > LARGEST_COMPANION else Role.COMPANION
        return _File(path, nbytes, role, False)

    def _is_called_weights(self, name: str) -> bool:
        return name.endswith(self.endings) or foreign(name) is not None

    def _entries(self, folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            with os.scandir(folder) as entries:
                room = max(0, _MOST_ENTRIES - self.entries)
                visible = (entry for entry in entries if not entry.name.startswith("."))
                found = list(islice(visible, room))
        except OSError:
            self.closed.append(self._name(folder))
            return
        self.entries += len(found)
        for entry in sorted(found, key=lambda each: each.name):
            try:
                yield folder / entry.name, entry.stat()
            except OSError:  # a link to nothing, or it is gone by now
                if entry.is_symlink() and self._is_called_weights(entry.name):
                    self.dangling.append(self._name(folder / entry.name))
