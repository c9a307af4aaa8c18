"""--compress: shards in the seekable format of zstd, cut at tensors, read in place, and expanded by
anybody.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardkit
from shardkit.checkpoint.edits import Edits
from shardkit.cli import main
from shardkit.codecs.zstd import CODEC, frames
from shardkit.errors import Malformed, PlanError
from shardkit.payloads.codec import Codec
from shardkit.payloads.payload import Extent, Literal
from shardkit.planning.frames import FRAME, cut
from shardkit.planning.options import ConversionOptions
from shardkit.planning.plan import OutputFile
from shardkit.planning.prepare import prepare
from shardkit.sources import registry
from shardkit.writing.compress import write_compressed
from truth import values

INDEX = "model.safetensors.index.json"
zstd = shutil.which("zstd")


def state(layers: int = 4) -> dict[str, torch.Tensor]:
    """A model whose larger weights take several frames, with some that are small, empty, or in no
    step with the others.
    """
    random = torch.Generator().manual_seed(0)
    made = {
        "embed.weight": torch.randn(2000, 700, generator=random),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 3),
    }
    for number in range(layers):
        made[f"layers.{number}.w"] = torch.randn(300, 300, generator=random).to(torch.bfloat16)
        made[f"layers.{number}.steps"] = torch.tensor(number)
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress") / "model"
    folder.mkdir()
    save_file(state(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expanded(path: Path) -> bytes:
    """*path* as the reference implementation expands it: the program, where it is installed, or the
    library.
    """
    if zstd:
        return subprocess.run(
            [zstd, "-d", "-c", "-q", path], stdout=subprocess.PIPE, check=True
        ).stdout
    return bytes(
        zstandard.ZstdDecompressor()
        .stream_reader(path.read_bytes(), read_across_frames=True)
        .read()
    )


def expand(folder: Path) -> None:
    """What `zstd -d --rm` does to every compressed file in *folder*."""
    for path in folder.glob("*.zst"):
        path.with_suffix("").write_bytes(expanded(path))
        path.unlink()


@pytest.mark.parametrize("bound", ["1MB", None])
@pytest.mark.parametrize("write", [shardkit.convert, shardkit.offload_prep])
def test_what_zstd_expands_is_what_is_written_without(
    source: Path, tmp_path: Path, write: Any, bound: str | None
) -> None:
    write(source, tmp_path / "plain", max_shard=bound)
    write(source, tmp_path / "out", max_shard=bound, compress="zstd")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".zst"}
    assert shardkit.verify(tmp_path / "out", source).same
    assert shardkit.verify(tmp_path / "out").same
    expand(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_it_is_read_in_place_by_all_that_read(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "out", max_shard="1MB", compress="zstd")
    checkpoint = shardkit.open(tmp_path / "out")
    assert {
        name: bytes(entry.read()) for name, entry in shardkit.open(source)._by_name.items()
    } == {name: bytes(checkpoint[name].read()) for name in checkpoint}
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shardkit.convert(tmp_path / "out", tmp_path / "again", max_shard=None)
    again, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "again", source)
    )
    assert {name: values(each) for name, each in again.items()} == {
        name: values(each) for name, each in before.items()
    }
    assert (tmp_path / "again" / "config.json").is_file()
    shutil.copy(
        tmp_path / "again" / "model.safetensors",
        tmp_path / "out" / "model-00001-of-00007.safetensors",
    )
    assert (
        shardkit.open(tmp_path / "out")["scalar"].read() == checkpoint["scalar"].read()
    )  # the plain file, if both are there


def test_the_loader_streams_from_it(source: Path, tmp_path: Path) -> None:
    from shardkit.load import close, load_checkpoint_and_dispatch

    def model() -> torch.nn.Sequential:
        return torch.nn.Sequential(*(torch.nn.Linear(700, 700) for _ in range(4)))

    torch.manual_seed(0)
    resident = model()
    save_file(resident.state_dict(), tmp_path / "m.safetensors")
    shardkit.offload_prep(
        tmp_path / "m.safetensors", tmp_path / "out", compress="zstd", max_shard="3MB"
    )
    with torch.device("meta"):
        empty = model()
    streamed = load_checkpoint_and_dispatch(
        empty, tmp_path / "out", device_map={"": "disk"}, ring=2
    )
    x = torch.ones(2, 700)
    for _ in range(2):
        assert torch.equal(streamed(x), resident(x))
    close(streamed)


def test_frames_begin_where_tensors_and_blocks_do(source: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(source, tmp_path / "out", compress="zstd")
    path = tmp_path / "out" / "model.safetensors.zst"
    listed = frames(Extent(path, 0, path.stat().st_size))
    assert max(frame.expanded for frame in listed) <= FRAME
    starts = {0}
    for frame in listed:
        starts.add(max(starts) + frame.expanded)
    record = json.loads((tmp_path / "out" / "offload.json").read_text())
    assert record["shards"].keys() == {"model.safetensors"}
    assert {block["start"] for block in record["blocks"]} <= starts
    assert record["shards"]["model.safetensors"]["nbytes"] == max(starts)
    (embed,) = (block for block in record["blocks"] if block["name"] == "embed")
    assert embed["start"] + FRAME in starts


@given(st.lists(st.integers(0, 3 * FRAME), max_size=12), st.sets(st.integers(0, 11)))
def test_frames_cover_all_and_cut_no_piece_that_fits(sizes: list[int], fenced: set[int]) -> None:
    stops = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    fences = frozenset(stops[at] for at in fenced if at < len(stops))
    made = list(cut(stops, fences))
    ends = {sum(made[: at + 1]) for at in range(len(made))} | {0}
    assert sum(made) == sum(sizes)
    assert all(0 < each <= FRAME for each in made)
    assert fences <= ends
    for start, stop in zip([0, *stops], stops, strict=False):
        assert stop - start > FRAME or not any(start < end < stop for end in ends)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_same_bytes_come_out_with_any_number_of_jobs(
    source: Path, tmp_path: Path, jobs: int
) -> None:
    shardkit.convert(source, tmp_path / "one", compress="zstd", jobs=2)
    shardkit.convert(source, tmp_path / "other", compress="zstd", jobs=jobs)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_a_run_that_is_interrupted_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    shardkit.offload_prep(source, tmp_path / "whole", compress="zstd", max_shard="1MB")
    seen = 0

    def interrupt(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 6_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardkit.offload_prep(
            source, tmp_path / "out", compress="zstd", max_shard="1MB", jobs=1, on_bytes=interrupt
        )
    report = shardkit.offload_prep(source, tmp_path / "out", compress="zstd", max_shard="1MB")
    assert report.resumed >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_progress_is_that_of_what_is_compressed(source: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    shardkit.convert(source, tmp_path / "out", compress="zstd", on_bytes=counts.append)
    assert (
        sum(counts)
        == prepare(
            source, tmp_path / "other", Edits(), ConversionOptions(compress="zstd")
        ).plan.nbytes
    )


def test_one_file_may_be_compressed(source: Path, tmp_path: Path) -> None:
    report = shardkit.convert(source, tmp_path / "m.safetensors.zst", compress="zstd")
    assert shardkit.verify(tmp_path / "m.safetensors.zst", source).same
    assert report.stored == (tmp_path / "m.safetensors.zst").stat().st_size
    with pytest.raises(PlanError, match=r"m\.safetensors would be compressed") as caught:
        shardkit.convert(source, tmp_path / "m.safetensors", compress="zstd")
    assert "m.safetensors.zst" in str(caught.value.hint)


def test_the_run_says_what_it_saved(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--compress", "zstd"]) == 0
    said = capsys.readouterr().err
    assert " compressed" in said
    assert " % less than " in said
    report = shardkit.convert(source, tmp_path / "other", compress="zstd")
    assert report.stored < report.nbytes
    plain = shardkit.convert(source, tmp_path / "plain")
    assert plain.stored == (tmp_path / "plain" / "model.safetensors").stat().st_size > plain.nbytes


def test_a_file_of_another_format_is_not_compressed_whatever_it_is_called(
    source: Path, tmp_path: Path
) -> None:
    toy = replace(registry.format_named("safetensors"), name="toy", suffixes=(".toy",))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "writer_for", lambda suffix: toy if suffix == ".toy" else None)
        for name in ("m.toy", "m.toy.zst"):
            with pytest.raises(PlanError, match="only safetensors can be compressed") as caught:
                shardkit.convert(source, tmp_path / name, compress="zstd")
            assert caught.value.hint == "leave out compress=, or write safetensors"


def test_a_manifest_lists_what_lies_on_the_disk(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "out", compress="zstd", checksum="sha256", max_shard="1MB")
    manifest = json.loads((tmp_path / "out" / "shardkit.manifest.json").read_text())
    sizes = {
        path.name: path.stat().st_size
        for path in (tmp_path / "out").iterdir()
        if "manifest" not in path.name
    }
    assert {name: file["nbytes"] for name, file in manifest["files"].items()} == sizes
    found = shardkit.verify(tmp_path / "out")
    assert (found.same, found.tensors) == (True, len(state()))


@pytest.mark.parametrize("checksum", [None, "sha256"])
def test_damage_is_found(source: Path, tmp_path: Path, checksum: str | None) -> None:
    shardkit.offload_prep(source, tmp_path / "out", compress="zstd", checksum=checksum)
    path = tmp_path / "out" / "model.safetensors.zst"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    if checksum:
        (fault,) = shardkit.verify(tmp_path / "out").differences
        assert fault.name == "model.safetensors.zst"
    else:
        with pytest.raises(
            Malformed, match=r"model\.safetensors\.zst: broken zstd data: the frame at byte"
        ):
            shardkit.verify(tmp_path / "out")


def test_verify_says_that_frames_were_held_against_their_checksums(
    source: Path, tmp_path: Path
) -> None:
    shardkit.convert(source, tmp_path / "out", compress="zstd")
    note, beside = shardkit.verify(tmp_path / "out").notes
    assert beside == "files beside the weights were not checked: 'config.json'"
    held = sum(tensor.nbytes > 0 for tensor in state().values())
    assert note == (
        "decompressed, and compared with the checksums in the frames, where there are any: "
        f"{held} tensors"
    )


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_frame_keeps_its_bytes_while_it_is_compressed(ahead: int, tmp_path: Path) -> None:
    def late(frame: memoryview) -> bytes:
        time.sleep(0.01)
        return bytes(frame)

    whole = bytes(range(40))
    codec = Codec(
        name="late",
        suffix=".late",
        sniff=lambda head: False,
        decompress=lambda pieces: iter(()),
        compress=late,
    )
    file = OutputFile(
        "file.late", (Literal(whole[:7]), Literal(whole[7:])), codec, (3, 10, 1, 9, 10, 7)
    )
    with open(tmp_path / file.name, "wb") as output, ThreadPoolExecutor(ahead) as pool:
        write_compressed(
            file,
            output.fileno(),
            pool,
            ahead=ahead,
            see=[],
            see_stored=[],
            on_bytes=lambda count: None,
        )
    assert (tmp_path / file.name).read_bytes() == whole


def test_an_output_is_replaced_by_a_plain_one(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "out", compress="zstd")
    shardkit.convert(source, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_only_what_can_be_told_apart_is_compressed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"there is no codec called 'gzip' that compresses; there are zstd"
    ):
        shardkit.convert(source, tmp_path / "out", compress="gzip")


def test_the_table_is_that_of_the_seekable_format() -> None:
    made = CODEC.table(frames(Extent(Path(os.devnull), 0, 0)))
    assert struct.unpack("<IIIBI", made) == (0x184D2A5E, 9, 0, 0, 0x8F92EAB1)
