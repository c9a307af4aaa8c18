"""Units of work: they pickle, may be done anywhere and more than once, and are refused where they
do not belong.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import shardkit
from repository import GOOD
from shardkit.checkpoint.edits import Edits
from shardkit.errors import OutputError, ShardkitError
from shardkit.metadata.unit_records import DONE, NEW, PlanRecord
from shardkit.planning.options import ConversionOptions
from shardkit.planning.output import Output
from shardkit.planning.prepare import prepare
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import read_records
from shardkit.writing.writer import Work, write_one

SOURCE = GOOD / "zip-training.pt"
EVERY = sorted(GOOD.iterdir())


def planned(source: Path, out: Path, **options: object) -> Output:
    return prepare(source, out, Edits(), ConversionOptions("700B", **options)).output  # type: ignore[arg-type] # a few of its fields


def record(output: Output) -> PlanRecord:
    return PlanRecord(output.plan.digest, output.files, "", shardkit.__version__)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return planned(SOURCE, tmp_path / "out", checksum="xxh3")


@pytest.fixture
def units(output: Output) -> Iterator[list[Work]]:
    """Those of a run that has begun."""
    with Transaction(output.out, record(output)).begin() as transaction:
        yield [
            Work.of(output.plan, file, transaction)
            for file in output.plan.files
            if file.late is None
        ]


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("source", EVERY, ids=lambda path: path.name)
def test_plans_and_units_pickle_and_keep_their_digest(
    source: Path, compress: str | None, tmp_path: Path
) -> None:
    refused = output = None
    try:
        output = planned(source, tmp_path / "out", compress=compress)
    except ShardkitError as error:
        refused = error
    if refused is not None:
        again = pickle.loads(pickle.dumps(refused))
        assert (type(again), str(again), vars(again)) == (
            type(refused),
            str(refused),
            vars(refused),
        )
        return
    assert output is not None
    assert pickle.loads(pickle.dumps(output.plan)).digest == output.plan.digest
    transaction = Transaction(output.out, record(output))
    for file in output.plan.files:
        if file.late is None:
            unit = Work.of(output.plan, file, transaction)
            again = pickle.loads(pickle.dumps(unit))
            assert (again.file.parts, again.sums) == (unit.file.parts, unit.sums)


def test_the_same_source_is_planned_alike_by_a_relative_path_and_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys; from shardkit import Edits; from shardkit.planning.prepare import prepare;"
        "print(prepare(sys.argv[1], sys.argv[2], Edits(dtype=None)).plan.digest)"
    )
    for source in (SOURCE, GOOD / "folder-safetensors"):
        digests = {prepare(source, tmp_path / "out", Edits()).plan.digest}
        with monkeypatch.context() as inside:
            inside.chdir(source.parent)
            digests.add(prepare(source.name, tmp_path / "out", Edits()).plan.digest)
        command = [sys.executable, "-c", program, str(source), str(tmp_path / "elsewhere")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert {*digests, said.stdout.strip()} == digests
        assert len(digests) == 1


def test_a_unit_is_done_in_another_process_with_the_same_result(
    units: list[Work], output: Output, tmp_path: Path
) -> None:
    whole = shardkit.convert(SOURCE, tmp_path / "whole", max_shard="700B", checksum="xxh3").out
    program = (
        "import pickle, sys; from shardkit.writing.writer import write_one;"
        "sys.stdout.buffer.write(pickle.dumps(write_one(pickle.load(sys.stdin.buffer))))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for unit in units:
        ran = subprocess.run(
            [sys.executable, "-c", program],
            input=pickle.dumps(unit),
            check=True,
            capture_output=True,
            env=environment,
        )
        done = pickle.loads(ran.stdout)
        assert done.name == unit.file.name
        written = output.out.with_name("out.partial") / done.name
        assert written.read_bytes() == (whole / done.name).read_bytes()
    records = {each.name: each for each in read_records(units[0].folder)}
    assert records.keys() == {unit.file.name for unit in units}
    assert all(each.by and each.finished.digests for each in records.values())


def test_units_that_are_done_twice_at_once_do_no_harm(units: list[Work]) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for unit in units:
                write_one(unit)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    folder = units[0].folder
    assert {path.name for path in (folder / DONE).iterdir()} == {u.file.name for u in units}
    assert not list((folder / NEW).iterdir())


def test_a_unit_of_another_version_is_refused_by_name(units: list[Work]) -> None:
    with pytest.raises(OutputError, match=r"unit of work 'model.*planned by shardkit '0\.0\.1'"):
        write_one(replace(units[0], version="0.0.1"))


def test_a_unit_of_another_plan_is_refused_by_name(units: list[Work]) -> None:
    with pytest.raises(OutputError, match="which holds another plan") as caught:
        write_one(replace(units[0], key="0" * 64))
    assert "plan again" in str(caught.value.hint)


def test_a_unit_without_a_run_is_refused(units: list[Work], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="which holds no plan"):
        write_one(replace(units[0], folder=tmp_path / "empty"))
