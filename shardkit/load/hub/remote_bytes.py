"""Bytes of a file on the Hub, by range: where it lies, and as many requests as it takes.

A large file is not served by the Hub itself, which redirects to a signed address on another host.
The address is asked for once, and again when it is refused; the token goes to the Hub alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from shardkit.errors import LoadError
from shardkit.load.hub.hub_errors import transport_error
from shardkit.load.hub.repository import RemoteFile, Repository
from shardkit.printable import shown

PATIENCE = 6  # requests in a row that bring no byte, before it ends
PAUSE = 0.5  # seconds after the first of them, and twice as long after each other
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class Stopped(BaseException):
    """Nobody wants the bytes any more."""


class RemoteBytes:
    """A file of a commit, which any number of threads may read."""

    def __init__(
        self, repository: Repository, commit: str, file: RemoteFile, stop: threading.Event
    ) -> None:
        """Send no request yet.

        Args:
            repository: where the file is.
            commit: of which it is.
            file: one that has a digest.
            stop: set when nobody wants the bytes any more.
        """
        self.repository = repository
        self.file = file
        self._commit = commit
        self._stop = stop
        self._address = ""
        self._exclusive = threading.Lock()

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from *start* to *end*, as they come; what ends early goes on from there.

        Raises:
            LoadError: the server does not serve them, or serves another file.
            Stopped: nobody wants them any more.
        """
        vain = 0
        while start < end:
            begun, address, trouble = start, "", "the answer ended early"
            try:
                address = self._found()
                for piece in self._body(address, start, end):
                    if self._stop.is_set():
                        raise Stopped
                    start += len(piece)
                    yield piece
            except _Again as again:
                trouble = str(again)
                if again.is_refused:
                    self._found(outdated=address)
            except transport_error() as error:
                trouble = f"{type(error).__name__}: {error}"
            if start == end:
                return
            vain = 0 if start > begun else vain + 1
            if vain == PATIENCE:
                raise LoadError(
                    f"{self}: {PATIENCE} requests in a row failed, the last with {shown(trouble)}",
                    hint="call again in a while: what has come stays, and it goes on from there",
                )
            if self._stop.wait(PAUSE * 2 ** max(0, vain - 1)):
                raise Stopped

    def changed(self, how: str) -> LoadError:
        """An error that says that the file is not what the Hub lists."""
        return LoadError(
            f"{self} is not the file that the Hub lists: {how}",
            hint="call again; if it stays so, the server or a proxy serves something else",
        )

    def __str__(self) -> str:
        return f"{shown(self.file.name)} of {self.repository.name}"

    def _found(self, outdated: str = "") -> str:
        """Its address, which is asked for again if it is still the *outdated* one."""
        with self._exclusive:
            if self._address in ("", outdated):
                self._address = self._asked()
            return self._address

    def _asked(self) -> str:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        repository, file = self.repository, self.file
        with repository.explained():
            told = get_hf_file_metadata(
                hf_hub_url(repository.name, file.name, revision=self._commit),
                token=repository.token,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                retry_on_errors=True,
            )
        if told.commit_hash is None or told.etag is None or told.size is None:
            raise LoadError(
                f"{constants.ENDPOINT} does not say of which commit, digest and size {self} is",
                hint="check HF_ENDPOINT: a mirror must send X-Repo-Commit, ETag and Content-Length",
            )
        if (told.etag, told.size) != (file.sha256, file.nbytes):
            raise self.changed(
                f"it has {file.nbytes:,} bytes and the digest {file.sha256} there, and "
                f"{told.size:,} and {shown(told.etag)} here"
            )
        return told.location

    def _body(self, address: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from *start* to *end*, or the first of them, by one request.

        Raises:
            _Again: another request may bring them.
            LoadError: the server does not serve ranges, or serves another file.
        """
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # not in __all__

        ours = _origin(address) == _origin(constants.ENDPOINT)
        headers = build_hf_headers(token=self.repository.token if ours else False)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET",
            address,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as answer:
            self._check(answer.status_code, answer.headers.get("Content-Range"), start, end)
            for piece in answer.iter_raw():
                yield piece[: end - start]
                start += len(piece)
                if start >= end:  # whatever else there is, is not of this range
                    return

    def _check(self, status: int, place: str | None, start: int, end: int) -> None:
        """Whether an answer is what was asked for."""
        wanted = f"bytes {start}-{end - 1}/{self.file.nbytes}"
        if status == 206 and place in (None, wanted):
            return
        if status == 200 and (start, end) == (0, self.file.nbytes):
            return
        if status == 200:
            raise LoadError(
                f"the server of {self} does not support range requests, which a download that can "
                "be resumed needs",
                hint="check HF_ENDPOINT and the proxy; or download the model with `hf download`, "
                "and call again",
            )
        if status in _AGAIN:
            raise _Again(f"status {status}")
        if status in (401, 403):
            raise _Again(f"status {status}", is_refused=True)
        told = f"{wanted} was asked for, and the answer is {shown(place)}"
        raise self.changed(told if status == 206 else f"the server answers with status {status}")


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Again(Exception):
    """Another request may bring what is missing.

    Attributes:
        is_refused: whether the address has to be asked for again, as where its signature ended.
    """

    def __init__(self, why: str, *, is_refused: bool = False) -> None:
        super().__init__(why)
        self.is_refused = is_refused
