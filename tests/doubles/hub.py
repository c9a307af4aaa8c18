"""A Hugging Face Hub for models on loopback: API, downloads, and faults in both.

Three servers answer, each an origin of its own, as far as clients can tell:

- the Hub, on ``localhost``: the API, small files, and redirects to large ones;
- the CDN, on ``127.0.0.1``: the content of large files, for whoever has a signed address. It
  refuses a request with an ``Authorization`` header, which a client must not send there;
- a third one, on ``127.0.0.2``: a second CDN, which only the fault ``elsewhere`` leads to.

What a client can meet on the real Hub and not here: Xet, compressed answers, renamed repositories,
datasets and spaces, and signatures that expire by themselves.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path, PurePosixPath
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".onnx", ".pkl", ".pt", ".pth", ".safetensors")
"""Suffixes of files that are large files, whatever their size."""
_ERRORS = ("500", "503", "429", "403", "html")
_ROUTES = ("elsewhere", "etag", "no-commit", "no-etag")
_BODIES = ("cut", "corrupt", "short", "endless", "no-range", "wrong-range")
KINDS = (*_ERRORS, *_ROUTES, *_BODIES)
"""Kinds of faults."""

_DATE = "2024-01-01T00:00:00.000Z"
_PIECE = 1 << 20  # bytes that are read, and sent, at a time
_REPO = "([^/]+(?:/[^/]+)??)"
_VERB = "(revision|tree|paths-info|commits|refs)"
_API = re.compile(f"/api/models/{_REPO}(?:/{_VERB}(?:/([^/]+)(/.*)?)?)?")
_RESOLVE = re.compile(f"/{_REPO}/resolve/([^/]+)/(.+)")


@dataclass
class Seen:
    """A request, and what was answered.

    Attributes:
        host: "hub", "cdn" or "third".
        path: target of the request, with its query.
        range: header ``Range``.
        authorization: header ``Authorization``.
        status: status of the answer.
        sent: bytes of the body that were handed to the connection. After a client has gone away,
            some of them were not received.
    """

    method: str
    host: str
    path: str
    range: str | None
    authorization: str | None
    status: int
    sent: int


@dataclass
class Fault:
    """A fault of the Hub, of the CDN, or of what lies between.

    A fault waits for an answer in which it can show: "no-range" for one of a range, "cut" for one
    with a body of more than *after* bytes, "etag" for one about a file.

    Attributes:
        kind: one of:

            - "503", "500", "429" (with ``Retry-After: 0``);
            - "403": the answer of a CDN to an expired signature; of the CDN alone, unless *host*
              says otherwise;
            - "html": 200 with a page, as of a captive portal;
            - "elsewhere": a redirect to the third server, which has the content of all files;
            - "cut": the connection is closed after *after* bytes of the body;
            - "corrupt": a bit of byte *after* of the body is flipped;
            - "short": the body has *after* bytes (half of them, if 0), as ``Content-Length`` says,
              under the ``Content-Range`` of all;
            - "endless": after the body, chunked, zeros come without end;
            - "no-range": 200 and the complete file, where a range was asked for;
            - "wrong-range": 206 with a range that starts elsewhere than the one asked for;
            - "etag": from now on the file has other content of the same size, in listings too;
              the commit stays the same;
            - "no-commit", "no-etag": without the headers of those names.
        match: part of the target of the request.
        host: "hub", "cdn" or "third".
        method: method of the request.
        times: how often the fault still happens; None for ever.
        after: bytes of the body.
    """

    kind: str
    match: str = ""
    host: str | None = None
    method: str | None = None
    times: int | None = 1
    after: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no fault {self.kind!r}")


class Hub:
    """The servers, which run in a ``with`` block. Repositories and faults may change meanwhile.

    The account of *token* may read private and gated repositories; any other token is one of an
    account that may not. As on the real Hub, a gated repository can be listed by everyone.

    A request stands in *seen* before the last byte of its answer is sent, so that who has read an
    answer finds it there.

    Attributes:
        endpoint: address of the Hub.
        cdn: address of the CDN.
        third: address of the third server.
        seen: requests, in the order in which their answers ended.
        sent: bytes of all bodies that were handed to connections so far.
        faults: faults to come. For each request, the first that fits happens.
        delay: seconds before each answer.
        rate: bytes a second of each body; None for no limit.
        page: entries in a page of a listing.
        large: size from which on files are large files (LFS), when they are added.
    """

    def __init__(self, *, token: str = "hf_test") -> None:
        self.token = token
        self.endpoint = self.cdn = self.third = ""
        self.seen: list[Seen] = []
        self.sent = 0
        self.faults: list[Fault] = []
        self.delay = 0.0
        self.rate: int | None = None
        self.page = 1000
        self.large = 64_000
        self._repos: dict[str, _Repo] = {}
        self._addresses: dict[str, tuple[str, str, _File]] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._signed = 0
        self._servers: list[_Server] = []
        self._lock = threading.RLock()
        self._closing = threading.Event()

    def __enter__(self) -> Hub:
        self._servers = [_Server(self, "localhost", "hub"), _Server(self, "127.0.0.1", "cdn")]
        try:
            self._servers.append(_Server(self, "127.0.0.2", "third"))
        except OSError:  # macOS has one loopback address: another port is another origin too
            self._servers.append(_Server(self, "127.0.0.1", "third"))
        self.endpoint, self.cdn, self.third = (server.start() for server in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for server in self._servers:
            server.stop()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit *files*, which are all that the branch *revision* of *repo* holds from now on.

        Content that is a path is read from there in pieces, whenever it is asked for.

        Returns:
            The commit, which is the same for the same files.
        """
        entries = {path: self._file(path, files[path]) for path in sorted(files)}
        listing = "".join(f"{entry.oid} {path}\n" for path, entry in entries.items())
        commit = _sha1(f"{repo}\n{listing}".encode())
        with self._lock:
            known = self._repos.setdefault(repo, _Repo(repo))
            known.private, known.gated = private, gated
            held = known.commits.setdefault(commit, entries)
            known.branches.setdefault(revision, []).append(commit)
            for path, entry in held.items():
                self._addresses[f"/{repo}/{entry.key}/{path}"] = (repo, path, entry)
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a child process that knows no Hub but this one.

        It has no token: huggingface_hub would read one from ``HF_TOKEN``.
        """
        foreign = ("HF_", "HUGGINGFACE", "HUGGING_FACE_", "TRANSFORMERS_")
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        return ours | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def _file(self, path: str, content: bytes | Path) -> _File:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        lfs = size >= self.large or PurePosixPath(path).suffix in WEIGHTS
        file = _File(content, size, lfs)
        if not lfs or isinstance(content, bytes):
            file.digest = file.computed()
        else:
            known = (content, size, content.stat().st_mtime_ns)
            if known not in self._digests:
                self._digests[known] = file.computed()
            file.digest = self._digests[known]
        file.key = file.digest
        return file

    def settle(self) -> None:
        """Wait until all requests that have come are answered, or their clients known to be gone,
        and stand in *seen*.
        """
        deadline = time.monotonic() + 30
        while any(server._open for server in self._servers) and time.monotonic() < deadline:
            time.sleep(0.01)

    def count(self, nbytes: int) -> None:
        """Say that so many more bytes of bodies were handed to connections."""
        with self._lock:
            self.sent += nbytes

    def _record(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def _fault(self, request: _Request, answer: _Answer) -> Fault | None:
        """Take the fault that happens to *answer*."""
        with self._lock:
            for fault in self.faults:
                if fault.times != 0 and _meets(fault, request, answer):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def _signature(self, address: str, serial: str) -> str:
        return f"{serial}.{hmac.digest(b'key', (serial + address).encode(), 'sha256').hex()}"

    def _located(self, origin: str, repo: str, path: str, file: _File) -> str:
        """An address of *file* at *origin*, with a signature that no address had before."""
        with self._lock:
            self._signed += 1
            serial = str(self._signed)
        address = f"/{repo}/{file.key}/{path}"
        return f"{origin}{quote(address)}?sig={self._signature(address, serial)}"


@dataclass
class _File:
    """A file of a commit.

    Attributes:
        lfs: whether the CDN has it.
        digest: sha256 of a large file; what git calls a small one (sha1).
        key: *digest* as it was when the file was added.
        changes: how often it got other content since.
    """

    content: bytes | Path
    size: int
    lfs: bool
    digest: str = ""
    key: str = ""
    changes: int = 0

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        table = bytes(value ^ (self.changes % 256) for value in range(256))
        content = self.content
        with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
            stream.seek(start)
            while start < stop and (piece := stream.read(min(_PIECE, stop - start))):
                start += len(piece)
                yield piece.translate(table) if self.changes else piece

    def computed(self) -> str:
        digest = hashlib.sha256() if self.lfs else hashlib.sha1(b"blob %d\0" % self.size)
        for piece in self.pieces(0, self.size):
            digest.update(piece)
        return digest.hexdigest()

    def change(self) -> None:
        self.changes += 1
        self.digest = self.computed()

    @property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.digest}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        if not self.lfs:
            return self.digest
        return _sha1(b"blob %d\0" % len(self.pointer) + self.pointer)

    @property
    def etag_of_cdn(self) -> str:
        """As on the real CDN, not the sha256."""
        return f'"{hashlib.sha256(self.digest.encode()).hexdigest()[:32]}"'

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"oid": self.digest, "size": self.size, "pointerSize": len(self.pointer)}
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        return entry | ({"lfs": lfs} if self.lfs else {})

    def sibling(self, path: str) -> dict[str, Any]:
        lfs = {"sha256": self.digest, "size": self.size, "pointerSize": len(self.pointer)}
        sibling = {"rfilename": path, "size": self.size, "blobId": self.oid}
        return sibling | ({"lfs": lfs} if self.lfs else {})


@dataclass
class _Repo:
    """A repository: the files of its commits, and the commits of its branches, oldest first."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None

    def entries(self, commit: str) -> dict[str, dict[str, Any]]:
        """Files and folders of *commit*, as listings have them, in the order of their paths."""
        entries = {}
        for path, file in self.commits[commit].items():
            entries[path] = file.entry(path)
            for folder in list(PurePosixPath(path).parents)[:-1]:
                oid = _sha1(f"{commit}{folder}".encode())
                entry = {"type": "directory", "path": str(folder), "size": 0, "oid": oid}
                entries[str(folder)] = entry
        return dict(sorted(entries.items()))


