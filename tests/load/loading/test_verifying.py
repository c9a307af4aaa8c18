"""`verify=True`: what was written, or nothing at all, comes into a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardkit
from shardkit.errors import FormatError, LimitExceeded, LoadError, Malformed, Mismatch
from shardkit.limits import Limits
from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from shardkit.load.lazy.checkpoint import LoadedHeaders
from shardkit.metadata.manifest import MANIFEST_NAME

Load = Callable[..., object]


def dispatched(model: nn.Module, checkpoint: Path, **options: Any) -> nn.Module:
    return load_checkpoint_and_dispatch(model, checkpoint, {"": "disk"}, **options)


LOADS = [load_checkpoint_in_model, load_checkpoint_and_dispatch, dispatched]
by_any_door = pytest.mark.parametrize("load", LOADS, ids=["in_model", "without_map", "dispatched"])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50)).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    torch.save(net().state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    shardkit.convert(source, tmp_path / "out", max_shard="9kB", checksum="sha256")
    return tmp_path / "out"


def empty() -> nn.Sequential:
    with init_empty_weights():
        return net()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def shard_of(folder: Path, name: str) -> Path:
    extents = shardkit.open(folder)[name].payload.sources
    return extents[0].path


@by_any_door
def test_what_is_as_it_was_written_is_loaded(load: Load, source: Path, folder: Path) -> None:
    for checkpoint in (source, folder, folder / "model.safetensors.index.json"):
        model = empty()
        load(model, checkpoint, verify=True)
        for name, value in torch.load(source).items():
            assert torch.equal(model.get_parameter(name), value)


@by_any_door
def test_a_flipped_bit_is_named_and_the_model_is_not_touched(load: Load, folder: Path) -> None:
    shard = shard_of(folder, "1.weight")
    flip(shard, -9)
    model, kept = net(), net()
    kept.load_state_dict(model.state_dict())
    with pytest.raises(Malformed, match=rf"{shard.name}: 1\.weight: bytes \[") as caught:
        load(model, folder, verify=True)
    assert "download it again" in str(caught.value.hint)
    assert all(
        torch.equal(model.state_dict()[name], value) for name, value in kept.state_dict().items()
    )
    load(model, folder)  # nobody asked


@by_any_door
def test_a_flipped_bit_in_a_zip_file_is_told_by_its_crc(load: Load, source: Path) -> None:
    extent = shardkit.open(source)["1.weight"].payload.sources[0]
    flip(source, extent.start + 70)
    with pytest.raises(Malformed, match=r"model\.pt: 1\.weight: bytes \[.* have the CRC"):
        load(empty(), source, verify=True)


@by_any_door
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_flipped_bit_in_a_prepared_folder_is_told_by_its_block(
    load: Load, whole: bool, source: Path, tmp_path: Path
) -> None:
    shardkit.offload_prep(source, tmp_path / "prepared")
    shard = tmp_path / "prepared" / "model.safetensors"
    checkpoint = shard.parent if whole else shard
    load(empty(), checkpoint, verify=True)
    content = shard.read_bytes()
    flip(shard, -9)
    with pytest.raises(Malformed, match=r"model\.safetensors: 1: block at \["):
        load(empty(), checkpoint, verify=True)
    shard.write_bytes(content.replace(b"[40,30]", b"[30,40]"))
    with pytest.raises(Malformed, match=r"the header of 'model\.safetensors' differs"):
        load(nn.Sequential(nn.Linear(40, 30, bias=False)), checkpoint, verify=True)


@by_any_door
def test_what_is_compressed_is_verified_too(load: Load, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    shardkit.convert(source, tmp_path / "small", compress="zstd", checksum="sha256")
    (shard,) = (tmp_path / "small").glob("*.zst")
    load(empty(), tmp_path / "small", verify=True)
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(Malformed, match=r"model\.safetensors\.zst"):
        load(empty(), tmp_path / "small", verify=True)


@by_any_door
def test_what_carries_no_checksums_cannot_be_verified_and_that_is_an_error(
    load: Load, folder: Path, tmp_path: Path
) -> None:
    (folder / MANIFEST_NAME).unlink()
    model = empty()
    with pytest.raises(
        LoadError, match=r"model-.*cannot be verified: it has no checksums"
    ) as caught:
        load(model, folder, verify=True)
    assert "--checksum sha256" in str(caught.value.hint)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net().state_dict(), tmp_path / "unsummed.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(LoadError, match=r"unsummed\.pt cannot be verified"):
        load(model, tmp_path / "unsummed.pt", verify=True)


def test_a_header_that_says_something_else_is_found_too(folder: Path) -> None:
    shard = shard_of(folder, "0.weight")
    content = shard.read_bytes()
    assert content.count(b"[40,30]") == 1
    shard.write_bytes(content.replace(b"[40,30]", b"[30,40]"))
    with pytest.raises(
        Malformed, match="which belong to no tensor, do not match the recorded sha256"
    ):
        load_checkpoint_in_model(nn.Sequential(nn.Linear(40, 30, bias=False)), folder, verify=True)


def test_only_files_that_are_needed_are_read(folder: Path) -> None:
    flip(shard_of(folder, "1.weight"), -1)
    model = nn.Sequential(nn.Linear(30, 40))
    assert shard_of(folder, "0.weight") != shard_of(folder, "1.weight")
    with pytest.warns(UserWarning, match="which the model does not have"):
        load_checkpoint_in_model(model, folder, verify=True)


def test_a_model_that_does_not_fit_is_told_before_anything_is_read(folder: Path) -> None:
    flip(shard_of(folder, "1.weight"), -1)
    with pytest.raises(Mismatch):
        load_checkpoint_in_model(nn.Sequential(nn.Linear(30, 41)), folder, verify=True)


def test_a_manifest_that_is_none_is_told(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text('{"algorithm": "md5"}')
    with pytest.raises(FormatError, match="manifest: the algorithm is 'md5'"):
        load_checkpoint_in_model(empty(), folder, verify=True)


def test_a_manifest_of_gigabytes_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST_NAME, 1 << 33)
    for look in (
        shardkit.verify,
        lambda path: load_checkpoint_in_model(empty(), path, verify=True),
    ):
        with pytest.raises(
            LimitExceeded, match=r"the manifest takes 8,589,934,592 bytes"
        ) as caught:
            look(folder)
        assert caught.value.limit == "header_bytes"


def test_limits_are_those_of_the_opening(folder: Path) -> None:
    opened = LoadedHeaders.at(folder, limits=Limits(header_bytes=5000))
    (folder / MANIFEST_NAME).write_text(" " * 5001)
    with pytest.raises(LimitExceeded, match="5,001"):
        opened.verify(opened.entries.values())
