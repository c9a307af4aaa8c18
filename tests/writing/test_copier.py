"""Moving bytes: each engine gives way to the next where it cannot work, and the bytes are the same
whatever engine moves them.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import FormatError, Malformed
from shardkit.payloads.payload import PAGE, Extent, Literal, Swapped
from shardkit.writing import copier as copying
from shardkit.writing.copier import Copier, Engine, can_clone, clonable, reserve, write_at

CONTENT = os.urandom(50_000)
KERNEL = pytest.mark.skipif(
    not hasattr(os, "copy_file_range"), reason="copies in the kernel need Linux"
)

Call = Callable[..., int]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(CONTENT)
    return tmp_path / "source"


def failing(code: int) -> Call:
    def call(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def nothing(*args: object) -> int:
    return 0


def little(real: Call, most: int) -> Call:
    """A copy_file_range that moves at most *most* bytes at a time, as a signal makes it."""
    return lambda source, output, count, *places: real(source, output, min(count, most), *places)


def copied(
    source: Path,
    output: Path,
    *,
    clones: bool = False,
    runs: tuple[tuple[int, int], ...] = ((7, 49_000),),
) -> Counter[Engine]:
    """Copy *runs* of *source* one after the other, check what came out, and give the bytes by
    engine.
    """
    seen: list[int] = []
    with (
        open(output, "w+b") as file,
        Copier(file.fileno(), clones=lambda path: clones, on_bytes=seen.append) as copier,
    ):
        at = 0
        for start, nbytes in runs:
            copier.write(Extent(source, start, nbytes), at)
            at += nbytes
    assert output.read_bytes() == b"".join(
        CONTENT[start : start + nbytes] for start, nbytes in runs
    )
    assert sum(seen) == copier.counts.total() == at
    return copier.counts


@KERNEL
def test_the_kernel_copies(source: Path, tmp_path: Path) -> None:
    assert copied(source, tmp_path / "out") == {Engine.COPIED: 49_000}


UNABLE = {
    name: failing(getattr(errno, name))
    for name in ("EXDEV", "EINVAL", "EOPNOTSUPP", "ENOSYS", "EPERM")
} | {"zero": nothing}


@KERNEL
@pytest.mark.parametrize("fault", UNABLE)
def test_where_copy_file_range_cannot_sendfile_does(
    fault: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", UNABLE[fault])
    assert copied(source, tmp_path / "out") == {Engine.SENT: 49_000}


@KERNEL
@pytest.mark.parametrize("fault", UNABLE)
def test_where_sendfile_cannot_either_they_are_read_and_written(
    fault: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    monkeypatch.setattr(os, "sendfile", UNABLE[fault])
    assert copied(source, tmp_path / "out") == {Engine.READ: 49_000}


@KERNEL
def test_what_fails_for_a_file_is_not_tried_for_it_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def fails(*args: object) -> int:
        tried.append(args)
        raise OSError(errno.EXDEV, "")

    monkeypatch.setattr(os, "copy_file_range", fails)
    copied(source, tmp_path / "out", runs=((0, 10), (100, 10), (300, 10)))
    assert len(tried) == 1


@KERNEL
def test_an_engine_that_gives_up_half_way_is_taken_over_from_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.copy_file_range, iter([10_000, 20_000, 0])
    monkeypatch.setattr(
        os,
        "copy_file_range",
        lambda source, output, count, *places: (
            (n := next(calls)) and real(source, output, n, *places)
        ),
    )
    assert copied(source, tmp_path / "out") == {Engine.COPIED: 30_000, Engine.SENT: 19_000}


@KERNEL
def test_copies_that_are_cut_short_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", little(os.copy_file_range, 777))
    assert copied(source, tmp_path / "out") == {Engine.COPIED: 49_000}


@KERNEL
def test_a_disk_that_is_full_is_no_reason_to_try_another_engine(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        copied(source, tmp_path / "out")


def test_without_any_call_of_the_kernel_they_are_read_and_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.delattr(os, "pwrite", raising=False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert copied(source, tmp_path / "out", runs=((7, 30_000), (1, 10))) == {Engine.READ: 30_010}


def pretend_clone(source: int, start: int, output: int, at: int, count: int) -> int:
    """What FICLONERANGE does, by copying; refuses what is no whole page."""
    if start % PAGE or at % PAGE or count % PAGE:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    write_at(output, os.pread(source, count, start), at)
    return count


@pytest.mark.parametrize(
    ("start", "at", "nbytes", "cloned"),
    [
        (0, 0, 4096, 4096),
        (0, 0, 4095, 0),
        (10, 10, 20_000, 12_288),
        (4106, 10, 20_000, 12_288),
        (10, 11, 20_000, 0),
        (4095, 4095, 4098, 4096),
        (4096, 8192, 40_000, 36_864),
    ],
)
def test_whole_pages_at_the_same_place_are_cloned_and_the_edges_written(
    start: int,
    at: int,
    nbytes: int,
    cloned: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copying, "_clone", pretend_clone)
    extent = Extent(source, start, nbytes)
    assert clonable(extent, at) == cloned
    with (
        open(tmp_path / "out", "w+b") as file,
        Copier(file.fileno(), clones=lambda p: True, on_bytes=lambda n: None) as copier,
    ):
        copier.write(extent, at)
    assert (tmp_path / "out").read_bytes() == bytes(at) + CONTENT[start : start + nbytes]
    assert copier.counts[Engine.CLONED] == cloned
    assert copier.counts.total() == nbytes


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_what_cannot_be_cloned_after_all_is_copied(
    code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_clone", failing(code))
    assert Engine.CLONED not in copied(source, tmp_path / "out", clones=True, runs=((0, 50_000),))


@given(st.data())
def test_any_runs_by_any_engine_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "source").write_bytes(CONTENT)
    starts = data.draw(st.lists(st.integers(0, len(CONTENT)), min_size=1, max_size=8))
    runs = tuple((start, data.draw(st.integers(0, len(CONTENT) - start))) for start in starts)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("copy_file_range", "sendfile"):
            if hasattr(os, name) and (fault := data.draw(st.sampled_from([None, *UNABLE]))):
                patch.setattr(os, name, UNABLE[fault])
        patch.setattr(
            copying, "_clone", data.draw(st.sampled_from([pretend_clone, failing(errno.EXDEV)]))
        )
        copied(folder / "source", folder / "out", clones=data.draw(st.booleans()), runs=runs)


def test_a_source_that_is_shorter_than_it_was_is_named(source: Path, tmp_path: Path) -> None:
    os.truncate(source, 100)
    with pytest.raises(Malformed, match="ends before byte 49,007"):
        copied(source, tmp_path / "out")


def test_a_source_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    source.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        copied(source, tmp_path / "out")


def test_what_is_no_run_of_a_file_is_streamed(source: Path, tmp_path: Path) -> None:
    seen: list[bytes] = []
    with (
        open(tmp_path / "out", "w+b") as file,
        Copier(file.fileno(), clones=lambda p: False, on_bytes=lambda n: None) as copier,
    ):
        copier.write(Literal(b"header"), 0)
        copier.write(Swapped(Extent(source, 0, 4), 2), 6)
        copier.write(Extent(source, 0, 10), 10, lambda chunk: seen.append(bytes(chunk)))
    swapped = bytes(CONTENT[at] for at in (1, 0, 3, 2))
    assert (tmp_path / "out").read_bytes() == b"header" + swapped + CONTENT[:10]
    assert seen == [CONTENT[:10]]
    assert (
        copier.counts[Engine.WRITTEN],
        copier.counts[Engine.TRANSFORMED],
        copier.counts.total(),
    ) == (6, 4, 20)


def test_the_probe_for_clones_leaves_nothing_and_never_raises(source: Path, tmp_path: Path) -> None:
    before = os.listdir(tmp_path)
    assert can_clone(source, tmp_path) in (True, False)
    assert not can_clone(tmp_path / "none", tmp_path)
    assert not can_clone(source, tmp_path / "none")
    assert os.listdir(tmp_path) == before


def test_room_is_reserved_at_full_length(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+b") as file:
        reserve(file.fileno(), 0)
        reserve(file.fileno(), 12_345)
    assert (tmp_path / "out").stat().st_size in (0, 12_345)  # 0 where the file system cannot
