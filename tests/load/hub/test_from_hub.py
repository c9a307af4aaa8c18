"""Models by name from a Hub: the files, the cache and the bits are those that the libraries get,
and whatever strikes on the way, nothing is lost or fetched twice.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hub import Fault, Hub
from shardkit.errors import LoadError, OverBudget
from shardkit.load import from_pretrained
from shardkit.load.hub import download, fetch_ranges, partial_file
from shardkit.load.hub.choose_files import Wanted
from shardkit.load.hub.download import locate
from shardkit.load.hub.fetch_ranges import fetch
from shardkit.load.hub.repository import RemoteFile, Repository
from small_models import llama, logits

transformers: Any = pytest.importorskip("transformers", reason="its models are loaded here")
huggingface_hub: Any = pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
)

NAME = "org/tiny"


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return llama().eval()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> dict[str, bytes]:
    """The files of the model, in several shards, and what else a repository has."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    others = {
        "README.md": b"#",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "original/consolidated.00.pth": b"0" * 100,
        "onnx/model.onnx": b"0" * 100,
        "model.Q4_K.gguf": b"0" * 100,
        "modeling_own.py": b"raise SystemExit",
    }
    return files_of(tmp_path / "saved") | others


def single(saved: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same model with its weights in one torch file."""
    config = {name: saved[name] for name in ("config.json", "generation_config.json")}
    return config | {"pytorch_model.bin": saved["pytorch_model.bin"]}


def tree_of(cache: Path) -> dict[str, str | bytes]:
    """What is in a cache: content of files, targets of links."""
    return {
        path.relative_to(cache).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in cache.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def weight_bytes(hub: Hub) -> int:
    return sum(seen.sent for seen in hub.seen if seen.host != "hub" and seen.method == "GET")


@pytest.mark.parametrize("kind", ["shards", "one .bin"])
@pytest.mark.parametrize("revision", [None, "v1.0", "commit"])
def test_the_cache_is_what_snapshot_download_makes_of_it(
    hub: Hub, saved: dict[str, bytes], model: Any, tmp_path: Path, kind: str, revision: str | None
) -> None:
    files = saved if kind == "shards" else single(saved)
    commit = hub.add(NAME, files)
    hub.add(NAME, files, revision="v1.0")
    revision = commit if revision == "commit" else revision
    ours = from_pretrained(NAME, "disk", revision=revision)
    assert torch.equal(logits(ours), logits(model))
    assert ours.name_or_path == NAME
    repository = tmp_path / "hub" / "models--org--tiny"
    names = [
        path.relative_to(repository / "snapshots" / commit).as_posix()
        for path in (repository / "snapshots" / commit).rglob("*")
        if path.is_file()
    ]
    huggingface_hub.snapshot_download(
        NAME, revision=revision, cache_dir=tmp_path / "theirs", allow_patterns=names
    )
    assert tree_of(tmp_path / "hub") == tree_of(tmp_path / "theirs")
    wanted = {"config.json", "generation_config.json"}
    if kind == "shards":
        wanted |= {name for name in saved if name.startswith("model") and "safetensors" in name}
        wanted |= {"tokenizer.json", "tokenizer_config.json"}
    else:
        wanted |= {"pytorch_model.bin"}
    assert set(names) == wanted


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_a_complete_cache_needs_one_request_for_a_branch_and_none_for_a_commit(
    hub: Hub, saved: dict[str, bytes], model: Any, by: str
) -> None:
    commit = hub.add(NAME, saved)
    revision = commit if by == "commit" else None
    from_pretrained(NAME, "disk", revision=revision)
    before = len(hub.seen)
    ours = from_pretrained(NAME, "disk", revision=revision)
    assert [seen.path for seen in hub.seen[before:]] == (
        [] if by == "commit" else ["/api/models/org/tiny/revision/main"]
    )
    assert torch.equal(logits(ours), logits(model))


def test_a_cache_that_transformers_filled_is_complete(
    hub: Hub, saved: dict[str, bytes], model: Any
) -> None:
    del saved["tokenizer.json"], saved["tokenizer_config.json"]  # which it would not fetch
    hub.add(NAME, saved)
    transformers.AutoModelForCausalLM.from_pretrained(NAME)
    sent = weight_bytes(hub)
    from_pretrained(NAME, "disk")  # which has it listed once
    assert weight_bytes(hub) == sent
    before = len(hub.seen)
    assert torch.equal(logits(from_pretrained(NAME, "disk")), logits(model))
    assert len(hub.seen) - before == 1


def test_a_branch_that_moved_is_downloaded_and_what_is_equal_is_not(
    hub: Hub, saved: dict[str, bytes], model: Any
) -> None:
    hub.add(NAME, saved)
    from_pretrained(NAME, "disk")
    before = weight_bytes(hub)
    hub.add(NAME, saved | {"tokenizer.json": b'{"new": 1}'})
    folder = Path(from_pretrained(NAME, "disk").config._name_or_path)
    assert weight_bytes(hub) == before
    assert str(folder) == NAME


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"max_memory": {"cpu": "10KB"}}, "shards"),
        ({"max_memory": {"cpu": "10KB"}, "dtype": torch.float32}, "one .bin"),
        ({"max_memory": {"cpu": "60KB"}, "offload": "never"}, "shards"),
    ],
)
def test_a_budget_that_is_too_small_is_an_error_before_the_weights(
    hub: Hub, saved: dict[str, bytes], tmp_path: Path, changes: dict[str, Any], options: str
) -> None:
    hub.add(NAME, saved if options == "shards" else single(saved))
    with pytest.raises(OverBudget):
        from_pretrained(NAME, "auto", **changes)
    asked = [seen for seen in hub.seen if seen.host == "cdn"]
    assert all(seen.range == f"bytes=0-{2**15 - 1}" for seen in asked)  # headers
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_a_device_that_is_too_small_is_an_error_before_the_weights(
    hub: Hub, saved: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, saved)
    monkeypatch.setattr("shardkit.load.libraries.hub_folder.free_memory", lambda device: 1000)
    with pytest.raises(OverBudget, match=r"go to 'cpu', which has 1.00 kB free, as the headers"):
        from_pretrained(NAME, "cpu")


def test_what_is_to_come_is_said_before_the_first_weight(
    hub: Hub,
    saved: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(NAME, saved)
    said: list[str] = []

    def fetched(*args: Any, **kwargs: Any) -> None:
        said.extend(record.getMessage() for record in caplog.records)
        fetch(*args, **kwargs)

    monkeypatch.setattr(download, "fetch", fetched)
    with caplog.at_level(logging.INFO, "shardkit"):
        from_pretrained(NAME, {"": "disk", "lm_head": "cpu"}, dtype=torch.float16)
    line = next(line for line in said if line.startswith("org/tiny"))
    assert "downloading" in line
    assert " free; it will fit, as the headers of its weights say: " in line
    assert line.endswith("will stream from disk")


def test_a_full_disk_is_an_error_before_the_weights(
    hub: Hub, saved: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, saved)
    usage = shutil.disk_usage("/")._replace(free=60_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LoadError, match=r"needs .* more in .*, which has 60.0 kB free"):
        from_pretrained(NAME)
    assert not [seen for seen in hub.seen if seen.host == "cdn"]


@dataclass(frozen=True)
class Refusal:
    """What is asked of which Hub, and a pattern of what is said."""

    said: str
    options: Mapping[str, Any] = field(default_factory=dict)
    repository: Mapping[str, Any] | None = field(default_factory=dict)  # None for none
    fault: Fault | None = None


REFUSALS = {
    "no such model": Refusal("there is no model 'org/tiny' at", repository=None),
    "private": Refusal("or it is private.*HF_TOKEN", repository={"private": True}),
    "private, other token": Refusal(
        "or it is private.*the account of the token must have access",
        {"token": "hf_other"},
        {"private": True},
    ),
    "gated": Refusal(
        r"is gated: .*accept them at http://localhost:\d+/org/tiny; run `hf",
        repository={"gated": True},
    ),
    "no such revision": Refusal("has no branch, tag or commit 'v9'", {"revision": "v9"}),
    "no such commit": Refusal("has no branch, tag or commit", {"revision": "f" * 40}),
    "no such variant": Refusal("has no weights.*fp16", {"variant": "fp16"}),
    "no such subfolder": Refusal(
        "has neither config.json nor model_index.json", {"subfolder": "unet"}
    ),
    "offline": Refusal(
        "local_files_only is set; the cache in .* does not have it",
        {"local_files_only": True},
    ),
    "mirror without a commit": Refusal("HF_ENDPOINT", fault=Fault("no-commit", times=None)),
    "mirror without digests": Refusal("HF_ENDPOINT", fault=Fault("no-etag", times=None)),
    "captive portal": Refusal("does not answer as the Hub does", fault=Fault("html", times=None)),
    "broken server": Refusal(
        "6 requests in a row failed, the last with 'status 500'",
        fault=Fault("500", host="cdn", times=None),
    ),
    "no ranges": Refusal("does not support range requests", fault=Fault("no-range", times=None)),
    "other ranges": Refusal(
        "is not the file that the Hub lists: bytes .* was asked for, and the answer is",
        fault=Fault("wrong-range", times=None),
    ),
    "damaged on the way": Refusal(
        "its sha256 is not", fault=Fault("corrupt", host="cdn", times=None, after=40_000)
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_downloaded_is_said_and_leaves_nothing_wrong(
    hub: Hub, saved: dict[str, bytes], model: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", ())
    refusal = REFUSALS[case]
    if refusal.repository is not None:
        hub.add(NAME, saved, **refusal.repository)
    hub.faults += [refusal.fault] if refusal.fault else []
    with pytest.raises(LoadError) as raised:
        from_pretrained(NAME, "disk", **refusal.options)
    assert re.search(refusal.said, f"{raised.value} {raised.value.hint}", re.DOTALL)
    hub.faults.clear()
    hub.add(NAME, saved)
    ours = from_pretrained(NAME, "disk", token=hub.token)
    assert torch.equal(logits(ours), logits(model))


def test_a_file_that_changed_since_it_was_listed_is_refused(
    hub: Hub, saved: dict[str, bytes]
) -> None:
    hub.add(NAME, saved)
    hub.faults.append(Fault("etag", match="model-00002", host="hub", method="HEAD"))
    with pytest.raises(LoadError, match=r"not the file that the Hub lists: it has .* and the dig"):
        from_pretrained(NAME, "disk")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("503", host="cdn", times=3),
        Fault("429", host="cdn", times=3),
        Fault("403", times=2),
        Fault("cut", host="cdn", times=5, after=33_000),
        Fault("short", host="cdn", times=5),
        Fault("endless", host="cdn", times=None),
        Fault("elsewhere", host="cdn", times=None),
        Fault("corrupt", host="cdn", after=10),
    ],
    ids=lambda fault: fault.kind,
)
def test_what_passes_changes_nothing(
    hub: Hub, saved: dict[str, bytes], model: Any, tmp_path: Path, fault: Fault
) -> None:
    hub.add(NAME, single(saved), private=True)
    hub.faults.append(fault)
    if fault.kind == "corrupt":  # of the first of two attempts
        with pytest.raises(LoadError, match="its sha256 is not"):
            from_pretrained(NAME, "disk", token=hub.token)
    ours = from_pretrained(NAME, "disk", token=hub.token)
    assert torch.equal(logits(ours), logits(model))
    assert all(seen.authorization is None for seen in hub.seen if seen.host != "hub")
    assert any(seen.authorization for seen in hub.seen if seen.host == "hub")


@pytest.mark.parametrize("why", ["unreachable", "offline", "gone"])
def test_what_is_in_the_cache_will_do_where_the_hub_cannot_be_asked(
    hub: Hub,
    saved: dict[str, bytes],
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    hub.add(NAME, saved)
    from_pretrained(NAME, "disk")
    if why == "unreachable":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")
    elif why == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.add(NAME, saved, private=True)
    with caplog.at_level(logging.INFO, "shardkit"):
        assert torch.equal(logits(from_pretrained(NAME, "disk")), logits(model))
    assert "; the cache is used" in caplog.text
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--org--tiny"
    next(repository.glob("snapshots/*/model-00001*")).unlink()
    with pytest.raises(LoadError, match=r"does not have it: .*model-00001"):
        from_pretrained(NAME, "disk")


def test_all_is_downloaded_again_where_that_is_asked_for(
    hub: Hub, saved: dict[str, bytes], model: Any, tmp_path: Path
) -> None:
    hub.add(NAME, saved)
    from_pretrained(NAME, "disk")
    before = tree_of(tmp_path / "hub")
    blob = next(path for path in (tmp_path / "hub").rglob("blobs/*") if len(path.name) == 64)
    blob.write_bytes(b"damaged")
    sent = weight_bytes(hub)
    ours = from_pretrained(NAME, "disk", force_download=True)
    assert torch.equal(logits(ours), logits(model))
    assert tree_of(tmp_path / "hub") == before
    assert weight_bytes(hub) - sent >= sum(
        len(content) for name, content in saved.items() if name.endswith(".safetensors")
    )


def test_threads_download_a_file_once(hub: Hub, saved: dict[str, bytes]) -> None:
    files = single(saved)
    hub.add(NAME, files)
    hub.rate = 200_000
    found = [locate(Repository.of(NAME), Wanted()) for _ in range(3)]
    threads = [
        threading.Thread(target=each.fetch) for each in found if isinstance(each, download.Download)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(threads) == 3
    assert weight_bytes(hub) == len(files["pytorch_model.bin"])


PROGRAM = """
import sys
from shardkit.load.hub import partial_file
partial_file.RANGE = 2**20
partial_file.PartialFile.__init__.__defaults__ = (2**20,)
from shardkit.load.hub.choose_files import Wanted
from shardkit.load.hub.download import locate
from shardkit.load.hub.fetch_ranges import fetch
from shardkit.load.hub.repository import RemoteFile, Repository
repository = Repository.of("org/big")
commit = repository.current_commit()
files = repository.files(commit)
fetch(repository, commit, [files[name] for name in sorted(files)], lambda nbytes: None)
"""


def started(hub: Hub, home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=hub.environment(home))


def test_after_kills_no_byte_is_fetched_twice(hub: Hub, tmp_path: Path) -> None:
    files = {f"{number}.bin": os.urandom(3_500_000) for number in range(2)}
    hub.add("org/big", files)
    hub.rate = 2_000_000  # of each body
    total = sum(map(len, files.values()))
    kills = 0
    marks: list[tuple[int, dict[tuple[str, int], int]]] = []
    for share in (0.1, 0.4, 0.7):
        process = started(hub, tmp_path / "home")
        deadline = time.monotonic() + 60
        while present(tmp_path / "home") < share * total and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        hub.settle()
        have = recorded(tmp_path / "home")
        marks.append((len(hub.seen), have))
    assert kills == 3
    process = started(hub, tmp_path / "home")
    assert process.wait() == 0
    ends = [*(mark for mark, _ in marks[1:]), len(hub.seen)]
    for (mark, have), end in zip(marks, ends, strict=True):
        for seen in (seen for seen in hub.seen[mark:end] if seen.host == "cdn"):
            digest = next(part for part in seen.path.split("/") if len(part) == 64)
            start = int(str(seen.range).removeprefix("bytes=").partition("-")[0])
            span = start // 2**20
            assert start >= span * 2**20 + have.get((digest, span), 0)  # asks for nothing it has
    blobs = tmp_path / "home" / "hub" / "models--org--big" / "blobs"
    assert sorted(path.read_bytes() for path in blobs.iterdir()) == sorted(files.values())
    # What is counted as sent and was not received is in the buffers of the connections.
    asked = [ranged(seen.range) for seen in hub.seen if seen.host == "cdn"]
    assert all(asked)
    assert weight_bytes(hub) - total <= 3 * fetch_ranges.CONNECTIONS * 256 * 1024


def present(home: Path) -> int:
    """Bytes that are recorded so far."""
    return sum(recorded(home).values())


def recorded(home: Path) -> dict[tuple[str, int], int]:
    """How many bytes of which range of which file are recorded."""
    found = {}
    for record in home.rglob("*.ranges"):
        content = record.read_bytes()[256:]
        for span in range(len(content) // 8):
            count = int.from_bytes(content[8 * span : 8 * span + 8], "little")
            found[record.name.partition(".")[0], span] = count
    return found


def ranged(text: str | None) -> bool:
    return text is not None and text.startswith("bytes=")


def test_processes_download_a_file_once(hub: Hub, tmp_path: Path) -> None:
    files = {"0.bin": os.urandom(3_000_000)}
    hub.add("org/big", files)
    hub.rate = 2_000_000
    processes = [started(hub, tmp_path / "home") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert weight_bytes(hub) == 3_000_000


def test_what_a_power_failure_took_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    commit = hub.add("org/big", {"0.bin": content})
    repository = Repository.of("org/big")
    file = repository.files(commit)["0.bin"]
    assert file.sha256 is not None
    blobs = repository.folder / "blobs"
    blobs.mkdir(parents=True)
    with partial_file.PartialFile(blobs / file.sha256, file.nbytes) as part, part.open() as handle:
        part.add(0, handle, bytes(500_000))  # claimed, and never on the disk
    counts: list[int] = []
    fetch(repository, commit, [file], counts.append)
    assert (blobs / file.sha256).read_bytes() == content
    assert sum(counts) == file.nbytes


@pytest.mark.parametrize(
    "wrong",
    [
        {"lfs": {"oid": "../../../evil", "size": 1, "pointerSize": 1}},
        {"path": "unet/../../evil.json"},
        {"path": "/etc/evil.json"},
        {"path": "..\\evil.json"},
        {"size": -1},
        {"size": "12"},
    ],
    ids=str,
)
def test_a_file_that_cannot_be_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    made: Any = huggingface_hub.hf_api.RepoFile
    entry = made(**({"path": "0.bin", "size": 1, "oid": "0" * 40} | wrong))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_tree", lambda self, *args, **kwargs: [entry]
    )
    with pytest.raises(LoadError, match="lists a file that cannot be"):
        Repository.of("org/big").files("0" * 40)


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"),
    reason="before huggingface_hub 2.0 the cache does not tell what a commit has",
)
def test_what_other_tools_left_out_comes_too(
    hub: Hub, saved: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, saved)
    for name in saved:
        if name == "config.json" or "safetensors" in name:
            huggingface_hub.hf_hub_download(NAME, name)
    sent = weight_bytes(hub)
    from_pretrained(NAME, "disk")
    assert weight_bytes(hub) == sent
    assert list(tmp_path.glob("hub/*/snapshots/*/generation_config.json"))


def test_weights_that_git_holds_itself_are_loaded(
    hub: Hub, saved: dict[str, bytes], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.WEIGHTS", ())
    hub.add(NAME, saved)
    assert torch.equal(logits(from_pretrained(NAME, "disk")), logits(model))
    assert weight_bytes(hub) == 0


@pytest.mark.parametrize("token", ["hf_secret\n", "", "hf secret", "hf_sécret"])
def test_a_token_that_cannot_be_one_is_refused_and_not_shown(hub: Hub, token: str) -> None:
    with pytest.raises(LoadError, match="token= is not a token") as raised:
        from_pretrained(NAME, token=token)
    assert not token or token.strip() not in f"{raised.value} {raised.value.hint}"
    assert not hub.seen


def test_a_token_that_the_server_repeats_is_not_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise ValueError("hf_secret is not welcome")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    with pytest.raises(LoadError, match="is not welcome") as raised:
        from_pretrained(NAME, token="hf_secret")
    assert "hf_secret" not in str(raised.value)


def test_a_small_file_of_another_length_is_refused(hub: Hub, saved: dict[str, bytes]) -> None:
    commit = hub.add(NAME, saved)
    repository = Repository.of(NAME)
    files = repository.files(commit)
    files["config.json"] = replace(files["config.json"], nbytes=5)
    with pytest.raises(LoadError, match=r"'config.json' of org/tiny has \d+ bytes in the cache, a"):
        download.read(repository, commit, files, "config.json")


def test_a_branch_that_moves_meanwhile_changes_nothing(
    hub: Hub, saved: dict[str, bytes], model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = hub.add(NAME, saved)

    def fetched(*args: Any, **kwargs: Any) -> None:
        fetch(*args, **kwargs)
        hub.add(NAME, saved | {"model.safetensors.index.json": b"{}"})

    monkeypatch.setattr(download, "fetch", fetched)
    assert torch.equal(logits(from_pretrained(NAME, "disk")), logits(model))
    assert (tmp_path / "hub/models--org--tiny/refs/main").read_text() == commit


def test_links_that_could_not_be_made_are_an_error_and_come_with_the_next_call(
    hub: Hub, saved: dict[str, bytes], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, saved)

    def fetched(*args: Any, **kwargs: Any) -> None:
        fetch(*args, **kwargs)
        hub.faults.append(Fault("403", match="/tree/", host="hub", times=None))

    monkeypatch.setattr(download, "fetch", fetched)
    with pytest.raises(LoadError, match="stopped answering before all files"):
        from_pretrained(NAME, "disk")
    hub.faults.clear()
    sent = weight_bytes(hub)
    monkeypatch.setattr(download, "fetch", fetch)
    assert torch.equal(logits(from_pretrained(NAME, "disk")), logits(model))
    assert weight_bytes(hub) == sent


def test_damaged_small_files_are_downloaded_again(
    hub: Hub, saved: dict[str, bytes], model: Any, tmp_path: Path
) -> None:
    hub.add(NAME, saved)
    from_pretrained(NAME, "disk")
    for path in (tmp_path / "hub").rglob("snapshots/*/*.json"):
        path.resolve().write_bytes(b"{")
    with pytest.raises(LoadError):
        from_pretrained(NAME, "disk")
    ours = from_pretrained(NAME, "disk", force_download=True)
    assert torch.equal(logits(ours), logits(model))


def test_random_numbers_are_those_of_a_folder(hub: Hub, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    text = (tmp_path / "bert" / "config.json").read_text()
    text = text.replace("BertModel", "BertForSequenceClassification")
    (tmp_path / "bert" / "config.json").write_text(text)
    hub.add("org/bert", files_of(tmp_path / "bert"))
    heads = []
    for place in (tmp_path / "bert", "org/bert"):
        torch.manual_seed(7)
        heads.append(from_pretrained(place).classifier.weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "a--b/c", "modèle/été", "a/b/c", "-a"])
def test_what_is_no_name_is_a_path(hub: Hub, name: str) -> None:
    with pytest.raises(LoadError, match="is neither a folder nor a model"):
        from_pretrained(name)
    assert not hub.seen


def test_files_of_the_same_content_come_once(hub: Hub) -> None:
    content = os.urandom(200_000)
    commit = hub.add("org/big", {"0.bin": content, "1.bin": content})
    repository = Repository.of("org/big")
    fetch(repository, commit, [*repository.files(commit).values()], lambda nbytes: None)
    assert weight_bytes(hub) == len(content)


def test_what_xet_serves_is_left_to_the_client(
    hub: Hub, saved: dict[str, bytes], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, saved)
    listed = Repository.files

    def with_xet(repository: Repository, commit: str) -> dict[str, RemoteFile]:
        return {
            name: replace(file, has_xet="-00002-of" in name)
            for name, file in listed(repository, commit).items()
        }

    asked: list[str] = []

    def fetched(repository: Any, commit: str, files: Any, *args: Any, **kwargs: Any) -> None:
        asked.extend(file.name for file in files)
        fetch(repository, commit, files, *args, **kwargs)

    monkeypatch.setattr(Repository, "files", with_xet)
    monkeypatch.setattr(download, "_has_xet", lambda: True)
    monkeypatch.setattr(download, "fetch", fetched)
    assert torch.equal(logits(from_pretrained(NAME, "disk")), logits(model))
    assert len(asked) == sum(name.endswith(".safetensors") for name in saved) - 1
    assert not [name for name in asked if "-00002-of" in name]


LOADED = 'from shardkit.load import from_pretrained; from_pretrained("org/tiny", "disk")'
FOUND = """
from shardkit.load.hub.choose_files import Wanted
from shardkit.load.hub.download import Download, locate
from shardkit.load.hub.repository import Repository
found = locate(Repository.of("org/tiny"), Wanted())
print(found.fetch() if isinstance(found, Download) else found)
"""


def test_the_environment_means_what_it_means_to_the_client(
    hub: Hub, saved: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, saved, private=True)
    cache = tmp_path / "elsewhere"
    environment = hub.environment(tmp_path / "home") | {"HF_HUB_CACHE": str(cache)}

    def said(**changes: str) -> tuple[int, str]:
        ran = subprocess.run(
            [sys.executable, "-c", FOUND],
            env=environment | changes,
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.returncode, ran.stdout + ran.stderr

    code, told = said()
    assert code == 1
    assert "or it is private" in told
    code, told = said(HF_TOKEN=hub.token)
    assert code == 0
    assert told.startswith(str(cache / "models--org--tiny" / "snapshots"))
    assert hub.token not in told
    before = len(hub.seen)
    code, told = said(HF_HUB_OFFLINE="1")
    assert (code, len(hub.seen)) == (0, before)


def test_a_terminal_shows_what_comes_and_ctrl_c_says_that_it_stays(
    hub: Hub, saved: dict[str, bytes], tmp_path: Path
) -> None:
    terminals = pytest.importorskip("terminals", reason="it needs a pseudo-terminal")
    hub.add(NAME, single(saved))
    hub.rate = 40_000
    environment = hub.environment(tmp_path / "home")
    ran = terminals.on_a_terminal(
        ["-c", LOADED],
        columns=100,
        cwd=tmp_path,
        ctrl_c_after=b"downloading org/tiny: ",
        environment=environment,
    )
    screen = "\n".join(ran.lines)
    assert ran.code != 0
    assert "org/tiny: downloading 2 of 3 files, " in screen
    assert "KeyboardInterrupt" in screen
    assert "what has come of org/tiny stays; the same call goes on there" in screen
    hub.rate = None
    assert not [path for path in tmp_path.rglob("snapshots/*/*") if path.suffix == ".bin"]
    subprocess.run([sys.executable, "-c", FOUND], env=environment, check=True)
    assert weight_bytes(hub) < 1.5 * len(saved["pytorch_model.bin"])
