"""What the words of a user name: a local path, or a sentence that says what to do instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import shardkit
from repository import ROOT
from shardkit.cli import main
from shardkit.errors import FormatError, PlanError, ShardkitError
from shardkit.sources import path_arguments

TRAINING = ROOT / "fixtures" / "good" / "zip-training.pt"

# What is given as a source, what the sentence says of it, and what the hint says to do.
NOT_READ = {
    "": ("is an empty path", "a variable may be unset"),
    "-": ("'-' is the standard input", "write it to a file"),
    "hf://org/name": ("is a URL", "hf download org/name, and give the folder that this prints"),
    "hf://org/name@v1/a/b.bin": ("is a URL", "hf download org/name a/b.bin --revision v1"),
    "hf://datasets/org/name/x.pt": ("is a URL", "hf download org/name x.pt --repo-type dataset"),
    "hf://": ("is a URL", "hf download ORG/NAME"),
    "https://huggingface.co/org/name": ("is a URL", "hf download org/name,"),
    "https://huggingface.co/org/name/tree/main": ("is a URL", "hf download org/name,"),
    "https://huggingface.co/org/name/tree/main/unet": (
        "is a URL",
        "hf download org/name --include 'unet/*'",
    ),
    "https://huggingface.co/org/name/resolve/v2/model.safetensors": (
        "is a URL",
        "hf download org/name model.safetensors --revision v2",
    ),
    "https://example.com/x%20y.bin?a=b&c": (
        "is a URL",
        "curl -L -o x%20y.bin 'https://example.com/x%20y.bin?a=b&c', and give x%20y.bin",
    ),
    "HTTPS://example.com/x.bin": ("is a URL", "curl -L -o x.bin https://example.com/x.bin"),
    "s3://bucket/models/llama": (
        "is a URL",
        "aws s3 cp --recursive s3://bucket/models/llama llama, and give llama",
    ),
    "s3://bucket/x.bin": ("is a URL", "aws s3 cp s3://bucket/x.bin x.bin, and give x.bin"),
    "gs://bucket/llama": (
        "is a URL",
        "gcloud storage cp --recursive gs://bucket/llama ., and give llama",
    ),
    "s3:/bucket/x.bin": ("is a URL", "aws s3 cp s3://bucket/x.bin x.bin"),  # as Path leaves it
    "file:///tmp/a%20b.pt": ("is a URL", "give its path: '/tmp/a b.pt'"),
    "abfss://box@account.dfs.core.windows.net/x": (
        "is a URL",
        "download it, and give its local path",
    ),
    "what://x": ("is a URL", "download it, and give its local path"),
    "a\0b": ("is not a path: embedded null byte", "check the path"),
    "org/name": ("No such file", "hf download org/name, and give the folder that this prints"),
    "meta-llama/Llama-3.2-1B": ("No such file", "hf download meta-llama/Llama-3.2-1B"),
    "nothing.bin": ("No such file", "check the path"),
    "./org/name/x": ("No such file", "check the path"),
    "/org/name": ("No such file", "check the path"),
}


@pytest.mark.parametrize("location", NOT_READ, ids=ascii)
@pytest.mark.parametrize(
    "do",
    [shardkit.open, shardkit.convert, shardkit.offload_prep, shardkit.verify],
    ids=lambda do: do.__name__,
)
def test_what_is_no_local_path_is_not_read(
    do: object, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    sentence, hint = NOT_READ[location]
    assert callable(do)
    with pytest.raises(ShardkitError) as raised:
        do(location)
    assert sentence in str(raised.value)
    assert hint in (raised.value.command_hint or "")
    assert not list(tmp_path.iterdir())


NOT_WRITTEN = {
    "": ("is an empty path", "a variable may be unset"),
    "-": ("'-' is the standard output", "-o shards"),
    "s3://b/x": ("is a URL", "-o x, and upload that: aws s3 cp --recursive x s3://b/x"),
    "gs://b/x": ("is a URL", "gcloud storage cp --recursive x gs://b/x"),
    "hf://org/name": ("is a URL", "hf upload org/name name"),
    "file:///tmp/x": ("is a URL", "-o /tmp/x"),
    "https://e.com/x": ("is a URL", "-o x, and upload that"),
    "s3:/b/x": ("is a URL", "aws s3 cp --recursive x s3://b/x"),
    "x.pt": (
        "is named like a .pt file",
        "-o x makes a folder of shards, -o x.safetensors one file",
    ),
    "a/x.BIN": ("is named like a .BIN file", "-o a/x makes a folder"),
    "x.ckpt": ("is named like a .ckpt file", "-o x.safetensors"),
    "x.gguf": ("is named like a .gguf file", "-o x.safetensors"),
    "model.safetensors.index.json": ("is named like a .json file", "-o model.safetensors"),
    "x.safetensors.zst": ("is named like a compressed file", "--compress zstd"),
    "/": ("is the root of a file system", "name a folder in it"),
    "//": ("is the root of a file system", "name a folder in it"),
    "/..": ("is the root of a file system", "name a folder in it"),
    "a" * 300: ("cannot be examined: File name too long", "choose another output"),
    "a\0b": ("cannot be examined: ", "choose another output"),
    ".": ("is the working folder", "shards"),
    "..": ("is the working folder", "shards"),
    "a/..": ("is the working folder", "shards"),
    "/dev/null": ("/dev/null is neither a file nor a folder", "choose another output"),
    "/dev/null/x": ("/dev/null is not a folder", None),
}


@pytest.mark.skipif(os.name != "posix", reason="paths as POSIX has them")
@pytest.mark.parametrize("location", NOT_WRITTEN, ids=lambda location: ascii(location[:30]))
@pytest.mark.parametrize(
    "do", [shardkit.convert, shardkit.offload_prep], ids=lambda do: do.__name__
)
def test_what_is_no_output_is_not_made(
    do: object, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence, hint = NOT_WRITTEN[location]
    assert callable(do)
    with pytest.raises(ShardkitError) as raised:
        do(TRAINING, location)
    assert sentence in str(raised.value)
    if hint is not None:
        assert hint in (raised.value.command_hint or "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("location", ["x.pt/", "model-v1.5", "x.bin-shards", "out", "./-", "C:x"])
def test_what_names_a_folder_is_one(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(TRAINING), "-o", location]) == 0
    assert [path.name for path in Path(location).iterdir()] == ["model.safetensors"]


def test_a_folder_that_is_there_may_be_called_like_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.pt").mkdir()
    shardkit.convert(TRAINING, "x.pt")
    assert [path.name for path in Path("x.pt").iterdir()] == ["model.safetensors"]


def test_a_file_may_be_compressed(tmp_path: Path) -> None:
    shardkit.convert(TRAINING, tmp_path / "x.safetensors.zst", compress="zstd")
    assert (tmp_path / "x.safetensors.zst").is_file()


def test_a_local_folder_called_like_a_url_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    Path("s3:", "x.pt").write_bytes(TRAINING.read_bytes())
    assert len(shardkit.open("s3://x.pt")) == len(shardkit.open(Path("s3:/x.pt"))) == 20


def test_a_model_in_the_cache_of_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "hub" / "models--org--name"
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError) as raised:
        shardkit.open("org/name")
    assert (
        raised.value.hint
        == f"it is in the cache of the Hugging Face Hub: give {model / 'snapshots' / 'abc'}"
    )


def test_a_tilde_that_no_shell_has_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pt").write_bytes(TRAINING.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FormatError) as raised:
        shardkit.open("~/x.pt")
    assert str(tmp_path / "x.pt") in (raised.value.hint or "")


def test_a_path_is_left_as_it_is() -> None:
    assert path_arguments.to_read("a/b") == Path("a/b")
    assert path_arguments.to_read(Path("a/b")) == Path("a/b")
    assert path_arguments.to_write("x.safetensors") == Path("x.safetensors")
    with pytest.raises(PlanError):
        path_arguments.to_write(Path("x.pt"))


@pytest.mark.parametrize(
    "name",
    ["there/model", "org/m.safetensors", "org/m.bin", "org/m.pt.zst", "org/.model", "org/m.json"],
)
def test_what_is_called_like_a_file_or_lies_in_a_folder_is_no_model_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(FormatError) as raised:
        shardkit.open(name)
    assert "Hub" not in str(raised.value.hint)
    with pytest.raises(FormatError) as raised:
        shardkit.open("org/name-v1.5")
    assert "Hub" in str(raised.value.hint)
