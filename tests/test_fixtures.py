"""Every good fixture, opened by shardkit, holds what torch itself reads in it, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest

import shardkit
from repository import FIXTURES
from shardkit.checkpoint.entries import OtherKind, TensorEntry

MANIFEST = json.loads((FIXTURES / "manifest.json").read_text())
CALLS = [name for name in MANIFEST if name.startswith("pickle-calls-")]


def described(entry: TensorEntry) -> dict[str, object]:
    sha256 = hashlib.sha256(entry.read()).hexdigest()
    return {
        "name": entry.name,
        "dtype": entry.dtype.code,
        "shape": list(entry.shape),
        "sha256": sha256,
    }


def by_name(tensors: list[dict[str, object]]) -> dict[object, dict[str, object]]:
    return {tensor["name"]: tensor for tensor in tensors}


def test_the_manifest_and_the_folder_list_the_same_files() -> None:
    assert set(MANIFEST) == {path.name for path in (FIXTURES / "good").iterdir()}


@pytest.mark.parametrize("name", MANIFEST)
def test_a_good_file_holds_what_torch_reads_in_it(name: str) -> None:
    checkpoint = shardkit.open(FIXTURES / "good" / name)
    found = by_name([described(entry) for entry in checkpoint.tensors])
    assert found == by_name(MANIFEST[name]["tensors"])
    assert len(checkpoint.tensors) == len(found)


@pytest.mark.parametrize("name", MANIFEST)
def test_what_is_no_dense_tensor_is_said(name: str) -> None:
    others = shardkit.open(FIXTURES / "good" / name).others
    assert {other.name: str(other.kind) for other in others if other.is_weight} == MANIFEST[name][
        "others"
    ]


@pytest.mark.parametrize(
    "name", [name for name in MANIFEST if (FIXTURES / "good" / name).is_file()]
)
def test_a_file_is_recognised_by_its_content(name: str, tmp_path: Path) -> None:
    copy = shutil.copy(FIXTURES / "good" / name, tmp_path / "model.download")
    assert shardkit.open(copy).format == shardkit.open(FIXTURES / "good" / name).format


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_a_pickle_is_named_and_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = [
        other.reason
        for other in shardkit.open(FIXTURES / "good" / name).others
        if other.kind is OtherKind.CALL
    ]
    assert calls
    assert len(calls) == len(set(calls))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in MANIFEST if name.startswith("pickle-")])
def test_a_frightening_pickle_is_read_at_once(name: str) -> None:
    started = time.perf_counter()
    shardkit.open(FIXTURES / "good" / name)
    assert time.perf_counter() - started < 5  # what is wrong here takes for ever, not six seconds


def test_tied_weights_have_equal_payloads() -> None:
    checkpoint = shardkit.open(FIXTURES / "good" / "zip-shared.pt")
    assert checkpoint["embed"].payload == checkpoint["head"].payload
    assert checkpoint["embed"].payload != checkpoint["copy"].payload
    assert checkpoint["embed"].read() == checkpoint["copy"].read()
