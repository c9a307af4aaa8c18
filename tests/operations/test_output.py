"""What an output folder looks like, whoever reads it next: names, order, padding, bounds, ties,
metadata, modes.
"""

from __future__ import annotations

import json
import os
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import load_checkpoint_in_model  # type: ignore[import-untyped]  # it ships no types
from huggingface_hub import load_state_dict_from_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardkit
from shardkit.cli.output.summary import summary
from truth import values

INDEX = "model.safetensors.index.json"
KEPT_BITS = {
    "nan": torch.tensor([0x7FC00001, 0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(
        torch.float32
    ),
    "half_nan": torch.tensor([0x7E01, 0x7C01, -1], dtype=torch.int16).view(torch.float16),
    "brain_nan": torch.tensor([0x7FC1, 0x7F81, -1], dtype=torch.int16).view(torch.bfloat16),
    "minus_zero": torch.tensor([-0.0, 0.0]),
    "denormal": torch.tensor([1, -(2**31) + 1], dtype=torch.int32).view(torch.float32),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "bool": torch.tensor([True, False]),
}


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def layers(count: int, elements: int = 1000) -> dict[str, torch.Tensor]:
    return {
        f"layers.{number}.weight": torch.full((elements,), float(number))
        for number in reversed(range(count))
    }


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data starts."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start


def names_in(file: Path) -> list[str]:
    header, _ = header_of(file)
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def metadata_of(file: Path) -> dict[str, str]:
    metadata: dict[str, str] = header_of(file)[0]["__metadata__"]
    return metadata


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_several_shards_are_numbered_and_indexed(tmp_path: Path) -> None:
    shardkit.convert(save(tmp_path / "big.bin", layers(4)), tmp_path / "out", max_shard="12kB")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        INDEX,
    ]


def test_a_single_shard_has_no_number_and_no_index(tmp_path: Path) -> None:
    shardkit.convert(save(tmp_path / "big.bin", layers(4)), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_the_index_maps_exactly_the_tensors_that_are_in_the_files_with_keys_sorted(
    tmp_path: Path,
) -> None:
    state = layers(12)
    state["tied"] = state["layers.3.weight"]
    shardkit.convert(save(tmp_path / "big.bin", state), tmp_path / "out", max_shard="13kB")
    text = (tmp_path / "out" / INDEX).read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["weight_map"] == {
        name: file.name for file in shards_in(tmp_path / "out") for name in names_in(file)
    }
    assert index["metadata"] == {"total_size": 12 * 4000}  # bytes as stored: the tie counts once


def test_tensors_stand_in_the_order_of_the_source(tmp_path: Path) -> None:
    state = layers(12)
    shardkit.convert(save(tmp_path / "big.bin", state), tmp_path / "out", max_shard="20kB")
    assert [name for file in shards_in(tmp_path / "out") for name in names_in(file)] == list(state)


def test_wide_types_go_first_only_in_a_shard_where_a_tensor_would_be_misaligned(
    tmp_path: Path,
) -> None:
    aligned = {
        "narrow": torch.ones(8, dtype=torch.uint8),
        "wide": torch.ones(2, dtype=torch.float64),
    }
    odd = {"byte": torch.ones(3, dtype=torch.uint8), "half": torch.ones(3, dtype=torch.float16)}
    odd |= {"wide": torch.ones(2), "last": torch.ones(1)}
    shardkit.convert(save(tmp_path / "aligned.bin", aligned), tmp_path / "aligned")
    shardkit.convert(save(tmp_path / "odd.bin", odd), tmp_path / "odd")
    assert names_in(tmp_path / "aligned" / "model.safetensors") == ["narrow", "wide"]
    assert names_in(tmp_path / "odd" / "model.safetensors") == ["wide", "last", "half", "byte"]


def test_data_starts_at_a_multiple_of_64(tmp_path: Path) -> None:
    shardkit.convert(save(tmp_path / "big.bin", layers(5)), tmp_path / "out", max_shard="13kB")
    assert all(header_of(file)[1] % 64 == 0 for file in shards_in(tmp_path / "out"))


def test_a_shard_that_is_one_aligned_run_of_a_file_starts_at_the_place_of_a_page_where_the_run_does(
    tmp_path: Path,
) -> None:
    source = tmp_path / "model.safetensors"
    save_file(layers(20), source)
    report = shardkit.convert(source, tmp_path / "out", max_shard="30kB")
    origin = shardkit.open(source)
    assert report.shards > 3
    for file in shards_in(tmp_path / "out"):
        (place,) = origin[names_in(file)[0]].payload.sources
        assert header_of(file)[1] % 4096 == place.start % 4096


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_same_input_and_options_give_the_same_bytes(jobs: int, tmp_path: Path) -> None:
    source = save(tmp_path / "big.bin", layers(9))
    for out, count in (("first", 3), ("second", jobs)):
        shardkit.convert(source, tmp_path / out, max_shard="14kB", jobs=count)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()}
        for out in ("first", "second")
    )
    assert first == second


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=30),
    st.integers(1, 30_000),
    st.booleans(),
    st.integers(0, 20),
)
def test_the_bound_is_on_the_whole_file_and_what_exceeds_it_stands_alone(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    bound: int,
    long_names: bool,
    ties: int,
) -> None:
    folder = tmp_path_factory.mktemp("bound")
    prefix = "é" * 100 if long_names else ""
    state = {
        f"{prefix}{number}": torch.zeros(size, dtype=torch.uint8)
        for number, size in enumerate(sizes)
    }
    state |= {f"{prefix}alias {number}": state[f"{prefix}0"] for number in range(ties)}
    source = save(folder / "big.bin", state)
    report = shardkit.convert(source, folder / "out", max_shard=bound, sync=False)
    assert set(shardkit.open(folder / "out")) == set(state)
    too_large = [file for file in shards_in(folder / "out") if file.stat().st_size > bound]
    assert all(len(names_in(file)) == 1 for file in too_large)
    assert bool(too_large) == any("alone in a shard" in note for note in report.notes)


