"""Units of work on a cluster of several machines, which are processes of this one: the same bytes,
whoever is killed.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest

import shardkit
from repository import GOOD
from shardkit.cli import main
from shardkit.errors import FormatError, OutputError, PlanError, ShardkitError
from shardkit.fleet import ray_cluster
from shardkit.fleet.ray_cluster import RayCluster, each_on
from shardkit.metadata.unit_records import DONE
from shardkit.payloads.compressed import Spool
from shardkit.writing.writer import write_one

SOURCE = GOOD / "zip-training.pt"
OPTIONS = {"max_shard": "700B", "checksum": "xxh3"}
needs_ray = pytest.mark.ray


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two machines of one processor each, on loopback, to which this process is
    connected.
    """
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "3")
        patch.setenv("RAY_health_check_timeout_ms", "1000")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        import ray  # which looks at the environment
        from ray import cloudpickle
        from ray.cluster_utils import Cluster

        register: Any = cloudpickle.register_pickle_by_value  # it has no types
        register(sys.modules[__name__])  # the workers have no tests

        cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run on this machine writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return files_in(shardkit.convert(SOURCE, out, **OPTIONS).out)  # type: ignore[arg-type] # texts


@needs_ray
def test_a_cluster_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with pytest.raises(ShardkitError, match=r"no cluster of Ray at '127\.0\.0\.1:9'") as caught:
        shardkit.convert(SOURCE, tmp_path / "out", executor=RayCluster("127.0.0.1:9"))
    assert caught.value.hint


@needs_ray
@pytest.mark.usefixtures("machines")
@pytest.mark.filterwarnings("ignore")
def test_the_bytes_are_those_of_a_run_on_one_machine(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = os.path.relpath(SOURCE)
    events: list[shardkit.Event] = []
    report = shardkit.convert(
        source,
        "out",
        executor="ray",
        on_event=events.append,
        **OPTIONS,  # type: ignore[arg-type] # texts
    )
    assert files_in(tmp_path / "out") == whole
    assert (report.tensors, report.shards) == (7, 7)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    written = sum(event.nbytes for event in events if event.kind == "written")
    assert written == events[0].nbytes, "all bytes of all machines are reported"


@needs_ray
@pytest.mark.usefixtures("machines")
@pytest.mark.filterwarnings("ignore")
def test_offload_prep_and_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = shardkit.offload_prep(SOURCE, tmp_path / "whole", max_shard="700B").out
    arguments = ["offload-prep", str(SOURCE), "-o", str(tmp_path / "out"), "--max-shard", "700B"]
    assert main([*arguments, "--executor", "ray", "--per-node", "2"]) == 0
    assert "7 shards" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == files_in(whole)


@needs_ray
@pytest.mark.usefixtures("machines")
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_verifies_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shardkit.convert(SOURCE, "out", max_shard="700B")
    for against in (None, SOURCE):
        alone = shardkit.verify("out", against)
        found = shardkit.verify("out", against, executor="ray")
        assert found.same
        assert (found.tensors, found.nbytes) == (alone.tensors, alone.nbytes)
        assert (found.unchecked, found.left_out) == (alone.unchecked, alone.left_out)
    with open("out/model-00003-of-00007.safetensors", "r+b") as shard:
        shard.seek(-1, os.SEEK_END)
        shard.write(b"\x7f")
    alone = shardkit.verify("out", SOURCE)
    assert shardkit.verify("out", SOURCE, executor="ray").differences == alone.differences
    assert main(["verify", "out", "--against", str(SOURCE), "--executor", "ray"]) == 1
    assert "differs from" in capsys.readouterr().out
    with pytest.raises(PlanError, match="does all parts"):
        shardkit.verify("out", executor="ray", part="1/2")


@needs_ray
@pytest.mark.usefixtures("machines")
@pytest.mark.filterwarnings("ignore")
def test_a_source_that_is_damaged_is_final_and_the_error_is_ours(tmp_path: Path) -> None:
    source = tmp_path / "model.pt"
    source.write_bytes(SOURCE.read_bytes())

    def cut(event: shardkit.Event) -> None:
        if event.kind == "planned":
            os.truncate(source, 300)

    with pytest.raises(FormatError, match=r"model\.pt: the file ends before byte"):
        shardkit.convert(source, tmp_path / "out", executor="ray", on_event=cut, max_shard="700B")
    assert os.listdir(tmp_path) == ["model.pt"]


def counted(folder: Path) -> int:
    """Add one to the number of files in *folder*."""
    (folder / f"{time.monotonic_ns()}-{os.getpid()}").touch()
    return len(list(folder.iterdir()))


def refused_twice(folder: Path) -> str:
    """What the system refuses the first two times."""
    if counted(folder) < 3:
        raise OSError(5, "Input/output error")
    return "done"


def dying_twice(folder: Path) -> str:
    """What the process is killed at the first two times."""
    if counted(folder) < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def refused(folder: Path) -> str:
    """What the system always refuses."""
    counted(folder)
    raise OSError(28, "No space left on device")


def damaged(folder: Path) -> str:
    """What is wrong for good."""
    counted(folder)
    raise FormatError(Path("model.pt"), "is broken")


def wrong(folder: Path) -> str:
    """What nobody expects."""
    raise ZeroDivisionError("one divided by none")


@needs_ray
@pytest.mark.usefixtures("machines")
@pytest.mark.filterwarnings("ignore")
def test_what_is_tried_again_and_what_is_not(tmp_path: Path) -> None:
    def done(function: Any) -> Any:
        folder = tmp_path / function.__name__
        folder.mkdir()
        ((_, result),) = each_on(RayCluster(per_node=1), function, [folder], str)
        return result

    assert done(refused_twice) == "done"
    assert done(dying_twice) == "done"
    assert isinstance(done(refused), OSError)
    assert len(list((tmp_path / "refused").iterdir())) == ray_cluster._ATTEMPTS
    with pytest.raises(FormatError, match="is broken"):
        done(damaged)
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    with pytest.raises(ShardkitError, match="ZeroDivisionError: 'one divided by none'"):
        done(wrong)


@needs_ray
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(200)
def test_a_machine_that_dies_costs_nothing_but_time(
    machines: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    node = machines.add_node(num_cpus=4)
    machines.wait_for_nodes()
    is_killed = False

    def kill(event: shardkit.Event) -> None:
        nonlocal is_killed
        if event.kind == "finished" and not is_killed:
            is_killed = True
            machines.remove_node(node, allow_graceful=False)

    shardkit.convert(
        SOURCE,
        tmp_path / "out",
        executor="ray",
        on_event=kill,
        limit_rate=2000,
        **OPTIONS,  # type: ignore[arg-type] # texts
    )
    assert is_killed
    assert files_in(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


DRIVER = """
import sys, ray, shardkit
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
shardkit.convert(
    sys.argv[2], sys.argv[3], executor=shardkit.RayCluster(per_node=1), max_shard="700B",
    checksum="xxh3", limit_rate=100,
)
"""


@needs_ray
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(200)
def test_a_driver_that_is_killed_and_started_again_goes_on(
    machines: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, machines.address, str(SOURCE), str(out)]
    )
    done = tmp_path / "out.partial" / DONE
    while not (done.is_dir() and any(done.iterdir())):
        assert driver.poll() is None, "it was to be killed while it works"
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    report = shardkit.convert(SOURCE, out, executor="ray", **OPTIONS)  # type: ignore[arg-type] # texts
    assert report.resumed > 0
    assert files_in(out) == whole


def test_ray_is_asked_for_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ShardkitError, match="Ray is not installed") as caught:
        list(each_on(RayCluster(), refused, [Path()], str))
    assert "shardkit[ray]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"part": "1/2"}, "does all parts"), ({"sync": False}, "not synced")],
)
def test_what_cannot_go_with_an_executor_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for operation in (shardkit.convert, shardkit.offload_prep):
        with pytest.raises(PlanError, match=said) as caught:
            operation(SOURCE, tmp_path / "out", executor="ray", **options)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("source", "out"), [("s3://bucket/model.bin", "out"), ("", "out"), (SOURCE, "s3://bucket/out")]
)
def test_what_is_no_local_path_is_refused_here_too(
    source: str | Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for operation in (shardkit.convert, shardkit.offload_prep):
        with pytest.raises(ShardkitError) as caught:
            operation(source, out, executor="ray")
        assert caught.value.hint
    assert not os.listdir(tmp_path)


def test_an_interrupt_that_comes_out_of_ray_as_a_cause_is_raised_as_itself() -> None:
    with pytest.raises(KeyboardInterrupt), ray_cluster._own_interrupts():
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()
    with pytest.raises(SystemError), ray_cluster._own_interrupts():
        raise SystemError("something else") from ValueError()


def test_an_unknown_executor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no executor 'dask'"):
        shardkit.convert(SOURCE, tmp_path / "out", executor="dask")


@pytest.mark.parametrize("option", [["--address", "auto"], ["--per-node", "4"]])
def test_options_of_a_cluster_need_one(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(SOURCE), "-o", str(tmp_path / "out"), *option]) == 2
    assert f"{option[0]} needs --executor ray" in capsys.readouterr().err


