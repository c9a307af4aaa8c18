"""`shardkit.load.tensors` is a torch.load, but safe and lazy: it gives the same, and reads nothing
before it is used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from repository import FIXTURES
from shardkit.errors import AmbiguousRoot, FormatError, LoadError, NothingSelected
from shardkit.load import Paged, tensors
from shardkit.payloads.payload import Extent
from truth import DTYPES, values

GOOD = FIXTURES / "good"
MANIFEST: dict[str, dict[str, list[Any]]] = json.loads((FIXTURES / "manifest.json").read_text())


def described(found: Mapping[str, torch.Tensor]) -> list[dict[str, object]]:
    """What the manifest of the fixtures would say of *found*."""
    items = [(name, paged) for name, paged in found.items() if isinstance(paged, Paged)]
    assert len(items) == len(found)
    return [
        {
            "name": name,
            "dtype": paged.stored.code,
            "shape": [*paged.shape[:-1], paged.shape[-1] * paged.stored.packed]
            if paged.ndim
            else [],
            "sha256": hashlib.sha256(values(paged.read())).hexdigest(),
        }
        for name, paged in items
    ]


WHOLE = [
    name
    for name, holds in MANIFEST.items()
    if name != "zip-others.pt" and len({t["name"] for t in holds["tensors"]}) > 0
]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_every_format_gives_what_its_own_reader_gives(name: str) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    with_type = [each for each in MANIFEST[name]["tensors"] if each["dtype"] in DTYPES]
    found = tensors(GOOD / name, root=".")
    expected = {each["name"]: each for each in with_type}
    assert set(expected) <= set(found)
    assert described({name: found[name] for name in expected}) == list(expected.values())


def test_a_deep_copy_of_all_weights_reads_none_and_one_of_a_weight_reads_it(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2)}, tmp_path / "model.pt")
    found = tensors(tmp_path / "model.pt")
    assert isinstance(copy.deepcopy([found])[0]["b"], Paged)
    assert type(copy.deepcopy(found["a"]).add_(1)) is torch.Tensor


def test_a_type_that_torch_has_not_is_told_when_it_is_asked_for() -> None:
    found = tensors(GOOD / "safetensors-packed.safetensors")
    if "F4" in DTYPES:  # since torch 2.8
        assert found["F4"].dtype is DTYPES["F4"]
    with pytest.raises(LoadError, match=r"'F6_E2M3' is F6_E2M3, and torch .* has no such type"):
        found["F6_E2M3"]


def test_it_is_a_mapping_that_is_read_only() -> None:
    found = tensors(GOOD / "zip-training.pt")
    assert list(found) == [f"0.{n}" for n in ("weight", "bias")] + [
        f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert len(found) == 7
    assert "0.weight" in found
    assert "weight" not in found
    assert found["0.weight"] is found["0.weight"]
    assert not hasattr(found, "__setitem__")
    with pytest.raises(KeyError):
        found["weight"]


def test_the_root_may_be_chosen(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "ema": {"w": torch.zeros(3)}}, tmp_path / "two.pt")
    assert tensors(tmp_path / "two.pt", root="ema")["w"].sum() == 0
    assert list(tensors(tmp_path / "two.pt", root=".")) == ["model.w", "ema.w"]
    with pytest.raises(AmbiguousRoot, match="several subtrees"):
        tensors(tmp_path / "two.pt")
    with pytest.raises(NothingSelected):
        tensors(tmp_path / "two.pt", root="optimizer")


def test_ties_are_one_object(tmp_path: Path) -> None:
    weight = torch.ones(4, 2)
    torch.save(
        {"a": weight, "b": weight, "c": weight[:2], "d": weight.t(), "e": weight.clone()},
        tmp_path / "tied.pt",
    )
    found = tensors(tmp_path / "tied.pt")
    assert found["a"] is found["b"]
    assert len({id(found[name]) for name in "acde"}) == 4


def test_empty_tensors_are_never_tied(tmp_path: Path) -> None:
    save_file({"a": torch.empty(0), "b": torch.empty(0)}, tmp_path / "empty.safetensors")
    found = tensors(tmp_path / "empty.safetensors")
    assert found["a"] is not found["b"]


def test_a_weight_that_is_not_dense_is_listed_and_told_when_it_is_asked_for() -> None:
    found = tensors(GOOD / "zip-others.pt")
    assert {"coo", "quantised", "nested", "meta", "weight"} <= set(found)
    assert isinstance(found["weight"], Paged)
    with pytest.raises(LoadError, match="'coo' is not a dense tensor but a sparse tensor"):
        found["coo"]
    with pytest.raises(LoadError, match="not a dense tensor"):
        nn.Linear(1, 1).load_state_dict(found)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "clash.pt")
    with pytest.raises(LoadError, match=r"two weights would be called 'a\.b'"):
        tensors(tmp_path / "clash.pt", root=".")


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "page.bin").write_text("<!DOCTYPE html>")
    with pytest.raises(FormatError):
        tensors(tmp_path / "page.bin")
    with pytest.raises(FormatError):
        tensors(tmp_path / "nothing.bin")
    with pytest.raises(LoadError, match="cannot use the device"):
        tensors(GOOD / "safetensors-tied.safetensors", device="nowhere")


def test_nothing_in_a_pickle_is_run(capfd: pytest.CaptureFixture[str]) -> None:
    found = tensors(GOOD / "pickle-calls-os-system.pt", root=".")
    assert all(isinstance(found[name], Paged) for name in found)
    assert not capfd.readouterr().out


def test_a_slice_is_the_address_of_its_own_bytes(tmp_path: Path) -> None:
    save_file({"w": torch.arange(1000.0).reshape(100, 10)}, tmp_path / "w.safetensors")
    paged = tensors(tmp_path / "w.safetensors")["w"]
    assert isinstance(paged, Paged)
    rows = paged[20:22]
    assert isinstance(rows, Paged)
    whole = paged.payload
    assert isinstance(whole, Extent)
    assert rows.payload == Extent(whole.path, whole.start + 800, 80)


def model() -> nn.Module:
    tied = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 11, bias=False)
    )
    tied[3].weight = tied[0].weight
    return tied.eval()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_a_module_takes_it_as_its_state(suffix: str, assign: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = model(), model()
    source.load_state_dict(
        {name: torch.rand(t.shape).to(t.dtype) for name, t in source.state_dict().items()}
    )
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file({name: t.clone() for name, t in source.state_dict().items()}, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=suffix == "pt")
    assert (
        str(target.load_state_dict(tensors(path), assign=assign))
        == "<All keys matched successfully>"
    )
    kinds = {type(each) for each in target.state_dict().values()}
    assert kinds == ({Paged} if assign else {torch.Tensor})
    ids = torch.arange(11)
    assert torch.equal(target(ids), source(ids))


def test_a_module_of_another_kind_is_told_what_differs(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(4, 3).load_state_dict(tensors(tmp_path / "linear.pt"), assign=True)


def test_a_scalar_of_old_is_taken_for_one_of_today(tmp_path: Path) -> None:
    torch.save({"scale": torch.full((1,), 3.0)}, tmp_path / "old.pt")
    module = nn.Module()
    module.scale = nn.Parameter(torch.zeros(()))
    module.load_state_dict(tensors(tmp_path / "old.pt"))
    assert module.scale.item() == 3


def test_large_weights_are_read_once_into_their_place(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="peak memory is told by getrusage")
    save_file({"weight": torch.ones(8_000, 4_000)}, tmp_path / "large.safetensors")
    module = nn.Linear(4_000, 8_000, bias=False)
    module.weight.data.zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module.load_state_dict(tensors(tmp_path / "large.safetensors"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
    assert grown < 64 << 20, f"{grown:,} bytes beside the 128 MB of the weight"
    assert bool((module.weight == 1).all())


def test_threads_get_the_same_objects(tmp_path: Path) -> None:
    torch.save({str(i): torch.ones(2) * i for i in range(500)}, tmp_path / "many.pt")
    found = tensors(tmp_path / "many.pt")
    seen: list[dict[str, int]] = []
    threads = [
        threading.Thread(target=lambda: seen.append({name: id(found[name]) for name in found}))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each == seen[0] for each in seen)
