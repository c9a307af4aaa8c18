"""An output written in parts: the same bytes as from one run, whoever writes and whoever is
killed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

import shardkit
from shardkit.cli import main
from shardkit.errors import FormatError, Incomplete, OutputError
from shardkit.metadata.unit_records import NEW, PlanRecord
from shardkit.payloads.compressed import Spool
from shardkit.writing.transaction import Transaction

OPTIONS = {"max_shard": "9kB", "checksum": "xxh3"}
Capture = pytest.CaptureFixture[str]


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of six layers with a config, in the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("model")
    folder.mkdir()
    weights = {f"layers.{number}": torch.full((1000,), float(number)) for number in range(6)}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def part(source: Path, text: str, **options: object) -> shardkit.Report:
    return shardkit.convert(source, "out", part=text, **{**OPTIONS, **options})  # type: ignore[arg-type] # values of several types


@pytest.fixture
def whole(source: Path) -> dict[str, bytes]:
    """What one run writes."""
    return files_in(shardkit.convert(source, "whole", **OPTIONS).out)  # type: ignore[arg-type] # texts


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_parts_give_what_one_run_gives(source: Path, whole: dict[str, bytes], count: int) -> None:
    reports = [part(source, f"{number}/{count}") for number in range(count, 0, -1)]
    assert not Path("out").exists()
    assert sum(report.tensors for report in reports) == 6
    assert sum(report.shards for report in reports) == 6
    report = shardkit.commit("out")
    assert (report.tensors, report.part) == (6, None)
    assert files_in(Path("out")) == whole
    assert sorted(os.listdir()) == ["model", "out", "whole"]
    assert shardkit.verify("out", source).same


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_offload_prep_is_written_in_parts_too(source: Path, compress: str | None) -> None:
    options = {"max_shard": "9kB", "order": ["layers.5", "layers.0"], "compress": compress}
    whole = files_in(shardkit.offload_prep(source, "whole", **options).out)  # type: ignore[arg-type] # values of several types
    for number in (1, 2):
        shardkit.offload_prep(source, "out", part=f"{number}/2", **options)  # type: ignore[arg-type] # likewise
    shardkit.commit("out")
    assert files_in(Path("out")) == whole


def test_every_edit_is_planned_again(source: Path) -> None:
    options = {
        "include": ["*layers*"],
        "exclude": ["*.3"],
        "rename": [("^layers", "blocks")],
        "dtype": "bf16",
        "ties": "copy",
        "with_companions": False,
        "limits": shardkit.Limits(tensors=10),
        "max_shard": 5000,
    }
    whole = files_in(shardkit.convert(source, "whole", **options).out)  # type: ignore[arg-type] # values of several types
    shardkit.convert(source, "out", part="1/1", **options)  # type: ignore[arg-type] # likewise
    shardkit.commit("out")
    assert files_in(Path("out")) == whole


def test_one_file_is_one_part(source: Path) -> None:
    for number in (1, 2):
        shardkit.convert(source, "model.safetensors", part=f"{number}/2")
    shardkit.commit("model.safetensors")
    assert len(shardkit.open("model.safetensors")) == 6
    assert sorted(os.listdir()) == ["model", "model.safetensors"]


def test_a_commit_names_what_is_missing_and_changes_nothing(source: Path) -> None:
    part(source, "1/3")
    before = files_in(Path("out.partial"))
    with pytest.raises(Incomplete, match="5 of 8 files missing: 'model-0000") as caught:
        shardkit.commit("out")
    assert len(caught.value.missing) == 5
    assert caught.value.hint
    after = files_in(Path("out.partial"))
    assert {name: after[name] for name in before if "lock" not in name} == {
        name: before[name] for name in before if "lock" not in name
    }


def test_the_missing_files_may_be_written_by_one_run(source: Path, whole: dict[str, bytes]) -> None:
    part(source, "2/3")
    report = shardkit.convert(source, "out", **OPTIONS)  # type: ignore[arg-type] # texts
    assert report.resumed > 0
    assert files_in(Path("out")) == whole


def test_parts_end_what_one_run_has_begun(source: Path, whole: dict[str, bytes]) -> None:
    def killed(event: shardkit.Event) -> None:
        if event.kind == "finished":
            raise Killed

    with pytest.raises(Killed):
        shardkit.convert(source, "out", jobs=1, on_event=killed, **OPTIONS)  # type: ignore[arg-type] # texts
    reports = [part(source, f"{number}/2") for number in (1, 2)]
    assert sum(report.resumed for report in reports) >= 1
    shardkit.commit("out")
    assert files_in(Path("out")) == whole


def test_what_a_killed_part_leaves_is_removed_by_the_commit(
    source: Path, whole: dict[str, bytes]
) -> None:
    for number in (1, 2):
        part(source, f"{number}/2")
    (Path("out.partial") / NEW).mkdir(exist_ok=True)
    (Path("out.partial") / NEW / "half").write_bytes(b"half of a file")
    shardkit.commit("out")
    assert files_in(Path("out")) == whole


def test_a_file_that_became_shorter_is_missing(source: Path) -> None:
    for number in (1, 2):
        part(source, f"{number}/2")
    os.truncate("out.partial/model-00002-of-00006.safetensors", 100)
    with pytest.raises(Incomplete, match="1 of 8 files missing: 'model-00002") as caught:
        shardkit.commit("out")
    assert caught.value.missing == ("model-00002-of-00006.safetensors",)
    for number in (1, 2):
        part(source, f"{number}/2")
    assert shardkit.commit("out").tensors == 6


def test_two_parts_run_at_the_same_time(source: Path, whole: dict[str, bytes]) -> None:
    begun = False

    def other(event: shardkit.Event) -> None:
        nonlocal begun
        if event.kind == "started" and not begun:
            begun = True
            part(source, "2/2")

    part(source, "1/2", on_event=other)
    assert shardkit.commit("out").tensors == 6
    assert files_in(Path("out")) == whole


@pytest.mark.parametrize(
    "act",
    [
        lambda source: shardkit.commit("out"),
        lambda source: shardkit.convert(source, "out", max_shard="9kB", checksum="xxh3"),
    ],
    ids=["commit", "convert"],
)
def test_nothing_is_put_in_place_while_a_part_is_written(
    source: Path, act: Callable[[Path], object]
) -> None:
    def other(event: shardkit.Event) -> None:
        if event.kind == "started":
            with pytest.raises(OutputError, match="in use by another run"):
                act(source)

    part(source, "1/2", on_event=other)
    part(source, "2/2")
    assert shardkit.commit("out").tensors == 6


def test_a_part_beside_a_run_for_itself_is_refused(source: Path) -> None:
    def other(event: shardkit.Event) -> None:
        if event.kind == "started":
            with pytest.raises(OutputError, match="in use by another run"):
                part(source, "1/2")

    shardkit.convert(source, "out", on_event=other, **OPTIONS)  # type: ignore[arg-type] # texts
    assert shardkit.verify("out", source).same


def test_parts_of_another_plan_are_refused_and_say_what_differs(source: Path) -> None:
    part(source, "1/2")
    kept = files_in(Path("out.partial"))
    with pytest.raises(OutputError, match="max_shard was '9000', and is '20000'"):
        part(source, "2/2", max_shard="20kB")
    with pytest.raises(OutputError, match="max_shard was '9000', and is '20000'"):
        shardkit.convert(source, "out", max_shard="20kB", checksum="xxh3")
    with pytest.raises(OutputError, match="begun by convert of"):
        shardkit.offload_prep(source, "out", part="2/2")
    now = files_in(Path("out.partial"))
    assert {name for name in kept if "lock" not in name} == {n for n in now if "lock" not in n}


@pytest.mark.parametrize("act", [lambda s: part(s, "2/2"), lambda s: shardkit.commit("out")])
def test_a_source_that_changed_is_refused_by_name(
    source: Path, act: Callable[[Path], object]
) -> None:
    part(source, "1/2")
    weights = source / "pytorch_model.bin"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    with pytest.raises(OutputError, match=r"pytorch_model\.bin changed since"):
        act(source)


def test_a_source_that_changes_while_a_part_reads_it_is_refused(source: Path) -> None:
    def touch(event: shardkit.Event) -> None:
        os.utime(source / "pytorch_model.bin")

    with pytest.raises(FormatError, match="changed while it was read"):
        part(source, "1/2", on_event=touch)
    with pytest.raises(OutputError, match="changed since"):
        part(source, "2/2")


def test_a_damaged_source_is_found_by_the_part_that_checks_it(source: Path) -> None:
    weights = source / "pytorch_model.bin"
    content = bytearray(weights.read_bytes())
    at = content.index(torch.full((1000,), 3.0).numpy().tobytes())
    content[at + 5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FormatError, match="pytorch_model"):
        part(source, "1/2")
    part(source, "2/2")
    with pytest.raises(Incomplete):
        shardkit.commit("out")


def test_the_part_that_checks_the_source_says_so_and_no_other(source: Path) -> None:
    first, second = (part(source, f"{number}/2") for number in (1, 2))
    assert [note for note in first.notes if "CRC" in note]
    assert not [note for note in second.notes if "CRC" in note or "checksum" in note]


def test_another_version_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr("shardkit.operations.write_output.__version__", "0.1.9")
        older.setattr("shardkit.writing.writer.__version__", "0.1.9")
        part(source, "1/2")
    with pytest.raises(OutputError, match=r"begun by shardkit '0\.1\.9', and this is"):
        part(source, "2/2")


def test_a_commit_is_refused_where_nothing_was_begun(source: Path) -> None:
    with pytest.raises(OutputError, match="no parts of out to commit"):
        shardkit.commit("out")
    shardkit.convert(source, "out")
    with pytest.raises(OutputError, match="in its place already"):
        shardkit.commit("out")


def test_an_earlier_output_is_replaced_only_if_asked(source: Path) -> None:
    shardkit.convert(source, "out", max_shard="20kB")
    with pytest.raises(OutputError, match="exists"):
        part(source, "1/1")
    part(source, "1/1", overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        shardkit.commit("out")
    assert shardkit.commit("out", overwrite=True).shards == 6
    assert sorted(os.listdir()) == ["model", "out"]


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_a_commit_that_was_killed_is_ended_by_the_next(
    source: Path, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise Killed

    out = "one.safetensors" if single else "out"
    shardkit.convert(source, out, part="1/1")
    with monkeypatch.context() as kill:
        kill.setattr(Transaction, "_clear", killed)
        with pytest.raises(Killed):
            shardkit.commit(out)
    assert shardkit.commit(out).tensors == 6
    assert sorted(os.listdir()) == sorted(["model", out])


def test_a_part_that_begins_is_no_removal_that_was_cut_short(source: Path) -> None:
    """Between its lock and its plan, beside an output that is there."""
    shardkit.convert(source, "out", max_shard="20kB")
    part(source, "1/2", overwrite=True)
    done = shardkit.status("out").done
    os.rename("out.partial/.shardkit/plan.json", "kept")
    other = Transaction(Path("out"), PlanRecord("", (), "", ""))
    assert other.recover(shared=True) is False
    os.rename("kept", "out.partial/.shardkit/plan.json")
    assert shardkit.status("out").done == done > 0


def test_very_many_processes_begin_at_once(source: Path, whole: dict[str, bytes]) -> None:
    shardkit.convert(source, "out", max_shard="20kB")
    errors: list[BaseException] = []
    gate = threading.Barrier(12)

    def run(number: int) -> None:
        gate.wait()
        try:
            part(source, f"{number}/12", overwrite=True)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    shardkit.commit("out", overwrite=True)
    assert files_in(Path("out")) == whole


@pytest.mark.parametrize("name", ["", ".shardkit", ".shardkit/done", ".shardkit/new"])
def test_a_link_in_place_of_a_folder_of_ours_is_not_followed(source: Path, name: str) -> None:
    part(source, "1/2")
    victim = Path("victim")
    shutil.copytree("out.partial", victim)
    (victim / "precious").write_text("mine")
    before = files_in(victim)
    place = Path("out.partial", name)
    shutil.rmtree(place)
    place.symlink_to((victim / name).absolute())
    with pytest.raises(OutputError, match="is a link"):
        shardkit.commit("out")
    with pytest.raises(OutputError, match="is a link"):
        shardkit.convert(source, "out")
    with pytest.raises(OutputError, match="is a link"):
        part(source, "2/2")
    assert files_in(victim) == before


def test_very_many_parts_take_no_memory(source: Path) -> None:
    report = part(source, "999999999/999999999")
    assert report.shards == 0


@pytest.mark.parametrize("left", ["all", "lock"])
def test_what_a_commit_leaves_that_was_killed_at_its_end_is_removed(
    source: Path, whole: dict[str, bytes], left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise Killed

    part(source, "1/1")
    with monkeypatch.context() as kill:
        kill.setattr(Transaction, "_clear", killed)
        with pytest.raises(Killed):
            shardkit.commit("out")
    assert shardkit.status("out").state == "in place"
    if left == "lock":
        for path in Path("out/.shardkit").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        with pytest.raises(OutputError, match="in its place already"):
            shardkit.commit("out")
    else:
        shardkit.commit("out")
    assert files_in(Path("out")) == whole
    assert not Path("out/.shardkit").exists()


def test_a_damaged_plan_is_named(source: Path) -> None:
    part(source, "1/2")
    Path("out.partial/.shardkit/plan.json").write_text("{")
    with pytest.raises(OutputError, match=r"plan\.json is damaged"):
        shardkit.status("out")
    with pytest.raises(OutputError, match=r"plan\.json is damaged"):
        shardkit.commit("out")
    with pytest.raises(OutputError, match="its record is damaged"):
        part(source, "2/2")


def test_equal_sizes_are_equal_however_they_are_written(source: Path) -> None:
    part(source, "1/2")
    part(source, "2/2", max_shard=9000)
    assert shardkit.commit("out").shards == 6


def test_the_status_follows_the_work(source: Path) -> None:
    assert shardkit.status("out").state == "not begun"
    seen: list[bool] = []
    part(source, "1/2", on_event=lambda event: seen.append(shardkit.status("out").running))
    assert all(seen)
    found = shardkit.status("out")
    assert (found.state, found.files, found.running) == ("unfinished", 8, False)
    assert found.done + len(found.missing) == 8
    assert found.source == str(source.absolute())
    part(source, "2/2")
    found = shardkit.status("out")
    assert (found.state, found.done_nbytes, found.missing) == ("complete", found.nbytes, ())
    shardkit.commit("out")
    assert shardkit.status("out").state == "in place"


def test_the_commands_say_what_comes_next(source: Path, capsys: Capture) -> None:
    arguments = ["convert", str(source), "-o", "out", "--max-shard", "9kB"]
    assert main([*arguments, "--part", "1/2"]) == 0
    assert "shardkit commit out" in capsys.readouterr().err
    assert main(["commit", "out"]) == 1
    assert "files missing" in capsys.readouterr().err
    assert main(["status", "out"]) == 0
    assert "out is unfinished: " in capsys.readouterr().out
    assert main(["inspect", "out.partial"]) == 1
    assert "shardkit status out" in capsys.readouterr().err
    assert main([*arguments, "--part", "2/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["part"] == "2/2"
    assert main(["status", "out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["state"]) == ("shardkit.status/1", "complete")
    assert main(["commit", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "shardkit.commit/1"
    assert main(["status", "out"]) == 0
    assert "out/ is in place" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["--dry-run", "--no-fsync"])
def test_options_that_a_part_cannot_keep_are_refused(
    source: Path, other: str, capsys: Capture
) -> None:
    assert main(["convert", str(source), "-o", "out", "--part", "1/2", other]) == 2
    assert f"--part and {other} exclude each other" in capsys.readouterr().err


def test_what_is_compressed_is_expanded_once_by_the_processes_of_a_machine(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = (source / "pytorch_model.bin").read_bytes()
    Path("big.bin.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    whole = files_in(shardkit.convert("big.bin.zst", "whole", max_shard="9kB").out)
    expansions: list[object] = []
    fill = Spool._fill

    def counted(spool: Spool, file: IO[bytes]) -> None:
        expansions.append(spool)
        fill(spool, file)

    monkeypatch.setattr(Spool, "_fill", counted)
    for number in (1, 2, 3):
        shardkit.convert("big.bin.zst", "out", max_shard="9kB", part=f"{number}/3")
    shardkit.commit("out")
    assert len(expansions) == 1
    assert files_in(Path("out")) == whole


def test_a_part_that_is_refused_leaves_nothing_that_it_has_expanded(source: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = (source / "pytorch_model.bin").read_bytes()
    Path("big.bin.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    shardkit.convert("big.bin.zst", "out")
    with pytest.raises(OutputError, match="exists"):
        shardkit.convert("big.bin.zst", "out", part="1/2")
    assert not Path("out.partial").exists()


def test_a_stream_that_is_broken_leaves_no_half_of_it(source: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = zstandard.ZstdCompressor().compress(bytes(1000) + os.urandom(100_000))
    Path("big.bin.zst").write_bytes(content[:-50_000])
    with pytest.raises(FormatError):
        shardkit.convert("big.bin.zst", "out", part="1/2")
    assert not [
        path for path in Path("out.partial").rglob("*") if path.is_file() and path.stat().st_size
    ]


def test_a_source_that_is_gone_is_named_by_the_commit(source: Path) -> None:
    part(source, "1/1")
    shutil.move(source, "elsewhere")
    with pytest.raises(FormatError, match="cannot be read"):
        shardkit.commit("out")
