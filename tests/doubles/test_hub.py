"""The double of the Hugging Face Hub, asked by huggingface_hub in a process of its own, and by
plain requests for its faults.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hub import KINDS, Fault, Hub

needs_client = pytest.mark.skipif(
    find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = bytes(range(256)) * 1000
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/deep/notes.txt": b"notes"}
RESOLVE = "/org/model/resolve/main"
SMALL = f"{RESOLVE}/config.json"
LARGE = f"{RESOLVE}/model.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    complete: bool = True


@dataclass
class Client:
    """Plain requests, which follow no redirect."""

    hub: Hub
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, url: str, *, method: str = "GET", **headers: str) -> Reply:
        parts = urlsplit(url if "://" in url else self.hub.endpoint + url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(method, target, headers=self.headers | headers)
            answer = connection.getresponse()
            try:
                body, complete = answer.read(), True
            except http.client.IncompleteRead as error:
                body, complete = error.partial, False
            return Reply(answer.status, answer.headers, body, complete)
        finally:
            connection.close()

    def location(self, path: str = LARGE) -> str:
        return str(self.get(path, method="HEAD").headers["Location"])


def child(hub: Hub, home: Path, program: str) -> Any:  # Any: what the program says, as JSON
    """What *program* leaves in ``said``, after it has run in a process that knows only *hub*."""
    program = f"import json\nsaid = {{}}\n{program}\nprint(json.dumps(said))\n"
    command = [sys.executable, "-c", program]
    environment = hub.environment(home)
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@needs_client
def test_huggingface_hub_downloads_what_was_added(hub: Hub, tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(WEIGHTS * 20)
    first = hub.add("org/model", {"config.json": b"{}"})
    commit = hub.add("org/model", {**FILES, "big.bin": big})
    hub.add("org/model", {"config.json": b"branch"}, revision="refs/pr/1")
    hub.page = 2
    said = child(
        hub,
        tmp_path / "home",
        """
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
def got(name, **options):
    return Path(hf_hub_download("org/model", name, **options)).read_bytes().hex()
said["one"] = got("sub/deep/notes.txt", token="hf_test")
said["branch"] = got("config.json", revision="refs/pr/1")
folder = Path(snapshot_download("org/model", token="hf_test"))
said["commit"] = folder.name
said["files"] = {p.relative_to(folder).as_posix(): p.read_bytes().hex()
                 for p in folder.rglob("*") if p.is_file()}
api = HfApi()
info = api.model_info("org/model", files_metadata=True)
said["info"] = [info.sha, {s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256]
                           for s in info.siblings}]
