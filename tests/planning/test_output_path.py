"""Where an output goes, and what it may replace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shardkit
from shardkit.errors import NoRoom, OutputError
from shardkit.planning.output_path import check_room, default_output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save({"weight": torch.ones(4), "bias": torch.zeros(2)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("big.bin", "big"),
        ("big.pt.zst", "big"),
        ("model.v1.5.ckpt", "model.v1.5"),
        ("epoch.pth.tar", "epoch"),
        ("x.safetensors", "x"),
        ("model.safetensors.index.json", "model"),
        ("pytorch_model.bin.index.json", "pytorch_model"),
        ("noending", "noending"),
        ("folder.v2", "folder.v2"),
    ],
)
def test_the_default_is_beside_the_source(name: str, stem: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if name.startswith("folder") else (tmp_path / name).touch()
    assert default_output(tmp_path / name) == tmp_path / f"{stem}-shards"


def test_a_folder_that_is_the_working_folder_has_a_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert default_output(Path(".")).resolve() == tmp_path / "model-shards"
    assert default_output(Path("../model")).resolve() == tmp_path / "model-shards"


def test_of_a_read_only_place_the_default_is_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert default_output(Path("/media/cd/big.bin")) == tmp_path / "big-shards"


@pytest.mark.parametrize(
    "inside",
    ["snapshots/0123", "snapshots/0123/model.safetensors", "snapshots/0123/unet/model.safetensors"],
)
def test_of_a_hugging_face_cache_the_default_is_the_working_folder(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert (
        default_output(tmp_path / "models--meta-llama--Llama-3" / inside)
        == tmp_path / "work" / "Llama-3-shards"
    )


@pytest.mark.parametrize("named", ["out", "sub/../out", "link", "./out"])
def test_messages_name_the_output_as_it_was_given(
    named: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("out")
    shardkit.convert(source, "out")
    with pytest.raises(OutputError) as caught:
        shardkit.convert(source, named, rename=[("^", "x.")])
    assert str(caught.value) == f"{'out' if named == 'link' else Path(named)} exists"


def test_what_exists_is_not_touched_without_overwrite(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardkit.convert(source, out)
    before = content(out)
    with pytest.raises(OutputError, match="exists") as caught:
        shardkit.convert(source, out, rename=[("^", "x.")])
    assert caught.value.hint == "choose another output with out=, or replace it with overwrite=True"
    assert (
        caught.value.command_hint == "choose another output with -o, or replace it with --overwrite"
    )
    assert content(out) == before
    assert not (tmp_path / "out.partial").exists()


def test_an_earlier_output_is_replaced_as_a_whole(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardkit.convert(source, out, max_shard=1)
    assert (out / "model-00002-of-00002.safetensors").exists()
    shardkit.convert(source, out, overwrite=True)
    assert sorted(content(out)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_an_earlier_output_is_replaced_where_the_system_exchanges_no_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardkit.system.folders.exchange", lambda first, second: False)
    out = tmp_path / "out"
    shardkit.convert(source, out, max_shard=1)
    shardkit.convert(source, out, overwrite=True)
    assert sorted(content(out)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_one_file_replaces_one_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    shardkit.convert(source, out)
    with pytest.raises(OutputError, match="exists"):
        shardkit.convert(source, out)
    shardkit.convert(source, out, exclude=["bias"], overwrite=True)
    assert list(shardkit.open(out)) == ["weight"]
    assert sorted(os.listdir(tmp_path)) == ["source", "x.safetensors"]


@pytest.mark.parametrize(
    "name", ["diary.txt", "config.yaml", ".env", "sub/model.bin", "model-1-of-2.safetensors"]
)
def test_what_shardkit_did_not_write_is_not_replaced(
    name: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shardkit.convert(source, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = content(out)
    with pytest.raises(OutputError, match="did not write") as caught:
        shardkit.convert(source, out, overwrite=True)
    assert Path(name).name in str(caught.value)
    assert content(out) == before


def test_a_home_folder_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".config").mkdir(parents=True)
    (home / ".config" / "settings").write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    before = content(home)
    for out in (home, Path("~").expanduser(), home / ".config" / ".."):
        with pytest.raises(OutputError):
            shardkit.convert(source, out, overwrite=True)
    assert content(home) == before


def test_a_file_is_not_replaced_by_a_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError):
        shardkit.convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


PLACES: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "the source": lambda source: (source, source),
    "the source under another name": lambda source: (source, source / ".." / source.name),
    "around the source": lambda source: (source / "pytorch_model.bin", source),
    "around the folder": lambda source: (source, source.parent),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_source_is_never_replaced(place: str, source: Path) -> None:
    read, out = PLACES[place](source)
    before = content(source.parent)
    with pytest.raises(OutputError, match="is the input"):
        shardkit.convert(read, out, overwrite=True)
    assert content(source.parent) == before


def test_a_file_is_not_replaced_by_its_own_conversion(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "x.safetensors")
    (tmp_path / "link.safetensors").symlink_to("x.safetensors")
    for out in ("x.safetensors", "link.safetensors"):
        with pytest.raises(OutputError, match="is the input"):
            shardkit.convert(tmp_path / "x.safetensors", tmp_path / out, overwrite=True)


def test_an_earlier_output_inside_the_source_is_not_replaced(source: Path) -> None:
    shardkit.convert(source, source / "out")
    with pytest.raises(OutputError, match="is the input"):
        shardkit.convert(source, source / "out", overwrite=True)


def test_an_empty_folder_is_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shardkit.convert(source, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_a_link_to_a_folder_leads_to_the_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/out")
    shardkit.convert(source, tmp_path / "out")
    shardkit.convert(source, tmp_path / "out", max_shard=1, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["out"]
    assert len(shardkit.open(tmp_path / "disk" / "out")) == 2


def test_folders_on_the_way_are_made(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").is_file()
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def test_a_file_on_the_way_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    for out in ("a/out", "a/b/out"):
        with pytest.raises(OutputError, match="/a"):
            shardkit.convert(source, tmp_path / out)


def test_a_mount_point_gets_a_sentence_that_names_a_subfolder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(OutputError, match="mount point") as caught:
        shardkit.convert(source, tmp_path / "disk")
    assert str(tmp_path / "disk" / "shards") in str(caught.value.hint)
    shardkit.convert(source, tmp_path / "disk" / "shards")


def test_too_small_a_disk_is_told_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match=r"free, and the output of .* needs 1153 PB"):
        check_room(tmp_path / "not" / "yet", 1 << 60, "big.bin")
    check_room(tmp_path / "not" / "yet", 1, "big.bin")


def test_the_default_of_convert_is_used_and_reported(source: Path) -> None:
    report = shardkit.convert(source / "pytorch_model.bin")
    assert report.out == source / "pytorch_model-shards"
    assert report.out.is_dir()