@dataclass(frozen=True)
class _Request:
    """What a client asks for. Names of headers are in lower case."""

    host: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        query = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {name: values[-1] for name, values in query.items()}

    def asks(self, name: str) -> bool:
        return self.query.get(name, "").lower() in {"true", "1"}


@dataclass
class _Answer:
    """What a request is answered, before *start* and *stop* become a body.

    Attributes:
        content: whole body, or the file of which bytes *start* to *stop* are the body.
        file: file that the answer is about, with its path and its repository.
        cut: bytes after which the connection is closed.
        flipped: byte of the body that is not as it was.
        endless: whether the body goes on.
    """

    status: int
    headers: dict[str, str]
    content: _File
    start: int
    stop: int
    file: tuple[str, str, _File] | None = None
    cut: int | None = None
    flipped: int | None = None
    endless: bool = False

    def __len__(self) -> int:
        """Bytes of the body that are sent."""
        return self.stop - self.start if self.cut is None else self.cut

    def pieces(self) -> Iterator[bytes]:
        done = 0
        for piece in self.content.pieces(self.start, self.start + len(self)):
            if self.flipped is not None and done <= self.flipped < done + len(piece):
                changed = bytearray(piece)
                changed[self.flipped - done] ^= 1
                piece = bytes(changed)
            done += len(piece)
            yield piece
        while self.endless:
            yield bytes(1 << 16)