said["tree"] = [e.path for e in api.list_repo_tree("org/model", recursive=True)]
said["top"] = [e.path for e in api.list_repo_tree("org/model")]
said["sub"] = [e.path for e in api.list_repo_tree("org/model", "sub/deep", expand=True)]
said["paths"] = [e.path for e in api.get_paths_info("org/model", ["sub", "big.bin", "none"])]
said["commits"] = [c.commit_id for c in api.list_repo_commits("org/model")]
said["refs"] = [b.name for b in api.list_repo_refs("org/model").branches]
said["name"] = api.whoami("hf_test")["name"]
""",
    )
    assert bytes.fromhex(said["one"]) == b"notes"
    assert bytes.fromhex(said["branch"]) == b"branch"
    assert said["commit"] == commit
    files = {name: bytes.fromhex(content) for name, content in said["files"].items()}
    assert files == {**FILES, "big.bin": WEIGHTS * 20}
    sha, siblings = said["info"]
    assert sha == commit
    assert siblings["config.json"] == [len(CONFIG), git_sha1(CONFIG), None]
    size, _, digest = siblings["model.safetensors"]
    assert (size, digest) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert said["tree"] == sorted([*FILES, "big.bin", "sub", "sub/deep"])
    assert said["top"] == ["big.bin", "config.json", "model.safetensors", "sub"]
    assert said["sub"] == ["sub/deep/notes.txt"]
    assert sorted(said["paths"]) == ["big.bin", "sub"]
    assert said["commits"] == [commit, first]
    assert said["refs"] == ["main", "refs/pr/1"]
    assert said["name"] == "tester"
    assert any("cursor=2" in seen.path for seen in hub.seen)
    of_cdn = [seen for seen in hub.seen if seen.host == "cdn"]
    assert sum(seen.sent for seen in of_cdn) == 21 * len(WEIGHTS)
    assert {seen.authorization for seen in of_cdn} == {None}
    assert "Bearer hf_test" in {seen.authorization for seen in hub.seen}


@needs_client
def test_huggingface_hub_raises_the_errors_of_the_real_one(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("org/model", FILES)
    hub.add("org/gated", FILES, gated=True)
    hub.add("org/private", FILES, private=True)
    said = child(
        hub,
        tmp_path / "home",
        """
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
def error(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return type(error).__name__
said["repo"] = error(hf_hub_download, "org/none", "config.json")
said["info"] = error(HfApi().model_info, "org/none")
said["gated"] = error(hf_hub_download, "org/gated", "config.json")
said["refused"] = error(hf_hub_download, "org/gated", "config.json", token="hf_other")
said["listed"] = error(HfApi().model_info, "org/gated")
said["granted"] = error(snapshot_download, "org/gated", token="hf_test")
said["revision"] = error(hf_hub_download, "org/model", "config.json", revision="none")
said["entry"] = error(hf_hub_download, "org/model", "none.json")
said["private"] = error(hf_hub_download, "org/private", "config.json")
said["other"] = error(HfApi().model_info, "org/private", token="hf_other")
said["mine"] = Path(
    hf_hub_download("org/private", "model.safetensors", token="hf_test")
).read_bytes().hex()
""",
    )
    assert bytes.fromhex(said.pop("mine")) == WEIGHTS
    assert said == {
        "repo": "RepositoryNotFoundError",
        "info": "RepositoryNotFoundError",
        "gated": "GatedRepoError",
        "refused": "GatedRepoError",
        "listed": None,
        "granted": None,
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "private": "RepositoryNotFoundError",
        "other": "RepositoryNotFoundError",
    }
    home = tmp_path / "home" / "hub" / "models--org--model" / ".no_exist"
    assert (home / commit / "none.json").exists()


@needs_client
def test_huggingface_hub_tries_again_after_errors_and_a_cut(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    hub.faults = [
        Fault("503", match="/tree/"),
        Fault("429", host="cdn"),
        Fault("cut", match="model.safetensors", after=100_000),
    ]
    said = child(
        hub,
        tmp_path / "home",
        """
from pathlib import Path
from huggingface_hub import snapshot_download
said["bytes"] = (Path(snapshot_download("org/model")) / "model.safetensors").read_bytes().hex()
""",
    )
    assert bytes.fromhex(said["bytes"]) == WEIGHTS
    assert [fault.times for fault in hub.faults] == [0, 0, 0]
    cdn = [(seen.status, seen.sent) for seen in hub.seen if seen.host == "cdn"]
    assert [status for status, _ in cdn[:2]] == [429, 200]
    assert cdn[1][1] == 100_000
    assert len(cdn) == 3


def test_small_files_come_from_the_hub_and_large_ones_from_the_cdn(hub: Hub) -> None:
    commit = hub.add("org/model", FILES)
    client = Client(hub)
    small = client.get(SMALL)
    assert (small.status, small.body) == (200, CONFIG)
    assert small.headers["ETag"] == f'"{git_sha1(CONFIG)}"'
    assert small.headers["X-Repo-Commit"] == commit
    large = client.get(LARGE)
    assert large.status == 302
    assert large.headers["X-Linked-Size"] == str(len(WEIGHTS))
    assert large.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    location = large.headers["Location"]
    assert location.startswith(hub.cdn)
    assert client.get(location).body == WEIGHTS
    assert client.get(location, Authorization="Bearer hf_test").status == 400
    assert client.get(location.partition("?")[0]).status == 403
    assert [seen.status for seen in hub.seen] == [200, 302, 200, 400, 403]
    assert hub.seen[-3].sent == len(WEIGHTS)


@pytest.mark.parametrize(
    ("range_", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=255990-", 255990, 256000), ("bytes=-5", 255995, 256000)],
)
def test_a_range_is_answered_with_it(hub: Hub, range_: str, start: int, stop: int) -> None:
    hub.add("org/model", FILES)
    client = Client(hub)
    reply = client.get(client.location(), Range=range_)
    assert (reply.status, reply.body) == (206, WEIGHTS[start:stop])
    assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(WEIGHTS)}"
    assert hub.seen[-1].range == range_


def test_a_range_behind_the_end_is_refused(hub: Hub) -> None:
    hub.add("org/model", FILES)
    reply = Client(hub).get(SMALL, Range="bytes=100-")
    assert (reply.status, reply.headers["Content-Range"]) == (416, f"bytes */{len(CONFIG)}")


def test_a_connection_serves_several_requests(hub: Hub) -> None:
    hub.add("org/model", FILES)
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=60)
    for path in [LARGE, SMALL, "/api/agent-harnesses", SMALL]:
        connection.request("GET", path)
        socket = connection.sock
        connection.getresponse().read()
        assert connection.sock is socket
    connection.close()
    assert [seen.status for seen in hub.seen] == [302, 200, 404, 200]


def test_a_cut_body_ends_early_under_the_length_of_all(hub: Hub) -> None:
    hub.add("org/model", FILES)
    client = Client(hub)
    hub.faults = [Fault("cut", match="model.safetensors", after=1000)]
    location = client.location()
    cut = client.get(location)
    assert (cut.complete, cut.body) == (False, WEIGHTS[:1000])
    assert cut.headers["Content-Length"] == str(len(WEIGHTS))
    assert (hub.seen[-1].status, hub.seen[-1].sent) == (200, 1000)
    assert client.get(location).body == WEIGHTS


@pytest.mark.parametrize("kind", ["500", "503", "429", "403"])
def test_an_error_comes_once(hub: Hub, kind: str) -> None:
    hub.add("org/model", FILES)
    client = Client(hub)
    location = client.location()
    hub.faults = [Fault(kind)]
    statuses = [client.get(location).status, client.get(location).status]
    assert statuses == [int(kind), 200]


def test_bodies_are_not_what_was_asked_for(hub: Hub) -> None:
    hub.add("org/model", FILES)
    client = Client(hub)
    location = client.location()

    def ranged(kind: str, after: int = 0) -> Reply:
        hub.faults = [Fault(kind, after=after)]
        return client.get(location, Range="bytes=100-199")

    size = len(WEIGHTS)
    reply = ranged("no-range")
    assert (reply.status, reply.body) == (200, WEIGHTS)
    assert "Content-Range" not in reply.headers
    reply = ranged("wrong-range")
    assert (reply.status, reply.body) == (206, WEIGHTS[99:199])
    assert reply.headers["Content-Range"] == f"bytes 99-198/{size}"
    reply = ranged("short")
    assert (reply.status, reply.body, reply.complete) == (206, WEIGHTS[100:150], True)
    assert reply.headers["Content-Range"] == f"bytes 100-199/{size}"
    reply = ranged("corrupt", after=7)
    differing = [i for i in range(100) if reply.body[i] != WEIGHTS[100 + i]]
    assert differing == [7]
    reply = ranged("html")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html")


def test_an_endless_body_stops_when_the_client_leaves(hub: Hub) -> None:
    hub.add("org/model", FILES)
    client = Client(hub)
    location = client.location()
    hub.faults = [Fault("endless")]
    parts = urlsplit(location)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request("GET", f"{parts.path}?{parts.query}")
    answer = connection.getresponse()
    assert answer.read(len(WEIGHTS)) == WEIGHTS
    assert answer.read(1_000_000) == bytes(1_000_000)
    answer.close()
    connection.close()


def test_a_file_changes_with_its_etag_and_keeps_its_size(hub: Hub) -> None:
    hub.add("org/model", FILES)
    client = Client(hub)
    before = client.get(LARGE, method="HEAD")
    location = before.headers["Location"]
    hub.faults = [Fault("etag", host="cdn")]
    replies = [client.get(location) for _ in range(2)]
    assert replies[0].body == replies[1].body != WEIGHTS
    assert len(replies[0].body) == len(WEIGHTS)
    after = client.get(LARGE, method="HEAD")
    assert after.headers["X-Linked-Etag"] == f'"{hashlib.sha256(replies[0].body).hexdigest()}"'
    assert after.headers["X-Repo-Commit"] == before.headers["X-Repo-Commit"]


@pytest.mark.parametrize("path", [SMALL, LARGE])
def test_headers_are_missing(hub: Hub, path: str) -> None:
    hub.add("org/model", FILES)
    hub.faults = [Fault("no-commit"), Fault("no-etag")]
    client = Client(hub)
    assert "X-Repo-Commit" not in client.get(path, method="HEAD").headers
    reply = client.get(path, method="HEAD")
    assert "X-Repo-Commit" in reply.headers
    assert not {"etag", "x-linked-etag"} & {name.lower() for name in reply.headers}


@pytest.mark.parametrize("path", [SMALL, LARGE])
def test_a_redirect_leads_to_a_third_origin(hub: Hub, path: str) -> None:
    hub.add("org/model", FILES)
    hub.faults = [Fault("elsewhere")]
    client = Client(hub, {"Authorization": "Bearer hf_test"})
    location = client.location(path)
    assert location.startswith(hub.third)
    assert client.get(location).status == 400
    assert (hub.seen[-1].host, hub.seen[-1].authorization) == ("third", "Bearer hf_test")
    client.headers.clear()
    assert client.get(location).body == FILES[path.removeprefix(f"{RESOLVE}/")]


def test_a_rate_and_a_delay_slow_answers_down(hub: Hub) -> None:
    hub.add("org/model", FILES)
    hub.delay, hub.rate = 0.05, 1_000_000
    client = Client(hub)
    assert client.get(client.location()).body == WEIGHTS


def test_commits_are_those_of_their_files(hub: Hub) -> None:
    first = hub.add("org/model", FILES)
    second = hub.add("org/model", {"config.json": b"other"})
    assert len(first) == 40
    assert first != second
    assert hub.add("org/model", FILES, revision="v1") == first
    client = Client(hub)
    assert client.get(f"/org/model/resolve/{first}/config.json").body == CONFIG
    assert client.get(SMALL).body == b"other"


def test_a_fault_has_a_kind() -> None:
    assert all(Fault(kind).times == 1 for kind in KINDS)
    with pytest.raises(ValueError, match="there is no fault 'none'"):
        Fault("none")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
