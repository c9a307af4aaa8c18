"""A model by its name on the Hub: the folder of the cache that has it, or what is to be downloaded.

locate ──▶ the revision's commit (one request, none where it is a commit)
       ──▶ is all of it in the cache?  yes ──▶ its folder
                                       no ──▶ Download: the files, before a weight has come
Download.stand_in ──▶ a folder with the headers alone, to see whether the model will fit
Download.fetch ──▶ large files by `fetch`, small ones and the links by huggingface_hub
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.errors import LoadError
from shardkit.load.hub.choose_files import Choice, Wanted, choose
from shardkit.load.hub.fetch_ranges import fetch
from shardkit.load.hub.hub_errors import Unreachable
from shardkit.load.hub.partial_file import PartialFile
from shardkit.load.hub.remote_bytes import RemoteBytes
from shardkit.load.hub.repository import RemoteFile, Repository
from shardkit.printable import listed, several, shown, shown_path
from shardkit.sizes import format_size
from shardkit.system.progress import progress

_FETCH = "call without local_files_only, where the Hub can be reached"
_SMALL = 100 * 2**20  # bytes of a file that is read whole before the weights
_LENGTH = 8  # bytes in which a safetensors file says how long its header is
_HEADER = 100_000_000  # bytes that the format allows it
_FIRST = 2**15  # bytes that are asked for first, in which most headers end


@dataclass(frozen=True, slots=True)
class Download:
    """The files of a model that the cache has not, or not all of.

    Attributes:
        repository: where they are.
        commit: of which they are.
        choice: their names.
        files: all files of the commit.
        anew: whether those in the cache are replaced.
    """

    repository: Repository
    commit: str
    choice: Choice
    files: Mapping[str, RemoteFile]
    anew: bool

    @property
    def missing(self) -> list[RemoteFile]:
        """The chosen files that are not complete in the cache."""
        chosen = (self.files[name] for name in (*self.choice.others, *self.choice.weights))
        return [file for file in chosen if self.anew or not self._is_here(file)]

    @property
    def present(self) -> int:
        """Bytes of missing files that an earlier process has left."""
        if self.anew:
            return 0
        blobs = {self._blob(file): file.nbytes for file in self._by_range()}
        return sum(PartialFile.recorded(blob, nbytes) for blob, nbytes in blobs.items())

    def check_room(self) -> str:
        """A sentence on what is to come and where to.

        Raises:
            LoadError: the disk has too little free space for it.
        """
        missing, present = self.missing, self.present
        needed = sum({file.sha256 or file.name: file.nbytes for file in missing}.values()) - present
        place = next(
            each
            for each in (self.repository.folder, *self.repository.folder.parents)
            if each.exists()
        )
        free = shutil.disk_usage(place).free
        if needed > free:
            raise LoadError(
                f"{self.repository.name} needs {format_size(needed)} more in "
                f"{shown_path(self.repository.cache)}, which has {format_size(free)} free",
                hint="free some space, or choose another disk with HF_HOME or cache_dir=",
            )
        here = f", of which {format_size(present)} are here already" if present else ""
        total = len(self.choice.others) + len(self.choice.weights)
        return (
            f"{self.repository.name}: downloading {len(missing)} of {several(total, 'file')}, "
            f"{format_size(needed + present)}{here}, to {shown_path(self.repository.cache)}, "
            f"which has {format_size(free)} free"
        )

    def stand_in(self, folder: Path) -> bool:
        """Write to *folder* what the model can be made from without its weights: the small files,
        and files with the headers of the weights and holes for their data.

        False if some weights are in a format whose header cannot be read by range.

        Raises:
            LoadError: the Hub does not serve them.
        """
        for name in self.choice.others:
            _place(folder / name).write_bytes(read(self.repository, self.commit, self.files, name))
        if not all(name.endswith(".safetensors") for name in self.choice.weights):
            return False
        for name in self.choice.weights:
            with open(_place(folder / name), "wb") as target:
                target.writelines(self._header(self.files[name]))
                target.truncate(self.files[name].nbytes)
        return True

    def fetch(self) -> Path:
        """Download what is missing, and give the folder of the cache that has all.

        Raises:
            LoadError: it cannot be downloaded; what has come stays.
        """
        from huggingface_hub import hf_hub_download, snapshot_download

        repository, by_range = self.repository, self._by_range()
        nbytes = sum({file.sha256: file.nbytes for file in by_range}.values())
        try:
            with progress(f"downloading {repository.name}", nbytes) as bar:
                fetch(repository, self.commit, by_range, bar.add, anew=self.anew)
        except KeyboardInterrupt as stop:
            stop.add_note(f"what has come of {repository.name} stays; the same call goes on there")
            raise
        with repository.explained():
            if self.anew:
                for file in (file for file in self.missing if file not in by_range):
                    hf_hub_download(
                        repository.name,
                        file.name,
                        revision=self.commit,
                        force_download=True,
                        cache_dir=repository.cache,
                        token=repository.token,
                    )
            chosen = [*self.choice.others, *self.choice.weights]
            snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=[_escaped(name) for name in chosen],
                tqdm_class=_silent(),
                cache_dir=repository.cache,
                token=repository.token,
            )
        folder = repository.snapshot(self.commit)
        gone = [name for name in chosen if not (folder / name).is_file()]
        if gone:  # the branch moved between two requests
            raise LoadError(
                f"{shown(repository.revision)} of {repository.name} changed while it was "
                "downloaded",
                hint="call again, or pass the commit as revision=",
            )
        return folder

    def _is_here(self, file: RemoteFile) -> bool:
        return self._local(file) is not None

    def _local(self, file: RemoteFile) -> Path | None:
        """Where the cache has *file*, if it has."""
        pointer = self.repository.snapshot(self.commit) / file.name
        places = [pointer] if file.sha256 is None else [pointer, self._blob(file)]
        return next((place for place in places if place.is_file()), None)

    def _blob(self, file: RemoteFile) -> Path:
        return self.repository.folder / "blobs" / f"{file.sha256}"

    def _by_range(self) -> list[RemoteFile]:
        """The missing files that are downloaded by range, and not by huggingface_hub."""
        return [
            file
            for file in self.missing
            if file.sha256 is not None and file.nbytes and not (file.has_xet and _has_xet())
        ]

    def _header(self, file: RemoteFile) -> list[bytes]:
        """The header of a safetensors file, from its first byte."""
        local = None if self.anew else self._local(file)
        if local is not None:
            with open(local, "rb") as source:
                first = source.read(_LENGTH)
                return [first, source.read(min(int.from_bytes(first, "little"), _HEADER))]
        remote = RemoteBytes(self.repository, self.commit, file, threading.Event())
        first = b"".join(remote.pieces(0, min(_FIRST, file.nbytes)))
        nbytes = _LENGTH + int.from_bytes(first[:_LENGTH], "little")
        if nbytes > min(_HEADER, file.nbytes):
            raise remote.changed("it does not begin as a safetensors file does")
        return [first[:nbytes], *remote.pieces(len(first), max(len(first), nbytes))]


def locate(
    repository: Repository, wanted: Wanted, *, local_only: bool = False, anew: bool = False
) -> Path | Download:
    """The folder of the cache that has what is *wanted* of *repository*, or its download.

    Args:
        repository: the model.
        wanted: which files of it.
        local_only: ask nobody.
        anew: download it, whatever the cache has.

    Raises:
        LoadError: it is not in the cache, and the Hub cannot be asked; or there is no such model,
            or none that can be loaded.
    """
    refused: Unreachable | None = None
    commit = repository.cached_commit
    if not local_only:
        try:
            commit = repository.current_commit()
        except Unreachable as error:
            refused = error
    why = "nothing of it is there"
    if commit is not None and (refused or not anew):
        try:
            return _complete(repository, commit, wanted)
        except LoadError as error:
            why = str(error)
    if local_only or refused or commit is None:
        said = refused or f"{shown(repository.name)} is to be taken from the cache alone"
        raise LoadError(
            f"{said}; the cache in {shown_path(repository.cache)} does not have it: {why}",
            hint=refused.hint if refused else "leave out local_files_only to have it downloaded",
        )
    files = repository.files(commit)
    choice = choose(
        repository.name,
        files.keys(),
        lambda name: read(repository, commit, files, name),
        wanted,
    )
    return Download(repository, commit, choice, files, anew)


def read(repository: Repository, commit: str, files: Mapping[str, RemoteFile], name: str) -> bytes:
    """The content of a small file, which comes into the cache.

    Raises:
        LoadError: it cannot be downloaded, or is not small.
    """
    from huggingface_hub import hf_hub_download

    if files[name].nbytes > _SMALL:
        raise LoadError(
            f"{shown(name)} of {repository.name} takes {format_size(files[name].nbytes)}, and a "
            f"file of its kind at most {format_size(_SMALL)}",
            hint="choose another model",
        )
    with repository.explained():
        path = hf_hub_download(
            repository.name,
            name,
            revision=commit,
            cache_dir=repository.cache,
            token=repository.token,
            tqdm_class=_silent(),
        )
    return Path(path).read_bytes()


def _complete(repository: Repository, commit: str, wanted: Wanted) -> Path:
    """The folder of *commit*, if it has all that is *wanted*.

    Raises:
        LoadError: it has not; the message says what is missing.
    """
    folder = repository.snapshot(commit)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not here:
        raise LoadError("nothing of it is there", hint=_FETCH)

    def content(name: str) -> bytes:
        if name not in here:
            raise LoadError(f"{shown(name)} is missing", hint=_FETCH)
        return (folder / name).read_bytes()

    names = _listed_before(repository, commit) or here
    choice = choose(repository.name, names, content, wanted)
    missing = [name for name in (*choice.others, *choice.weights) if name not in here]
    if missing:
        names_of_them = listed([shown(name) for name in missing])
        raise LoadError(f"missing: {names_of_them}", hint=_FETCH)
    return folder


def _listed_before(repository: Repository, commit: str) -> set[str]:
    """The names of all files of *commit*, as huggingface_hub has noted them down; none if it has
    not.
    """
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # before 2.0 it notes nothing down
        return set()
    try:
        tree = get_cached_repo_tree(repository.name, revision=commit, cache_dir=repository.cache)
    except CachedRepoTreeNotFoundError:
        return set()
    return {file.path for file in tree}


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _escaped(name: str) -> str:
    """A pattern that *name* alone fits."""
    return "".join(f"[{each}]" if each in "*?[" else each for each in name)


def _has_xet() -> bool:
    """Whether huggingface_hub downloads by hf_xet: faster, and anew after a kill."""
    from importlib.util import find_spec

    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _silent() -> Any:  # a class, whose base is untyped
    """A bar that is not drawn."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # not in __all__

    bar: Any = tqdm
    return type("Silent", (bar,), {"__init__": _undrawn})


def _undrawn(bar: Any, *args: object, **kwargs: object) -> None:
    super(type(bar), bar).__init__(*args, **kwargs | {"disable": True})
