"""An index, and one shard, are held against the digests of the folder that they lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardkit
from shardkit.cli import main
from shardkit.operations.compare import verify

INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["manifest", "record", "compressed record"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three shards with a manifest or an offload.json beside them."""
    source, out = tmp_path / "a.pt", tmp_path / "out"
    torch.save(
        {f"layers.{number}.weight": torch.full((64, 64), float(number)) for number in range(3)},
        source,
    )
    if request.param == "manifest":
        shardkit.convert(source, out, max_shard="20KB", checksum="sha256")
    else:
        compress = "zstd" if request.param.startswith("compressed") else None
        shardkit.offload_prep(source, out, max_shard="20KB", compress=compress)
    assert len(shards(out)) == 3
    return out


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors*"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1 if path.suffix == ".safetensors" else len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_index_and_a_shard_are_compared_with_the_digests_beside_them(folder: Path) -> None:
    for path, count in ((folder / INDEX, 3), *((shard, 1) for shard in shards(folder))):
        comparison = verify(path)
        assert (comparison.same, comparison.tensors, comparison.unchecked, comparison.nbytes) == (
            True,
            count,
            0,
            count * 16384,
        )
        assert any(note.startswith("compared with the ") for note in comparison.notes)


def test_damage_is_found_from_the_index_and_from_the_shard_that_has_it(folder: Path) -> None:
    first, second, _ = shards(folder)
    damage(first)
    assert main(["verify", str(folder / INDEX)]) == 1
    assert main(["verify", str(first)]) == 1
    assert main(["verify", str(second)]) == 0
    if first.suffix == ".safetensors":  # else it is a frame that is damaged, and has no name
        (difference,) = verify(first).differences
        assert "layers.0" in difference.name


def test_a_file_that_nothing_lists_is_not_compared_with_the_digests_of_others(folder: Path) -> None:
    other = folder / "other.safetensors"
    save_file({"w": torch.ones(3)}, other)
    comparison = verify(other)
    assert (comparison.same, comparison.unchecked) == (True, 1)


@pytest.mark.parametrize("against", [False, True], ids=["alone", "against"])
def test_an_index_whose_shards_are_gone_is_a_note_and_no_part_with_weights(
    against: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}')
    extra = ["--against", str(tmp_path / "model.safetensors")] if against else []
    assert main(["verify", str(tmp_path), *extra]) == 0
    said = "".join(capsys.readouterr())
    assert f"'{INDEX}', an index, was not read: 1 of its 1 files is missing" in said
    assert "not compared" not in said