def test_a_tensor_larger_than_the_bound_is_named(tmp_path: Path) -> None:
    state = {"small": torch.ones(10), "huge": torch.ones(9000), "last": torch.ones(10)}
    report = shardkit.convert(save(tmp_path / "big.bin", state), tmp_path / "out", max_shard="10kB")
    assert [names_in(file) for file in shards_in(tmp_path / "out")] == [
        ["small"],
        ["huge"],
        ["last"],
    ]
    (note,) = [note for note in report.notes if "alone in a shard" in note]
    assert "'huge'" in note
    assert "'small'" not in note
    assert "10.0 kB" in note


def test_a_tie_is_recorded_in_the_shard_with_the_tensor_that_is_kept(tmp_path: Path) -> None:
    state = layers(6)
    state["head"] = state["layers.2.weight"]
    report = shardkit.convert(save(tmp_path / "big.bin", state), tmp_path / "out", max_shard="9kB")
    assert report.aliases == {"head": "layers.2.weight"}
    for file in shards_in(tmp_path / "out"):
        record = (
            {"head": "layers.2.weight", "shardkit.aliases": '["head"]'}
            if "layers.2.weight" in names_in(file)
            else {}
        )
        assert metadata_of(file) == {"format": "pt", **record}
    assert shardkit.open(tmp_path / "out")["head"].read() == values(state["head"])


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}],
    ids=["top", "text_config"],
)
def test_where_config_ties_nothing_both_are_written_and_it_is_said(
    config: dict[str, object], tmp_path: Path
) -> None:
    weight = torch.arange(8.0)
    source = save(tmp_path / "pytorch_model.bin", {"embed": weight, "head": weight})
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = shardkit.convert(source, tmp_path / "out")
    assert names_in(tmp_path / "out" / "model.safetensors") == ["embed", "head"]
    assert any("config.json says that nothing is tied" in note for note in report.notes)
    assert report.aliases == {}


