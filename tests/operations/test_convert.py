"""The library call: its signature, every option, and all that its report tells."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardkit
from shardkit.checkpoint.edits import Edits
from shardkit.errors import (
    BadDType,
    BadSize,
    NameClash,
    NothingSelected,
    PlanError,
    UnknownFormat,
    Unwritable,
)
from shardkit.limits import Limits
from shardkit.operations.convert import carry_out
from shardkit.planning.options import ConversionOptions
from shardkit.planning.prepare import prepare
from shardkit.writing.copier import Engine
from shardkit.writing.writer import bytes_to_store
from truth import values

MODEL = {
    "encoder.weight": torch.arange(600.0).reshape(20, 30),
    "encoder.bias": torch.arange(20.0, dtype=torch.float64),
    "decoder.weight": torch.arange(600.0).reshape(30, 20).t(),
    "steps": torch.tensor(7),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(MODEL, tmp_path / "big.bin")
    return tmp_path / "big.bin"


def loaded(out: Path) -> dict[str, torch.Tensor]:
    """All tensors in the shards of *out*, as safetensors reads them."""
    files = [out] if out.is_file() else sorted(out.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def names(out: Path) -> list[str]:
    return list(shardkit.open(out))


def test_the_signature_is_the_one_that_is_promised() -> None:
    promised = {
        "out": None,
        "max_shard": "5GB",
        "dtype": None,
        "include": (),
        "exclude": (),
        "rename": (),
        "root": None,
        "ties": "keep-first",
        "jobs": None,
        "overwrite": False,
        "on_bytes": None,
    }
    parameters = inspect.signature(shardkit.convert).parameters
    assert list(parameters)[:2] == ["src", "out"]
    assert {name: parameters[name].default for name in promised} == promised
    assert all(
        p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("src", "out")
    )


def test_a_report_tells_what_was_done(source: Path, tmp_path: Path) -> None:
    report = shardkit.convert(source, tmp_path / "out", max_shard="3kB")
    assert report.source == source
    assert report.out == tmp_path / "out"
    assert report.format == "torch-zip"
    assert report.shards == len(list(report.out.glob("*.safetensors"))) > 1
    assert report.tensors == 4
    assert report.nbytes == 600 * 4 * 2 + 20 * 8 + 8
    assert sum(report.engines.values()) == sum(file.stat().st_size for file in report.out.iterdir())
    assert report.engines[Engine.TRANSFORMED] == 600 * 4  # the transposed one
    assert set(report.engines) <= {str(engine) for engine in Engine}
    assert (
        report.aliases,
        report.cast,
        report.left_out,
        report.objects,
        report.calls,
        report.resumed,
    ) == ({}, 0, (), (), (), 0)
    assert report.seconds > 0


def test_a_report_can_be_pickled_and_becomes_json(source: Path, tmp_path: Path) -> None:
    report = shardkit.convert(source, tmp_path / "out")
    assert pickle.loads(pickle.dumps(report)) == report
    assert json.loads(json.dumps(dict(report.engines))) == report.engines


def test_what_was_left_out_is_told_with_its_bytes(tmp_path: Path) -> None:
    optimizer = {
        "state": {0: {"exp_avg": torch.zeros(100)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    state = {"model": MODEL, "optimizer": optimizer, "epoch": 3, "args": SimpleNamespace(lr=1)}
    torch.save(state, tmp_path / "training.ckpt")
    report = shardkit.convert(tmp_path / "training.ckpt", tmp_path / "out")
    assert set(names(report.out)) == set(MODEL)
    assert [(part.path, part.nbytes, part.reason) for part in report.left_out if part.nbytes] == [
        ("optimizer", 400, "optimizer state")
    ]
    assert {"epoch", "args"} <= set(report.objects)


def test_root_takes_a_subtree(tmp_path: Path) -> None:
    torch.save(
        {"model": MODEL, "ema": {name: t + 1 for name, t in MODEL.items()}}, tmp_path / "two.pt"
    )
    with pytest.raises(PlanError, match="could be the model"):
        shardkit.convert(tmp_path / "two.pt", tmp_path / "out")
    shardkit.convert(tmp_path / "two.pt", tmp_path / "ema", root="ema")
    assert values(loaded(tmp_path / "ema")["steps"]) == values(torch.tensor(8))
    shardkit.convert(tmp_path / "two.pt", tmp_path / "all", root=".")
    assert set(names(tmp_path / "all")) == {
        f"{root}.{name}" for root in ("model", "ema") for name in MODEL
    }


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (["encoder.*"], [], ["encoder.weight", "encoder.bias"]),
        (["*weight"], [], ["encoder.weight", "decoder.weight"]),
        ([], ["*.weight"], ["encoder.bias", "steps"]),
        (["encoder.*", "steps"], ["*bias"], ["encoder.weight", "steps"]),
        (["encode?.[bw]*"], [], ["encoder.weight", "encoder.bias"]),
    ],
)
def test_include_and_exclude_are_globs(
    include: list[str], exclude: list[str], left: list[str], source: Path, tmp_path: Path
) -> None:
    shardkit.convert(source, tmp_path / "out", include=include, exclude=exclude)
    assert names(tmp_path / "out") == left


def test_renames_apply_in_order_and_after_the_globs(source: Path, tmp_path: Path) -> None:
    rules = [(r"^(\w+)\.", r"model.\1."), ("encoder", "enc")]
    shardkit.convert(source, tmp_path / "out", include=["encoder.*"], rename=rules)
    assert names(tmp_path / "out") == ["model.enc.weight", "model.enc.bias"]


def test_two_tensors_of_one_name_clash(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NameClash, match="weight"):
        shardkit.convert(source, tmp_path / "out", rename=[("^.*coder", "coder")])
    assert os.listdir(tmp_path) == ["big.bin"]


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "fp16", "torch.float32", "F64"])
def test_floats_are_cast_as_torch_casts_them_and_nothing_else_is(
    dtype: str, source: Path, tmp_path: Path
) -> None:
    wanted = {
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "F64": torch.float64,
    }.get(dtype, torch.float32)
    report = shardkit.convert(source, tmp_path / "out", dtype=dtype, max_shard="2kB")
    expected = {
        name: tensor.to(wanted) if tensor.is_floating_point() else tensor
        for name, tensor in MODEL.items()
    }
    assert {name: values(t) for name, t in loaded(tmp_path / "out").items()} == {
        name: values(t) for name, t in expected.items()
    }
    assert report.cast == sum(t.is_floating_point() and t.dtype != wanted for t in MODEL.values())


def test_a_bound_may_be_a_number_and_none_is_one_shard(source: Path, tmp_path: Path) -> None:
    assert shardkit.convert(source, tmp_path / "number", max_shard=7000).shards == 2
    assert shardkit.convert(source, tmp_path / "none", max_shard=None).shards == 1


def test_ties_are_kept_once_or_copied(tmp_path: Path) -> None:
    weight = torch.arange(8.0)
    state = {
        "embed": weight,
        "head": weight,
        "part": weight[:4],
        "turned": weight.reshape(2, 4),
        "equal": weight.clone(),
    }
    torch.save(state, tmp_path / "tied.bin")
    assert shardkit.convert(tmp_path / "tied.bin", tmp_path / "once").aliases == {"head": "embed"}
    assert shardkit.convert(tmp_path / "tied.bin", tmp_path / "twice", ties="copy").aliases == {}
    assert set(loaded(tmp_path / "once")) == set(state) - {"head"}
    for out in ("once", "twice"):
        opened = shardkit.open(tmp_path / out)
        assert {name: bytes(opened[name].read()) for name in opened} == {
            name: values(t) for name, t in state.items()
        }


def test_empty_tensors_are_never_tied(tmp_path: Path) -> None:
    torch.save({"a": torch.empty(0), "b": torch.empty(0)}, tmp_path / "empty.bin")
    assert shardkit.convert(tmp_path / "empty.bin", tmp_path / "out").aliases == {}


def test_progress_is_told_from_any_thread_and_adds_up(source: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    threads: set[int] = set()

    def on_bytes(count: int) -> None:
        counts.append(count)
        threads.add(threading.get_ident())

    report = shardkit.convert(source, tmp_path / "out", max_shard="2kB", jobs=3, on_bytes=on_bytes)
    assert sum(counts) == sum(report.engines.values())
    assert threads


@pytest.mark.parametrize("sync", [True, False])
def test_files_and_folders_are_synced_unless_told_otherwise(
    sync: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    shardkit.convert(source, tmp_path / "out", max_shard="2kB", sync=sync)
    files = len(os.listdir(tmp_path / "out"))
    assert len(synced) >= files if sync else not synced


def test_the_format_can_be_said(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "out", format="torch-zip")
    with pytest.raises(PlanError, match="no format called 'gguf'"):
        shardkit.convert(source, tmp_path / "other", format="gguf")
    with pytest.raises(shardkit.ShardkitError):
        shardkit.convert(source, tmp_path / "other", format="safetensors")


def test_limits_are_kept(tmp_path: Path) -> None:
    save_file(MODEL | {"decoder.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(shardkit.ShardkitError, match="holds 4 tensors") as caught:
        shardkit.convert(tmp_path / "model.safetensors", tmp_path / "out", limits=Limits(tensors=3))
    assert "tensors=4" in str(caught.value.hint)


def test_an_output_with_the_suffix_of_a_format_is_one_file(source: Path, tmp_path: Path) -> None:
    report = shardkit.convert(source, tmp_path / "one.safetensors", max_shard="1kB")
    assert report.shards == 1
    assert {name: values(t) for name, t in loaded(report.out).items()} == {
        name: values(t) for name, t in MODEL.items()
    }
    assert sorted(os.listdir(tmp_path)) == ["big.bin", "one.safetensors"]


def test_a_folder_may_end_like_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").mkdir()
    shardkit.convert(source, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path / "out.safetensors") == ["model.safetensors"]


def test_paths_may_be_texts_and_relative(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shardkit.convert("big.bin", "out").out == Path("out")
    assert shardkit.convert("big.bin").out == Path("big-shards")
    assert sorted(os.listdir(tmp_path)) == ["big-shards", "big.bin", "out"]


REFUSED: dict[str, tuple[dict[str, Any], type[shardkit.ShardkitError]]] = {
    "a size that is none": ({"max_shard": "2 cows"}, BadSize),
    "a size of nothing": ({"max_shard": 0}, BadSize),
    "a type that is none": ({"dtype": "int8"}, BadDType),
    "globs that leave nothing": ({"include": ["nothing"]}, NothingSelected),
    "a root that is none": ({"root": "nowhere"}, NothingSelected),
    "a rename that is no expression": ({"rename": [("(", "")]}, PlanError),
    "a replacement that names no group": ({"rename": [("a", r"\7")]}, PlanError),
    "a name that safetensors keeps": ({"rename": [("^steps$", "__metadata__")]}, Unwritable),
    "a name that is not UTF-8 text": ({"rename": [("^steps$", "\ud800")]}, Unwritable),
}


@pytest.mark.parametrize("request_", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    request_: str, source: Path, tmp_path: Path
) -> None:
    options, error = REFUSED[request_]
    with pytest.raises(error):
        shardkit.convert(source, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == ["big.bin"]


def test_weights_that_are_not_dense_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    torch.save(
        {
            "dense": torch.ones(2),
            "sparse": torch.eye(3).to_sparse(),
            "wide": torch.ones(2, dtype=torch.complex128),
        },
        tmp_path / "a.pt",
    )
    for exclude, culprit in (((), "'sparse'"), (["sparse"], "'wide'")):
        with pytest.raises(Unwritable, match=culprit) as caught:
            shardkit.convert(tmp_path / "a.pt", tmp_path / "out", exclude=exclude)
        assert "exclude=[" in str(caught.value.hint)
    shardkit.convert(tmp_path / "a.pt", tmp_path / "out", exclude=["sparse", "wide"])
    assert names(tmp_path / "out") == ["dense"]


def test_what_is_no_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.bin").write_text("<!DOCTYPE html><html>")
    with pytest.raises(UnknownFormat, match="HTML"):
        shardkit.convert(tmp_path / "page.bin", tmp_path / "out")
    assert os.listdir(tmp_path) == ["page.bin"]


def test_preparing_decides_everything_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    conversion = prepare(source, tmp_path / "out", Edits(), ConversionOptions("3kB"))
    assert os.listdir(tmp_path) == ["big.bin"]
    assert (
        conversion.plan.digest
        == prepare(source, tmp_path / "out", Edits(), ConversionOptions("3kB")).plan.digest
    )
    assert (
        0 < bytes_to_store(conversion.plan, tmp_path) <= conversion.plan.nbytes
    )  # less where clones take no room
    report = carry_out(conversion)
    sizes = {file.name: file.nbytes for file in conversion.plan.files}
    assert {file.name: file.stat().st_size for file in report.out.iterdir()} == sizes
    assert report.shards == len(conversion.plan.shards)


def test_a_shard_is_a_source_again(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "first", max_shard="3kB")
    shardkit.convert(tmp_path / "first", tmp_path / "second", max_shard="1MB")
    shardkit.convert(tmp_path / "second", tmp_path / "third", max_shard="3kB")
    assert shardkit.verify(tmp_path / "third", source).same
