"""OUT.partial/: resumed when it is ours and fits, begun anew when it does not, never shared, and
cleaned up after a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shardkit
from shardkit import __version__
from shardkit.errors import Malformed, NoRoom, OutputError
from shardkit.metadata.unit_records import DONE, PLAN, STATE, Finished, PlanRecord
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import write_record

PLANNED = PlanRecord("digest", (), "", __version__)
OTHER = PlanRecord("another digest", (), "", __version__)


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(
        {f"layers.{number}": torch.full((1000,), float(number)) for number in range(6)},
        tmp_path / "big.bin",
    )
    return tmp_path / "big.bin"


def killed(*args: object, **options: object) -> None:
    raise Killed


def killed_after(count: int) -> Callable[[int], None]:
    """A callback that ends the run once *count* bytes are written."""
    seen = 0

    def on_bytes(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        if seen >= count:
            raise Killed

    return on_bytes


def interrupt(source: Path, out: Path, after: int = 20_000) -> None:
    with pytest.raises(Killed):
        shardkit.convert(source, out, max_shard="9kB", jobs=1, on_bytes=killed_after(after))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wrote(partial: Path, name: str = "a", plan: PlanRecord = PLANNED) -> None:
    with Transaction(partial.with_name("out"), plan).begin():
        (partial / name).write_text("content")
        write_record(partial, plan.key, name, Finished(7, None), sync=True)


def done_in(partial: Path, plan: PlanRecord = PLANNED) -> set[str]:
    with Transaction(partial.with_name("out"), plan).begin() as transaction:
        assert transaction.folder == partial
        return set(transaction.done)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Where the output `out` is prepared."""
    return tmp_path / "out.partial"


def test_a_run_goes_on_where_an_earlier_one_ended(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "whole", max_shard="9kB")
    interrupt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    finished = os.listdir(tmp_path / "out.partial" / DONE)
    stamps = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in finished}
    report = shardkit.convert(source, tmp_path / "out", max_shard="9kB")
    assert report.resumed == len(finished) > 0
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_was_killed_twice_goes_on_too(source: Path, tmp_path: Path) -> None:
    shardkit.convert(source, tmp_path / "whole", max_shard="9kB")
    interrupt(source, tmp_path / "out", after=12_000)
    interrupt(source, tmp_path / "out", after=12_000)
    assert shardkit.convert(source, tmp_path / "out", max_shard="9kB").resumed > 1
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_another_plan_begins_anew(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out")
    report = shardkit.convert(source, tmp_path / "out", max_shard="13kB")
    assert report.resumed == 0
    assert shardkit.verify(tmp_path / "out", source).same


def test_a_source_that_changed_since_begins_anew(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out")
    stat = source.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert shardkit.convert(source, tmp_path / "out", max_shard="9kB").resumed == 0


def test_a_companion_that_changed_since_is_copied_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    source.rename(config.parent / "pytorch_model.bin")
    config.write_text('{"a": 1}')
    with monkeypatch.context() as kill:
        kill.setattr(Transaction, "commit", killed)
        with pytest.raises(Killed):
            shardkit.convert(config.parent, tmp_path / "out")
    config.write_text('{"a": 2}')
    shardkit.convert(config.parent, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 2}'


def test_a_source_that_changes_while_it_is_read_leaves_nothing(
    source: Path, tmp_path: Path
) -> None:
    def touch(count: int) -> None:
        os.utime(source)

    with pytest.raises(Malformed, match="changed while it was read"):
        shardkit.convert(source, tmp_path / "out", on_bytes=touch)
    assert os.listdir(tmp_path) == ["big.bin"]


def test_a_source_that_becomes_shorter_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def cut(count: int) -> None:
        os.truncate(source, 5000)

    with pytest.raises(Malformed, match="ends before byte"):
        shardkit.convert(source, tmp_path / "out", max_shard="9kB", jobs=1, on_bytes=cut)
    assert os.listdir(tmp_path) == ["big.bin"]


def test_files_that_were_not_synced_count_only_until_the_system_starts_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for boot, resumes in (("first", True), ("second", False)):
        monkeypatch.setattr("shardkit.operations.write_output.boot_id", lambda: "first")
        with pytest.raises(Killed):
            shardkit.convert(
                source,
                tmp_path / boot,
                max_shard="9kB",
                jobs=1,
                sync=False,
                on_bytes=killed_after(20_000),
            )
        monkeypatch.setattr("shardkit.operations.write_output.boot_id", lambda boot=boot: boot)
        assert (
            shardkit.convert(source, tmp_path / boot, max_shard="9kB", sync=False).resumed > 0
        ) is resumes


def test_two_runs_at_a_time_are_refused(source: Path, tmp_path: Path) -> None:
    def again(count: int) -> None:
        with pytest.raises(
            OutputError, match=r"in use by another run of shardkit: 'process [0-9]+ on "
        ):
            shardkit.convert(source, tmp_path / "out")

    shardkit.convert(source, tmp_path / "out", on_bytes=again)
    assert shardkit.verify(tmp_path / "out", source).same


def test_a_folder_that_no_run_left_there_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="shardkit did not write") as caught:
        shardkit.convert(source, tmp_path / "out")
    assert caught.value.hint
    assert files_in(tmp_path / "out.partial") == {"model.safetensors": b"mine"}


def test_an_empty_one_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    shardkit.convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["big.bin", "out"]


def test_what_was_finished_stays_until_there_is_room_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, tmp_path / "out")
    with monkeypatch.context() as small:
        small.setattr(
            "shardkit.operations.write_output.bytes_to_store", lambda *args, **options: 1 << 60
        )
        with pytest.raises(NoRoom):
            shardkit.convert(source, tmp_path / "out", max_shard="9kB")
        with pytest.raises(NoRoom):
            shardkit.convert(source, tmp_path / "fresh", max_shard="9kB")
    assert not (tmp_path / "fresh.partial").exists()
    assert shardkit.convert(source, tmp_path / "out", max_shard="9kB").resumed > 0


