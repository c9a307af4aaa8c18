"""Which files beside the weights come along, and what config.json is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardkit
from shardkit.planning.companions import ModelConfig, companions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save({"weight": torch.ones(4)}, folder / "pytorch_model.bin")
    return folder


def taken(folder: Path) -> list[str]:
    """The names of the companions of what is in *folder*."""
    return [file.name for file in companions(folder, shardkit.open(folder))]


def write(path: Path, content: bytes | str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "LICENSE",
        "modeling_new.py",
        "notes.bin",
        "empty",
    ],
)
def test_a_small_file_at_the_top_comes_along(name: str, source: Path) -> None:
    write(source / name, "" if name == "empty" else "some text")
    assert taken(source) == [name]


def test_so_do_files_in_subfolders_without_weights(source: Path) -> None:
    write(source / "tokenizer" / "vocab.json", "{}")
    write(source / "tokenizer" / "extra" / "merges.txt")
    assert taken(source) == ["tokenizer/extra/merges.txt", "tokenizer/vocab.json"]


def test_a_subfolder_with_weights_is_a_checkpoint_of_its_own(source: Path) -> None:
    write(source / "vae" / "config.json", "{}")
    save_file({"a": torch.ones(2)}, source / "vae" / "diffusion.anything")
    write(source / "vae" / "below" / "readme.md")
    write(source / "scheduler" / "config.json", "{}")
    assert taken(source) == ["scheduler/config.json"]


def test_hidden_files_and_folders_stay(source: Path) -> None:
    write(source / ".gitattributes")
    write(source / ".git" / "config")
    write(source / "sub" / ".cache")
    assert taken(source) == []


def test_weights_of_any_format_and_under_any_name_stay(source: Path) -> None:
    save_file({"a": torch.ones(2)}, source / "adapter.data")
    torch.save({"lr": 0.1}, source / "training_args.bin")
    torch.save({"a": torch.ones(2)}, source / "old.txt", _use_new_zipfile_serialization=False)
    assert taken(source) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.fp16.json",
    ],
)
def test_an_index_stays(name: str, source: Path) -> None:
    write(source / name, json.dumps({"weight_map": {"weight": "pytorch_model.bin"}}))
    assert taken(source) == []


def test_what_is_larger_than_50_mb_stays(source: Path) -> None:
    for name, size in (("large.json", 50_000_001), ("fits.json", 50_000_000)):
        write(source / name)
        os.truncate(source / name, size)
    assert taken(source) == ["fits.json"]


def test_the_links_of_a_hugging_face_cache_are_followed_and_become_files(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "1234"
    write(cache / "blobs" / "1234", '{"a": 1}')
    (snapshot / "text").mkdir(parents=True)
    save_file({"weight": torch.ones(4)}, snapshot / "model.safetensors")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "text" / "config.json").symlink_to("../../../blobs/1234")
    (snapshot / "gone.json").symlink_to("../../blobs/none")
    report = shardkit.convert(snapshot, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "text"]
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    assert report.notes == ()


def test_links_inside_a_folder_are_followed(source: Path, tmp_path: Path) -> None:
    write(source / "text" / "vocab.json")
    (source / "vocab.json").symlink_to("text/vocab.json")
    (tmp_path / "link").symlink_to(source)
    assert taken(source) == taken(tmp_path / "link") == ["text/vocab.json", "vocab.json"]


def test_a_link_out_of_the_folder_is_not_copied_and_a_note_says_so(
    source: Path, tmp_path: Path
) -> None:
    secret = write(tmp_path / "home" / "secret.txt")
    write(tmp_path / "source-too" / "secret.txt")  # its path begins like that of the folder
    (source / "config.json").symlink_to(secret)
    (source / "extra").symlink_to("../home")
    (source / "twice.json").symlink_to("config.json")
    (source / "vocab.json").symlink_to("../source-too/secret.txt")
    write(source / "tokenizer.json")
    report = shardkit.convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "tokenizer.json"]
    (note,) = report.notes
    assert note == (
        "not copied, because links lead out of the folder: "
        f"'config.json' (to {secret}), 'twice.json' (to {secret}), 'vocab.json' "
        f"(to {tmp_path / 'source-too' / 'secret.txt'}) and 1 more; "
        "replace the links with the files if they belong to the model"
    )
    assert shardkit.open(source).notes == report.notes


def test_a_folder_that_holds_itself_ends(source: Path) -> None:
    write(source / "sub" / "readme.md")
    (source / "sub" / "again").symlink_to(source / "sub")
    assert "sub/readme.md" in taken(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(source: Path) -> None:
    os.mkfifo(source / "pipe.json")
    assert taken(source) == []


def test_a_pointer_of_git_lfs_with_the_name_of_a_shard_does_not_take_its_place(
    source: Path, tmp_path: Path
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    write(source / "model.safetensors", pointer)
    write(source / "model-00001-of-00002.safetensors", pointer)
    shardkit.convert(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert list(shardkit.open(tmp_path / "out")) == ["weight"]


def test_a_source_folder_brings_them_and_an_index_in_it_too(source: Path, tmp_path: Path) -> None:
    write(source / "config.json", '{"a": 1}')
    write(source / "tokenizer" / "vocab.json", "{}")
    index = write(
        source / "pytorch_model.bin.index.json",
        json.dumps({"weight_map": {"weight": "pytorch_model.bin"}}),
    )
    for number, given in enumerate((source, index)):
        shardkit.convert(given, tmp_path / str(number))
        assert (tmp_path / str(number) / "config.json").read_text() == '{"a": 1}'
        assert (tmp_path / str(number) / "tokenizer" / "vocab.json").read_text() == "{}"


def test_they_stay_when_they_are_not_wanted(source: Path, tmp_path: Path) -> None:
    write(source / "config.json", "{}")
    shardkit.convert(source, tmp_path / "out", with_companions=False)
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_a_single_file_brings_none_and_names_the_config_beside_it(
    source: Path, tmp_path: Path
) -> None:
    write(source / "config.json", "{}")
    report = shardkit.convert(source / "pytorch_model.bin", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert any(
        str(source / "config.json") in note and "not copied" in note for note in report.notes
    )


def test_one_output_file_takes_none(source: Path, tmp_path: Path) -> None:
    write(source / "config.json", "{}")
    shardkit.convert(source, tmp_path / "one.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "source"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ModelConfig(True, None)),
        ({"tie_word_embeddings": False, "torch_dtype": "float16"}, ModelConfig(False, "float16")),
        (
            {"text_config": {"tie_word_embeddings": False, "dtype": "bfloat16"}},
            ModelConfig(False, "bfloat16"),
        ),
        ({"dtype": "float32", "torch_dtype": "float16"}, ModelConfig(True, "float32")),
        ({"text_config": [1], "dtype": {"a": 1}}, ModelConfig(True, None)),
        ([1, 2], ModelConfig(True, None)),
    ],
)
def test_config_is_asked_for_ties_and_type(
    config: object, expected: ModelConfig, tmp_path: Path
) -> None:
    write(tmp_path / "config.json", json.dumps(config))
    assert ModelConfig.beside(tmp_path) == expected


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[" * 100_000], ids=["empty", "no text", "cut", "deep"]
)
def test_a_config_that_cannot_be_read_says_nothing(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "config.json", content)
    assert ModelConfig.beside(tmp_path) == ModelConfig()
    assert ModelConfig.beside(tmp_path / "none") == ModelConfig()


@pytest.mark.parametrize(
    ("key", "said"), [("torch_dtype", True), ("dtype", True), ("other", False)]
)
def test_a_type_that_config_says_otherwise_is_reported(
    key: str, said: bool, source: Path, tmp_path: Path
) -> None:
    write(source / "config.json", json.dumps({key: "float32"}))
    notes = shardkit.convert(source, tmp_path / "out", dtype="bf16").notes
    assert any("'float32'" in note and "bfloat16" in note for note in notes) is said
    assert not any(
        "'float32'" in note
        for note in shardkit.convert(source, tmp_path / "same", dtype="fp32").notes
    )