@pytest.mark.parametrize(
    "config",
    ["{}", '{"tie_word_embeddings": true}', '{"tie_word_embeddings": null}', "no json", "[1]"],
)
def test_any_other_config_folds_ties(config: str, tmp_path: Path) -> None:
    weight = torch.arange(8.0)
    source = save(tmp_path / "pytorch_model.bin", {"embed": weight, "head": weight})
    (tmp_path / "config.json").write_text(config)
    assert shardkit.convert(source, tmp_path / "out").aliases == {"head": "embed"}


def test_without_a_config_the_folds_are_listed_and_the_option_is_named(tmp_path: Path) -> None:
    weight = torch.arange(8.0)
    source = save(tmp_path / "big.bin", {"embed": weight, "head": weight})
    said = "\n".join(summary(shardkit.convert(source, tmp_path / "out")))
    assert "head = embed" in said
    assert "--ties copy" in said


def test_a_tie_called_format_is_copied_and_never_recorded(tmp_path: Path) -> None:
    weight = torch.arange(8.0)
    report = shardkit.convert(
        save(tmp_path / "big.bin", {"kept": weight, "format": weight}), tmp_path / "out"
    )
    assert report.aliases == {}
    assert names_in(tmp_path / "out" / "model.safetensors") == ["kept", "format"]
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {"format": "pt"}


def test_a_tie_whose_name_the_metadata_of_the_source_has_is_copied(tmp_path: Path) -> None:
    metadata = {"license": "mit", "head.kept": "kept", "tail.kept": "kept"}
    save_file({"kept": torch.arange(8.0)}, tmp_path / "tied.safetensors", metadata)
    report = shardkit.convert(
        tmp_path / "tied.safetensors", tmp_path / "out", rename=[("tail.kept", "license")]
    )
    assert report.aliases == {"head.kept": "kept"}
    assert names_in(tmp_path / "out" / "model.safetensors") == ["kept", "license"]
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {
        "format": "pt",
        "license": "mit",
        "head.kept": "kept",
    }


def test_a_tensor_called_as_the_metadata_says_is_no_tie(tmp_path: Path) -> None:
    shardkit.convert(save(tmp_path / "big.bin", {"pt": torch.ones(2)}), tmp_path / "out")
    assert list(shardkit.open(tmp_path / "out")) == ["pt"]
    assert shardkit.open(tmp_path / "out").metadata == {"format": "pt"}


def test_metadata_of_the_source_is_kept_in_every_shard(tmp_path: Path) -> None:
    metadata = {"license": "apache-2.0", "format": "pt"}
    save_file(layers(5), tmp_path / "model.safetensors", metadata)
    report = shardkit.convert(tmp_path / "model.safetensors", tmp_path / "out", max_shard="9kB")
    assert all(metadata_of(file) == metadata for file in shards_in(tmp_path / "out"))
    assert not report.notes


@pytest.mark.parametrize("written", ["np", "tf", "flax", "mlx", ""])
def test_the_format_of_another_framework_becomes_pt_which_the_readers_require(
    written: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
        path,
        {"format": written, "license": "mit"},
    )
    report = shardkit.convert(path, tmp_path / "out")
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {"format": "pt", "license": "mit"}
    (note,) = report.notes
    assert note.startswith(
        f"the metadata of the source say format {written!r}; the output says 'pt'"
    )
    shardkit.offload_prep(path, tmp_path / "prepared")
    for folder in ("out", "prepared"):
        model = torch.nn.Linear(2, 2)
        assert load_state_dict_from_file(tmp_path / folder / "model.safetensors").keys() == {
            "weight",
            "bias",
        }
        load_checkpoint_in_model(model, str(tmp_path / folder))
        assert torch.equal(model.weight, torch.ones(2, 2))


def test_a_source_that_says_no_format_gets_pt(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"license": "mit"})
    shardkit.convert(tmp_path / "model.safetensors", tmp_path / "out")
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {"format": "pt", "license": "mit"}


