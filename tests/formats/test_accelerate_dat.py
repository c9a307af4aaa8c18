"""Folders of .dat files, as Accelerate leaves them: read, converted, loaded from, and held against
what they say.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import shardkit
from libraries import as_of, peer
from repository import GOOD
from shardkit.cli import main
from shardkit.errors import LimitExceeded, LoadError, Malformed, Unwritable
from shardkit.limits import Limits
from shardkit.load import (
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from truth import values

accelerate = peer("accelerate")

FOLDER = GOOD / "folder-accelerate-dat"
NAMED = [
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int8",
    "uint8",
    "bool",
    "complex64",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "offloaded"))


def changed(folder: Path, **lines: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **lines}))


@as_of("accelerate", "1.15")  # 1.3 writes no empty tensors, and with torch 2.6 no 8-bit floats
@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMED), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_what_accelerate_offloads_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("dat")
    state = {
        f"w.{at}": torch.randint(0, 2, shape).to(getattr(torch, dtype))
        for at, (dtype, shape) in enumerate(tensors)
    }
    accelerate.utils.offload_state_dict(folder, state)
    checkpoint = shardkit.open(folder)
    assert {
        name: (checkpoint[name].shape, bytes(checkpoint[name].read())) for name in checkpoint
    } == {name: (tuple(tensor.shape), values(tensor)) for name, tensor in state.items()}


def test_it_is_converted_prepared_inspected_and_verified(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for write in (shardkit.convert, shardkit.offload_prep):
        write(folder, tmp_path / write.__name__)
        assert shardkit.verify(tmp_path / write.__name__, folder).same
    assert set(load_file(tmp_path / "convert" / "model.safetensors")) == set(shardkit.open(folder))
    assert not list((tmp_path / "convert").glob("*.dat"))
    assert main(["inspect", str(folder)]) == 0
    assert "accelerate-dat, 11 files" in capsys.readouterr().out
    assert shardkit.verify(folder).same


def test_a_line_that_points_elsewhere_is_listed_and_not_read(folder: Path) -> None:
    changed(folder, scalar={"safetensors_file": "/etc/passwd", "dtype": "float32", "shape": []})
    checkpoint = shardkit.open(folder)
    assert [(other.name, other.is_weight) for other in checkpoint.others] == [("scalar", True)]
    with pytest.raises(Unwritable, match="its values lie in '/etc/passwd'"):
        shardkit.convert(folder, folder.with_name("out"))


def test_files_that_the_index_does_not_know_are_said(folder: Path) -> None:
    (folder / "older.weight.dat").write_bytes(b"abcd")
    assert shardkit.open(folder).notes == ("left out, being not in index.json: 1 .dat file",)


def test_a_file_that_changes_while_it_is_converted_is_noticed(folder: Path, tmp_path: Path) -> None:
    def touch(count: int) -> None:
        os.utime(folder / "scalar.dat", ns=(1, 1))

    with pytest.raises(Malformed, match="changed while it was read"):
        shardkit.convert(folder, tmp_path / "out", on_bytes=touch)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_what_is_no_regular_file_is_never_opened(folder: Path) -> None:
    (folder / "scalar.dat").unlink()
    os.mkfifo(folder / "scalar.dat")
    with pytest.raises(Malformed, match=r"its file, 'scalar\.dat', is not there"):
        shardkit.open(folder)


def test_what_lies_beside_may_look_like_anything(folder: Path) -> None:
    save_file({"x": torch.zeros(3)}, folder / "scalar.dat")  # by its content, a checkpoint
    changed(folder, scalar={"dtype": "uint8", "shape": [(folder / "scalar.dat").stat().st_size]})
    assert len(shardkit.open(folder)) == 10


def test_a_file_that_hugging_face_would_take_is_taken(folder: Path) -> None:
    save_file({"x": torch.zeros(3)}, folder / "model.safetensors")
    assert list(shardkit.open(folder)) == ["x"]
    assert len(shardkit.open(folder, format="accelerate-dat")) == 10


def test_an_index_may_be_too_long(folder: Path) -> None:
    for limits in (Limits(header_bytes=100), Limits(tensors=3)):
        with pytest.raises(LimitExceeded):
            shardkit.open(folder, limits=limits)


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()


def empty() -> Any:
    with init_empty_weights():
        return model()


@pytest.fixture
def offloaded(tmp_path: Path) -> Path:
    accelerate.utils.offload_state_dict(tmp_path / "theirs", model().state_dict())
    return tmp_path / "theirs"


X = torch.ones(2, 4)


def test_a_model_streams_from_it(offloaded: Path) -> None:
    streamed = load_checkpoint_and_dispatch(empty(), offloaded, device_map={"": "disk"})
    assert torch.equal(streamed(X), model()(X))


def test_an_index_of_accelerate_with_its_folder_is_dispatched(offloaded: Path) -> None:
    index: dict[str, Any] = json.loads((offloaded / "index.json").read_text())
    streamed = dispatch_model(empty(), {"": "disk"}, offload_dir=offloaded, offload_index=index)
    assert torch.equal(streamed(X), model()(X))
    save_file({"there": model()[2].weight.detach()}, offloaded.with_name("m.safetensors"))
    mixed = {
        **index,
        "2.weight": {
            "safetensors_file": str(offloaded.with_name("m.safetensors")),
            "weight_name": "there",
        },
    }
    assert torch.equal(
        dispatch_model(empty(), {"": "disk"}, offload_dir=offloaded, offload_index=mixed)(X),
        model()(X),
    )
    with pytest.raises(
        LoadError, match=r"holds '0\.bias' as float32 \[4\], and offload_index says float16 \[4\]"
    ):
        dispatch_model(
            empty(),
            {"": "disk"},
            offload_dir=offloaded,
            offload_index={**index, "0.bias": {"dtype": "float16", "shape": [4]}},
        )
    with pytest.raises(LoadError, match="there is no offload_dir with its"):
        dispatch_model(empty(), {"": "disk"}, offload_index=index)


def test_a_folder_that_accelerate_made_of_the_same_model_serves(offloaded: Path) -> None:
    assert torch.equal(disk_offload(model(), offloaded)(X), model()(X))
    other = model()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(LoadError, match="holds weights of another model"):
        disk_offload(other, offloaded)