def _text(
    status: int, text: str, kind: str = "text/plain; charset=utf-8", **headers: str
) -> _Answer:
    body = text.encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    file = _File(body, len(body), lfs=False)
    return _Answer(status, {"Content-Type": kind} | named, file, 0, len(body))


def _json(value: object, status: int = 200, **headers: str) -> _Answer:
    return _text(status, json.dumps(value), "application/json; charset=utf-8", **headers)


def _error(status: int, code: str, message: str, **headers: str) -> _Answer:
    named = {"X_Error_Code": code} if code else {}
    return _json({"error": message}, status, X_Error_Message=message, **named, **headers)


def _answered(hub: Hub, request: _Request) -> _Answer:
    """The answer of a Hub, or of a CDN, without faults."""
    if request.host != "hub":
        return _content(hub, request)
    if request.path == "/api/whoami-v2":
        return _whoami(hub, request)
    if found := _API.fullmatch(request.path):
        return _api(hub, request, *(unquote(part or "") for part in found.groups()))
    if found := _RESOLVE.fullmatch(request.path):
        return _resolve(hub, request, *(unquote(part) for part in found.groups()))
    return _error(404, "", "Sorry, we can't find the page you are looking for.")


def _content(hub: Hub, request: _Request) -> _Answer:
    if "authorization" in request.headers:
        message = "Only one auth mechanism allowed"
        return _text(
            400, f"<Error><Code>InvalidArgument</Code><Message>{message}</Message></Error>"
        )
    address = unquote(request.path)
    found = hub._addresses.get(address)
    signature = request.query.get("sig", "")
    if found is None or signature != hub._signature(address, signature.partition(".")[0]):
        return _denied()
    return _ranged(request, found, {"ETag": found[2].etag_of_cdn})


