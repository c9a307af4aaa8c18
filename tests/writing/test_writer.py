"""Carrying out a plan: the same bytes whatever the engine and the number of jobs, computed parts,
failures, the check.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardkit import __version__
from shardkit.errors import FormatError, Malformed, OutputError
from shardkit.events import Event
from shardkit.fleet.execute import execute
from shardkit.fleet.executor import Threads
from shardkit.metadata.unit_records import DONE, NEW, Finished, PlanRecord
from shardkit.payloads.payload import CHUNK, Concat, Extent, Literal, Part, Swapped, Trailer
from shardkit.planning.plan import OutputFile, Plan
from shardkit.writing.copier import Engine
from shardkit.writing.reference_check import LONG, check
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import write_record
from shardkit.writing.writer import forecast

CONTENT = os.urandom(100_003)
EMPTY = PlanRecord("", (), "", __version__)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "big.bin").write_bytes(CONTENT)
    return tmp_path / "big.bin"


def plan_of(*files: OutputFile, shards: Sequence[str] = (), form: str = "anything") -> Plan:
    return Plan(files, {str(number): name for number, name in enumerate(shards)}, {}, 0, (), form)


def written(
    plan: Plan, out: Path, *, jobs: int | None = None, sync: bool = False
) -> Counter[Engine]:
    boot = "" if sync else "this run of the system"
    transaction = Transaction(out, PlanRecord(plan.digest, (), boot, __version__))
    with transaction.begin():
        counts = execute(plan, transaction, Threads(jobs))
        transaction.commit()
    return counts


def mixed(source: Path) -> list[OutputFile]:
    """Files of every kind of part, with runs that begin and end anywhere."""
    runs = [Extent(source, 5000 * number + number, 4999) for number in range(18)]
    return [
        OutputFile("extents", tuple(runs)),
        OutputFile("sub/folder/literal", (Literal(b"header"), runs[3], runs[1])),
        OutputFile(
            "swapped",
            (Swapped(Extent(source, 3, 4000), 4), Literal(b"x"), Extent(source, 100_002, 1)),
        ),
        OutputFile("joined", (Concat((runs[0], Literal(b"between"), runs[7])),)),
        OutputFile("empty", ()),
        OutputFile("whole", (Extent(source, 0, len(CONTENT)),)),
    ]


def expected(file: OutputFile) -> bytes:
    return b"".join(
        bytes(chunk)
        for part in file.parts
        if not isinstance(part, Trailer)
        for chunk in part.chunks()
    )


@pytest.mark.parametrize("jobs", [None, 1, 3, 64])
@pytest.mark.parametrize("sync", [True, False])
def test_files_hold_their_parts_whatever_the_number_of_jobs(
    jobs: int | None, sync: bool, source: Path, tmp_path: Path
) -> None:
    files = mixed(source)
    counts = written(plan_of(*files), tmp_path / "out", jobs=jobs, sync=sync)
    assert {file.name: (tmp_path / "out" / file.name).read_bytes() for file in files} == {
        f.name: expected(f) for f in files
    }
    assert counts.total() == sum(file.nbytes for file in files)


def test_the_forecast_adds_up_to_all_bytes(source: Path, tmp_path: Path) -> None:
    plan = plan_of(*mixed(source))
    counts = forecast(plan, tmp_path)
    assert counts.total() == plan.nbytes
    assert counts[Engine.TRANSFORMED] == 4000 + 2 * 4999 + len(b"between")
    assert counts[Engine.WRITTEN] == len(b"headerx")


def crc_table(crcs: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(crcs)}I", *crcs)


def test_a_trailer_gets_the_crc_of_each_part_before_it(source: Path, tmp_path: Path) -> None:
    parts: tuple[Part, ...] = (
        Literal(b"header"),
        Extent(source, 7, 90_000),
        Literal(b""),
        Swapped(Extent(source, 0, 64), 8),
    )
    file = OutputFile(
        "archive", (*parts, Trailer(16, crc_table), Literal(b"end"), Trailer(24, crc_table))
    )
    written(plan_of(file), tmp_path / "out")
    crcs = [zlib.crc32(expected(OutputFile("", (part,)))) for part in parts]
    first = crc_table(crcs)
    second = crc_table([*crcs, zlib.crc32(first), zlib.crc32(b"end")])
    assert (tmp_path / "out" / "archive").read_bytes() == expected(
        OutputFile("", parts)
    ) + first + b"end" + second


def test_progress_counts_every_byte_once_and_what_was_done_first(
    source: Path, tmp_path: Path
) -> None:
    plan = plan_of(*mixed(source))
    seen: list[Event] = []
    whole = Finished(len(CONTENT), None)
    with Transaction(tmp_path / "out", EMPTY).begin() as transaction:
        transaction.done["whole"] = whole
        execute(plan, transaction, Threads(), on_event=seen.append)
    assert seen[:2] == [
        Event("planned", "out", plan.nbytes),
        Event("resumed", "whole", len(CONTENT)),
    ]
    for file in plan.files:
        of_file = [event for event in seen[1:] if event.file == file.name]
        told = sum(event.nbytes for event in of_file if event.kind in ("resumed", "written"))
        assert told == file.nbytes
        if file.name != "whole":
            assert of_file[0] == Event("started", file.name, file.nbytes)
            assert of_file[-1] == Event("finished", file.name, file.nbytes)


def test_what_is_done_is_not_written_again(source: Path, tmp_path: Path) -> None:
    with Transaction(tmp_path / "out", EMPTY).begin() as transaction:
        (transaction.folder / "whole").write_bytes(b"as it was")
        write_record(transaction.folder, EMPTY.key, "whole", Finished(9, None), sync=False)
    with Transaction(tmp_path / "out", EMPTY).begin() as transaction:
        execute(plan_of(*mixed(source)), transaction, Threads())
        assert transaction.done.keys() == {file.name for file in mixed(source)}
    assert (transaction.folder / "whole").read_bytes() == b"as it was"


def test_a_source_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    plan = plan_of(*mixed(source))
    source.unlink()
    with pytest.raises(FormatError, match=r"big\.bin: cannot be read: No such file"):
        written(plan, tmp_path / "out")


@pytest.mark.parametrize(
    "payload", [Extent, lambda *place: Swapped(Extent(*place), 2)], ids=["copied", "transformed"]
)
def test_a_source_that_became_shorter_is_named(
    payload: type[Extent], source: Path, tmp_path: Path
) -> None:
    plan = plan_of(OutputFile("a", (payload(source, 99_000, 1000),)))
    os.truncate(source, 99_500)
    with pytest.raises(Malformed, match=r"big\.bin: the file ends before byte 100,000"):
        written(plan, tmp_path / "out")


@dataclass(frozen=True, slots=True)
class Failing:
    """A payload whose first bytes come, and then an error."""

    error: BaseException
    nbytes: int = 2 * CHUNK

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Failing:
        raise ValueError("it comes whole")

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(bytes(CHUNK))
        raise self.error


def test_the_first_failure_is_told_and_what_is_whole_is_recorded(
    source: Path, tmp_path: Path
) -> None:
    error = Malformed(source, "is broken")
    files = (
        OutputFile("good", (Literal(bytes(3 * CHUNK)),)),
        OutputFile("bad", (Failing(error),)),
        *mixed(source),
    )
    with pytest.raises(Malformed) as caught:
        written(plan_of(*files), tmp_path / "out", jobs=1)
    assert caught.value is error
    done = os.listdir(tmp_path / "out.partial" / DONE)
    assert "good" in done
    assert "bad" not in done
    assert not os.listdir(tmp_path / "out.partial" / NEW), "nothing half-written is left"


def test_a_full_disk_is_a_sentence(source: Path, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
        written(plan_of(OutputFile("a", (Failing(full),))), tmp_path / "out")
    assert "resumes where it stopped" in str(caught.value.hint)


@dataclass(frozen=True, slots=True)
class Meeting:
    """A payload whose bytes come once as many are asked for theirs as there are places."""

    places: threading.Barrier
    nbytes: int = 1

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Meeting:
        raise ValueError("it comes whole")

    def chunks(self) -> Iterator[memoryview]:
        self.places.wait(timeout=60)
        yield memoryview(b"x")


@pytest.mark.parametrize(
    ("jobs", "together"), [(None, min(8, (os.cpu_count() or 1) + 1)), (2, 2), (5, 5)]
)
def test_so_many_files_are_written_at_a_time(
    jobs: int | None, together: int, tmp_path: Path
) -> None:
    places = threading.Barrier(together)
    files = [OutputFile(f"{number}", (Meeting(places),)) for number in range(2 * together)]
    written(plan_of(*files), tmp_path / "out", jobs=jobs)
    assert {path.read_bytes() for path in (tmp_path / "out").iterdir()} == {b"x"}


def test_an_interrupt_ends_the_other_files_too(source: Path, tmp_path: Path) -> None:
    files = [OutputFile(f"{number}", (Literal(bytes(CHUNK)),) * 4) for number in range(6)]
    count = 0

    def interrupted(event: Event) -> None:
        nonlocal count
        count += event.kind == "written"
        if count == 6:
            raise KeyboardInterrupt

    with (
        Transaction(tmp_path / "out", EMPTY).begin() as transaction,
        pytest.raises(KeyboardInterrupt),
    ):
        execute(plan_of(*files), transaction, Threads(2), on_event=interrupted)
    assert count < 10


def test_a_shard_that_the_reference_reader_does_not_take_is_never_recorded(tmp_path: Path) -> None:
    broken = OutputFile("model.safetensors", (Literal(b"no header at all"),))
    with pytest.raises(OutputError, match="the safetensors library cannot read it"):
        written(plan_of(broken, shards=["model.safetensors"], form="safetensors"), tmp_path / "out")
    assert not (tmp_path / "out.partial" / DONE).exists()


@pytest.mark.parametrize(
    "executable", [sys.executable, "", "/no/such/python", shutil.which("false") or ""]
)
def test_a_long_header_is_read_by_a_process_of_its_own_if_there_can_be_one(
    executable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    head = f'{{"__metadata__":{{"":"{"a" * LONG}"}}}}'.encode()
    content = len(head).to_bytes(8, "little") + head
    (tmp_path / "good").write_bytes(content)
    check(tmp_path / "good", OutputFile("good", (Literal(content),)))
    (tmp_path / "bad").write_bytes(content[:-1])
    with pytest.raises(
        OutputError, match=r"the safetensors library cannot read it: .*invalid header length"
    ):
        check(tmp_path / "bad", OutputFile("bad", (Literal(content),)))


def test_a_companion_is_not_held_to_be_a_shard(tmp_path: Path) -> None:
    companion = OutputFile("config.json", (Literal(b"{}"),))
    written(plan_of(companion, form="safetensors"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


def test_without_the_reference_reader_the_length_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    file = OutputFile("a", (Literal(b"1234"),))
    (tmp_path / "a").write_bytes(b"1234")
    check(tmp_path / "a", file)
    (tmp_path / "a").write_bytes(b"123")
    with pytest.raises(OutputError, match="4 bytes were planned, 3 are there"):
        check(tmp_path / "a", file)
