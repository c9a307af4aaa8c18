"""A model by its name on the Hub: the folder of the cache that has it, or what is to be downloaded.

locate ──▶ the revision's commit (one request, none where it is a commit)
       ──▶ is all of it in the cache?  yes ──▶ its folder
                                       no ──▶ Download: the files, before a weight has come
Download.stand_in ──▶ a folder with the headers alone, to see whether the model will fit
Download.fetch ──▶ large files by `fetch`, small ones and the links by huggingface_hub
"""

from __future__ import annotations

import glob
import json
import logging
import shutil
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.errors import LoadError
from shardkit.limits import Limits
from shardkit.load.hub.choose_files import Choice, Wanted, choose
from shardkit.load.hub.fetch_ranges import fetch
from shardkit.load.hub.hub_errors import Unreachable
from shardkit.load.hub.partial_file import PartialFile
from shardkit.load.hub.remote_bytes import RemoteBytes
from shardkit.load.hub.repository import RemoteFile, Repository
from shardkit.metadata.safetensors_header import LENGTH_NBYTES, json_nbytes
from shardkit.printable import listed, several, shown, shown_path
from shardkit.sizes import format_size
from shardkit.system.progress import progress

_LOG = logging.getLogger("shardkit")
_FETCH = "call without local_files_only, where the Hub can be reached"
_WEIGHTS = (".safetensors", ".bin")
_SMALL = 100 * 2**20  # bytes of a file that is read whole before the weights
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
            FormatError: a file does not begin as a safetensors file does.
            LoadError: the Hub does not serve them.
        """
        for name in self.choice.others:
            _place(folder / name).write_bytes(self._read(name))
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
        chosen = [*self.choice.others, *self.choice.weights]
        has_bars = any(file.has_xet for file in self.missing if file not in by_range)
        with repository.explained():
            for file in (file for file in self.missing if self.anew and file not in by_range):
                hf_hub_download(
                    repository.name,
                    file.name,
                    revision=self.commit,
                    force_download=True,
                    cache_dir=repository.cache,
                    token=repository.token,
                )
            snapshot_download(
                repository.name,
                revision=self.commit,
                allow_patterns=[glob.escape(name) for name in chosen],
                tqdm_class=None if has_bars else _silent(),
                cache_dir=repository.cache,
                token=repository.token,
            )
            repository.note(self.commit)
        folder = repository.snapshot(self.commit)
        # Where the Hub fails meanwhile, `snapshot_download` gives what is there without a word.
        absent = [shown(name) for name in chosen if not (folder / name).is_file()]
        if absent:
            raise LoadError(
                f"the Hub stopped answering before all files of {repository.name} were in place; "
                f"missing: {listed(absent)}",
                hint="call again: what has come is kept",
            )
        return folder

    def _read(self, name: str) -> bytes:
        return read(self.repository, self.commit, self.files, name, anew=self.anew)

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
        if local is None and file.sha256 is None:
            return [self._read(file.name)]

        def bytes_of(start: int, end: int) -> bytes:
            if local is None:
                return b"".join(remote.pieces(start, end))
            with open(local, "rb") as source:
                source.seek(start)
                return source.read(end - start)

        remote = RemoteBytes(self.repository, self.commit, file, threading.Event())
        first = bytes_of(0, min(_FIRST, file.nbytes))
        place = Path(self.repository.name, file.name)
        nbytes = LENGTH_NBYTES + json_nbytes(place, first[:LENGTH_NBYTES], file.nbytes, Limits())
        return [first[:nbytes], bytes_of(len(first), max(len(first), nbytes))]


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
    commit = repository.cached_commit
    refused: Unreachable | None = None
    if not local_only:
        try:
            commit = repository.current_commit()
            if not anew:
                with suppress(LoadError):
                    return _complete(repository, commit, wanted, can_ask=True)
            return _to_come(repository, commit, wanted, anew=anew)
        except Unreachable as error:
            refused = error
    is_known = repository.folder.is_dir()
    why = (
        f"revision {shown(repository.revision)} is not complete there"
        if is_known
        else "it has no file of it"
    )
    if commit is not None:
        try:
            folder = _complete(repository, commit, wanted, can_ask=False)
            if refused:
                _LOG.info("%s; the cache is used", refused)
            return folder
        except LoadError as error:
            why = str(error)
    said = (
        refused
        or f"{shown(repository.name)} may only come from the cache, since local_files_only is set"
    )
    raise LoadError(
        f"{said}; the cache in {shown_path(repository.cache)} does not have it: {why}",
        hint=refused.hint if refused else "leave out local_files_only to have it downloaded",
    )


def _to_come(repository: Repository, commit: str, wanted: Wanted, *, anew: bool) -> Download:
    """The download of what is *wanted* of *commit*.

    Raises:
        LoadError: the Hub cannot be asked; or there is no model that can be loaded.
    """
    files = repository.files(commit)
    choice = choose(
        repository.name,
        files.keys(),
        lambda name: read(repository, commit, files, name, anew=anew),
        wanted,
    )
    return Download(repository, commit, choice, files, anew)


def read(
    repository: Repository,
    commit: str,
    files: Mapping[str, RemoteFile],
    name: str,
    *,
    anew: bool = False,
) -> bytes:
    """The content of a small file, which comes into the cache.

    Args:
        repository: where it is.
        commit: of which it is.
        files: all files of the commit.
        name: of the file.
        anew: download it also if the cache has it.

    Raises:
        LoadError: it cannot be downloaded, or is not small, or not as long as is listed.
    """
    from huggingface_hub import hf_hub_download

    nbytes = files[name].nbytes
    if nbytes > _SMALL:
        raise LoadError(
            f"{shown(name)} of {repository.name} takes {format_size(nbytes)}, and a file of its "
            f"kind at most {format_size(_SMALL)}",
            hint="choose another model",
        )
    with repository.explained():
        path = Path(
            hf_hub_download(
                repository.name,
                name,
                revision=commit,
                force_download=anew,
                cache_dir=repository.cache,
                token=repository.token,
                tqdm_class=_silent(),
            )
        )
    found = path.stat().st_size
    if found != nbytes:
        raise LoadError(
            f"{shown(name)} of {repository.name} has {found:,} bytes in the cache, and "
            f"{nbytes:,} on the Hub",
            hint="call with force_download=True; if it stays so, the server serves something else",
        )
    return path.read_bytes()


def _complete(repository: Repository, commit: str, wanted: Wanted, *, can_ask: bool) -> Path:
    """The folder of *commit*, if it has all that is *wanted*.

    The listing of the commit, which huggingface_hub keeps once a download is complete, tells what
    that is. If it has kept none and the Hub cannot be asked, the files that are there decide.

    Raises:
        LoadError: it has not; the message says what is missing.
    """
    folder = repository.snapshot(commit)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not here:
        raise LoadError("it has no file of it", hint=_FETCH)

    def content(name: str) -> bytes:
        if name not in here:
            raise LoadError(f"{shown(name)} is missing", hint=_FETCH)
        return (folder / name).read_bytes()

    listing = _listed_before(repository, commit)
    if listing is None and can_ask and _keeps_listings():
        raise LoadError("no complete download has ended", hint=_FETCH)
    choice = choose(repository.name, here if listing is None else listing, content, wanted)
    missing = [name for name in (*choice.others, *choice.weights) if name not in here]
    if listing is None and choice.kind == "pipeline":
        missing += _parts_missing(json.loads(content(_index_of(wanted))), here, wanted)
    if missing:
        names = listed([shown(name) for name in missing])
        raise LoadError(f"missing: {names}", hint=_FETCH)
    return folder


def _index_of(wanted: Wanted) -> str:
    return f"{wanted.subfolder}/model_index.json".lstrip("/")


def _parts_missing(index: Mapping[str, object], here: Collection[str], wanted: Wanted) -> list[str]:
    """The folders of the parts of a pipeline that are not *here*, or have no weights there."""
    missing = []
    for name, value in index.items():
        match value:
            case [str(), str()] if name[:1] != "_" and name not in wanted.given:
                start = f"{wanted.subfolder}/{name}/".lstrip("/")
                inside = {each for each in here if each.startswith(start)}
                is_model = f"{start}config.json" in inside
                if not inside or (is_model and not any(each.endswith(_WEIGHTS) for each in inside)):
                    missing.append(start)
    return missing


def _keeps_listings() -> bool:
    """Whether huggingface_hub notes down which files a commit has; before 2.0 it does not."""
    import huggingface_hub

    return hasattr(huggingface_hub, "get_cached_repo_tree")


def _listed_before(repository: Repository, commit: str) -> set[str] | None:
    """The names of all files of *commit*, as huggingface_hub has noted them down; None if it has
    not.
    """
    if not _keeps_listings():
        return None
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(repository.name, revision=commit, cache_dir=repository.cache)
    except CachedRepoTreeNotFoundError:
        return None
    return {file.path for file in tree}


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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