def _denied() -> _Answer:
    return _text(403, "<Error><Code>AccessDenied</Code></Error>", "application/xml")


def _whoami(hub: Hub, request: _Request) -> _Answer:
    if request.headers.get("authorization") != f"Bearer {hub.token}":
        return _error(401, "", "Invalid credentials in Authorization header")
    role = {"accessToken": {"displayName": "test", "role": "read"}}
    return _json({"type": "user", "id": "0", "name": "tester", "orgs": [], "auth": role})


def _found(hub: Hub, request: _Request, name: str, revision: str) -> tuple[_Repo, str] | _Answer:
    """The repository and the commit, or why the client gets none."""
    repo = hub._repos.get(name)
    if repo is None:
        return _error(404, "RepoNotFound", "Repository not found")
    if repo.private and request.headers.get("authorization") != f"Bearer {hub.token}":
        return _error(401, "RepoNotFound", "Invalid username or password.")
    commit = repo.commit(revision)
    if commit is None:
        return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return repo, commit


def _resolve(hub: Hub, request: _Request, name: str, revision: str, path: str) -> _Answer:
    found = _found(hub, request, name, revision)
    if isinstance(found, _Answer):
        return found
    repo, commit = found
    authorization = request.headers.get("authorization")
    if repo.gated and authorization != f"Bearer {hub.token}":
        message = f"Access to model {name} is restricted."
        return _error(401 if authorization is None else 403, "GatedRepo", message)
    file = repo.commits[commit].get(path)
    if file is None:
        return _error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
    if file.lfs:
        return _redirect(hub, hub.cdn, (name, path, file), commit)
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.digest}"'}
    return _ranged(request, (name, path, file), headers)


def _redirect(hub: Hub, origin: str, file: tuple[str, str, _File], commit: str) -> _Answer:
    location = hub._located(origin, *file)
    answer = _text(302, f"Found. Redirecting to {location}", Location=location)
    answer.headers["X-Repo-Commit"] = commit
    answer.headers["X-Linked-Size"] = str(file[2].size)
    answer.headers["X-Linked-ETag"] = f'"{file[2].digest}"'
    answer.file = file
    return answer


def _ranged(request: _Request, about: tuple[str, str, _File], headers: dict[str, str]) -> _Answer:
    """The file, or the range of it that was asked for; several ranges are answered with all."""
    file = about[2]
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    whole = _Answer(200, headers, file, 0, file.size, about)
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    same = request.headers.get("if-range", headers["ETag"]) == headers["ETag"]
    if request.method != "GET" or not same or asked is None or asked[0] == "bytes=-":
        return whole
    first, last = asked.groups()
    start = int(first) if first else max(file.size - int(last), 0)
    stop = min(int(last) + 1, file.size) if first and last else file.size
    if first and last and int(last) < start:
        return whole
    if start >= file.size:
        return _text(416, "", Content_Range=f"bytes */{file.size}")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    return replace(whole, status=206, start=start, stop=stop)