def test_of_metadata_that_differs_between_shards_the_first_wins_and_it_is_said(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file(
        {"a": torch.ones(2)}, source / "1.safetensors", {"format": "pt", "by": "me", "only": "here"}
    )
    save_file({"b": torch.ones(2)}, source / "2.safetensors", {"format": "pt", "by": "you"})
    (source / INDEX).write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    report = shardkit.convert(source, tmp_path / "out")
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {
        "format": "pt",
        "by": "me",
        "only": "here",
    }
    assert any("differ in their metadata 'by'" in note for note in report.notes)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save(source / "pytorch_model.bin", layers(3))
    (source / "config.json").write_text("{}")
    before = os.umask(umask)
    try:
        shardkit.convert(source, tmp_path / "out", max_shard="9kB")
        shardkit.convert(source, tmp_path / "one.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "one.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_bit_comes_through(legacy: bool, tmp_path: Path) -> None:
    torch.save(KEPT_BITS, tmp_path / "big.bin", _use_new_zipfile_serialization=not legacy)
    shardkit.convert(tmp_path / "big.bin", tmp_path / "out.safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    assert {name: (t.dtype, t.shape, values(t)) for name, t in loaded.items()} == {
        name: (t.dtype, t.shape, values(t)) for name, t in KEPT_BITS.items()
    }


def test_a_shard_has_no_holes_and_no_bytes_left_over(tmp_path: Path) -> None:
    shardkit.convert(save(tmp_path / "big.bin", layers(7)), tmp_path / "out", max_shard="13kB")
    for file in shards_in(tmp_path / "out"):
        header, start = header_of(file)
        header.pop("__metadata__")
        ranges = sorted(line["data_offsets"] for line in header.values())
        assert ranges[0][0] == 0
        assert all(stop == begin for (_, stop), (begin, _) in pairwise(ranges))
        assert start + ranges[-1][1] == file.stat().st_size


def cached(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A snapshot as Hugging Face caches it: links with the names of files, into a folder of
    blobs.
    """
    snapshot = folder / "models--org--name" / "snapshots" / "0123abcd"
    blobs = folder / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    half = len(state) // 2
    parts = {
        "1.safetensors": dict(list(state.items())[:half]),
        "2.safetensors": dict(list(state.items())[half:]),
    }
    for name, part in parts.items():
        save_file(part, blobs / f"sha-of-{name}")
    index = {
        "metadata": {},
        "weight_map": {tensor: name for name, part in parts.items() for tensor in part},
    }
    (blobs / "sha-of-index").write_text(json.dumps(index))
    (blobs / "sha-of-config").write_text("{}")
    for name, blob in {
        **{n: f"sha-of-{n}" for n in parts},
        INDEX: "sha-of-index",
        "config.json": "sha-of-config",
    }.items():
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_a_snapshot_in_a_hugging_face_cache_is_read_through_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = layers(6)
    snapshot = cached(tmp_path / "hub", state)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    report = shardkit.convert(snapshot, max_shard="9kB")
    assert report.out == tmp_path / "work" / "name-shards"
    assert not (report.out / "config.json").is_symlink()
    loaded = {name: t for file in shards_in(report.out) for name, t in load_file(file).items()}
    assert {name: values(t) for name, t in loaded.items()} == {
        name: values(t) for name, t in state.items()
    }
    assert all(path.is_symlink() for path in snapshot.iterdir())


def test_a_link_to_nothing_and_a_link_to_a_folder_are_no_shards(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", layers(4))
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to("../../blobs/incomplete")
    with pytest.raises(shardkit.ShardkitError, match="is missing"):
        shardkit.open(snapshot)
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to("../../blobs")
    with pytest.raises(shardkit.ShardkitError, match="is a folder"):
        shardkit.open(snapshot)


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    source = save(tmp_path / "big.bin", layers(3))
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(shardkit.ShardkitError):
        shardkit.convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["big.bin"]