def test_another_executor_is_a_function_of_a_few_lines(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    def one_by_one(work: Any, on_event: Any) -> Iterator[Any]:
        yield from map(write_one, work)

    shardkit.convert(SOURCE, tmp_path / "out", executor=one_by_one, **OPTIONS)  # type: ignore[arg-type] # texts
    assert files_in(tmp_path / "out") == whole


def test_what_is_compressed_is_expanded_once_for_all_tasks_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    source = tmp_path / "model.pt.zst"
    source.write_bytes(zstandard.ZstdCompressor().compress(SOURCE.read_bytes()))
    whole = files_in(shardkit.convert(source, tmp_path / "whole", max_shard="700B").out)
    expansions: list[object] = []
    fill = Spool._fill

    def counted(spool: Spool, file: IO[bytes]) -> None:
        expansions.append(spool)
        fill(spool, file)

    def elsewhere(work: Any, on_event: Any) -> Iterator[Any]:
        for unit in work:
            yield write_one(pickle.loads(pickle.dumps(unit)))

    monkeypatch.setattr(Spool, "_fill", counted)
    shardkit.convert(source, tmp_path / "out", executor=elsewhere, max_shard="700B")
    assert len(expansions) == 1
    assert files_in(tmp_path / "out") == whole
    assert sorted(os.listdir(tmp_path)) == ["model.pt.zst", "out", "whole"]


def test_an_error_of_the_system_becomes_a_sentence_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(cluster: Any, function: Any, items: Any, name_of: Any) -> Iterator[Any]:
        yield items[0], OSError(28, "No space left on device")

    monkeypatch.setattr(ray_cluster, "each_on", refused)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        shardkit.convert(SOURCE, tmp_path / "out", executor=RayCluster())