def _api(hub: Hub, request: _Request, name: str, verb: str, revision: str, path: str) -> _Answer:
    found = _found(hub, request, name, revision or "main")
    if isinstance(found, _Answer):
        return found
    repo, commit = found
    if verb == "refs":
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1]}
            for branch, commits in repo.branches.items()
        ]
        return _json({"branches": branches, "converts": [], "tags": []})
    if verb == "commits":
        history = repo.branches.get(revision, [commit])
        rest = {"authors": [{"user": "tester"}], "date": _DATE, "title": "", "message": ""}
        return _json([{"id": each} | rest for each in reversed(history)])
    if verb == "tree":
        return _tree(hub, request, repo, commit, path.strip("/"))
    if verb == "paths-info":
        entries = repo.entries(commit)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return _json([entries[one.strip("/")] for one in wanted if one.strip("/") in entries])
    return _model(request, repo, commit)


def _model(request: _Request, repo: _Repo, commit: str) -> _Answer:
    siblings = [file.sibling(path) for path, file in repo.commits[commit].items()]
    if not request.asks("blobs"):
        siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
    about = {"id": repo.name, "modelId": repo.name, "sha": commit, "lastModified": _DATE}
    gated = "auto" if repo.gated else False
    return _json(
        about | {"private": repo.private, "gated": gated, "tags": [], "siblings": siblings}
    )


def _tree(hub: Hub, request: _Request, repo: _Repo, commit: str, folder: str) -> _Answer:
    entries = repo.entries(commit)
    if folder and entries.get(folder, {}).get("type") != "directory":
        message = f"{folder} does not exist on {commit}"
        return _error(404, "EntryNotFound", message, X_Repo_Commit=commit)
    prefix = f"{folder}/" if folder else ""
    below = [entry for path, entry in entries.items() if path.startswith(prefix)]
    if not request.asks("recursive"):
        below = [entry for entry in below if entry["path"].count("/") == prefix.count("/")]
    if request.asks("expand"):
        last = {"lastCommit": {"id": commit, "title": "", "date": _DATE}}
        below = [entry | last for entry in below]
    start = int(request.query.get("cursor", 0))
    stop = start + hub.page
    answer = _json(below[start:stop])
    if stop < len(below):
        query = urlencode(request.query | {"cursor": str(stop)})
        answer.headers["Link"] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return answer


def _meets(fault: Fault, request: _Request, answer: _Answer) -> bool:
    """Whether *fault* is one of *request*, and can show in *answer*."""
    if fault.host not in {None, request.host} or fault.method not in {None, request.method}:
        return False
    if fault.match not in request.target:
        return False
    has_body = request.method != "HEAD" and answer.status in {200, 206}
    headers = answer.headers
    can: dict[str, bool] = {
        "403": request.host == "cdn" or fault.host is not None,
        "elsewhere": request.host != "third",
        "cut": has_body and len(answer) > fault.after,
        "corrupt": has_body and len(answer) > fault.after,
        "short": has_body and len(answer) > fault.after,
        "endless": has_body,
        "no-range": answer.status == 206,
        "wrong-range": answer.status == 206 and answer.content.size > 1,
        "etag": answer.file is not None,
        "no-commit": "X-Repo-Commit" in headers,
        "no-etag": "ETag" in headers or "X-Linked-ETag" in headers,
    }
    return can.get(fault.kind, True)


