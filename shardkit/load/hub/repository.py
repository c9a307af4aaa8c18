"""A model on the Hub of Hugging Face: the commit that a revision is, the files of that commit, and
where huggingface_hub keeps them on this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shardkit.errors import LoadError
from shardkit.load.hub.hub_errors import explained
from shardkit.printable import shown

_STEP = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_STEP}(?:/{_STEP})?")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit.

    Attributes:
        name: its path in the repository.
        nbytes: its size.
        sha256: digest of its content, in hex; None for a small file, which git holds itself.
        has_xet: whether hf_xet can fetch it.
    """

    name: str
    nbytes: int
    sha256: str | None
    has_xet: bool = False


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the Hub, as the user asks for it.

    Attributes:
        name: as in ``"bigscience/T0pp"``.
        revision: branch, tag or commit.
        token: what shows who asks: the token itself, True for the one that is stored, False for
            none; None for the one that is stored, if there is one.
        cache: folder of the Hub's cache.
    """

    name: str
    revision: str
    token: str | bool | None
    cache: Path

    @classmethod
    def of(
        cls,
        name: str,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
    ) -> Repository:
        """The repository *name*; the other arguments are those of `from_pretrained`.

        Raises:
            LoadError: the revision or the token cannot be one.
        """
        from huggingface_hub import constants

        if isinstance(token, str) and not _TOKEN.fullmatch(token):  # which is not shown
            raise LoadError(
                "token= is not a token: it is empty, or has spaces, line ends or other characters "
                "that no token has",
                hint="pass it without the end of the line that it was read from",
            )
        named: object = revision
        if not isinstance(named, str | None) or "\0" in (named or ""):
            raise LoadError(
                f"{shown(revision)} is no revision", hint="pass a branch, a tag or a commit"
            )
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        return cls(name, revision or constants.DEFAULT_REVISION, token, cache)

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether *text* can be the name of a repository."""
        return _NAME.fullmatch(text) is not None

    @property
    def folder(self) -> Path:
        """What the cache has of it."""
        from huggingface_hub.file_download import repo_folder_name

        return self.cache / repo_folder_name(repo_id=self.name, repo_type="model")

    @property
    def named_commit(self) -> str | None:
        """The commit, where the revision is one."""
        return self.revision if _COMMIT.fullmatch(self.revision) else None

    @property
    def cached_commit(self) -> str | None:
        """The commit that the revision was when it was last asked for; None if unknown."""
        if self.named_commit:
            return self.named_commit
        try:
            text = (self.folder / "refs" / self.revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if _COMMIT.fullmatch(text) else None

    def current_commit(self) -> str:
        """The commit that the revision is now: one request, and none where it is a commit.

        Raises:
            LoadError: the Hub cannot be asked, or knows no such repository or revision.
        """
        if self.named_commit:
            return self.named_commit
        from huggingface_hub import HfApi, constants

        with self.explained():
            told = HfApi().model_info(
                self.name,
                revision=self.revision,
                token=self.token,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        if told.sha is None or not _COMMIT.fullmatch(told.sha):
            raise LoadError(
                f"{constants.ENDPOINT} does not say which commit {self.revision} of {self.name} is",
                hint="check HF_ENDPOINT: a mirror must answer as the Hub does",
            )
        return told.sha

    def files(self, commit: str) -> dict[str, RemoteFile]:
        """The files of *commit* by their names: one request for each thousand of them.

        Raises:
            LoadError: the Hub cannot be asked.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self.explained():
            entries = HfApi().list_repo_tree(
                self.name, recursive=True, revision=commit, token=self.token
            )
            return {each.path: _told(each) for each in entries if isinstance(each, RepoFile)}

    def note(self, commit: str) -> None:
        """Write down which commit the revision is, as huggingface_hub does.

        Raises:
            OSError: the cache cannot be written.
        """
        if commit in (self.revision, None if self.named_commit else self.cached_commit):
            return
        place = self.folder / "refs" / self.revision
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f"{place.name}.{os.getpid()}.new")
        new.write_text(commit)
        os.replace(new, place)

    def snapshot(self, commit: str) -> Path:
        """The folder of the cache with the files of *commit*."""
        return self.folder / "snapshots" / commit

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what goes wrong with the Hub as a LoadError."""
        from huggingface_hub import get_token

        token = get_token() if self.token in (None, True) else self.token
        with explained(self.name, self.revision, token=str(token or "")):
            yield


def _told(entry: object) -> RemoteFile:
    """A file as the Hub lists it.

    Raises:
        LoadError: its path, size or digest is none: they name files of the cache.
    """
    from huggingface_hub.hf_api import RepoFile

    assert isinstance(entry, RepoFile)
    path: object = entry.path
    size: object = entry.size
    sha256: object = entry.lfs.sha256 if entry.lfs is not None else None
    is_path = (
        isinstance(path, str)
        and not {"", ".", ".."} & {*path.split("/")}
        and not {"\\", "\0"} & {*path}
    )
    is_size = isinstance(size, int) and size >= 0
    is_digest = sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256))
    if not (is_path and is_size and is_digest):
        raise LoadError(
            f"the Hub lists a file that cannot be: {shown(path)} with {shown(size)} bytes and the "
            f"digest {shown(sha256)}",
            hint="check HF_ENDPOINT: a mirror must answer as the Hub does",
        )
    digest = entry.lfs.sha256 if entry.lfs is not None else None
    return RemoteFile(entry.path, entry.size, digest, bool(getattr(entry, "xet_hash", None)))