def test_only_what_is_finished_is_kept(partial: Path) -> None:
    wrote(partial)
    (partial / "half").write_text("ha")
    (partial / "sub").mkdir()
    (partial / "sub" / "half").write_text("ha")
    assert done_in(partial) == {"a"}
    assert sorted(os.listdir(partial)) == [STATE, "a"]
    assert sorted(os.listdir(partial / STATE)) == ["done", "lock", "plan.json"]


@pytest.mark.parametrize(
    "damage",
    [lambda file: file.unlink(), lambda file: file.write_text("cont")],
    ids=["gone", "shorter"],
)
def test_a_finished_file_that_is_no_longer_whole_is_written_again(
    damage: Callable[[Path], None], partial: Path
) -> None:
    wrote(partial)
    damage(partial / "a")
    assert done_in(partial) == set()


def test_another_identity_keeps_nothing(partial: Path) -> None:
    wrote(partial)
    assert done_in(partial, OTHER) == set()
    assert os.listdir(partial) == [STATE]
    assert sorted(os.listdir(partial / STATE)) == ["lock", "new", "plan.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"file": "a", "pl',
        b"\0\0\0",
        b"[]",
        b"\xff\xfe\0",
        b"{}",
        b"[" * 99_999,
    ],
)
def test_a_damaged_record_costs_its_own_file_only(content: bytes, partial: Path) -> None:
    wrote(partial, "b")
    wrote(partial)
    (partial / DONE / "a").write_bytes(content)
    assert done_in(partial) == {"b"}
    assert not (partial / "a").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"nbytes": "7"},
        lambda record: record | {"file": "b"},
        lambda record: record | {"plan": "of another"},
        lambda record: record | {"schema": "shardkit.unit/0"},
        lambda record: record | {"digests": {"whole": 1}},
    ],
    ids=["size", "name", "plan", "schema", "digests"],
)
def test_a_record_of_something_else_counts_for_nothing(
    change: Callable[[dict[str, object]], dict[str, object]], partial: Path
) -> None:
    wrote(partial)
    path = partial / DONE / "a"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert done_in(partial) == set()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"{}\n", b"no plan\n", b"[" * 99_999])
def test_a_plan_that_is_none_begins_anew(content: bytes, partial: Path) -> None:
    wrote(partial)
    (partial / PLAN).write_bytes(content)
    assert done_in(partial) == set()
    assert os.listdir(partial) == [STATE]


def test_a_run_of_version_0_1_is_begun_anew(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".shardkit-journal").write_text("{}")
    (tmp_path / "out.partial" / "model.safetensors").write_text("of an older version")
    shardkit.convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["big.bin", "out"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "renames"])
def test_a_kill_between_the_swap_and_the_cleaning_up_mends_itself(
    exchanges: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr("shardkit.system.folders.exchange", lambda first, second: False)
    shardkit.convert(source, tmp_path / "out")
    with monkeypatch.context() as kill:
        kill.setattr(Transaction, "_clear", killed)
        with pytest.raises(Killed):
            shardkit.convert(source, tmp_path / "out", max_shard="9kB", overwrite=True)
    assert len(shardkit.open(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "model-00001-of-00006.safetensors").exists()
    shardkit.convert(source, tmp_path / "out", max_shard="20kB", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["big.bin", "out"]
    assert STATE not in os.listdir(tmp_path / "out")


def test_a_kill_before_the_swap_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as kill:
        kill.setattr(Transaction, "commit", killed)
        with pytest.raises(Killed):
            shardkit.convert(source, tmp_path / "out", max_shard="9kB")
    assert shardkit.convert(source, tmp_path / "out", max_shard="9kB").resumed == 7
    assert sorted(os.listdir(tmp_path)) == ["big.bin", "out"]