def _with_fault(hub: Hub, request: _Request, answer: _Answer, fault: Fault) -> _Answer:
    """The *answer* after *fault* has happened to it, or another."""
    if fault.kind in _INSTEAD:
        return _INSTEAD[fault.kind]()
    match fault.kind:
        case "elsewhere" if answer.file is not None and request.host == "hub":
            return _redirect(hub, hub.third, answer.file, answer.headers["X-Repo-Commit"])
        case "elsewhere":
            return _text(302, "", Location=hub.third + request.target)
        case "etag" if answer.file is not None:
            with hub._lock:
                answer.file[2].change()
            return _answered(hub, request)
        case "cut":
            return replace(answer, cut=fault.after)
        case "corrupt":
            return replace(answer, flipped=fault.after)
        case "short":
            return replace(answer, stop=answer.start + (fault.after or len(answer) // 2))
        case "endless":
            return replace(answer, endless=True)
        case "no-range":
            answer = replace(answer, status=200, start=0, stop=answer.content.size)
            return _without(answer, "Content-Range")
        case "wrong-range":
            return _wrong_range(answer)
        case "no-commit":
            return _without(answer, "X-Repo-Commit")
    return _without(answer, "ETag", "X-Linked-ETag")


_INSTEAD: dict[str, Callable[[], _Answer]] = {
    "500": lambda: _error(500, "", "Internal Error - We're working hard to fix this."),
    "503": lambda: _error(503, "", "Service Unavailable"),
    "429": lambda: _error(429, "", "Too Many Requests", Retry_After="0"),
    "403": _denied,
    "html": lambda: _text(200, "<html><body>Log in to this network.</body></html>", "text/html"),
}


def _without(answer: _Answer, *names: str) -> _Answer:
    headers = {name: value for name, value in answer.headers.items() if name not in names}
    return replace(answer, headers=headers)


def _wrong_range(answer: _Answer) -> _Answer:
    """The range of the same length that starts a byte before, or after where there is none."""
    size = answer.content.size
    by = -1 if answer.start else 1
    start, stop = answer.start + by, min(answer.stop + by, size)
    headers = answer.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return replace(answer, headers=headers, start=start, stop=stop)


class _Server(ThreadingHTTPServer):
    """One of the servers. It closes the connections that are open when it stops."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, host: str, name: str) -> None:
        self.hub = hub
        self.host = host
        self.name = name
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__((host, 0), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer looks up the name of the host too, which can last

    def start(self) -> str:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://{self.host}:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        with self._guard:
            for connection in self._open:
                with suppress(OSError):  # the client has closed it
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else the client has gone away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        hub = self.server.hub
        request = _Request(self.server.name, self.command, self.path, headers, body)
        hub._closing.wait(hub.delay)
        answer = _answered(hub, request)
        fault = hub._fault(request, answer)
        if fault is not None:
            answer = _with_fault(hub, request, answer, fault)
        asked = (request.method, request.host, request.target)
        sender = (headers.get("range"), headers.get("authorization"))
        self._send(answer, Seen(*asked, *sender, answer.status, 0))

    do_HEAD = do_POST = do_GET  # noqa: N815 - http.server looks for these names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass  # Hub.seen has it

    def _send(self, answer: _Answer, seen: Seen) -> None:
        """Send *answer*, and record it as *seen* before its last piece."""
        nbytes = 0 if self.command == "HEAD" else len(answer)
        endless = answer.endless and self.command != "HEAD"
        recorded = False
        self._sent = 0
        try:
            if nbytes == 0 and not endless:
                self.server.hub._record(seen)
                recorded = True
            self._send_headers(answer)
            for piece in self._pieces(answer) if nbytes or endless else ():
                if self._sent + len(piece) == nbytes and not endless:
                    seen.sent = nbytes
                    self.server.hub._record(seen)
                    recorded = True
                self._send_piece(piece, chunked=endless)
        except OSError:  # the client has gone away
            self.close_connection = True
        seen.sent = self._sent
        if not recorded:
            self.server.hub._record(seen)
        if self.command != "HEAD" and self._sent < answer.stop - answer.start:
            self.close_connection = True

    def _send_headers(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.endless:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(answer.stop - answer.start))
        self.end_headers()

    def _pieces(self, answer: _Answer) -> Iterator[bytes]:
        """Pieces of the body, each when it is due."""
        hub = self.server.hub
        began = time.monotonic()
        for piece in answer.pieces():
            while piece:
                rate = hub.rate
                now = piece if rate is None else piece[: max(rate // 20, 1)]
                if rate is not None:
                    due = began + (self._sent + len(now)) / rate
                    hub._closing.wait(max(due - time.monotonic(), 0))
                yield now
                piece = piece[len(now) :]

    def _send_piece(self, piece: bytes, *, chunked: bool) -> None:
        if chunked:
            self.connection.sendall(b"%x\r\n" % len(piece))
        left = memoryview(piece)
        while left:
            count = self.connection.send(left)
            self._sent += count
            self.server.hub.count(count)
            left = left[count:]
        if chunked:
            self.connection.sendall(b"\r\n")


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
