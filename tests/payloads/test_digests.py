"""Digests of what is written, and CRCs of what is read: damage is named, and the manifest is the
same on any day.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import shardkit
from shardkit.cli import main
from shardkit.errors import Malformed, PlanError
from shardkit.metadata.manifest import MANIFEST_NAME
from shardkit.operations.comparison import Comparison
from shardkit.payloads.digests import Sums

ALGORITHMS = ["sha256", "xxh3"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {f"layers.{number}": torch.full((1000,), float(number)) for number in range(6)}
    torch.save(
        {**tensors, "empty": torch.ones(0, 3), "tied": tensors["layers.0"]},
        folder / "pytorch_model.bin",
    )
    return folder


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    shardkit.convert(source, tmp_path / "out", max_shard="9kB", checksum="sha256")
    return tmp_path / "out"


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def found(comparison: Comparison) -> list[tuple[str, str]]:
    return [(difference.name, difference.detail) for difference in comparison.differences]


def manifest_of(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    document: dict[str, dict[str, dict[str, object]]] = json.loads(
        (folder / MANIFEST_NAME).read_text()
    )
    return document


def test_the_digest_of_a_file_is_its_object_id_on_the_hub(out: Path) -> None:
    listed = manifest_of(out)["files"]
    expected = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in files_in(out).items()
        if name != MANIFEST_NAME
    }
    assert {name: file["digest"] for name, file in listed.items()} == expected
    assert len(expected) == 8  # six shards, the index, the config


def test_the_digest_of_a_tensor_is_over_its_bytes_as_stored(out: Path) -> None:
    for name, file in manifest_of(out)["files"].items():
        stored = load_file(out / name) if name.endswith(".safetensors") else {}
        tensors = file.get("tensors", {})
        assert isinstance(tensors, dict)
        digests = {
            tensor: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for tensor, value in stored.items()
        }
        assert {tensor: said["digest"] for tensor, said in tensors.items()} == digests
        content = (out / name).read_bytes()
        places = {tensor: content[said["start"] : said["stop"]] for tensor, said in tensors.items()}
        assert places == {tensor: value.numpy().tobytes() for tensor, value in stored.items()}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_bytes_come_of_any_jobs_engine_and_resumption(
    algorithm: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(
        name: str,
        checksum: str | None = algorithm,
        jobs: int = 1,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        shardkit.convert(
            source,
            tmp_path / name,
            max_shard="9kB",
            jobs=jobs,
            checksum=checksum,
            on_bytes=on_bytes,
        )

    convert("once")
    expected = files_in(tmp_path / "once")
    convert("jobs", jobs=5)
    written = 0

    def interrupt(count: int) -> None:
        nonlocal written
        written += count
        if written > 15_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("resumed", on_bytes=interrupt)
    convert("resumed")
    convert("plain", checksum=None)
    monkeypatch.setattr("shardkit.writing.copier._moves", lambda: iter(()))
    convert("read", checksum=None)
    assert files_in(tmp_path / "jobs") == files_in(tmp_path / "resumed") == expected
    del expected[MANIFEST_NAME]
    assert files_in(tmp_path / "plain") == files_in(tmp_path / "read") == expected


def test_a_manifest_says_nothing_of_when_and_where(source: Path, out: Path, tmp_path: Path) -> None:
    text = (out / MANIFEST_NAME).read_text()
    assert str(tmp_path) not in text
    assert set(json.loads(text)) == {"version", "algorithm", "files"}
    assert shardkit.verify(out).same
    assert "sha256 of 8 files" in shardkit.verify(out).notes[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_flipped_bit_is_named_by_its_tensor_and_bytes(
    algorithm: str, source: Path, tmp_path: Path
) -> None:
    shardkit.convert(source, tmp_path / "out", checksum=algorithm)
    shard = tmp_path / "out" / "model.safetensors"
    place = manifest_of(tmp_path / "out")["files"]["model.safetensors"]["tensors"]
    assert isinstance(place, dict)
    start, stop = place["layers.3"]["start"], place["layers.3"]["stop"]
    flip(shard, start + 17)
    detail = (
        f"bytes [{start:,}, {stop:,}) of 'model.safetensors' do not match the recorded {algorithm}"
    )
    assert found(shardkit.verify(tmp_path / "out")) == [("layers.3", detail)]
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 1


def test_a_flipped_bit_outside_the_tensors_is_found_too(out: Path) -> None:
    flip(out / "model-00001-of-00006.safetensors", 30)
    flip(out / "config.json", 0)
    assert [name for name, _ in found(shardkit.verify(out))] == [
        "model-00001-of-00006.safetensors",
        "config.json",
    ]


def test_what_is_missing_or_cut_off_is_named(out: Path) -> None:
    nbytes = (out / "model-00002-of-00006.safetensors").stat().st_size
    (out / "config.json").unlink()
    os.truncate(out / "model-00002-of-00006.safetensors", 100)
    assert found(shardkit.verify(out)) == [
        ("model-00002-of-00006.safetensors", f"has 100 bytes, and {nbytes:,} were written"),
        ("config.json", "the manifest lists it, but it is missing"),
    ]


def test_a_file_that_was_added_is_nobodys_fault(out: Path) -> None:
    (out / "README.md").write_text("# a model")
    assert shardkit.verify(out).same


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"algorithm": "md5", "files": {}}',
        '{"version": 2}',
        '{"algorithm": "sha256", "files": {"../a": {}}}',
        '{"algorithm": "sha256", "files": {"a": {"nbytes": 1}}}',
        (
            '{"algorithm": "sha256", "files": {"a": {"nbytes": 4, "digest": "", "tensors": {"t": '
            '{"start": 2, "stop": 9}}}}}'
        ),
    ],
)
def test_a_manifest_that_is_none_is_a_sentence(content: str, out: Path) -> None:
    (out / MANIFEST_NAME).write_text(content)
    with pytest.raises(Malformed, match="manifest: "):
        shardkit.verify(out)


def test_a_manifest_does_not_come_along_to_another_output(out: Path, tmp_path: Path) -> None:
    shardkit.convert(out, tmp_path / "again")
    assert sorted(os.listdir(tmp_path / "again")) == ["config.json", "model.safetensors"]


def test_an_output_with_a_manifest_is_replaced_by_one_without(source: Path, out: Path) -> None:
    shardkit.convert(source, out, overwrite=True)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]


def damaged(source: Path) -> Path:
    """The zip file of *source*, with one bit of layers.2 flipped."""
    path = source / "pytorch_model.bin"
    flip(path, path.read_bytes().index(torch.full((1000,), 2.0).numpy().tobytes()) + 5)
    return path


def test_a_flipped_bit_in_a_zip_source_is_named(source: Path, tmp_path: Path) -> None:
    path = damaged(source)
    assert [name for name, _ in found(shardkit.verify(path))] == ["layers.2"]
    with pytest.raises(
        Malformed,
        match=r"pytorch_model\.bin: layers\.2: bytes \[[0-9,]+, [0-9,]+\) of .* have the CRC",
    ) as caught:
        shardkit.convert(source, tmp_path / "out", checksum="sha256")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_deflated_member_is_held_against_its_crc_too(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(source / "pytorch_model.bin") as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in archive.namelist():
            target.writestr(zipfile.ZipInfo(name), archive.read(name), zipfile.ZIP_DEFLATED)
    assert shardkit.verify(packed).same
    assert "compared with its CRCs: " in shardkit.verify(packed).notes[0]


def test_what_carries_no_crc_is_said_to_be_unchecked(source: Path, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(100)}, tmp_path / "unsummed.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert "not checked" in shardkit.verify(tmp_path / "unsummed.pt").notes[0]
    report = shardkit.convert(tmp_path / "unsummed.pt", tmp_path / "out", checksum="sha256")
    assert any("not checked" in note for note in report.notes)
    (tmp_path / "out" / MANIFEST_NAME).unlink()
    assert "not checked" in shardkit.verify(tmp_path / "out" / "model.safetensors").notes[0]


def test_one_file_has_no_place_for_a_manifest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no manifest for checksums"):
        shardkit.convert(source, tmp_path / "out.safetensors", checksum="sha256")


def test_an_algorithm_that_cannot_be_computed_is_a_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(PlanError, match="needs xxhash, which is not installed") as caught:
        shardkit.convert(source, tmp_path / "out", checksum="xxh3")
    assert "sha256" in str(caught.value.hint)
    with pytest.raises(PlanError, match="there is no checksum 'md5'"):
        shardkit.convert(source, tmp_path / "out", checksum="md5")


def test_the_command_line_writes_and_checks_a_manifest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(source), "-o", str(out), "--checksum", "xxh3", "--dry-run"]) == 0
    assert "to copy" in capsys.readouterr().out
    assert main(["convert", str(source), "-o", str(out), "--checksum", "xxh3"]) == 0
    assert main(["verify", str(out)]) == 0
    assert "is intact" in capsys.readouterr().out
    flip(out / "model.safetensors", -1)
    assert main(["verify", str(out)]) == 1
    assert "is damaged in 1 place" in capsys.readouterr().out


@given(st.lists(st.integers(0, 50), max_size=8), st.lists(st.integers(1, 40), min_size=1))
def test_runs_are_summed_however_the_bytes_are_cut(lengths: list[int], cuts: list[int]) -> None:
    runs, at = [], 7
    for length in lengths:
        runs.append((at, at + length))
        at += length
    content = bytes(number % 251 for number in range(at + 9))
    sums, seen = Sums("sha256", runs), 0
    while seen < len(content):
        for cut in cuts:
            sums.see(memoryview(content[seen : seen + cut]))
            seen += cut
    whole, digests = sums.ended()
    assert whole == hashlib.sha256(content).hexdigest()
    assert digests == [hashlib.sha256(content[start:stop]).hexdigest() for start, stop in runs]
