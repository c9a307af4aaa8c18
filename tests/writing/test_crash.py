"""A fault at every system call of the writer in turn: the output is whole or not there, and the
same command mends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import shardkit
from repository import TESTS
from shardkit import __version__
from shardkit.errors import OutputError
from shardkit.metadata.unit_records import Finished, PlanRecord
from shardkit.writing.partial_folder import remove
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import write_record

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads paths of descriptors from /proc"
)

if sys.platform == "linux":
    from failer import struck
    from injection import BROKEN, FULL, Call, Layer
    from scenarios import SCENARIOS, Case, Scenario, main_folder, tree

FEWEST = 30  # calls that the shortest of the scenarios makes
STEP = 8  # of the calls of a run, every eighth is killed in this test, and each one of the commit
CHANGES = ("write", "pwrite", "copy_file_range", "sendfile", "ftruncate")
NAMES = [scenario.name for scenario in SCENARIOS]
OFTEN = ("folder", "parts", "resume", "exchange", "renames", "single-overwrite")
KILLER = TESTS / "crash" / "killer.py"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs would only wait for the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=memory if os.access(memory, os.W_OK) else tmp_path
    ) as folder:
        yield Path(folder)


class Stopped(BaseException):
    """The process stops here, as far as this test can have it."""


def stopped(call: Call, real: Callable[[], object], args: tuple[object, ...]) -> None:
    raise Stopped


def in_process(program: Path, *arguments: object) -> str:
    """What *program* prints, run where a fork finds one thread only."""
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=NAMES)
def test_an_error_at_any_call_leaves_the_output_whole_or_not_there(
    scenario: Scenario, step: int, folder: Path
) -> None:
    case = Case.at(main_folder(folder, scenario.name), scenario)
    sweep = struck(case, BROKEN, step=step)
    assert not sweep.faults, "\n".join(sweep.faults)
    assert sweep.points >= FEWEST // step
    assert not sweep.left["neither"]


def test_a_full_disk_at_any_call_is_told_with_what_to_do(folder: Path) -> None:
    case = Case.at(main_folder(folder, "full"), SCENARIOS[0])
    sweep = struck(case, FULL)
    assert not sweep.faults, "\n".join(sweep.faults)
    assert sweep.points >= FEWEST


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_kill_at_any_call_leaves_the_output_whole_or_not_there(name: str, folder: Path) -> None:
    said = json.loads(in_process(KILLER, folder, name, STEP))
    assert not said["faults"], "\n".join(said["faults"])
    assert said["points"] >= FEWEST


def test_a_swap_that_was_killed_between_its_renames_is_undone_by_the_next_run(folder: Path) -> None:
    case = Case.at(main_folder(folder, "undone"), SCENARIOS[NAMES.index("renames")])
    case.reset()
    layer = Layer(case.work)
    assert case.strike(layer) is None
    second = max(number for number, call in enumerate(layer.calls) if call.name == "rename")
    case.reset()
    layer = Layer(case.work, second, stopped)
    with pytest.raises(Stopped):
        case.strike(layer)
    assert not (case.work / "out").exists()
    with pytest.raises(OutputError, match="exists"):
        shardkit.convert(case.source, case.work / "out")
    assert {
        name: data for name, data in tree(case.work).items() if name.startswith("out/")
    } == case.old


def test_a_removal_that_was_cut_short_leaves_no_foreign_folder(folder: Path) -> None:
    for at in range(1000):
        out, partial = folder / f"{at}" / "out", folder / f"{at}" / "out.partial"
        plan = PlanRecord("", (), "", __version__)
        with Transaction(out, plan).begin():
            (partial / "a").write_text("a")
            (partial / "sub").mkdir()
            (partial / "sub" / "b").write_text("b")
            write_record(partial, plan.key, "a", Finished(1, None), sync=True)
        layer = Layer(partial.parent, at, BROKEN)
        with layer.installed(), suppress(OSError):
            remove(partial)
        if layer.struck is None:
            break
        another = PlanRecord("another", (), "", __version__)
        with Transaction(out, another).begin() as transaction:
            assert not transaction.done
    else:
        raise AssertionError("it never ends")
    assert at > 5
    assert os.listdir(folder / f"{at}") == []


def test_the_order_of_syncs_lets_nothing_be_lost_in_a_power_cut(folder: Path) -> None:
    case = Case.at(main_folder(folder, "order"), SCENARIOS[NAMES.index("exchange")])
    case.reset()
    layer = Layer(case.work)
    assert case.strike(layer) is None
    calls = layer.calls

    def when(name: str, path: str) -> int:
        """The last of such calls."""
        return max(number for number, call in enumerate(calls) if call == Call(name, path))

    partial, done = "out.partial", "out.partial/.shardkit/done"
    written = [
        Path(name).relative_to("out").as_posix() for name in case.new if name.startswith("out/")
    ]
    assert len(written) > 4
    new = [  # in the order in which they are made: of each file, its bytes and then its record
        call.path
        for call in calls
        if call.name == "open" and call.path.startswith(f"{partial}/.shardkit/new/")
    ]
    plan, *pairs = new
    assert len(pairs) == 2 * len(written)
    for content, record in zip(pairs[::2], pairs[1::2], strict=True):
        for path in (content, record):
            synced = when("fsync", path)
            assert not [c for c in calls[synced:] if c.path == path and c.name in CHANGES]
            assert synced < when("replace", path)
        assert when("replace", content) < when("replace", record), "recorded once it lasts"
        assert when("replace", record) < when("fsync", partial)
    assert when("replace", plan) < when("open", pairs[0]), "a record is of a plan that is there"
    swap = when("exchange", partial)
    for folder_ in (partial, f"{partial}/sub", done):
        assert when("fsync", folder_) < swap
    assert swap < when("fsync", ".")
    cleared = [
        number for number in range(swap, len(calls)) if calls[number].name in ("unlink", "rmdir")
    ]
    assert when("fsync", ".") < cleared[0], "nothing old is removed before the new is sure to stay"
    assert calls[-2] == Call("unlink", "out/.shardkit/lock"), "the lock goes last"
    assert calls[-1] == Call("rmdir", "out/.shardkit")
